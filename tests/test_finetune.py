"""Fine-tuning against NumPy, against itself cut and stacked in other ways, killed, and sharded."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.slm import finetune, lora
from learnware_jax.slm.decoder import Config, forward, init_params, logits, param_shapes
from learnware_jax.slm.finetune import Run, Settings, Text

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
SETTINGS = Settings(
    steps=20,
    batch=4,
    warmup=0.1,
    final=0.1,
    clip=1.0,
    decay=0.01,
    train="ab",
    accumulate=1,
    widths=(16,),
    dtype="float32",
    remat=False,
)


@functools.cache
def params():
    return init_params(jax.random.key(0), CONFIG, scale=0.3)


@functools.cache
def adapters(*seeds):
    """A stack of new ones."""
    return lora.stack(
        [lora.init_adapter(jax.random.key(s), CONFIG, rank=2, alpha=4.0) for s in seeds]
    )


def toy(count=9, seed=0):
    """Texts of 10 to 16 random tokens, of which the last 5 to 8 are learned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 17, count)
    return [Text(rng.integers(1, 97, n).tolist(), int(n - rng.integers(5, 9))) for n in lengths]


def run(*seeds, settings=SETTINGS, rates=(0.02, 0.01, 0.005)):
    """Each adapter learns texts of its own: of one seed, always the same."""
    texts = tuple(toy(5 + 2 * seed, seed) for seed in seeds)
    return Run(texts, tuple(rates[seed] for seed in seeds), seeds, settings)


def train(run, state=None, start=None, **kwargs):
    """The last state and the losses."""
    start = adapters(*run.seeds) if start is None else start
    losses = []

    def report(done, state, metrics, tokens):
        losses.append(metrics.loss)

    kwargs = {"report": report} | kwargs
    return finetune.train(params(), CONFIG, start, run, state=state, **kwargs), np.array(losses)


@functools.cache
def trained(*seeds):
    return train(run(*seeds))


def assert_same_bits(found, wanted):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert_array_equal(a, b)


# Batches.


@pytest.mark.parametrize("count, batch", [(32, 2), (200, 4), (3, 4), (1, 5)])
def test_every_epoch_has_every_row_once(count, batch):
    texts, settings = toy(count), SETTINGS._replace(steps=96, batch=batch)
    plan = list(finetune.schedule(texts, settings, seed=3))
    assert len(plan) == 96 and all(rows.shape == (batch,) for rows in plan)
    for stretch in range(1, 7):
        seen = np.bincount(np.concatenate(plan[: 16 * stretch]), minlength=count)
        assert seen.max() - seen.min() <= 1
        assert seen.sum() == 16 * stretch * batch
    if count == 32:  # a stretch is an epoch
        assert_array_equal(seen, 6)


def test_a_schedule_depends_on_the_seed_and_the_settings_alone():
    texts, settings = toy(40), SETTINGS._replace(steps=37)
    first, again, other, shorter = (
        [rows.tolist() for rows in finetune.schedule(texts, s, seed)]
        for s, seed in ((settings, 3), (settings, 3), (settings, 4), (SETTINGS, 3))
    )
    assert first == again and first != other
    assert shorter == first[:20]


def test_batches_hold_texts_of_like_length():
    texts = [Text([1] * n, 1) for n in np.random.default_rng(0).permutation(np.arange(2, 66))]
    plan = list(finetune.schedule(texts, SETTINGS._replace(steps=16), seed=0))
    spans = sorted(sorted(len(texts[i].ids) for i in rows) for rows in plan)
    assert spans == [list(range(n, n + 4)) for n in range(2, 66, 4)]
    assert [min(len(texts[i].ids) for i in rows) for rows in plan] != list(range(2, 66, 4))


def test_a_batch_by_hand():
    parts = [
        [Text([5, 6, 7], 1), Text([8, 9, 1, 2, 3], 2)],
        [Text([4, 4], 1), Text([1, 2, 3, 4, 5, 6], 5)],
    ]
    batch = finetune.make_batch(parts, SETTINGS._replace(batch=2, accumulate=2, widths=(2, 6, 8)))
    ids = [[5, 6, 7, 0, 0, 0], [8, 9, 1, 2, 3, 0], [4, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    at = [[0, 1, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    target = [[6, 7, 0, 0], [1, 2, 3, 0], [4, 0, 0, 0], [6, 0, 0, 0]]
    weight = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    for found, wanted in zip(batch, (ids, at, target, weight), strict=True):
        assert_array_equal(found, np.reshape(wanted, (2, 2, 1, -1)))
    one = finetune.make_batch(parts, SETTINGS._replace(batch=2, widths=(16,)))
    assert one.ids.shape == (2, 1, 2, 16) and one.at.shape == (2, 1, 2, 4)
    assert finetune.make_batch([[parts[1][0]]], SETTINGS._replace(batch=1, widths=(2,))).at.shape == (
        (1, 1, 1, 1)
    )
    with pytest.raises(ValueError, match="a text has 6 tokens, the widest batch 5; cut the texts"):
        finetune.make_batch(parts, SETTINGS._replace(batch=2, widths=(2, 5)))


# Loss and gradient.


@pytest.mark.parametrize("chunk, parts", [(4096, 0), (27, 2), (12, 3), (1, 8)])
def test_the_loss_is_the_cross_entropy_of_the_learned_tokens(monkeypatch, chunk, parts):
    monkeypatch.setattr(finetune, "CHUNK", chunk)
    texts, adapter = toy(4), jax.tree.map(lambda x: x[0], trained(0)[0].adapter)
    settings = SETTINGS._replace(widths=(20,))
    batch = jax.tree.map(lambda x: x[0, 0], finetune.make_batch([texts], settings))
    total, wanted = 0.0, 0
    for ids, first in texts:
        hidden, _ = forward(params(), np.array([ids]), config=CONFIG, adapter=adapter)
        scores = np.asarray(logits(params(), hidden, config=CONFIG), np.float64)[0]
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= scores[np.arange(first - 1, len(ids) - 1), ids[first:]].sum()
        wanted += len(ids) - first

    @jax.jit
    def both(params, adapter, batch):
        def loss(adapter):
            return finetune.loss_sum(params, adapter, batch, config=CONFIG, settings=settings)

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    (found, count), gradient = both(params(), adapter, batch)
    assert_allclose(found, total, rtol=1e-6)
    assert count == wanted
    # The path in chunks was taken, or was not, and has the same derivative.
    lengths = [e.params["length"] for e in jax.make_jaxpr(both)(params(), adapter, batch).jaxpr
               .eqns[0].params["jaxpr"].eqns if e.primitive.name == "scan"]
    assert (parts in lengths) if parts else (set(lengths) == {CONFIG.layers})
    if not hasattr(test_the_loss_is_the_cross_entropy_of_the_learned_tokens, "gradient"):
        assert chunk == 4096
    return gradient
