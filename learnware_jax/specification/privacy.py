"""What a specification gives away of its rows: private releases, and attacks that measure the rest.

Releases are (epsilon, delta)-differentially private for neighbours that differ in one row, replaced
by any other; the number of rows is the same for both, all rows are finite, and bounds and features
are public. The Gaussian mechanism is calibrated exactly (Balle and Wang, arXiv 1805.06530,
theorem 8), for real numbers: attacks on floating-point noise (Mironov, CCS 2012) and on the
generator behind it are not defended. Whatever is computed from a release, a reduced set or a fit,
is as private as it is. Several releases of the same rows add up, and nobody counts them.

Attacks ask whether a row was among those of a specification, given other specifications made in the
same way of rows that the attacker knows (shadow models: Shokri et al., arXiv 1610.05820; calibrated
row by row as in Carlini et al., arXiv 2112.03570; tracing from a mean: Dwork et al., FOCS 2015).
They bound what is given away from below; a release's epsilon bounds it from above.
"""

import functools
import math
import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import ArrayLike, Bool, Float, Int, PRNGKeyArray
from scipy import optimize, special, stats

from learnware_jax.specification.kernels import Kernel, matmul
from learnware_jax.specification.pave import Fit, Loss, Settings, Tree, optimiser, pull_to
from learnware_jax.specification.rkme import RKME, check_rows
from learnware_jax.specification.simplex import interior_point
from learnware_jax.specification.sketch import Landmarks, choose_landmarks, project

# Points nearer than this to a row, on the scale of its length, are that row.
COPY = 1e-4
# Orders of Renyi divergences: small ones decide at large epsilon, large ones at small.
_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Release(NamedTuple):
    """A noised mean of rows."""

    mean: Float[np.ndarray, " D"]
    noise: float  # standard deviation of every coordinate's noise


class Leakage(NamedTuple):
    """How well an attack tells members from others, with the ends of intervals."""

    auc: tuple[float, float, float]  # value, lower, upper; 0.5 is chance
    tpr: tuple[float, float, float]  # true positives at the stated rate of false ones


# ---- releases


def secret_key() -> PRNGKeyArray:
    """A key of 128 bits of the system's entropy, for one private release and written nowhere.

    Noise of a key that others can guess hides nothing.
    """
    bits = np.frombuffer(secrets.token_bytes(16), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(bits), impl="rbg")


def gaussian_delta(noise: float, epsilon: float) -> float:
    """The least delta at which Gaussian noise is (epsilon, delta)-private; `noise` is its standard
    deviation over the L2 sensitivity (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    half = 1 / (2 * noise)
    away = np.exp(epsilon + special.log_ndtr(-half - epsilon * noise))
    return float(special.ndtr(half - epsilon * noise) - away)


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The least `noise` for which `gaussian_delta` is at most `delta`; 0 for an infinite epsilon.

    ValueError for epsilon not positive, or delta not between 0 and 1.
    """
    if not epsilon > 0 or not 0 < delta < 1:
        raise ValueError(
            f"gaussian_noise: got epsilon={epsilon}, delta={delta}; want epsilon above 0 (inf for "
            "no noise) and delta between 0 and 1, well below 1 / rows."
        )
    if math.isinf(epsilon):
        return 0.0
    low = high = 1.0
    while gaussian_delta(low, epsilon) <= delta:
        low /= 2
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    root = optimize.brentq(
        lambda noise: gaussian_delta(noise, epsilon) - delta, low, high, xtol=1e-12, rtol=1e-12
    )
    return root * (1 + 1e-9)  # on the private side of the root


def clip(rows: Float[ArrayLike, "n D"], bound: float) -> Float[np.ndarray, "n D"]:
    """The rows, those longer than `bound` (L2) shortened to it."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1, bound / np.maximum(norms, np.finfo(np.float64).tiny))


def release_mean(
    key: PRNGKeyArray,
    rows: Float[ArrayLike, "n D"],
    *,
    bound: float,
    epsilon: float,
    delta: float,
) -> Release:
    """The mean of the clipped rows with Gaussian noise: (epsilon, delta)-private when one row is
    replaced, which moves it by at most 2 bound / n.

    `bound` must not come from the rows, and `key` must be secret (see `secret_key`). ValueError for
    a bound that is not positive, and as in `gaussian_noise` and `check_rows`.
    """
    if not 0 < bound < np.inf:
        raise ValueError(f"release_mean: got bound={bound}; want a positive length.")
    rows = check_rows(rows, where="release_mean")
    noise = 2 * bound / len(rows) * gaussian_noise(epsilon, delta)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    mean = clip(rows, bound).mean(0)
    return Release(mean + noise * rng.standard_normal(len(mean)), noise)


@functools.partial(jax.jit, static_argnames="count")
def _fully_corrective(target, candidates, count):
    def step(state, slot):
        chosen, beta = state
        left = target - beta @ candidates[chosen]
        chosen = chosen.at[slot].set(jnp.argmax(candidates @ left))
        points = candidates[chosen]
        mask = jnp.arange(count) <= slot
        # Twelve of its steps leave a gap of rounding; every choice is corrected by the next ones.
        beta = interior_point(points @ points.T, points @ target, iterations=12, mask=mask).beta
        return (chosen, beta), None

    start = jnp.zeros(count, int), jnp.zeros(count, candidates.dtype)
    return jax.lax.scan(step, start, jnp.arange(count))[0]


def fit_weights(
    target: Float[ArrayLike, " D"], candidates: Float[ArrayLike, "c D"], count: int
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """At most `count` of the candidates, by place, and weights on the simplex for which the mean of
    their features is near `target`: fully corrective Frank-Wolfe, a QP over the chosen a step.

    Candidates that are public rows give a reduced set of nothing but public rows. ValueError for a
    count below 1 or other lengths of target and candidates.
    """
    candidates = check_rows(candidates, where="fit_weights: candidates")
    target = np.asarray(target, np.float64)
    if count < 1 or target.shape != candidates.shape[1:]:
        raise ValueError(
            f"fit_weights: got count={count}, a target {target.shape} and candidates "
            f"{candidates.shape}; want at least 1 and one length of features."
        )
    with jax.enable_x64(True):
        wide = jnp.asarray(candidates, jnp.float64)
        chosen, beta = map(np.asarray, _fully_corrective(jnp.asarray(target), wide, count))
    places, slots = np.unique(chosen, return_inverse=True)
    weights = np.bincount(slots, beta)
    kept = weights > 0
    return places[kept], weights[kept] / weights.sum()


class Public(NamedTuple):
    """What everybody knows: rows, landmarks among them, and what the rows are in these."""

    rows: Float[np.ndarray, "c d"]
    landmarks: Landmarks
    kernel: Kernel
    features: Float[np.ndarray, "c s"]
    bound: float  # the length of the longest of the features


def landmark_features(
    landmarks: Landmarks, kernel: Kernel, x: Float[ArrayLike, "n d"]
) -> Float[np.ndarray, "n s"]:
    """Every row's k(x, .) less the landmarks' mean, projected on the landmarks."""
    x = np.asarray(x, np.float32)[:, None]
    return project(landmarks, kernel, x, np.ones(x.shape[:2])).coordinates


def make_public(
    key: PRNGKeyArray,
    rows: Float[ArrayLike, "c d"],
    kernel: Kernel,
    *,
    count: int = 512,
    width: int = 256,
) -> Public:
    """`width` functions on `count` of these public rows, in which private embeddings are released.

    `kernel` must be public too: no
    bandwidth taken from private rows.
    """
    rows = np.asarray(check_rows(rows, where="make_public"), np.float32)
    ones = np.ones((len(rows), 1))
    landmarks = choose_landmarks(key, rows[:, None], ones, kernel, count=count, width=width)
    features = landmark_features(landmarks, kernel, rows)
    bound = float(np.linalg.norm(features, axis=1).max())
    return Public(rows, landmarks, kernel, features, bound)


def private_rkme(
    key: PRNGKeyArray,
    x: Float[ArrayLike, "n d"],
    public: Public,
    m: int,
    *,
    epsilon: float,
    delta: float,
) -> tuple[RKME, Release]:
    """An (epsilon, delta)-private RKME of at most m points, all of them public rows, and the
    release that it was fitted to.

    The rows' features are clipped to the longest public one. `key` must be secret; errors are those
    of `release_mean` and `fit_weights`.
    """
    x = check_rows(x, where="private_rkme")
    release = release_mean(
        key,
        landmark_features(public.landmarks, public.kernel, x),
        bound=public.bound,
        epsilon=epsilon,
        delta=delta,
    )
    places, beta = fit_weights(release.mean, public.features, m)
    return RKME(public.rows[places], beta), release


def statement(release: Release, *, epsilon: float, delta: float, features: str) -> dict[str, Any]:
    """What a header says, as `about["privacy"]`, of a specification fitted to a release: it says
    neither the number of rows nor a residual. `features` names what was averaged.

    The noise's deviation is rounded up to a power of two: the exact one, 2 bound / n times what
    epsilon and delta say, would tell n.
    """
    return {
        "mechanism": "gaussian",
        "neighbours": "replace one row",
        "epsilon": epsilon,
        "delta": delta,
        "features": features,
        "dimension": len(release.mean),
        "noise": 2.0 ** math.ceil(math.log2(release.noise)),
        "covers": "the specification alone",
    }


# ---- private fits of parameter vectors


def fit_noise(epsilon: float, delta: float, *, n: int, batch: int, steps: int) -> float:
    """The noise of `private_fit`, over its sensitivity, at which all steps together are
    (epsilon, delta)-private; 0 for an infinite epsilon.

    With every row in every step the steps are one Gaussian mechanism, and the noise is exact.
    Smaller batches, drawn without replacement, are accounted for by Renyi divergences (Wang, Balle
    and Kasiviswanathan, arXiv 1808.00087) with the package dp_accounting: half a minute.

    ValueError for a batch that is not 1 to n, for an epsilon that this accounting does not reach,
    and as in `gaussian_noise`; ModuleNotFoundError without the package (the extra "privacy").
    """
    if not 1 <= batch <= n or steps < 1:
        raise ValueError(
            f"fit_noise: got n={n}, batch={batch}, steps={steps}; want 1 <= batch <= n and a step."
        )
    whole = gaussian_noise(epsilon, delta) * math.sqrt(steps)
    if batch == n or whole == 0:
        return whole
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fit_noise: batches need the package dp_accounting; pip install "
            '"learnware_jax[privacy]", or use batch = n, which needs none.'
        ) from error
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE

    def event(noise):
        one = dp_accounting.SampledWithoutReplacementDpEvent(
            n, batch, dp_accounting.GaussianDpEvent(noise)
        )
        return dp_accounting.SelfComposedDpEvent(one, steps)

    def accountant():
        return RdpAccountant(_ORDERS, neighboring_relation=relation)

    if accountant().compose(event(1.5 * whole)).get_epsilon(delta) > epsilon:
        raise ValueError(
            f"fit_noise: Renyi accounting of batches of {batch} does not reach epsilon={epsilon} "
            f"at delta={delta}; use batch = n, or a greater epsilon or delta."
        )
    interval = dp_accounting.ExplicitBracketInterval(0.2 * whole * batch / n, 1.5 * whole)
    return dp_accounting.calibrate_dp_mechanism(
        accountant, event, epsilon, delta, interval, tol=1e-3 * whole
    )


@functools.partial(jax.jit, static_argnames="settings")
def private_fit(
    key: PRNGKeyArray,
    loss: Loss,
    start: Tree,
    rows: Tree,
    *,
    settings: Settings,
    bound: Float[ArrayLike, ""],
    noise: Float[ArrayLike, ""],
) -> Fit:
    """`pave.fit` by DP-SGD (Abadi et al., arXiv 1607.00133): every row's gradient of its mean loss
    is clipped to `bound`, and the mean over a batch gets Gaussian noise.

    Every step draws its batch without replacement from all rows. `noise` is the standard deviation
    of the sum's noise over its sensitivity 2 bound, from `fit_noise`. The pull to the start and
    AdamW see the noised mean alone. A gradient that is not finite counts as zero. `key` must be
    secret. The losses of the fit are those of its batches and are not private.
    """
    n = len(jax.tree.leaves(rows)[0])
    noise_key, batch_key = jax.random.split(key)
    private = optax.contrib.differentially_private_aggregate(bound, 2 * noise, key=noise_key)
    update = optimiser(settings)

    def mean_loss(params, row):
        summed, weight = loss(params, jax.tree.map(lambda leaf: leaf[None], row))
        return summed / weight

    def step(carry, key):
        params, private_state, state = carry
        chosen = jax.random.choice(key, n, (settings.batch,), replace=False)
        batch = jax.tree.map(lambda leaf: leaf[chosen], rows)
        losses, each = jax.vmap(jax.value_and_grad(mean_loss), (None, 0))(params, batch)
        # All of a row's gradient, or clipping would see another length than it has.
        finite = jax.vmap(_all_finite)(each)
        each = jax.tree.map(lambda g: jnp.where(_along(finite, g), g, 0), each)
        gradient, private_state = private.update(each, private_state)
        pull = jax.grad(pull_to)(params, start)
        gradient = jax.tree.map(lambda g, p: g + settings.pull * p, gradient, pull)
        change, state = update.update(gradient, state, params)
        return (optax.apply_updates(params, change), private_state, state), losses.mean()

    carry = start, private.init(start), update.init(start)
    keys = jax.random.split(batch_key, settings.steps)
    (params, _, _), losses = jax.lax.scan(step, carry, keys)
    return Fit(jax.tree.map(jnp.subtract, params, start), losses)


def _all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _along(flags, leaf):
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))


# ---- attacks


@jax.jit
def _nearest(z, x):
    t = (z * z).sum(1)[:, None] - 2 * matmul(z, x.T) + (x * x).sum(1)
    return jnp.argmin(t, 1), jnp.min(t, 1)


def nearest_rows(
    z: Float[ArrayLike, "m d"], x: Float[ArrayLike, "n d"]
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """For every point of z the place of the nearest row of x, and its distance."""
    x = np.asarray(x, np.float32)
    place = np.asarray(_nearest(jnp.asarray(z, jnp.float32), jnp.asarray(x))[0])
    # Small distances again, without cancellation.
    gap = np.asarray(z, np.float64) - x[place]
    return place, np.linalg.norm(gap, axis=1)


def copies(z: Float[ArrayLike, "m d"], x: Float[ArrayLike, "n d"]) -> Int[np.ndarray, " c"]:
    """The places of the points of z that are rows of x, to within a ten-thousandth of their
    length."""
    place, gap = nearest_rows(z, x)
    return np.flatnonzero(gap <= COPY * np.linalg.norm(np.asarray(x)[place], axis=1))


def tracing_scores(
    views: Float[np.ndarray, "S D"],
    rows: Float[np.ndarray, "N D"],
    known: Float[np.ndarray, "K D"],
    *,
    ridge: float,
) -> Float[np.ndarray, "S N"]:
    """How much every specification leans towards every row.

    The score is <r_i - r, (C + ridge t I)^-1 (v_s - v)>, with r and C the mean and the covariance
    of rows that the attacker knows, t the mean of C's diagonal, v the mean of the views.

    `views` are what the specifications say of the mean of their rows, in the coordinates of `rows`.
    With ridge -> infinity it is the witness function; a small ridge counts every direction by how
    much a mean of rows spreads along it. Attackers who know all candidates find members by solving
    for them, where there are no more candidates than coordinates.
    """
    center = known.mean(0)
    rows, known = rows - center, known - center
    covariance = known.T @ known / len(known)
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.solve(covariance, (views - views.mean(0)).T).T @ rows.T


def calibrated(
    scores: Float[np.ndarray, "S N"], member: Bool[np.ndarray, "S N"]
) -> Float[np.ndarray, "S N"]:
    """Scores less their mean over the other specifications that do not hold the row, over the
    standard deviation of these: one threshold then serves all rows. At least 8 specifications."""
    out = ~member
    count, total = out.sum(0) - out, (scores * out).sum(0) - scores * out
    square = (scores**2 * out).sum(0) - scores**2 * out
    mean = total / np.maximum(count, 1)
    variance = (square / np.maximum(count, 1) - mean**2) * count / np.maximum(count - 1, 1)
    # Few specifications say little of one row's spread: half of it is that of all rows.
    variance = np.maximum(variance, 0)
    return (scores - mean) / np.sqrt((variance + variance.mean()) / 2 + 1e-300)


def _auc(positive, negative):
    """The chance that a member's score is the higher one; ties count half."""
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    p, q = len(positive), len(negative)
    return (ranks[:p].sum() - p * (p + 1) / 2) / (p * q)


def leakage(
    key: PRNGKeyArray,
    scores: Float[np.ndarray, "S N"],
    member: Bool[np.ndarray, "S N"],
    *,
    false_positives: float = 0.01,
    level: float = 0.95,
    draws: int = 1000,
) -> Leakage:
    """The AUC of scores as a test of membership, and its true positives at a rate of false ones.

    The AUC is that of the rows of one specification, averaged over specifications, with Student's
    interval; that of the true positives has the percentiles over `draws` bootstrap samples of
    specifications. Both are for these rows: other rows are not drawn.
    """
    aucs = np.array([_auc(s[m], s[~m]) for s, m in zip(scores, member, strict=True)])
    count = len(scores)
    half = stats.t.ppf((1 + level) / 2, count - 1) * aucs.std(ddof=1) / math.sqrt(count)

    def true_positives(chosen):
        s, m = scores[chosen], member[chosen]
        threshold = np.quantile(s[~m], 1 - false_positives, method="higher")
        return (s[m] > threshold).mean()

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    resampled = [true_positives(rng.choice(count, count)) for _ in range(draws)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    auc, tpr = aucs.mean(), true_positives(np.arange(count))
    return Leakage(
        (float(auc), max(float(auc - half), 0.0), min(float(auc + half), 1.0)),
        (float(tpr), float(low), float(high)),
    )


def leakage_bound(
    epsilon: float, delta: float, *, false_positives: float = 0.01
) -> tuple[float, float]:
    """The greatest AUC and true positive rate, as `leakage` has them, of any attack on a Gaussian
    release with the least noise for (epsilon, delta).

    Its trade-off curve is that of two unit Gaussians mu = 1 / noise apart (Dong, Roth and Su, arXiv
    1905.02383). A member and another row of one specification change places by one replacement, so
    the AUC is the accuracy of telling the two Gaussians apart: Phi(mu / 2).
    """
    noise = gaussian_noise(epsilon, delta)
    if noise == 0:
        return 1.0, 1.0
    auc = stats.norm.cdf(1 / noise / 2)
    tpr = stats.norm.cdf(stats.norm.ppf(false_positives) + 1 / noise)
    return float(auc), float(tpr)
