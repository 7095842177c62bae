"""The decoder against torch, against itself by other ways, and numbers that must be zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_decoders
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.slm import decoder
from learnware_jax.slm.weights import load_model

FAMILIES = list(make_decoders.MODELS)
LENGTHS = np.array([24, 15])


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """A model of every family with the token ids and the logits that torch has for them."""
    folder = make_decoders.FOLDER / request.param
    stored = np.load(folder / "reference.npz")
    return load_model(folder), stored["ids"], stored["logits"]


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def score(params, ids, cache=None, start=None, *, config, dtype="float32"):
    hidden, cache = decoder.forward(
        params, ids, config=config, cache=cache, start=start, dtype=dtype
    )
    return decoder.logits(params, hidden, config=config, dtype=dtype), cache


def test_the_references_mean_something(tiny):
    model, ids, logits = tiny
    assert logits.shape == (*ids.shape, model.config.vocabulary)
    assert 1 < logits.std() < 10
    assert sum(window < ids.shape[1] for window in model.config.windows if window) >= (
        2 if model.name in ("mistral", "qwen2") else 0
    )


def test_logits_equal_torch(tiny):
    model, ids, wanted = tiny
    assert_allclose(score(model.params, ids, config=model.config)[0], wanted, rtol=0, atol=5e-5)


def test_cached_logits_equal_torch_token_by_token(tiny):
    """Rows of two lengths are padded with junk, then go on one token at a time."""
    model, ids, wanted = tiny
    lengths = LENGTHS - 6
    padded = np.where(np.arange(18) < lengths[:, None], ids[:, :18], 95)
    cache = decoder.init_cache(model.config, 2, 24)
    logits, cache = score(model.params, padded, cache, config=model.config)
    for row, length in enumerate(lengths):
        assert_allclose(logits[row, :length], wanted[row, :length], rtol=0, atol=5e-5)
    rows = np.arange(2)
    for step in range(6):
        at = lengths + step
        logits, cache = score(model.params, ids[rows, at][:, None], cache, at, config=model.config)
        assert_allclose(logits[:, 0], wanted[rows, at], rtol=0, atol=5e-5)


def test_padding_on_the_right_does_not_matter(tiny):
    model, ids, wanted = tiny
    junk = np.where(np.arange(24) < LENGTHS[:, None], ids, 77)
    logits, _ = score(model.params, junk, config=model.config)
    for row, length in enumerate(LENGTHS):
        assert_allclose(logits[row, :length], wanted[row, :length], rtol=0, atol=5e-5)
    assert np.abs(logits - wanted)[1, 15:].max() > 0.1


def test_live_torch_agrees_on_other_tokens(tiny):
    torch = pytest.importorskip("torch")
    model, _, _ = tiny
    _, kind = make_decoders.model_class(model.name)
    reference = kind.from_pretrained(make_decoders.FOLDER / model.name, dtype=torch.float32).eval()
    ids = np.random.default_rng(5).integers(0, 96, (3, 50))
    with torch.no_grad():
        wanted = reference(torch.tensor(ids)).logits.numpy()
    assert_allclose(score(model.params, ids, config=model.config)[0], wanted, rtol=0, atol=5e-5)


def test_generate_is_the_likeliest_token_again_and_again(tiny):
    model, ids, _ = tiny
    steps, width = 8, 32
    rows = np.zeros((2, width), np.int32)
    rows[:, :24] = np.where(np.arange(24) < LENGTHS[:, None], ids, 0)
    wanted = []
    for step in range(steps):
        logits, _ = score(model.params, rows, config=model.config)
        wanted.append(np.asarray(logits)[[0, 1], LENGTHS + step - 1].argmax(-1))
        rows[[0, 1], LENGTHS + step] = wanted[-1]
    wanted = np.stack(wanted, 1)
    junk = np.where(np.arange(24) < LENGTHS[:, None], ids, 77)
    settings = {"config": model.config, "steps": steps}
    found = decoder.generate(model.params, junk, LENGTHS, end=-1, **settings)
    assert_array_equal(found, wanted)
    assert len(set(wanted.flat)) > 4
    end = int(wanted[0, 3])
    ended = np.where(np.cumsum(wanted == end, 1) > 0, end, wanted)
    assert (ended != wanted).any()
    found = decoder.generate(model.params, junk, LENGTHS, end=end, **settings)
    assert_array_equal(found, ended)


def test_no_token_depends_on_a_later_one_or_on_one_beyond_its_windows(tiny):
    model, _, _ = tiny
    config, ids = model.config, jnp.arange(3, 27)[None]

    def outputs(embed):
        hidden, _ = decoder.forward({**model.params, "embed": embed}, ids, config=config)
        return hidden[0] @ np.random.default_rng(0).normal(size=config.width)

    slopes = jax.jit(jax.jacrev(outputs))(model.params["embed"])[:, ids[0]]
    depends = np.asarray(jnp.abs(slopes).max(-1) > 0)
    reach = sum(window - 1 if window else 24 for window in config.windows) or 24
    behind = np.arange(24)[:, None] - np.arange(24)
    assert_array_equal(depends, (behind >= 0) & (behind <= reach))
    assert model.name != "mistral" or reach == 12


def test_bfloat16_is_close_to_float32(tiny):
    model, ids, wanted = tiny
    logits, _ = score(model.params, ids, config=model.config, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    assert 1e-3 < np.abs(logits - wanted).max() < 0.5
    assert np.sqrt(np.square(logits - wanted).mean()) < 0.03 * wanted.std()


def products(jaxpr):
    """Types of operands and result, and precision, of every matrix product with a matrix."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2:
            types = [v.aval.dtype.name for v in [*equation.invars, *equation.outvars]]
            yield *types, equation.params["precision"]
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_take_the_dtype_and_add_up_in_float32(tiny, dtype):
    model, ids, _ = tiny
    run = functools.partial(score, config=model.config, dtype=dtype)
    found = list(products(jax.make_jaxpr(run)(model.params, ids).jaxpr))
    # Else an accelerator rounds float32 operands.
    precision = (jax.lax.Precision.HIGHEST,) * 2 if dtype == "float32" else None
    assert found == [(dtype, dtype, "float32", precision)] * 8


def test_remat_gives_the_same_gradients():
    model = load_model(make_decoders.FOLDER / "mistral")  # has windows; compiling takes seconds
    ids = jnp.arange(3, 27)[None]

    def loss(params, remat):
        hidden, _ = decoder.forward(params, ids, config=model.config, remat=remat)
        scores = decoder.logits(params, hidden[:, :-1], config=model.config)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), ids[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert "remat" in str(jax.make_jaxpr(gradient, static_argnums=1)(model.params, True))
    plain, saving = (jax.tree.leaves(gradient(model.params, remat)) for remat in (False, True))
    for a, b in zip(plain, saving, strict=True):
        assert np.abs(a).max() > 0
        assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-6)])
def test_product_and_its_derivative_equal_numpy(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 5, 64), (64, 16), (2, 5, 16))
    )
    y, backward = jax.vjp(lambda x, w: decoder.product(x, w, dtype), x, w)
    dx, dw = backward(g)
    # Operands are rounded, cotangents as well; nothing is rounded afterwards.
    x, w, g = (np.asarray(a.astype(dtype), np.float64) for a in (x, w, g))
    wanted = x @ w, g @ w.T, np.einsum("bti,bto->io", x, g)
    for found, exact in zip((y, dx, dw), wanted, strict=True):
        assert found.dtype == jnp.float32
        assert_allclose(found, exact, rtol=0, atol=tolerance * np.abs(exact).max())


def test_gradients_have_the_type_of_what_they_are_of():
    x, w = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 5))
    y, backward = jax.vjp(lambda x, w: decoder.product(x, w, "bfloat16"), x, w)
    dx, dw = backward(y)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_an_adapter_is_a_change_of_the_matrices(tiny):
    model, ids, wanted = tiny
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x, model.params)  # dicts of its own
    a, b = {}, {}
    for name in ("query", "key", "value", "out", "gate", "up", "down"):
        kernel = params["layers"][name]["kernel"]
        layers, inputs, outputs = kernel.shape
        a[name] = jnp.asarray(rng.normal(size=(layers, inputs, 2)), jnp.float32) / 8
        b[name] = jnp.asarray(rng.normal(size=(layers, 2, outputs)), jnp.float32) / 8
        params["layers"][name]["kernel"] = kernel + 0.5 * a[name] @ b[name]
    adapter = decoder.Adapter(a, b, jnp.float32(0.5))
    hidden, _ = decoder.forward(
        model.params, jnp.asarray(ids), config=model.config, adapter=adapter
    )
    found = decoder.logits(model.params, hidden, config=model.config)
    assert_allclose(found, score(params, ids, config=model.config)[0], rtol=0, atol=5e-5)
    assert np.abs(found - wanted).max() > 0.1
