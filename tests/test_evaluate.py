"""Scores and answers against loops without caches, the harness, scikit-learn and brute force."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_harness
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import f1_score
from tiny import CONFIG

from learnware_jax.slm import decoder, evaluate
from learnware_jax.slm.decoder import Adapter, forward, init_params, logits, param_shapes
from learnware_jax.slm.evaluate import Question, answers, choice_scores, score_choices
from learnware_jax.slm.weights import load_model

CONFIG = CONFIG._replace(positions=49)


@functools.cache
def params():
    return init_params(jax.random.key(0), CONFIG, scale=0.3)


@functools.cache
def adapters():
    """Three, of which the second is the model itself."""
    rng, a, b = np.random.default_rng(0), {}, {}
    for name in ("query", "value", "up"):
        layers, inputs, outputs = param_shapes(CONFIG)["layers"][name]["kernel"].shape
        a[name] = jnp.asarray(rng.normal(size=(3, layers, inputs, 2)) / 6, jnp.float32)
        b[name] = jnp.asarray(rng.normal(size=(3, layers, 2, outputs)) / 4, jnp.float32)
        b[name] = b[name].at[1].set(0)
    return Adapter(a, b, jnp.array([1.0, 1.0, 2.0]))


def pick(k):
    return jax.tree.map(lambda x: x[k], adapters())


@jax.jit
def score(params, ids, adapter):
    hidden, _ = forward(params, ids, config=CONFIG, adapter=adapter)
    return logits(params, hidden, config=CONFIG)


def after(k, prompt, choice):
    """Scores of the tokens of a choice in float64: all of the text at once, without a cache."""
    ids = np.zeros((1, 50), np.int32)
    ids[0, : len(prompt) + len(choice)] = [*prompt, *choice]
    scores = np.asarray(score(params(), ids, pick(k)), np.float64)[0]
    return scores[len(prompt) - 1 :][: len(choice)]


@functools.cache
def questions():
    """Prompts of 1 to 45 tokens, 1 to 4 choices of 1 to 5 tokens, which the model just takes.

    The first choice of question i is what adapter i % 3 has for the likeliest.
    """
    rng, made = np.random.default_rng(1), []
    for i, length in enumerate([1, 45, *rng.integers(1, 46, 7)]):
        prompt, likeliest = rng.integers(0, 97, length).tolist(), []
        for _ in range(1 + i % 3):
            likeliest.append(int(after(i % 3, prompt, [*likeliest, 0])[-1].argmax()))
        others = [rng.integers(0, 97, rng.integers(1, 6)).tolist() for _ in range(i % 4)]
        made.append(Question(prompt, [likeliest, *others]))
    made[1].choices[1][:] = range(5)
    return made


@functools.cache
def by_loop():
    """Log-likelihoods, and whether greedy: one text at a time, without a cache, in float64."""
    shape = (3, 9, 4)
    found, greedy = np.full(shape, -np.inf), np.zeros(shape, bool)
    for k, i in np.ndindex(shape[:2]):
        prompt, choices = questions()[i]
        for c, choice in enumerate(choices):
            scores = after(k, prompt, choice)
            greedy[k, i, c] = (scores.argmax(-1) == choice).all()
            scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
            found[k, i, c] = scores[np.arange(len(choice)), choice].sum()
    return found, greedy


@functools.cache
def together(reuse=True):
    done = []
    found = score_choices(
        params(),
        CONFIG,
        questions(),
        adapters=adapters(),
        batch_tokens=128,
        reuse=reuse,
        done=done.append,
    )
    assert sum(done) == 9 and len(done) > 2
    return found


@pytest.mark.parametrize("reuse", [True, False])
def test_scores_equal_a_loop_without_cache(reuse):
    found = together(reuse).likelihood
    wanted, _ = by_loop()
    there = np.isfinite(wanted)
    assert_array_equal(np.isfinite(found), there)
    assert_allclose(found[there], wanted[there], rtol=0, atol=1e-4)
    assert (~there).sum() == 3 * (3 * 3 + 2 * 2 + 2 * 1)  # of 9 questions with 1 to 4 choices
    assert np.abs(found[0][there[0]] - found[1][there[0]]).max() > 1  # adapters matter
    # The longest text has one token more than the model's positions: the last is never an input.
    assert max(len(p) + len(c) for p, choices in questions() for c in choices) == 50


@pytest.mark.parametrize("reuse", [True, False])
def test_greedy_is_whether_every_token_is_the_likeliest(reuse):
    found, (_, wanted) = together(reuse).greedy, by_loop()
    assert_array_equal(found, wanted)
    assert all(wanted[i % 3, i, 0] for i in range(9))
    assert wanted[:, :, 0].sum() < 20 and not wanted[:, :, 2:].any()


@functools.cache
def short():
    chosen = [i for i, q in enumerate(questions()) if len(q.prompt) <= 32]
    assert len(chosen) > 4
    return chosen


def test_order_batches_and_stretches_of_adapters_do_not_matter():
    order = np.random.default_rng(2).permutation(short())
    shuffled = [questions()[i] for i in order]
    found = choice_scores(
        params(), CONFIG, shuffled, adapters=adapters(), batch_tokens=64, together=2
    )
    assert_allclose(found, together().likelihood[:, order], rtol=0, atol=2e-5)


def test_many_adapters_are_each_alone():
    own = [questions()[i] for i in short()]
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[None, k], adapters())
        alone = choice_scores(params(), CONFIG, own, adapters=one, batch_tokens=128)
        assert_allclose(alone[0], together().likelihood[k, short()], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "questions, message",
    [
        ([], "got no items; want at least one"),
        ([Question([1], [[2]]), Question([], [[2]])], "item 1 has an empty prompt or choice"),
        ([Question([1], [])], "item 0 has an empty prompt or choice"),
        ([Question([1], [[2], []])], "item 0 has an empty prompt or choice"),
        (
            [Question([1] * 47, [[2], [2] * 4])],
            "item 0 has 51 tokens, the model takes 49 and one more",
        ),
    ],
)
def test_items_that_cannot_be_scored(questions, message):
    with pytest.raises(ValueError, match=f"evaluate: {message}"):
        choice_scores(params(), CONFIG, questions, adapters=adapters())


def test_prompts_that_leave_no_room_for_answers():
    with pytest.raises(ValueError, match="item 1 has 51 tokens, the model takes 49"):
        answers(params(), CONFIG, [[1], [1] * 46], adapters=adapters(), steps=5, end=0)


@pytest.mark.parametrize("family", make_harness.FAMILIES)
def test_scores_equal_those_of_the_harness(family):
    """Its own numbers, with torch below, stored: texts too long for the model among them."""
    stored = json.loads(make_harness.FIXTURE.read_text())[family]["loglikelihood"]
    model = load_model(make_harness.FOLDER / family)

    def tokens(text):
        return model.tokenizer.encode(text).ids

    items = []
    for (context, continuation), _ in stored:
        before = tokens(context)
        if model.start is not None or not before:
            before = [model.end if model.start is None else model.start, *before]
        choice = tokens(continuation)
        kept = [*before, *choice][-model.config.positions - 1 :]
        items.append(Question(kept[: -len(choice)], [choice]))
    assert max(len(q.prompt) + len(q.choices[0]) for q in items) == model.config.positions + 1
    nothing = Adapter({}, {}, jnp.zeros(1))
    found = score_choices(model.params, model.config, items, adapters=nothing, batch_tokens=256)
    wanted = np.array([answer[0] for _, answer in stored])
    # Sums over up to 60 tokens.
    assert_allclose(found.likelihood[0, :, 0], wanted, rtol=0, atol=2e-4)
    greedy = [answer[1] for _, answer in stored]
    assert_array_equal(found.greedy[0, :, 0], greedy)
    assert len(stored) == 24 and sum(greedy) == 3


def test_answers_are_those_of_generate_alone():
    prompts, done = [q.prompt for q in questions()], []
    shared = {"adapters": adapters(), "steps": 5, "batch_tokens": 128, "done": done.append}
    free = answers(params(), CONFIG, prompts, end=-1, **shared)
    for k, i in np.ndindex(3, 9):
        ids = np.zeros((1, 48), np.int32)
        ids[0, : len(prompts[i])] = prompts[i]
        alone = decoder.generate(
            params(),
            ids,
            np.array([len(prompts[i])]),
            config=CONFIG,
            adapter=pick(k),
            steps=5,
            end=-1,
        )
        assert free[k][i] == alone[0].tolist()
    assert sum(done) == 9
    # And now one of these tokens ends an answer, and is no part of it.
    end = free[0][short()[0]][3]
    ended = answers(params(), CONFIG, [prompts[i] for i in short()], end=end, **shared)
    wanted = [[[*each[i], end] for i in short()] for each in free]
    assert ended == [[row[: row.index(end)] for row in rows] for rows in wanted]
    assert {5, 3} <= {len(answer) for rows in ended for answer in rows}


# Numbers in texts, and sums over items.


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 42.", 42),
        ("3 and 4, so 7", 7),
        ("1,234,567.5 dollars", 1234567.5),
        ("$1,200", 1200),
        ("minus: -3.25", -3.25),
        ("(-7)", -7),
        ("x = -12,000", -12000),
        ("10-20", 20),  # a range, no sign
        ("step-3", 3),
        ("0.5%", 0.5),
        ("only .75 of it", 0.75),
        ("-.5", -0.5),
        ("version 1.2.3", 3),
        ("5,", 5),
        ("007", 7),
        ("#### 18\n", 18),
        ("none", None),
        ("", None),
        ("- . ,", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert evaluate.last_number(text) == number


@pytest.mark.parametrize(
    "text, answer, same",
    [
        ("it is 1,000", "1000.0", True),
        ("0.33333", "0.3333", True),  # 3e-5 apart
        ("0.334", "0.3333", False),
        ("1000.05", "1000.01", True),  # relative 4e-5
        ("1000.05", "1000", False),  # whole numbers are exact
        ("10000001", "10000000", False),
        ("0.00005", "0.00001", True),  # absolute 4e-5
        ("-5", "5", False),
        ("none", "5", False),
        ("5", "none", False),
        ("none", "none", False),
    ],
)
def test_same_numbers(text, answer, same):
    assert evaluate.same_number(text, answer) == same


@pytest.mark.parametrize(
    "text, answer, same",
    [
        ("So it is 7", "7", True),
        ("seven", "7", False),
        (" Carol \n", "carol.", True),
        ("New   York.", "new york", True),
        ("York", "New York", False),
    ],
)
def test_same_answers(text, answer, same):
    assert evaluate.same_answer(text, answer) == same


def test_accuracy_by_hand():
    """Three of four: s^2 = (3 / 16 + 9 / 16) / 3 = 1 / 4, divided by 4 and rooted."""
    assert evaluate.accuracy([True, True, False, True]) == (0.75, 0.25)
    assert evaluate.accuracy(np.zeros(5, bool)) == (0, 0)
    value, error = evaluate.accuracy([True])
    assert value == 1 and math.isnan(error)


@pytest.mark.parametrize("seed", range(4))
def test_macro_f1_equals_that_of_scikit_learn(seed):
    """Labels that only occur in predictions count as wrong, and not as labels."""
    rng = np.random.default_rng(seed)
    wanted = rng.choice(["a", "b", "c", "d"], 60, p=[0.6, 0.2, 0.15, 0.05]).tolist()
    noise = rng.choice(["a", "b", "c", "d", "e", ""], 60).tolist()
    predicted = [
        w if keep else n for w, n, keep in zip(wanted, noise, rng.random(60) < 0.5, strict=True)
    ]
    labels = sorted(set(wanted))
    score = functools.partial(f1_score, average="macro", zero_division=0)
    found = evaluate.macro_f1(predicted, wanted)
    assert_allclose(found.value, score(wanted, predicted, labels=labels), rtol=1e-12)
    left_out = [
        score(w, predicted[:i] + predicted[i + 1 :], labels=sorted(set(w)))
        for i, w in enumerate(wanted[:i] + wanted[i + 1 :] for i in range(60))
    ]
    jackknife = math.sqrt(59 / 60 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert_allclose(found.stderr, jackknife, rtol=1e-9)


def test_macro_f1_by_hand():
    """F1 of a: twice 1 right, over 2 wanted and 2 predicted; of b, never predicted: 0."""
    assert_allclose(evaluate.macro_f1(["a", "a", "x"], ["a", "b", "a"]).value, 2 / 4 / 2)
    assert evaluate.macro_f1(["a", "b"], ["a", "b"]) == (1, 0)
    assert math.isnan(evaluate.macro_f1(["a"], ["a"]).stderr)


def test_batches_hold_every_item_once_and_what_stands_behind_it_too():
    batches = list(evaluate._batches([20, 40, 31, 20, 5], batch_tokens=128, behind=32))
    # Prompts of up to 32 tokens, 32 behind each: two rows; of up to 48: one.
    assert [(width, rows, list(items)) for width, rows, items in batches] == [
        (48, 1, [1]),
        (32, 2, [2]),
        (24, 2, [0, 3]),
        (16, 2, [4]),
    ]
    ((_, rows, items),) = evaluate._batches([20], batch_tokens=128, behind=1000)
    assert rows == 1 and list(items) == [0]


def test_a_shared_beginning_changes_no_score():
    """Two instructions of different lengths, questions of both in every batch, one of neither."""
    rng, made, shared = np.random.default_rng(3), [], []
    heads = [rng.integers(0, 97, n).tolist() for n in (7, 3)]
    for i in range(9):
        head = heads[i % 2] if i < 8 else []
        own = rng.integers(0, 97, rng.integers(1, 30)).tolist()
        choices = [rng.integers(0, 97, rng.integers(1, 4)).tolist() for _ in range(1 + i % 3)]
        made.append(Question([*head, *own], choices))
        shared.append(len(head))
    options = {"adapters": adapters(), "batch_tokens": 128}
    wanted = score_choices(params(), CONFIG, made, **options)
    found = score_choices(params(), CONFIG, made, shared=shared, **options)
    assert_allclose(found.likelihood, wanted.likelihood, rtol=0, atol=1e-5)
    assert_array_equal(found.greedy, wanted.greedy)
    # Single tokens take another way: nothing is run behind the prompt.
    single = [q._replace(choices=[choice[:1] for choice in q.choices]) for q in made]
    wanted = choice_scores(params(), CONFIG, single, **options)
    found = choice_scores(params(), CONFIG, single, shared=shared, **options)
    assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_prompt_that_is_all_shared_is_refused():
    made = [Question([1, 2], [[3]]), Question([1, 2, 4], [[3]])]
    with pytest.raises(ValueError, match="item 0 shares 2 tokens of its prompt of 2"):
        choice_scores(params(), CONFIG, made, adapters=adapters(), shared=[2, 2])
    with pytest.raises(ValueError, match="leave `shared` out"):
        choice_scores(params(), CONFIG, made, adapters=adapters(), shared=[1, 1], reuse=False)
