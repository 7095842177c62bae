"""Every reader of files from strangers against mutated files: it reads them, or says what is wrong.

Example: python -m experiments.fuzz --config=configs/fuzz.py
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("fuzz")

import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
import pandas
import safetensors.numpy
from ml_collections import ConfigDict

from experiments.common import named, say, write_json
from learnware_jax.dock import index, interop, signature, store, texts
from learnware_jax.slm import decoder, lora, weights
from learnware_jax.specification import header, tensors
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.kernels import Gaussian, to_dict
from learnware_jax.specification.rkme import RKME

ROOT = Path(__file__).parents[1]
MODULES = (header, tensors, store, index, interop, signature, texts, lora, weights)
GIB = 2**30
MODEL = decoder.Config(
    vocabulary=16,
    layers=1,
    width=8,
    feedforward=8,
    heads=2,
    kv_heads=1,
    head_width=4,
    epsilon=1e-6,
    theta=10_000.0,
    positions=16,
)
TOKENS = ["<s>", "</s>", *"abcdefghijklm", "ab"]
INTERESTING = (
    *(None, True, -1, 0, 1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(1e308, 1e-320, -0.5, float("nan"), float("inf"), "", "0", "../../x", "/etc/passwd"),
    *("a\0b", "\x1b[2J", "\x9b2J", "\u202ecod", "\ud800", "é" * 300, [], {}, [[]], [None]),
    *({"": 0}, [0] * 1000, ["x"], {"a": {}}),
)
NAMES = (
    *("../x", "/x", "C:x", "a\\b", "x/../../y", "\u202ex", "learnware.yaml", "adapter"),
    "x" * 600,
)


class Target(NamedTuple):
    """A reader, the file that is mutated, and how its own errors begin."""

    file: str  # a pattern in a home (see `prepare`)
    read: Callable[[Path], Any]
    says: str
    mutators: Sequence[Callable[[random.Random, bytes], bytes]]


class Outcome(NamedTuple):
    """What a reader made of an input: "read", "refused", or what went wrong."""

    kind: str
    detail: str = ""


def check(config: ConfigDict) -> None:
    """ValueError for readers or an engine that are not known, or one that is not installed."""
    unknown = set(config.readers) - set(TARGETS)
    if unknown or config.engine not in ENGINES:
        raise ValueError(
            f"fuzz: got readers={config.readers}, engine={config.engine!r}; want some of "
            f"{', '.join(TARGETS)}, or () for all, and one of {', '.join(ENGINES)}."
        )
    if config.engine == "atheris":
        _atheris()


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    amount = f"{config.inputs} files" if config.engine == "mutations" else f"{config.seconds} s"
    return {
        "readers": f"{named(config.readers or list(TARGETS))}; {amount} each",
        "next": "dock --dock=docks/quickstart --check",
    }


def run(config: ConfigDict) -> dict:
    """Try every reader; returns what it writes to workdir/results.json. Failures are saved beside.

    ValueError for readers or an engine that are not known, or one that is not installed.
    """
    check(config)
    workdir = Path(config.workdir)
    failures = workdir / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    output: dict[str, Any] = {"engine": config.engine, "seed": config.seed, "readers": {}}
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home))
        for name in config.readers or TARGETS:
            begin = time.perf_counter()
            row = ENGINES[config.engine](name, Path(home), config, failures)
            row["seconds"] = round(time.perf_counter() - begin, 1)
            output["readers"][name] = row
            say(f"{name:18} {json.dumps(row)}")
    rows = output["readers"].values()
    output["inputs"] = sum(row["inputs"] for row in rows)
    output["failed"] = sum(row["failed"] for row in rows)
    write_json(workdir / "results.json", output)
    print(f"{output['inputs']} inputs, {output['failed']} failed")
    print(f"data    {workdir / 'results.json'}")
    if output["failed"]:
        print(f"failed  {failures}")
    return output


# ---- what is read


def prepare(home: Path) -> None:
    """Sound files of every kind in an empty folder, by their own writers."""
    rng = np.random.default_rng(0)
    space = {"encoder": "mini", "dimension": 3, "kernel": to_dict(Gaussian(0.5))}
    about = {"points": 2, "n": 9, "residual": 0.125}
    adapter = lora.init_adapter(
        jax.random.key(0), MODEL, rank=1, alpha=2.0, targets=("query", "out")
    )
    files = lora.to_peft(adapter, base="tiny", dtype="float32")
    (home / "peft").mkdir()
    for name, data in files.items():
        (home / "peft" / name).write_bytes(data)
    dock = home / "dock"
    store.create_dock(dock, space)
    for i, id in enumerate(("a", "b", "c")):
        z = rng.normal(size=(2, 3)).astype(np.float32)
        spec = RKME(z, np.array([0.25, 0.75]))
        card = {"name": id, "domain": "law", "description": "tort", "evaluation": {"accuracy": 0.5}}
        one = store.Learnware(id, card, spec, Header(SCHEMA, "rkme", space, about))
        store.add(dock, one, adapter=files if i == 0 else None)
    store.write_spec(home / "spec.safetensors", *store.read_learnware(dock, "a")[2:])
    key = signature.new_key()
    signature.sign(dock, "a", key)
    (home / "KEYS").write_text(f"# those we know\n{signature.public_text(key)} anna\n")
    index.update(dock, jax.random.key(0))
    _rename_index(dock)
    interop.export_zip(dock, "a", home / "own.zip")
    with zipfile.ZipFile(home / "own.zip") as archive:
        (home / "rkme.json").write_bytes(archive.read("rkme.json"))
    _write_model(home / "model")
    _write_gguf(home / "model.gguf")
    rows = pandas.DataFrame(
        {"text": ["one two", 'say "three"', "four\nfive"], "answer": ["a", "b", "c"]}
    )
    rows.to_parquet(home / "texts.parquet")
    rows.to_csv(home / "texts.csv", index=False)
    rows.to_csv(home / "texts.tsv", index=False, sep="\t")
    rows.to_json(home / "texts.json", orient="records")
    rows.to_json(home / "texts.jsonl", orient="records", lines=True)


def _rename_index(dock: Path) -> None:
    """Its files' names hold a random word; inputs that are kept hold this one."""
    file = dock / "index/index.json"
    word = json.loads(file.read_text())["files"]
    for old in (dock / "index").iterdir():
        old.rename(old.with_name(old.name.replace(word, "0" * 8)))
    file.write_text(file.read_text().replace(word, "0" * 8))


def _tensors(names: dict[str, str], stem: str) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.param_shapes(MODEL)):
        keys = [key.key for key in path]
        array = rng.normal(size=leaf.shape).astype(np.float32)
        array = array[0] if keys[0] == "layers" else array
        array = np.ascontiguousarray(array.T) if keys[-1] == "kernel" else array
        front = f"{stem}.0." if keys[0] == "layers" else ""
        found[f"{front}{names[keys[-2] if keys[0] == 'layers' else keys[0]]}.weight"] = array
    return found


def _write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    folder.mkdir()
    settings = {
        "model_type": "llama",
        "vocab_size": MODEL.vocabulary,
        "hidden_size": MODEL.width,
        "intermediate_size": MODEL.feedforward,
        "num_hidden_layers": MODEL.layers,
        "num_attention_heads": MODEL.heads,
        "num_key_value_heads": MODEL.kv_heads,
        "max_position_embeddings": MODEL.positions,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "eos_token_id": [1],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    Tokenizer(models.BPE(vocabulary, [("a", "b")])).save(str(folder / "tokenizer.json"))
    found = _tensors(weights.IN_FOLDER, "model.layers")
    (folder / "part.safetensors").write_bytes(safetensors.numpy.save(found))
    shards = {"weight_map": dict.fromkeys(found, "part.safetensors")}
    (folder / weights.INDEX).write_text(json.dumps(shards))


def _write_gguf(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(MODEL.layers)
    writer.add_context_length(MODEL.positions)
    writer.add_embedding_length(MODEL.width)
    writer.add_feed_forward_length(MODEL.feedforward)
    writer.add_head_count(MODEL.heads)
    writer.add_head_count_kv(MODEL.kv_heads)
    writer.add_layer_norm_rms_eps(MODEL.epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * 14])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, array in _tensors(weights.IN_GGUF, "blk").items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_dock(home: Path) -> None:
    for id in store.list_ids(home / "dock"):
        store.read_learnware(home / "dock", id)


def _read_adapter(home: Path) -> None:
    lora.from_peft(store.read_peft(home / "peft"), MODEL)


def _import(home: Path) -> None:
    shutil.rmtree(home / "imported", ignore_errors=True)
    interop.import_zip(home / "imported", home / "own.zip", "own")
    if problems := store.check(home / "imported"):
        raise AssertionError(f"what was imported is unsound: {problems}")


def _open_index(home: Path) -> None:
    opened = index.open_index(home / "dock")
    index.ids_of(opened, range(min(len(opened.ids), 100)))


def _open_landmarks(home: Path) -> None:
    # Whoever changes the landmarks changes their checksum.
    file = home / "dock/index/index.json"
    fields = json.loads(file.read_text())
    (data,) = (home / "dock/index").glob("landmarks.*")
    fields["sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
    file.write_text(json.dumps(fields))
    _open_index(home)


def _read_pairs(home: Path) -> None:
    texts.read_file(home / "texts.jsonl")
    texts.read_pairs(home / "texts.jsonl", text="text", answer="answer")


# ---- what is done to it


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, set, cut, repeat, insert, or write over with a number that lies."""
    what = bytearray(data)
    at = rng.randrange(len(what) + 1)
    length = rng.choice((1, 2, 4, 8, 16, 100, 1000))
    match rng.randrange(7):
        case 0 if at < len(what):
            what[at] ^= 1 << rng.randrange(8)
        case 1:
            what[at : at + 1] = bytes([rng.randrange(256)])
        case 2:
            del what[at : at + length]
        case 3:
            what[at:at] = what[at : at + length] * rng.choice((1, 2, 50))
        case 4:
            what[at:at] = rng.randbytes(length)
        case 5:
            del what[at:]
        case _:
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            packed = struct.pack("<Q", number)[: rng.choice((4, 8))]
            what[at : at + len(packed)] = packed
    return bytes(what)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Another value, key, type or depth somewhere in a JSON text; bytes, where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(rng, data)
    places: list[tuple[Any, Any]] = []

    def walk(node):
        for key in [*node] if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(value, dict | list):
        walk(value)
    if not places:
        return json.dumps(rng.choice(INTERESTING)).encode()
    node, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice((f"{key}x", "", "\x1b[2J", "__metadata__"))] = node.pop(key)
        case 2:
            return json.dumps(value).replace("{", f'{{"{rng.choice(TOKENS)}": 0, ', 1).encode()
        case 3:
            depth = rng.choice((40, 60, 2000, 100_000))
            node[key] = "@"
            return json.dumps(value).replace('"@"', "[" * depth + "]" * depth).encode()
        case 4:
            other, place = rng.choice(places)
            node[key] = json.loads(json.dumps(other[place]))
        case 5 if isinstance(node[key], list):
            node[key] = node[key] * rng.choice((0, 2, 100))
        case _:
            node[key] = rng.choice(INTERESTING)
    return json.dumps(value).encode()


def change_lines(rng: random.Random, data: bytes) -> bytes:
    """Another value in one line of JSON lines."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = change_json(rng, lines[at])
    return b"\n".join(lines)


def change_arrays(rng: random.Random, data: bytes) -> bytes:
    """Another header of a safetensors file, or another header of ours in it."""
    length = int.from_bytes(data[:8], "little")
    text, arrays = data[8 : 8 + length], data[8 + length :]
    try:
        fields = json.loads(text)
        inner = fields["__metadata__"]["header"]
    except (ValueError, LookupError, TypeError, RecursionError):
        inner = None
    if isinstance(inner, str) and rng.random() < 0.6:
        fields["__metadata__"]["header"] = change_json(rng, inner.encode(errors="replace")).decode(
            errors="replace"
        )
        text = json.dumps(fields).encode()
    else:
        text = change_json(rng, text)
    return struct.pack("<Q", len(text)) + text + arrays


def forge(rng: random.Random, data: bytes) -> bytes:
    """A specification with the checksum of what it holds, as whoever lies would write it."""
    try:
        length = int.from_bytes(data[:8], "little")
        fields, arrays = json.loads(data[8 : 8 + length]), data[8 + length :]
        record = json.loads(fields["__metadata__"]["header"])
        record.pop("sha256", None)
        parts = [json.dumps(record, sort_keys=True).encode()]
        parts += [arrays[slice(*fields[name]["data_offsets"])] for name in ("z", "beta")]
        record["sha256"] = hashlib.sha256(b"\n".join(parts)).hexdigest()
        fields["__metadata__"]["header"] = json.dumps(record)
        text = json.dumps(fields).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return change_bytes(rng, data)
    return struct.pack("<Q", len(text)) + text + arrays


def change_zip(rng: random.Random, data: bytes) -> bytes:
    """Another member, name, kind or compression in a zip; bytes, where it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # what mutations made of it
        return change_bytes(rng, data)
    if not members:
        return change_bytes(rng, data)
    at, stream = rng.randrange(len(members)), io.BytesIO()
    name, content = members[at]
    link, method = False, zipfile.ZIP_STORED
    match rng.randrange(7):
        case 0:
            name = rng.choice(NAMES)
        case 1:
            link = True
        case 2:
            members.append((name, content))
        case 3:
            content, method = (
                b"[" + b"0," * rng.choice((10**4, 10**6)) + b"0]",
                zipfile.ZIP_DEFLATED,
            )
        case 4:
            method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case _:
            change = change_json if name.endswith("json") else change_bytes
            content = change(rng, content)
    members[at] = name, content
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (each, value) in enumerate(members):
            info = zipfile.ZipInfo(each)
            info.external_attr = (0o120777 if link and i == at else 0o100644) << 16
            archive.writestr(info, value, method if i == at else zipfile.ZIP_STORED)
    return stream.getvalue()


ARRAYS = (change_bytes, change_arrays, change_arrays)
JSON = (change_bytes, change_json, change_json, change_json)
BYTES = (change_bytes,)
MODEL_SAYS = "load_model: "
TARGETS = {
    "spec": Target(
        "spec.safetensors",
        lambda home: store.read_spec(home / "spec.safetensors"),
        "read_spec: ",
        (*ARRAYS, forge, forge),
    ),
    "card": Target(
        "dock/learnwares/a/card.json",
        lambda home: store.read_learnware(home / "dock", "a"),
        "read_learnware: ",
        JSON,
    ),
    "dock": Target("dock/dock.json", _read_dock, "(list_ids|read_learnware): ", JSON),
    "signature": Target(
        "dock/learnwares/a/signature.json",
        lambda home: signature.read_signed(home / "dock", "a", signature.read_keys(home / "KEYS")),
        "read_signed: ",
        JSON,
    ),
    "keys": Target("KEYS", lambda home: signature.read_keys(home / "KEYS"), "read_keys: ", BYTES),
    "adapter config": Target("peft/adapter_config.json", _read_adapter, "from_peft: ", JSON),
    "adapter weights": Target(
        "peft/adapter_model.safetensors", _read_adapter, "from_peft: ", ARRAYS
    ),
    "zip": Target("own.zip", _import, "(read_zip|add|create_dock): ", (change_bytes, change_zip)),
    "zip rkme": Target(
        "rkme.json",
        lambda home: interop.read_rkme((home / "rkme.json").read_bytes()),
        "read_rkme: ",
        JSON,
    ),
    "model config": Target(
        "model/config.json", lambda home: weights.load_model(home / "model"), MODEL_SAYS, JSON
    ),
    "model weights": Target(
        "model/part.safetensors",
        lambda home: weights.load_model(home / "model"),
        MODEL_SAYS,
        ARRAYS,
    ),
    "model shards": Target(
        "model/*.index.json", lambda home: weights.load_model(home / "model"), MODEL_SAYS, JSON
    ),
    "tokenizer": Target(
        "model/tokenizer.json", lambda home: weights.load_model(home / "model"), MODEL_SAYS, JSON
    ),
    "tokenizer config": Target(
        "model/tokenizer_config.json",
        lambda home: weights.load_model(home / "model"),
        MODEL_SAYS,
        JSON,
    ),
    "gguf": Target(
        "model.gguf", lambda home: weights.load_model(home / "model.gguf"), MODEL_SAYS, BYTES
    ),
    "index": Target("dock/index/index.json", _open_index, "(open_index|ids_of): ", JSON),
    "index landmarks": Target("dock/index/landmarks.*", _open_landmarks, "open_index: ", ARRAYS),
    "index rows": Target("dock/index/rows.*", _open_index, "open_index: ", BYTES),
    "index points": Target("dock/index/points.*", _open_index, "(open_index|ids_of): ", BYTES),
    **{
        f"texts {kind}": Target(
            f"texts.{kind}",
            partial(lambda kind, home: texts.read_file(home / f"texts.{kind}"), kind),
            "read_file: ",
            mutators,
        )
        for kind, mutators in (
            *(("json", JSON), ("csv", BYTES), ("tsv", BYTES), ("parquet", BYTES)),
        )
    },
    "texts jsonl": Target(
        "texts.jsonl", _read_pairs, "read_(file|pairs): ", (change_bytes, change_lines)
    ),
}


def mutate(target: Target, data: bytes, key: str) -> bytes:
    """The input number so and so: it depends on nothing else."""
    rng = random.Random(key)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(target.mutators)(rng, data)
    return data[: 2**20]


def file_of(target: Target, home: Path) -> Path:
    """The file of a home that the target's inputs are written to."""
    (file,) = home.glob(target.file)
    return file


def attempt(target: Target, file: Path, home: Path, data: bytes) -> Outcome:
    """Let the reader read these bytes. Its own errors are one line that a terminal can show."""
    file.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(home)
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        if re.match(target.says, message) is None:
            return Outcome("error of another's", traceback.format_exc())
        if not message.isprintable() or len(message) > 20_000:
            return Outcome("message", repr(message))
        return Outcome("refused", message)
    except Exception:
        return Outcome("other error", traceback.format_exc())
    except BaseException as error:  # pyo3 raises panics of Rust as such
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return Outcome("panic", traceback.format_exc())
    return Outcome("read")


# ---- how it is tried


def _mutations(name: str, home: Path, config: ConfigDict, failures: Path) -> dict[str, Any]:
    """Counts of outcomes over `config.inputs` inputs, in processes that may die of one."""
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    peak, begin = 0, 0
    while begin < config.inputs:
        at = context.Value("q", begin)
        receive, send = context.Pipe(duplex=False)
        settings = (name, str(home), begin, config.inputs, config.seed, config.timeout)
        worker = context.Process(target=_work, args=(*settings, at, send))
        worker.start()
        send.close()
        try:
            while True:
                kind, value = receive.recv()
                if kind == "peak":
                    peak = max(peak, value)
                else:
                    counts[kind] += 1
                    if value is not None:
                        _keep(
                            failures, name, value, kind, _input(name, home, config.seed, value[0])
                        )
        except EOFError:
            worker.join()
        begin = config.inputs
        if worker.exitcode:
            kind = "hang" if worker.exitcode == -signal.SIGALRM else f"died ({worker.exitcode})"
            counts[kind] += 1
            _keep(failures, name, (at.value, ""), kind, _input(name, home, config.seed, at.value))
            begin = at.value + 1
    good = {kind: counts.pop(kind, 0) for kind in ("read", "refused")}
    row = {"inputs": config.inputs, **good, "failed": sum(counts.values())}
    return row | {"peak_mib": peak >> 20} | dict(counts)


def _input(name: str, home: Path, seed: int, number: int) -> bytes:
    target = TARGETS[name]
    return mutate(target, file_of(target, home).read_bytes(), f"{seed} {name} {number}")


def _keep(failures: Path, name: str, found: tuple[int, str], kind: str, data: bytes) -> None:
    number, detail = found
    stem = f"{name.replace(' ', '-')}-{number}"
    (failures / stem).write_bytes(data)
    (failures / f"{stem}.txt").write_text(f"{kind}\n{detail}\n", "utf-8", "backslashreplace")


def _work(
    name: str, home: str, begin: int, end: int, seed: int, timeout: int, at: Any, send: Any
) -> None:
    """Try the inputs begin .. end - 1 in a home of its own, watched."""
    target, sound = TARGETS[name], file_of(TARGETS[name], Path(home)).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "home"
        shutil.copytree(home, own)
        file = file_of(target, own)
        tempfile.tempdir = str(own)
        os.chdir(own)  # names that are relative, also to an open folder, are inside
        attempt(target, file, own, sound)  # imports what it needs
        touched = _watch(own)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
        rested = _resident()
        for number in range(begin, end):
            at.value = number
            data = mutate(target, sound, f"{seed} {name} {number}")
            signal.alarm(timeout)
            outcome = attempt(target, file, own, data)
            signal.alarm(0)
            around = [path.name for path in Path(folder).iterdir() if path != own]
            if touched or around:
                outcome = Outcome("touched", f"{touched} {around}")
                touched.clear()
            good = outcome.kind in ("read", "refused")
            send.send((outcome.kind, None if good else (number, outcome.detail)))
        send.send(("peak", _resident() - rested))


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _watch(home: Path) -> list[str]:
    """A list that grows when Python writes outside of `home`, reads where it has no business, runs
    a program, loads a pickle or calls somebody."""
    sys.dont_write_bytecode = True
    touched: list[str] = []
    own = f"{home}/"
    readable = (
        own,
        *map(str, (ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc")),
    )
    changing = (
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
    )
    never = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not path.startswith(own if writes else readable):
                touched.append(f"{event} {path}")
        elif event in changing:
            if not os.path.abspath(os.fsdecode(arguments[0])).startswith(str(home)):
                touched.append(f"{event} {arguments!r}")
        elif event in never or event.startswith("socket.connect"):
            touched.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return touched


def _atheris() -> types.ModuleType:
    try:
        import atheris
    except ImportError as error:
        raise ValueError(
            "fuzz: atheris is not installed; pip install atheris, where there is one for this "
            "Python, or leave engine at 'mutations'."
        ) from error
    return atheris


def _guided(name: str, home: Path, config: ConfigDict, failures: Path) -> dict[str, Any]:
    """`config.seconds` of inputs that libFuzzer chooses by the lines which they reach."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home, f"{folder}/home")
        shutil.copytree(home, f"{folder}/sound")
        count = context.Value("q", 0)
        arguments = (
            name,
            folder,
            config.seconds,
            config.seed,
            config.timeout,
            str(failures),
            count,
        )
        worker = context.Process(target=_guide, args=arguments)
        worker.start()
        worker.join()
    failed = int(worker.exitcode != 0)
    return {"inputs": count.value, "failed": failed}


def _guide(
    name: str, folder: str, seconds: int, seed: int, timeout: int, failures: str, count: Any
) -> None:
    atheris, target, own = _atheris(), TARGETS[name], Path(folder) / "home"
    file = file_of(target, own)
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    sound = file.read_bytes()
    (corpus / "sound").write_bytes(sound)
    tempfile.tempdir = str(own)
    attempt(target, file, own, sound)
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                atheris.instrument_func(getattr(value, "__wrapped__", value))

    def one(data: bytes) -> None:
        count.value += 1
        outcome = attempt(target, file, own, data)
        if outcome.kind not in ("read", "refused"):
            raise AssertionError(f"{outcome.kind}: {outcome.detail}")

    def change(data: bytes, most: int, number: int) -> bytes:
        if number % 2:
            return atheris.Mutate(data, most)
        return mutate(target, data, str(number))[:most]

    limit = (_resident() + GIB) >> 20
    options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", f"-timeout={timeout}"]
    options += [f"-rss_limit_mb={limit}", "-max_len=65536", "-verbosity=0"]
    options += [f"-artifact_prefix={failures}/{name.replace(' ', '-')}-"]
    atheris.Setup([name, *options, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


ENGINES = {"mutations": _mutations, "atheris": _guided}
