# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""
# The geometry of specifications

A specification of a task is a point of a space with lengths and angles. This notebook looks at
that space: maps of a dock, the sentences that set two tasks apart or bring them together, whether
models of close tasks do well, and the same geometry of changes of parameters.
"""

# %%
# %matplotlib inline
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.tree_util import Partial
from matplotlib.figure import Figure

import learnware_jax as lw
from learnware_jax import figures
from learnware_jax.dock.labelled import LABELLED, load_examples
from learnware_jax.selection.pool import biased_self_terms, members
from learnware_jax.selection.ranking import cross_deficits, distances
from learnware_jax.slm import decoder, lora
from learnware_jax.specification import pave
from learnware_jax.specification.kernels import mean_embedding
from learnware_jax.specification.rkme import from_rows, squared_mmd, witness

# Notebooks run in their own folder or in that of the repository.
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docks/quickstart").is_dir()))
pd.set_option("display.max_colwidth", 110)

dock = lw.open_dock("docks/quickstart")
pool, kernel, ids = dock.pool, dock.kernel, list(dock.pool.ids)

# %% [markdown]
# ## Distances
#
# A task is the mean of k(x, .) over its embedded texts x: a function, its **mean embedding** mu.
# Its value mu(y) says how much of the task lies near y. The **MMD** of two tasks is the length of
# mu_p - mu_q; squared, it is a sum of three averages of the kernel,
#
#     |mu_p - mu_q|^2 = <mu_p, mu_p> + <mu_q, mu_q> - 2 <mu_p, mu_q>.
#
# Here for all pairs of the dock's 14 learnwares, in the order of their domains.

# %%
own = biased_self_terms(pool)
squared = own[:, None] + own - 2 * cross_deficits(members(pool), pool)
squared = np.maximum((squared + squared.T) / 2, 0)
np.fill_diagonal(squared, 0)
order = sorted(range(len(ids)), key=lambda i: (dock.domains[ids[i]], ids[i]))
names = [ids[i] for i in order]
figures.heat_map(squared[np.ix_(order, order)], names, names, label="squared MMD")

# %% [markdown]
# ## Two maps
#
# Points in a space of many dimensions, drawn in two. **Kernel PCA** keeps the two directions in
# which the embeddings vary most; what it shows is exact, the rest is not seen. **MDS** moves points
# on the paper until the distances drawn are as close to the MMDs as they can be (here by the SMACOF
# iteration, started from the first map): everything is seen, nothing exactly.

# %%
count = len(ids)
center = np.eye(count) - 1 / count
values, vectors = np.linalg.eigh(-center @ squared @ center / 2)
pca = vectors[:, :-3:-1] * np.sqrt(values[:-3:-1])

mmd, mds = np.sqrt(squared), pca
for _ in range(300):
    drawn = np.linalg.norm(mds[:, None] - mds, axis=2)
    ratio = -np.divide(mmd, drawn, out=np.zeros_like(mmd), where=drawn > 0)
    np.fill_diagonal(ratio, -ratio.sum(1))
    mds = ratio @ mds / count

pairs = np.triu_indices(count, 1)
off = {}
for name, points in (("kernel PCA", pca), ("MDS", mds)):
    drawn = np.linalg.norm(points[:, None] - points, axis=2)
    off[name] = np.abs(drawn - mmd)[pairs].mean() / mmd[pairs].mean()
    print(f"{name}: distances drawn differ from MMDs by {off[name]:.0%} of the mean MMD.")
seen = values[-2:].sum() / values.clip(0).sum()
print(f"Kernel PCA shows {seen:.0%} of the variance.")

# %%
figures.dock_map(pca, ids, [dock.domains[name] for name in ids])

# %%
figures.dock_map(mds, ids, [dock.domains[name] for name in ids])

# %% [markdown]
# Kernel PCA spends its two directions on the tasks that lie farthest out, and the rest falls into
# one heap; MDS spreads the heap. Medicine holds together and so do the three tasks of news wires,
# while the tasks of mathematics are as far from each other as from the rest: sums in digits and
# questions in words have little in common. A domain is a word on a card, distances come from the
# texts.

# %% [markdown]
# ## Which sentences set two tasks apart
#
# The **witness function** mu_p(y) - mu_q(y) is large where p has more mass than q (Gretton et al.
# 2012). Its mean over the rows of p, less its mean over the rows of q, *is* the squared MMD: so
# every sentence has its share in the distance. Two close tasks, questions from clinical and from
# basic medicine:

# %%
encoder = lw.load_encoder(lw.fetch(dock.space["encoder"]))
embed = partial(lw.embed, encoder, max_tokens=dock.space["max_tokens"])


def rows_of(task, count=64):
    """Texts of a labelled task that no model was trained on."""
    return [row.text for row in load_examples(task, "user", count)]


clinics, sciences = rows_of("medmcqa-clinics"), rows_of("medmcqa-sciences")
x, y = embed(clinics), embed(sciences)
p, q = from_rows(x), from_rows(y)
w = np.asarray(witness(p, q, kernel, np.concatenate([x, y])))
difference = w[: len(x)].mean() - w[len(x) :].mean()
print(f"mean over clinics less mean over sciences  {difference:.6f}")
print(f"squared MMD of the two samples             {float(squared_mmd(p, q, kernel)):.6f}")

# %%
sentences = pd.DataFrame(
    {"witness": w, "task": ["clinics"] * len(x) + ["sciences"] * len(y), "text": clinics + sciences}
).sort_values("witness", ascending=False)
sentences.head(5).round(4)

# %%
sentences.tail(5).round(4)

# %% [markdown]
# ## Which rows make two tasks close
#
# The term <mu_p, mu_q> that brings p and q together is the mean of mu_q over the rows of p. A row
# of p with a large mu_q lies amid the other task: it would do as a text of q. First and last of the
# clinical questions, by how much of the sciences lies near them. The values differ little, as this
# kernel is wide: k is 1 for equal texts and still exp(-0.2) = 0.82 for orthogonal ones.

# %%
near = np.asarray(mean_embedding(kernel, x, y))
amid = pd.DataFrame({"mu_q": near, "text": clinics}).sort_values("mu_q", ascending=False)
pd.concat([amid.head(4), amid.tail(4)]).round(4)

# %% [markdown]
# ## Are models of close tasks better?
#
# `experiments/results/evaluate_quickstart.json` holds the share of right answers of all 14 models
# on 19 tasks, 64 rows each. Against it, the squared MMD from 32 other rows of each task to each
# learnware. Tasks differ in how hard they are, so shares are compared within a task: what the model
# gains on the base model.

# %%
tasks = lw.read_results("experiments/results/evaluate_quickstart.json")["tasks"].set_index("task")
users = [from_rows(embed(rows_of(name, 32))) for name in tasks.index]
distance = distances(users, pool, n=[len(user.beta) for user in users])
gain = tasks[[f"accuracy.{name}" for name in ids]].to_numpy() - tasks[["base"]].to_numpy()
is_own = np.array([[name == task for name in ids] for task in tasks.index])


def scatter():
    """Gain against distance, a mark for every task and learnware."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(distance[~is_own], gain[~is_own], "o", color="0.45", markersize=4, label="other task")
    axis.plot(distance[is_own], gain[is_own], "D", color="#0072B2", label="the model's own task")
    axis.axhline(0, color="0.7", linewidth=1, zorder=0)
    axis.axvline(dock.threshold, color="0.45", linestyle="--", linewidth=1, zorder=0)
    axis.set_xlabel("squared MMD from the task to the learnware (dashed: none fits beyond)")
    axis.set_ylabel("right answers, gain on the base model")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


scatter()


# %%
def spearman(a, b):
    """The rank correlation of two lists of numbers, -1 to 1."""
    return np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1]


rest = [spearman(-d[~o], g[~o]) for d, g, o in zip(distance, gain, is_own, strict=True)]
every = [spearman(-d, g) for d, g in zip(distance, gain, strict=True)]
print(f"Rank correlation of closeness and gain within a task, mean of {len(every)} tasks:")
print(f"all learnwares {np.mean(every):.2f}; without the task's own {np.mean(rest):.2f}")

# %% [markdown]
# A model's own task is at distance 0 and gains; away from that, a distance says where a model has
# something to offer, weakly. It is the first few of a ranking that matter, not its order far down.

# %% [markdown]
# ## The same geometry of parameters
#
# A task can also be specified by how it would change a reference model. **PAVE** fits the B of a
# shared adapter (W becomes W + scale A B, A fixed at random) to the task's rows; the change of B,
# flattened and scaled to length one, is the task's vector tau, and tasks are compared by the cosine
# of their vectors (arXiv 2505.13425). A cosine is a sum over coordinates, so it is a sum over
# layers: how much each adds.
#
# Eight rows of 24 tokens of three tasks; what is learned is the next token. The gradient of each
# row is taken once, and the fits run on these (`pave.linear_loss`), as the published settings move
# B so little that the loss stays linear. The first vector is the **one-step gradient**, no fit at
# all.

# %%
model = lw.load_model(lw.fetch("SmolLM2-135M-Instruct"))
start = lora.init_adapter(
    jax.random.key(0), model.config, rank=8, alpha=16.0, targets=("query", "key", "value")
)


def loss(params, start, b, ids):
    """Summed over tokens, and how many tokens."""
    hidden, _ = decoder.forward(params, ids, config=model.config, adapter=start._replace(b=b))
    scores = jax.nn.log_softmax(decoder.logits(params, hidden[:, :-1], config=model.config))
    chosen = jnp.take_along_axis(scores, ids[:, 1:, None], -1)
    return -chosen.sum(), jnp.float32(chosen.size)


def keep(gradient):
    """All of a row's gradient."""
    return gradient


def vectors_of(task, rows=8, tokens=24):
    """The one-step gradient and the parameter vector of a task, as trees of (layers, rank, out)."""
    encoded = [model.tokenizer.encode(text).ids for text in rows_of(task, 200)]
    chosen = jnp.array([ids[:tokens] for ids in encoded if len(ids) >= tokens][:rows])
    gradients, weights = pave.row_gradients(
        Partial(loss, model.params, start), start.b, chosen, together=rows, keep=keep
    )
    one_step = jax.tree.map(lambda g: -g.sum(0), gradients)
    order = pave.draw_rows(jax.random.key(1), rows, pave.PUBLISHED)
    linear = pave.linear_loss(gradients, weights)
    return {
        "one-step": one_step,
        "PAVE": pave.fit(linear, start.b, jnp.arange(rows), order, settings=pave.PUBLISHED).change,
    }


trio = ("medmcqa-clinics", "medmcqa-sciences", "reuters-commodities")
changes = {task: vectors_of(task) for task in trio}


# %%
def by_layer(a, b):
    """The share of each module in each layer in the cosine of two changes, (modules, layers)."""
    norms = [np.sqrt(sum(float((leaf**2).sum()) for leaf in tree.values())) for tree in (a, b)]
    return np.array([(a[name] * b[name]).sum((1, 2)) for name in a]) / np.prod(norms)


shares = {
    (kind, other): by_layer(changes[trio[0]][kind], changes[other][kind])
    for kind in ("one-step", "PAVE")
    for other in trio[1:]
}
cosines = {
    (kind, other): float(pave.flatten(changes[trio[0]][kind]) @ pave.flatten(changes[other][kind]))
    for kind, other in shares
}
attribution = pd.DataFrame(
    [
        [kind, other, cosines[kind, other], share.sum(), *share.sum(1)]
        for (kind, other), share in shares.items()
    ],
    columns=["vector", f"{trio[0]} and", "cosine", "sum of layers", *changes[trio[0]]["PAVE"]],
)
attribution.round(3)


# %%
def bars():
    """What each layer adds to the cosines."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    for axis, kind in zip(figure.subplots(2, 1, sharex=True), ("one-step", "PAVE"), strict=True):
        for place, (other, color) in enumerate(zip(trio[1:], ("#0072B2", "#E69F00"), strict=True)):
            share = shares[kind, other].sum(0)
            layer = np.arange(len(share)) + 0.4 * place - 0.2
            label = f"{trio[0]} and {other}: {cosines[kind, other]:.2f}"
            axis.bar(layer, share, 0.4, color=color, edgecolor="black", linewidth=0.4, label=label)
        axis.set_title(f"{kind}: what each layer adds to the cosine", fontsize=10)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axis.set_xlabel("layer")
    return figure


bars()

# %% [markdown]
# The two tasks of medicine share more of their change than medicine and news wires do. Nearly all
# of it is in the values, not in queries and keys, and in the first layers, where gradients are
# largest. In PAVE vectors still more so: the published fit pulls B towards its start by an L1 norm,
# and coordinates whose gradients are smaller than that pull stay where they were.

# %% [markdown]
# ## Intervals
#
# All of this is computed from samples. `select` puts an interval on every distance; the reader of a
# map should think of points with such a blur. For two users, 64 texts each:

# %%
shown = []
for task in trio[:2]:
    rows = embed(rows_of(task))
    found = lw.select(from_rows(rows), pool, n=len(rows), residual=0.0, threshold=dock.threshold)
    shown.append(
        {
            "id": task,
            "kind": LABELLED[task].domain,
            "decision": found.decision,
            "undominated": found.undominated,
            "ranking": lw.frame(found, dock.domains).to_dict("records"),
        }
    )
figures.rankings(shown, dock.threshold, shown=6)

# %% [markdown]
# ## What next
#
# - Your own dock: `python -m experiments.geometry --config=configs/geometry.py:quickstart
#   --config.dock=DOCK` draws its map and heat map.
# - What intervals and sets promise: [reading_a_ranking.py](reading_a_ranking.py).
# - Another geometry, of your own making: [new_specification.py](new_specification.py).
