"""Sketches: by hand, linear, and unbiased with the variance that is stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.specification.sketch import Sketch, make_sketch, sketch_of

SIZE, WIDTH, KEYS = 40, 6, 4000


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_sketch_by_hand():
    sketch = Sketch(jnp.array([2, 0, 2, 0]), jnp.array([1.0, -1.0, -1.0, -1.0]))
    found = sketch_of(sketch, np.array([1.0, 2.0, 3.0, 4.0], np.float32), width=3)
    assert_array_equal(found, [-2 - 4, 0, 1 - 3])


def test_a_sketch_is_linear():
    x, y = arrays(2, SIZE)
    sketch = make_sketch(jax.random.key(0), SIZE, WIDTH)
    of_x, of_y = sketch_of(sketch, x, width=WIDTH), sketch_of(sketch, y, width=WIDTH)
    found = sketch_of(sketch, 2 * x - 0.5 * y, width=WIDTH)
    assert_allclose(found, 2 * of_x - 0.5 * of_y, atol=1e-5)
    assert np.abs(of_x).max() > 0.1


@pytest.mark.parametrize("width", [1, WIDTH, 200])
def test_inner_products_are_unbiased_with_the_stated_variance(width):
    x, y = arrays(2, SIZE)
    y = y + x  # so that there is an inner product to lose

    def products(key):
        of_x, of_y = sketch_of(make_sketch(key, SIZE, width), np.stack([x, y]), width=width)
        return jnp.array([of_x @ of_y, of_x @ of_x])

    found = np.asarray(jax.vmap(products)(jax.random.split(jax.random.key(0), KEYS)), np.float64)
    for values, other in zip(found.T, (y, x), strict=True):
        a, b = x.astype(np.float64), other.astype(np.float64)
        assert abs(values.mean() - a @ b) < 4 * values.std() / KEYS**0.5
        # Two coordinates meet with probability 1 / width, and then add a product of random sign.
        exact = ((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a**2 * b**2).sum()) / width
        assert exact < 2 * (a @ a) * (b @ b) / width
        assert values.var() == pytest.approx(exact, rel=0.2)


def test_one_key_is_one_sketch():
    first, again, other = (make_sketch(jax.random.key(i), SIZE, WIDTH) for i in (0, 0, 1))
    assert_array_equal(first.place, again.place)
    assert_array_equal(first.sign, again.sign)
    assert (first.place == other.place).mean() < 0.5
    assert 0.2 < (first.sign == other.sign).mean() < 0.8
    assert set(first.place.tolist()) == set(range(WIDTH))
    assert set(first.sign.tolist()) == {-1.0, 1.0}


def test_a_place_says_nothing_of_a_sign():
    # Both are drawn from one key, but not from the same numbers.
    sketch = make_sketch(jax.random.key(0), 20_000, 2)
    means = [sketch.sign[sketch.place == i].mean() for i in (0, 1)]
    assert_allclose(means, 0, atol=5 / 10_000**0.5)


def test_a_stack_is_sketched_vector_by_vector():
    x = arrays(2, 3, SIZE)
    sketch = make_sketch(jax.random.key(0), SIZE, WIDTH)
    found = sketch_of(sketch, x, width=WIDTH)
    assert found.shape == (2, 3, WIDTH)
    for i, j in np.ndindex(2, 3):
        assert_allclose(found[i, j], sketch_of(sketch, x[i, j], width=WIDTH), atol=1e-6)


def test_width_one_is_the_signed_sum():
    x, sketch = arrays(SIZE), make_sketch(jax.random.key(0), SIZE, 1)
    assert_allclose(sketch_of(sketch, x, width=1), [(x * sketch.sign).sum()], atol=1e-5)


def test_rounded_vectors_are_summed_unrounded():
    sketch = Sketch(jnp.zeros(2, int), jnp.ones(2))
    assert_array_equal(sketch_of(sketch, jnp.array([256, 1], "bfloat16"), width=1), [257])


@pytest.mark.parametrize(("size", "width"), [(0, 3), (5, 0), (5, -1)])
def test_a_sketch_wants_a_size_and_a_width(size, width):
    with pytest.raises(ValueError, match=rf"make_sketch: got size={size}, width={width}; want"):
        make_sketch(jax.random.key(0), size, width)
