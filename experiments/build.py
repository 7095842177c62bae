"""Texts to specifications, examples to adapters, and both to a dock.

Example: python -m experiments.build --config=configs/build.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("build")

import json
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import finetune
from experiments.common import (
    bar,
    check_kernel,
    check_publishing,
    dock_space,
    embed_texts,
    header_of,
    is_private,
    kernel_of,
    made_by,
    named,
    open_encoder,
    own_points,
    reducer_options,
    say,
    setting,
    space_of,
    warn_of_publishing,
)
from experiments.models import (
    describe,
    labelled_of,
    open_model,
    score_examples,
    template_of,
    with_base,
)
from learnware_jax.dock import index, store
from learnware_jax.dock.labelled import LabelledTask, load_examples
from learnware_jax.dock.tasks import TASKS, Task, halves, load_task, read_texts
from learnware_jax.dock.texts import SUFFIXES, sample
from learnware_jax.slm import lora
from learnware_jax.slm.encoder import Encoder
from learnware_jax.slm.evaluate import accuracy
from learnware_jax.slm.weights import Model
from learnware_jax.specification import kernels, privacy
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.reduce import reduce

# What a card says because it was done or measured here; nobody's own card may claim it.
RESERVED = ("adapter", "evaluation", "model", "training")


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


class Job(NamedTuple):
    """A learnware to be made: its card, and a function that reads the texts that specify it.

    `own` texts are somebody's: they are kept nowhere, and get at most half as many points as texts.
    """

    card: dict[str, Any]
    read: Callable[[], list[str]]
    own: bool = False


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with, less those of a model."""
    jobs, adapters, present = jobs_of(config, open_base=False)
    missing = [id for id in jobs if id not in present]
    tuned = [task.name for task in labelled_of(config.labelled) if task.name in missing]
    lines = {
        "dock": f"{config.dock}: {len(present)} learnwares are there"
        + (f"; to be made: {named(missing)}" if missing else "; nothing is to be made")
    }
    if tuned:
        lines["adapters"] = f"fine-tuned first, in {config.finetune.workdir}: {named(tuned)}"
    if adapters:
        base = config.finetune.model.name
        lines["adapters"] = f"{named([*adapters])}, checked against {base} when the run begins"
    following = f"select --config=configs/select.py:quickstart {setting('dock', config.dock)}"
    return lines | {"next": f"{following} --config.user.data=FILE"}


def run(config: ConfigDict) -> dict:
    """Make or complete the dock `config.dock`; returns {"dock", "added", "learnwares"}.

    Somebody's learnwares are all checked before any work; if one is unsound, none is added.
    """
    jobs, adapters, present = jobs_of(config, open_base=True)
    warn_of_publishing(config.specification)
    if kept := [id for id, job in jobs.items() if job.own and id in present]:
        say(f"{config.dock} has these with the same adapters, and keeps them: {', '.join(kept)}.")
    added = []
    if not jobs.keys() <= present:
        with store.locked(
            Path(config.dock) / ".building",
            where="build",
            doing=f"is building {config.dock}",
            otherwise="name another --config.dock",
        ):
            # What another process has made meanwhile is there now.
            present = _present(config.dock)
            missing = {id: job for id, job in jobs.items() if id not in present}
            labelled = [task.name for task in labelled_of(config.labelled)]
            _make(missing, adapters, labelled, config)
            added = list(missing)
    ids = store.list_ids(config.dock)
    say(f"{config.dock} holds {len(ids)} learnwares, {len(added)} of them new.")
    return {"dock": config.dock, "added": added, "learnwares": ids}


def jobs_of(
    config: ConfigDict, *, open_base: bool
) -> tuple[dict[str, Job], dict[str, dict[str, bytes]], set[str]]:
    """What the dock is to hold by id, the adapters of somebody's learnwares, and the ids it has.

    ValueError or FileNotFoundError for what cannot be made, before any work. Adapters are checked
    against their base model if it may be opened, which can take a download.
    """
    own = config.learnware
    if (
        bool(own.data) != bool(own.id)
        or (own.adapter and not own.data)
        or (own.id and config.adapters)
    ):
        raise ValueError(
            f"build: got learnware.id={own.id!r}, learnware.data={own.data!r} and adapters="
            f"{config.adapters!r}; want learnware.id and data, or neither, and both for "
            "learnware.adapter; adapters only without them."
        )
    jobs = {
        task.name: Job(_card(task), partial(developer_half, task, config))
        for task in tasks_of(config.tasks)
    }
    for task in labelled_of(config.labelled):
        jobs[task.name] = Job(_card(task), partial(trained_texts, task.name, config))
    check_kernel(config.specification.kernel)
    check_publishing(config.specification)
    if own.id and not jobs and not _exists(config.dock):
        raise FileNotFoundError(
            f"build: there is no dock at {config.dock} to add {own.id!r} to; correct --config."
            "dock, or make a dock with --config=configs/build.py:quickstart first."
        )
    present = _present(config.dock)
    submitted, adapters = _check_submissions(config, jobs, present, open_base)
    jobs |= submitted
    if not jobs:
        raise ValueError(
            "build: nothing to do; set tasks, labelled, adapters, or learnware.id and "
            "learnware.data."
        )
    return jobs, adapters, present


def _exists(dock: str) -> bool:
    return (Path(dock) / "dock.json").exists()


def _present(dock: str) -> set[str]:
    return set(store.list_ids(dock)) if _exists(dock) else set()


def _make(
    jobs: dict[str, Job],
    adapters: dict[str, dict[str, bytes]],
    labelled: Sequence[str],
    config: ConfigDict,
) -> None:
    """Fine-tune those of the jobs that are labelled, specify all of them, and add them."""
    if _exists(config.dock):
        space, encoder = dock_space(config.dock, config.specification)
    else:
        encoder = open_encoder(config.specification)
        space = space_of(encoder, config.specification)
    if names := [name for name in labelled if name in jobs]:
        adapters = adapters | _fine_tune(names, jobs, config)
    say(f"Specifying {len(jobs)} learnwares for {config.dock}.")
    specify(jobs, adapters, space, encoder, config)


def _card(task: Task | LabelledTask) -> dict[str, Any]:
    return {"name": task.name, "domain": task.domain, "description": task.description}


def trained_texts(name: str, config: ConfigDict) -> list[str]:
    """The texts that a labelled task's learnware is specified on: some that it was trained on."""
    return [example.text for example in load_examples(name, "train", config.texts)]


class Submission(NamedTuple):
    """Somebody's learnware, of which nothing is read yet: the functions find what is wrong."""

    id: str
    card: Callable[[], dict[str, Any]]
    texts: Callable[[], list[str]]
    adapter: str | Path  # a folder; empty for a specification alone


def _submissions(config: ConfigDict) -> list[Submission]:
    """The learnware `config.learnware`, or one for each folder in `config.adapters`."""
    own, column = config.learnware.to_dict(), config.learnware.column
    if own["id"]:
        card = {field: own[field] for field in ("domain", "description", "model")}
        texts = partial(_own_texts, own["data"], column)
        return [Submission(own["id"], lambda: {"name": own["id"], **card}, texts, own["adapter"])]
    if not config.adapters:
        return []
    home = Path(config.adapters).expanduser()
    folders = sorted(folder for folder in home.glob("[!.]*") if folder.is_dir())
    if not folders:
        raise FileNotFoundError(
            f"build: there is no folder in {home}; want one for each learnware, with "
            f"{', '.join(store.ADAPTER_FILES)} and texts.jsonl."
        )
    return [
        Submission(
            folder.name,
            partial(_own_card, folder),
            lambda folder=folder: _own_texts(_texts_file(folder), column),
            folder,
        )
        for folder in folders
    ]


def _check_submissions(
    config: ConfigDict, others: Collection[str], present: Collection[str], open_base: bool
) -> tuple[dict[str, Job], dict[str, dict[str, bytes]]]:
    """The jobs of somebody's learnwares and the files of their adapters, by id.

    `others` are the ids that this build makes besides, `present` those that the dock has.
    ValueError lists everything that is wrong with any of them.
    """
    submissions = _submissions(config)
    base = None
    if open_base and any(submission.adapter for submission in submissions):
        model = open_model(config.finetune.model)
        base = model, describe(model, template_of(config.finetune.template))
    jobs, adapters, problems = {}, {}, []
    for id, card, texts, folder in submissions:
        checks = {"id": partial(_check_name, id, others), "card": card, "texts": texts}
        if folder:
            checks["adapter"] = partial(_own_adapter, folder, base)
        found = {}
        for part, check in checks.items():
            try:
                found[part] = check()
            except (ValueError, OSError) as error:
                problems.append(f"{id}: {part}: {error}")
        if len(found) < len(checks):
            continue
        adapter = found.get("adapter")
        if id in present and (adapter is None or _docked(config.dock, id) != adapter):
            problems.append(
                f"{id}: {config.dock} has another learnware of that id already; choose another id, "
                f"or remove it: python -m experiments.dock --dock={config.dock} --remove={id}"
            )
        if adapter is not None:
            adapters[id] = adapter
            if base:
                found["card"]["model"] = base[1]
        jobs[id] = Job(found["card"], partial(list, found["texts"]), own=True)
    if problems:
        raise ValueError(
            "\n  ".join([f"build: nothing was done, and {config.dock} is as it was:", *problems])
        )
    return jobs, adapters


def _check_name(id: str, others: Collection[str]) -> None:
    """ValueError unless `id` can be an id and is none of the others."""
    store.check_id(id, where="build")
    if id in others:
        raise ValueError(
            "a task that this build makes a learnware for has that id; choose another."
        )


def _own_texts(source: str | Path, column: str) -> list[str]:
    """Somebody's texts. ValueError for a single one, which its specification would give away."""
    texts = read_texts(source, column=column or None)
    if len(set(texts)) < 2:
        raise ValueError(f"{source} holds 1 distinct text, which a specification would give away.")
    return texts


def _texts_file(folder: Path) -> Path:
    """The one file of texts in a folder."""
    names = [f"texts{suffix}" for suffix in SUFFIXES]
    found = [name for name in names if (folder / name).exists()]
    if len(found) != 1:
        raise ValueError(f"got {' and '.join(found) or 'none'}; want one of {', '.join(names)}.")
    return folder / found[0]


def _own_card(folder: Path) -> dict[str, Any]:
    """The card in a folder, if there is one, and the folder's name unless it says another."""
    file = folder / "card.json"
    card = store.read_card(file, where="build") if file.exists() else {}
    reserved = [field for field in RESERVED if field in card]
    if reserved:
        raise ValueError(f"got {', '.join(reserved)}, found out by this program; take it off.")
    return {"name": folder.name} | card


def _own_adapter(folder: str | Path, base: tuple[Model, dict] | None) -> dict[str, bytes]:
    """The files of somebody's adapter.

    ValueError if they do not fit the base model and what is said of it, or are for another.
    """
    files = store.read_peft(Path(folder).expanduser(), where="build")
    if base is None:
        return files
    model, described = base
    lora.from_peft(files, model.config)
    said = json.loads(files[lora.CONFIG_FILE]).get("learnware_jax", described)
    if said != described:
        said = said if isinstance(said, dict) else {}
        differing = [
            f"{field} {said.get(field)!r} (at hand {value!r})"
            for field, value in described.items()
            if said.get(field) != value
        ]
        raise ValueError(
            f"it says that it is for {', '.join(differing)}; set finetune.model.name and finetune."
            "template to those."
        )
    return files


def _docked(dock: str, id: str) -> dict[str, bytes] | None:
    """The files of a docked learnware's adapter; None if it has none, or damaged ones."""
    try:
        return store.read_adapter(dock, id)
    except (ValueError, OSError):
        return None


def _fine_tune(names, jobs, config):
    """Train an adapter for each labelled task; its scores on held-out rows go on its card.

    Returns the files of the adapters, {id: {file name: bytes}}.
    """
    settings = config.finetune.copy_and_resolve_references()
    settings.tasks = tuple(names)
    summaries = finetune.fine_tune(finetune.lessons_of(settings), settings)["adapters"]
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
        jobs[task.name].card.update(
            instruction=task.instruction,
            labels=list(held_out[0].choices),
            metric=task.metric,
            model=summary["model"],
            training={
                name: summary[name] for name in ("examples", "steps", "batch", "rate", "loss")
            },
            evaluation={
                "rows": len(held_out),
                "accuracy": value,
                "stderr": error,
                "base_accuracy": base,
            },
        )
    return files


def specify(
    jobs: dict[str, Job],
    adapters: dict[str, dict[str, bytes]],
    space: dict[str, Any],
    encoder: Encoder,
    config: ConfigDict,
) -> None:
    """Make and add the learnwares of jobs; a `space` without a kernel is that of a new dock."""
    settings = config.specification
    exists = "kernel" in space
    others = [f for f in ("max_tokens", "dtype") if space[f] != settings[f]]
    if exists and (others or space["kernel"]["name"] != settings.kernel.name):
        say(f"{config.dock} keeps the settings that it was made with: {space}")
    # One by one, each with a key of its own: a build that goes on then makes the same bits as one
    # that was never stopped.
    rows = [embed_texts(encoder, job.read(), space, keep=not job.own) for job in jobs.values()]
    if not exists:
        kernel = kernel_of(settings.kernel, config.seed, np.concatenate(rows))
        space["kernel"] = kernels.to_dict(kernel)
        store.create_dock(config.dock, space)
    kernel, options = kernels.from_dict(space["kernel"]), reducer_options(settings)
    public = _public(encoder, space, kernel, settings) if is_private(settings) else None
    if public is not None and adapters:
        say(
            "warning: specifications are private, and the adapters beside them are not: who has an "
            "adapter can ask it for its texts."
        )
    with bar("specifications", len(jobs)) as advance:
        for (id, job), x in zip(jobs.items(), rows, strict=True):
            key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(id.encode()))
            if public is not None:
                spec, header = _private(x, public, space, settings)
            else:
                points = own_points(settings, len(x)) if job.own else settings.points
                reduced = reduce(key, x, points, kernel, **options)
                spec, header = reduced.spec, header_of(space, settings, config.seed, reduced)
                _refuse_copies(id, spec, x, settings)
            learnware = store.Learnware(id, job.card, spec, header)
            index.add(config.dock, learnware, adapter=adapters.get(id))
            advance(1)


def _refuse_copies(id, spec, x, settings):
    """ValueError if points are rows, as a cluster of one is, and nobody has allowed it."""
    copied = privacy.copies(spec.z, x)
    if len(copied) and not settings.publish_rows:
        raise ValueError(
            f"build: {len(copied)} of the {len(spec.z)} points of {id!r} are embeddings of its "
            "texts as they are. Use fewer points, more texts or specification.start=noise; or say "
            f"--config.specification.publish_rows={settings.reducer} if everybody may know the "
            "texts."
        )


def _public(encoder, space, kernel, settings) -> privacy.Public:
    tasks = tasks_of(settings.privacy.public)
    texts = [t for task in tasks for t in load_task(task.name, settings.privacy.public_texts)]
    return privacy.make_public(
        jax.random.key(0), embed_texts(encoder, texts, space, keep=True), kernel
    )


def _private(x, public, space, settings):
    """A private specification of embedded texts and its header."""
    epsilon, delta = float(settings.privacy.epsilon), settings.privacy.delta
    spec, release = privacy.private_rkme(
        privacy.secret_key(), x, public, settings.points, epsilon=epsilon, delta=delta
    )
    features = (
        f"{len(release.mean)} functions on {len(public.landmarks.points)} embedded texts of "
        f"{', '.join(settings.privacy.public)}"
    )
    said = privacy.statement(release, epsilon=epsilon, delta=delta, features=features)
    about = {"points": len(spec.beta), "reducer": "private", "privacy": said, **made_by()}
    return spec, Header(SCHEMA, "rkme", space, about)
