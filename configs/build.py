r"""A dock of learnwares.

python -m experiments.build --config=configs/build.py:quickstart   14 models, fine-tuned on
    SmolLM2-135M: 40 min on 2 cores. docks/quickstart, which this makes, comes with the repository;
    name another --config.dock to make it again.
python -m experiments.build --config=configs/build.py:catalogue    36 tasks as specifications alone,
    1-3 min on 2 cores, to runs/catalogue/dock (4 MB)
python -m experiments.build --config=configs/build.py:smoke        6 specifications, 15 s
python -m experiments.build --config=configs/build.py:own --config.dock=DOCK \
    --config.learnware.id=my-model --config.learnware.domain=finance --config.learnware.data=FILE
    One learnware, of some dozen texts: 10 s. With --config.adapters=FOLDER a whole folder: 20 s for
    three adapters of 100 texts.

Learnwares that a dock has already are kept, so a run that was stopped goes on where it stood. The
fourth command adds one learnware, made from the texts that your model was trained on, to a dock
that exists, with that dock's own kernel and encoder; --config.learnware.adapter=FOLDER gives it the
model.

With --config.adapters=FOLDER in place of --config.learnware it adds many, or makes a dock of them
where there is none. Every folder in FOLDER is a learnware, and its name the id:

    FOLDER/ID/adapter_config.json, adapter_model.safetensors    as PEFT writes them
    FOLDER/ID/texts.jsonl    the texts that it was made for; or .json .csv .tsv .parquet .txt
    FOLDER/ID/card.json      optional: {"domain": ..., "description": ..., "language": ..., ...}

All of it is checked first, also against finetune.model; if anything is wrong, everything that is
gets listed, and nothing is done. A card may say anything but what is found out here: adapter,
evaluation, model, training. No text is kept, and a specification has at most half as many points as
texts. A learnware that the dock has with the same adapter is left alone; --config.learnware.column
names the column of texts, where it cannot be guessed.
"""

from ml_collections import ConfigDict

from configs import finetune

SIZES = ("quickstart", "catalogue", "smoke", "own")
SMOKE_TASKS = ("fiqa", "pubmedqa", "medmcqa-dental", "asdiv", "piqa", "privacy-policies")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/build.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            dock="docks/quickstart" if size in ("quickstart", "own") else f"runs/{size}/dock",
            # Names in learnware_jax.dock.tasks.TASKS; "dock" stands for all tasks of that role.
            tasks={"catalogue": ("dock",), "smoke": SMOKE_TASKS}.get(size, ()),
            # Names in learnware_jax.dock.labelled.LABELLED, or a role: each gets an adapter too.
            labelled=("dock",) if size == "quickstart" else (),
            finetune=finetune.get_config("smoke" if smoke else "quickstart"),
            scoring=scoring(smoke),
            # A learnware is specified on one half of a task's texts, at most so many of them.
            texts=32 if smoke else 200,
            halves_seed=0,
            # A folder of folders: adapters with their texts and cards, a learnware each.
            adapters="",
            # adapter: a folder that PEFT or experiments.finetune wrote, for finetune.model.
            learnware=dict(
                id="", domain="", description="", model="", data="", column="", adapter=""
            ),
            specification=specification(smoke),
            seed=0,
        )
    )


def scoring(smoke):
    return dict(
        # Rows that a model is scored on, at most.
        rows=8 if smoke else 100,
        # Tokens of a free answer.
        answer_tokens=6,
        # "sum": the choice with the greatest log-likelihood; "bytes": divided by its length.
        by="sum",
        dtype="bfloat16",
        batch_tokens=1024,
        # Adapters that go through a batch at once; more than 1 is for accelerators.
        together=1,
    )


def specification(smoke):
    return dict(
        encoder="all-MiniLM-L6-v2",
        # 64 tokens show a text's topic; the encoder reads at most 256, four times as slowly.
        max_tokens=32 if smoke else 64,
        dtype="float32",
        # gamma: a number, or "median" to take 1 / median of the texts that a new dock starts with.
        # multi_gaussian has one bandwidth for each of the multiples of gamma.
        kernel=dict(name="gaussian", gamma="0.1", multiples=(0.25, 1.0, 4.0)),
        points=16 if smoke else 64,
        reducer="gauss_newton",
        # Starting from noise keeps points further from the texts than starting from texts; that is
        # no guarantee, and with as many points as texts it keeps nothing back.
        start="noise",
        steps=10 if smoke else 30,
        # "random" and "herding" publish texts' own embeddings. A dock refuses them, and points of
        # others that are such, unless this is the reducer's name.
        publish_rows="",
        # With a number for epsilon, specifications are differentially private for neighbours that
        # differ in one text, made of nothing but the embeddings of public texts, those of these
        # tasks of the catalogue; delta should be well below 1 / texts.
        privacy=dict(epsilon="inf", delta=1e-6, public=("unseen",), public_texts=500),
    )
