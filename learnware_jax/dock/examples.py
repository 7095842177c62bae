"""Tasks with answers: their parts, and how examples are chosen, cut and balanced."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from learnware_jax.dock.materials import fetch, fetch_dataset
from learnware_jax.dock.tasks import SHARED
from learnware_jax.dock.texts import digest

MAX_CHARACTERS = 320
PARTS = ("train", "heldout", "user", "test")
# Of the parts: where each ends. Data sets of the hub are small: they have more to test on.
_BOUNDS = (0.5, 0.6, 0.8, 1.0)
_HUB_BOUNDS = (0.5, 0.55, 0.7, 1.0)


class Example(NamedTuple):
    """A text as a model is given it, without instruction, options or answer.

    `answer` is one of `choices`, or a number where these are empty.
    """

    text: str
    answer: str
    choices: tuple[str, ...]


class LabelledTask(NamedTuple):
    """Examples with one origin; `read` yields them, uncut, from the folder of `material`.

    role: "dock" tasks are for learnwares, "unseen" ones for users alone; these have a relative
    among the dock's. "sentiment" tasks are one family: other sources, the same instruction and
    labels. "hub" tasks are the other families, of data sets by hub id. Texts of a task of a family
    may be in other tasks too.
    `material` names what `materials.fetch` knows, or data sets OWNER/NAME[/CONFIG][:SPLIT] with
    blanks between, and then `read` takes their files; where it is empty the examples are generated.
    `instruction` goes before the text of a prompt; it names the labels, of which each begins with
    another token of SmolLM2. metric: "accuracy", or "exact" for numbers.
    """

    name: str
    role: str
    domain: str
    description: str
    material: str
    instruction: str
    metric: str
    read: Callable[[Path | list[Path]], Iterable[Example]]


def read_examples(task: LabelledTask) -> Iterable[Example]:
    """All examples of a task as its source has them, fetched if need be."""
    if "/" in task.material:
        return task.read([file for name in task.material.split() for file in fetch_dataset(name)])
    return task.read(fetch(task.material) if task.material else Path())


def choose_examples(
    task: LabelledTask, part: str, limit: int | None = None, without: frozenset[str] = frozenset()
) -> list[Example]:
    """At most `limit` examples of one part of a task, with distinct texts of MAX_CHARACTERS.

    `part` may be several, as "train+test". Texts with the words of one in `without` are left out
    first, whatever their case and punctuation.
    Part, choice and order are fixed by the texts' hashes: a smaller limit gives the beginning of
    the same list, and the labels' shares are alike in every beginning. No label has more than
    two fifths of a part (a half of two labels) or 1.5 times the median label's examples; numbers
    are not so balanced. A text with two answers is left out. ValueError for another part or a limit
    below 1.
    """
    parts = part.split("+")
    if not set(parts) <= set(PARTS):
        raise ValueError(f"load_examples: {part!r} is no part; wanted one of {', '.join(PARTS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"load_examples: limit is {limit}, wanted at least 1.")
    bounds = _HUB_BOUNDS if task.role == "hub" else _BOUNDS
    known = {_words(text) for text in without}
    examples = [
        example
        for example in _distinct(read_examples(task))
        if _part(example.text, bounds) in parts and _words(example.text) not in known
    ]
    return _balanced(examples)[:limit]


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """Examples with clean, cut texts, each once; none of a text with two answers or tasks."""
    found = {}
    for example in examples:
        text = cut(example.text)
        if text and not text.startswith(SHARED):
            found.setdefault(text, set()).add(example._replace(text=text))
    return [versions.pop() for versions in found.values() if len(versions) == 1]


def cut(text: str, characters: int = MAX_CHARACTERS) -> str:
    """The text with runs of white space made one blank, cut between words."""
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    return text[: characters + 1].rsplit(" ", 1)[0][:characters]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _part(text: str, bounds: Sequence[float]) -> str:
    position = int.from_bytes(digest("part", text)[:8]) / 2**64
    return next(part for part, end in zip(PARTS, bounds, strict=True) if position < end)


def _balanced(examples: Sequence[Example]) -> list[Example]:
    """The examples that the labels' cap leaves, in an order whose beginnings are balanced too."""
    labels = defaultdict(list)
    for example in sorted(examples, key=lambda example: digest("balance", example.text)):
        labels[example.answer if example.choices else ""].append(example)
    cap = len(examples) if "" in labels else _cap([len(group) for group in labels.values()])
    quantiles = [
        ((rank + 0.5) / min(len(group), cap), digest("balance", example.text), example)
        for group in labels.values()
        for rank, example in enumerate(group[:cap])
    ]
    return [example for _, _, example in sorted(quantiles)]


def _cap(counts: Sequence[int]) -> int:
    """How many examples a label may have, given how many each has."""
    share = 0.4 if len(counts) > 2 else 0.5
    cap = int(1.5 * statistics.median(counts)) if counts else 0
    while cap > share * sum(min(count, cap) for count in counts):
        cap -= 1
    return cap


_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {
    **{word: value for value, word in enumerate(_UNITS)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}
_NUMBER = re.compile(
    rf"\d+(?:\.\d+)?|\b(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_UNITS[1:10])}))?\b"
    rf"|\b(?:{'|'.join(_UNITS)})\b"
)


def _numbers(text: str) -> list[float]:
    """Numbers in digits or, below a hundred, in words."""
    found = _NUMBER.findall(text.lower().replace(",", ""))
    return [
        float(number if number[0].isdigit() else sum(_WORDS[w] for w in re.split("[ -]", number)))
        for number in found
    ]


def operation(text: str, answer: str) -> str | None:
    """The one operation that gives the answer from the text's two numbers; None if none is."""
    numbers, results = _numbers(text), _numbers(answer)
    if len(numbers) != 2 or len(results) != 1 or min(numbers) == 0:
        return None
    low, high = sorted(numbers)
    values = {
        "add": low + high,
        "subtract": high - low,
        "multiply": low * high,
        "divide": high / low,
    }
    fitting = [name for name, value in values.items() if abs(value - results[0]) < 1e-6]
    return fitting[0] if len(fitting) == 1 else None
