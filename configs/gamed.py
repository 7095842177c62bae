"""A learnware made to attract everyone: which rankings fall for it, and what finds it?

python -m experiments.gamed --config=configs/gamed.py:quickstart
    Attackers in docks/quickstart, for users of 19 tasks; then its models are asked what they make
    of texts herded from specifications: 14 min on 2 busy cores. A run that was stopped goes on
    where models are asked.
python -m experiments.gamed --config=configs/gamed.py:smoke
    2 learnwares, 3 tasks: 35 s of CPU time.

Writes WORKDIR/results.json, report.md, gamed.png and told.png.
"""

from ml_collections import ConfigDict

from configs import build

SIZES = ("quickstart", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/gamed.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/gamed-{size}",
            dock="docks/quickstart",
            model=dict(name="SmolLM2-135M-Instruct", dtype="bfloat16"),
            template="plain",
            specification=build.specification(False),
            # Learnwares of the dock that are used; () for all.
            learnwares=("recurrences", "arithmetic") if smoke else (),
            # Labelled tasks, or roles.
            users=dict(
                same=("recurrences", "arithmetic") if smoke else ("dock",),
                near=("arithmetic-questions",) if smoke else ("unseen",),
            ),
            # A user has `user_rows` of the first `user_pool` rows of a task's part for users.
            user_pool=16 if smoke else 128,
            user_rows=8 if smoke else 32,
            seeds=(0,) if smoke else (0, 1, 2),
            # Of near copies: how far unit points are moved.
            noise=0.2,
            scale=100.0,
            hub=dict(steps=20 if smoke else 300, rate=0.02),
            mixture=3,
            # Of parameter vectors; see configs/families.py.
            vector_rows=4 if smoke else 32,
            user_vector_rows=4 if smoke else 16,
            reference=dict(
                lora=dict(rank=16, alpha=32.0, targets=("query", "key", "value"), seed=0),
                widths=(24,) if smoke else (24, 40),
                dtype="bfloat16",
                together=8,
            ),
            fit=dict(
                steps=10 if smoke else 100,
                batch=2,
                rate=1e-5,
                decay=0.5,
                warmup=0.03,
                clip=1.0,
                pull=1.0,
            ),
            # What models are worth: results of experiments.evaluate for this dock.
            truth="experiments/results/evaluate_quickstart.json",
            # Public texts that the check herds from: so many of each task of the catalogue.
            corpus=dict(
                roles=("dock",) if smoke else ("dock", "unseen", "outside_development", "outside"),
                texts=10 if smoke else 200,
            ),
            # Texts for a specification, cut to so many characters.
            herded=4 if smoke else 16,
            # Learnwares on whose texts another is asked, too.
            others=1 if smoke else 2,
            characters=40 if smoke else 200,
            # What the owner of a broad specification says that its model does.
            broad_card=dict(instruction="Answer.", labels=()),
            scoring=dict(dtype="bfloat16", batch=4 if smoke else 16),
            # Of honest learnwares, those on which the check's threshold is set are every other one.
            false_alarms=0.5 if smoke else 0.125,
            seed=0,
        )
    )
