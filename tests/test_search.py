"""Search in two stages: the exact ranking, certified, from few distances, on any devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection.search import (
    Sketches,
    Specifications,
    capacity_of,
    place,
    pool_mesh,
    put_row,
    search,
    shortlist,
)
from learnware_jax.specification.kernels import Gaussian, InverseMultiquadric, Laplace, Linear
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import CODES, choose_landmarks, project, quantise

D, N, WIDTH = 6, 40, 24
ROWS = 1000  # of search_on_devices.py
PROGRAM = Path(__file__).parent / "search_on_devices.py"


def specifications(count, m=4, seed=0):
    """Learnwares of ten kinds, which differ more than those of a kind do."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(99).normal(size=(10, 1, D))
    z = 0.3 * rng.normal(size=(count, m, D)) + kinds[rng.integers(10, size=count)]
    return z.astype(np.float32), rng.dirichlet(np.ones(m), count)


def exact_distances(kernel, user, z, beta):
    """Unbiased squared MMD from a user to every learnware: biased, and what unbiasing adds."""
    found = []
    for a, b in zip(z, beta, strict=True):
        p = RKME(a, b)
        selves = sum(own_deficit(kernel, q) for q in (p, user)) / (N - 1)
        found.append(oracle.squared_mmd(kernel, p, user) + selves)
    return np.array(found)


def own_deficit(kernel, p):
    z = np.asarray(p.z, np.float64)
    t = ((z[:, None] - z[None]) ** 2).sum(-1)
    return p.beta @ oracle.deficit(kernel, t) @ p.beta


def pool(kernel, z, beta, *, dtype="int8", bounded=True, dead=(), devices=None):
    """Everything that `search` takes of the learnwares, and the landmarks."""
    landmarks = choose_landmarks(jax.random.key(0), z, beta, kernel, count=64, width=WIDTH)
    p = project(landmarks, kernel, z, beta)
    self_term = p.self_term * N / (N - 1)
    shift = self_term - p.self_term
    shift[list(dead)] = np.inf
    rest = p.rest if bounded else None
    sketches = place(pool_mesh(devices), *quantise(p.coordinates, dtype), rest, shift)
    return landmarks, sketches, Specifications(kernel, z, beta, self_term)


def run(kernel, users, landmarks, sketches, specs, **options):
    z, beta = np.stack([u.z for u in users]), np.stack([u.beta for u in users])
    p = project(landmarks, kernel, z, beta)
    rest = None if sketches.rest is None else p.rest
    return search(
        users, p.coordinates, rest, sketches, specs, n=[N] * len(users), top_k=5, **options
    )


def users_like(count, seed=1):
    return [RKME(*pair) for pair in zip(*specifications(count, m=7, seed=seed), strict=True)]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
def test_the_first_are_those_of_all_distances(kernel, dtype):
    z, beta = specifications(300)
    users = users_like(11)  # more than share a first stage
    found = run(kernel, users, *pool(kernel, z, beta, dtype=dtype))
    assert found.certified.all()
    assert found.measured.mean() < 150  # and not from all distances
    for i, user in enumerate(users):
        want = exact_distances(kernel, user, z, beta)
        assert_array_equal(found.index[i], np.argsort(want)[:5])
        assert_allclose(found.distance[i], np.sort(want)[:5], atol=1e-12)


def test_equal_learnwares_keep_the_order_of_the_pool():
    z, beta = specifications(60)
    for twin in (7, 31, 59):
        z[twin], beta[twin] = z[3], beta[3]
    user = RKME(z[3], beta[3])
    found = run(Gaussian(0.5), [user], *pool(Gaussian(0.5), z, beta))
    assert_array_equal(found.index[0, :4], [3, 7, 31, 59])
    assert len(set(found.distance[0, :4])) == 1


def test_removed_learnwares_and_spare_rows_are_never_found():
    z, beta = specifications(40)
    (user,) = users_like(1)
    want = np.argsort(exact_distances(Gaussian(0.5), user, z, beta))
    parts = pool(Gaussian(0.5), z, beta, dead=want[[0, 2]])
    found = run(Gaussian(0.5), [user], *parts)
    assert_array_equal(found.index[0], want[[1, 3, 4, 5, 6]])
    found = run(Gaussian(0.5), [user], *pool(Gaussian(0.5), z, beta, dead=want[3:]))
    assert_array_equal(found.index[0], want[:3])
    assert len(parts[1].code) == capacity_of(40, 1) > 40


def test_a_pool_of_none_is_refused():
    z, beta = specifications(4)
    with pytest.raises(ValueError, match="has no learnware"):
        run(Gaussian(0.5), users_like(1), *pool(Gaussian(0.5), z, beta, dead=range(4)))


def test_cut_short_is_not_certified_and_measures_no_more():
    z, beta = specifications(300)
    users = users_like(6)
    whole = run(Gaussian(0.5), users, *pool(Gaussian(0.5), z, beta))
    most = int(np.median(whole.measured))
    found = run(Gaussian(0.5), users, *pool(Gaussian(0.5), z, beta), most=most)
    assert_array_equal(found.certified, whole.measured <= most)
    assert 0 < found.certified.sum() < 6
    assert (found.measured <= most).all()
    kept = found.certified
    assert_array_equal(found.index[kept], whole.index[kept])
    for i, user in enumerate(users):
        want = exact_distances(Gaussian(0.5), user, z, beta)
        assert_allclose(found.distance[i], want[found.index[i]], atol=1e-12)


@pytest.mark.parametrize("most", [16, 32])
def test_a_limit_that_is_met_to_the_number_is_no_certificate(most):
    # Sixty copies: the closest by estimate are the closest by bound, and none can be ruled out.
    z, beta = specifications(1)
    z, beta = np.repeat(z, 60, 0), np.repeat(beta, 60, 0)
    found = run(Gaussian(0.5), users_like(1), *pool(Gaussian(0.5), z, beta), most=most)
    assert found.measured[0] == most and not found.certified[0]


@pytest.mark.parametrize("dtype", CODES)
def test_lower_bounds_are_below_and_close_where_landmarks_leave_no_rest(dtype):
    z, beta = specifications(300)
    users = users_like(4)
    landmarks, sketches, _ = pool(Linear(), z, beta, dtype=dtype)
    p = project(landmarks, Linear(), *(np.stack(a) for a in zip(*users, strict=True)))
    lower = np.asarray(shortlist(sketches, p.coordinates, p.rest, count=5)[0])[:, :300]
    for i, user in enumerate(users):
        want = exact_distances(Linear(), user, z, beta) - own_deficit(Linear(), user) / (N - 1)
        assert (lower[i] <= want).all()
        assert np.median(lower[i] / want) > (0.9 if dtype == "int8" else 0.97)


def hard(name):
    """Pools and users that float32 cannot tell apart: (kernel, users, z, beta)."""
    rng = np.random.default_rng(5)
    m = 1 if "one point" in name else 3
    beta = rng.dirichlet(np.ones(m), 120)
    z = rng.normal(size=(1, m, D)) + 2e-4 * rng.normal(size=(120, m, D))
    user = RKME((z[0] + 1e-4).astype(np.float32), beta[0])
    match name:
        case "far user" | "far user, one point":
            user = RKME(user.z + np.float32(3000), user.beta)
            return InverseMultiquadric(1.0), [user], z, beta
        case "wide specifications":
            z = 300 * rng.normal(size=(1, m, D)) + 0.3 * rng.normal(size=(120, m, D))
            return Laplace(1.0), [RKME((z[0] + 0.1).astype(np.float32), beta[0])], z, beta
        case "outlier without weight":
            far = np.full((1, D), 1e4, np.float32)
            user = RKME(np.concatenate([user.z, far]), np.append(user.beta, 0))
            return Gaussian(0.5), [user], z, beta
        case "tiny numbers":
            return Linear(), [RKME(1e-19 * user.z, user.beta)], 1e-19 * z, beta
        case "near copies":
            return Laplace(1.0), [user], z, beta


@pytest.mark.parametrize(
    "name",
    [
        *("far user", "far user, one point", "wide specifications", "outlier without weight"),
        *("tiny numbers", "near copies"),
    ],
)
def test_certificates_hold_where_float32_fails(name):
    kernel, users, z, beta = hard(name)
    z = z.astype(np.float32)
    found = run(kernel, users, *pool(kernel, z, beta))
    want = exact_distances(kernel, users[0], z, beta)
    assert found.certified.all()
    # Whatever was left out is not closer than what was found.
    tolerance = 1e-13 * max(np.abs(want).max(), 1e-300)
    assert (want[found.index[0]] <= np.sort(want)[:5] + tolerance).all()
    assert_allclose(found.distance[0], np.sort(want)[:5], rtol=1e-6, atol=tolerance)


def test_vectors_longer_than_a_program_holds_are_measured_one_by_one(monkeypatch):
    monkeypatch.setattr("learnware_jax.selection.search._BYTES", 16)
    z, beta = specifications(40)
    (user,) = users_like(1)
    found = run(Gaussian(0.5), [user], *pool(Gaussian(0.5), z, beta))
    want = exact_distances(Gaussian(0.5), user, z, beta)
    assert_array_equal(found.index[0], np.argsort(want)[:5])


def test_without_bounds_the_closest_sketches_are_measured():
    z, beta = specifications(300)
    users = users_like(6)
    landmarks, sketches, specs = pool(Gaussian(0.5), z, beta, bounded=False, dtype="float32")
    found = run(Gaussian(0.5), users, landmarks, sketches, specs, most=30)
    assert not found.certified.any()
    assert_array_equal(found.measured, 30)
    of_pool = project(landmarks, Gaussian(0.5), z, beta).coordinates
    for i, user in enumerate(users):
        p = project(landmarks, Gaussian(0.5), np.asarray(user.z)[None], user.beta[None])
        near = ((of_pool - p.coordinates) ** 2).sum(1)
        own = np.array(
            [own_deficit(Gaussian(0.5), RKME(*pair)) for pair in zip(z, beta, strict=True)]
        )
        chosen = np.argsort(near + own / (N - 1))[:30]
        want = exact_distances(Gaussian(0.5), user, z, beta)
        assert_array_equal(found.index[i], chosen[np.argsort(want[chosen])][:5])
    with pytest.raises(ValueError, match="say by `most`"):
        run(Gaussian(0.5), users, landmarks, sketches, specs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": [N]}, "2 users, 1 n and 2 rows"),
        ({"top_k": 0}, "top_k=0, most=None; want 1 <= top_k"),
        ({"most": 3}, "top_k=5, most=3; want 1 <= top_k <= most"),
        ({"coordinates": np.zeros((2, 3))}, "have 3 coordinates and a rest, the learnwares 24"),
        ({"n": [N, 0]}, r"n=\[40, 0\]; want at least one row"),
        ({"rest": None}, "24 coordinates and no rest, the learnwares 24 and a rest"),
        ({"users": [RKME(np.zeros((1, 2)), np.ones(1))] * 2}, "dimension 2, the learnwares 6"),
        ({"users": [RKME(np.zeros((1, D)), np.ones(1) / 2)] * 2}, "must be non-negative and sum"),
    ],
)
def test_bad_arguments(change, message):
    z, beta = specifications(20)
    _, sketches, specs = pool(Gaussian(0.5), z, beta)
    arguments = {
        "users": users_like(2),
        "coordinates": np.zeros((2, WIDTH)),
        "rest": np.zeros(2),
        "n": [N, N],
        "top_k": 5,
    }
    with pytest.raises(ValueError, match=message):
        search(sketches=sketches, specifications=specs, **(arguments | change))


def test_specifications_of_other_learnwares_are_refused():
    z, beta = specifications(20)
    landmarks, sketches, specs = pool(Gaussian(0.5), z, beta)
    with pytest.raises(ValueError, match=r"\[15, 20, 20\] rows of z, beta and self_term"):
        run(Gaussian(0.5), users_like(1), landmarks, sketches, specs._replace(z=z[:15]))
    with pytest.raises(ValueError, match="got count=0; want 1 to 32"):
        shortlist(sketches, np.zeros((1, WIDTH)), np.zeros(1), count=0)


def test_a_learnware_joins_without_a_compilation():
    z, beta = specifications(300)
    kernel, users = Gaussian(0.5), users_like(1)
    # Ten that are close to the user.
    z[290:], beta[290:] = users[0].z[:4] + 0.01 * np.arange(10)[:, None, None], 0.25
    landmarks, sketches, specs = pool(kernel, z[:290], beta[:290])
    run(kernel, users, landmarks, sketches, specs)

    def with_row(sketches, i):
        p = project(landmarks, kernel, z[i : i + 1], beta[i : i + 1])
        shift = p.self_term / (N - 1)
        row = Sketches(*quantise(p.coordinates, "int8"), p.rest.astype(np.float32), shift)
        return put_row(sketches, np.int32(i), row._replace(shift=shift.astype(np.float32)))

    sketches = with_row(sketches, 290)
    own = project(landmarks, kernel, z, beta).self_term * N / (N - 1)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        jax.jit(lambda x: x + 1)(0)
        assert [name for name in events if "backend_compile" in name]  # they would be seen
        events.clear()
        for i in range(291, 300):
            sketches = with_row(sketches, i)
        found = run(kernel, users, landmarks, sketches, Specifications(kernel, z, beta, own))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in events if "backend_compile" in name]
    want = exact_distances(kernel, users[0], z, beta)
    assert_array_equal(found.index[0], np.argsort(want)[:5])
    assert found.index.max() >= 290


def start(*arguments, devices=1):
    """A process that searches on its own (`search_on_devices.py`)."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def on_one_device():
    return outcome(start())


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("devices", [3, 8])
def test_many_devices_give_the_same_bits(on_one_device, devices):
    found = outcome(start(devices=devices))
    assert found == on_one_device | {"devices": devices}


def test_two_processes_give_the_same_bits(on_one_device):
    port = free_port()
    both = [start(port, 2, i, devices=2) for i in range(2)]
    for i, process in enumerate(both):
        found = outcome(process)
        # Each read its own rows of codes and of points, and no other.
        rows, codes = found.pop("rows"), found.pop("codes")
        assert found == {k: v for k, v in on_one_device.items() if k not in ("rows", "codes")} | {
            "devices": 4
        }
        half = capacity_of(ROWS, 4) // 2
        assert min(rows) >= i * half and max(rows) < min((i + 1) * half, ROWS)
        assert codes == list(range(i * half, min((i + 1) * half, ROWS)))
