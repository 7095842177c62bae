"""Private releases against their calibration, and attacks against what they must find."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, optimize, stats
from sklearn.metrics import roc_auc_score

from learnware_jax.specification import pave, privacy
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows, squared_mmd

EPSILONS = (0.1, 0.3, 1.0, 3.0, 10.0)
DELTA = 1e-6
KERNEL = Gaussian(0.5)


def unit_rows(seed, n, d=12):
    x = np.random.default_rng(seed).standard_normal((n, d)) + 0.7
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ---- calibration


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_delta_is_the_hockey_stick_divergence(epsilon):
    noise = 1.3 / epsilon
    p, q = stats.norm(1, noise), stats.norm(0, noise)
    # p exceeds e^epsilon q beyond this point.
    start = 0.5 + epsilon * noise**2
    wanted = integrate.quad(
        lambda t: p.pdf(t) - math.exp(epsilon) * q.pdf(t), start, start + 12 * noise, epsabs=1e-14
    )[0]
    assert_allclose(privacy.gaussian_delta(noise, epsilon), wanted, rtol=1e-6)


@pytest.mark.parametrize("delta", [1e-10, 1e-6, 1e-2])
@pytest.mark.parametrize("epsilon", [0.01, *EPSILONS, 60.0])
def test_noise_is_the_least_and_that_of_dp_accounting(epsilon, delta):
    from dp_accounting import gaussian_mechanism

    noise = privacy.gaussian_noise(epsilon, delta)
    assert privacy.gaussian_delta(noise, epsilon) <= delta
    assert privacy.gaussian_delta(noise * (1 - 1e-6), epsilon) > delta
    assert_allclose(noise, gaussian_mechanism.get_sigma_gaussian(epsilon, delta), rtol=1e-6)


def test_classical_noise_is_larger():
    """sqrt(2 log(1.25 / delta)) / epsilon, for epsilon below 1."""
    classical = math.sqrt(2 * math.log(1.25 / DELTA)) / 0.5
    assert privacy.gaussian_noise(0.5, DELTA) < 0.85 * classical


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.1), (-1.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_impossible_guarantees_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="want epsilon above 0"):
        privacy.gaussian_noise(epsilon, delta)


# ---- releases


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_noise_of_a_release_is_what_the_calibration_says(epsilon, n):
    """Rows that are far apart and too long: the mean of the clipped ones, and Gaussian noise of
    2 bound / n times the calibrated deviation, on every coordinate by itself."""
    bound, d = 0.5, 400
    rows = np.zeros((n, d), np.float32)
    rows[: n // 4, 0] = 100.0
    rows[n // 4, 1] = -0.25
    released = [
        privacy.release_mean(jax.random.key(i), rows, bound=bound, epsilon=epsilon, delta=DELTA)
        for i in range(10)
    ]
    wanted = np.zeros(d)
    wanted[0], wanted[1] = bound * (n // 4) / n, -0.25 / n
    deviation = 2 * bound / n * privacy.gaussian_noise(epsilon, DELTA)
    assert_allclose([r.noise for r in released], deviation, rtol=1e-12)
    noise = (np.stack([r.mean for r in released]) - wanted) / deviation
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    square = (noise**2).sum()
    assert 1e-3 < stats.chi2(noise.size).cdf(square) < 1 - 1e-3
    # Independent from coordinate to coordinate and from key to key.
    assert abs(np.corrcoef(noise)[np.triu_indices(10, 1)]).max() < 5 / d**0.5
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 5 / noise.size**0.5


def test_one_row_moves_a_mean_by_its_sensitivity_at_most():
    """And the worst pair of rows by exactly as much."""
    n, bound = 40, 0.3
    rows = np.random.default_rng(0).standard_normal((n, 5)) * 4
    release = [None, None]
    rows[0] = [100, 0, 0, 0, 0]
    other = rows.copy()
    other[0] = [-7, 0, 0, 0, 0]
    options = dict(bound=bound, epsilon=math.inf, delta=DELTA)
    release = [privacy.release_mean(jax.random.key(0), x, **options).mean for x in (rows, other)]
    assert_allclose(np.linalg.norm(release[0] - release[1]), 2 * bound / n, rtol=1e-12)
    moved = []
    for seed in range(50):
        other[0] = np.random.default_rng(seed).standard_normal(5) * 10.0 ** (seed % 7 - 3)
        mean = privacy.release_mean(jax.random.key(0), other, **options).mean
        moved.append(np.linalg.norm(mean - release[0]))
    assert max(moved) <= 2 * bound / n * (1 + 1e-12)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0])
def test_the_best_attack_on_a_release_reaches_its_bound_and_no_more(epsilon):
    """The attacker knows all rows but one, and which two it may be: what epsilon is for."""
    n, draws, bound = 50, 4000, 1.0
    rows = np.zeros((n, 1))
    scores = np.empty((2, draws))
    for side, value in enumerate((-bound, bound)):
        rows[0] = value
        for i in range(draws):
            key = jax.random.key(2 * i + side)
            options = dict(bound=bound, epsilon=epsilon, delta=0.01)
            scores[side, i] = privacy.release_mean(key, rows, **options).mean[0]
    threshold = np.quantile(scores[0], 0.99)
    tpr = (scores[1] > threshold).mean()
    accuracy = ((scores[1] > 0).mean() + (scores[0] < 0).mean()) / 2
    auc_bound, tpr_bound = privacy.leakage_bound(epsilon, 0.01)
    assert_allclose(accuracy, auc_bound, atol=4 * 0.5 / (2 * draws) ** 0.5)
    # The threshold is estimated too.
    assert_allclose(tpr, tpr_bound, atol=0.012 + 4 * (tpr_bound / draws) ** 0.5)
    # The definition itself, at every threshold: P(yes | one) <= e^epsilon P(yes | other) + delta.
    for t in np.quantile(scores, np.linspace(0.05, 0.95, 19)):
        yes = (scores > t).mean(1)
        assert yes[1] <= math.exp(epsilon) * yes[0] + 0.01 + 5 * math.exp(epsilon) / draws**0.5


def test_secret_keys_differ_and_make_different_noise():
    options = dict(bound=1.0, epsilon=1.0, delta=DELTA)
    keys = [privacy.secret_key() for _ in range(4)]
    data = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]
    assert len(set(data)) == 4 and all(len(d) == 4 for d in data)
    means = [privacy.release_mean(key, np.zeros((5, 3)), **options).mean for key in keys]
    assert len({m.tobytes() for m in means}) == 4


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_must_be_a_length(bound):
    with pytest.raises(ValueError, match="want a positive length"):
        privacy.release_mean(
            jax.random.key(0), np.ones((3, 2)), bound=bound, epsilon=1.0, delta=0.1
        )


# ---- reduced sets near a release


def test_weights_of_few_candidates_are_found_again():
    rng = np.random.default_rng(1)
    candidates = rng.standard_normal((50, 30))
    places, beta = privacy.fit_weights(
        0.5 * candidates[7] + 0.3 * candidates[20] + 0.2 * candidates[41], candidates, 6
    )
    found = dict(zip(places.tolist(), beta, strict=True))
    assert_allclose([found.pop(i) for i in (7, 20, 41)], [0.5, 0.3, 0.2], atol=1e-4)
    assert sum(found.values()) < 1e-4


def test_weights_are_the_best_for_the_chosen_candidates():
    """Against SLSQP over the same candidates, and each step chooses the steepest."""
    rng = np.random.default_rng(2)
    candidates, target = rng.standard_normal((40, 8)), 0.4 * rng.standard_normal(8)
    places, beta = privacy.fit_weights(target, candidates, 5)
    points = candidates[places]
    solved = optimize.minimize(
        lambda b: ((b @ points - target) ** 2).sum(),
        np.full(len(places), 1 / len(places)),
        bounds=[(0, 1)] * len(places),
        constraints={"type": "eq", "fun": lambda b: b.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert_allclose(((beta @ points - target) ** 2).sum(), solved.fun, rtol=1e-5)
    assert np.argmax(candidates @ target) in places  # the first step's
    assert beta.min() > 0
    assert_allclose(beta.sum(), 1, rtol=1e-12)
    assert_array_equal(
        privacy.fit_weights(target, candidates, 1)[0], [np.argmax(candidates @ target)]
    )


def test_a_private_rkme_holds_public_rows_and_nears_the_task():
    public_rows, x = unit_rows(0, 400), unit_rows(1, 300)
    public = privacy.make_public(jax.random.key(0), public_rows, KERNEL, count=64, width=16)
    assert_allclose(public.bound, np.linalg.norm(public.features, axis=1).max(), rtol=1e-12)
    far = squared_mmd(RKME(public_rows[:1], np.ones(1)), from_rows(x), KERNEL)
    gaps = {}
    for epsilon in (0.1, 1.0, 10.0, math.inf):
        spec, release = privacy.private_rkme(
            jax.random.key(3), x, public, 20, epsilon=epsilon, delta=DELTA
        )
        known = {row.tobytes() for row in public_rows}
        assert len(spec.z) <= 20 and all(row.tobytes() in known for row in spec.z)
        gaps[epsilon] = float(squared_mmd(spec, from_rows(x), KERNEL))
        wanted = 2 * public.bound / 300 * privacy.gaussian_noise(epsilon, DELTA)
        assert_allclose(release.noise, wanted, rtol=1e-12)
    assert gaps[math.inf] < 0.05 * far
    assert gaps[math.inf] <= gaps[10.0] < gaps[1.0] < gaps[0.1]


def test_landmark_features_have_the_kernels_geometry():
    """Of as many landmarks as rows nothing is left out: distances are those of the RKHS."""
    x = unit_rows(4, 20, d=30)
    public = privacy.make_public(jax.random.key(0), x, KERNEL, count=20, width=20)
    features = privacy.landmark_features(public.landmarks, KERNEL, x)
    square = ((features[0] - features[1]) ** 2).sum()
    t = float(((x[0].astype(float) - x[1]) ** 2).sum())
    assert_allclose(square, 2 - 2 * math.exp(-0.5 * t), rtol=1e-5)


# ---- private fits


def test_noise_of_whole_batches_is_that_of_one_release():
    one = privacy.gaussian_noise(1.0, DELTA)
    assert_allclose(privacy.fit_noise(1.0, DELTA, n=50, batch=50, steps=16), 4 * one, rtol=1e-12)
    assert privacy.fit_noise(math.inf, DELTA, n=50, batch=5, steps=16) == 0


def test_noise_of_batches_meets_epsilon_by_the_librarys_own_accountant():
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    noise = privacy.fit_noise(3.0, 1e-5, n=200, batch=20, steps=10)
    one = dp_accounting.SampledWithoutReplacementDpEvent(
        200, 20, dp_accounting.GaussianDpEvent(noise)
    )
    accountant = RdpAccountant(
        [*range(2, 20)], neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(one, 10))
    assert 2.7 < accountant.get_epsilon(1e-5) <= 3.03
    # What sampling is for: less noise than without, over the steps' own root.
    assert noise < 0.7 * privacy.fit_noise(3.0, 1e-5, n=200, batch=200, steps=10)


@pytest.mark.parametrize(("n", "batch", "steps"), [(5, 6, 1), (5, 0, 1), (5, 5, 0)])
def test_batches_that_cannot_be_are_refused(n, batch, steps):
    with pytest.raises(ValueError, match="want 1 <= batch <= n and a step"):
        privacy.fit_noise(1.0, DELTA, n=n, batch=batch, steps=steps)


SETTINGS = pave.Settings(steps=6, batch=8, rate=1e-2, decay=0.1, warmup=0.2, clip=1.0, pull=0.3)


def linear(n, scale=1.0):
    gradients = np.random.default_rng(5).standard_normal((n, 2, 3, 4)).astype(np.float32) * scale
    return gradients, pave.linear_loss(jnp.asarray(gradients), np.full(n, 2.0, np.float32))


def test_a_fit_without_noise_is_the_fit_of_all_rows():
    _, loss = linear(8)
    start = jnp.zeros((2, 3, 4))
    order = jnp.tile(jnp.arange(8), (6, 1))
    wanted = pave.fit(loss, start, jnp.arange(8), order, settings=SETTINGS).change
    found = privacy.private_fit(
        jax.random.key(0), loss, start, jnp.arange(8), settings=SETTINGS, bound=1e6, noise=0.0
    ).change
    assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_and_noised_by_the_sensitivity(monkeypatch):
    """One step of plain gradient descent shows the private gradient itself."""
    monkeypatch.setattr(privacy, "optimiser", lambda settings: optax.sgd(1.0))
    privacy.private_fit.clear_cache()
    gradients, loss = linear(4, scale=100.0)
    start = jnp.zeros((2, 3, 4))
    settings = SETTINGS._replace(steps=1, batch=4, pull=0.0)

    def change(key, noise):
        return privacy.private_fit(
            key, loss, start, jnp.arange(4), settings=settings, bound=0.5, noise=noise
        ).change

    each = gradients / 2
    norms = np.sqrt((each**2).sum((1, 2, 3), keepdims=True))
    clipped = (each * 0.5 / norms).mean(0)
    assert_allclose(change(jax.random.key(0), 0.0), -clipped, rtol=1e-5)
    noise = np.stack([change(jax.random.key(i), 1.5) + clipped for i in range(300)]).ravel()
    # Of the sum: 1.5 times its sensitivity, twice the bound; of the mean of 4 a quarter.
    assert stats.kstest(noise / (1.5 * 2 * 0.5 / 4), "norm").pvalue > 1e-3
    privacy.private_fit.clear_cache()


def test_a_gradient_that_is_not_finite_counts_as_zero(monkeypatch):
    """Alone it would show in every number of the fit."""
    monkeypatch.setattr(privacy, "optimiser", lambda settings: optax.sgd(1.0))
    privacy.private_fit.clear_cache()
    gradients, _ = linear(4)
    gradients[2, 0, 0, 0] = np.inf
    loss = pave.linear_loss(jnp.asarray(gradients), np.ones(4, np.float32))
    settings = SETTINGS._replace(steps=1, batch=4, pull=0.0)
    found = privacy.private_fit(
        *(jax.random.key(0), loss, jnp.zeros((2, 3, 4)), jnp.arange(4)),
        settings=settings,
        bound=1e6,
        noise=0.0,
    ).change
    assert_allclose(found, -gradients[[0, 1, 3]].sum(0) / 4, rtol=1e-5)
    privacy.private_fit.clear_cache()


def test_noise_and_batches_have_keys_of_their_own(monkeypatch):
    seen = {}
    true = optax.contrib.differentially_private_aggregate
    monkeypatch.setattr(
        optax.contrib,
        "differentially_private_aggregate",
        lambda bound, noise, key: seen.setdefault("noise", key) is None or true(bound, noise, key),
    )
    choice = jax.random.choice
    monkeypatch.setattr(
        jax.random,
        "choice",
        lambda key, *a, **k: seen.setdefault("batch", key) is None or choice(key, *a, **k),
    )
    split = jax.random.split
    parents = []
    monkeypatch.setattr(jax.random, "split", lambda key, *a: parents.append(key) or split(key, *a))
    privacy.private_fit.clear_cache()
    _, loss = linear(4)
    with jax.disable_jit():
        privacy.private_fit(
            *(jax.random.key(0), loss, jnp.zeros((2, 3, 4)), jnp.arange(4)),
            settings=SETTINGS._replace(steps=1, batch=2),
            bound=1.0,
            noise=1.0,
        )
    data = [tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()) for key in parents]
    # The given key, the noise's and the batches' are split once each.
    assert len(set(data)) == len(data)
    privacy.private_fit.clear_cache()


# ---- attacks


def test_nearest_rows_and_copies_by_hand():
    x = np.array([[0.0, 1.0], [3.0, 0.0], [0.0, -2.0]])
    z = np.array([[0.0, 0.9], [3.0, 1e-5], [0.0, -2.0], [2.9, 0.0]])
    place, gap = privacy.nearest_rows(z, x)
    assert_array_equal(place, [0, 1, 2, 1])
    assert_allclose(gap, [0.1, 1e-5, 0, 0.1], atol=1e-7)
    assert_array_equal(privacy.copies(z, x), [1, 2])


def test_small_distances_keep_their_digits():
    x = np.array([[1000.0, 0.0]], np.float32)
    z = np.array([[1000.0, 1e-3]], np.float32)
    assert_allclose(privacy.nearest_rows(z, x)[1], 1e-3, rtol=1e-6)


def shadow_means(seed, n, d, count):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * n, d)) * np.linspace(0.2, 3, d)
    member = np.stack([rng.permutation(2 * n) < n for _ in range(count)])
    return rows, member, member @ rows / n


def test_tracing_scores_are_the_formula():
    rows, _, views = shadow_means(0, 6, 3, 5)
    known = np.random.default_rng(9).standard_normal((20, 3)) + 1
    inverse = np.linalg.inv(np.cov(known.T, bias=True) + 0.7 * known.var(0).mean() * np.eye(3))
    found = privacy.tracing_scores(views, rows, known, ridge=0.7)
    for s in range(5):
        for i in range(12):
            wanted = (rows[i] - known.mean(0)) @ inverse @ (views[s] - views.mean(0))
            assert_allclose(found[s, i], wanted, rtol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 100), (200, 20), (1000, 10)])
def test_tracing_finds_in_a_mean_what_theory_says(n, d):
    """Whitened, a member's score is larger by d / n than another's, with a variance of d / n times
    the share that the pool leaves: half the rows of a pool of 2 n are in every mean."""
    rows, member, views = shadow_means(1, n, d, 40)
    scores = privacy.tracing_scores(views, rows, rows, ridge=1e-9)
    # Of a pool of N = 2 n rows with a whitened Gram trace of N d, half drawn without replacement.
    score = privacy.calibrated(scores, member)
    found = privacy.leakage(jax.random.key(0), score, member, draws=20).auc[0]
    gap = np.mean([s[m].mean() - s[~m].mean() for s, m in zip(scores, member, strict=True)])
    assert_allclose(gap, d / n * (2 * n / (2 * n - 1)), rtol=0.1)
    spread = np.mean([s[~m].std() for s, m in zip(scores, member, strict=True)])
    assert_allclose(found, stats.norm.cdf(gap / spread / 2**0.5), atol=0.03)


def test_calibration_leaves_the_specification_itself_out():
    rng = np.random.default_rng(3)
    scores, member = rng.standard_normal((9, 5)) * 3 + 7, rng.random((9, 5)) < 0.5
    found = privacy.calibrated(scores, member)
    means, variances = np.empty((9, 5)), np.empty((9, 5))
    for s in range(9):
        for i in range(5):
            others = [scores[t, i] for t in range(9) if t != s and not member[t, i]]
            means[s, i], variances[s, i] = np.mean(others), np.var(others, ddof=1)
    wanted = (scores - means) / np.sqrt((variances + variances.mean()) / 2)
    assert_allclose(found, wanted, rtol=1e-8)


def test_leakage_is_scikit_learns_auc_and_a_share_by_hand():
    rng = np.random.default_rng(4)
    member = np.stack([rng.permutation(200) < 100 for _ in range(12)])
    scores = rng.standard_normal((12, 200)).round(1) + 0.8 * member
    found = privacy.leakage(jax.random.key(0), scores, member)
    aucs = [roc_auc_score(m, s) for s, m in zip(scores, member, strict=True)]
    assert_allclose(found.auc[0], np.mean(aucs), rtol=1e-12)
    assert found.auc[1] < found.auc[0] < found.auc[2]
    # At most a hundredth of 1,200 others lie above the threshold.
    others = np.sort(scores[~member])
    above = [t for t in np.unique(others) if (others > t).sum() <= 12]
    assert_allclose(found.tpr[0], (scores[member] > above[0]).mean(), rtol=1e-12)
    assert found.tpr[1] <= found.tpr[0] <= found.tpr[2]


def test_scores_that_know_nothing_are_at_chance():
    rng = np.random.default_rng(5)
    member = np.stack([rng.permutation(400) < 200 for _ in range(20)])
    found = privacy.leakage(jax.random.key(0), rng.standard_normal((20, 400)), member)
    assert found.auc[1] < 0.5 < found.auc[2] and found.auc[2] - found.auc[1] < 0.06
    assert found.tpr[0] < 0.02


def test_a_reduced_set_of_rows_is_found_out_and_a_private_one_is_not():
    """The same attack on both: random rows give themselves away, epsilon 0.3 keeps its bound."""
    rng = np.random.default_rng(6)
    pool, public_rows = unit_rows(7, 120), unit_rows(8, 300)
    public = privacy.make_public(jax.random.key(0), public_rows, KERNEL, count=64, width=16)
    member = np.stack([rng.permutation(120) < 60 for _ in range(40)])
    aucs = []
    for private in (False, True):
        specs = []
        for i, m in enumerate(member):
            x = pool[m]
            if private:
                key = jax.random.key(i)
                specs.append(privacy.private_rkme(key, x, public, 12, epsilon=0.3, delta=DELTA)[0])
            else:
                specs.append(RKME(x[rng.choice(60, 12, replace=False)], np.full(12, 1 / 12)))
        scores = -np.stack([privacy.nearest_rows(pool, spec.z)[1] for spec in specs])
        score = privacy.calibrated(scores, member)
        aucs.append(privacy.leakage(jax.random.key(0), score, member).auc)
    assert aucs[0][1] > 0.55
    # Only 12 of 60 rows show: an attack on random rows cannot do better than this.
    assert aucs[0][2] < 0.5 + 0.5 * 12 / 60 + 0.03
    assert aucs[1][1] < privacy.leakage_bound(0.3, DELTA)[0]
