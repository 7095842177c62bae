"""What experiments make of vector specifications, with two models of a few thousand numbers."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_decoders
from ml_collections import ConfigDict
from numpy.testing import assert_allclose, assert_array_equal

from experiments import vectors
from learnware_jax.slm import lora, prompts
from learnware_jax.slm.decoder import forward, logits
from learnware_jax.slm.finetune import Text
from learnware_jax.slm.weights import load_model
from learnware_jax.specification import pave
from learnware_jax.specification.header import (
    SCHEMA,
    Header,
    IncompatibleSpecifications,
    check_same_space,
    to_json,
)
from learnware_jax.specification.sketch import make_sketch, sketch_of

WIDTHS = (10, 16)
FIT = pave.Settings(steps=10, batch=2, rate=1e-5, decay=0.5, warmup=0.1, clip=1.0, pull=1.0)


@functools.cache
def model(family):
    """Of 96 words, w0 to w92 being tokens 3 to 95; llama has token 1 put before a text."""
    return load_model(make_decoders.FOLDER / family)


def settings(**changes):
    return ConfigDict(
        dict(
            lora=dict(rank=4, alpha=8.0, targets=("query", "key", "value"), seed=0) | changes,
            widths=WIDTHS,
            dtype="float32",
            together=3,
        )
    )


@functools.cache
def reference(family="llama"):
    return vectors.open_reference(model(family), settings())


def words(*numbers):
    return " ".join(f"w{i}" for i in numbers)


@functools.cache
def texts():
    """Seven, of both widths in turn, with 1 to 3 learned tokens."""
    rng = np.random.default_rng(0)
    sizes = [((4, 1), (10, 3), (4, 2))[i % 3] for i in range(7)]
    pairs = [[words(*rng.integers(0, 93, size)) for size in pair] for pair in sizes]
    return vectors.texts_of(reference(), [tuple(pair) for pair in pairs], "answers")


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=2)
@jax.value_and_grad
def mean_loss(b, ids, first):
    """Cross-entropy a learned token of one text, without batches, padding and low ranks."""
    params, config, *_ = reference().model
    merged = lora.merge(params, reference().adapter._replace(b=b))
    hidden, _ = forward(merged, ids[None], config=config)
    scores = jax.nn.log_softmax(logits(merged, hidden, config=config)[0, :-1])
    return -scores[jnp.arange(len(ids) - 1), ids[1:]][first - 1 :].mean()


def joined(b):
    """B's leaves in the layout of `make_vectors`."""
    return np.concatenate([b[name] for name in reference().adapter.b], -1)


@functools.cache
def alone():
    """Every text's gradient at the start of its mean loss, (n, layers, rank, all outputs)."""
    start = reference().adapter.b
    return np.array([joined(mean_loss(start, jnp.array(ids), n)[1]) for ids, n in texts()])


def counts():
    return np.array([len(text.ids) - text.first for text in texts()])


# Rows as tokens.


@pytest.mark.parametrize("target", ["answers", "outputs"])
def test_answers_alone_are_learned(target):
    pairs = [(words(0, 1, 2), words(7)), (words(5), words(8, 9))]
    # <s> (llama's alone), the text, the unknown word "Answer:", the answer: and no instruction.
    assert vectors.texts_of(reference(), pairs, target) == [
        Text([1, 3, 4, 5, 0, 10], 5),
        Text([1, 8, 0, 11, 12], 3),
    ]
    assert vectors.texts_of(reference("qwen2"), pairs, target) == [
        Text([3, 4, 5, 0, 10], 4),
        Text([8, 0, 11, 12], 2),
    ]


def test_the_template_has_room_for_no_instruction():
    shown = prompts.render(vectors.TEMPLATE, instruction="", text="the text")
    assert shown == "the text\nAnswer:"


def test_of_prompts_everything_is_learned():
    pairs = [(words(0, 1, 2), words(7)), (words(*range(40)), words(7))]
    assert vectors.texts_of(reference(), pairs, "prompts") == [
        Text([1, 3, 4, 5], 1),
        Text([1, *range(3, 18)], 1),
    ]
    assert vectors.texts_of(reference("qwen2"), pairs, "prompts") == [
        Text([3, 4, 5], 1),
        Text([*range(3, 19)], 1),
    ]


@pytest.mark.parametrize("length", [10, 11, 12, 60])
def test_texts_are_cut_so_that_the_answer_stays_whole(length):
    # Of 16 tokens <s>, "Answer:" and three of the answer leave 11.
    [text] = vectors.texts_of(reference(), [(words(*range(length)), words(7, 8, 9))], "answers")
    kept = min(length, 11)
    assert text == Text([1, *range(3, 3 + kept), 0, 10, 11, 12], kept + 2)


@pytest.mark.parametrize("together", [1, 2, 3, 7, 10])
def test_batches_cover_every_text_once(together):
    seen = []
    for places, batch in vectors.batches_of(texts(), WIDTHS, together):
        assert 1 <= len(places) <= together and len(batch.ids) == together
        wanted = [texts()[i] for i in places]
        wanted += [wanted[-1]] * (together - len(places))
        for text, ids, at, target, weight in zip(wanted, *batch, strict=True):
            width = next(w for w in WIDTHS if w >= len(text.ids))
            assert_array_equal(ids, np.pad(text.ids, (0, width - len(text.ids))))
            learned = weight > 0
            assert_array_equal(target[learned], text.ids[text.first :])
            assert_array_equal(at[learned], np.arange(text.first, len(text.ids)) - 1)
        seen += places.tolist()
    assert sorted(seen) == list(range(7)) and seen != list(range(7))


def test_a_text_as_long_as_a_width_goes_into_it():
    rows = [Text(list(range(3, 3 + length)), 2) for length in (10, 11, 16, 5)]
    found = {batch.ids.shape[1]: sorted(p) for p, batch in vectors.batches_of(rows, WIDTHS, 4)}
    assert found == {10: [0, 3], 16: [1, 2]}


# The loss and its gradients.


def test_the_loss_is_the_cross_entropy_of_what_is_learned():
    rng = np.random.default_rng(1)
    start, loss = reference().adapter.b, jax.jit(reference().loss)
    b = {name: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32) for name, x in start.items()}
    for (place, *_), batch in vectors.batches_of(texts(), WIDTHS, 1):
        summed, weight = loss(b, batch)
        ids, first = texts()[place]
        wanted, plain = (float(mean_loss(x, jnp.array(ids), first)[0]) for x in (b, start))
        assert weight == counts()[place]
        assert float(summed / weight) == pytest.approx(wanted, rel=1e-4)
        assert abs(wanted - plain) > 1e-2


def test_gradients_of_rows_are_in_the_order_of_the_texts():
    found, weights = vectors.row_gradients(reference(), texts(), together=3)
    assert_array_equal(weights, counts())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in found.values())
    found = joined(found).astype(np.float64)
    for own, summed, weight in zip(alone(), found, weights, strict=True):
        size = np.abs(own * weight).max()
        assert_allclose(summed, own * weight, rtol=2**-8, atol=1e-5 * size)
    alike = [cosine(a, b) for a, b in itertools.pairwise(found)]
    assert max(alike) < 0.9


# Vectors.

SAMPLES = [
    vectors.Sample(np.array([0, 2, 3, 5]), 3),
    vectors.Sample(np.array([6, 1]), 4),
    vectors.Sample(np.array([4]), 5),
]


@functools.cache
def made():
    return vectors.make_vectors(
        reference(), texts(), SAMPLES, settings=FIT, together=3, row_width=32
    )


@functools.cache
def first_sample():
    """The rows of the first sample as one batch."""
    chosen = [texts()[i] for i in SAMPLES[0].places]
    [batch] = [batch for _, batch in vectors.batches_of(chosen, WIDTHS[1:], len(chosen))]
    return jax.tree.map(jnp.asarray, batch)


def test_the_one_step_vector_of_a_sample_goes_against_its_gradient():
    whole = pave.one_step(reference().loss, reference().adapter.b, first_sample(), together=4)
    assert cosine(made().one_step[0], joined(whole)) > 0.9999
    for found, sample in zip(made().one_step, SAMPLES, strict=True):
        # Every token weighs the same, not every row.
        weights = counts()[sample.places]
        assert cosine(found, -np.tensordot(weights, alone()[sample.places], 1)) > 0.9999
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert cosine(*made().one_step[:2]) < 0.9


def test_the_fisher_vector_of_a_sample_is_the_mean_of_squares():
    for found, sample in zip(made().fisher, SAMPLES, strict=True):
        wanted = np.mean(np.square(alone()[sample.places].astype(np.float64)), 0).ravel()
        assert_allclose(found, wanted, rtol=0.02, atol=1e-6 * wanted.max())


def test_rows_are_sketches_of_their_gradients():
    flat = alone().reshape(7, -1)
    sketch = make_sketch(jax.random.key(0), flat.shape[1], 32)
    assert made().rows.shape == (7, 32)
    for found, gradient in zip(made().rows, flat, strict=True):
        assert cosine(found, sketch_of(sketch, gradient, width=32)) > 0.9999
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)


def test_the_parameter_vector_of_a_sample_is_a_fit_of_the_model():
    start, sample = reference().adapter.b, SAMPLES[0]
    order = pave.draw_rows(jax.random.key(sample.seed), len(sample.places), FIT)
    true = pave.fit(reference().loss, start, first_sample(), order, settings=FIT)
    # Not equal, as gradients are rounded to eight bits.
    assert cosine(made().pave[0], joined(true.change)) > 0.999
    assert cosine(made().pave[0], made().pave[1]) < 0.9
    assert cosine(made().pave[0], made().one_step[0]) < 0.99
    assert_allclose(np.linalg.norm(made().pave, axis=1), 1, atol=1e-5)


def test_times_are_those_of_the_parts():
    assert made().seconds.shape == (3,) and np.all(made().seconds > 0)


def test_by_tensor_is_that_of_the_tree():
    b = reference().adapter.b
    rng = np.random.default_rng(0)
    tree = [rng.normal(size=(2, *leaf.shape)).astype(np.float32) for leaf in b.values()]
    tree[0] *= 100
    assert len({leaf.shape for leaf in tree}) > 1
    whole = np.asarray(pave.flatten(jnp.concatenate(tree, axis=-1)))
    found = vectors.by_tensor(reference(), whole)
    assert_allclose(found, pave.flatten(tree, by_tensor=True), atol=1e-6)
    assert cosine(found, whole) < 0.9


# What vectors may be compared.


def space(*, family="llama", target="answers", **changes):
    opened = vectors.open_reference(model(family), settings(**changes))
    return Header(SCHEMA, "vector", vectors.space_of(opened, target), {})


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"seed": 1}, ["lora.seed", "a_sha256"]),
        ({"rank": 2}, ["lora.rank", "a_sha256", "dimension"]),
        ({"alpha": 4.0}, ["lora.alpha"]),
        ({"targets": ("query", "key")}, ["lora.targets", "dimension"]),
        ({"target": "prompts"}, ["target"]),
        ({"family": "mistral"}, ["reference.name", "reference.weights_sha256"]),
    ],
)
def test_vectors_of_another_space_are_refused(change, fields):
    mine, other = space(), space(**change)
    assert "a_sha256" in to_json(mine)
    check_same_space(mine, space(), what="rank")
    with pytest.raises(IncompatibleSpecifications) as refusal:
        check_same_space(mine, other, what="rank")
    for field in fields:
        assert re.search(rf"{re.escape(field)} is ", str(refusal.value))


def test_vectors_of_another_template_are_refused(monkeypatch):
    mine = space()
    other = vectors.TEMPLATE._replace(text="{instruction}{text}\nReply:")
    monkeypatch.setattr(vectors, "TEMPLATE", other)
    with pytest.raises(IncompatibleSpecifications, match=r"rank: .*reference\.template_sha256 is"):
        check_same_space(mine, space(), what="rank")


def test_the_same_a_is_opened_again():
    again = vectors.open_reference(model("llama"), settings()).adapter
    for name, leaf in reference().adapter.a.items():
        assert_array_equal(leaf, again.a[name])
        assert_array_equal(again.b[name], 0)


# Kept vectors.


def refuse():
    raise AssertionError("made again")


def test_vectors_are_kept_and_made_again_for_another_digest(tmp_path):
    file = tmp_path / "kept" / "task.safetensors"
    first = vectors.keep_vectors(file, "one", made)
    again = vectors.keep_vectors(file, "one", refuse)
    for name, x in first._asdict().items():
        assert_array_equal(x, getattr(again, name))
        assert x.dtype == np.float32
        assert_allclose(x, getattr(made(), name), rtol=1e-3, atol=1e-4)
    for name in ("pave", "one_step"):
        assert_allclose(np.linalg.norm(getattr(first, name), axis=1), 1, atol=1e-6)
        for found, wanted in zip(getattr(first, name), getattr(made(), name), strict=True):
            assert cosine(found, wanted) > 1 - 1e-6
    with pytest.raises(AssertionError, match="made again"):
        vectors.keep_vectors(file, "two", refuse)
    other = vectors.keep_vectors(file, "two", lambda: made()._replace(fisher=made().fisher + 1))
    assert_array_equal(other.fisher, first.fisher + 1)
    assert_array_equal(vectors.keep_vectors(file, "two", refuse).fisher, other.fisher)
    with pytest.raises(AssertionError, match="made again"):
        vectors.keep_vectors(file, "one", refuse)


def test_an_unknown_target_is_refused():
    for call in (
        lambda: vectors.texts_of(reference(), [("a b", "c")], "prompt"),
        lambda: vectors.space_of(reference(), "prompt"),
    ):
        with pytest.raises(
            ValueError, match=r"got 'prompt'; want one of answers, outputs, prompts"
        ):
            call()
