"""What a ranking by specifications has to beat: baselines of selection behind one signature.

`BASELINES[name].score(user, dock)` is one float64 number a learnware, higher is closer. What a
baseline reads and how many forward passes of a language model it costs stand beside it: most
compare embedded rows with reduced sets and run no model, some run every model of the dock.

Every one raises ValueError for a missing field that it needs, before any work; for a user without
rows, rows or specifications that `check_rows` and `check_rkme` refuse, different dimensions, and
fields that disagree in length; and where a dock's outputs have other shapes or are not finite.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from learnware_jax.specification.rkme import RKME, check_rkme, check_rows, from_rows

PROJECTIONS = 128  # of sliced_wasserstein
FOLDS = 3  # of proxy_a, at most
NOISE_FLOOR = 1e-6  # of logme: labels 0 and 1 are not known better than to 0.001


class User(NamedTuple):
    """What somebody with a task has: n rows."""

    texts: Sequence[str]
    x: Float[np.ndarray, "n d"]  # the texts, embedded
    answers: Sequence[str] | None  # where the rows have answers: labels, as words
    fisher: Float[np.ndarray, " p"] | None  # diagonal of the reference model's Fisher information


class Outputs(NamedTuple):
    """What the M models of a dock say of a user's n rows."""

    likelihood: Float[np.ndarray, "M n"]  # log p_h(answer | text), nats
    own: Sequence[Float[np.ndarray, "n z"]]  # probabilities of its own labels; z may differ
    features: Float[np.ndarray, "M n f"]  # the last hidden state at the end of the prompt


class Dock(NamedTuple):
    """What a dock of M learnwares shows of them."""

    cards: Sequence[str]  # text of each semantic specification
    specs: Sequence[RKME]  # in the space of User.x, weights on the simplex
    fisher: Float[np.ndarray, "M p"] | None
    run: Callable[[User], Outputs] | None  # runs every model; keep its result for several baselines


class Baseline(NamedTuple):
    """A method of selection, what it reads, and what it costs."""

    score: Callable[[User, Dock], Float[np.ndarray, " M"]]  # higher is closer
    needs: tuple[str, ...]  # "user.FIELD" and "dock.FIELD"
    forward_passes: Callable[[int, int], int]  # (M, n) -> passes of a language model over a row


BASELINES: dict[str, Baseline] = {}


def _check(name, needs, user, dock):
    given = {f"user.{field}": value for field, value in user._asdict().items()}
    given |= {f"dock.{field}": value for field, value in dock._asdict().items()}
    missing = [need for need in needs if given[need] is None]
    if missing:
        raise ValueError(f"{name}: needs {' and '.join(needs)}; got None for {missing}.")
    x = check_rows(user.x, where=f"{name}: user.x")
    of_user = {"texts": user.texts, "x": x, "answers": user.answers}
    of_dock = {"cards": dock.cards, "specs": dock.specs, "fisher": dock.fisher}
    for what, fields in (("user", of_user), ("dock", of_dock)):
        lengths = {key: len(value) for key, value in fields.items() if value is not None}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"{name}: got {what} of lengths {lengths}; want one, at least 1.")
    for i, spec in enumerate(dock.specs):
        check_rkme(spec, where=f"{name}: dock.specs[{i}]")
        if np.shape(spec.z)[1] != x.shape[1]:
            raise ValueError(
                f"{name}: user.x has dimension {x.shape[1]}, dock.specs[{i}] "
                f"{np.shape(spec.z)[1]}; embed both with one encoder."
            )


def _baseline(name, *needs, forward_passes=lambda learnwares, rows: 0):
    """Enter a function into BASELINES, with its arguments checked first."""

    def register(function):
        @wraps(function)
        def score(user, dock):
            _check(name, needs, user, dock)
            return function(user, dock)

        BASELINES[name] = Baseline(score, needs, forward_passes)
        return score

    return register


def _points(spec):
    """Points and weights in float64, the weights' sum exactly one."""
    beta = np.asarray(spec.beta, np.float64)
    return np.asarray(spec.z, np.float64), beta / beta.sum()


# ---- specifications only


def mean_cosine(users: Sequence[RKME], learnwares: Sequence[RKME]) -> Float[np.ndarray, "q M"]:
    """Cosine of mean embeddings, centred by the mean over the learnwares; higher is closer.

    The linear kernel's ranking, up to norms: on topics of sentence embeddings it is hard to beat.
    A mean that coincides with the centre has no direction; its cosines are 0.
    """

    def means(specs):
        return np.stack([np.asarray(s.beta, np.float64) @ np.asarray(s.z) for s in specs])

    pool = means(learnwares)
    center = pool.mean(0)
    rounding = 1e-12 * np.abs(pool).max()

    def directions(rows):
        rows = rows - center
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > rounding, norms, np.inf)

    return directions(means(users)) @ directions(pool).T


@_baseline("mean_cosine", "user.x", "dock.specs")
def _mean_cosine(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    return mean_cosine([from_rows(user.x)], dock.specs)[0]


@_baseline("centroid", "user.x", "dock.specs")
def centroid(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """The fraction of the user's rows whose nearest centroid is the learnware's; 0 to 1, sum 1.

    A centroid is the weighted mean of the points. Learnwares equally near share a row.
    """
    x = np.asarray(user.x, np.float64)
    centroids = np.stack([beta @ z for z, beta in map(_points, dock.specs)])
    squares = np.stack([((x - c) ** 2).sum(1) for c in centroids], axis=1)
    nearest = squares == squares.min(1, keepdims=True)
    return (nearest / nearest.sum(1, keepdims=True)).mean(0)


def _directions(d):
    directions = np.random.default_rng(0).standard_normal((d, PROJECTIONS))
    return directions / np.linalg.norm(directions, axis=0)


@_baseline("sliced_wasserstein", "user.x", "dock.specs")
def sliced_wasserstein(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """Minus the mean over 128 fixed random directions of W2^2 of the projections; at most 0.

    Bonneel et al., J. Math. Imaging Vis. 51 (2015). Squared, without the factor d that would make
    a shift by v count |v|^2.
    """
    n, d = user.x.shape
    directions = _directions(d)
    center = np.asarray(user.x, np.float64).mean(0)
    x = np.sort((user.x - center) @ directions, axis=0)
    # Integrals of the user's quantile function from 0 to i/n: between them they are linear, so
    # that no quantiles have to be merged.
    area = np.concatenate([np.zeros((1, PROJECTIONS)), x.cumsum(0) / n])

    def distance(z, beta):
        z = (z - center) @ directions
        order = z.argsort(0)
        levels = np.minimum(beta[order].cumsum(0), 1.0) * n
        below = np.minimum(levels.astype(np.int64), n - 1)
        slope = np.take_along_axis(x, below, 0) / n
        integral = np.take_along_axis(area, below, 0) + (levels - below) * slope
        pieces = np.diff(integral, axis=0, prepend=0.0)
        cross = (np.take_along_axis(z, order, 0) * pieces).sum(0)
        return ((x**2).mean(0) + beta @ z**2 - 2 * cross).mean()

    return np.array([-distance(*_points(spec)) for spec in dock.specs])


def _factor(z, beta):
    """Mean m and A (rows, d) with covariance A' A, weights of rows beta."""
    mean = beta @ z
    return mean, np.sqrt(beta)[:, None] * (z - mean)


@_baseline("frechet", "user.x", "dock.specs")
def frechet(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """Minus |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): W2^2 of two Gaussians; at most 0.

    Dowson and Landau, J. Multivar. Anal. 12 (1982); Heusel et al. 2017 (FID). Covariances are
    those of the weighted points (1/n for the user's rows), of any rank: with S = A' A the trace of
    the root is the sum of singular values of A1 A2'. Rounding may make the distance negative.
    """
    mean, factor = _factor(*_points(from_rows(user.x)))

    def distance(m, a):
        root = np.linalg.svd(factor @ a.T, compute_uv=False).sum()
        return ((mean - m) ** 2).sum() + (factor**2).sum() + (a**2).sum() - 2 * root

    return np.array([-distance(*_factor(*_points(spec))) for spec in dock.specs])


def _distances(x, y):
    """|x_i - y_j|; what rounding cannot tell from zero is zero."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    t = squares - 2 * x @ y.T
    return np.sqrt(np.where(t > 4 * np.finfo(np.float64).eps * squares, t, 0.0))


@_baseline("energy", "user.x", "dock.specs")
def energy(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """Minus 2 E|X - Y| - E|X - X'| - E|Y - Y'|, the energy distance; at most 0.

    Szekely and Rizzo, J. Stat. Plan. Inference 143 (2013). The V-statistic (pairs i = i count),
    Euclidean norms, weights of the points. Rounding may make the distance negative.
    """
    x = np.asarray(user.x, np.float64)
    center = x.mean(0)
    x = x - center
    within = _distances(x, x).mean()

    def distance(z, beta):
        z = z - center
        across = (_distances(x, z) @ beta).mean()
        return 2 * across - within - beta @ _distances(z, z) @ beta

    return np.array([-distance(*_points(spec)) for spec in dock.specs])


def _folds(rows, folds):
    """A fold for every row, by its content: the order in which rows were given does not matter."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].tobytes())
    fold = np.empty(len(rows), np.int64)
    fold[order] = np.arange(len(rows)) % folds
    return np.array(order), fold


@_baseline("proxy_a", "user.x", "dock.specs")
def proxy_a(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """Minus the proxy A-distance 2 (1 - 2 err) of a classifier of domains; -2 to 2, chance is 0.

    Ben-David et al., NeurIPS 2006. The classifier is scikit-learn's logistic regression (C = 1) of
    rows against points; both domains weigh the same, points by their weights. err is the mean of
    the two domains' errors on held-out folds: min(3, n, points) of them, each with its share of
    both domains, or on the training rows where that is 1. From few rows err takes few values:
    with n = 2 expect ties.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.asarray(user.x, np.float64)

    def error(z, beta):
        z, beta = z[beta > 0], beta[beta > 0]
        folds = min(FOLDS, len(rows), len(z))
        # One order of the training rows: the solver's rounding and stopping depend on it.
        (order_x, fold_x), (order_z, fold_z) = _folds(rows, folds), _folds(z, folds)
        x = np.concatenate([rows[order_x], z[order_z]])
        weight = np.concatenate([np.full(len(rows), 1 / len(rows)), beta[order_z]])
        fold = np.concatenate([fold_x[order_x], fold_z[order_z]])
        domain = np.repeat([0, 1], [len(rows), len(z)])
        wrong = 0.0
        for held in range(folds):
            test = fold == held
            train = ~test if folds > 1 else test
            # Both domains weigh half, and all rows as many as they are, which C refers to.
            mass = np.array([weight[train & (domain == i)].sum() for i in (0, 1)])
            sample_weight = weight[train] / mass[domain[train]] * train.sum() / 2
            model = LogisticRegression(max_iter=1000)
            model.fit(x[train], domain[train], sample_weight=sample_weight)
            wrong += weight[test] @ (model.predict(x[test]) != domain[test])
        return wrong / 2

    return np.array([-2 * (1 - 2 * error(*_points(spec))) for spec in dock.specs])


@_baseline("bm25", "user.texts", "dock.cards")
def bm25(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """BM25 of the user's words against the learnwares' cards; any sign, mostly above 0.

    Robertson et al., TREC-3 (1994), as rank_bm25's BM25Okapi has it: k1 = 1.5, b = 0.75, and a
    word of more than half of the cards has a quarter of the mean inverse document frequency. Words
    are runs of letters, digits and underscores, in lower case; the query is all words of all
    texts, a repeated one counted again. With one or two cards it says nothing. ValueError where no
    card has a word.
    """
    from rank_bm25 import BM25Okapi

    def words(text):
        return re.findall(r"\w+", text.lower())

    cards = [words(card) for card in dock.cards]
    if not any(cards):
        raise ValueError("bm25: no word in any of dock.cards; write what the learnwares are for.")
    index = BM25Okapi(cards)
    query = Counter(word for text in user.texts for word in words(text))
    total = np.zeros(len(cards))
    for word in sorted(query.keys() & index.idf.keys()):
        total += query[word] * index.get_scores([word])
    return total


# ---- the reference model, run on the user's rows


@_baseline("task2vec", "user.fisher", "dock.fisher", forward_passes=lambda learnwares, rows: rows)
def task2vec(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """cos(F_u / (F_u + F_h), F_u and F_h diagonals of Fisher informations: 0 to 1.

    The symmetric distance of Achille et al., ICCV 2019 (Task2Vec), without the 1e-8 that their
    program adds to the denominators: entries may be smaller than that. A parameter that neither
    task informs counts 0 in both; tasks that share none have 0. Costs the reference model's pass
    (and gradient) over every row of the user. ValueError for entries that are negative or not
    finite, or lengths that differ.
    """
    mine, docked = np.asarray(user.fisher, np.float64), np.asarray(dock.fisher, np.float64)
    if mine.ndim != 1 or docked.shape[1:] != mine.shape:
        raise ValueError(
            f"task2vec: got user.fisher of shape {mine.shape} and dock.fisher {docked.shape}; "
            "want (p,) and (M, p) of one reference model."
        )
    for name, fisher in (("user", mine), ("dock", docked)):
        if not (np.isfinite(fisher).all() and (fisher >= 0).all()):
            raise ValueError(f"task2vec: {name}.fisher must be finite and not negative.")

    def cosine(theirs):
        total = mine + theirs
        total[total == 0] = 1.0
        a, b = mine / total, theirs / total
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return a @ b / norms if norms > 0 else 0.0

    return np.array([cosine(theirs) for theirs in docked])


# ---- every model of the dock, run on the user's rows


def _every_model(learnwares, rows):
    return learnwares * rows


def _outputs(name, user, dock, field):
    """`field` of what the dock's models say of the rows: an array of float64 a learnware."""
    arrays = [np.asarray(a, np.float64) for a in getattr(dock.run(user), field)]
    dimensions = 1 if field == "likelihood" else 2
    shapes = [a.shape for a in arrays]
    if len(arrays) != len(dock.specs) or any(
        len(shape) != dimensions or shape[0] != len(user.x) or 0 in shape for shape in shapes
    ):
        raise ValueError(
            f"{name}: got {field} of shapes {shapes} for {len(dock.specs)} learnwares and "
            f"{len(user.x)} rows; want {dimensions} dimension(s), the first of them rows."
        )
    bad = [i for i, a in enumerate(arrays) if not np.isfinite(a).all()]
    if bad:
        raise ValueError(f"{name}: {field} of learnwares {bad} holds NaN or infinity.")
    return arrays


@_baseline("loss", "user.answers", "dock.run", forward_passes=_every_model)
def loss(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """The mean over rows of log p_h(answer | text): minus the loss, in nats. Near an oracle."""
    return np.array([a.mean() for a in _outputs("loss", user, dock, "likelihood")])


@_baseline("leep", "user.answers", "dock.run", forward_passes=_every_model)
def leep(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """(1/n) sum_i log sum_z P(y_i | z) theta_h(x_i)_z in nats: at most 0.

    Nguyen et al., ICML 2020 (LEEP). theta_h are the model's probabilities of its own labels z, and
    P(y | z) is proportional to the sum of theta_h(x_i)_z over the same rows with y_i = y.
    ValueError where probabilities are negative or do not sum to one (to 1e-3).
    """
    labels, y = np.unique(np.asarray(user.answers), return_inverse=True)
    one_hot = np.eye(len(labels))[y]

    def score(h, theta):
        if theta.min() < 0 or np.abs(theta.sum(1) - 1).max() > 1e-3:
            raise ValueError(f"leep: own[{h}] must hold probabilities, rows that sum to one.")
        joint = theta.T @ one_hot
        mass = joint.sum(1, keepdims=True)
        conditional = joint / np.where(mass > 0, mass, 1.0)
        return np.log(((theta @ conditional) * one_hot).sum(1)).mean()

    return np.array([score(*pair) for pair in enumerate(_outputs("leep", user, dock, "own"))])


def _evidence(features, y):
    """log p(y_k | F), nats, of every column k of y (n, K), at its best alpha and beta.

    y = F w + e, w ~ N(0, 1/alpha), e ~ N(0, 1/beta): y ~ N(0, (1/beta) (F F' / ratio + 1)) with
    ratio = alpha / beta. The best beta for a ratio has a closed form, which leaves one dimension
    to search; the fixed point of the paper may stop at a lower maximum.
    """
    n = len(y)
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    squares, along = s**2, (u.T @ y).T ** 2
    # From the residual itself: a difference of squares would leave rounding where y is in range.
    across = ((y - u @ (u.T @ y)) ** 2).sum(0)

    def evidence(log_ratio):
        shrink = 1 / (1 + squares / np.exp(log_ratio)[..., None])
        q = (along[:, None] * shrink).sum(-1) + across[:, None]
        noise = np.maximum(q / n, NOISE_FLOOR)
        return (np.log(shrink).sum(-1) - n * np.log(2 * np.pi * noise) - q / noise) / 2

    columns = np.arange(y.shape[1])
    # From noise-free to nothing but noise, fine enough to see every maximum; then closer to it.
    top = np.log(squares[0]) if squares[0] > 0 else 0.0
    grid, step = np.tile(top + np.linspace(-40, 15, 111), (len(columns), 1)), 0.5
    for _ in range(8):
        value = evidence(grid)
        best = grid[columns, value.argmax(1)]
        grid, step = best[:, None] + step * np.linspace(-1, 1, 9), step / 4
    return evidence(grid).max(1)


@_baseline("logme", "user.answers", "dock.run", forward_passes=_every_model)
def logme(user: User, dock: Dock) -> Float[np.ndarray, " M"]:
    """max over alpha, beta of log p(y | F, alpha, beta) / n, meaned over labels; nats, any sign.

    You et al., ICML 2021 (LogME): Bayesian linear regression of a 0/1 column a label on the
    model's features F, not centred. The noise variance 1/beta is at least 1e-6: without a bound
    the evidence is infinite where rows and answers repeat.
    """
    labels, y = np.unique(np.asarray(user.answers), return_inverse=True)
    one_hot = np.eye(len(labels))[y]
    features = _outputs("logme", user, dock, "features")
    return np.array([_evidence(f, one_hot).mean() / len(y) for f in features])
