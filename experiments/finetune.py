"""Fine-tune low-rank adapters of a language model, one a task, and write them as PEFT does.

Example: python -m experiments.finetune --config=configs/finetune.py:smoke
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import plan
from experiments.common import launch, say, write_json
from experiments.models import describe, labelled_of, lesson, open_model, template_of
from learnware_jax.dock.labelled import Example, load_examples
from learnware_jax.dock.materials import fetch_dataset
from learnware_jax.dock.store import check_id, write_file
from learnware_jax.dock.texts import read_pairs, sample
from learnware_jax.slm import finetune, lora
from learnware_jax.slm.finetune import Settings
from learnware_jax.slm.weights import Model

SHARDINGS = ("none", "data", "full")


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
        raise ValueError("finetune: nothing to do; set tasks, or data.mine.source.")
    return jobs


def read_source(source: ConfigDict, limit: int) -> list[Example]:
    """At most `limit` examples out of a file, or of a data set OWNER/NAME[/CONFIG][:SPLIT]."""
    path = Path(source["source"]).expanduser()
    files = [path] if path.suffix or path.exists() else fetch_dataset(source["source"])
    pairs = []
    for file in files:
        pairs += read_pairs(file, text=source["text"], answer=source["answer"])
    labels = tuple(source["labels"])
    if labels:
        try:
            pairs = [(text, labels[int(answer)]) for text, answer in pairs]
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"finetune: the answers in {source['source']} are not places in the labels "
                f"{labels}: {error}."
            ) from None
    texts = dict(pairs)
    return [Example(text, texts[text], labels) for text in sample(list(texts), limit)]


def run(config: ConfigDict) -> dict:
    """Fine-tune; returns {"adapters": [{id, folder, examples, loss, tokens, seconds}, ...]}.

    An adapter that workdir has already is kept; one that was being made goes on where it stood.
    """
    if config.plan:
        return plan.run(config)
    settings = settings_of(config)
    finetune.check_settings(settings)
    if config.sharding not in SHARDINGS or config.learn not in ("answer", "text"):
        raise ValueError(
            f"finetune: got sharding={config.sharding!r}, learn={config.learn!r}; want one of "
            f"{', '.join(SHARDINGS)}, and answer or text."
        )
    template = template_of(config.template)
    workdir = Path(config.workdir)
    jobs = lessons_of(config)
    missing = [job for job in jobs if not (workdir / job.id / "summary.json").exists()]
    if missing:
        # A model that is to be cut over devices is read on the host: it need not fit one of them.
        host = jax.devices("cpu")[0] if config.sharding == "full" else None
        with jax.default_device(host):
            model = open_model(config.model)
        say(
            f"Fine-tuning {len(missing)} adapter(s) of {model.name}, {config.together} at a time, "
            f"{config.steps} steps of {config.batch} examples each."
        )
        for i in range(0, len(missing), config.together):
            _train(missing[i : i + config.together], model, template, settings, config)
    adapters = [json.loads((workdir / job.id / "summary.json").read_text()) for job in jobs]
    return {"adapters": adapters}


def _train(jobs, model: Model, template, settings: Settings, config: ConfigDict) -> None:
    """Train one stack of adapters and write each to workdir/ID/adapter."""
    workdir = Path(config.workdir)
    home = workdir / "+".join(job.id for job in jobs)
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
    digest = plan_.digest(model.weights_sha256, adapter)
    mesh, params = _placed(model, config)
    like = finetune.init_state(adapter, settings)
    state = finetune.load_checkpoint(home / "checkpoints", like, digest)
    begun = 0 if state is None else int(state.step[0])
    if begun:
        say(f"{home.name}: going on from step {begun}.")
    with _Log(home, jobs, settings, begun) as log:

        def report(done, state, metrics, tokens):
            log(done, metrics, tokens)
            if done % config.checkpoint_every == 0 and done < settings.steps:
                finetune.save_checkpoint(home / "checkpoints", state, digest)

        last = finetune.train(
            params, model.config, adapter, plan_, mesh=mesh, state=state, report=report
        )
    for i, job in enumerate(jobs):
        own = jax.tree.map(lambda x, i=i: x[i], last.adapter)
        files = lora.to_peft(own, base=model.name, note=describe(model, template))
        folder = workdir / job.id / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_file(folder / name, data, where="finetune")
        write_json(
            workdir / job.id / "summary.json",
            {
                "id": job.id,
                "folder": str(folder),
                "model": describe(model, template),
                "instruction": job.instruction,
                "examples": len(job.examples),
                "steps": settings.steps,
                "batch": settings.batch,
                "rate": config.rate,
                "loss": log.recent(i),
                "tokens": log.tokens,
                "seconds": log.seconds,
            },
        )


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
        kept = file.read_text().splitlines() if file.exists() else []
        self.rows = [row for row in map(json.loads, kept) if row["step"] <= begun]
        file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
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

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()
        self.file.close()
        self.board.close()


def main_run(config: ConfigDict) -> dict:
    """`run`, and where things lie."""
    output = run(config)
    for adapter in output.get("adapters", ()):
        print(
            f"{adapter['id']}: loss {adapter['loss']:.3f} over the last steps, "
            f"{adapter['tokens'] / adapter['seconds']:,.0f} tokens/s, {adapter['folder']}"
        )
    return output


if __name__ == "__main__":
    launch(main_run)
