"""Which specification finds the right learnware? Every family beside every baseline.

python -m experiments.families --config=configs/families.py:quickstart
    Two settings. "matching": the 14 learnwares of docks/quickstart for users with other rows of
    the same tasks. "family": 10 learnwares for one label set, sentiment, from 10 sources, for users
    of the same sources whose own learnware is left out. 10 adapters are tuned first, and every
    model is scored on every task; then specifications are made and ranked, for 2 to 256 rows a
    user, 5 seeds: about 2 h on 2 cores in all, resumable. Four of the sources are data sets of
    the hub, or of a local mirror named by LEARNWARE_MIRROR.
python -m experiments.families --config=configs/families.py:development
    Fits three development tasks by the published settings, as published and with the gradients of
    the start, which cost no pass through the model: 15 min.
python -m experiments.families --config=configs/families.py:smoke
    2 tasks, 8 rows, 2 seeds: 90 s, most of them compiling.
"""

from ml_collections import ConfigDict

from configs import build, evaluate

SIZES = ("quickstart", "development", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/families.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir="runs/families-smoke" if smoke else "runs/families",
            model=dict(name="SmolLM2-135M-Instruct", dtype="bfloat16"),
            settings=dict(matching=setting("matching", smoke))
            if smoke
            else dict(matching=setting("matching", smoke), family=setting("family", smoke)),
            # The reference model is `model`, with an adapter whose B is trained.
            reference=dict(
                lora=dict(rank=16, alpha=32.0, targets=("query", "key", "value"), seed=0),
                # Tokens; texts are cut to the last. A batch has the least width that holds it.
                widths=(24,) if smoke or size == "development" else (24, 40),
                dtype="bfloat16",
                # Rows whose gradients are computed at once.
                together=8,
            ),
            # As published, but for `steps` (400); and there texts have up to 2,048 tokens, the
            # reference is Qwen2.5-0.5B, dropout is 0.1, and the model is run at every step.
            fit=dict(
                steps=10 if smoke else 400 if size == "development" else 100,
                batch=2,
                rate=1e-5,
                decay=0.5,
                warmup=0.03,
                clip=1.0,
                pull=1.0,
            ),
            # Of rows' gradients, and of whole vectors.
            sketches=dict(row=512, vector=4096),
            # Rows of a learnware's own training data; and of users.
            learnware_rows=8 if smoke else 128,
            rows=(2, 8) if smoke else (2, 4, 8, 16, 64, 256),
            seeds=(0, 1) if smoke else (0, 1, 2, 3, 4),
            # Every model is run on so many first rows of a task; smaller users have no others.
            model_rows=8 if smoke else 128,
            specification=build.specification(smoke),
            # Tasks that no table reports, for `:development`.
            development=(
                ("medmcqa-specialties", "icd10-other-chapters", "arithmetic-questions")
                if size == "development"
                else ()
            ),
            seed=0,
        )
    )


def setting(name, smoke):
    """A dock, its users, and whether a user's own learnware is left out of it."""
    tuned = build.get_config("quickstart")
    scored = evaluate.get_config("smoke" if smoke else "quickstart")
    tasks = ("recurrences", "asdiv-operations") if smoke else ("dock",)
    if name == "family":
        tasks, scored.scoring.rows = ("sentiment",), 100
        tuned.dock = scored.dock = "runs/families/dock"
        tuned.finetune.workdir = "runs/families/models"
        tuned.labelled = tasks
        tuned.scoring.rows = 40
    scored.tasks = tasks
    return dict(tasks=tasks, build=tuned, evaluate=scored, leave_out_own=name == "family")
