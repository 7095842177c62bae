"""Does selection by specification beat what a critical reader would try instead?

python -m experiments.study --config=configs/study.py:cpu
    24 learnwares of SmolLM2-135M for 14 tasks, users of 28 tasks in three splits. 1 h 50 min on 2
    cores, resumable, learnware by learnware; 1 min once everything is made.
python -m experiments.study --config=configs/study.py:gpu --config.minutes=9
    112 learnwares, trained and asked 16 at a time on one accelerator. Stops after so many minutes;
    the same command goes on. Never run: no accelerator was at hand.
python -m experiments.study --config=configs/study.py:paper [--config.finetune.plan=true]
    Qwen2.5-7B over a mesh of accelerators, with the base model from the hub. Never run; with
    finetune.plan it prints what memory a device needs, which every test run checks.
python -m experiments.study --config=configs/study.py:smoke
    4 learnwares of a tiny model with random numbers: 2 min, most of them compiling.

Data sets are those of the hub, or of a local mirror named by LEARNWARE_MIRROR (operation-mawps is
in such a mirror only, as local/mawps). A run writes WORKDIR/study.json and study.md;
experiments.report makes a page of them.
"""

from ml_collections import ConfigDict

from configs import build, finetune

SIZES = ("smoke", "cpu", "gpu", "paper")

# Names in learnware_jax.dock.labelled.LABELLED. Users of split a have other rows of these:
DOCKED = (
    *("sentiment-reports", "sentiment-markets", "topic-markets", "intent-banking", "entity-news"),
    *("topic-abstracts", "topic-hallmarks", "mention-diseases", "letters-medicine"),
    *("operation-asdiv", "type-competition", "answer-tables"),
    *("topic-news", "sentiment-snippets"),
)
# Split b: domains of the dock, data sets that no learnware saw.
UNSEEN = (
    *("sentiment-companies", "sentiment-gold", "entity-filings"),
    *("section-patients", "subject-medicine"),
    *("operation-mawps", "subject-mathematics", "letters-mathematics"),
    "sentiment-products",
)
# Split c: domains that no learnware saw.
OUTSIDE = (
    *("role-abstracts", "subject-computing", "subject-law", "question-trivia", "letters-everyday"),
)
# Choices are made on these, and no claim is.
DEVELOPMENT = ("subject-business", "sentiment-tweets", "reuters-economy")


def get_config(size="cpu"):
    if size not in SIZES:
        raise ValueError(f"configs/study.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke, gpu, paper = size == "smoke", size == "gpu", size == "paper"
    tuned = finetune.get_config("qwen2.5-7b" if paper else "quickstart")
    tuned.workdir = f"runs/study-{size}/models"
    tuned.tasks, tuned.data = (), {}
    tuned.examples = 600
    if smoke:
        tuned.model.name, tuned.widths = "random-tiny", (512,)
    if not paper:
        tuned.steps = 4 if smoke else 60
    if gpu:
        tuned.together, tuned.steps = 16, 100
    return ConfigDict(
        dict(
            size=size,
            workdir=f"runs/study-{size}",
            dock=f"runs/study-{size}/dock",
            # Stop, to go on with the same command, after so many minutes; 0: at the end.
            minutes=0.0,
            model=tuned.model,
            template=tuned.template,
            **(
                dict(
                    docked=("recurrences", "binary-sizes", "loan-agreements"),
                    unseen=("asdiv-operations",),
                    outside=("medmcqa-specialties",),
                    development=("headlines",),
                )
                if smoke
                else dict(docked=DOCKED, unseen=UNSEEN, outside=OUTSIDE, development=DEVELOPMENT)
            ),
            variants=variants(size),
            finetune=tuned,
            # Steps, on the user's rows, of the base model that is a contender.
            few_shot_steps=2 if smoke else 20,
            # Of a user's rows: `user_rows` are drawn from the first `user_pool`, once a seed; every
            # model is graded on the first `graded_rows`.
            user_pool=16 if smoke else 96,
            user_rows=8 if smoke else 64,
            graded_rows=8 if smoke else 32,
            test_rows=12 if smoke else 200,
            development_rows=12 if smoke else 100,
            seeds=(0, 1) if smoke else (0, 1, 2),
            scoring=dict(
                dtype="bfloat16",
                batch_tokens=4096 if gpu or paper else 1024,
                # Models that answer at once; more than 1 is for accelerators.
                together=16 if gpu else 1,
            ),
            specification=build.specification(smoke),
            # Texts of its training that a learnware is specified by, at most.
            texts=16 if smoke else 200,
            # Of embedded answers beside embedded texts.
            answer_weight=1.0,
            # Rows of a learnware that its parameter vectors are fitted to.
            vector_rows=8 if smoke else 64,
            reference=dict(
                lora=dict(rank=16, alpha=32.0, targets=("query", "key", "value"), seed=0),
                widths=(40,) if smoke else (24, 40),
                dtype="bfloat16",
                together=8,
            ),
            # As published, but for the steps (400), and by the gradients of the start.
            fit=dict(
                steps=10 if smoke else 100,
                batch=2,
                rate=1e-5,
                decay=0.5,
                warmup=0.03,
                clip=1.0,
                pull=1.0,
            ),
            row_sketch=512,
            # Learnwares in a mixture, at most.
            mixture=3,
            # The best of these on the development tasks is the one that claims are made of.
            specifications=(
                *("rkme", "joint_rkme_answers", "joint_rkme_outputs"),
                *("pave_answers", "pave_outputs", "pave_prompts"),
                *("one_step_answers", "one_step_outputs", "one_step_prompts"),
            ),
            false_acceptance=0.3 if smoke else 0.1,
            draws=200 if smoke else 2000,
            level=0.95,
            seed=0,
        )
    )


def variants(size):
    """Learnwares of a task: how they are trained, and which tasks have one."""
    if size == "smoke":
        tasks = ("recurrences", "binary-sizes", "loan-agreements")
        return dict(full=variant(tasks), corrupted=variant(("recurrences",), corrupted=True))
    if size == "cpu":
        reports, abstracts = "sentiment-reports", "topic-abstracts"
        asdiv, news = "operation-asdiv", "topic-news"
        return dict(
            full=variant(DOCKED),
            seed=variant((reports, abstracts, news), seed=1),
            small=variant((reports, asdiv, news), examples=32),
            corrupted=variant((reports, abstracts, asdiv, news), corrupted=True),
        )
    return dict(
        full=variant(DOCKED),
        seed=variant(DOCKED, seed=1),
        seed2=variant(DOCKED, seed=2),
        seed3=variant(DOCKED, seed=3),
        small=variant(DOCKED, examples=32),
        small8=variant(DOCKED, examples=8),
        small128=variant(DOCKED, examples=128),
        corrupted=variant(DOCKED, corrupted=True),
    )


def variant(tasks, seed=0, examples=100_000, corrupted=False):
    # seed: of the adapter and of the order of examples. corrupted: answers shuffled over texts.
    return dict(tasks=tasks, seed=seed, examples=examples, corrupted=corrupted)
