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

from learnware_jax.slm import decoder, evaluate
from learnware_jax.slm.decoder import Adapter, Config, forward, init_params, logits, param_shapes
from learnware_jax.slm.evaluate import Question, answers, choice_scores, score_choices
from learnware_jax.slm.weights import load_model

CONFIG = Config(
    vocabulary=97,
    layers=2,
    width=32,
    feedforward=48,
    heads=4,
    kv_heads=2,
    head_width=8,
    epsilon=1e-6,
    theta=10_000.0,
    positions=64,
)


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


def questions(count=9, longest=45):
    """Prompts of 1 to `longest` tokens; 1 to 4 choices of 1 to 5 tokens."""
    rng = np.random.default_rng(1)
    lengths = [1, longest, *rng.integers(1, longest + 1, count - 2)]
    return [
        Question(
            rng.integers(0, 97, n).tolist(),
            [rng.integers(0, 97, rng.integers(1, 6)).tolist() for _ in range(1 + i % 4)],
        )
        for i, n in enumerate(lengths)
    ]


@jax.jit
def score(params, ids, adapter):
    hidden, _ = forward(params, ids, config=CONFIG, adapter=adapter)
    return logits(params, hidden, config=CONFIG)


@functools.cache
def by_loop():
    """Log-likelihoods, and whether greedy: one text at a time, without a cache, in float64."""
    shape = (3, 9, 4)
    found, greedy = np.full(shape, -np.inf), np.zeros(shape, bool)
    for k, i in np.ndindex(shape[:2]):
        prompt, choices = questions()[i]
        for c, choice in enumerate(choices):
            ids = np.zeros((1, 50), np.int32)
            ids[0, : len(prompt) + len(choice)] = prompt + choice
            scores = np.asarray(score(params(), ids, pick(k)), np.float64)[0]
            scores = scores[len(prompt) - 1 :][: len(choice)]
            greedy[k, i, c] = (scores.argmax(-1) == choice).all()
            scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
            found[k, i, c] = scores[np.arange(len(choice)), choice].sum()
    return found, greedy


@functools.cache
def together():
    return choice_scores(params(), CONFIG, questions(), adapters=adapters(), batch_tokens=128)


@pytest.mark.parametrize("reuse", [True, False])
def test_scores_equal_a_loop_without_cache(reuse):
    done = []
    found = choice_scores(
        params(),
        CONFIG,
        questions(),
        adapters=adapters(),
        batch_tokens=128,
        reuse=reuse,
        done=done.append,
    )
    wanted, _ = by_loop()
    assert_array_equal(np.isinf(found), np.isinf(wanted))
    there = np.isfinite(wanted)
    assert_allclose(found[there], wanted[there], rtol=0, atol=1e-4)
    assert np.isinf(wanted).sum() == 3 * (3 * 3 + 2 * 2 + 2 * 1)  # of 9 questions with 1 to 4
    assert np.abs(found[0] - found[1])[there[0]].max() > 1  # adapters matter
    assert sum(done) == 9 and len(done) > 3


def test_order_batches_and_stretches_of_adapters_do_not_matter():
    order = np.random.default_rng(2).permutation(9)
    shuffled = [questions()[i] for i in order]
    found = choice_scores(
        params(), CONFIG, shuffled, adapters=adapters(), batch_tokens=48, together=2
    )
    assert_allclose(found, together()[:, order], rtol=0, atol=2e-5)


def test_many_adapters_are_each_alone():
    short = [i for i, q in enumerate(questions()) if len(q.prompt) <= 32]
    assert len(short) > 4
    for k in range(3):
        alone = choice_scores(
            params(),
            CONFIG,
            [questions()[i] for i in short],
            adapters=jax.tree.map(lambda x, k=k: x[None, k], adapters()),
            batch_tokens=128,
        )
        assert_allclose(alone[0], together()[k, short], rtol=0, atol=2e-5)


def test_greedy_is_what_greedy_decoding_gives():
    own = questions()
    start = answers(params(), CONFIG, [q.prompt for q in own], adapters=adapters(), steps=6, end=-1)
    own = [
        Question(q.prompt, [start[0][i][:1], start[1][i][:3], [*start[2][i][:2], 96], *q.choices])
        for i, q in enumerate(own)
    ]
    for reuse in (True, False):
        found = score_choices(
            params(), CONFIG, own, adapters=adapters(), batch_tokens=128, reuse=reuse
        )
        for k, i in np.ndindex(3, 9):
            for c, choice in enumerate(own[i].choices):
                assert found.greedy[k, i, c] == (start[k][i][: len(choice)] == choice)
            assert not found.greedy[k, i, len(own[i].choices) :].any()
        assert found.greedy[0, :, 0].all() and found.greedy[1, :, 1].all()
        assert not found.greedy.all()
        _, wanted = by_loop()
        assert_array_equal(found.greedy[0, 3, 3:], wanted[0, 3])


def test_scores_take_all_positions():
    """The last token of a text is never an input: one more than the model's positions fits."""
    full = [Question([1] * 60, [[2] * 5]), Question([1, 2], [[3]])]
    assert np.isfinite(choice_scores(params(), CONFIG, full, adapters=adapters())).all()
    answers(params(), CONFIG, [[1] * 60], adapters=adapters(), steps=5, end=0)
    with pytest.raises(ValueError, match="item 0 has 66 tokens, the model takes 64 and one more"):
        answers(params(), CONFIG, [[1] * 61], adapters=adapters(), steps=5, end=0)


@pytest.mark.parametrize(
    "questions, message",
    [
        ([], "got no items; want at least one"),
        ([Question([1], [[2]]), Question([], [[2]])], "item 1 has an empty prompt or choice"),
        ([Question([1], [])], "item 0 has an empty prompt or choice"),
        ([Question([1], [[2], []])], "item 0 has an empty prompt or choice"),
        ([Question([1] * 62, [[2], [2] * 4])], "item 0 has 66 tokens, the model takes 64"),
    ],
)
def test_items_that_cannot_be_scored(questions, message):
    with pytest.raises(ValueError, match=f"evaluate: {message}"):
        choice_scores(params(), CONFIG, questions, adapters=adapters())


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
    nothing = decoder.Adapter({}, {}, jnp.zeros(1))
    found = score_choices(model.params, model.config, items, adapters=nothing, batch_tokens=256)
    wanted = np.array([answer[0] for _, answer in stored])
    # Sums over up to 60 tokens.
    assert_allclose(found.likelihood[0, :, 0], wanted, rtol=0, atol=2e-4)
    greedy = [answer[1] for _, answer in stored]
    assert_array_equal(found.greedy[0, :, 0], greedy)
    assert len(stored) == 24 and sum(greedy) == 3


def test_answers_are_those_of_generate_alone():
    prompts, done = [q.prompt for q in questions()], []
    shared = {"adapters": adapters(), "steps": 6, "batch_tokens": 128, "done": done.append}
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
            steps=6,
            end=-1,
        )
        assert free[k][i] == alone[0].tolist()
    assert sum(done) == 9
    # And now one of these tokens ends an answer, and is no part of it.
    end = free[0][2][3]
    short = [i for i, prompt in enumerate(prompts) if len(prompt) <= 32]
    ended = answers(params(), CONFIG, [prompts[i] for i in short], end=end, **shared)
    wanted = [[[*each[i], end] for i in short] for each in free]
    assert ended == [[row[: row.index(end)] for row in rows] for rows in wanted]
    assert {6, 3} <= {len(answer) for rows in ended for answer in rows}


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
        ("1000.05", "1000", True),  # relative 5e-5
        ("1001", "1000", False),
        ("0.00005", "0", True),
        ("-5", "5", False),
        ("none", "5", False),
        ("5", "none", False),
        ("none", "none", False),
    ],
)
def test_same_numbers(text, answer, same):
    assert evaluate.same_number(text, answer) == same


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
    predicted = [w if keep else n for w, n, keep in zip(wanted, noise, rng.random(60) < 0.5)]
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
