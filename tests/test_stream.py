"""Streams: uniform samples, calibrated weights and merges against all rows held at once."""

from functools import reduce as fold

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import ALL_KERNELS

from learnware_jax.specification import stream as stream_module
from learnware_jax.specification.kernels import Gaussian, Laplace, MultiGaussian
from learnware_jax.specification.reduce import reduce
from learnware_jax.specification.rkme import RKME, check_rkme, from_rows
from learnware_jax.specification.stream import (
    finish,
    mean_of,
    merge,
    merge_reduced,
    sample_of,
    start,
    update,
)

N, D, CAPACITY, M = 700, 4, 100, 6
KEY = jax.random.key(0)
KERNEL = Gaussian(0.3)


@pytest.fixture(scope="module")
def x():
    """Rows off the sphere, sorted: what comes first says little of what follows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, D)) * np.arange(1, D + 1) / 3 + rng.integers(3, size=(N, 1))
    return rows[np.argsort(rows.sum(1))].astype(np.float32)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(stream_module, "_BLOCK", 64)


def anchors(x):
    return x[:: len(x) // 4][:4]


def streamed(x, pieces=1, *, key=KEY, kernel=KERNEL, whole=None, capacity=CAPACITY):
    begun = start(key, anchors(x if whole is None else whole), kernel, capacity=capacity)
    return fold(update, np.array_split(x, pieces), begun)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


def exact(kernel, x, spec):
    return oracle.squared_mmd(kernel, from_rows(np.asarray(x, np.float64)), spec)


@pytest.mark.parametrize("pieces", [2, 11, 64, N])
def test_how_rows_are_cut_into_pieces_makes_no_difference(x, pieces):
    assert_equal(streamed(x, pieces), streamed(x))


def test_a_stream_does_not_grow(x):
    def numbers(stream):
        return sum(np.size(leaf) for leaf in jax.tree.leaves(stream._replace(pending=())))

    stream = streamed(x)
    assert len(stream.rows) == CAPACITY and len(stream.pending) == N % 64
    longer = update(stream, np.concatenate([x] * 5))
    assert numbers(longer) == numbers(stream) and len(longer.pending) < 64


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=oracle.kernel_name)
def test_few_rows_give_what_compression_at_once_gives(x, kernel):
    some = x[:CAPACITY]
    found = finish(KEY, streamed(some, 7, kernel=kernel), M, method="random")
    assert_equal(found, reduce(KEY, some, M, kernel, method="random"))
    spec = sample_of(streamed(some, 7, kernel=kernel))
    assert_array_equal(spec.z, some)
    assert_array_equal(spec.beta, 1 / CAPACITY)


def places(stream, x):
    """Where in x the rows of the sample stand."""
    return [int(np.flatnonzero((x == row).all(1))[0]) for row in sample_of(stream).z]


def test_every_row_has_the_same_chance_alone_and_in_company():
    x, runs, capacity = np.arange(36, dtype=np.float32)[:, None], 600, 12
    kept = np.zeros((3, runs, len(x)))
    for run in range(runs):
        keys = jax.random.split(jax.random.fold_in(KEY, run), 3)
        begun = [start(key, x[:2], KERNEL, capacity=capacity) for key in keys]
        whole = update(begun[0], x)
        merged = merge(update(begun[1], x[:9]), update(begun[2], x[9:]))
        resumed = update(merge(update(begun[1], x[:9]), update(begun[2], x[9:20])), x[20:])
        for way, stream in enumerate((whole, merged, resumed)):
            kept[way, run, places(stream, x)] = 1
    share = capacity / len(x)
    assert (kept.sum(2) == capacity).all()
    error = np.sqrt(share * (1 - share) / runs)
    assert np.abs(kept.mean(1) - share).max() < 4.5 * error
    # The variance of how many of the first 9 are kept: hypergeometric.
    wanted = 9 * share * (1 - share) * (len(x) - 9) / (len(x) - 1)
    assert_allclose(kept[:, :, :9].sum(2).var(1), wanted, rtol=0.25)


def test_rows_stay_in_their_order_and_follow_from_the_key(x):
    here = places(streamed(x), x)
    assert here == sorted(here)
    assert places(streamed(x, key=jax.random.key(1)), x) != here
    # A row's fate hangs on its place alone.
    other = x.copy()
    other[::3] += 1
    assert_array_equal(sample_of(streamed(other, whole=x)).z, other[here])


def test_the_mean_is_that_of_all_rows(x):
    far = x + np.float32(1000)
    assert_allclose(mean_of(streamed(far, 5)), far.mean(0, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=oracle.kernel_name)
@pytest.mark.parametrize("parts", [1, 3])
def test_weights_agree_with_all_rows(x, kernel, parts):
    streams = [
        streamed(part, 2, key=jax.random.key(i), kernel=kernel, whole=x)
        for i, part in enumerate(np.array_split(x, parts))
    ]
    spec = check_rkme(sample_of(fold(merge, streams)))
    assert spec.beta.min() > 0  # so that nothing was cut off

    def off(weights):
        mean = weights @ spec.z - x.mean(0, dtype=np.float64)
        k, everywhere = (oracle.gram(kernel, anchors(x), rows) for rows in (spec.z, x))
        return np.abs(np.concatenate([mean, k @ weights - everywhere.mean(1)]))

    assert off(spec.beta).max() < 1e-3 * off(np.full(CAPACITY, 1 / CAPACITY)).max()
    # Of all weights that agree, they are the nearest to equal ones: linear in what agrees.
    t = ((spec.z[:, None].astype(np.float64) - anchors(x)) ** 2).sum(-1)
    features = np.concatenate([np.ones((CAPACITY, 1)), spec.z, oracle.deficit(kernel, t)], 1)
    rest = spec.beta - 1 / CAPACITY
    left = rest - features @ np.linalg.lstsq(features, rest, rcond=None)[0]
    assert np.abs(left).max() < 1e-3 * np.abs(rest).max()


def test_weights_below_zero_are_cut_off():
    # A few rows are far away: how many of them the sample has is chance.
    x = np.concatenate([np.zeros((4000, 1)), np.ones((40, 1)), np.full((3, 1), 60.0)])
    x = (x + 0.01 * np.random.default_rng(0).standard_normal(x.shape)).astype(np.float32)
    begun = [start(jax.random.key(i), x[-50:-46], Gaussian(1.0), capacity=100) for i in range(5)]
    specs = [check_rkme(sample_of(update(stream, x))) for stream in begun]
    assert any((spec.beta == 0).any() for spec in specs)


@pytest.mark.parametrize("kernel", [KERNEL, Laplace(0.5)], ids=oracle.kernel_name)
def test_calibrated_weights_bring_the_result_closer_to_all_rows(x, kernel):
    def errors(seed):
        stream = streamed(x, key=jax.random.key(seed), kernel=kernel)
        spec = sample_of(stream)
        equal = RKME(spec.z, np.full(CAPACITY, 1 / CAPACITY))
        fitted = [
            reduce(KEY, spec.z, M, kernel, weights=weights, steps=10).spec
            for weights in (spec.beta, equal.beta)
        ]
        assert_array_equal(finish(KEY, stream, M, steps=10).spec.z, fitted[0].z)
        return [exact(kernel, x, s) for s in (spec, equal, *fitted)]

    sample, equal, fitted, fitted_equal = np.mean([errors(seed) for seed in range(8)], 0)
    assert sample < 0.75 * equal
    assert fitted < 0.97 * fitted_equal


def test_the_residual_estimates_the_distance_to_all_rows(x, monkeypatch):
    # Not fitted to the sample: it is as far from it as from all rows.
    spec = reduce(KEY, x, M, KERNEL, method="random").spec
    monkeypatch.setattr(stream_module, "RESIDUAL_ROWS", 50)
    found = []
    for seed in range(300):
        stream = stream_module._settle(streamed(x, key=jax.random.key(seed)))
        found.append(stream_module._residual(stream, spec))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - exact(KERNEL, x, spec)) < 3 * error
    # What a sample of 50 would be off by its own noise.
    assert 3 * error < 0.3 / 50


def test_the_residual_from_all_rows_is_exact(x):
    spec = reduce(KEY, x, M, KERNEL, method="random").spec
    stream = stream_module._settle(streamed(x[:CAPACITY]))
    wanted = exact(KERNEL, x[:CAPACITY], spec)
    assert_allclose(stream_module._residual(stream, spec), wanted, atol=1e-6)


def test_the_residual_of_what_was_fitted_is_not_far_off(x):
    streams = [streamed(x, key=jax.random.key(i), capacity=300) for i in range(8)]
    found = [finish(KEY, stream, M, steps=10) for stream in streams]
    true = [exact(KERNEL, x, result.spec) for result in found]
    assert {result.n for result in found} == {N}
    assert_allclose(np.mean([result.residual for result in found]), np.mean(true), rtol=0.1)


def test_merging_keeps_what_streaming_keeps(x):
    parts = np.array_split(x, 3)
    a, b, c = (streamed(part, 2, key=jax.random.key(i), whole=x) for i, part in enumerate(parts))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert left.n == N
    for field in ("rows", "priorities"):
        assert_array_equal(getattr(left, field), getattr(right, field))
    assert_allclose(left.sums, right.sums, rtol=1e-12)
    assert_allclose(mean_of(left), x.mean(0, dtype=np.float64), rtol=1e-12)
    assert finish(KEY, left, M).n == N
    # Of each part those of least priority, and together those of least priority.
    assert_array_equal(
        np.sort(left.priorities),
        np.sort(np.concatenate([s.priorities for s in map(stream_module._settle, (a, b, c))]))[
            :CAPACITY
        ],
    )


def test_a_stream_goes_on_after_anything(x):
    stream = streamed(x[:500], 3)
    copy = jax.tree.map(np.copy, stream)
    other = streamed(x[:50], key=jax.random.key(1), whole=x[:500])
    finish(KEY, stream, M), mean_of(stream), sample_of(stream), merge(stream, other)
    assert_equal(stream, stream._replace(**copy._asdict()))
    assert_equal(update(stream, x[500:]), streamed_with(x, stream))


def streamed_with(x, begun):
    return update(update(start(KEY, begun.anchors, KERNEL, capacity=CAPACITY), x[:130]), x[130:])


def test_equal_rows_are_no_trouble(x):
    same = np.tile(x[:1], (N, 1))
    spec = check_rkme(sample_of(streamed(same)))
    assert_allclose(spec.beta.sum(), 1)
    found = finish(KEY, streamed(same), M)
    assert abs(found.residual) < 1e-6


def test_all_kinds_of_numbers_mean_their_values(x):
    halves = x.astype(np.float16)
    assert_equal(streamed(halves), streamed(halves.astype(np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": np.ones((0, 4))}, r"start: anchors: got shape \(0, 4\)"),
        ({"anchors": np.full((2, 4), np.nan)}, "start: anchors: 2 of 2 rows hold NaN"),
        ({"capacity": 23}, "got capacity=23 for 2 anchors of dimension 4; want at least 24"),
    ],
)
def test_bad_starts(change, message):
    given = {"anchors": np.ones((2, 4)), "capacity": 24} | change
    start(KEY, np.ones((2, 4)), KERNEL, capacity=24)
    with pytest.raises(ValueError, match=message):
        start(KEY, given["anchors"], KERNEL, capacity=given["capacity"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((3, 5)), "update: got rows of dimension 5, the stream has 4; embed all"),
        (np.full((3, 4), np.inf), "update: 3 of 3 rows hold NaN or infinity"),
        (np.ones((0, 4)), r"update: got shape \(0, 4\)"),
    ],
)
def test_bad_rows(x, rows, message):
    with pytest.raises(ValueError, match=message):
        update(streamed(x), rows)


def test_nothing_is_known_of_no_rows(x):
    empty = start(KEY, anchors(x), KERNEL, capacity=CAPACITY)
    for name, call in (
        ("finish", lambda: finish(KEY, empty, M)),
        ("mean_of", lambda: mean_of(empty)),
        ("sample_of", lambda: sample_of(empty)),
    ):
        with pytest.raises(ValueError, match=f"{name}: the stream has no rows yet"):
            call()
    other = streamed(x[:30], key=jax.random.key(1), whole=x)
    assert merge(empty, other).n == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": Gaussian(0.31)}, "different kernel; start all parts with the same"),
        ({"kernel": MultiGaussian(np.array([0.3]))}, "different kernel"),
        ({"whole": 2}, "different anchors"),
        ({"capacity": 101}, "different capacity"),
        ({"key": KEY}, "both streams were started with one key"),
    ],
)
def test_streams_that_do_not_merge(x, change, message):
    given = {"key": jax.random.key(1), "whole": x} | change
    given["whole"] = x * 2 if np.isscalar(given["whole"]) else x
    with pytest.raises(ValueError, match=f"merge: .*{message}"):
        merge(streamed(x), streamed(x, **given))


def test_two_parts_by_hand():
    p = RKME(np.array([[0.0], [1.0]], np.float32), np.array([0.25, 0.75]))
    q = RKME(np.array([[3.0]], np.float32), np.array([1.0]))
    found = merge_reduced(KEY, [p, q], 3, KERNEL, n=[30, 10], residual=[0.02, -0.01])
    assert_array_equal(found.spec.z, [[0.0], [1.0], [3.0]])
    assert_allclose(found.spec.beta, [0.1875, 0.5625, 0.25], rtol=1e-12)
    assert found.n == 40
    # No point was lost; three quarters of the rows are off by 0.02.
    assert_allclose(found.residual, 0.015, atol=1e-4)
    # One point of three: |0.1875 k(0, .) + 0.5625 k(1, .) + 0.25 k(3, .) - k(z, .)|^2 and 0.015,
    # their roots added.
    single = merge_reduced(KEY, [p, q], 1, KERNEL, n=[30, 10], residual=[0.02, -0.01])
    union = oracle.squared_mmd(KERNEL, found.spec, single.spec)
    assert union > 0.05
    assert_allclose(single.residual, (np.sqrt(union) + np.sqrt(0.015)) ** 2, rtol=1e-4)


@pytest.mark.parametrize("kernel", [KERNEL, Laplace(0.5)], ids=oracle.kernel_name)
def test_merged_specifications_are_close_to_all_rows_and_say_how_close(x, kernel):
    parts = [x[:40], x[40:100], x[100:]]
    made = [reduce(jax.random.key(i), part, 4 * M, kernel) for i, part in enumerate(parts)]
    found = merge_reduced(
        KEY,
        [r.spec for r in made],
        M,
        kernel,
        n=[r.n for r in made],
        residual=[r.residual for r in made],
    )
    check_rkme(found.spec)
    assert found.n == N and len(found.spec.beta) == M
    at_once = exact(kernel, x, reduce(KEY, x, M, kernel).spec)
    true = exact(kernel, x, found.spec)
    assert true < 1.15 * at_once + 1e-6
    assert true < found.residual + 1e-6 < 4 * true + 1e-5
    wrong = merge_reduced(KEY, [r.spec for r in made], M, kernel, n=[1] * 3, residual=[0.0] * 3)
    assert exact(kernel, x, wrong.spec) > 1.5 * true


SOUND = RKME(np.ones((2, 3), np.float32), np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specs": [], "n": [], "residual": []}, "got 0 specifications, 0 n and 0 residuals"),
        ({"n": [3]}, "got 2 specifications, 1 n and 2 residuals; want one of each a part"),
        ({"n": [3, 0]}, "part 1 has n=0 and residual=0.0; want at least one row"),
        ({"residual": [np.nan, 0.0]}, "part 0 has n=3 and residual=nan"),
        ({"specs": [SOUND, SOUND._replace(z=np.ones((2, 2)))]}, r"dimensions \[2, 3\]; embed all"),
        ({"specs": [SOUND, SOUND._replace(beta=np.array([0.5, 0.6]))]}, "part 1: weights must be"),
        ({"specs": [SOUND, SOUND._replace(beta=np.array([1.5, -0.5]))]}, "part 1: weights must be"),
    ],
)  # fmt: skip
def test_bad_parts(change, message):
    given = {"specs": [SOUND, SOUND], "n": [3, 3], "residual": [0.0, 0.0]} | change
    with pytest.raises(ValueError, match=f"merge_reduced: .*{message}"):
        merge_reduced(KEY, given["specs"], 1, KERNEL, n=given["n"], residual=given["residual"])
