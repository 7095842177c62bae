"""Labelled tasks: parts, balance, answers and what the catalogue holds."""

import functools
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from learnware_jax.dock import examples as choosing
from learnware_jax.dock.examples import (
    MAX_CHARACTERS,
    PARTS,
    Example,
    LabelledTask,
    read_examples,
)
from learnware_jax.dock.labelled import LABELLED, arithmetic, load_examples

MIRROR = os.environ.get("LEARNWARE_MIRROR", "../shared/data")
FAMILIES = ("sentiment", "hub")  # roles of tasks whose texts may be in others too


def toy(monkeypatch, examples):
    """Make the examples the task `toy`."""
    task = LabelledTask("toy", "dock", "x", "x", "", "x", "accuracy", lambda _: iter(examples))
    monkeypatch.setitem(LABELLED, "toy", task)


def load_all(name):
    return [example for part in PARTS for example in load_examples(name, part)]


def example(text, answer="a"):
    return Example(text, answer, ("a", "b", "c"))


def counted(**counts):
    """So many examples of every answer."""
    return [
        Example(f"{answer} {i}", answer, tuple(counts))
        for answer, count in counts.items()
        for i in range(count)
    ]


@pytest.fixture
def skewed(monkeypatch):
    examples = counted(a=1000, b=300, c=100)
    toy(monkeypatch, examples)
    return examples


def test_neither_order_nor_repetition_changes_a_part(skewed, monkeypatch):
    before = {part: load_examples("toy", part) for part in PARTS}
    toy(monkeypatch, random.Random(0).sample(skewed, len(skewed)) + skewed[:50])
    assert before == {part: load_examples("toy", part) for part in PARTS}


def test_shares_of_the_parts(monkeypatch):
    toy(monkeypatch, [Example(f"text {i}", str(i), ()) for i in range(4000)])
    sizes = [len(load_examples("toy", part)) for part in PARTS]
    # Four standard deviations of a binomial with 4,000 draws are at most 127.
    assert sizes == pytest.approx([2000, 400, 800, 800], abs=127)
    assert sum(sizes) == 4000  # numbers are not capped


def test_parts_of_a_hub_task_leave_more_to_test_on(monkeypatch):
    toy(monkeypatch, [Example(f"text {i}", str(i), ()) for i in range(4000)])
    monkeypatch.setitem(LABELLED, "toy", LABELLED["toy"]._replace(role="hub"))
    sizes = [len(load_examples("toy", part)) for part in PARTS]
    assert sizes == pytest.approx([2000, 200, 600, 1200], abs=127)


def test_several_parts_are_one_and_texts_can_be_left_out(skewed):
    apart = {part: {e.text for e in load_examples("toy", part)} for part in ("user", "test")}
    both = load_examples("toy", "user+test")
    # Balanced as a whole: the cap of the two together is not the sum of their caps.
    assert {e.text for e in both} - apart["user"] - apart["test"] <= {e.text for e in skewed}
    counts = Counter(e.answer for e in both)
    assert max(counts.values()) <= 0.4 * len(both) and set(counts) == {"a", "b", "c"}
    without = frozenset(e.text for e in both if e.answer == "a")
    left = load_examples("toy", "user+test", without=without)
    # Texts of a that were beyond its cap take the places of those left out.
    assert Counter(e.answer for e in left) == counts
    assert not without & {e.text for e in left}
    # Whatever the case and the punctuation.
    loud = frozenset(text.upper().replace(" ", ", ") + "!" for text in without)
    assert load_examples("toy", "user+test", without=loud) == left
    with pytest.raises(ValueError, match=r"'user\+tests' is no part"):
        load_examples("toy", "user+tests")


def test_cap_by_hand(monkeypatch):
    # Counts 8, 3, 1: 1.5 times the median is 4, and 4 > 0.4 * (4 + 3 + 1), 3 > 0.4 * (3 + 3 + 1),
    # 2 <= 0.4 * (2 + 2 + 1).
    monkeypatch.setattr(choosing, "_part", lambda text, bounds: "test")
    toy(monkeypatch, counted(a=8, b=3, c=1))
    found = load_examples("toy", "test")
    assert Counter(e.answer for e in found) == {"a": 2, "b": 2, "c": 1}
    # Counts 20, 4, 4, 4: the median's 6, which is under 0.4 * 18.
    toy(monkeypatch, counted(a=20, b=4, c=4, d=4))
    found = load_examples("toy", "test")
    assert Counter(e.answer for e in found) == {"a": 6, "b": 4, "c": 4, "d": 4}


def test_every_beginning_is_balanced(skewed):
    whole = load_examples("toy", "train")
    shares = Counter(e.answer for e in whole)
    for limit in (20, 50, 100):
        beginning = load_examples("toy", "train", limit)
        assert beginning == whole[:limit]
        for answer, count in Counter(e.answer for e in beginning).items():
            assert count == pytest.approx(shares[answer] * limit / len(whole), abs=1.5)


def test_a_text_with_two_answers_is_dropped_also_when_cutting_makes_it_one(monkeypatch):
    long = "word " * 100
    toy(
        monkeypatch,
        [
            example("same  text"),
            example("same text", "b"),
            example(long + "x"),
            example(long + "y", "b"),
            example("  "),
            example("twice"),
            example(" twice "),
            example("Peritonitis"),  # two tasks have it
            *counted(a=50, b=50, c=50),
        ],
    )
    monkeypatch.setattr(choosing, "_cap", lambda counts: 1000)
    found = [e.text for e in load_all("toy")]
    assert [text for text in found if text[:2] not in ("a ", "b ", "c ")] == ["twice"]
    assert len(found) == 151


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a" * 400, "a" * 320),
        ("a" * 320, "a" * 320),
        ("a" * 320 + " b", "a" * 320),
        ("a" * 318 + " b c", "a" * 318 + " b"),
        ("a" * 318 + " bc", "a" * 318),
    ],
)
def test_cut_between_words(monkeypatch, text, cut):
    toy(monkeypatch, [Example(text, "1", ())])
    assert [e.text for e in load_all("toy")] == [cut]


def test_arithmetic_is_right_and_fixed_by_its_seed():
    problems = list(arithmetic(0, "{a} + {b}", "{a} - {b}", "{a} * {b}"))
    assert problems == list(arithmetic(0, "{a} + {b}", "{a} - {b}", "{a} * {b}"))
    assert Example("91 - 2", "89", ()) in problems
    assert Example("12 * 9", "108", ()) in problems
    assert len(problems) == 2000
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: sum([a] * b),
    }
    for text, answer, choices in problems:
        a, operation, b = text.split()
        assert (answer, choices) == (str(operations[operation](int(a), int(b))), ())
        assert int(answer) >= 0


@pytest.mark.parametrize(
    ("name", "part", "limit", "message"),
    [
        (
            "asdiv-operation",
            "test",
            None,
            "no task is called 'asdiv-operation'.*did you mean asdiv-operations",
        ),
        ("recurrences", "tests", None, "'tests' is no part; wanted one of train, heldout, user,"),
        ("recurrences", "test", 0, "limit is 0, wanted at least 1"),
    ],
)
def test_errors_say_what_is_wanted(name, part, limit, message):
    with pytest.raises(ValueError, match=message):
        load_examples(name, part, limit)


@pytest.fixture(scope="module")
def catalogue():
    """Every part of every task; each source is read, and each text cut and hashed, only once."""
    with pytest.MonkeyPatch.context() as patch:
        for function in ("cut", "_part", "digest"):
            patch.setattr(choosing, function, functools.cache(getattr(choosing, function)))
        # Data sets of the hub are read where a mirror of them is at hand.
        if mirrored := Path(MIRROR).is_dir():
            patch.setenv("LEARNWARE_MIRROR", MIRROR)
        names = [name for name, task in LABELLED.items() if mirrored or "/" not in task.material]
        for name in names:
            rows = list(read_examples(LABELLED[name]))
            read = LABELLED[name]._replace(material="", read=lambda _, rows=rows: rows)
            patch.setitem(LABELLED, name, read)
        yield {name: {part: load_examples(name, part) for part in PARTS} for name in names}


def everything(catalogue):
    for name, parts in catalogue.items():
        for part, examples in parts.items():
            for e in examples:
                yield name, part, e


def test_names_roles_and_relatives():
    assert all(name == task.name for name, task in LABELLED.items())
    assert {task.role for task in LABELLED.values()} == {"dock", "unseen", *FAMILIES}
    assert {task.metric for task in LABELLED.values()} <= {"accuracy", "macro_f1", "exact"}
    docked = Counter(task.domain for task in LABELLED.values() if task.role == "dock")
    assert min(docked[domain] for domain in ("finance", "medicine", "mathematics")) >= 4
    assert {task.domain for task in LABELLED.values() if task.role == "unseen"} <= set(docked)


def test_no_text_lies_in_two_tasks_or_two_parts(catalogue):
    places, count = {}, 0
    for name, part, e in everything(catalogue):
        if LABELLED[name].role not in FAMILIES:
            assert places.setdefault(e.text, (name, part)) == (name, part), e
            count += 1
    assert len(places) == count


def test_a_text_of_two_sources_lies_in_one_part(catalogue):
    parts, tasks = {}, {}
    for name, part, e in everything(catalogue):
        if LABELLED[name].role == "sentiment":
            assert parts.setdefault(e.text, part) == part, e
            tasks.setdefault(e.text, set()).add(name)
    assert sum(len(names) > 1 for names in tasks.values()) < 0.001 * len(tasks)


def test_a_family_shares_instruction_and_labels_and_differs_in_source(catalogue):
    family = [task for task in LABELLED.values() if task.role == "sentiment"]
    assert len(family) == 10 and len({task.instruction for task in family}) == 1
    choices = {
        parts["test"][0].choices for name, parts in catalogue.items() if "sentiment-" in name
    }
    assert choices == {("positive", "negative")}
    # Two tasks of one material read different files of it.
    assert len({(task.material, task.description) for task in family}) == 10


def test_every_task_has_enough_examples(catalogue):
    for name, parts in catalogue.items():
        wanted = {"dock": (300, 50, 100, 100), "hub": (90, 4, 30, 50)}.get(
            LABELLED[name].role, (200, 30, 100, 100)
        )
        assert all(len(parts[p]) >= n for p, n in zip(PARTS, wanted, strict=True)), name


def test_answers_and_balance(catalogue):
    for name, parts in catalogue.items():
        for part, examples in parts.items():
            choices = examples[0].choices
            counts = Counter(e.answer for e in examples)
            assert all(e.choices == choices for e in examples)
            if LABELLED[name].metric == "exact":
                assert choices == ()
                assert all(re.fullmatch(r"-?\d+", answer) for answer in counts)
                assert max(counts.values()) <= 0.1 * len(examples)
            else:
                assert set(counts) == set(choices), (name, part)
                share = 0.5 if len(choices) == 2 else 0.4
                assert max(counts.values()) <= share * len(examples), (name, part)


def test_earnings_say_what_they_report(catalogue):
    words = {"profit": r"\b(shr|net)\b", "loss": r"\b(shr|net) loss\b", "dividend": "div|payout"}
    for examples in catalogue["reuters-earnings"].values():
        for e in examples:
            assert re.search(words[e.answer], e.text), e
            assert e.answer == "loss" or "loss" not in e.text.split() or e.answer == "dividend", e


def test_instructions_name_every_label_and_no_text_holds_them(catalogue):
    for name, parts in catalogue.items():
        instruction = LABELLED[name].instruction
        named = set(re.findall("[a-z]+|[A-E]", instruction))
        assert set(parts["test"][0].choices) <= named, name
    for name, _, e in everything(catalogue):
        assert LABELLED[name].instruction not in e.text
        assert 0 < len(e.text) <= MAX_CHARACTERS
        assert e.text == " ".join(e.text.split())


def test_known_answers(catalogue):
    found = {e.text: e.answer for _, _, e in everything(catalogue)}
    for text, answer in (
        # log_2 of 802001315 is 29.6, more than 2; log_11 of 884311984 is 8.6, less than 10
        ("T(n) = 802001315T(n/2) + O(n^2)", "recursion"),
        ("T(n) = 884311984T(n/11) + O(n^10)", "rest"),
        # 6584 - 4808 is 1776; 11765 // 18 is 653
        ("01100110111000 - 01001011001000", "four"),
        ("010110111110101 // 010010", "three"),
        ("Nondisplaced fracture of proximal phalanx of right middle finger", "hand"),
        ("Late congenital syphilis, latent", "infection"),
        (
            "Rachel bought 8 music albums online. If each album had 2 songs, how many songs did "
            "she buy total?",
            "multiply",
        ),
        (
            "A museum had ninety-eight paintings. After they got rid of some, they had "
            "ninety-five left. How many paintings did they get rid of?",
            "subtract",
        ),
        # a mean rating of 2.7, of -4 to 4
        (
            "Somehow I was blessed with some really amazing friends in my life who love me and "
            "send encouragement when I'm not feeling awesome. So lucky.",
            "positive",
        ),
        (
            "cheney wows sept. 11 commission by drinking glass of water while bush speaks",
            "sarcastic",
        ),
    ):
        assert found[text] == answer
