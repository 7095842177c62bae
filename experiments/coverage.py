"""How often intervals, sets of the best and thresholds keep what they promise.

Example: python -m experiments.coverage --config=configs/coverage.py
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("coverage")

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats
from scipy.special import gammaln, logsumexp

from experiments.build import tasks_of
from experiments.common import (
    embed_texts,
    kernel_of,
    named,
    open_encoder,
    reducer_options,
    say,
    space_of,
    write_json,
)
from learnware_jax import figures
from learnware_jax.dock.tasks import load_task
from learnware_jax.selection.bootstrap import interval, resampled
from learnware_jax.selection.decision import calibrate_threshold
from learnware_jax.selection.interval import intervals, undominated
from learnware_jax.selection.pool import Pool, build_pool
from learnware_jax.selection.ranking import distances, rank
from learnware_jax.specification.kernels import Gaussian, Kernel, mean_embedding
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME, from_rows

RELATIONS = ("equal", "near", "far")


class Normals(NamedTuple):
    """A mixture of normal laws that share the covariance scale^2 I."""

    weights: np.ndarray  # (c,), sum to one
    means: np.ndarray  # (c, d)
    scale: float


class Sphere(NamedTuple):
    """The law of von Mises and Fisher: a density proportional to exp(concentration mean.x)."""

    mean: np.ndarray  # (d,), of unit norm
    concentration: float


class Family(NamedTuple):
    """A user's law, and laws of learnwares at three distances from it."""

    gamma: float
    user: Normals | Sphere
    learnwares: dict[str, Normals | Sphere]  # by relation


def draw(rng: np.random.Generator, law: Normals | Sphere, count: int) -> np.ndarray:
    """Independent rows of a law, (count, d) float32."""
    if isinstance(law, Normals):
        chosen = rng.choice(len(law.weights), size=count, p=law.weights)
        noise = rng.standard_normal((count, law.means.shape[1]))
        return (law.means[chosen] + law.scale * noise).astype(np.float32)
    d = len(law.mean)
    # The cosine to the mean by its distribution function on a grid; all else is uniform.
    grid = np.linspace(-1, 1, 100_001)[1:-1]
    log = law.concentration * grid + (d - 3) / 2 * np.log1p(-(grid**2))
    mass = np.cumsum(np.exp(log - log.max()))
    cosine = np.interp(rng.random(count), mass / mass[-1], grid)
    noise = rng.standard_normal((count, d))
    noise -= (noise @ law.mean)[:, None] * law.mean
    noise *= (np.sqrt(1 - cosine**2) / np.linalg.norm(noise, axis=1))[:, None]
    return (cosine[:, None] * law.mean + noise).astype(np.float32)


def _log_bessel(order, t, d):
    """log of (t / 2)^(1 - d / 2) I_{d / 2 - 1 + order}(t), by its power series."""
    k = np.arange(int(2 * t) + 50)[:, None]
    terms = (2 * k + order) * np.log(t / 2) - gammaln(k + 1) - gammaln(d / 2 + order + k)
    return logsumexp(terms, axis=0)


def true_squared_mmd(p: Normals | Sphere, q: Normals | Sphere, gamma: float) -> float:
    """Squared MMD under exp(-gamma |x - y|^2) between two laws of one kind, without sampling.

    Normal laws: sums of Gaussian integrals. On the sphere: a series of zonal harmonics, by the
    formula of Funk and Hecke; d >= 3.
    """
    if isinstance(p, Normals):
        weights = np.concatenate([p.weights, -q.weights])
        means = np.concatenate([p.means, q.means])
        scale = np.repeat([p.scale, q.scale], [len(p.weights), len(q.weights)])
        v = 1 + 2 * gamma * (scale[:, None] ** 2 + scale**2)
        t = ((means[:, None] - means) ** 2).sum(-1)
        return float(weights @ (v ** (-means.shape[1] / 2) * np.exp(-gamma * t / v)) @ weights)
    d, orders = len(p.mean), np.arange(1, 50)
    # Mean of every zonal harmonic around the law's own mean, and the kernel's coefficients.
    a, b = (
        np.exp(_log_bessel(orders, law.concentration, d) - _log_bessel(0, law.concentration, d))
        for law in (p, q)
    )
    kernel = np.exp(_log_bessel(orders, 2 * gamma, d) + gammaln(d / 2) - 2 * gamma)
    count = np.exp(
        np.log(2 * orders + d - 2)
        - np.log(orders)
        + (gammaln(orders + d - 2) - gammaln(orders) - gammaln(d - 1))
    )
    cosine = p.mean @ q.mean
    zonal = [1.0, cosine]
    for order in orders[:-1]:
        last = (2 * order + d - 2) * cosine * zonal[-1] - order * zonal[-2]
        zonal.append(last / (order + d - 2))
    return float((count * kernel * (a**2 + b**2 - 2 * a * b * np.array(zonal[1:]))).sum())


def families() -> dict[str, Family]:
    """Normal laws and mixtures, and laws on the sphere of sentence embeddings."""
    rng, one = np.random.default_rng(1), np.ones(1)
    plane, space = np.eye(2), np.eye(384)
    w, centres, others = np.array([0.5, 0.3, 0.2]), *rng.standard_normal((2, 3, 8))

    def at(mean, scale=1.0):
        return Normals(one, mean[None], scale)

    def towards(cosine, concentration):
        mean = cosine * space[0] + np.sqrt(1 - cosine**2) * space[1]
        return Sphere(mean, concentration)

    def family(gamma, *laws):
        return Family(gamma, laws[0], dict(zip(RELATIONS, laws, strict=True)))

    small = 384**-0.5
    return {
        "normal, d = 2": family(0.5, at(0 * plane[0]), at(0.4 * plane[0]), at(2 * plane[0])),
        "mixture, d = 8": family(
            0.1,
            Normals(w, centres, 0.7),
            Normals(np.array([0.3, 0.3, 0.4]), centres, 0.7),
            Normals(w, others, 0.7),
        ),
        "normal, d = 384": family(
            0.5, at(0 * space[0], small), at(0.2 * space[0], small), at(space[0], small)
        ),
        "sphere, d = 384": family(
            0.1, Sphere(space[0], 200.0), towards(0.9, 200.0), towards(0.3, 100.0)
        ),
    }


def check(config: ConfigDict) -> None:
    """ValueError for a level that is no rate, and tasks that there are none of."""
    if not 0 < config.level < 1:
        raise ValueError(f"coverage: got level={config.level}; want a number between 0 and 1.")
    tasks_of([*config.real.tasks, *config.abstention.tasks])


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    return {
        "laws": named(config.simulated.laws),
        "tasks": named([task.name for task in tasks_of(config.real.tasks)]),
        "next": "select --config=configs/select.py:quickstart",
    }


def run(config: ConfigDict) -> dict:
    """Measure all three; returns what it writes to workdir/results.json."""
    check(config)
    # Samples of fewer rows than points are meant here, and need no line each.
    logging.getLogger("learnware_jax.specification.reduce").setLevel(logging.WARNING)
    workdir = Path(config.workdir)
    encoder = open_encoder(config.specification)
    space = space_of(encoder, config.specification)

    def embedded(names, count):
        tasks = {task.name: task for task in tasks_of(names)}
        say(f"Coverage: embedding {len(tasks)} tasks, at most {count} texts each.")
        return {
            name: embed_texts(encoder, load_task(name, count), space, keep=True) for name in tasks
        }

    populations = embedded(config.real.tasks, config.real.texts)
    catalogue = embedded(config.abstention.tasks, config.abstention.texts)
    kernel = kernel_of(
        config.specification.kernel, config.seed, np.concatenate([*catalogue.values()])
    )
    measured, best = simulated_intervals(config), simulated_best(config)
    real_intervals, real_best = real_tasks(config, populations, kernel)
    output = {
        "level": config.level,
        "intervals": measured + real_intervals,
        "best": best + real_best,
        "abstention": abstention(config, catalogue, kernel),
    }
    write_json(workdir / "results.json", output)
    drawn = figures.curves(
        panels(output["intervals"]),
        x_label="rows of the user",
        y_label="coverage",
        line=config.level,
    )
    figures.save(drawn, workdir / "coverage")
    report = "\n".join(tables(output))
    (workdir / "report.md").write_text(report, encoding="utf-8")
    print(report)
    print(f"figure  {workdir / 'coverage.png'}\ndata    {workdir / 'results.json'}")
    return output


class Specified(NamedTuple):
    """Rows as a specification: whole, or compressed as a dock does."""

    spec: RKME
    n: int
    residual: float


def _pool(learnwares: Sequence[Specified], kernel: Kernel) -> Pool:
    return build_pool(
        [learnware.spec for learnware in learnwares],
        kernel,
        ids=[str(i) for i in range(len(learnwares))],
        n=[learnware.n for learnware in learnwares],
        residual=[learnware.residual for learnware in learnwares],
    )


def _whole(samples: Sequence[np.ndarray]) -> list[Specified]:
    return [Specified(from_rows(x), len(x), 0.0) for x in samples]


def _reduced(seed: int, samples: Sequence[np.ndarray], kernel: Kernel, settings) -> list[Specified]:
    made = reduce_many(
        jax.random.key(seed), samples, settings.points, kernel, **reducer_options(settings)
    )
    return [Specified(r.spec, r.n, r.residual) for r in made]


def _coverage(user: Specified, pool: Pool, truth: np.ndarray, level: float) -> np.ndarray:
    """For every learnware of the pool, a row: whether the interval covers the truth, whether its
    sampling part alone does, and the widths of both.
    """
    index = np.arange(len(pool.ids))
    distance = distances([user.spec], pool, n=[user.n])[0]

    def measured(pool, residual):
        lower, upper = intervals(
            user.spec, pool, distance, index, n=user.n, residual=residual, level=level
        )
        return (lower <= truth) & (truth <= upper), upper - lower

    covered, width = measured(pool, user.residual)
    if not pool.residual.any():
        return np.stack([covered, covered, width, width], 1)
    alone, narrow = measured(pool._replace(residual=np.zeros_like(pool.residual)), 0.0)
    return np.stack([covered, alone, width, narrow], 1)


def _interval_rows(cells: dict[tuple, list[np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for (law, specification, relation, n, learnware_n, truth), outcomes in cells.items():
        covered, alone, width, narrow = np.mean(outcomes, 0)
        rows.append(
            {
                "law": law,
                "specification": specification,
                "relation": relation,
                "n": n,
                "learnware_n": learnware_n,
                "squared_mmd": truth,
                "replicates": len(outcomes),
                "coverage": float(covered),
                "coverage_interval": _proportion(covered, len(outcomes)),
                "sampling_coverage": float(alone),
                "width": float(width),
                "sampling_width": float(narrow),
            }
        )
    return rows


def _proportion(share: float, count: int) -> list[float]:
    """95% interval of Clopper and Pearson, for independent replicates."""
    found = stats.binomtest(round(share * count), count).proportion_ci(0.95)
    return [float(found.low), float(found.high)]


def simulated_intervals(config: ConfigDict) -> list[dict[str, Any]]:
    """Coverage for laws whose squared MMD is known: whole samples, and reduced sets of some laws.

    The samples of one replicate are nested: those of fewer rows are the first of the longest.
    """
    cells = defaultdict(list)
    settings = config.simulated
    for law in settings.laws:
        family = families()[law]
        say(f"Coverage: {law}.")
        kernel, rng = Gaussian(family.gamma), np.random.default_rng(config.seed)
        for specification, replicates in (
            ("whole", dict(settings.whole)),
            ("reduced", dict(settings.reduced) if law in settings.reduced_laws else {}),
        ):
            sizes = settings.learnware_rows
            pairs = [(relation, size) for relation in RELATIONS for size in sizes]
            truth = np.array(
                [
                    true_squared_mmd(family.user, family.learnwares[relation], family.gamma)
                    for relation, _ in pairs
                ]
            )
            for replicate in range(max(replicates.values(), default=0)):
                counts = [n for n, wanted in replicates.items() if replicate < wanted]
                x = draw(rng, family.user, max(counts))
                y = {r: draw(rng, family.learnwares[r], max(sizes)) for r in RELATIONS}
                samples = [x[:n] for n in counts] + [y[r][:size] for r, size in pairs]
                if specification == "whole":
                    made = _whole(samples)
                else:
                    made = _reduced(replicate, samples, kernel, config.specification)
                users, learnwares = made[: len(counts)], made[len(counts) :]
                pool = _pool(learnwares, kernel)
                for user in users:
                    outcome = _coverage(user, pool, truth, config.level)
                    for (relation, size), value, row in zip(pairs, truth, outcome, strict=True):
                        key = (law, specification, relation, user.n, size, float(value))
                        cells[key].append(row)
    return _interval_rows(cells)


def scenes(learnwares: int) -> dict[str, tuple[Sequence[Normals], list[int]]]:
    """Laws of a dock for a standard normal user in 8 dimensions, and which are the closest."""
    rng = np.random.default_rng(5)
    directions = rng.standard_normal((learnwares, 8))
    directions /= np.linalg.norm(directions, axis=1)[:, None]

    def dock(lengths):
        return [
            Normals(np.ones(1), c * v[None], 1.0) for c, v in zip(lengths, directions, strict=True)
        ]

    everyone = list(range(learnwares))
    return {
        "all are the user's law": (dock(np.zeros(learnwares)), everyone),
        "all equally far": (dock(np.full(learnwares, 0.5)), everyone),
        "two equally close": (dock([0.3, 0.3, *[0.6] * (learnwares - 2)]), [0, 1]),
        "one after another": (dock(0.1 * np.arange(1, learnwares + 1)), [0]),
    }


_embeddings = jax.jit(jax.vmap(mean_embedding, in_axes=(None, None, 0, 0)))


def unadjusted(
    user: Specified, pool: Pool, distance: np.ndarray, index: np.ndarray, level: float
) -> np.ndarray:
    """What `undominated` is compared with: one-sided tests against the first, each at `level`, of
    the user's rows alone, as if the first had not been chosen and embeddings were laws'.
    """
    weights = np.asarray(user.spec.beta, np.float64)
    u = np.asarray(user.spec.z, np.float32) - pool.center
    beta = np.asarray(pool.beta[index], np.float32)
    embeddings = np.asarray(_embeddings(pool.kernel, u, pool.z[index], beta), np.float64)
    contrast = 2 * (embeddings[0] - embeddings)
    variance = (contrast - (contrast @ weights)[:, None]) ** 2 @ weights
    margin = stats.t.ppf(level, user.n - 1) * np.sqrt(variance / (user.n - 1))
    return distance - distance[0] <= margin


def _set_outcome(user: Specified, pool: Pool, closest: Sequence[int], level: float) -> list[float]:
    """Whether the first of the truly closest is left out, whether any is, and the set's size; then
    the same for `unadjusted`.
    """
    found = rank([user.spec], pool, n=[user.n])
    index, distance = found.index[0], found.distance[0]
    outcome = []
    for kept in (
        undominated(user.spec, pool, distance, index, n=user.n, level=level),
        unadjusted(user, pool, distance, index, level),
    ):
        inside = set(index[kept])
        outcome += [closest[0] not in inside, not inside.issuperset(closest), len(inside)]
    return outcome


def _set_rows(cells: dict[tuple, list[list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for (scene, specification, n), outcomes in cells.items():
        excluded, any_excluded, size, *other = np.mean(np.array(outcomes, float), 0)
        rows.append(
            {
                "scene": scene,
                "specification": specification,
                "n": n,
                "replicates": len(outcomes),
                "excluded": float(excluded),
                "excluded_interval": _proportion(excluded, len(outcomes)),
                "any_excluded": float(any_excluded),
                "size": float(size),
                "unadjusted_excluded": float(other[0]),
                "unadjusted_any_excluded": float(other[1]),
                "unadjusted_size": float(other[2]),
            }
        )
    return rows


def simulated_best(config: ConfigDict) -> list[dict[str, Any]]:
    """How often the truly closest is left out of a set of the best, for docks of known laws."""
    settings, kernel = config.best, Gaussian(0.1)
    cells = defaultdict(list)
    for scene, (laws, closest) in scenes(settings.learnwares).items():
        say(f"Sets of the best: {scene}.")
        rng = np.random.default_rng(config.seed)
        for _ in range(settings.replicates):
            # Learnwares of few and of many rows in turn.
            sizes = np.resize(settings.learnware_rows, len(laws))
            docked = [draw(rng, law, size) for law, size in zip(laws, sizes, strict=True)]
            pool = _pool(_whole(docked), kernel)
            x = rng.standard_normal((max(settings.rows), 8)).astype(np.float32)
            for user in _whole([x[:n] for n in settings.rows]):
                cells[scene, "whole", user.n].append(
                    _set_outcome(user, pool, closest, config.level)
                )
    return _set_rows(cells)


def population_distances(populations: Sequence[np.ndarray], kernel: Kernel) -> np.ndarray:
    """Unbiased squared MMD between every two tasks, all of whose rows are given; 0 to itself."""
    whole = [from_rows(x) for x in populations]
    pool = _pool(_whole(populations), kernel)
    found = distances(whole, pool, n=[len(x) for x in populations])
    np.fill_diagonal(found, 0)
    return found


def real_tasks(
    config: ConfigDict, populations: dict[str, np.ndarray], kernel: Kernel
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Coverage, and sets of the best, where all rows of a real task are its law.

    Docks and users are drawn again and again; no user shares a row with a learnware. A dock has a
    learnware of every task and size. "near" is the closest other task, "far" all the rest; a set of
    the best is found among all learnwares, and for users whose own task the dock has not.
    """
    settings, tasks = config.real, list(populations.values())
    truth = population_distances(tasks, kernel)
    others = truth + np.diag(np.full(len(tasks), np.inf))
    near, sizes = others.argmin(1), list(settings.learnware_rows)
    relation_of = np.full(truth.shape, "far", object)
    relation_of[np.arange(len(tasks)), near] = "near"
    np.fill_diagonal(relation_of, "equal")
    means = {relation: float(truth[relation_of == relation].mean()) for relation in RELATIONS}
    cells, sets = defaultdict(list), defaultdict(list)
    # Learnwares by size, then by task.
    task_of, size_of = np.tile(np.arange(len(tasks)), len(sizes)), np.repeat(sizes, len(tasks))
    for replicate in range(settings.docks):
        say(f"Real tasks: dock {replicate + 1} of {settings.docks}.")
        rng = np.random.default_rng([config.seed, replicate])
        docked, users = [], []
        for x in tasks:
            x = x[rng.permutation(len(x))]
            *learnwares, x = np.split(x, np.cumsum(sizes))
            docked.append(learnwares)
            users.append([x[:n] for n in settings.rows])
        docked = [x for group in zip(*docked, strict=True) for x in group]
        samples = docked + [x for group in users for x in group]
        for specification, made in (
            ("whole", _whole(samples)),
            ("reduced", _reduced(replicate, samples, kernel, config.specification)),
        ):
            learnwares, made = made[: len(docked)], made[len(docked) :]
            pool = _pool(learnwares, kernel)
            for task in range(len(tasks)):
                foreign = np.flatnonzero(task_of != task)
                fewer = _pool([learnwares[i] for i in foreign], kernel)
                best = np.flatnonzero(task_of[foreign] == near[task])
                for user in made[task * len(settings.rows) :][: len(settings.rows)]:
                    outcome = _coverage(user, pool, truth[task, task_of], config.level)
                    for other, size, row in zip(task_of, size_of, outcome, strict=True):
                        relation = relation_of[task, other]
                        key = relation, user.n, int(size), means[relation]
                        cells["real tasks", specification, *key].append(row)
                    own = np.flatnonzero(task_of == task)
                    for scene, among, closest in (
                        ("task of the dock", pool, own),
                        ("task that the dock has not", fewer, best),
                    ):
                        sets[scene, specification, user.n].append(
                            _set_outcome(user, among, closest.tolist(), config.level)
                        )
    return _interval_rows(cells), _set_rows(sets)


def abstention(
    config: ConfigDict, catalogue: dict[str, np.ndarray], kernel: Kernel
) -> list[dict[str, Any]]:
    """Rates of thresholds set on one half of the domains, for users of the other.

    A split draws half of the domains: the learnwares of their tasks are the dock, whose threshold
    comes from these alone. Users of the other domains should be refused, but for the nominal rate;
    users of the dock's own tasks, with other rows, should not. Intervals are a bootstrap over
    domains.
    """
    settings = config.abstention
    domain = np.array([task.domain for task in tasks_of(settings.tasks)])
    rng = np.random.default_rng(config.seed)
    shuffled = [x[rng.permutation(len(x))] for x in catalogue.values()]
    rows = settings.rows
    made = _reduced(
        config.seed,
        [x[rows:] for x in shuffled] + [x[:rows] for x in shuffled],
        kernel,
        config.specification,
    )
    learnwares, users = made[: len(domain)], made[len(domain) :]
    pool = _pool(learnwares, kernel)
    distance, apart = (
        distances([one.spec for one in group], pool, n=[one.n for one in group])
        for group in (users, learnwares)
    )
    apart[domain[:, None] == domain] = np.inf
    domains = np.unique(domain)
    # Accepted and counted, by rate, whether the user's task is the dock's, split and domain.
    counts = np.zeros((len(settings.rates), 2, 2, len(domains)))
    infinite = np.zeros(len(settings.rates))
    place = np.searchsorted(domains, domain)
    for _ in range(settings.splits):
        inside = np.isin(place, rng.permutation(len(domains))[: len(domains) // 2])
        # What `held_out_distances` says of this dock.
        nearest = apart[np.ix_(inside, inside)].min(1)
        closest = distance[:, inside].min(1)
        for i, rate in enumerate(settings.rates):
            threshold = calibrate_threshold(nearest, false_acceptance=rate)
            infinite[i] += np.isinf(threshold)
            for own in (0, 1):
                of = inside == bool(own)
                np.add.at(counts[i, own, 0], place[of], closest[of] <= threshold)
                np.add.at(counts[i, own, 1], place[of], 1)
    again = resampled(rng, len(domains), 2000)
    found = []
    for i, rate in enumerate(settings.rates):
        row = {
            "rate": rate,
            "splits": settings.splits,
            "never_served": infinite[i] / settings.splits,
        }
        for name, own in (("false_acceptance", 0), ("false_abstention", 1)):
            accepted, counted = counts[i, own]
            hit = counted - accepted if own else accepted
            drawn = hit[again].sum(1) / counted[again].sum(1)
            row[name] = float(hit.sum() / counted.sum())
            row[f"{name}_interval"] = list(interval(drawn, 0.95))
            row[f"{name}_by_domain"] = float(np.mean(hit / counted))
        found.append(row)
    return found


def panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[figures.Curve]]]:
    """Coverage against rows of the user, a panel a relation, for the largest learnwares."""
    most = max(row["learnware_n"] for row in rows)
    result = []
    for relation in RELATIONS:
        curves = defaultdict(list)
        for row in rows:
            if row["relation"] == relation and row["learnware_n"] == most:
                curves[f"{row['law']}, {row['specification']}"].append((row["n"], row["coverage"]))
        drawn = [
            figures.Curve(name, *zip(*sorted(points), strict=True))
            for name, points in curves.items()
        ]
        result.append((f"{relation} laws, learnwares of {most} rows", drawn))
    return result


def tables(output: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    head = ["law", "specification", "rows of user, learnware"]
    head += ["coverage: equal, near, far", "sampling part alone", "mean width", "of it sampling"]
    groups = defaultdict(dict)
    for row in output["intervals"]:
        key = row["law"], row["specification"], row["n"], row["learnware_n"]
        groups[key][row["relation"]] = row
    lines = [f"Intervals, nominal {output['level']:.0%}.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (law, specification, n, learnware_n), group in sorted(groups.items()):

        def joined(field, shape, group=group):
            return ", ".join(format(group[relation][field], shape) for relation in RELATIONS)

        cells = [law, specification, f"{n:,}, {learnware_n:,}"]
        cells += [joined("coverage", ".3f"), joined("sampling_coverage", ".3f")]
        cells += [joined("width", ".4f"), joined("sampling_width", ".4f")]
        lines.append(f"| {' | '.join(cells)} |")
    head = ["dock", "specification", "rows", "truly closest left out", "size of the set"]
    head += ["unadjusted: left out", "size"]
    lines += ["", f"Sets of the best, nominal {output['level']:.0%}.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in output["best"]:
        low, high = row["excluded_interval"]
        cells = [row["scene"], row["specification"], f"{row['n']:,}"]
        cells += [f"{row['excluded']:.3f} ({low:.3f} to {high:.3f})", f"{row['size']:.2f}"]
        cells += [f"{row['unadjusted_excluded']:.3f}", f"{row['unadjusted_size']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    head = ["stated false acceptance", "measured", "mean over domains", "false abstention"]
    lines += ["", "Thresholds, on domains that the dock has not.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in output["abstention"]:
        cells = [f"{row['rate']:.0%}"]
        for name in ("false_acceptance", "false_abstention"):
            low, high = row[f"{name}_interval"]
            cells.append(f"{row[name]:.3f} ({low:.3f} to {high:.3f})")
        cells.insert(2, f"{row['false_acceptance_by_domain']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
