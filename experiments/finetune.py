"""Fine-tune low-rank adapters of a language model, one a task, and write them as PEFT does.

Example: python -m experiments.finetune --config=configs/finetune.py:smoke
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("finetune")

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import plan
from experiments.common import data_line, named, say, write_json
from experiments.models import describe, labelled_of, lesson, open_model, template_of
from learnware_jax.dock.labelled import Example, load_examples
from learnware_jax.dock.materials import fetch_dataset
from learnware_jax.dock.store import check_id, explained, locked, sweep, write_file
from learnware_jax.dock.texts import SUFFIXES, read_pairs
from learnware_jax.dock.texts import digest as digest_of
from learnware_jax.slm import finetune, lora
from learnware_jax.slm.finetune import Settings
from learnware_jax.slm.weights import Model, file_sha256

SHARDINGS = ("none", "data", "full")
STACK = "stack.json"  # the ids of what is trained together
NOTHING = "finetune: nothing to do; set tasks, or data.mine.source."
NEXT = {"next": "build --config=configs/build.py:own --config.dock=DOCK --config.adapters=FOLDER"}


class Lessons(NamedTuple):
    """What one adapter is to learn."""

    id: str
    instruction: str
    examples: Sequence[Example]


def settings_of(config: ConfigDict) -> Settings:
    """The settings of the library's training loop."""
    return Settings(
        steps=config.steps,
        batch=config.batch,
        warmup=config.warmup,
        final=config.final,
        clip=config.clip,
        decay=config.decay,
        train=config.train,
        accumulate=config.accumulate,
        widths=tuple(config.widths),
        dtype=config.dtype,
        remat=config.remat,
    )


def lessons_of(config: ConfigDict) -> list[Lessons]:
    """The examples of every task and data set that the configuration names."""
    jobs = [
        Lessons(task.name, task.instruction, load_examples(task.name, "train", config.examples))
        for task in labelled_of(config.tasks)
    ]
    for name, source in config.data.items():
        if source["source"]:
            check_id(name, where="finetune")
            jobs.append(Lessons(name, source["instruction"], read_source(source, config.examples)))
    if not jobs:
        raise ValueError(NOTHING)
    return jobs


def read_source(source: ConfigDict, limit: int) -> list[Example]:
    """At most `limit` examples out of a file, or of a data set OWNER/NAME[/CONFIG][:SPLIT]."""
    path = Path(source["source"]).expanduser()
    # What looks like a path is never sent to the hub.
    own = path.exists() or path.is_absolute() or path.suffix.lower() in SUFFIXES
    files = [path] if own else fetch_dataset(source["source"])
    pairs = []
    for file in files:
        pairs += read_pairs(file, text=source["text"], answer=source["answer"])
    labels = tuple(source["labels"])
    if labels:
        places = {str(i): label for i, label in enumerate(labels)}
        strange = sorted({answer for _, answer in pairs} - places.keys() - set(labels))
        if strange:
            raise ValueError(
                f"read_source: {source['source']} has the answers {', '.join(strange[:5])}, which "
                f"are neither labels nor their places: {places}."
            )
        pairs = [(text, places.get(answer, answer)) for text, answer in pairs]
    answers = defaultdict(set)
    for text, answer in pairs:
        answers[text].add(answer)
    texts = [text for text, given in answers.items() if len(given) == 1]
    if len(texts) < len(answers):
        say(f"{len(answers) - len(texts)} texts of {source['source']} have two answers: left out.")
    # By their hashes: a file is often sorted by label or by date.
    texts = sorted(texts, key=lambda text: digest_of("order", text))[:limit]
    return [Example(text, *answers[text], labels) for text in texts]


def check(config: ConfigDict) -> None:
    """ValueError for settings that cannot be trained with."""
    finetune.check_settings(settings_of(config))
    if config.sharding not in SHARDINGS or config.learn not in ("answer", "text"):
        raise ValueError(
            f"finetune: got sharding={config.sharding!r}, learn={config.learn!r}; want one of "
            f"{', '.join(SHARDINGS)}, and answer or text."
        )
    if min(config.together, config.checkpoint_every, config.examples) < 1:
        raise ValueError(
            f"finetune: got together={config.together}, checkpoint_every="
            f"{config.checkpoint_every}, examples={config.examples}; want at least 1 of each."
        )
    template_of(config.template)


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    if config.plan:
        return {"plan": f"prints what memory a device needs for {config.model.name}"} | NEXT
    check(config)
    sources = {name: data for name, data in config.data.items() if data["source"]}
    ids = [*(task.name for task in labelled_of(config.tasks)), *sources]
    if not ids:
        raise ValueError(NOTHING)
    made = [id for id in ids if (Path(config.workdir) / id / "summary.json").exists()]
    lines = {
        "model": config.model.name,
        "adapters": f"{named(ids)}; {config.steps} steps of {config.batch} examples each"
        + (f"; {len(made)} are there, and are kept if made with these settings" if made else ""),
    }
    for name, data in sources.items():
        lines[name] = data_line(
            data["source"],
            lambda data=data: f"{len(read_source(data, config.examples)):,} rows",
        )
    return lines | NEXT


def run(config: ConfigDict) -> dict:
    """Fine-tune; returns {"adapters": [{id, folder, examples, loss, tokens, seconds}, ...]}.

    An adapter that workdir has already is kept; one that was being made goes on where it stood.
    ValueError if workdir has one of that id, made from other data or with other settings.
    """
    if config.plan:
        return plan.run(config)
    output = fine_tune(lessons_of(config), config)
    for adapter in output["adapters"]:
        print(
            f"{adapter['id']}: loss {adapter['loss']:.3f} over the last steps, "
            f"{adapter['tokens'] / adapter['seconds']:,.0f} tokens/s, {adapter['folder']}"
        )
    return output


def fine_tune(jobs: Sequence[Lessons], config: ConfigDict) -> dict:
    """`run` of these lessons, whatever data and tasks the configuration names."""
    check(config)
    settings, template = settings_of(config), template_of(config.template)
    workdir = Path(config.workdir)
    digests = {job.id: _digest(job, config) for job in jobs}
    missing = [job for job in jobs if not _made(workdir / job.id, digests[job.id])]
    if missing:
        # A model that is to be cut over devices is read on the host: it need not fit one of them.
        host = jax.local_devices(backend="cpu")[0] if config.sharding == "full" else None
        with jax.default_device(host):
            model = open_model(config.model)
        mesh, params = _placed(model, config)
        model = model._replace(params=params)
        say(
            f"Fine-tuning {len(missing)} adapter(s) of {model.name}, {config.together} at a time, "
            f"{config.steps} steps of {config.batch} examples each."
        )
        for stack in _stacks(jobs, missing, config):
            _train(stack, model, mesh, template, settings, config, digests)
    adapters = [
        json.loads((workdir / job.id / "summary.json").read_text())
        | {"folder": str(workdir / job.id / "adapter")}
        for job in jobs
    ]
    return {"adapters": adapters}


def _digest(job: Lessons, config: ConfigDict) -> str:
    """A hash of what an adapter depends on: its examples and the settings of its training."""
    names = (
        "workdir",
        "tasks",
        "data",
        "examples",
        "together",
        "checkpoint_every",
        "plan",
        "devices",
    )
    settings = {k: v for k, v in config.to_dict().items() if k not in names}
    content = json.dumps([settings, job.instruction, job.examples], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _made(home: Path, digest: str) -> bool:
    """Whether `home` has the adapter with this digest, undamaged."""
    summary_file = home / "summary.json"
    if not summary_file.exists():
        return False
    remedy = f"delete {summary_file} to make the adapter again from its last checkpoint"
    try:
        summary = json.loads(summary_file.read_bytes())
        made, files, said = summary["digest"], summary.pop("files", {}), summary.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"finetune: {summary_file} is damaged; {remedy}.") from None
    if made != digest:
        raise ValueError(
            f"finetune: {home} has an adapter that was made from other data or with other "
            "settings; name another --config.workdir, or delete that folder."
        )
    if said is None:  # an earlier version wrote no hashes
        return True
    if said != _sha256(summary | {"files": files}):
        raise ValueError(f"finetune: {summary_file} is damaged; {remedy}.")
    for name, expected in files.items():
        file = home / "adapter" / name
        if not file.is_file() or file_sha256(file) != expected:
            raise ValueError(f"finetune: {file} is missing or damaged; {remedy}.")
    return True


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stacks(jobs, missing, config: ConfigDict) -> list[Sequence[Lessons]]:
    """What is to be trained together; first what a stopped run had begun, as it was begun."""
    by_id, left, stacks = {job.id: job for job in jobs}, {job.id for job in missing}, []
    for file in sorted(Path(config.workdir).glob(f"stack-*/{STACK}")):
        ids = json.loads(file.read_bytes())
        # Also those of it that are finished: without them the rest would be rounded otherwise.
        if left & set(ids) and by_id.keys() >= set(ids):
            stacks.append([by_id[id] for id in ids])
            left -= set(ids)
    rest = [job for job in missing if job.id in left]
    return stacks + [rest[i : i + config.together] for i in range(0, len(rest), config.together)]


def _train(jobs, model: Model, mesh, template, settings, config, digests) -> None:
    """Train one stack of adapters and write each to workdir/ID/adapter."""
    workdir = Path(config.workdir)
    ids = [job.id for job in jobs]
    # A stack has a folder of its own, named after all that is in it.
    home = workdir / (
        ids[0]
        if len(ids) == 1
        else f"stack-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]}"
    )
    with locked(
        home / ".lock",
        where="finetune",
        doing=f"is training in {home}",
        otherwise="name another --config.workdir",
    ):
        _train_locked(jobs, model, mesh, template, settings, config, digests, home)


def _train_locked(jobs, model, mesh, template, settings, config, digests, home) -> None:
    workdir = Path(config.workdir)
    if len(jobs) > 1:
        sweep(home / STACK)
        write_json(home / STACK, [job.id for job in jobs])
    texts = tuple(_fitting(job, model, template, settings.widths[-1], config.learn) for job in jobs)
    for job, own in zip(jobs, texts, strict=True):
        finetune.check_texts(own, settings, name=job.id)
    adapter = lora.stack(
        [
            lora.init_adapter(
                jax.random.key(config.lora.seed),
                model.config,
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                targets=tuple(config.lora.targets),
            )
        ]
        * len(jobs)
    )
    plan_ = finetune.Run(texts, (config.rate,) * len(jobs), (config.seed,) * len(jobs), settings)
    digest = plan_.digest(model.weights_sha256, model.params, model.config, adapter)
    like = finetune.init_state(adapter, settings)
    state = finetune.load_checkpoint(home / "checkpoints", like, digest)
    begun = 0 if state is None else int(state.step[0])
    if begun:
        say(f"{home.name}: going on from step {begun}.")
    with _Log(home, jobs, settings, begun) as log:

        def report(done, state, metrics, tokens):
            log(done, metrics, tokens)
            if done % config.checkpoint_every == 0 and done < settings.steps:
                log.keep()
                finetune.save_checkpoint(home / "checkpoints", state, digest)

        last = finetune.train(
            model.params, model.config, adapter, plan_, mesh=mesh, state=state, report=report
        )
    for i, job in enumerate(jobs):
        own = jax.tree.map(lambda x, i=i: x[i], last.adapter)
        files = lora.to_peft(own, base=model.name, note=describe(model, template))
        folder = workdir / job.id / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            sweep(folder / name)
            write_file(folder / name, data, where="finetune")
        summary = {
            "id": job.id,
            "digest": digests[job.id],
            "model": describe(model, template),
            "instruction": job.instruction,
            "examples": len(texts[i]),
            "steps": settings.steps,
            "batch": settings.batch,
            "rate": config.rate,
            "loss": log.recent(i),
            "tokens": log.tokens,
            "seconds": log.seconds,
            "together": len(jobs),  # tokens and seconds are those of so many adapters
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        sweep(workdir / job.id / "summary.json")
        write_json(workdir / job.id / "summary.json", summary | {"sha256": _sha256(summary)})


def _fitting(job: Lessons, model, template, width: int, learn: str) -> list[finetune.Text]:
    """The examples of a job as tokens; those that are too long are left out, and counted."""
    texts = [lesson(model, template, job.instruction, e, learn=learn) for e in job.examples]
    kept = [text for text in texts if len(text.ids) <= width]
    if len(kept) < len(texts):
        say(
            f"{job.id}: {len(texts) - len(kept)} of {len(texts)} examples have over {width} tokens."
        )
    return kept


def _placed(model: Model, config: ConfigDict):
    """The mesh (None for one device) and the parameters on it."""
    if config.sharding == "none":
        return None, model.params
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if config.batch // config.accumulate % jax.device_count():
        raise ValueError(
            f"finetune: batch={config.batch} in {config.accumulate} parts does not divide over "
            f"{jax.device_count()} devices."
        )
    return mesh, finetune.shard_params(model.params, mesh, fully=config.sharding == "full")


class _Log:
    """Metrics as JSON lines and for TensorBoard, a bar on a terminal, a line now and then else."""

    def __init__(self, home: Path, jobs: Sequence[Lessons], settings: Settings, begun: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from tensorboardX import SummaryWriter

        home.mkdir(parents=True, exist_ok=True)
        self.ids, self.steps, self.name = [job.id for job in jobs], settings.steps, home.name
        file = home / "metrics.jsonl"
        self.rows = [row for row in _read_metrics(file) if row["step"] <= begun]
        if [row["step"] for row in self.rows] != list(range(1, begun + 1)):
            raise ValueError(
                f"finetune: {file} is damaged before step {begun}, from which the run would go on; "
                f"delete {home} to start again."
            )
        sweep(file)
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_file(file, kept.encode(), where="finetune")
        self.file = file.open("a")
        self.board = SummaryWriter(str(home / "tensorboard"), purge_step=begun + 1)
        self.tokens = sum(row["tokens"] for row in self.rows)
        self.before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.begin = time.monotonic()
        console = Console(stderr=True)
        self.plain = not console.is_interactive
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=self.plain,
        )
        self.task = self.bar.add_task(self.name, total=self.steps, completed=begun, shown="")

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption too."""
        return self.before + time.monotonic() - self.begin

    def recent(self, adapter: int) -> float:
        """Mean loss of an adapter over the last tenth of the steps."""
        rows = self.rows[-max(1, self.steps // 10) :]
        return float(np.mean([row["loss"][self.ids[adapter]] for row in rows]))

    def __call__(self, done: int, metrics: finetune.Metrics, tokens: int) -> None:
        self.tokens += tokens
        row = {
            "step": done,
            "loss": dict(zip(self.ids, map(float, metrics.loss), strict=True)),
            "gradient_norm": dict(zip(self.ids, map(float, metrics.norm), strict=True)),
            "tokens": tokens,
            "seconds": self.seconds,
        }
        self.rows.append(row)
        state = "the run goes on from its last checkpoint"
        with explained("metrics", state, self.file.name, where="finetune"):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        for name in self.ids:
            self.board.add_scalar(f"{name}/loss", row["loss"][name], done)
            self.board.add_scalar(f"{name}/gradient_norm", row["gradient_norm"][name], done)
        rate = self.tokens / max(self.seconds, 1e-9)
        loss = np.mean(list(row["loss"].values()))
        shown = f"loss {loss:.3f}  {rate:,.0f} tokens/s"
        self.bar.update(self.task, completed=done, shown=shown)
        if self.plain and (done % max(1, self.steps // 4) == 0 or done == self.steps):
            left = (self.steps - done) * self.seconds / done
            say(f"{self.name}: step {done} of {self.steps}, {shown}, {left:.0f} s left")

    def keep(self) -> None:
        """Make the rows durable: a checkpoint is worth nothing without them."""
        os.fsync(self.file.fileno())

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()
        self.file.close()
        self.board.close()


def _read_metrics(file: Path) -> list[dict]:
    """Rows of a file of JSON lines, up to one that a killed writer left unfinished."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
