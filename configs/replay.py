"""Published scores of language models, replayed: what selection gained, and how sure that is.

python -m experiments.replay --config=configs/replay.py:finance --config.scores=FILE
python -m experiments.replay --config=configs/replay.py:medical --config.scores=FILE
python -m experiments.replay --config=configs/replay.py:math --config.scores=FILE
    The tables of arXiv 2505.13425, section 4, from the scores of every model on every task: 5 s.
    FILE is a CSV: a header, a row a user task, its name first, then a number for every model, per
    cent. Models named DATASET-NUMBER are learnwares, others are there for reference. The authors'
    are in the repository Learnware-LAMDA/Learnware under
    examples/dataset_llm_workflow/model_performance. Averages of random, selected, best-single and
    oracle: finance 56.25, 66.60, 59.69, 67.79; medical 74.09, 75.13, 74.83, 75.77; math 51.10,
    52.62, 52.08, 54.89.
--config.picks=FILE
    Your picks instead of the published ones, a row a task: a CSV of two columns, the task and a
    data set (scored by the mean of its learnwares) or one learnware; or one of similarities, a
    column a data set or learnware, of which the highest is picked.
"""

from ml_collections import ConfigDict

SIZES = ("finance", "medical", "math")


def get_config(size="finance"):
    if size not in SIZES:
        raise ValueError(f"configs/replay.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    return ConfigDict(
        dict(
            workdir=f"runs/replay-{size}",
            scores="",
            picks="",
            # Scores of the published picks, the column "Learnware" of the tables of arXiv
            # 2505.13425. Which data sets they are follows from the scores.
            published=PUBLISHED[size],
            # User task -> learnware data sets that share a data set with it.
            shared=SHARED[size],
            # Draws of tasks, and the level of the intervals that come of them.
            draws=2000,
            level=0.95,
            # Average ranks further apart than the critical difference of this level are told apart.
            alpha=0.05,
            seed=0,
        )
    )


PUBLISHED = dict(
    finance=dict(
        australian=56.83,
        cra_lendingclub=92.07,
        fiqasa=76.38,
        fpb=84.25,
        german=67.06,
        headlines=95.61,
        ner=52.79,
        sm_acl=52.82,
        sm_bigdata=52.40,
        sm_cikm=55.99,
        causal20_sc=84.17,
        finarg_ecc_arc=64.31,
        finarg_ecc_auc=58.08,
        fomc=62.70,
        ma=79.81,
        mlesg=33.42,
        multifin_en=63.46,
    ),
    medical=dict(
        medmcqa=62.49,
        medqa_4options=65.59,
        anatomy=71.85,
        clinical_knowledge=78.87,
        college_biology=85.42,
        college_medicine=69.36,
        medical_genetics=87.00,
        professional_medicine=79.78,
        pubmedqa=75.80,
    ),
    math=dict(
        agieval_aqua_rat=38.98,
        agieval_gaokao_mathcloze=17.80,
        agieval_gaokao_mathqa=51.57,
        agieval_math=20.60,
        agieval_sat_math=57.27,
        cmmlu_college_mathematics=52.38,
        cmmlu_elementary_mathematics=66.96,
        cmmlu_high_school_mathematics=60.98,
        gsm8k=84.15,
        mathqa=41.41,
        mgsm_native_cot_zh=73.60,
        minerva_math=36.48,
        abstract_algebra=56.00,
        college_mathematics=53.00,
        elementary_mathematics=75.13,
        high_school_mathematics=55.56,
    ),
)

# A judgement: data are shared where a learnware was trained on rows, of whatever split, of the data
# set that a user's task is, or on what was made of them. Judged by the data sets' names and cards.
GSM8K = ("GSM8K_zh", "MetaMathQA", "MetaMath-GSM240K", "MathInstruct", "Arithmo-Data")
MATH = ("MATH_train", "MetaMathQA", "MathInstruct", "Arithmo-Data")
SHARED = dict(
    # Ten learnware data sets are the training splits of ten user tasks.
    finance={
        name: (name,)
        for name in (
            *("australian", "cra_lendingclub", "fiqasa", "fpb", "german", "headlines", "ner"),
            *("sm_acl", "sm_bigdata", "sm_cikm"),
        )
    },
    # pubmedqa shares none: pubmed_causal has other rows of PubMed, sentences by how they state
    # causes (Yu et al., EMNLP 2019). No card names MMLU, of which the other users are.
    medical=dict(
        medmcqa=("medmcqa_train", "medqa_train&medmcqa_train"),
        medqa_4options=("medqa_train", "medqa_train&pubmed_causal", "medqa_train&medmcqa_train"),
    ),
    # MetaMathQA is made of the training questions of GSM8K and MATH, MetaMath-GSM240K of those of
    # GSM8K; MathInstruct holds both, AQuA-RAT and MathQA; Arithmo-Data holds MetaMathQA and
    # MathInstruct; GSM8K_zh and MGSM translate GSM8K. MWP-Instruct's card tells no source.
    math=dict(
        gsm8k=GSM8K,
        mgsm_native_cot_zh=GSM8K,
        agieval_math=MATH,
        minerva_math=MATH,
        agieval_aqua_rat=("MathInstruct", "Arithmo-Data"),
        mathqa=("MathInstruct", "Arithmo-Data"),
    ),
)
