"""Texts to specifications, examples to adapters, and both to a dock.

Example: python -m experiments.build --config=configs/build.py:quickstart
"""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import finetune
from experiments.common import (
    check_kernel,
    dock_space,
    embed_parts,
    header_of,
    kernel_of,
    launch,
    open_encoder,
    own_points,
    reducer_options,
    say,
    space_of,
)
from experiments.models import (
    describe,
    labelled_of,
    open_model,
    score_examples,
    template_of,
    with_base,
)
from learnware_jax.dock import store
from learnware_jax.dock.labelled import load_examples
from learnware_jax.dock.tasks import TASKS, Task, halves, load_task, read_texts
from learnware_jax.dock.texts import sample
from learnware_jax.slm import lora
from learnware_jax.slm.evaluate import accuracy
from learnware_jax.specification import kernels
from learnware_jax.specification.reduce import reduce_many


def tasks_of(names) -> list[Task]:
    """The catalogue's tasks under these names; a role stands for all of its tasks.

    ValueError for a name that is neither.
    """
    chosen = []
    for name in names:
        found = [task for task in TASKS.values() if name in (task.name, task.role)]
        if not found:
            roles = sorted({task.role for task in TASKS.values()})
            raise ValueError(
                f"tasks: {name!r} is neither a task of learnware_jax.dock.tasks.TASKS nor one of "
                f"the roles {', '.join(roles)}."
            )
        chosen += found
    return chosen


def developer_half(task: Task, config: ConfigDict) -> list[str]:
    """The texts that a learnware of this task is specified on."""
    return sample(halves(load_task(task.name), config.halves_seed)[0], config.texts)


def user_half(task: Task, config: ConfigDict, count: int) -> list[str]:
    """Texts of the same task that no learnware saw."""
    return sample(halves(load_task(task.name), config.halves_seed)[1], count)


def run(config: ConfigDict) -> dict:
    """Make or complete the dock `config.dock`; returns {"dock", "added", "learnwares"}."""
    own = config.learnware.to_dict()
    if bool(own["data"]) != bool(own["id"]) or (own["adapter"] and not own["data"]):
        raise ValueError(
            f"build: got learnware.id={own['id']!r} and learnware.data={own['data']!r}; want both, "
            "or neither, and both for learnware.adapter."
        )
    jobs = {
        task.name: (
            {"name": task.name, "domain": task.domain, "description": task.description},
            lambda task=task: developer_half(task, config),
        )
        for task in tasks_of(config.tasks)
    }
    for task in labelled_of(config.labelled):
        card = {"name": task.name, "domain": task.domain, "description": task.description}
        jobs[task.name] = (card, lambda task=task: trained_texts(task.name, config))
    if own["data"]:
        card = {field: own[field] for field in ("domain", "description", "model")}
        jobs[own["id"]] = (
            {"name": own["id"], **card},
            lambda: read_texts(own["data"], column=own["column"] or None),
        )
    if not jobs:
        raise ValueError(
            "build: nothing to do; set tasks, labelled, or learnware.id and learnware.data."
        )
    for name in jobs:
        store.check_id(name, where="build")
    check_kernel(config.specification.kernel)
    exists = (Path(config.dock) / "dock.json").exists()
    if own["data"] and not config.tasks and not exists:
        raise FileNotFoundError(
            f"build: there is no dock at {config.dock} to add {own['id']!r} to; correct --config."
            "dock, or make a dock with --config=configs/build.py:quickstart first."
        )
    present = set(store.list_ids(config.dock)) if exists else set()
    if own["id"] in present:
        raise FileExistsError(
            f"build: {config.dock} has a learnware {own['id']!r} already; choose another id, or "
            f"remove it: python -m experiments.dock --dock={config.dock} --remove={own['id']}"
        )
    adapters = {}
    if own["adapter"]:
        adapters[own["id"]] = _own_adapter(own["adapter"], jobs[own["id"]][0], config)
    missing = [name for name in jobs if name not in present]
    if missing:
        labelled = [task.name for task in labelled_of(config.labelled) if task.name in missing]
        if labelled:
            adapters |= _fine_tune(labelled, jobs, config)
        say(f"Specifying {len(missing)} of {len(jobs)} tasks for {config.dock}.")
        _specify({name: jobs[name] for name in missing}, adapters, config, exists)
    ids = store.list_ids(config.dock)
    say(f"{config.dock} holds {len(ids)} learnwares, {len(missing)} of them new.")
    return {"dock": config.dock, "added": missing, "learnwares": ids}


def trained_texts(name: str, config: ConfigDict) -> list[str]:
    """The texts that a labelled task's learnware is specified on: some that it was trained on."""
    return [example.text for example in load_examples(name, "train", config.texts)]


def _own_adapter(folder: str, card: dict, config: ConfigDict) -> dict[str, bytes]:
    """The files of somebody's adapter; the card gets the model that they are for.

    ValueError if they do not fit that model, or say that they are for another.
    """
    files = {}
    for name in store.ADAPTER_FILES:
        file = Path(folder).expanduser() / name
        if not file.is_file():
            raise FileNotFoundError(f"build: there is no {file}; want the files of a PEFT adapter.")
        files[name] = file.read_bytes()
    model = open_model(config.finetune.model)
    lora.from_peft(files, model.config)
    card["model"] = describe(model, template_of(config.finetune.template))
    said = json.loads(files[lora.CONFIG_FILE]).get("learnware_jax", card["model"])
    if said != card["model"]:
        raise ValueError(
            f"build: {folder} says that it is for {said}, and at hand is {card['model']}; "
            "set finetune.model.name and finetune.template to those."
        )
    return files


def _fine_tune(names, jobs, config):
    """Train an adapter for each labelled task; its scores on held-out rows go on its card.

    Returns the files of the adapters, {id: {file name: bytes}}.
    """
    settings = config.finetune.copy_and_resolve_references()
    settings.tasks = tuple(names)
    summaries = finetune.run(settings)["adapters"]
    model, template = open_model(settings.model), template_of(settings.template)
    files = {}
    for task, summary in zip(labelled_of(names), summaries, strict=True):
        if summary["model"] != describe(model, template):
            raise ValueError(
                f"build: {summary['folder']} was trained on {summary['model']['name']} with other "
                "weights or another template; delete it, or name that model."
            )
        folder = Path(summary["folder"])
        files[task.name] = {name: (folder / name).read_bytes() for name in store.ADAPTER_FILES}
        adapter = lora.from_peft(files[task.name], model.config)
        held_out = load_examples(task.name, "heldout", config.scoring.rows)
        scored = score_examples(
            model,
            template,
            task.instruction,
            held_out,
            with_base(lora.stack([adapter])),
            config.scoring,
        )
        (base, _), (value, error) = (accuracy(correct) for correct in scored.correct)
        say(f"{task.name}: {value:.0%} of {len(held_out)} held-out rows right, base {base:.0%}.")
        card, read = jobs[task.name]
        card |= {
            "instruction": task.instruction,
            "labels": list(held_out[0].choices),
            "metric": task.metric,
            "model": summary["model"],
            "training": {
                name: summary[name] for name in ("examples", "steps", "batch", "rate", "loss")
            },
            "evaluation": {
                "rows": len(held_out),
                "accuracy": value,
                "stderr": error,
                "base_accuracy": base,
            },
        }
        jobs[task.name] = card, read
    return files


def _specify(jobs, adapters, config, exists):
    """Make and add the learnwares of jobs, {id: (card, function that reads the texts)}."""
    settings = config.specification
    encoder = open_encoder(settings)
    space = dock_space(config.dock, encoder) if exists else space_of(encoder, settings)
    others = [f for f in ("max_tokens", "dtype") if space[f] != settings[f]]
    if exists and (others or space["kernel"]["name"] != settings.kernel.name):
        say(f"{config.dock} keeps the settings that it was made with: {space}")
    texts = [read() for _, read in jobs.values()]
    rows = embed_parts(encoder, texts, space, keep=not config.learnware.data)
    if not exists:
        kernel = kernel_of(settings.kernel, config.seed, np.concatenate(rows))
        space["kernel"] = kernels.to_dict(kernel)
        store.create_dock(config.dock, space)
    fitted = reduce_many(
        jax.random.key(config.seed),
        rows,
        own_points(settings, len(rows[0])) if config.learnware.data else settings.points,
        kernels.from_dict(space["kernel"]),
        **reducer_options(settings),
    )
    for (name, (card, _)), reduced in zip(jobs.items(), fitted, strict=True):
        header = header_of(space, settings, config.seed, reduced)
        learnware = store.Learnware(name, card, reduced.spec, header)
        store.add(config.dock, learnware, adapter=adapters.get(name))


if __name__ == "__main__":
    launch(run)
