"""What experiments share about language models: opened, prompted, given examples to learn."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.common import bar
from learnware_jax.dock import store
from learnware_jax.dock.labelled import LABELLED, Example, LabelledTask
from learnware_jax.dock.materials import MATERIALS, fetch, suggestion
from learnware_jax.slm import evaluate, lora, prompts
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.finetune import Text
from learnware_jax.slm.lora import init_adapter
from learnware_jax.slm.prompts import TEMPLATES, Template
from learnware_jax.slm.weights import Model, load_hub, load_model


def open_model(settings: ConfigDict) -> Model:
    """The model of `settings.name`: a material, a file or folder, or OWNER/NAME of the hub."""
    name = settings.name
    if name in MATERIALS:
        return load_model(fetch(name), dtype=settings.dtype)._replace(name=name)
    path = Path(name).expanduser()
    # What looks like a path is never sent to the hub.
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return load_model(path, dtype=settings.dtype)
    return load_hub(name, dtype=settings.dtype)


def template_of(name: str) -> Template:
    """The prompt template of that name. ValueError lists the known ones."""
    if name not in TEMPLATES:
        raise ValueError(
            f"template: got {name!r}{suggestion(name, TEMPLATES)}; want one of "
            f"{', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


def labelled_of(names: Sequence[str]) -> list[LabelledTask]:
    """The labelled tasks under these names; a role stands for all of its tasks."""
    chosen = []
    for name in names:
        found = [task for task in LABELLED.values() if name in (task.name, task.role)]
        if not found:
            raise ValueError(
                f"labelled: {name!r} is no task of learnware_jax.dock.labelled.LABELLED and no "
                f"role{suggestion(name, LABELLED)}."
            )
        chosen += found
    return chosen


def encode(model: Model, text: str) -> list[int]:
    """Tokens of a text, without any put before or behind it."""
    return model.tokenizer.encode(text, add_special_tokens=False).ids


def prompt_of(model: Model, template: Template, instruction: str, text: str) -> list[int]:
    """Tokens of a prompt, behind the one that the family puts before every text."""
    start = [] if model.start is None else [model.start]
    return start + encode(model, prompts.render(template, instruction=instruction, text=text))


def lesson(
    model: Model, template: Template, instruction: str, example: Example, *, learn: str = "answer"
) -> Text:
    """An example to learn from: its answer and the end of it, or (`learn` = "text") all of it."""
    prompt = prompt_of(model, template, instruction, example.text)
    ids = [*prompt, *encode(model, f" {example.answer}"), model.end]
    return Text(ids, len(prompt) if learn == "answer" else 1)


def describe(model: Model, template: Template) -> dict:
    """What a learnware's card says of the model that its adapter is for."""
    return {
        "name": model.name,
        "weights_sha256": model.weights_sha256,
        "tokenizer_sha256": model.tokenizer_sha256,
        "template": template.name,
        "template_sha256": prompts.sha256(template),
    }


def with_base(adapters: Adapter) -> Adapter:
    """A stack with one more adapter in front, which changes nothing: the base model."""
    return jax.tree.map(lambda leaf: jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf]), adapters)


class Scored(NamedTuple):
    """What adapters answered: labels or texts, and whether they are right; (adapters, items)."""

    answers: list[list[str]]
    correct: np.ndarray
    scores: np.ndarray | None  # (adapters, items, choices) in nats, where there are choices


def scorer(model: Model, template: Template, instruction: str, examples, settings: ConfigDict):
    """A function from a stack of adapters to the log-likelihoods of the examples' choices."""
    questions = [
        evaluate.Question(
            prompt_of(model, template, instruction, example.text),
            [encode(model, f" {choice}") for choice in example.choices],
        )
        for example in examples
    ]

    def score(adapters: Adapter) -> np.ndarray:
        with bar(f"scoring {len(adapters.scale)} models", len(questions)) as advance:
            return evaluate.choice_scores(
                model.params,
                model.config,
                questions,
                adapters=adapters,
                dtype=settings.dtype,
                batch_tokens=settings.batch_tokens,
                together=settings.together,
                done=advance,
            )

    return score


def chosen(examples: Sequence[Example], scores: np.ndarray, *, by: str) -> list[str]:
    """The choice of the greatest score (n, c) of every example.

    by: "sum" takes log-likelihoods as they are, "bytes" divides each by the length of its choice.
    """
    picks = []
    for example, row in zip(examples, scores, strict=True):
        row = row[: len(example.choices)]
        if by == "bytes":
            row = row / [len(choice.encode()) for choice in example.choices]
        picks.append(example.choices[int(np.argmax(row))])
    return picks


def score_examples(
    model: Model,
    template: Template,
    instruction: str,
    examples: Sequence[Example],
    adapters: Adapter,
    settings: ConfigDict,
) -> Scored:
    """Answers of every adapter of a stack to the same examples."""
    if examples[0].choices:
        scores = scorer(model, template, instruction, examples, settings)(adapters)
        answers = [chosen(examples, each, by=settings.by) for each in scores]
        correct = [[a == e.answer for a, e in zip(each, examples, strict=True)] for each in answers]
        return Scored(answers, np.array(correct), scores)
    with bar(f"answers of {len(adapters.scale)} models", len(examples)) as advance:
        tokens = evaluate.answers(
            model.params,
            model.config,
            [prompt_of(model, template, instruction, example.text) for example in examples],
            adapters=adapters,
            steps=settings.answer_tokens,
            end=model.end,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            together=settings.together,
            done=advance,
        )
    answers = [[model.tokenizer.decode(ids).strip() for ids in each] for each in tokens]
    correct = [
        [evaluate.same_number(a, e.answer) for a, e in zip(each, examples, strict=True)]
        for each in answers
    ]
    return Scored(answers, np.array(correct), None)


def dock_adapters(
    path: str, learnwares: Sequence[store.Learnware], model: Model, template: Template
) -> Adapter:
    """The adapters of a dock's learnwares as a stack, padded to one shape.

    ValueError if one has no adapter, or was trained on another model or template than these.
    """
    wanted = describe(model, template)
    for learnware in learnwares:
        if "adapter" not in learnware.card:
            raise ValueError(
                f"{path}: {learnware.id!r} has no adapter, so there is no model to use; use a dock "
                "whose learnwares have one, such as docks/quickstart."
            )
        have = learnware.card["model"]
        for field in ("weights_sha256", "tokenizer_sha256", "template_sha256"):
            if have[field] != wanted[field]:
                raise ValueError(
                    f"{path}: the adapter of {learnware.id!r} is for {have['name']} and template "
                    f"{have['template']!r}, with {field} {have[field]}; at hand is {model.name} "
                    f"with {wanted[field]}. Set model.name and template to those."
                )
    read = [
        lora.from_peft(store.read_adapter(path, learnware.id), model.config)
        for learnware in learnwares
    ]
    targets = sorted({name for adapter in read for name in adapter.a})
    rank = max(a.shape[-1] for adapter in read for a in adapter.a.values())
    like = init_adapter(jax.random.key(0), model.config, rank=rank, alpha=1.0, targets=targets)
    return lora.stack([lora.pad(adapter, like) for adapter in read])
