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
# Reading a ranking

A ranking of learnwares is computed from a sample of your texts. What is in its numbers, how sure
are they, when should you take no learnware, and what does a distance not say?
"""

# %%
# %matplotlib inline
import os
from pathlib import Path

import numpy as np
import pandas as pd

import learnware_jax as lw
from learnware_jax import figures
from learnware_jax.dock.labelled import load_examples
from learnware_jax.selection.mixture import greedy_mixture
from learnware_jax.specification.rkme import from_rows

# Notebooks run in their own folder or in that of the repository.
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docks/quickstart").is_dir()))

dock = lw.open_dock("docks/quickstart")
encoder = lw.load_encoder(lw.fetch(dock.space["encoder"]))


def embed(texts):
    """A row for every text, by the dock's encoder."""
    return lw.embed(encoder, texts, max_tokens=dock.space["max_tokens"])


def select(x):
    """The dock ranked for a user whose embedded texts are x."""
    # Nothing leaves this machine, so nothing is compressed: the whole sample is the specification.
    return lw.select(from_rows(x), dock.pool, n=len(x), residual=0.0, threshold=dock.threshold)


def shown(name, kind, found):
    """A user as `figures.rankings` takes them."""
    return {
        "id": name,
        "kind": kind,
        "decision": found.decision,
        "undominated": found.undominated,
        "ranking": lw.frame(found, dock.domains).to_dict("records"),
    }


# %% [markdown]
# ## Distance, interval, set
#
# A user with 64 questions of clinical medicine, other ones than the dock's model was trained on.
#
# - **distance**: the squared MMD between your texts and those a learnware was made for, estimated
#   without bias. 0 means: no difference to be seen. For texts of one and the same kind the estimate
#   is below 0 as often as above; a negative distance is no fault.
# - **lower, upper**: an interval on it, at a level of 90%. It counts that both sides are samples
#   and were compressed to a few points.
# - **undominated**: the set of learnwares that may be the closest. The truly closest should be
#   missing for at most 10% of users, however many learnwares are compared.

# %%
questions = embed([row.text for row in load_examples("medmcqa-clinics", "user", 256)])
found = select(questions[:64])
lw.frame(found, dock.domains).head(5).round(4)

# %% [markdown]
# Two learnwares whose intervals overlap can still be told apart: your texts are the same in both
# distances, and what is odd about them moves both alike. The set looks at differences, and is
# sharper. Go by the filled marks, not by overlap.

# %%
figures.rankings([shown("64 questions", "same task", found)], dock.threshold, shown=6)

# %% [markdown]
# ## What shrinks as rows grow
#
# The same user with fewer and more texts. The width of an interval falls about as one over the root
# of the number of texts, until the learnware's own sample (200 texts here) is the smaller one. The
# set shrinks to the closest; with few texts it is honest to name several.

# %%
grown = pd.DataFrame(
    [
        {
            "texts": n,
            "closest": ranked.ids[0],
            "width": ranked.upper[0] - ranked.lower[0],
            "second": ranked.upper[1] - ranked.lower[1],
            "set": len(ranked.undominated),
        }
        for n in (8, 16, 32, 64, 128, 256)
        for ranked in [select(questions[:n])]
    ]
)
grown.round(4)

# %%
width = [
    figures.Curve("of the closest", grown["texts"], grown["width"]),
    figures.Curve("of the second", grown["texts"], grown["second"]),
]
figures.curves(
    [("width of the interval on the distance", width)],
    x_label="texts of the user",
    y_label="squared MMD",
)

# %% [markdown]
# ## None fits
#
# Some learnware always comes first. Whether it is any good for you, a ranking alone does not say;
# the dock's **threshold** does, in a way: beyond it the decision is "none". It is set on the dock's
# own domains. Each learnware in turn plays a user whose domain is left out, and the threshold is
# such that about one of ten of these would be given a learnware all the same. Users of other
# fields, and one of a task that the dock has:

# %%
strangers = {
    name: select(embed(lw.read_texts(name, limit=64)))
    for name in ("vehicle-forum", "molecules", "sitcom-dialogue")
}
figures.rankings(
    [shown("64 questions", "same task", found)]
    + [shown(name, "other field", ranked) for name, ranked in strangers.items()],
    dock.threshold,
    shown=3,
)

# %%
print(f"threshold {dock.threshold:.4f}")
pd.DataFrame(
    [
        {
            "user": name,
            "closest": ranked.ids[0],
            "distance": ranked.distance[0],
            "decision": ranked.decision,
        }
        for name, ranked in {"64 questions": found, **strangers}.items()
    ]
)

# %% [markdown]
# Chemical formulas are far out. Lines of a sitcom are given the model of news headlines all the
# same, and the forum on vehicles lies just at the threshold. The promise is an average over users
# like those left out, and a dock of few domains tells little about them: `experiments.coverage`
# measures what comes true. "None" means: use the base model, or make a model of your own.

# %% [markdown]
# ## Mixtures
#
# A user whose texts are of two kinds: half news wires on commodities, half clinical questions. No
# single learnware is close. `greedy_mixture` adds learnwares one at a time, and fits weights such
# that the weighted mean of their specifications comes close to the user's; it stops when one more
# gains little.

# %%
wires = embed([row.text for row in load_examples("reuters-commodities", "user", 32)])
both = from_rows(np.concatenate([wires, questions[:32]]))
mixture = greedy_mixture(both, dock.pool)
alone = greedy_mixture(both, dock.pool, max_size=1)
pd.DataFrame({"weight": mixture.weights}, index=mixture.ids).round(2)

# %%
print(f"squared MMD of the best single learnware {alone.squared_mmd:.4f}, {alone.ids[0]}")
print(f"squared MMD of the mixture               {mixture.squared_mmd:.4f}")

# %% [markdown]
# The wires have about half of the weight, as of the texts. The other half may be shared between
# learnwares of medicine: those that are nearly the same share a weight in no particular way. Such
# weights merge adapters or average their answers. (These distances are biased: own terms are taken
# as they are, so a mixture does not come to 0 exactly.)

# %% [markdown]
# ## What a distance is not
#
# A distance compares what texts are about. It is no measure of how well a model does:
#
# - a model trained on wrong answers has the specification of one trained on right ones;
# - a model for other labels of the same texts is close, and of no use;
# - two tasks about one thing may want different things of it.
#
# Of the tasks for which the dock has no model, as `experiments.evaluate` measured them (share of
# right answers on 64 rows): `selected` is the closest learnware, `oracle` the best of the 14, which
# one knows only with answers at hand.

# %%
tasks = lw.read_results("experiments/results/evaluate_quickstart.json")["tasks"]
unseen = tasks[tasks["kind"] == "unseen"]
unseen[
    ["task", "distance", "base", "selected", "selected_id", "oracle", "oracle_id", "decision"]
].round(3)

# %% [markdown]
# The closest learnware is worth having for most, and not always the best: the questions on medical
# specialties lie close to two learnwares, of which the closer one is much the worse. If you know
# answers to some rows, score the first few of a ranking on them (`experiments.evaluate
# --config=configs/evaluate.py:mine`). A specification that sees answers, such as PAVE, is the other
# way ([geometry.py](geometry.py)).
#
# ## What next
#
# - [new_specification.py](new_specification.py): a specification of your own, in thirty lines.
# - README, "How good it is": what selection was worth on 28 tasks, with intervals.
