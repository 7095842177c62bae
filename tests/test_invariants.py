"""What holds for every kernel, and for every reducer with every kernel."""

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import ALL_KERNELS

from learnware_jax.specification.kernels import gram
from learnware_jax.specification.reduce import REDUCERS, reduce
from learnware_jax.specification.rkme import RKME, check_rkme, from_rows, squared_mmd, witness

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS, ids=oracle.kernel_name)
EVERY_REDUCER = pytest.mark.parametrize("method", REDUCERS)
KEY = jax.random.key(0)
N, M, D = 120, 6, 8
X = oracle.unit_rows(np.random.default_rng(0), N, D)


def embedding(seed, count=20):
    """Points off the sphere, with weights on the simplex."""
    rng = np.random.default_rng(seed)
    return RKME(rng.standard_normal((count, D)), rng.dirichlet(np.ones(count)))


def distance(p, q, kernel):
    with jax.enable_x64(True):
        return float(squared_mmd(p, q, kernel))


def rotation(seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))[0]


@EVERY_KERNEL
def test_gram_is_symmetric_and_positive_semidefinite(kernel):
    z = np.concatenate([embedding(0).z, embedding(0).z[:3]])  # repeated points included
    with jax.enable_x64(True):
        k = np.asarray(gram(kernel, z, z))
    assert_allclose(k, k.T, rtol=1e-14)
    assert np.linalg.eigvalsh(k).min() > -1e-12


@EVERY_KERNEL
def test_squared_mmd_is_a_squared_metric(kernel):
    p, q, r = map(embedding, range(3))
    pq, qr, pr = distance(p, q, kernel), distance(q, r, kernel), distance(p, r, kernel)
    assert min(pq, qr, pr) > 0.001
    assert distance(q, p, kernel) == pytest.approx(pq, rel=1e-12)
    assert abs(distance(p, p, kernel)) < 1e-14
    assert pr**0.5 <= pq**0.5 + qr**0.5


@EVERY_KERNEL
def test_how_an_embedding_is_written_does_not_matter(kernel):
    p, q = embedding(0), embedding(1)
    expected = distance(p, q, kernel)
    order = np.random.default_rng(2).permutation(20)
    same = {
        "another order": RKME(p.z[order], p.beta[order]),
        "padding of weight zero": RKME(
            np.concatenate([p.z, 100 * q.z]), np.concatenate([p.beta, np.zeros(20)])
        ),
        "a point split in two": RKME(
            np.concatenate([p.z, p.z[:1]]),
            np.concatenate([[0.3 * p.beta[0]], p.beta[1:], [0.7 * p.beta[0]]]),
        ),
    }
    for name, other in same.items():
        assert distance(other, q, kernel) == pytest.approx(expected, rel=1e-10), name
        assert abs(distance(other, p, kernel)) < 1e-10, name


@EVERY_KERNEL
def test_distances_do_not_see_a_motion_of_everything(kernel):
    p, q = embedding(0), embedding(1)
    turn, shift = rotation(3), np.arange(D)
    moved = [s._replace(z=s.z @ turn + shift) for s in (p, q)]
    assert distance(*moved, kernel) == pytest.approx(distance(p, q, kernel), rel=1e-10)


@EVERY_KERNEL
def test_a_mixture_lies_on_the_line_between_its_parts(kernel):
    p, q = embedding(0), embedding(1)
    between = RKME(np.concatenate([p.z, q.z]), np.concatenate([0.3 * p.beta, 0.7 * q.beta]))
    assert distance(between, q, kernel) == pytest.approx(0.09 * distance(p, q, kernel), rel=1e-10)


@EVERY_KERNEL
def test_the_witness_integrates_to_the_distance(kernel):
    p, q = embedding(0), embedding(1)
    with jax.enable_x64(True):
        integral = p.beta @ witness(p, q, kernel, p.z) - q.beta @ witness(p, q, kernel, q.z)
    assert float(integral) == pytest.approx(distance(p, q, kernel), rel=1e-12)


@cache
def reduced(kernel_index, method):
    return reduce(KEY, X, M, ALL_KERNELS[kernel_index], method=method)


def every_pair(test):
    names = [kernel.name for kernel in ALL_KERNELS]
    return EVERY_REDUCER(pytest.mark.parametrize("index", range(len(names)), ids=names)(test))


@every_pair
def test_reduced_sets_are_specifications(index, method):
    result = reduced(index, method)
    spec = check_rkme(result.spec)
    assert 1 <= len(spec.beta) <= M and (len(spec.beta) == M or method == "herding")
    assert spec.z.dtype == np.float32 and spec.beta.dtype == np.float64
    assert_allclose(spec.beta.sum(), 1, rtol=1e-14)
    assert result.n == N


@every_pair
def test_residual_is_the_squared_mmd_to_all_rows(index, method):
    result, kernel = reduced(index, method), ALL_KERNELS[index]
    exact = oracle.squared_mmd(kernel, from_rows(X.astype(np.float64)), result.spec)
    assert_allclose(result.residual, exact, atol=2e-7)


@every_pair
def test_gap_certifies_the_weights(index, method):
    result, kernel = reduced(index, method), ALL_KERNELS[index]
    k, c = oracle.gram(kernel, result.spec.z, result.spec.z), oracle.gram(kernel, result.spec.z, X)
    gradient = k @ result.spec.beta - c.mean(1)
    gap = gradient @ result.spec.beta - gradient.min()
    assert_allclose(result.gap, gap, atol=1e-6)
    if method != "herding":  # its weights are not fitted
        assert result.gap < 1e-9 and gap < 1e-6


@every_pair
def test_same_key_same_bits(index, method):
    before = X.copy()
    again = reduce(KEY, X, M, ALL_KERNELS[index], method=method)
    jax.tree.map(assert_array_equal, again, reduced(index, method))
    assert_array_equal(X, before)


@EVERY_REDUCER
def test_another_key_another_result(method):
    other = reduce(jax.random.key(1), X, M, ALL_KERNELS[0], method=method)
    same = np.array_equal(other.spec.z, reduced(0, method).spec.z)
    assert same == (method == "herding")  # which has no choice in a small sample


@every_pair
def test_a_rotation_of_the_rows_rotates_the_points(index, method):
    turn, kernel = rotation(4), ALL_KERNELS[index]
    expected = reduced(index, method)
    result = reduce(KEY, (X @ turn).astype(np.float32), M, kernel, method=method)
    # Gauss-Newton makes many steps in float32; where it arrives is told apart no further.
    tolerance = 1e-2 if method == "gauss_newton" else 1e-5
    assert_allclose(result.residual, expected.residual, rtol=tolerance, atol=1e-6)


def test_herding_does_not_see_the_order_of_rows():
    order = np.random.default_rng(5).permutation(N)
    a, b = (
        reduced(0, "herding").spec,
        reduce(KEY, X[order], M, ALL_KERNELS[0], method="herding").spec,
    )
    match = np.lexsort(a.z.T), np.lexsort(b.z.T)
    assert_array_equal(a.z[match[0]], b.z[match[1]])
    assert_array_equal(a.beta[match[0]], b.beta[match[1]])


@EVERY_KERNEL
def test_gauss_newton_ends_where_the_gradient_vanishes(kernel):
    rows = from_rows(X.astype(np.float64))

    def slope(spec):  # along the sphere; the weights are optimal, so they add nothing
        z, gradient = spec.z.astype(np.float64), np.zeros((M, D))
        for i in np.ndindex(M, D):
            step = np.zeros((M, D))
            step[i] = 1e-4
            ahead, behind = (RKME(a, spec.beta) for a in (z + step, z - step))
            difference = oracle.inner(kernel, ahead, ahead) - oracle.inner(kernel, behind, behind)
            cross = oracle.inner(kernel, ahead, rows) - oracle.inner(kernel, behind, rows)
            gradient[i] = (difference - 2 * cross) / 2e-4
        return np.linalg.norm(gradient - (gradient * z).sum(1, keepdims=True) * z)

    index = [k.name for k in ALL_KERNELS].index(kernel.name)
    start, end = (slope(reduced(index, method).spec) for method in ("random", "gauss_newton"))
    # Laplace is fitted with its slope rounded off at the origin.
    assert end < (0.3 if kernel.name == "laplace" else 0.05) * start


ON_ANY_DEVICES = """
import sys
import jax, numpy as np
sys.path.insert(0, "tests")
import test_invariants as t
assert jax.device_count() == int(sys.argv[1])
print(t.everything())
"""


def everything():
    """A digest of the bits of every reducer and a distance, under every kernel."""
    digest = hashlib.sha256()
    for kernel in ALL_KERNELS:
        for method in REDUCERS:
            fitted = reduce(KEY, X, M, kernel, method=method)
            digest.update(fitted.spec.z.tobytes() + fitted.spec.beta.tobytes())
        digest.update(np.float64(distance(embedding(0), embedding(1), kernel)).tobytes())
    return digest.hexdigest()


def test_eight_devices_give_the_bits_of_one():
    def run(devices):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(
            [sys.executable, "-c", ON_ANY_DEVICES, str(devices)],
            env=os.environ | flags | {"JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(8) == run(1)
