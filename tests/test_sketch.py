"""Sketches: bounds that hold, by hand, linear, and unbiased with the variance that is stated."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.specification.kernels import Gaussian, Linear
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import (
    CODES,
    Sketch,
    choose_landmarks,
    make_sketch,
    orthogonal_frequencies,
    project,
    quantise,
    random_features,
    round_up_float32,
    sketch_of,
)

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


def specifications(count, m=5, d=3, seed=0, offset=0.0):
    """Padded stacks of weighted points: groups that differ, so that there is something to find."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, m, d)) + 2 * rng.normal(size=(count, 1, d)) + offset
    beta = rng.dirichlet(np.ones(m), count)
    beta[:, -1] = 0
    z[:, -1] = z[:, 0]
    return z.astype(np.float32), beta / beta.sum(1, keepdims=True)


def bounds(p, i, j):
    near = ((p.coordinates[i] - p.coordinates[j]) ** 2).sum()
    return near + (p.rest[i] - p.rest[j]) ** 2, near + (p.rest[i] + p.rest[j]) ** 2


def test_a_projection_by_hand():
    # Linear kernel, landmarks 0 and 2 on a line: mu_0 is the point 1, psi the line's direction.
    points = np.array([[0, 0], [2, 0]], np.float32)
    landmarks = choose_landmarks(
        jax.random.key(0), points[:, None], np.ones((2, 1)), Linear(), count=2, width=9
    )
    assert landmarks.basis.shape == (2, 1)
    z, beta = np.array([[[5, 3], [3, 1]]], np.float32), np.array([[0.5, 0.5]])
    found = project(landmarks, Linear(), z, beta)  # the mean is (4, 2)
    assert_allclose(np.abs(found.coordinates), [[3]])
    assert_allclose(found.rest, [2])
    assert_allclose(found.self_term, [-(2**2 + 2**2) / 4])  # 2 pairs of 1/4, deficit -8/2 each


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_projections_bound_every_distance(kernel, offset):
    z, beta = specifications(30, offset=offset)
    key = jax.random.key(1)
    landmarks = choose_landmarks(key, z, beta, kernel, count=12, width=4)
    p = project(landmarks, kernel, z, beta)
    shares = []
    for i in range(0, 30, 3):
        for j in range(i):
            distance = oracle.squared_mmd(kernel, RKME(z[i], beta[i]), RKME(z[j], beta[j]))
            lower, upper = bounds(p, i, j)
            assert lower - 1e-9 <= distance <= upper + 1e-9
            shares.append(lower / distance)
    assert np.median(shares) > 0.08  # they say something


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
def test_nothing_is_left_of_what_landmarks_span(kernel):
    z, beta = specifications(6, m=4)
    landmarks = choose_landmarks(jax.random.key(0), z, beta, kernel, count=9000, width=400)
    assert len(landmarks.points) == 6 * 3  # every point with weight, once
    p = project(landmarks, kernel, z, beta)
    assert p.rest.max() < 1e-6
    for i in range(1, 6):
        distance = oracle.squared_mmd(kernel, RKME(z[0], beta[0]), RKME(z[i], beta[i]))
        assert_allclose(bounds(p, 0, i), distance, rtol=1e-7)


@pytest.mark.parametrize("away", [0.0, 8.0])
def test_bounds_hold_among_near_copies(away):
    # Hundreds of landmarks that hardly differ: small eigenvalues, whose vectors rounding bends.
    rng, kernel = np.random.default_rng(0), Gaussian(0.05)
    z = rng.normal(size=(1, 4, 6)) + 0.01 * rng.normal(size=(300, 4, 6))
    z, beta = z.astype(np.float32), rng.dirichlet(np.ones(4), 300)
    landmarks = choose_landmarks(jax.random.key(0), z, beta, kernel, count=512, width=256)
    assert np.abs(landmarks.basis.sum(0)).max() < 1e-9
    user = RKME(z[0] + np.float32(away), beta[0])
    u = project(landmarks, kernel, user.z[None], user.beta[None])
    p = project(landmarks, kernel, z, beta)
    for i in range(1, 300, 20):
        distance = oracle.squared_mmd(kernel, user, RKME(z[i], beta[i]))
        near = ((p.coordinates[i] - u.coordinates[0]) ** 2).sum()
        assert near + (p.rest[i] - u.rest[0]) ** 2 <= distance + 1e-9
        assert distance <= near + (p.rest[i] + u.rest[0]) ** 2 + 1e-9


def test_weights_are_made_to_sum_to_one():
    z, beta = specifications(12)
    landmarks = choose_landmarks(jax.random.key(0), z, beta, Linear(), count=16, width=2)
    for one, other in zip(
        project(landmarks, Linear(), z, beta),
        project(landmarks, Linear(), z, (1 + 1e-5) * beta),
        strict=True,
    ):
        assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_components_come_in_the_order_of_what_they_hold():
    z, beta = specifications(50)
    key, kernel = jax.random.key(2), Gaussian(0.3)
    whole = choose_landmarks(key, z, beta, kernel, count=20, width=20)
    part = choose_landmarks(key, z, beta, kernel, count=20, width=5)
    assert_array_equal(part.basis, whole.basis[:, :5])
    power = (project(whole, kernel, z, beta).coordinates ** 2).sum(0)
    assert (np.diff(power) < 0).all()
    p = project(part, kernel, z, beta)
    lost = (project(whole, kernel, z, beta).coordinates[:, 5:] ** 2).sum(1)
    assert_allclose(p.rest**2, project(whole, kernel, z, beta).rest ** 2 + lost, rtol=1e-9)


def test_projection_does_not_depend_on_company():
    z, beta = specifications(1030)
    landmarks = choose_landmarks(jax.random.key(0), z, beta, Gaussian(0.3), count=16, width=8)
    together = project(landmarks, Gaussian(0.3), z, beta)
    for i in (0, 511, 512, 1029):
        alone = project(landmarks, Gaussian(0.3), z[i : i + 1], beta[i : i + 1])
        for one, many in zip(alone, together, strict=True):
            assert_allclose(one[0], many[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"count": 0}, {"width": 0}])
def test_landmarks_refuse_sizes(settings):
    with pytest.raises(ValueError, match="want at least one of each"):
        choose_landmarks(jax.random.key(0), *specifications(3), Gaussian(1.0), **settings)


def test_landmarks_refuse_points_that_are_one():
    z, beta = np.ones((4, 2, 3), np.float32), np.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="do not differ"):
        choose_landmarks(jax.random.key(0), z, beta, Gaussian(1.0))


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_as_far_off_as_they_say(dtype):
    x = np.random.default_rng(0).normal(size=(40, 7)) * 10.0 ** np.arange(-20, 20)[:, None]
    x[3] = 0
    coded = quantise(x, dtype)
    back = coded.scale[:, None].astype(np.float64) * coded.code.astype(np.float64)
    off = np.linalg.norm(x - back, axis=1)
    assert (off <= coded.error).all()
    assert_allclose(coded.error, off, rtol=1e-6)
    # Half a unit in the last place of each number, or of the largest.
    worst = {"int8": 7**0.5 / 254, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    assert (off <= worst * np.abs(x).max(1) * 7**0.5).all()
    assert off.max() > 0


def test_int8_codes_by_hand():
    coded = quantise(np.array([[2.54, -1.0, 0.004]]), "int8")
    assert_array_equal(coded.code, [[127, -50, 0]])
    assert_allclose(coded.scale, [0.02], rtol=1e-6)
    assert_allclose(coded.error, [0.004], rtol=1e-5)


def test_quantise_refuses_another_dtype():
    with pytest.raises(ValueError, match=r"got dtype='int4'; want one of int8, bfloat16, float32"):
        quantise(np.ones((1, 2)), "int4")


def test_rounding_up_is_the_next_float32():
    x = np.array([1.0, 1 + 1e-9, -1 - 1e-9, 0.1])
    up = round_up_float32(x)
    assert_array_equal(up, np.array([1, 1 + 2.0**-23, -1, np.float32(0.1)], np.float32))
    assert (up >= x).all()


def test_random_features_give_the_kernel_on_average():
    kernel, d, count = Gaussian(0.4), 6, 8
    z, beta = specifications(3, d=d)
    z /= 2

    def products(key):
        f = random_features(orthogonal_frequencies(key, kernel, d, count), z, beta)
        return f @ f.T

    found = np.asarray(jax.vmap(products)(jax.random.split(jax.random.key(0), 3000)), np.float64)
    for i in range(3):
        for j in range(3):
            want = oracle.inner(kernel, RKME(z[i], beta[i]), RKME(z[j], beta[j]))
            assert abs(found[:, i, j].mean() - want) < 4 * found[:, i, j].std() / 3000**0.5
            assert want > 0.01


def test_frequencies_of_a_block_are_orthogonal():
    rows = np.asarray(orthogonal_frequencies(jax.random.key(0), Gaussian(0.5), 5, 8), np.float64)
    gram = rows @ rows.T
    for block in (gram[:5, :5], gram[5:, 5:]):
        assert_allclose(block, np.diag(np.diag(block)), atol=1e-5)
    assert np.abs(gram[:5, 5:]).max() > 0.1
