"""How often selection is right: by number of rows and method, over seeds.

Methods: "rkme" (this library, specifications only), "mean_cosine" (plain mean embeddings of all
rows, centred), "random". A seed draws the halves of tasks, the rows of users, and all starts.
"""

from collections import defaultdict

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import build
from experiments.common import (
    embed_parts,
    kernel_of,
    reducer_options,
    say,
    space_of,
)
from learnware_jax.dock.tasks import halves, load_task
from learnware_jax.dock.texts import sample
from learnware_jax.selection.baselines import mean_cosine
from learnware_jax.selection.decision import calibrate_threshold, held_out_distances
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.slm.encoder import Encoder
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import from_rows

QUANTITIES = {
    "same_top1": "own task's learnware first",
    "unseen_domain": "learnware of the right domain first",
    "outside_abstained": "none fits, rightly",
    "same_served": "not refused (same)",
    "unseen_served": "not refused (unseen)",
}


def summarise(config: ConfigDict, encoder: Encoder) -> dict:
    """Rates with their mean and standard error over seeds.

    Returns {"seeds", "texts", "rows": [{"n", "method", "users": {kind: count}, quantity: {"mean",
    "stderr"}}]}, with the quantities of QUANTITIES. A task counts at n rows if it has as many; a
    quantity without users is left out. The dock is one of `config.build`, made anew a seed.
    """
    sizes = list(config.evaluation.rows)
    same = build.tasks_of(config.build.tasks)
    others = {kind: build.tasks_of(config.users[kind]) for kind in ("unseen", "outside")}
    tasks = same + others["unseen"] + others["outside"]
    # Enough that both halves hold what is drawn from them.
    limit = 2 * max(config.build.texts, max(sizes)) + 200
    texts = {task.name: load_task(task.name, limit) for task in tasks}
    space = space_of(encoder, config.build.specification)
    say(f"Evaluation: {len(tasks)} tasks, {sum(map(len, texts.values()))} texts.")
    # A task at a time: what is embedded is kept, so a run that was stopped goes on.
    rows = {name: embed_parts(encoder, [part], space, keep=True)[0] for name, part in texts.items()}
    records = defaultdict(list)
    counts = {}
    for seed in config.evaluation.seeds:
        for key, (values, users) in _one_seed(config, seed, same, others, texts, rows).items():
            records[key].append(values)
            counts[key] = users
        say(f"Evaluation: seed {seed} of {list(config.evaluation.seeds)} done.")
    table = []
    for (n, method), per_seed in sorted(records.items(), key=lambda item: item[0]):
        row = {"n": n, "method": method, "users": counts[n, method]}
        for quantity in per_seed[0]:
            values = np.array([values[quantity] for values in per_seed])
            spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
            row[quantity] = {"mean": float(values.mean()), "stderr": float(spread)}
        table.append(row)
    return {
        "seeds": list(config.evaluation.seeds),
        "texts": config.build.texts,
        "learnwares": len(same),
        "rows": table,
    }


def _one_seed(config, seed, same, others, texts, rows):
    """{(n, method): ({quantity: rate}, {kind: users})} of one draw of everything."""
    settings = config.build.specification
    rng = np.random.default_rng(seed)
    key_dock, key_users = jax.random.split(jax.random.key(seed))
    developer, held_out = [], {}
    for task in same:
        first, second = halves(texts[task.name], seed)
        place = {text: i for i, text in enumerate(texts[task.name])}
        chosen = sample(first, config.build.texts)
        developer.append(rows[task.name][[place[text] for text in chosen]])
        held_out["same", task.name] = rows[task.name][[place[text] for text in second]]
    for kind, tasks in others.items():
        held_out |= {(kind, task.name): rows[task.name] for task in tasks}
    kernel = kernel_of(settings.kernel, seed, np.concatenate(developer))
    options = reducer_options(settings)
    dock = reduce_many(key_dock, developer, settings.points, kernel, **options)
    ids, domains = [task.name for task in same], np.array([task.domain for task in same])
    pool = build_pool(
        [reduced.spec for reduced in dock],
        kernel,
        ids=ids,
        n=[reduced.n for reduced in dock],
        residual=[reduced.residual for reduced in dock],
    )
    means = [from_rows(x) for x in developer]
    rate = config.false_acceptance
    cosine = mean_cosine(means, means)
    foreign = np.where(domains[:, None] != domains, cosine, -np.inf).max(1)
    thresholds = {
        "rkme": calibrate_threshold(
            held_out_distances(pool, domains.tolist()), false_acceptance=rate
        ),
        "mean_cosine": calibrate_threshold(-foreign, false_acceptance=rate),
        "random": np.inf,
    }
    domain_of = {task.name: task.domain for group in (same, *others.values()) for task in group}
    result = {}
    for n in config.evaluation.rows:
        users = {who: x[rng.permutation(len(x))[:n]] for who, x in held_out.items() if len(x) >= n}
        drawn = list(users.values())
        fitted = reduce_many(key_users, drawn, settings.points, kernel, **options)
        scores = {
            "rkme": distances([reduced.spec for reduced in fitted], pool, n=[n] * len(fitted)),
            "mean_cosine": -mean_cosine([from_rows(x) for x in drawn], means),
            "random": rng.random((len(users), len(ids))),
        }
        kinds = np.array([kind for kind, _ in users])
        names = np.array([name for _, name in users])
        tally = {kind: int((kinds == kind).sum()) for kind in ("same", *others)}
        for method, score in scores.items():
            first = score.argmin(1)
            served = score.min(1) <= thresholds[method]
            own_task = np.array(ids)[first] == names
            own_domain = domains[first] == np.array([domain_of[name] for name in names])
            values = {
                "same_top1": own_task[kinds == "same"],
                "unseen_domain": own_domain[kinds == "unseen"],
                "outside_abstained": ~served[kinds == "outside"],
                "same_served": served[kinds == "same"],
                "unseen_served": served[kinds == "unseen"],
            }
            result[n, method] = {q: float(v.mean()) for q, v in values.items() if v.size}, tally
    return result


def table(summary: dict) -> list[str]:
    """The summary as Markdown: per cent, mean and standard error over seeds."""
    lines = [
        "",
        f"Per cent of users, mean ± standard error over {len(summary['seeds'])} seeds; "
        f"{summary['learnwares']} learnwares.",
        "",
        f"| rows | users (same, unseen, outside) | method | {' | '.join(QUANTITIES.values())} |",
        "|---|---|---|" + "---|" * len(QUANTITIES),
    ]
    for row in summary["rows"]:
        cells = [
            f"{100 * row[q]['mean']:.0f} ± {100 * row[q]['stderr']:.1f}" if q in row else ""
            for q in QUANTITIES
        ]
        users = ", ".join(map(str, row["users"].values()))
        lines.append(f"| {row['n']} | {users} | {row['method']} | {' | '.join(cells)} |")
    return [*lines, ""]
