"""What experiments share about language models: opened, prompted, given examples to learn."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from learnware_jax.dock.labelled import LABELLED, Example, LabelledTask
from learnware_jax.dock.materials import MATERIALS, fetch, suggestion
from learnware_jax.slm import prompts
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


def no_adapter(model: Model, like: Adapter | None = None) -> Adapter:
    """An adapter that changes nothing: the base model, where adapters are asked for."""
    import jax

    if like is not None:
        return jax.tree.map(jnp.zeros_like, like)
    return init_adapter(jax.random.key(0), model.config, rank=1, alpha=1.0, targets=("query",))
