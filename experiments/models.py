"""What experiments share about language models: opened, prompted, given examples to learn."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.common import bar, say
from learnware_jax.dock import store
from learnware_jax.dock.labelled import LABELLED, Example, LabelledTask
from learnware_jax.dock.materials import MATERIALS, fetch, suggestion
from learnware_jax.slm import decoder, evaluate, lora, prompts
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.finetune import Text
from learnware_jax.slm.lora import init_adapter
from learnware_jax.slm.prompts import TEMPLATES, Template
from learnware_jax.slm.weights import Model, load_hub, load_model
from learnware_jax.specification.header import printable

RANDOM_TINY = "random-tiny"


def open_model(settings: ConfigDict) -> Model:
    """The model of `settings.name`: a material, a file or folder, or OWNER/NAME of the hub.

    "random-tiny" is a model that answers at random, for trying out an experiment in no time.
    """
    name = settings.name
    if name == RANDOM_TINY:
        return _random_tiny()
    if name in MATERIALS:
        return load_model(fetch(name), dtype=settings.dtype)._replace(name=name)
    path = Path(name).expanduser()
    # What looks like a path is never sent to the hub.
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return load_model(path, dtype=settings.dtype)
    return load_hub(name, dtype=settings.dtype)


def _random_tiny() -> Model:
    """Two layers with random numbers; its tokens are bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = decoder.Config(
        vocabulary=len(letters) + 1,
        layers=2,
        width=32,
        feedforward=48,
        heads=4,
        kv_heads=2,
        head_width=8,
        epsilon=1e-6,
        theta=1e4,
        positions=1024,
    )
    params = decoder.init_params(jax.random.key(0), config, scale=0.2)
    return Model(
        params, config, tokenizer, RANDOM_TINY, RANDOM_TINY, RANDOM_TINY, None, len(letters)
    )


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
        "architecture_sha256": hashlib.sha256(json.dumps(model.config).encode()).hexdigest(),
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


def score_questions(
    model: Model,
    questions: Sequence[evaluate.Question],
    adapters: Adapter,
    settings: ConfigDict,
    shared: Sequence[int] | None = None,
) -> np.ndarray:
    """`evaluate.choice_scores` with a progress bar.

    FloatingPointError if a score is not a number: the adapter is broken.
    """
    with bar(f"scoring {len(adapters.scale)} models", len(questions)) as advance:
        scores = evaluate.choice_scores(
            model.params,
            model.config,
            questions,
            adapters=adapters,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            together=settings.together,
            shared=shared,
            done=advance,
        )
    if np.isnan(scores).any():
        broken = int(np.argwhere(np.isnan(scores))[0, 0])
        raise FloatingPointError(
            f"scoring: model {broken} of the stack gives scores that are not numbers."
        )
    return scores


def scorer(model: Model, template: Template, instruction: str, examples, settings: ConfigDict):
    """A function from a stack of adapters to scores of the examples' choices.

    settings.by: "sum" takes log-likelihoods as they are, "bytes" divides each by the length of its
    choice. FloatingPointError if a score is not a number: the adapter is broken.
    """
    if settings.by not in ("sum", "bytes"):
        raise ValueError(f"scoring: got by={settings.by!r}; want sum or bytes.")
    questions = [
        evaluate.Question(
            prompt_of(model, template, instruction, example.text),
            [encode(model, f" {choice}") for choice in example.choices],
        )
        for example in examples
    ]

    def score(adapters: Adapter) -> np.ndarray:
        scores = score_questions(model, questions, adapters, settings)
        if settings.by == "bytes":
            for i, example in enumerate(examples):
                sizes = [len(choice.encode()) for choice in example.choices]
                scores[:, i, : len(sizes)] /= sizes
        return scores

    return score


def chosen(examples: Sequence[Example], scores: np.ndarray) -> list[str]:
    """The choice of the greatest score (n, c) of every example."""
    return [
        example.choices[int(np.argmax(row[: len(example.choices)]))]
        for example, row in zip(examples, scores, strict=True)
    ]


def first_line(text: str) -> str:
    """The first line of a text that is not blank; empty if there is none."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def score_examples(
    model: Model,
    template: Template,
    instruction: str,
    examples: Sequence[Example],
    adapters: Adapter,
    settings: ConfigDict,
) -> Scored:
    """Answers of every adapter of a stack to the same examples.

    A free answer is the first line that the model writes: models that were not tuned go on.
    """
    if examples[0].choices:
        scores = scorer(model, template, instruction, examples, settings)(adapters)
        answers = [chosen(examples, each) for each in scores]
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
    answers = [[first_line(model.tokenizer.decode(ids)) for ids in each] for each in tokens]
    correct = [
        [evaluate.same_answer(a, e.answer) for a, e in zip(each, examples, strict=True)]
        for each in answers
    ]
    return Scored(answers, np.array(correct), None)


def dock_adapters(
    path: str, learnwares: Sequence[store.Learnware], model: Model, template: Template
) -> tuple[list[str], Adapter]:
    """The learnwares of a dock whose adapters can be used, and these as a stack of one shape.

    The others are named, with the reason. ValueError if none is left.
    """
    wanted, usable = describe(model, template), {}
    for learnware in learnwares:
        try:
            _check_model(learnware.card.get("model"), wanted)
            files = store.read_adapter(path, learnware.id)
            usable[learnware.id] = lora.from_peft(files, model.config)
        except (ValueError, OSError) as error:
            say(f"{learnware.id} is not used: {error}")
    if not usable:
        raise ValueError(
            f"{path}: no learnware has an adapter for {model.name} with template {template.name!r};"
            " use a dock whose learnwares have, such as docks/quickstart."
        )
    read = list(usable.values())
    targets = sorted({name for adapter in read for name in adapter.a})
    rank = max(a.shape[-1] for adapter in read for a in adapter.a.values())
    like = init_adapter(jax.random.key(0), model.config, rank=rank, alpha=1.0, targets=targets)
    return list(usable), lora.stack([lora.pad(adapter, like) for adapter in read])


def _check_model(have, wanted: dict) -> None:
    """ValueError unless a card's model is the one at hand."""
    if not isinstance(have, dict):
        raise ValueError(f"its card says model: {have!r:.200}, not which model it is for.")
    for field in ("weights_sha256", "architecture_sha256", "tokenizer_sha256", "template_sha256"):
        if have.get(field) != wanted[field]:
            raise ValueError(
                f"it is for {printable(str(have.get('name')))} and template "
                f"{have.get('template')!r:.100}, with {field} {have.get(field)!r:.100}; at hand "
                f"are {wanted['name']} and {wanted['template']!r}, with {wanted[field]!r}."
            )
