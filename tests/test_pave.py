"""Parameter vectors against torch and PEFT, NumPy in float64, and what they are the limit of."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import make_pave
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save

from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances, rank
from learnware_jax.slm import finetune, lora
from learnware_jax.slm.finetune import Text
from learnware_jax.slm.weights import load_model
from learnware_jax.specification import pave
from learnware_jax.specification.kernels import Linear
from learnware_jax.specification.rkme import inner

BATCHES = finetune.Settings(
    steps=1,
    batch=1,
    warmup=0.0,
    final=0.0,
    clip=1.0,
    decay=0.0,
    train="b",
    accumulate=1,
    widths=(24,),
    dtype="float32",
    remat=False,
)


def vector(tree):
    """All numbers of a tree, in float64."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def cosine(a, b):
    a, b = vector(a), vector(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# A small loss: the rows are features and weights, the parameters two modules of two tensors each.

SHAPES = {"key": (2, 3, 4), "query": (2, 3, 2)}
TENSORS = 4
SIZE = 36


def unravel(x):
    x = jnp.asarray(x)
    return {"key": x[:24].reshape(2, 3, 4), "query": x[24:].reshape(2, 3, 2)}


def _scores(params, x):
    return x @ jnp.concatenate([params["key"].ravel(), params["query"].ravel()])


def _curved(bias, params, rows):
    x, w = rows
    return (w * jax.nn.softplus(_scores(params, x) + bias)).sum(), w.sum()


def _straight(params, rows):
    x, w = rows
    return (w * _scores(params, x)).sum(), w.sum()


CURVED, STRAIGHT = Partial(_curved, jnp.float32(0.5)), Partial(_straight)
ZERO = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def toy(n=10, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, SIZE)).astype(dtype), rng.integers(1, 9, n).astype(dtype)


def curved_mean(flat, x, w):
    """The loss of CURVED over its weight, in NumPy."""
    return (w * np.logaddexp(0, x @ flat + 0.5)).sum() / w.sum()


def curved_gradients(flat, x, w):
    """Every row's gradient of the summed loss, in NumPy."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    return (w / (1 + np.exp(-(x @ flat + 0.5))))[:, None] * x


def settings(**changes):
    plain = pave.Settings(steps=12, batch=2, rate=1e-3, decay=0.5, warmup=0.1, clip=1.0, pull=1.0)
    return plain._replace(**changes)


# A language model, the one that the fixture is of.


@functools.cache
def model():
    return load_model(make_pave.MODEL)


@functools.cache
def stored():
    return load_file(make_pave.FILE)


def _of_model(params, adapter, b, rows, *, config):
    return finetune.loss_sum(params, adapter._replace(b=b), rows, config=config, settings=BATCHES)


@functools.cache
def _function():
    return functools.partial(_of_model, config=model().config)


def loss_of(adapter):
    return Partial(_function(), model().params, adapter)


def batch_of(rows):
    texts = [
        Text(ids[:length].tolist(), int(first))
        for ids, length, first in zip(rows["ids"], rows["lengths"], rows["first"], strict=True)
    ]
    return jax.tree.map(lambda x: jnp.asarray(x[0, 0]), finetune.make_batch([texts], BATCHES))


def read_peft(given, part, rank, alpha):
    """An adapter out of one part of PEFT's tensors, "A" or "B"; the other is zero."""
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(make_pave.MODULES)}
    tensors = dict(given)
    for name in given:
        outputs = 32 if "q_proj" in name else 16
        shape = (outputs, rank) if part == "A" else (rank, 32)
        other = name.replace(f"lora_{part}", "lora_B" if part == "A" else "lora_A")
        tensors[other] = np.zeros(shape, np.float32)
    files = {lora.CONFIG_FILE: json.dumps(config).encode(), lora.WEIGHTS_FILE: save(tensors)}
    return lora.from_peft(files, model().config)


@functools.cache
def their_adapter():
    a = {name: x for name, x in stored().items() if name.endswith("lora_A.weight")}
    return read_peft(a, "A", make_pave.RANK, make_pave.ALPHA)


def assert_same_fit(adapter, rows, rate, pull, change, losses):
    """`pave.fit` from an adapter is what torch and PEFT made of the same."""
    ours = pave.fit(
        loss_of(adapter),
        adapter.b,
        batch_of(rows),
        jnp.asarray(rows["order"]),
        settings=pave.Settings(
            steps=make_pave.STEPS,
            batch=make_pave.BATCH,
            rate=rate,
            decay=make_pave.DECAY,
            warmup=make_pave.WARMUP,
            clip=make_pave.CLIP,
            pull=pull,
        ),
    )
    assert_allclose(ours.loss, losses, rtol=5e-5)
    assert cosine(ours.change, change) > 0.99999
    gap = np.linalg.norm(vector(ours.change) - vector(change)) / np.linalg.norm(vector(change))
    assert gap < 1e-4


@pytest.mark.parametrize("run", make_pave.RUNS)
def test_a_fit_is_that_of_torch_and_peft(run):
    rate, pull = make_pave.RUNS[run]
    tensors = {k.split("/")[1]: x for k, x in stored().items() if k.startswith(f"{run}/base")}
    change = read_peft(tensors, "B", make_pave.RANK, make_pave.ALPHA).b
    assert min(np.abs(vector(leaf)).max() for leaf in change.values()) > rate
    losses = stored()[f"{run}/losses"]
    assert_same_fit(their_adapter(), stored(), rate, pull, change, losses)


@pytest.mark.parametrize(("rank", "rate"), [(4, 1e-3), (16, 1e-5)])
def test_a_fit_is_that_of_live_torch_and_peft(tmp_path, rank, rate):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = lora.init_adapter(
        jax.random.key(rank),
        model().config,
        rank=rank,
        alpha=2.0 * rank,
        targets=("query", "key", "value"),
    )
    for name, content in lora.to_peft(adapter, base="tiny", dtype="float32").items():
        (tmp_path / name).write_bytes(content)
    rows = make_pave.make_rows(rank)
    change, losses = make_pave.fit(tmp_path, rows, rate, 1.0)
    change = read_peft(change, "B", rank, 2 * rank).b
    assert_same_fit(adapter, rows, rate, 1.0, change, losses)


# The objective.


def test_the_pull_by_hand():
    start = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    params = {"key": start["key"] + 0.5, "query": start["query"].at[1, 0, 0].set(-2.0)}
    # 24 numbers moved by 1/2 and one by 3, over two modules of two layers each.
    assert_allclose(pave.pull_to(params, start), (24 * 0.5 + 3) / TENSORS, rtol=1e-6)


def test_the_gradient_of_the_pull_is_that_of_differences_and_zero_at_the_start():
    rng = np.random.default_rng(0)
    start, params = rng.normal(size=(2, SIZE))
    assert np.abs(params - start).min() > 1e-3
    with jax.enable_x64(True):
        found = jax.grad(pave.pull_to)(unravel(params), unravel(start))
        pull = jax.jit(lambda p: pave.pull_to(unravel(p), unravel(start)))
        wanted = central(pull, params)
        at_start = jax.grad(pave.pull_to)(unravel(start), unravel(start))
        assert_allclose(vector(found), wanted, atol=1e-8)
    assert_allclose(np.abs(wanted), 1 / TENSORS, atol=1e-8)
    assert_array_equal(vector(at_start), 0)


def central(f, x, h=1e-6):
    """Central differences of f at x."""
    return np.array([f(x + d) - f(x - d) for d in h * np.eye(len(x))], np.float64) / (2 * h)


def test_the_gradient_of_the_objective_is_that_of_differences():
    x, w = toy(4, dtype=np.float64)
    start, pull, rate = np.random.default_rng(1).normal(size=SIZE) / 4, 0.3, 0.1
    with jax.enable_x64(True):

        def change(steps):
            order = jnp.array([[0, 1, 2], [3, 1, 2]])[:steps]
            once = functools.partial(pave._fit, Partial(_curved, jnp.float64(0.5)), unravel(start))
            rows = (jnp.asarray(x), jnp.asarray(w))
            return vector(once(rows, order, optax.sgd(rate), pull).change)

        one, two = change(1), change(2)
    # The first step has nothing to pull.
    wanted = curved_gradients(start, x, w)[:3].sum(0) / w[:3].sum()
    assert_allclose(one, -rate * wanted, rtol=1e-9)
    at, seen = start + one, [3, 1, 2]
    assert np.abs(one).min() > 1e-5

    def objective(p):
        return curved_mean(p, x[seen], w[seen]) + pull * np.abs(p - start).sum() / TENSORS

    assert_allclose(two - one, -rate * central(objective, at), atol=1e-9)


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_a_gradient_is_clipped_with_its_pull(clip):
    # Plain descent behind the clipping of `optimiser`: the second step is as long as clip allows.
    x, w = toy(4)
    update = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0))
    order = jnp.array([[0, 1], [2, 3]])
    rows = (jnp.asarray(x), jnp.asarray(w))
    one, two = (
        vector(pave._fit(CURVED, ZERO, rows, order[:n], update, 1.0).change) for n in (1, 2)
    )
    gradient = curved_gradients(one, x, w)[2:].sum(0) / w[2:].sum() + np.sign(one) / TENSORS
    length = min(1, clip / np.linalg.norm(gradient))
    assert_allclose(two - one, -length * gradient, rtol=1e-3, atol=1e-6)


# The rate, and what a fit is the limit of.


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.03), (40, 0.1), (7, 0.0), (1, 0.0)])
def test_the_rate_is_warmed_up_and_decays_as_a_cosine(steps, warmup):
    # A constant gradient moves AdamW by the rate, in every coordinate, at every step.
    x, w = toy(1)
    fitted = settings(steps=steps, warmup=warmup, rate=1e-2, decay=0.0, pull=0.0, batch=1)
    order = jnp.zeros((steps, 1), int)
    found = pave.fit(STRAIGHT, ZERO, (x, w), order, settings=fitted)
    rising = int(np.ceil(warmup * steps))
    at = np.arange(steps)
    turned = np.pi * (at - rising) / max(1, steps - rising)
    rates = 1e-2 * np.where(at < rising, at / max(1, rising), (1 + np.cos(turned)) / 2)
    assert_allclose(vector(found.change), -rates.sum() * np.sign(x[0]), rtol=1e-4)
    gone = np.concatenate([[0], np.cumsum(rates)[:-1]])
    assert_allclose(found.loss, -gone * np.abs(x[0]).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (2, 0.5)])
def test_one_step_of_adamw_goes_by_the_sign_of_every_coordinate(steps, warmup):
    # With a warm-up the first step is at rate 0, and the second at the full one.
    x, w = toy(6)
    start = np.random.default_rng(2).normal(size=SIZE).astype(np.float32)
    gradient = curved_gradients(start, x, w).sum(0)
    assert np.abs(gradient / w.sum()).min() > 1e-4
    fitted = settings(steps=steps, warmup=warmup, batch=6)
    order = jnp.tile(jnp.arange(6), (steps, 1))
    found = vector(pave.fit(CURVED, unravel(start), (x, w), order, settings=fitted).change)
    wanted = -fitted.rate * (np.sign(gradient) + fitted.decay * start)
    assert_allclose(found, wanted, atol=1e-3 * fitted.rate)
    assert cosine(found, -gradient) < 0.95  # not the one-step specification


@functools.partial(jax.jit, static_argnames="steps")
def descend(loss, rows, start, rate, *, steps):
    """The change by plain gradient descent on all rows."""
    order = jnp.tile(jnp.arange(len(jax.tree.leaves(rows)[0])), (steps, 1))
    return pave._fit(loss, start, rows, order, optax.sgd(rate), 0.0).change


def test_plain_descent_goes_along_the_gradient_as_steps_and_rate_go_to_zero():
    rows = toy(10)
    step = pave.one_step(CURVED, ZERO, rows, together=4)
    found = []
    for steps, rate in [(16, 2.0), (8, 0.5), (4, 0.1), (2, 0.01)]:
        found.append(cosine(descend(CURVED, rows, ZERO, rate, steps=steps), step))
    assert np.all(np.diff(found) > 0) and found[0] < 0.99 and found[-1] > 0.99999


# Gradients.


@pytest.mark.parametrize("together", [1, 4, 5, 10, 16])
def test_one_step_is_the_same_in_parts_and_at_once(together):
    x, w = toy(10)
    start = np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    found = pave.one_step(CURVED, unravel(start), (x, w), together=together)
    assert jax.tree.map(jnp.shape, found) == SHAPES
    wanted = -curved_gradients(start, x, w).sum(0) / w.sum()
    assert_allclose(vector(found), wanted, atol=1e-6)


@pytest.mark.parametrize("together", [1, 4, 5, 16])
def test_gradients_of_rows_are_each_row_s_own_and_add_up(together):
    x, w = toy(10)
    start = np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    found, weights = pave.row_gradients(
        CURVED, unravel(start), (x, w), together=together, keep=_as_it_is
    )
    assert_array_equal(weights, w)
    for i, wanted in enumerate(curved_gradients(start, x, w)):
        assert_allclose(vector(jax.tree.map(lambda g, i=i: g[i], found)), wanted, atol=1e-5)
    summed = jax.tree.map(lambda g: g.sum(0) / weights.sum(), found)
    whole = pave.one_step(CURVED, unravel(start), (x, w), together=3)
    assert_allclose(vector(summed), -vector(whole), atol=1e-6)


def _as_it_is(gradient):
    return gradient


def _kept(gradient):
    return {"peak": jnp.abs(gradient["key"]).max(), "query": gradient["query"].astype("bfloat16")}


def test_of_a_row_s_gradient_is_kept_what_was_asked_for():
    x, w = toy(5)
    found, _ = pave.row_gradients(CURVED, ZERO, (x, w), together=2, keep=_kept)
    wanted = curved_gradients(np.zeros(SIZE), x, w)
    assert_allclose(found["peak"], np.abs(wanted[:, :24]).max(1), rtol=1e-5)
    assert found["query"].dtype == jnp.bfloat16
    query = np.asarray(found["query"], np.float64).reshape(5, -1)
    assert_allclose(query, wanted[:, 24:], rtol=2**-8)
    assert np.abs(query / wanted[:, 24:] - 1).max() > 1e-4  # rounded


# The linear loss.


def test_a_linear_loss_by_hand():
    gradients = {"key": jnp.arange(6.0).reshape(3, 1, 1, 2), "query": jnp.ones((3, 1, 1, 1))}
    loss = pave.linear_loss(gradients, np.array([2.0, 3.0, 4.0]))
    params = {"key": jnp.array([[[1.0, 10.0]]]), "query": jnp.full((1, 1, 1), 0.5)}
    # Rows 2 and 0: (4 + 0) 1 + (5 + 1) 10 + (1 + 1) / 2.
    summed, weight = loss(params, jnp.array([2, 0]))
    assert (float(summed), float(weight)) == (65.0, 6.0)
    change = pave._fit(loss, params, jnp.arange(3), jnp.array([[2, 0]]), optax.sgd(1.0), 0.0).change
    assert_allclose(change["key"].ravel(), [-4 / 6, -1], rtol=1e-5)
    assert_allclose(change["query"].ravel(), [-2 / 6], rtol=1e-5)


def test_rounded_gradients_are_summed_unrounded():
    gradients = {"key": jnp.array([256.0, 1.0], "bfloat16").reshape(2, 1, 1, 1)}
    loss = pave.linear_loss(gradients, np.ones(2))
    found = jax.grad(lambda p: loss(p, jnp.array([0, 1]))[0])({"key": jnp.zeros((1, 1, 1))})
    assert float(found["key"][0, 0, 0]) == 257.0


def test_a_fit_of_the_linear_loss_is_that_of_a_loss_that_is_linear():
    x, w = toy(7)
    fitted = settings(rate=0.01)
    order = pave.draw_rows(jax.random.key(0), 7, fitted)
    made = pave.row_gradients(STRAIGHT, ZERO, (x, w), together=3, keep=_as_it_is)
    found = pave.fit(pave.linear_loss(*made), ZERO, jnp.arange(7), order, settings=fitted)
    wanted = pave.fit(STRAIGHT, ZERO, (x, w), order, settings=fitted)
    assert_allclose(vector(found.change), vector(wanted.change), atol=1e-5 * 0.01)
    assert_allclose(found.loss, wanted.loss, atol=1e-5)
    # Tokens weigh, not rows: with other weights it is another fit.
    other = pave.linear_loss(made[0], np.roll(w, 1))
    other = pave.fit(other, ZERO, jnp.arange(7), order, settings=fitted)
    assert np.abs(other.loss - found.loss).max() > 1e-3


def test_a_fit_of_the_linear_loss_is_the_true_one_as_the_rate_goes_to_zero():
    rows, places = toy(7), jnp.arange(7)
    linear = pave.linear_loss(*pave.row_gradients(CURVED, ZERO, rows, together=7, keep=_as_it_is))
    orders = jnp.stack([pave.draw_rows(jax.random.key(i), 7, settings()) for i in (0, 1)])
    found = []
    for rate in (0.3, 0.03, 1e-5):
        fitted = settings(rate=rate)
        true = pave.fit(CURVED, ZERO, rows, orders, settings=fitted).change
        near = pave.fit(linear, ZERO, places, orders, settings=fitted).change
        found.append([cosine(at(true, i), at(near, i)) for i in (0, 1)])
    found = np.array(found)
    assert np.all(np.diff(found, axis=0) > 0)
    assert np.all(found[0] < 0.99) and np.all(found[-1] > 0.99999)
    # The order of the rows matters, and in the same way.
    apart = [cosine(at(change, 0), at(change, 1)) for change in (true, near)]
    assert apart[0] < 0.99 and apart[1] == pytest.approx(apart[0], abs=1e-4)


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


# Orders, and many fits at once.


def test_every_epoch_sees_every_row_once():
    order = np.asarray(pave.draw_rows(jax.random.key(0), 5, settings(steps=9, batch=3)))
    assert order.shape == (9, 3)
    epochs = order.ravel()[:25].reshape(5, 5)
    assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(5), (5, 1)))
    assert len(set(order.ravel()[25:])) == 2
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = pave.draw_rows(jax.random.key(1), 5, settings(steps=9, batch=3))
    assert not np.array_equal(order, other)
    again = pave.draw_rows(jax.random.key(0), 5, settings(steps=9, batch=3))
    assert_array_equal(order, again)


def test_rows_that_are_not_all_needed_are_drawn_without_return():
    order = np.asarray(pave.draw_rows(jax.random.key(0), 50, settings(steps=4, batch=3)))
    assert order.shape == (4, 3) and len(set(order.ravel())) == 12
    assert order.min() >= 0 and order.max() < 50
    assert order.max() > 12  # not the first ones


def test_fits_of_several_orders_are_those_of_each():
    rows = toy(7)
    orders = jnp.stack([pave.draw_rows(jax.random.key(i), 7, settings()) for i in range(3)])
    found = pave.fit(CURVED, ZERO, rows, orders, settings=settings())
    assert found.loss.shape == (3, settings().steps)
    singles = [pave.fit(CURVED, ZERO, rows, order, settings=settings()) for order in orders]
    for i, single in enumerate(singles):
        assert_allclose(found.loss[i], single.loss, atol=1e-6)
        assert_allclose(vector(at(found.change, i)), vector(single.change), atol=1e-8)
    assert cosine(singles[0].change, singles[1].change) < 0.999


@pytest.mark.parametrize("together", [1, 2, 4, 7])
def test_fits_of_many_tasks_are_those_of_each(together):
    tasks = [toy(7, seed) for seed in range(4)]
    orders = jnp.stack([pave.draw_rows(jax.random.key(i), 7, settings()) for i in range(4)])
    found = pave.fit_many(
        CURVED, ZERO, stacked(tasks), orders, settings=settings(), together=together
    )
    for i, (rows, order) in enumerate(zip(tasks, orders, strict=True)):
        single = pave.fit(CURVED, ZERO, rows, order, settings=settings())
        assert_allclose(found.loss[i], single.loss, atol=1e-6)
        assert_allclose(vector(at(found.change, i)), vector(single.change), atol=1e-8)


def test_what_a_loss_holds_is_an_argument_of_the_program():
    traces = []

    def counted(bias, params, rows):
        traces.append(None)
        return _curved(bias, params, rows)

    rows, order = toy(4), jnp.zeros((12, 2), int)
    low = pave.fit(Partial(counted, jnp.float32(0)), ZERO, rows, order, settings=settings())
    once = len(traces)
    high = pave.fit(Partial(counted, jnp.float32(2)), ZERO, rows, order, settings=settings())
    assert once == len(traces) > 0
    assert_allclose([low.loss[0], high.loss[0]], np.logaddexp(0, [0, 2]), rtol=1e-5)


# Vectors, and how they are compared.


def changes(n, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(n, *s)), jnp.float32) for name, s in SHAPES.items()}


def test_vectors_have_unit_norm_and_a_stack_holds_each():
    many = changes(3)
    found = np.asarray(pave.flatten(many), np.float64)
    wanted = np.concatenate([np.asarray(x, np.float64).reshape(3, -1) for x in many.values()], 1)
    assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    for by_tensor in (False, True):
        found = pave.flatten(many, by_tensor=by_tensor)
        assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        for i in range(3):
            single = pave.flatten(at(many, i), by_tensor=by_tensor)
            assert_allclose(single, found[i], atol=1e-7)
    deep = jax.tree.map(lambda x: x[None], many)
    assert_array_equal(pave.flatten(deep)[0], pave.flatten(many))


def test_by_tensor_a_cosine_is_the_mean_of_the_tensors_cosines():
    scales = {"key": jnp.array([1.0, 100.0]), "query": jnp.array([1e-3, 1.0])}
    many = jax.tree.map(lambda x, s: x * s[:, None, None], changes(2), scales)
    found = np.asarray(pave.flatten(many, by_tensor=True), np.float64)
    each = [cosine(x[0, layer], x[1, layer]) for x in many.values() for layer in range(2)]
    assert found[0] @ found[1] == pytest.approx(np.mean(each), abs=1e-6)
    plain = np.asarray(pave.flatten(many), np.float64)
    assert abs(plain[0] @ plain[1] - np.mean(each)) > 0.02


@pytest.mark.parametrize("by_tensor", [False, True])
def test_zeros_stay_zeros(by_tensor):
    assert_array_equal(pave.flatten(ZERO, by_tensor=by_tensor), np.zeros(SIZE))
    change = {"key": ZERO["key"], "query": ZERO["query"].at[1].set(2.0)}
    found = np.asarray(pave.flatten(change, by_tensor=by_tensor))
    assert_allclose(found, np.repeat([0, 6**-0.5], [SIZE - 6, 6]), rtol=1e-6)


def units(n, p=300, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, p))
    x[:, 0] += 5  # as what tasks have in common
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def pool_of(specs, n):
    count = len(specs)
    return build_pool(
        specs, Linear(), ids=[f"{i}" for i in range(count)], n=[n] * count, residual=[0.0] * count
    )


def test_the_order_by_distance_is_that_by_cosine():
    users, docked = units(5, seed=1), units(40, seed=2)
    pool = pool_of([pave.mean_embedding_of(z[None]) for z in docked], 1)
    specs = [pave.mean_embedding_of(z[None]) for z in users]
    cosines = users.astype(np.float64) @ docked.astype(np.float64).T
    found = distances(specs, pool, n=[1] * 5)
    assert_allclose(found, 2 - 2 * cosines, atol=1e-6)
    assert_array_equal(rank(specs, pool, n=[1] * 5).index, np.argsort(-cosines, axis=1))


def test_of_several_seeds_the_inner_product_is_the_mean_cosine():
    a, b = units(3, seed=1), units(4, seed=2)
    p, q = pave.mean_embedding_of(a), pave.mean_embedding_of(b)
    between = np.mean([[cosine(x, y) for y in b] for x in a])
    assert float(inner(p, q, Linear())) == pytest.approx(between, abs=1e-6)
    own = [np.mean([cosine(x, y) for i, x in enumerate(z) for y in z[i + 1 :]]) for z in (a, b)]
    # Self terms leave out what a seed has in common with itself.
    found = distances([p], pool_of([q], 4), n=[3])
    assert found[0, 0] == pytest.approx(own[0] + own[1] - 2 * between, abs=1e-6)
    for z, wanted in zip((a, b), own, strict=True):
        assert pave.agreement(z) == pytest.approx(wanted, abs=1e-6)


def test_agreement_by_hand():
    # Angles of 0, 60 and 90 degrees; norms do not matter.
    z = np.array([[2.0, 0.0], [0.5, 0.75**0.5], [0.0, 3.0]])
    assert pave.agreement(z) == pytest.approx((0.5 + 0.75**0.5 + 0) / 3)
    assert pave.agreement(z[[0, 0]]) == pytest.approx(1)
    assert pave.agreement(np.array([[1.0, 0.0], [-4.0, 0.0]])) == pytest.approx(-1)


def test_one_vector_agrees_with_nothing():
    with pytest.raises(ValueError, match=r"agreement: got 1 vector; want .* 2 or more seeds"):
        pave.agreement(units(1))


@pytest.mark.parametrize("scale", [0.0, 1.01, np.nan])
def test_a_specification_wants_unit_vectors(scale):
    z = units(2)
    z[1] *= scale
    with pytest.raises(ValueError, match=r"mean_embedding_of: got norms .*; want unit vectors"):
        pave.mean_embedding_of(z)


def test_the_published_score_by_hand():
    # sigmoid(5), sigmoid(0) and sigmoid(-10).
    wanted = [1 / (1 + np.exp(-5)), 0.5, 1 / (1 + np.exp(10))]
    assert_allclose(pave.published_score(np.array([0.5, 0.0, -1.0])), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"got steps=0; want at least 1"),
        ({"batch": 0}, r"got batch=0; want at least 1"),
        ({"rate": 0.0}, r"got rate=0.0; want a positive number"),
        ({"warmup": 1.0}, r"got warmup=1.0; want at least 0 and below 1"),
        ({"clip": -1.0}, r"got clip=-1.0; want a positive number"),
        ({"pull": -1.0}, r"got pull=-1.0; want 0 or more"),
        ({"decay": -0.1}, r"got decay=-0.1; want 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pave.draw_rows(jax.random.key(0), 4, pave.PUBLISHED._replace(**change))
    with pytest.raises(ValueError, match=r"got n=0; want at least one row"):
        pave.draw_rows(jax.random.key(0), 0, pave.PUBLISHED)
