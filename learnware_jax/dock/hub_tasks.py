"""Tasks with answers out of data sets by hub id, in families that share labels or a form of answer.

A task's name begins with its family: sentiment (the first of it are in `labelled`), topic, intent,
entity, mention, section, letters, operation, type, answer, subject, role and question. What is long
is cut to CHARACTERS, so that a laptop can run many models on many tasks; questions with options,
which would lose some, are left out where they are longer than OPTIONS_CHARACTERS.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from learnware_jax.dock.examples import Example, LabelledTask, cut, operation

CHARACTERS = 140
OPTIONS_CHARACTERS = 160


def _rows(files: Sequence[Path]) -> Iterator[dict]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _by(text: str | Callable, answer: str | Callable, labels: Mapping):
    """Examples of rows: a text, and an answer that `labels` has a label for.

    `text` and `answer` are columns, or functions of a row.
    """
    choices = tuple(dict.fromkeys(labels.values()))

    def of(row, part):
        return part(row) if callable(part) else row[part]

    def read(files):
        for row in _rows(files):
            label = labels.get(of(row, answer))
            if label is not None:
                yield Example(cut(of(row, text), CHARACTERS), label, choices)

    return read


def _words_within(words: Sequence[str]) -> int:
    """How many of the words `cut` leaves of their text."""
    return len(cut(" ".join(words), CHARACTERS).split())


def _entities(tokens: str, tags: str, labels: Mapping[int, str], others: Sequence[int] = ()):
    """The first name of every sentence, before the sentence; `labels` by the tag that begins it.

    Names that begin with one of the `others` have no label.
    """
    choices = tuple(labels.values())

    def read(files):
        for row in _rows(files):
            words, marks = row[tokens], row[tags]
            start = next((i for i, mark in enumerate(marks) if mark in labels), None)
            if start is None:
                continue
            end = start + 1
            while end < len(marks) and marks[end] not in (0, *labels, *others):
                end += 1
            text = f"{' '.join(words[start:end])}: {' '.join(words)}"
            yield Example(cut(text, CHARACTERS), labels[marks[start]], choices)

    return read


def _sentences(labels: Mapping[str, str]):
    """Sentences of abstracts by their role."""

    def read(files):
        for row in _rows(files):
            for sentence, role in zip(row["sentences"], row["labels"], strict=True):
                if role in labels:
                    yield Example(cut(sentence, CHARACTERS), labels[role], tuple(labels.values()))

    return read


def _letters(question: Callable[[dict], tuple[str, Sequence[str], int | str]], count: int):
    """Questions with lettered options. `question`: a row's question, options and right one."""
    letters = "ABCDE"[:count]

    def read(files):
        for row in _rows(files):
            text, options, right = question(row)
            if len(options) != count:
                continue
            listed = " ".join(f"{a}. {o}" for a, o in zip(letters, options, strict=True))
            text = " ".join(f"{text} {listed}".split())
            if len(text) <= OPTIONS_CHARACTERS:
                letter = letters[right] if isinstance(right, int) else right.upper()
                yield Example(text, letter, tuple(letters))

    return read


def _operations(text: Callable[[dict], str], answer: Callable[[dict], str]):
    """Word problems with two numbers, by the operation that gives the answer."""
    names = ("add", "subtract", "multiply", "divide")

    def read(files):
        for row in _rows(files):
            if (name := operation(text(row), answer(row))) is not None:
                yield Example(text(row), name, names)

    return read


def _mathqa(row: dict) -> tuple[str, list[str], str]:
    # All options are one string: "A ) 24 , B ) 120 , ..."
    options = [option.strip(" ,") for option in re.split(r"[A-E] \) ", row["options"])[1:]]
    return row["Problem"], options, row["correct"]


def _mmlu(*subjects: str) -> str:
    return " ".join(f"cais/mmlu/{subject}:test" for subject in subjects)


def _task(name: str, domain: str, description: str, material: str, instruction: str, read):
    return LabelledTask(name, "hub", domain, description, material, instruction, "accuracy", read)


def _subjects(name: str, domain: str, description: str, labels: Mapping[str, str]):
    named = [*labels.values()]
    instruction = f"Name the subject: {', '.join(named[:-1])} or {named[-1]}."
    reader = _by("question", "subject", labels)
    return _task(f"subject-{name}", domain, description, _mmlu(*labels), instruction, reader)


_BANKING = {
    "cash": "declined_cash_withdrawal pending_cash_withdrawal cash_withdrawal_charge "
    "cash_withdrawal_not_recognised wrong_amount_of_cash_received",
    "transfer": "failed_transfer declined_transfer pending_transfer cancel_transfer "
    "transfer_timing transfer_fee_charged transfer_not_received_by_recipient",
    "deposit": "top_up_failed top_up_reverted pending_top_up automatic_top_up top_up_limits "
    "verify_top_up",
    "delivery": "card_arrival card_delivery_estimate order_physical_card getting_spare_card",
    "identity": "verify_my_identity why_verify_identity unable_to_verify_identity",
    "exchange": "exchange_rate exchange_via_app exchange_charge fiat_currency_support",
    "refund": "request_refund Refund_not_showing_up",
    "theft": "lost_or_stolen_phone lost_or_stolen_card compromised_card",
}
_LETTERS = "Answer with the letter of the right option: A, B, C{} or {}."
_ENTITY = "Is the name before the colon a person, place or company?"
_OPERATION = "Which operation solves this: add, subtract, multiply or divide?"

HUB_TASKS = (
    _task(
        "sentiment-snippets",
        "reviews",
        "phrases of film reviews, by sentiment",
        "stanfordnlp/sst2",
        "Is the sentiment of this text positive or negative?",
        _by("sentence", "label", {1: "positive", 0: "negative"}),
    ),
    _task(
        "topic-markets",
        "finance",
        "tweets on markets, by topic",
        "zeroshot/twitter-financial-news-topic",
        "Name the topic: company, economy, earnings, politics, rates, energy, law or bonds.",
        _by(
            "text",
            "label",
            {
                2: "company",
                14: "economy",
                5: "earnings",
                16: "politics",
                1: "rates",
                6: "energy",
                12: "law",
                3: "bonds",
            },
        ),
    ),
    _task(
        "intent-banking",
        "finance",
        "messages of a bank's customers, by what they are about",
        "PolyAI/banking77",
        "Name the intent: cash, transfer, deposit, delivery, identity, exchange, refund or theft.",
        _by(
            "text",
            "label_text",
            {name: label for label, names in _BANKING.items() for name in names.split()},
        ),
    ),
    _task(
        "entity-news",
        "finance",
        "names in financial news, by kind",
        "gtfintechlab/finer-ord",
        _ENTITY,
        _entities("gold_token", "gold_label", {1: "person", 3: "place", 5: "company"}),
    ),
    _task(
        "entity-filings",
        "finance",
        "names in loan agreements, by kind",
        "tner/fin",
        _ENTITY,
        _entities("tokens", "tags", {1: "person", 2: "place", 3: "company"}, others=[4]),
    ),
    _subjects(
        "business",
        "finance",
        "examination questions on business, by subject",
        {
            "high_school_macroeconomics": "economy",
            "high_school_microeconomics": "prices",
            "professional_accounting": "accounting",
            "marketing": "marketing",
            "management": "management",
            "econometrics": "statistics",
            "business_ethics": "ethics",
        },
    ),
    _task(
        "topic-abstracts",
        "medicine",
        "abstracts of medical papers, by condition",
        "TimSchopf/medical_abstracts",
        "Name the condition: cancer, digestion, nerves, heart or general.",
        _by(
            "medical_abstract",
            "condition_label",
            {1: "cancer", 2: "digestion", 3: "nerves", 4: "heart", 5: "general"},
        ),
    ),
    _task(
        "topic-hallmarks",
        "medicine",
        "sentences on cancer, by hallmark",
        "bigbio/hallmarks_of_cancer",
        "Name the topic: growth, mutation, death, invasion, inflammation, vessels or energy.",
        _by(
            "text",
            lambda row: row["labels"][0] if len(row["labels"]) == 1 else None,
            {
                "sustaining proliferative signaling": "growth",
                "genomic instability and mutation": "mutation",
                "resisting cell death": "death",
                "activating invasion and metastasis": "invasion",
                "tumor promoting inflammation": "inflammation",
                "inducing angiogenesis": "vessels",
                "cellular energetics": "energy",
            },
        ),
    ),
    _task(
        "mention-diseases",
        "medicine",
        "sentences of abstracts, by whether they name a disease",
        "ncbi/ncbi_disease",
        "Does this sentence name a disease: yes or no?",
        _by(
            lambda row: " ".join(row["tokens"]),
            # Cut as the text is: a disease behind the cut is not named.
            lambda row: any(row["ner_tags"][: _words_within(row["tokens"])]),
            {True: "yes", False: "no"},
        ),
    ),
    _task(
        "letters-medicine",
        "medicine",
        "examination questions on medicine, by the letter of the right option",
        "openlifescienceai/medmcqa",
        _LETTERS.format("", "D"),
        _letters(lambda r: (r["question"], [r["opa"], r["opb"], r["opc"], r["opd"]], r["cop"]), 4),
    ),
    _task(
        "section-patients",
        "medicine",
        "information for patients, by what it tells of a disease",
        "medalpaca/medical_meadow_wikidoc_patient_information",
        "Name what this tells of a disease: symptoms, emergency, outlook or risk.",
        _by(
            "output",
            lambda row: " ".join(row["input"].split()[:4]).lower(),
            {
                "what are the symptoms": "symptoms",
                "when to seek urgent": "emergency",
                "what to expect if": "outlook",
                "who is at highest": "risk",
            },
        ),
    ),
    _subjects(
        "medicine",
        "medicine",
        "examination questions on medicine, by subject",
        {
            "anatomy": "anatomy",
            "nutrition": "nutrition",
            "virology": "viruses",
            "medical_genetics": "genetics",
            "human_aging": "aging",
            "college_biology": "biology",
        },
    ),
    _task(
        "operation-asdiv",
        "mathematics",
        "word problems of primary school, by operation",
        "EleutherAI/asdiv",
        _OPERATION,
        _operations(lambda r: f"{r['body']} {r['question']}", lambda r: r["answer"]),
    ),
    _task(
        "operation-mawps",
        "mathematics",
        "word problems of other authors, by operation",
        "local/mawps",
        _OPERATION,
        _operations(lambda r: r["question"], lambda r: str(r["answer"])),
    ),
    _task(
        "type-competition",
        "mathematics",
        "problems of mathematics competitions, by field",
        "hendrycks/competition_math",
        "Name the field: algebra, arithmetic, functions, geometry, numbers or probability.",
        _by(
            "problem",
            "type",
            {
                "Algebra": "algebra",
                "Prealgebra": "arithmetic",
                "Precalculus": "functions",
                "Geometry": "geometry",
                "Number Theory": "numbers",
                "Counting & Probability": "probability",
            },
        ),
    ),
    _task(
        "answer-tables",
        "mathematics",
        "word problems with a table, by the form of the answer",
        "lupantech/TabMWP",
        "Name the form of the answer: integer, decimal, text or boolean.",
        _by(
            "question",
            "ans_type",
            {
                "integer_number": "integer",
                "decimal_number": "decimal",
                "extractive_text": "text",
                "boolean_text": "boolean",
            },
        ),
    ),
    _subjects(
        "mathematics",
        "mathematics",
        "examination questions on mathematics, by course",
        {
            "abstract_algebra": "algebra",
            "college_mathematics": "college",
            "elementary_mathematics": "elementary",
            "high_school_mathematics": "school",
            "high_school_statistics": "statistics",
        },
    ),
    _task(
        "letters-mathematics",
        "mathematics",
        "word problems, by the letter of the right option",
        "allenai/math_qa",
        _LETTERS.format(", D", "E"),
        _letters(_mathqa, 5),
    ),
    _task(
        "topic-news",
        "news",
        "news, by topic",
        "fancyzhx/ag_news",
        "Name the topic: world, sports, business or technology.",
        _by("text", "label", {0: "world", 1: "sports", 2: "business", 3: "technology"}),
    ),
    _task(
        "role-abstracts",
        "computing",
        "sentences of computing abstracts, by role",
        "allenai/csabstruct",
        "Name the role of this sentence: background, objective, method or result.",
        _sentences({role: role for role in ("background", "objective", "method", "result")}),
    ),
    _subjects(
        "computing",
        "computing",
        "examination questions on computing, by course",
        {
            "college_computer_science": "college",
            "high_school_computer_science": "school",
            "machine_learning": "learning",
        },
    ),
    _subjects(
        "law",
        "law",
        "examination questions on law, by field",
        {
            "professional_law": "professional",
            "international_law": "international",
            "jurisprudence": "theory",
        },
    ),
    _task(
        "question-trivia",
        "trivia",
        "questions, by the kind of answer",
        "CogComp/trec",
        "Name the kind of answer: thing, description, person, place or number.",
        _by(
            "text",
            "coarse_label",
            {
                1: "thing",
                2: "description",
                3: "person",
                4: "place",
                5: "number",
            },
        ),
    ),
    _task(
        "letters-everyday",
        "everyday",
        "questions of common sense, by the letter of the right option",
        "tau/commonsense_qa",
        _LETTERS.format(", D", "E"),
        _letters(lambda r: (r["question"], r["choices"]["text"], r["answerKey"]), 5),
    ),
)
