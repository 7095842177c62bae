"""What strangers may put into a dock: refused with one reason, and the rest of the dock serves."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import fuzz as fuzz_config
from experiments import dock as dock_command
from experiments import fuzz, models, select
from learnware_jax import figures
from learnware_jax.dock import interop, opening, store, texts
from learnware_jax.slm import lora, weights
from learnware_jax.specification.header import (
    MAX_PARTS,
    Header,
    dump_json,
    parse_json,
    printable,
)
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.tensors import MAX_HEADER_BYTES, read_stored

CORPUS = Path(__file__).parent / "corpus"
SPACE = {"encoder": "mini", "dimension": 2, "kernel": {"name": "gaussian", "gamma": 0.5}}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
HEADER = Header(1, "rkme", SPACE, {"points": 2, "n": 9, "residual": 0.0})
SPEC = RKME(np.array([[0, 1], [2, 3]], np.float32), np.array([0.25, 0.75]))
MODEST = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def learnware(id: str, **card) -> store.Learnware:
    return store.Learnware(id, {"name": id} | card, SPEC, HEADER)


@pytest.fixture
def dock(tmp_path) -> Path:
    """Learnwares a (with an adapter), b and c."""
    store.create_dock(tmp_path / "dock", SPACE)
    for id in "abc":
        one = learnware(id, domain="law", description="tort")
        store.add(tmp_path / "dock", one, adapter=ADAPTER if id == "a" else None)
    return tmp_path / "dock"


def rest(dock: Path) -> list[str]:
    """What loads, whatever is beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [one.id for one in store.load(dock)]


# What failed once


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("home")
    fuzz.prepare(made)
    return made


PAST = sorted(file for file in CORPUS.glob("*/*"))


@pytest.mark.parametrize("file", PAST, ids=[f"{f.parent.name}/{f.name}" for f in PAST])
def test_past_failures_are_read_or_refused(home, tmp_path, file):
    target = fuzz.TARGETS[file.parent.name.replace("-", " ")]
    own = shutil.copytree(home, tmp_path / "home")
    outcome = fuzz.attempt(target, fuzz.file_of(target, own), own, file.read_bytes())
    assert outcome.kind in ("read", "refused"), outcome


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_sound_files_are_read_and_mutated_ones_read_or_refused(home, tmp_path, name):
    target, own = fuzz.TARGETS[name], shutil.copytree(home, tmp_path / "home")
    file = fuzz.file_of(target, own)
    sound = file.read_bytes()
    assert fuzz.attempt(target, file, own, sound).kind == "read"
    for number in range(20):
        data = fuzz.mutate(target, sound, f"test {number}")
        outcome = fuzz.attempt(target, file, own, data)
        assert outcome.kind in ("read", "refused"), (number, outcome)


PLANTED = """
import linecache, os, sys, time
from pathlib import Path
from configs import fuzz as fuzz_config
from experiments import fuzz

linecache.getlines(__file__)  # for a traceback, which would read where it has no business
FAULTS = {
    b"1": os.abort,
    b"2": lambda: Path(sys.argv[1], "outside").write_text("x"),
    b"3": lambda: os.system("true"),
    b"4": lambda: bytearray(2**31),
    b"5": lambda: time.sleep(60),
}


def read(home):
    FAULTS.get((home / "KEYS").read_bytes(), lambda: None)()


fuzz.TARGETS = {"bad": fuzz.Target("KEYS", read, "", fuzz.BYTES)}
fuzz.mutate = lambda target, data, key: key.split()[-1].encode()
if __name__ == "__main__":
    config = fuzz_config.get_config("smoke")
    config.readers, config.inputs, config.timeout, config.workdir = (), 7, 2, sys.argv[1]
    fuzz.run(config)
"""


def test_the_fuzzer_sees_every_fault_and_goes_on(tmp_path):
    """Inputs 1 to 5 of 7 are bad: two of them end the process that reads them."""
    (tmp_path / "planted.py").write_text(PLANTED)
    done = subprocess.run(
        [sys.executable, tmp_path / "planted.py", tmp_path / "work"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "work/results.json").read_text())["readers"]["bad"]
    faults = {"died (-6)": 1, "touched": 2, "other error": 1, "hang": 1}
    assert {key: row[key] for key in faults} == faults
    assert (row["inputs"], row["read"], row["refused"], row["failed"]) == (7, 2, 0, 5)
    kept = {file.name for file in (tmp_path / "work/failures").glob("bad-?")}
    assert kept == {f"bad-{number}" for number in range(1, 6)}


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda home: None, "read"),
        (lambda home: {}["x"], "other error"),
        (lambda home: int("x"), "error of another's"),
        (lambda home: store.read_card(home / "absent"), "refused"),
        (lambda home: store.read_card(home / "\x1b[2J"), "message"),
    ],
)
def test_only_own_errors_that_can_be_shown_are_allowed(tmp_path, read, kind):
    target = fuzz.Target("x", read, "read_card: ", ())
    assert fuzz.attempt(target, tmp_path / "x", tmp_path, b"").kind == kind


def test_a_fuzzer_that_is_not_there_is_named(tmp_path, monkeypatch):
    config = fuzz_config.get_config("smoke")
    config.workdir = str(tmp_path / "work")
    for name, value, message in (
        ("engine", "afl", r"engine='afl'; want some of spec, .* one of mutations, atheris"),
        ("readers", ("x",), r"readers=\('x',\)"),
    ):
        changed = config.copy_and_resolve_references()
        changed[name] = value
        with pytest.raises(ValueError, match=message):
            fuzz.run(changed)
    monkeypatch.setitem(sys.modules, "atheris", None)
    config.engine = "atheris"
    with pytest.raises(ValueError, match=r"atheris is not installed; pip install atheris"):
        fuzz.run(config)
    assert not (tmp_path / "work").exists()


# JSON


CARDS = {
    "a key twice": ('{"a": 1, "b": {"x": 1, "x": 2}}', "the key 'x' stands twice in one object"),
    "an escape twice": ('{"\\u001b": 1, "\\u001b": 2}', r"the key '\\x1b' stands twice"),
    "digits": (f'{{"n": {"9" * 5000}}}', "not a JSON text .*4300"),
    "400 digits": (f'{{"n": [0, {10**400}]}}', r"n\[1\] is an integer of 1329 bits; want at most"),
    "64 bits": (f'{{"n": {2**63}}}', "n is an integer of 64 bits"),
    "negative": (f'{{"n": {-(2**63)}}}', "n is an integer of 64 bits"),
    "infinite": ('{"n": 1e999}', "n is inf; want a finite number"),
    "NaN": ('{"n": NaN}', "n is nan; want a finite number"),
    "deep": ('{"n": ' + "[" * 60 + "]" * 60 + "}", "nested deeper than 50 levels"),
    "deeper": ("[" * 500_000, "not a JSON text"),
    "UTF-16": ('{"name": "x"}'.encode("utf-16"), "not a JSON text"),
    "latin": (b'{"name": "\xe9"}', "not a JSON text"),
    "list": ("[]", "holds a list; want a JSON object"),
    "domain": ('{"domain": ["law"]}', r"its domain is \['law'\]; want a string"),
    "hidden": ('{"\\u202eevil\\u001b[2J": 1e999}', r"\\u202eevil\\x1b\[2J is inf"),
    "large": (" " * (store.MAX_JSON_BYTES + 1), "has 1048577 bytes; want at most 1048576"),
}


@pytest.mark.parametrize(("text", "message"), CARDS.values(), ids=CARDS)
def test_cards_that_lie_or_burst_are_refused(dock, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (dock / "learnwares/a/card.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^read_learnware: .*/a/card\.json.*{message}") as told:
        store.read_learnware(dock, "a")
    assert str(told.value).isprintable() and len(str(told.value)) < 1000
    assert rest(dock) == ["b", "c"] and [p.id for p in store.check(dock)] == ["a"]


def test_the_greatest_integer_and_a_mark_of_order_are_read():
    assert parse_json(f"[{2**63 - 1}, {-(2**63) + 1}]", where="") == [2**63 - 1, 1 - 2**63]
    assert parse_json('\ufeff{"a": "é"}'.encode(), where="") == {"a": "é"}


def test_a_text_of_many_parts_is_refused_before_it_is_parsed():
    """Five bytes of text are some seventy of lists."""
    text = "[" + "[[]]," * (MAX_PARTS // 2) + "0]"
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{MAX_PARTS + 1} lists, objects and members; at most"):
        parse_json(text, where="x")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(parse_json(text.replace("[[]],", "[],"), where="x")) == MAX_PARTS // 2 + 1


def test_a_late_repetition_among_many_keys_is_found_at_once():
    text = "{" + ",".join(f'"{i}": 0' for i in range(200_000)) + ', "199999": 1}'
    with pytest.raises(ValueError, match="the key '199999' stands twice"):
        parse_json(text, where="x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 'quoted' \\", "plain text, 'quoted' \\"),
        ("été 東京 😀", "été 東京 😀"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J\x00\x7f\r\n\t", r"\x9b2J\x00\x7f\r\n\t"),
        ("exe\u202etxt.\u2066a\u2069", r"exe\u202etxt.\u2066a\u2069"),
        ("\u2028\u200b\ufeff\ud800", r"\u2028\u200b\ufeff\ud800"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which is not seen
        ("x" * 201, "x" * 200 + "..."),
    ],
)
def test_what_is_shown_is_printable(text, shown):
    assert printable(text) == shown


# Arrays


def packed(header: dict | str | bytes, arrays: bytes = b"") -> bytes:
    text = (
        header
        if isinstance(header, bytes)
        else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    return struct.pack("<Q", len(text)) + text + arrays


def entry(dtype="F32", shape=(2,), place=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*place]} | more


ARRAYS = {
    "empty": (b"", "it has 0 bytes"),
    "cut length": (b"\1\0\0", "it has 3 bytes"),
    "longest": (struct.pack("<Q", 2**64 - 1), "a header of 18446744073709551615 bytes; at most"),
    "long": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1),
        f"header of {MAX_HEADER_BYTES + 1} bytes; at",
    ),
    "cut header": (packed({"a": entry()})[:20], r"a header of \d+ bytes, of which 12 are there"),
    "list": (packed("[]"), "its header is no JSON object"),
    "name twice": (packed('{"a": {}, "a": {}}'), "the key 'a' stands twice"),
    "metadata": (packed({"__metadata__": {"a": 1}}), "its metadata is no object of texts"),
    "metadata list": (packed({"__metadata__": []}), "its metadata is no object of texts"),
    "no entry": (packed({"a": 3}), "a has dtype None, shape None and offsets None, which no"),
    "more": (packed({"a": entry(x=1)}, bytes(8)), "which no array has"),
    "type": (packed({"a": entry("F1")}, bytes(8)), "a has dtype 'F1', shape"),
    "type list": (packed({"a": entry(["F32"])}, bytes(8)), "which no array has"),
    "negative": (packed({"a": entry(shape=(-1, -2))}, bytes(8)), r"shape \[-1, -2\]"),
    "fraction": (packed({"a": entry(shape=(2.0,))}, bytes(8)), r"shape \[2\.0\]"),
    "truth": (packed({"a": entry(shape=(True, 2))}, bytes(8)), r"shape \[True, 2\]"),
    "axes": (packed({"a": entry(shape=(1,) * 9, place=(0, 4))}, bytes(4)), "which no array has"),
    # 2^62 * 4 + 2 numbers of 4 bytes are 8 bytes in arithmetic of 64 bits.
    "overflow": (packed({"a": entry(shape=(2**62, 4))}), r"shape \[4611686018427387904, 4\]"),
    "wraps": (packed({"a": entry(shape=(2**32, 2**32), place=(0, 0))}), "which no array has"),
    "shape": (packed({"a": entry(shape=(3,))}, bytes(8)), "which no array has"),
    "backwards": (packed({"a": entry(place=(8, 0))}, bytes(8)), "which no array has"),
    "beyond": (packed({"a": entry()}, bytes(7)), r"its arrays end at byte \d+ of \d+"),
    "left over": (packed({"a": entry()}, bytes(9)), r"its arrays end at byte \d+ of \d+"),
    "gap": (packed({"a": entry(place=(1, 9))}, bytes(9)), "a gap or an overlap before a"),
    "overlap": (
        packed({"a": entry(), "b": entry(place=(4, 12))}, bytes(12)),
        "a gap or an overlap before b",
    ),
    "hidden": (packed({"\x1b[2J": entry(place=(1, 9))}, bytes(9)), r"before \\x1b\[2J"),
}


@pytest.mark.parametrize(("data", "message"), ARRAYS.values(), ids=ARRAYS)
def test_headers_that_lie_about_their_arrays_are_refused(dock, data, message):
    with pytest.raises(ValueError, match=message):
        read_stored(data, len(data))
    (dock / "learnwares/a/rkme.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^read_learnware: .*not a whole safetensors.*{message}"):
        store.read_learnware(dock, "a")
    with pytest.raises(ValueError, match=rf"^from_peft: .*no whole safetensors file: .*{message}"):
        lora.from_peft(PEFT | {"adapter_model.safetensors": data}, fuzz.MODEL)
    assert rest(dock) == ["b", "c"]


PEFT = {"adapter_config.json": b'{"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}'}


def test_arrays_are_where_the_header_says():
    data = packed(
        {
            "b": entry("I8", (3,), (4, 7)),
            "a": entry("U16", (1, 2), (0, 4)),
            "c": entry("F64", (0,), (7, 7)),
            "__metadata__": {"x": "y"},
        },
        bytes(range(7)),
    )
    start = len(data) - 7
    metadata, stored = read_stored(data[:start], len(data))
    assert metadata == {"x": "y"}
    assert stored == {
        "a": ("U16", (1, 2), start, start + 4),
        "b": ("I8", (3,), start + 4, start + 7),
        "c": ("F64", (0,), start + 7, start + 7),
    }


def test_a_specification_without_points_is_refused(tmp_path):
    header = HEADER._replace(about={"points": 0, "n": 9, "residual": 0.0})
    record = json.loads(dump_json(header._asdict(), where=""))
    digest = hashlib.sha256(dump_json(record, where="").encode() + b"\n\n").hexdigest()
    fields = {
        "z": entry("F32", (0, 2), (0, 0)),
        "beta": entry("F64", (0,), (0, 0)),
        "__metadata__": {"header": json.dumps(record | {"sha256": digest})},
    }
    (tmp_path / "spec").write_bytes(packed(fields))
    with pytest.raises(ValueError, match=r"^read_spec: .*want at least one row"):
        store.read_spec(tmp_path / "spec")


def test_sizes_are_compared_before_memory_is_taken(tmp_path, home):
    """Files of a GiB that are holes, and small files whose limits are large."""
    spec, model = tmp_path / "spec", shutil.copytree(home / "model", tmp_path / "model")
    spec.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(spec, 2**30)
    shutil.copy(spec, model / "part.safetensors")
    weights.load_model(home / "model")  # what is imported once
    gguf = shutil.copy(home / "model.gguf", tmp_path)
    data = bytearray(Path(gguf).read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4
    data[at : at + 8] = struct.pack("<Q", 2**40)
    Path(gguf).write_bytes(data)
    for read, message in (
        (lambda: store.read_spec(spec), "has 1073741824 bytes; want at most 67108864"),
        (lambda: weights.load_model(model), "a header of 1073741824 bytes; at most"),
        (lambda: weights.load_model(gguf), "no whole GGUF file: it ends before byte"),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            read()
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    tracemalloc.start()
    assert set(store.read_peft(home / "peft")) == set(store.ADAPTER_FILES)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_gguf_of_very_many_parts_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_PARTS", 100)
    with pytest.raises(ValueError, match="its settings have more than 100 parts"):
        weights.load_model(home / "model.gguf")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config", {"num_hidden_layers": 1024}, "are 12 tensors, and its settings say 1024 layers"),
        ("config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a positive"),
        ("config", {"vocab_size": 2**62}, "vocab_size is 4611686018427387904, not a positive"),
        ("config", {"num_key_value_heads": "2"}, "num_key_value_heads is '2', neither null nor"),
        ("config", {"head_dim": -4}, "head_dim is -4, neither null nor"),
        ("config", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ("config", {"model_type": ["llama"]}, r"model_type is \['llama'\]; only"),
        ("config", {"rope_scaling": [1]}, r"rotary positions are \[1\]; want an object"),
        ("config", {"rope_scaling": None, "rope_theta": [1]}, r"rope_theta is \[1\]; want a pos"),
        (
            "config",
            {"model_type": "mistral", "sliding_window": "x"},
            "sliding_window is 'x' and max",
        ),
        (
            "config",
            {"model_type": "mistral", "sliding_window": 4, "layer_types": [[]]},
            r"layer_types is \[\[\]\]; want",
        ),
        ("tokenizer_config", {"eos_token": {}}, None),
        (
            "tokenizer_config",
            {"eos_token": "\ud800"},
            "eos_token of tokenizer_config.json is '.ud800",
        ),
        ("config", {"eos_token_id": -1}, "eos_token_id of config.json is -1"),
        ("config", {"eos_token_id": [2**62]}, r"eos_token_id of config.json is \[4611"),
    ],
)
def test_settings_of_models_that_lie_are_refused(home, tmp_path, name, changes, message):
    folder = shutil.copytree(home / "model", tmp_path / "model")
    file = folder / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if name == "config" and "eos_token_id" in changes:
        (folder / "tokenizer_config.json").unlink()
    if message is None:
        assert weights.load_model(folder).end == 1  # as config.json says
        return
    with pytest.raises(ValueError, match=f"^load_model: .*{message}"):
        weights.load_model(folder)


def test_every_other_byte_of_a_specification_is_found_or_means_the_same(tmp_path):
    file = tmp_path / "spec"
    store.write_spec(file, SPEC, HEADER)
    sound, same = file.read_bytes(), []
    for at in range(len(sound)):
        for change in (0x01, 0x29, 0x80, 0xFF):  # 0x29 makes a tab of a blank
            file.write_bytes(sound[:at] + bytes([sound[at] ^ change]) + sound[at + 1 :])
            try:
                (z, beta), header = store.read_spec(file)
            except ValueError as error:
                assert str(error).startswith(f"read_spec: {file}")
                continue
            same.append(at)
            assert (z.tobytes(), beta.tobytes(), header) == (
                SPEC.z.tobytes(),
                SPEC.beta.tobytes(),
                HEADER,
            )
    # Blanks of the outer JSON alone.
    assert all(sound[at] == ord(" ") for at in same)


@pytest.mark.parametrize("name", ADAPTER)
def test_every_other_byte_of_an_adapter_is_found(dock, name):
    file = dock / "learnwares/a/adapter" / name
    for at in range(len(ADAPTER[name])):
        for change in (0x01, 0x80, 0xFF):
            data = bytearray(ADAPTER[name])
            data[at] ^= change
            file.write_bytes(data)
            with pytest.raises(ValueError, match="does not match its hash on the card"):
                store.read_adapter(dock, "a")
    for cut in (b"", ADAPTER[name][:-1], ADAPTER[name] + b"\n"):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="does not match its hash on the card"):
            store.read_adapter(dock, "a")
    assert [problem.id for problem in store.check(dock)] == ["a"]
    assert rest(dock) == ["a", "b", "c"]  # its specification is sound


# Files that are others when they are read


def test_a_link_that_comes_after_the_look_is_refused(dock, tmp_path, monkeypatch):
    card = dock / "learnwares/a/card.json"
    shutil.copy(card, tmp_path / "other")

    def late(path, *, where):
        if path == card:
            card.unlink(missing_ok=True)
            card.symlink_to(tmp_path / "other")

    monkeypatch.setattr(store, "refuse_link", late)
    with pytest.raises(ValueError, match=r"card\.json cannot be read \(Too many levels of symbol"):
        store.read_learnware(dock, "a")


@pytest.mark.parametrize("longer", [b"x", b"x" * 100])
def test_a_file_that_grows_after_the_look_is_refused(tmp_path, monkeypatch, longer):
    file, real = tmp_path / "file", os.fstat
    file.write_bytes(b"1234")

    def late(descriptor):
        status = real(descriptor)
        with open(file, "ab") as stream:
            stream.write(longer)
        return status

    monkeypatch.setattr(os, "fstat", late)
    with pytest.raises(
        ValueError, match=r"^here: .*/file changed while it was read; read it again"
    ):
        store.read_bytes(file, 50, where="here")


def test_a_pipe_does_not_block(dock):
    for name in ("card.json", "rkme.safetensors"):
        file = dock / "learnwares/a" / name
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(ValueError, match="is not a plain file"):
            store.read_learnware(dock, "a")
        file.unlink()
        shutil.copy(dock / "learnwares/b" / name, file)
    assert rest(dock) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "inside",
    [
        *("learnwares/a", "learnwares/a/card.json", "learnwares/a/rkme.safetensors"),
        *("learnwares/a/adapter", "learnwares/a/adapter/adapter_config.json"),
        "learnwares/a/adapter/adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize("target", ["there", "dangling", "loop"])
def test_a_link_in_one_learnware_is_its_own_matter(dock, tmp_path, inside, target):
    place = dock / inside
    place.rename(tmp_path / "elsewhere")
    goal = {"there": tmp_path / "elsewhere", "dangling": tmp_path / "absent", "loop": place}
    place.symlink_to(goal[target])
    (problem,) = store.check(dock)
    assert problem.id == "a" and "link" in problem.reason
    assert {"b", "c"} <= set(rest(dock))


def test_a_lock_behind_a_link_is_refused_and_what_it_leads_to_stays(dock, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (dock / ".lock").unlink()
    (dock / ".lock").symlink_to(precious)
    for write in (
        lambda: store.add(dock, learnware("d")),
        lambda: store.remove(dock, "a"),
    ):
        with pytest.raises(ValueError, match=r"\.lock is a symbolic link; a dock holds none"):
            write()
    assert precious.read_text() == "kept"


# Names


STRANGE = {
    "upper": "A",
    "full width": "\uff41",
    "cyrillic": "\u0430",
    "composed": "e\u0301",
    "dotless": "\u0131d",
    "kelvin": "\u212a",  # its lower case is k
    "turned": "a\u202eb",
    "joined": "a\u200db",
    "escape": "\x1b[2Ja",
    "line": "a\nb",
    "blank": "a b",
    "bytes": os.fsdecode(b"a\xff"),
    "none": "none",
    "long": "x" * 101,
}


@pytest.mark.parametrize("name", STRANGE.values(), ids=STRANGE)
def test_folders_of_strange_names_are_told_and_the_rest_serves(dock, name, capsys):
    shutil.copytree(dock / "learnwares/b", dock / "learnwares" / name)
    (problem,) = store.check(dock)
    assert problem.id == name and "is not an id; use at most 100" in problem.reason
    with pytest.warns(UserWarning, match="is not an id") as warned:
        assert [one.id for one in store.load(dock)] == ["a", "b", "c"]
    assert all(str(warning.message).isprintable() for warning in warned)
    with pytest.raises(ValueError, match="is not an id"):
        store.read_learnware(dock, name)
    assert call(f"--dock={dock}", "--check") == 1
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    assert "4 learnwares, 1 unsound." in said


def test_a_learnware_that_is_there_twice_is_one(dock):
    """A writer that was killed leaves the old beside the new; a stranger may, too."""
    shutil.copytree(dock / "learnwares/b", dock / ".moving/.old-b")
    assert store.list_ids(dock) == ["a", "b", "c"] == rest(dock)


# What a terminal or a page is shown


def call(*options: str) -> int:
    with flagsaver.flagsaver():
        flags.FLAGS(["dock", *options])
        try:
            dock_command.main(["dock"])
        except SystemExit as stopped:
            return stopped.code
    return 0


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202eevil\nfake 99% right\x9b1A\ud800"


@pytest.mark.parametrize(
    "card",
    [
        {"description": HOSTILE, "domain": HOSTILE},
        {"description": [HOSTILE], "evaluation": [1]},
        {"description": {"a": HOSTILE}, "evaluation": {"accuracy": "99%"}},
        {"evaluation": {"accuracy": [1]}, "domain": ""},
    ],
)
def test_a_listing_shows_no_strangers_escapes(tmp_path, card, capsys):
    store.create_dock(tmp_path / "dock", SPACE)
    store.add(tmp_path / "dock", learnware("a", **card))
    store.add(tmp_path / "dock", learnware("b", description="tort", evaluation={"accuracy": 0.75}))
    assert call(f"--dock={tmp_path}/dock") == 0
    said = capsys.readouterr().out.split("\n")
    assert len(said) == 4 and all(line.isprintable() for line in said)
    assert said[0].startswith("a ") and "99% right  " not in said[0]
    assert said[1].split() == ["b", "n=9", "75%", "right", "tort"]


def test_a_domain_is_shown_as_text():
    shown = opening.domain_of(learnware("a", domain=HOSTILE))
    assert shown.isprintable() and shown.startswith(r"\x1b]0;owned\x07\x1b[2J\u202eevil\n")
    assert opening.domain_of(learnware("a", domain="")) == "a" == opening.domain_of(learnware("a"))
    assert opening.domain_of(learnware("a", domain="law")) == "law"


@pytest.mark.parametrize("model", [HOSTILE, {"name": HOSTILE, "weights_sha256": [HOSTILE]}])
def test_why_a_model_is_not_used_is_shown_as_text(model):
    wanted = dict.fromkeys(("name", "template", "weights_sha256"), "x")
    with pytest.raises(ValueError, match=r"\\x1b\]0;owned") as told:
        models._check_model(model, wanted)
    assert str(told.value).isprintable()


def test_a_domain_is_no_cell_and_no_element_of_a_report():
    entry = {"id": "a", "domain": "x | <img src=y>", "distance": 0.0, "lower": 0.0, "upper": 0.1}
    user = {"id": "u", "n": 3, "undominated": ["a"], "decision": "a"}
    output = {
        "dock": "d",
        "learnwares": 1,
        "threshold": None,
        "level": 0.9,
        "users": [user | {"ranking": [entry], "mixture": [{"id": "a", "weight": 1.0}]}],
    }
    (row,) = [line for line in select._report(output).splitlines() if line.startswith("| 1 ")]
    assert r"| x \| &lt;img src=y> |" in row


def test_a_domain_is_no_mathematics_in_a_figure(tmp_path):
    entry = {"id": "a", "domain": "$\\frac$", "distance": 0.0, "lower": 0.0, "upper": 0.1}
    user = {"id": "u", "n": 3, "kind": "own", "domain": "", "undominated": ["a"], "decision": "a"}
    drawn = figures.rankings([user | {"ranking": [entry]}], 0.5)
    figures.save(drawn, tmp_path / "r")  # mathematics that is none would not be drawn
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [r"\$\frac\$"]


def test_one_giant_does_not_take_the_memory_of_all(monkeypatch):
    points = np.zeros((40, 2), np.float32)
    giant = learnware("giant")._replace(spec=RKME(points, np.full(40, 1 / 40)))
    dock = [learnware("a"), giant, learnware("b")]
    # As a pool: 3 learnwares of 40 points of 2 numbers of 4 bytes.
    monkeypatch.setattr(opening, "POOL_BYTES", 3 * 40 * 2 * 4)
    assert opening.without_giants(dock) == dock
    monkeypatch.setattr(opening, "POOL_BYTES", 3 * 40 * 2 * 4 - 1)
    with pytest.warns(UserWarning, match="left out 'giant': it has 40 points, and half .* most 2;"):
        assert [one.id for one in opening.without_giants(dock)] == ["a", "b"]
    assert opening.without_giants([giant]) == [giant]


# Zips and texts


@pytest.mark.parametrize("name", ["\x9b2J", "a\u202eb", "a\x85b"])
def test_members_with_hidden_names_are_refused(home, tmp_path, name):
    file = shutil.copy(home / "own.zip", tmp_path)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(ValueError, match=r"^read_zip: .*not printable") as told:
        interop.read_zip(file)
    assert str(told.value).isprintable()


def test_a_table_of_very_many_rows_is_refused(tmp_path, monkeypatch):
    """A million rows of nothing take a few KB in Parquet, and hundreds of MB as Python's."""
    table = pyarrow.table({"text": pyarrow.nulls(1_000_000, pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    monkeypatch.setattr(texts, "MAX_TABLE_BYTES", 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"takes more than 1048576 bytes when it is read; cut it"):
        texts.read_file(tmp_path / "bomb.parquet")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[" * 100_000, "line 1 is no valid JSON"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}', r"holds \\ud800, half of a character"),
        ("x.json", '[{"\\u001b[2J": 1}]', r"has no column of texts; it has \\x1b\[2J\."),
        ("x.parquet", "PAR1PAR1", "is no valid Parquet file"),
    ],
)
def test_texts_that_burst_or_break_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^read_file: .*{message}") as told:
        texts.read_file(tmp_path / name)
    assert str(told.value).isprintable()


# Whatever it is


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@MODEST
@given(VALUES)
def test_json_reads_back_equal(value):
    assert repr(parse_json(dump_json(value, where=""), where="")) == repr(
        json.loads(json.dumps(value, sort_keys=True))
    )


@MODEST
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_text_or_are_refused(data):
    try:
        value = parse_json(data, where="here")
    except ValueError as error:
        assert str(error).startswith("here: ") and str(error).isprintable()
    else:
        assert value == json.loads(data.decode("utf-8-sig"))


@MODEST
@given(st.data())
def test_any_damage_of_a_specification_is_found_or_means_the_same(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "damaged"
    store.write_spec(file, SPEC, HEADER)
    sound = file.read_bytes()
    begin = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(begin, len(sound)))
    file.write_bytes(sound[:begin] + data.draw(st.binary(max_size=20)) + sound[end:])
    try:
        (z, beta), header = store.read_spec(file)
    except ValueError as error:
        assert str(error).startswith("read_spec: ") and str(error).isprintable()
    else:
        assert (z.tobytes(), beta.tobytes(), header) == (
            SPEC.z.tobytes(),
            SPEC.beta.tobytes(),
            HEADER,
        )


@MODEST
@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([("F32", np.float32), ("F64", np.float64), ("U8", np.uint8)]),
    st.text(max_size=5).filter(lambda name: name != "__metadata__"),
)
def test_arrays_of_any_shape_are_read_as_the_library_writes_them(shape, kind, name):
    dtype, array = kind[0], np.zeros(shape, kind[1])
    data = safetensors.numpy.save({name: array}, {"k": "v"})
    metadata, stored = read_stored(data, len(data))
    assert metadata == {"k": "v"}
    assert stored == {name: (dtype, tuple(shape), len(data) - array.nbytes, len(data))}


@MODEST
@given(st.text(max_size=300))
def test_whatever_is_shown_is_one_printable_line(text):
    shown = printable(text, 100)
    assert shown.isprintable() and len(shown) <= 1003
    assert shown == text or not text.isprintable() or len(text) > 100
