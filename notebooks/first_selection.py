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
# A first selection

You have texts and a task, and there are many fine-tuned models. Which of them suits *your* texts?
In ten minutes: from a text file to a model that answers your questions. The file stays on this
machine; all that a dock would see of it is a small array.

A **learnware** is a model with a **specification**, which sketches the texts that the model was
made for. A **dock** is a collection of learnwares. `docks/quickstart` has 14: the language model
SmolLM2-135M with 14 LoRA adapters, one a task.
"""

# %%
# %matplotlib inline
import os
import tempfile
from pathlib import Path

import jax
import pandas as pd

import learnware_jax as lw
from learnware_jax import figures
from learnware_jax.dock.labelled import LABELLED, load_examples

# Notebooks run in their own folder or in that of the repository.
os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docks/quickstart").is_dir()))
pd.set_option("display.max_colwidth", 110)

# %% [markdown]
# ## Your texts
#
# One text a line; jsonl, csv, tsv and parquet do, too. So that this notebook runs as it is, it
# writes a file with 64 news wires in which companies report a profit, a loss or a dividend. No
# model of the dock was made for that task. **Put the path of your own file in place of `file`.**

# %%
task = LABELLED["reuters-earnings"]
file = Path(tempfile.mkdtemp()) / "my_texts.txt"
file.write_text("\n".join(row.text for row in load_examples(task.name, "user", 64)))

texts = lw.read_texts(file)
print(len(texts), "texts; the first:", texts[0][:100])

# %% [markdown]
# ## Their specification
#
# A sentence encoder turns every text into a point, a row of `x`: texts about like things lie close.
# `reduce` replaces the cloud of n points by a few weighted ones, such that any smooth average over
# the few is nearly that over all: an **RKME**, a reduced kernel mean embedding. With half as many
# points as texts, or fewer, started from noise, none of them is meant to be one of your texts.
# [SECURITY.md](../SECURITY.md) says what a specification gives away all the same.
#
# The dock says which encoder, how much of a text and which kernel (the measure of how alike two
# points are) all of its specifications share. Only what is made alike can be compared.

# %%
dock = lw.open_dock("docks/quickstart")
encoder = lw.load_encoder(lw.fetch(dock.space["encoder"]))
x = lw.embed(encoder, texts, max_tokens=dock.space["max_tokens"])
mine = lw.reduce(jax.random.key(0), x, len(x) // 2, dock.kernel, start="noise")
print(f"{x.shape} embedded texts become points {mine.spec.z.shape} with weights that sum to one.")
print(f"What that loses, as a squared distance: {mine.residual:.0e}.")

# %% [markdown]
# ## The ranking
#
# The distance between two specifications is the **squared MMD** (maximum mean discrepancy), here
# its unbiased estimate: about 0 for samples of the same texts, below 0 as often as above, and the
# larger the less they have in common. `lower` and `upper` bound it, for you gave a sample of your
# texts, and specifications are compressed. `undominated` are the learnwares that may be the
# closest.

# %%
found = lw.select(mine.spec, dock.pool, n=mine.n, residual=mine.residual, threshold=dock.threshold)
table = lw.frame(found, dock.domains)
table.round(4)

# %% [markdown]
# The same as a figure: a line is an interval, a filled mark may be the closest. Right of the dashed
# line the dock would say that none fits: it is set so that of ten users whose field the dock has
# not, about one gets a model all the same.

# %%
user = {
    "id": "my_texts",
    "kind": "own",
    "decision": found.decision,
    "undominated": found.undominated,
    "ranking": table.to_dict("records"),
}
figures.rankings([user], dock.threshold)

# %%
selected = found.ids[0]
learnware = next(one for one in dock.learnwares if one.id == selected)
print("decision:", found.decision)
pd.Series({name: learnware.card[name] for name in ("description", "domain", "instruction")})

# %% [markdown]
# ## The model
#
# The selected adapter goes on top of the base model. The question is in the form that the models
# were tuned in: an instruction, the text, "Answer:". As answers are words of a list, `ask` takes
# `choices` and returns the likeliest; without choices the model writes. The adapter was tuned to
# other words than these, as its instruction above says; it is asked your question all the same.

# %%
model = lw.load_model(lw.fetch("SmolLM2-135M-Instruct"))
adapter = lw.load_adapter("docks/quickstart", selected, model)
rows = load_examples(task.name, "test", 32)  # others than those in the file
prompts = [f"{task.instruction}\n{row.text}\nAnswer:" for row in rows]
answers = pd.DataFrame(
    {
        "text": [row.text[:60] for row in rows],
        "wanted": [row.answer for row in rows],
        "base model": lw.ask(model, prompts, choices=rows[0].choices),
        "selected": lw.ask(model, prompts, choices=rows[0].choices, adapter=adapter),
    }
)
answers.head(8)

# %% [markdown]
# Is it worth it? If you know some answers, count. The standard error says how far chance alone
# moves a share of so few rows.

# %%
right = answers[["base model", "selected"]].eq(answers["wanted"], axis=0)
share = pd.DataFrame({"right": right.mean(), "standard error": right.sem()})
share.round(2)

# %% [markdown]
# ## What next
#
# - Your own file: `python -m experiments.select --config=configs/select.py:quickstart
#   --config.user.data=FILE --config.workdir=runs/mine` does the above and writes table and figure.
# - Your own rows with answers: `experiments.evaluate --config=configs/evaluate.py:mine`
#   ([docs/uses.md](../docs/uses.md)) counts as above, for the selected model and for all others.
# - How sure a ranking is, and when to take none: [reading_a_ranking.py](reading_a_ranking.py).
# - A distance compares what texts are about, not how good a model is: see there, too.
