"""Baselines: numbers by hand, dense oracles, and what holds for every one of them."""

import itertools
import re

import numpy as np
import oracle
import ot
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import sqrtm
from scipy.optimize import minimize
from sklearn import linear_model

from learnware_jax.selection import baselines
from learnware_jax.selection.baselines import BASELINES, Dock, Outputs, User, mean_cosine
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows


def points(*rows):
    return np.array(rows, np.float32)


def test_cosines_are_centred_by_the_pool_and_weighted():
    # Means (2, 0) and (0, 2); their centre is (1, 1), their directions (1, -1) and (-1, 1).
    learnwares = [
        RKME(points([4, 0], [0, 0]), np.array([0.5, 0.5])),
        RKME(points([0, 1], [0, 5]), np.array([0.75, 0.25])),
    ]
    users = [from_rows(points([2, 0])), from_rows(points([2, 1])), from_rows(points([3, 3]))]
    cosines = mean_cosine(users, learnwares)
    assert_allclose(cosines, [[1, -1], [np.sqrt(0.5), -np.sqrt(0.5)], [0, 0]], atol=1e-12)


def test_a_mean_at_the_centre_has_cosine_zero():
    """A sum of equal numbers, divided, is not always the number: what is left is no direction."""
    rng = np.random.default_rng(0)
    same = RKME(oracle.unit_rows(rng, 10, 8), rng.dirichlet(np.ones(10)))
    mean = same.beta @ same.z
    assert (np.stack([mean] * 7).mean(0) != mean).any()
    assert_array_equal(mean_cosine([same, from_rows(points([1] * 8))], [same] * 7), 0)
    assert_array_equal(mean_cosine([same], [from_rows(points([0] * 8))]), 0)


def test_scale_and_place_do_not_matter_and_order_follows():
    rng = np.random.default_rng(0)
    specs = [RKME(oracle.unit_rows(rng, 10, 8), rng.dirichlet(np.ones(10))) for _ in range(9)]
    cosines = mean_cosine(specs[:3], specs[3:])
    moved = [RKME(3 * spec.z + 2, spec.beta) for spec in specs]
    assert_allclose(mean_cosine(moved[:3], moved[3:]), cosines, atol=2e-6)
    assert_allclose(mean_cosine(specs[2:0:-1], specs[3:]), cosines[2:0:-1], atol=1e-14)
    assert_allclose(np.diag(mean_cosine(specs, specs)), 1)


def test_where_means_agree_and_spreads_differ_only_the_kernel_tells():
    """Three tasks around one mean, told apart by their spread: a hit by means is luck (1 in 3)."""
    scales = np.repeat([0.5, 1.0, 2.0], 12)
    rng = np.random.default_rng(0)

    def task(scale):
        return from_rows((scale * rng.standard_normal((200, 4))).astype(np.float32))

    learnwares, users = [task(scale) for scale in scales[::12]], [task(scale) for scale in scales]
    pool = build_pool(learnwares, Gaussian(0.25), ids="abc", n=[200] * 3, residual=[0.0] * 3)
    by_kernel = distances(users, pool, n=[200] * len(users)).argmin(1)
    by_mean = mean_cosine(users, learnwares).argmax(1)
    wanted = np.repeat(range(3), 12)
    assert_array_equal(by_kernel, wanted)
    assert (by_mean == wanted).mean() < 0.6


WORDS = ("bank loan rate", "heart drug dose", "sum prime root", "film actor plot")
EMBEDDING = ("mean_cosine", "centroid", "sliced_wasserstein", "frechet", "energy", "proxy_a")


def ask(x, *specs, answers=None, outputs=None):
    """A user with rows x and a dock of specifications (points, weights), and nothing else."""
    x = np.asarray(x, np.float64)
    user = User(["text"] * len(x), x, answers, None)
    docked = [RKME(np.asarray(z, np.float64), np.asarray(beta, np.float64)) for z, beta in specs]
    return user, Dock(["card"] * len(specs), docked, None, outputs and (lambda user: outputs))


def answered(answers, **field):
    """A user with answers and a dock whose models say `field`."""
    (values,) = field.values()
    specs = [([[0.0]], [1.0])] * len(values)
    outputs = Outputs(**{name: field.get(name, []) for name in Outputs._fields})
    return ask(np.zeros((len(answers), 1)), *specs, answers=answers, outputs=outputs)


def toy(learnwares=range(4), rows=range(12)):
    """Four well separated tasks; the user has rows, words and answers of task 2."""
    rng = np.random.default_rng(0)
    tasks = 5 * np.eye(4, 6)[:, None] + rng.standard_normal((4, 12, 6))
    fisher = np.exp(rng.standard_normal((4, 30)))
    directions = rng.standard_normal((4, 6, 3))
    learnwares, rows = np.array(learnwares), np.array(rows)

    def run(user):
        """Model 2 knows the answers; what others say has nothing to do with them."""
        truth = np.array([answer == "yes" for answer in user.answers], np.float64)
        noise = 1 / (1 + np.exp(-np.einsum("nd,hdf->hnf", user.x, directions)))
        right = np.where(np.arange(4) == 2, 0.9, 0.5)[:, None]
        yes = np.where(np.arange(4)[:, None] == 2, 0.05 + 0.9 * truth, noise[..., 0])
        features = noise.copy()
        features[2, :, 0] = truth
        return Outputs(
            likelihood=np.log(right + 0.05 * noise[..., 0])[learnwares],
            own=[np.stack([p, 1 - p], axis=1) for p in yes[learnwares]],
            features=features[learnwares],
        )

    answers = ["yes" if i in (0, 3, 4, 7, 8, 9) else "no" for i in rows]
    texts = [f"A {WORDS[2].split()[i % 3].upper()} of the {i}" for i in rows]
    user = User(texts, tasks[2, rows], answers, fisher[2] * 1.01)
    cards = [f"Answers: {words}; of the." for words in WORDS]
    return user, Dock(
        cards=[cards[h] for h in learnwares],
        specs=[RKME(tasks[h], np.full(12, 1 / 12)) for h in learnwares],
        fisher=fisher[learnwares],
        run=run,
    )


# ---- every baseline


@pytest.mark.parametrize("name", BASELINES)
def test_the_users_own_learnware_is_first(name):
    scores = BASELINES[name].score(*toy())
    assert scores.shape == (4,) and scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert scores[2] > np.delete(scores, 2).max() + 1e-6


@pytest.mark.parametrize("name", BASELINES)
def test_order_does_not_matter(name):
    """Of the learnwares: scores move with them. Of the user's rows: nothing changes."""
    scores = BASELINES[name].score(*toy())
    order = [3, 0, 2, 1]
    assert_allclose(BASELINES[name].score(*toy(order)), scores[order], rtol=0, atol=1e-9)
    shuffled = toy(rows=np.random.default_rng(1).permutation(12))
    assert_allclose(BASELINES[name].score(*shuffled), scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows_give_finite_scores(name, n):
    user, dock = toy(rows=range(n))
    twice = user._replace(x=np.repeat(user.x[:1], n, axis=0))
    for one in (user, twice):
        assert np.isfinite(BASELINES[name].score(one, dock)).all()


@pytest.mark.parametrize("name", EMBEDDING)
def test_a_point_without_weight_is_no_point(name):
    user, dock = toy()
    padded = [
        RKME(np.concatenate([z, z[:3] + 7]), np.concatenate([beta, np.zeros(3)]))
        for z, beta in dock.specs
    ]
    scores = BASELINES[name].score(user, dock)
    assert_allclose(BASELINES[name].score(user, dock._replace(specs=padded)), scores, atol=1e-9)


@pytest.mark.parametrize("name", EMBEDDING)
def test_float32_far_from_the_origin_is_as_good(name):
    user, dock = toy()
    far = user._replace(x=(user.x + 100).astype(np.float32))
    specs = [RKME((z + 100).astype(np.float32), beta.astype(np.float32)) for z, beta in dock.specs]
    scores = BASELINES[name].score(user, dock)
    assert_allclose(BASELINES[name].score(far, dock._replace(specs=specs)), scores, atol=1e-3)


def test_forward_passes():
    embedding = dict.fromkeys((*EMBEDDING, "bm25"), 0)
    every = dict.fromkeys(("loss", "leep", "logme"), 14 * 64)
    passes = {name: baseline.forward_passes(14, 64) for name, baseline in BASELINES.items()}
    assert passes == embedding | every | {"task2vec": 64}


OPTIONAL = {"user": ("answers", "fisher"), "dock": ("fisher", "run")}


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_needed_is_asked_for_before_any_work_and_nothing_else_is(name):
    user, dock = toy()
    for source, fields in OPTIONAL.items():
        for field in fields:
            without = {"user": user, "dock": dock}
            without[source] = without[source]._replace(**{field: None})
            needed = f"{source}.{field}" in BASELINES[name].needs
            if not needed:
                assert np.isfinite(BASELINES[name].score(**without)).all()
                continue
            if field != "run":
                without["dock"] = without["dock"]._replace(run=lambda user: pytest.fail("it ran"))
            with pytest.raises(ValueError, match=rf"^{name}: needs .*None for .*{source}.{field}"):
                BASELINES[name].score(**without)


NAN = np.full((12, 6), np.nan)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("of_user", "of_dock", "message"),
    [
        (dict(x=NAN), {}, r"user.x: 12 of 12 rows hold NaN"),
        (dict(x=NAN[:0], texts=[], answers=[]), {}, r"user.x: got shape \(0, 6\)"),
        (dict(x=np.zeros((12, 5))), {}, r"user.x has dimension 5, dock.specs\[0\] 6"),
        (dict(texts=["one"]), {}, r"got user of lengths .*'texts': 1, 'x': 12"),
        (dict(answers=["yes"] * 11), {}, r"got user of lengths .*'answers': 11"),
        ({}, dict(specs=[]), r"got dock of lengths .*'specs': 0"),
        (
            {},
            dict(specs=[], cards=[], fisher=np.ones((0, 30))),
            r"got dock of lengths .*'specs': 0",
        ),
        ({}, dict(cards=["one"]), r"got dock of lengths .*'cards': 1"),
        ({}, dict(fisher=np.ones((3, 30))), r"got dock of lengths .*'fisher': 3"),
        ({}, dict(specs=[RKME(NAN, np.ones(12) / 12)] * 4), r"dock.specs\[0\]: z: 12 of 12"),
        (
            {},
            dict(specs=[RKME(np.zeros((12, 6)), np.ones(12))] * 4),
            r"weights must be non-negative",
        ),
    ],
)
def test_bad_users_and_docks_are_refused(name, of_user, of_dock, message):
    user, dock = toy()
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
        BASELINES[name].score(user._replace(**of_user), dock._replace(**of_dock))


# ---- specifications


def test_centroids_share_what_is_equally_near():
    # Centroids 1, 1 and 3: of rows 0, 1.5, 2 and 9 the third is as near to all.
    two = ([[0.0], [4.0]], [0.75, 0.25])
    scores = baselines.centroid(*ask([[0], [1.5], [2], [9]], two, two, ([[3.0]], [1.0])))
    third = 1 / 3
    assert_allclose(scores, np.array([1 + third, 1 + third, 4 / 3]) / 4, rtol=1e-14)


def test_sliced_wasserstein_in_one_dimension_is_exact():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 7, 1))
    quarter = ([[1.0], [0.0]], [0.75, 0.25])  # a quarter of the mass moves by 1
    assert_allclose(baselines.sliced_wasserstein(*ask([[0], [1]], quarter)), [-0.25], rtol=1e-14)
    exact = ((np.sort(x, 0) - np.sort(z, 0)) ** 2).mean()
    same = (x, np.full(7, 1 / 7))
    scores = baselines.sliced_wasserstein(*ask(x, (z, np.full(7, 1 / 7)), same))
    assert_allclose(scores, [-exact, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 9, 40])
def test_sliced_wasserstein_is_that_of_pot(n):
    rng = np.random.default_rng(n)
    x, z, beta = rng.standard_normal((n, 5)), 1 + rng.random((11, 5)), rng.dirichlet(np.ones(11))
    directions = baselines._directions(5)
    assert directions.shape == (5, 128)
    root = ot.sliced_wasserstein_distance(x, z, b=beta, projections=directions)
    assert_allclose(baselines.sliced_wasserstein(*ask(x, (z, beta))), [-(root**2)], rtol=1e-10)


def test_frechet_by_hand_and_through_the_matrix_root():
    # N(0, 1) and N(3, 4): 3^2 + (1 - 2)^2.
    half = ([[1.0], [5.0]], [0.5, 0.5])
    assert_allclose(baselines.frechet(*ask([[-1], [1]], half)), [-10], rtol=1e-14)
    rng = np.random.default_rng(0)
    x, z, beta = rng.standard_normal((20, 3)), rng.random((9, 3)), rng.dirichlet(np.ones(9))
    mean, theirs = x.mean(0), beta @ z
    s, t = np.cov(x.T, bias=True), np.cov(z.T, aweights=beta, bias=True)
    root = np.trace(sqrtm(s @ t)).real
    exact = ((mean - theirs) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert_allclose(baselines.frechet(*ask(x, (z, beta))), [-exact], rtol=1e-10)


def test_frechet_keeps_its_digits_where_covariances_have_no_full_rank():
    """The same three rows in 50 dimensions: the distance is zero."""
    x = np.random.default_rng(0).standard_normal((3, 50))
    assert_allclose(baselines.frechet(*ask(x, (x, np.full(3, 1 / 3)))), [0], atol=1e-12)


def test_energy_by_hand_and_by_loops():
    # 2 x 1/2 - 0 - 1/2
    half = ([[0.0], [1.0]], [0.5, 0.5])
    assert_allclose(baselines.energy(*ask([[0]], half)), [-0.5], rtol=1e-14)
    rng = np.random.default_rng(0)
    x, z, beta = rng.standard_normal((8, 3)), rng.random((5, 3)), rng.dirichlet(np.ones(5))
    across = within = theirs = 0.0
    for a in x:
        across += sum(w * np.linalg.norm(a - b) for w, b in zip(beta, z, strict=True)) / 8
        within += sum(np.linalg.norm(a - b) for b in x) / 64
    for w, a in zip(beta, z, strict=True):
        theirs += sum(w * v * np.linalg.norm(a - b) for v, b in zip(beta, z, strict=True))
    exact = 2 * across - within - theirs
    assert_allclose(baselines.energy(*ask(x, (z, beta))), [-exact], rtol=1e-12)
    assert_allclose(baselines.energy(*ask(x + 1e3, (x + 1e3, np.full(8, 1 / 8)))), [0], atol=1e-9)


def test_proxy_a_by_hand():
    # One row: the training rows, told apart (err 0) or not (1/2).
    apart, same = ([[5.0]], [1.0]), ([[0.0]], [1.0])
    assert_allclose(baselines.proxy_a(*ask([[0]], apart, same)), [-2, 0], atol=1e-14)
    # Three folds. The point among the rows is taken for a row, the others are not: 0.3 / 2.
    points, weights = np.array([[10.0], [10.1], [0.1]]), np.array([0.5, 0.2, 0.3])
    orders = [(points[list(o)], weights[list(o)]) for o in itertools.permutations(range(3))]
    scores = baselines.proxy_a(*ask([[0], [0.1], [0.2]], *orders))
    assert_allclose(scores, [-2 * (1 - 0.3)] * 6, rtol=1e-12)
    # Two: a point is not found from the row and the point on the other side.
    sides = ([[10.0], [-10.0]], [0.9, 0.1])
    assert_allclose(baselines.proxy_a(*ask([[0], [1]], sides)), [0], atol=1e-12)


def test_proxy_a_weighs_both_domains_alike_and_points_by_their_weights():
    """At 10 there are twice as many rows as points, and they weigh less: taken for points."""
    x = np.repeat([[0.0], [10.0]], [12, 6], axis=0)
    docked = (np.repeat([[0.0], [10.0]], 3, axis=0), np.repeat([0.05, 0.85 / 3], 3))
    assert_allclose(baselines.proxy_a(*ask(x, docked)), [-2 * (1 - 1 / 3 - 0.15)], rtol=1e-12)


def test_proxy_a_gives_every_fold_its_share_of_both_domains(monkeypatch):
    seen = []

    class Recorder(linear_model.LogisticRegression):
        def fit(self, x, domain, sample_weight):
            seen.append(np.bincount(domain).tolist())
            return super().fit(x, domain, sample_weight)

    monkeypatch.setattr(linear_model, "LogisticRegression", Recorder)
    rng = np.random.default_rng(0)
    baselines.proxy_a(*ask(rng.random((7, 2)), (rng.random((5, 2)), np.full(5, 0.2))))
    assert seen == [[4, 3], [5, 3], [5, 4]]


def test_proxy_a_judges_rows_that_it_did_not_see():
    """24 rows of one distribution in 40 dimensions can be told apart, but not found again."""
    x, z = np.random.default_rng(0).standard_normal((2, 12, 40))
    assert baselines.proxy_a(*ask(x, (z, np.full(12, 1 / 12))))[0] > -1


# ---- cards


def test_bm25_by_hand():
    user, dock = toy()
    dock = dock._replace(
        cards=["cat, dog", "cat fish bird", "Sun!", "cat dog"], specs=dock.specs, fisher=None
    )
    user = user._replace(texts=["SUN", "the sun_ and a sun"] + [""] * 10)
    # Twice "sun", of one of four cards; its card has one word, the mean is two.
    frequency = np.log(3.5 / 1.5)
    expected = 2 * frequency * 2.5 / (1 + 1.5 * (0.25 + 0.75 / 2))
    assert_allclose(baselines.bm25(user, dock), [0, 0, expected, 0], rtol=1e-14)
    assert_array_equal(baselines.bm25(user._replace(texts=["no"] * 12), dock), 0)
    with pytest.raises(ValueError, match=r"bm25: no word in any of dock.cards"):
        baselines.bm25(user, dock._replace(cards=["", "-", " ", ""]))


# ---- the reference model


def test_task2vec_by_hand():
    user, dock = toy()
    fisher = np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    for scale in (1.0, 1e-12):
        one = user._replace(fisher=scale * np.array([1.0, 0.0]))
        scores = baselines.task2vec(one, dock._replace(fisher=scale * fisher))
        # (1/2, 0) and (1/2, 1); (1/4, 0) and (3/4, 0); (1, 0) and (0, 1); a vector of zeros.
        assert_allclose(scores, [1 / np.sqrt(5), 1, 0, 0], rtol=1e-14)


def test_task2vec_refuses_what_is_no_fisher_information():
    user, dock = toy()
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"task2vec: user.fisher must be finite and not neg"):
            baselines.task2vec(user._replace(fisher=np.full(30, value)), dock)
        with pytest.raises(ValueError, match=r"task2vec: dock.fisher must be finite and not neg"):
            baselines.task2vec(user, dock._replace(fisher=np.full((4, 30), value)))
    with pytest.raises(ValueError, match=re.escape("shape (29,) and dock.fisher (4, 30)")):
        baselines.task2vec(user._replace(fisher=np.ones(29)), dock)


# ---- models


def test_loss_is_the_mean_likelihood():
    likelihood = np.log([[0.5, 0.5], [0.25, 1.0]])
    assert_allclose(
        baselines.loss(*answered(["a", "b"], likelihood=likelihood)), [-np.log(2)] * 2, rtol=1e-14
    )


def test_leep_by_hand():
    theta = np.array([[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    # P(a | 1st) = 1, P(a | 2nd) = 0.5 / 2.5.
    expected = np.log([1, 0.5 + 0.5 * 0.2, 0.8, 0.8]).mean()
    # A label that the model never gives changes nothing; neither does one label split in two.
    unused = np.concatenate([theta, np.zeros((4, 1))], axis=1)
    split = np.stack([theta[:, 0], theta[:, 1] / 2, theta[:, 1] / 2], axis=1)
    scores = baselines.leep(*answered(["a", "a", "b", "b"], own=[theta, unused, split]))
    assert_allclose(scores, expected, rtol=1e-14)
    for bad in (1.01 * theta, theta + np.array([0.1, -0.1])):
        with pytest.raises(ValueError, match=r"leep: own\[1\] must hold probabilities"):
            baselines.leep(*answered(["a", "a", "b", "b"], own=[theta, bad]))


def best_evidence(features, y):
    """max over alpha and beta of the marginal density of y, written out."""

    def minus(logs):
        alpha, beta = np.exp(logs)
        covariance = features @ features.T / alpha + np.eye(len(y)) / beta
        determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
        return (determinant + y @ np.linalg.solve(covariance, y)) / 2

    starts = [(a, b) for a in (-4.0, 0.0, 5.0, 12.0) for b in (-1.0, 2.0, 8.0)]
    bounds = [(-8, 30), (-30, np.log(1e6))]
    found = [
        minimize(minus, start, method="Nelder-Mead", bounds=bounds, tol=1e-12) for start in starts
    ]
    return -min(result.fun for result in found)


@pytest.mark.parametrize(
    "features",
    [
        np.random.default_rng(0).standard_normal((12, 3)),
        np.random.default_rng(1).standard_normal((5, 9)),
        np.random.default_rng(2).standard_normal((2, 4)),
        # Rows that repeat, with the same answer: without noise the evidence has no bound.
        np.repeat(np.random.default_rng(3).standard_normal((2, 4)), 2, axis=0),
        np.zeros((3, 2)),
    ],
    ids=["long", "wide", "two", "repeated", "zero"],
)
def test_logme_is_the_best_evidence(features):
    answers = ["a", "a", "b", "b", *"cabacabac"][: len(features)]
    labels = sorted(set(answers))
    columns = [np.array([answer == label for answer in answers], float) for label in labels]
    expected = np.mean([best_evidence(features, y) for y in columns]) / len(features)
    score = baselines.logme(*answered(answers, features=features[None]))
    assert_allclose(score, [expected], rtol=1e-6)


def test_logme_of_features_that_tell_nothing_is_that_of_noise_alone():
    """y = (1, 0, 1, 0) and its complement: N(0, 1/2) of each entry is the best."""
    score = baselines.logme(*answered(["a", "b", "a", "b"], features=np.zeros((1, 4, 3))))
    assert_allclose(score, [-np.log(2 * np.pi * 0.5) / 2 - 0.5], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "field"), [("loss", "likelihood"), ("leep", "own"), ("logme", "features")]
)
def test_outputs_that_do_not_fit_are_refused(name, field):
    user, dock = toy()
    good = dock.run(user)
    value = np.asarray(getattr(good, field))
    broken = value.copy()
    broken[1, 0] = np.nan
    cases = {
        r"of shapes .* for 4 learnwares and 12 rows": [value[:3], value[:, :11], value[..., None]],
        rf"{field} of learnwares \[1\] holds NaN": [broken],
    }
    for message, values in cases.items():
        for bad in values:
            outputs = good._replace(**{field: bad})
            with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
                BASELINES[name].score(user, dock._replace(run=lambda user, o=outputs: o))
