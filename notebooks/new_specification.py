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
# A new specification in thirty lines

A specification is a function from texts to a weighted set of points, and a kernel says how alike
two points are. Ranking, intervals, mixtures and docks need no more. So a new kind is one
function.

Here: no neural encoder, only which **character trigrams** a text has. It costs nothing, knows no
language and sees spelling, digits and form. Is it any good, beside the RKME of sentence
embeddings?
"""

# %%
# %matplotlib inline
import math
import os
import zlib
from pathlib import Path

import jax
import numpy as np
import pandas as pd

import learnware_jax as lw
from learnware_jax import figures
from learnware_jax.dock.labelled import load_examples
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.kernels import Gaussian, Linear

# Notebooks run in their own folder or in that of the repository.
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docks/quickstart").is_dir()))

# %% [markdown]
# ## The specification
#
# A text is cut into its trigrams; each is hashed to one of 1024 places; the root of the counts,
# scaled to length one, is the text's row. (The root keeps a frequent trigram from drowning the
# rest.) The specification is the mean of the rows, one point of weight one, and the kernel is x .
# y: the squared MMD of two such specifications is the squared distance of their means.


# %%
def trigram_rows(texts, width=1024):
    """Counts of hashed character trigrams, rooted and scaled to unit length, (n, width)."""
    rows = np.zeros((len(texts), width), np.float32)
    for row, text in zip(rows, texts, strict=True):
        padded = f" {text.lower()} "
        for i in range(len(padded) - 2):
            # Python's own hash differs from run to run.
            row[zlib.crc32(padded[i : i + 3].encode()) % width] += 1
    rows = np.sqrt(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def trigrams(texts):
    """The specification: one point, the mean of the rows."""
    return lw.RKME(trigram_rows(texts).mean(0, keepdims=True), np.ones(1))


# %% [markdown]
# That was it. Two more to compare with, both of sentence embeddings: their mean, one point as
# above, and their RKME, as docks have it. If the mean does as well as the RKME, the points are not
# what matters; if trigrams do as well as the mean, the encoder is not.
#
# ## Real tasks
#
# The 14 tasks that the models of docks/quickstart were trained for, 64 training texts each; and
# users with 32 other texts of 19 tasks: the same 14, and 5 of which no model was made.

# %%
tasks = lw.read_results("experiments/results/evaluate_quickstart.json")["tasks"].set_index("task")
docked = list(tasks.index[tasks["kind"] == "same"])
owners = [[row.text for row in load_examples(name, "train", 64)] for name in docked]
users = [[row.text for row in load_examples(name, "user", 32)] for name in tasks.index]

encoder = lw.load_encoder(lw.fetch("all-MiniLM-L6-v2"))
embedded = [lw.embed(encoder, texts, max_tokens=64) for texts in owners + users]


def mean(x):
    """The mean of embedded texts, one point."""
    return lw.RKME(x.mean(0, keepdims=True), np.ones(1))


def rkme(x):
    """Sixteen weighted points."""
    return lw.reduce(jax.random.key(0), x, 16, Gaussian(0.1), start="noise", steps=15).spec


specs = {
    "trigrams": ([trigrams(texts) for texts in owners + users], Linear()),
    "mean of embeddings": ([mean(x) for x in embedded], Linear()),
    "RKME of embeddings": ([rkme(x) for x in embedded], Gaussian(0.1)),
}

# %%
squared = {}
for kind, (made, kernel) in specs.items():
    count = len(owners)
    # What compression loses is for intervals, not drawn here.
    pool = lw.build_pool(made[:count], kernel, ids=docked, n=[64] * count, residual=[0.0] * count)
    squared[kind] = distances(made[count:], pool, n=[32] * len(users))
{kind: distance.shape for kind, distance in squared.items()}

# %% [markdown]
# ## Which is better?
#
# Two questions. Does the learnware of a user's own task come first? And how good is the model that
# comes first: `experiments/results/evaluate_quickstart.json` has the share of right answers of
# every model on other rows of every task. `oracle` is the best model of each task, `random` the
# mean over the 14.

# %%
accuracy = tasks[[f"accuracy.{name}" for name in docked]].to_numpy()
first = {kind: distance.argmin(1) for kind, distance in squared.items()}
same = (tasks["kind"] == "same").to_numpy()
place = np.array([docked.index(name) if name in docked else -1 for name in tasks.index])


def worth(picks):
    """Of picks, one a task: own task first (of 14), and mean shares of right answers."""
    got = accuracy[np.arange(len(picks)), picks]
    return {
        "own task first": f"{(picks == place)[same].sum()} of {same.sum()}",
        "right, same tasks": got[same].mean(),
        "right, unseen tasks": got[~same].mean(),
    }


table = pd.DataFrame({kind: worth(picks) for kind, picks in first.items()}).T
table.loc["oracle"] = worth(accuracy.argmax(1)) | {"own task first": ""}
table.loc["random"] = ["", accuracy[same].mean(), accuracy[~same].mean()]
table.infer_objects().round(3)

# %% [markdown]
# Where own tasks are in the dock, all three find them, or nearly: tasks of this dock differ in
# form, and trigrams see form. That does not tell them apart. Unseen tasks do, and there are five of
# them, too few to say much. One more test is harder: how many other tasks come between a user and
# the tasks of the user's own **domain**, which is about contents and not about form?


# %%
def domain_precision(distance):
    """Per user: of other learnwares than the own one, is the closest of the user's domain?"""
    domains = tasks["domain"].to_numpy()
    docked_domains = domains[same]
    others = np.where(place[:, None] == np.arange(len(docked)), np.inf, distance)
    shared = [sum(docked_domains == d) - (p >= 0) for d, p in zip(domains, place, strict=True)]
    hit = docked_domains[others.argmin(1)] == domains
    return hit[np.array(shared) > 0]  # where there is another one of the domain


hits = {kind: domain_precision(distance) for kind, distance in squared.items()}
precision = {kind: hit.mean() for kind, hit in hits.items()}
print(f"{len(hits['trigrams'])} users whose domain has another learnware")
figures.dots(
    [
        (
            "closest other learnware is of the user's domain",
            [
                figures.Dot(kind, share, *np.clip(share + np.array([-1, 1]) * error, 0, 1))
                for kind, hit in hits.items()
                for share, error in [(hit.mean(), 1.96 * hit.std(ddof=1) / len(hit) ** 0.5)]
            ],
        )
    ],
    label="share of users, 95% interval",
)

# %% [markdown]
# Paired, user by user: how many have the domain right by one and wrong by the other? If both were
# as good, each of these users would be the toss of a coin.

# %%
by_embeddings = (hits["RKME of embeddings"] & ~hits["trigrams"]).sum()
by_trigrams = (~hits["RKME of embeddings"] & hits["trigrams"]).sum()
tosses, fewer = by_embeddings + by_trigrams, min(by_embeddings, by_trigrams)
chance = min(1, 2 * sum(math.comb(tosses, k) for k in range(fewer + 1)) / 2**tosses)
print(f"only by the RKME: {by_embeddings} users; only by trigrams: {by_trigrams}")
print(f"chance of a split as uneven as this by tossing coins: {chance:.3f}")

# %% [markdown]
# So, honestly: trigrams find the source of texts again nearly as well as a neural encoder, without
# one. They are worse at finding a *relative*, which is what a user needs whose own task is not in
# the dock; that the five unseen tasks do not show it is what five tasks are worth. The mean of
# embeddings does as well as the RKME here: on docks whose tasks differ in topic, the points buy
# nothing ([a larger dock](../docs/selection.md) says the same); they are there for tasks that
# differ in shape, for mixtures and for intervals. Trigrams make a fine baseline: a new
# specification should beat them.

# %% [markdown]
# ## What next
#
# - Keep it: a dock has one kind and one *space*, a dictionary of everything that changes distances
#   (here: width, hash, casing, root). `store.create_dock(path, space, kind)` makes one, and two
#   specifications whose spaces differ are refused, never compared.
# - Test it: `experiments.families` puts every family of specification beside every baseline on the
#   same users. A specification that nobody could tell from the mean of embeddings is not worth its
#   cost.
# - What a specification gives away of the texts is a question of its own: the mean of few rows
#   gives away a lot ([SECURITY.md](../SECURITY.md)).
