"""The dock on disk: bit-exact round trips, killed writers, full disks, and files that lie."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
import warnings
from pathlib import Path

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from disk import fail_calls

from learnware_jax.dock import store
from learnware_jax.dock.store import Learnware
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.specification.header import (
    Header,
    IncompatibleSpecifications,
    check_same_space,
)
from learnware_jax.specification.kernels import Linear, from_dict, to_dict
from learnware_jax.specification.rkme import RKME, from_rows

DIMENSION = 5
SPACE = {
    "encoder": "mini",
    "dimension": DIMENSION,
    "kernel": {"name": "gaussian", "gamma": 0.1},
}


def version(id: str, number: int, space: dict | None = None) -> Learnware:
    """A learnware whose every part follows from `number`, so that parts of two are noticed."""
    rng = np.random.default_rng(number)
    points = 1 + number % 4
    z = rng.normal(size=(points, DIMENSION)).astype(np.float32)
    about = {"points": points, "number": number, "n": 30, "residual": 0.01}
    header = Header(1, "rkme", space or SPACE, about)
    card = {"name": id, "number": number, "description": "x" * 300}
    return Learnware(id, card, RKME(z, rng.dirichlet(np.ones(points))), header)


def bits(learnware: Learnware):
    """Everything in a learnware, comparable with ==."""
    id, card, (z, beta), header = learnware
    return id, card, header, z.dtype, z.shape, z.tobytes(), beta.dtype, beta.tobytes()


@pytest.fixture
def dock(tmp_path) -> Path:
    store.create_dock(tmp_path / "dock", SPACE)
    return tmp_path / "dock"


def hidden(dock: Path) -> list[str]:
    """What is on its way, or left of it."""
    return [path.name for path in dock.rglob(".*") if path.name not in (".lock", ".moving")]


# Round trips


def test_a_dock_returns_what_was_added(dock):
    added = [version("b", 1), version("a", 2), version("a-10.x_y", 3)]
    for learnware in added:
        store.add(dock, learnware)
    in_order = [bits(added[i]) for i in (1, 2, 0)]
    assert [bits(learnware) for learnware in store.load(dock)] == in_order
    assert store.list_ids(dock) == ["a", "a-10.x_y", "b"]
    assert bits(store.read_learnware(dock, "b")) == bits(added[0])
    assert store.read_space(dock) == SPACE
    assert store.read_header(dock) == Header(1, "rkme", SPACE, {})
    assert store.check(dock) == []


def test_replace_and_remove(dock):
    store.add(dock, version("a", 1))
    store.add(dock, version("b", 2))
    store.add(dock, version("a", 3), replace=True)
    assert [learnware.card["number"] for learnware in store.load(dock)] == [3, 2]
    store.remove(dock, "a")
    assert store.list_ids(dock) == ["b"]
    assert hidden(dock) == []


def test_every_bit_survives(tmp_path):
    z = np.array([[-0.0, 1e-45, 3.4028235e18], [0.1, -1e-38, 1 / 3]], np.float32)
    beta = np.array([5e-324, 1.0])
    header = Header(1, "rkme", {"dimension": 3}, {"points": 2, "n": 9, "residual": 0.0})
    store.write_spec(tmp_path / "user.safetensors", RKME(z, beta), header)
    (read_z, read_beta), read_header = store.read_spec(tmp_path / "user.safetensors")
    assert (read_z.dtype, read_z.tobytes()) == (np.float32, z.tobytes())
    assert (read_beta.dtype, read_beta.tobytes()) == (np.float64, beta.tobytes())
    assert read_header == header


@pytest.mark.parametrize(
    "convert",
    [jnp.asarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]],
    ids=["jax", "fortran", "strided"],
)
def test_arrays_of_other_layouts(tmp_path, convert):
    _, _, (z, _), header = version("a", 3)
    beta = np.array([0.5, 0.25, 0.125, 0.125], np.float32)  # exact in float64
    store.write_spec(tmp_path / "a", RKME(convert(z), convert(beta)), header)
    spec, _ = store.read_spec(tmp_path / "a")
    np.testing.assert_array_equal(spec.z, z)
    np.testing.assert_array_equal(spec.beta, beta)


def test_equal_specifications_are_equal_files(tmp_path):
    _, _, spec, header = version("a", 3)
    shuffled = header._replace(space=dict(reversed(SPACE.items())))
    for i in range(8):
        store.write_spec(tmp_path / str(i), spec, (header, shuffled)[i % 2])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_folder_is_as_documented(dock):
    store.add(dock, version("a", 1))
    files = {str(path.relative_to(dock)) for path in dock.rglob("*") if path.is_file()}
    assert files == {
        "dock.json",
        ".lock",
        "learnwares/a/card.json",
        "learnwares/a/rkme.safetensors",
    }
    card = json.loads((dock / "learnwares/a/card.json").read_text())
    assert card == version("a", 1).card
    assert json.loads((dock / "dock.json").read_text())["space"] == SPACE


def test_a_card_edited_by_hand_is_read(dock):
    store.add(dock, version("a", 1))
    (dock / "learnwares/a/card.json").write_text('{"name": "été"}', encoding="utf-8")
    assert store.read_learnware(dock, "a").card == {"name": "été"}


# Writers that are killed, and disks that are full


def numbers(dock: Path) -> dict[str, int]:
    """Which version of which learnware the dock holds: all of them whole, none skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learnwares = store.load(dock)
    for learnware in learnwares:
        assert bits(learnware) == bits(version(learnware.id, learnware.card["number"]))
    return {learnware.id: learnware.card["number"] for learnware in learnwares}


@pytest.mark.parametrize("later", ["later calls work", "later calls fail"])
@pytest.mark.parametrize(
    ("operation", "old", "new"),
    [
        (lambda dock: store.add(dock, version("a", 2)), {}, {"a": 2}),
        (lambda dock: store.add(dock, version("a", 2), replace=True), {"a": 1}, {"a": 2}),
        (lambda dock: store.remove(dock, "a"), {"a": 1}, {}),
    ],
    ids=["add", "replace", "remove"],
)
def test_whichever_call_fails_old_or_new_remains(tmp_path, operation, old, new, later):
    """Call k fails, alone (a passing fault) or with all later ones (what a kill leaves behind)."""
    seen = []
    for k in range(100):
        dock = tmp_path / str(k)
        store.create_dock(dock, SPACE)
        for id, number in old.items():
            store.add(dock, version(id, number))
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            made = fail_calls(patch, range(k, k + 1 if later == "later calls work" else 1000))
            try:
                operation(dock)
            except OSError as error:
                assert "No space left on device" in str(error)
                raised = True
        if len(made) <= k:
            break
        found = numbers(dock)
        assert found in (old, new) if raised else found == new
        seen.append(found)
        store.add(dock, version("b", 7))
        assert numbers(dock) == found | {"b": 7}
        assert hidden(dock) == []
    assert old in seen and new in seen


def test_what_cannot_be_deleted_is_left_to_the_next_writer(dock, monkeypatch):
    store.add(dock, version("a", 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *args, **kwargs: os.open("/dev/full/no", os.O_RDONLY))
        store.add(dock, version("a", 2), replace=True)
        assert (numbers(dock), hidden(dock)) == ({"a": 2}, [".old-a"])
        with pytest.raises(NotADirectoryError):
            store.remove(dock, "a")
    store.remove(dock, "a")
    assert (numbers(dock), hidden(dock)) == ({}, [])


def test_a_file_being_read_is_not_written_over(tmp_path):
    store.write_spec(tmp_path / "mine", *version("a", 1)[2:])
    with open(tmp_path / "mine", "rb") as reader:
        store.write_spec(tmp_path / "mine", *version("a", 2)[2:])
        (tmp_path / "kept").write_bytes(reader.read())
    for name, number in (("kept", 1), ("mine", 2)):
        assert (
            bits(version("a", number))[2:]
            == bits(Learnware("a", {}, *store.read_spec(tmp_path / name)))[2:]
        )


def write_for_ever(dock: Path, events, seed: int) -> None:
    """Tell what is about to happen, do it, tell that it is done."""
    rng = random.Random(seed)
    for step in range(10**6):
        id = rng.choice("abc")
        number = None if rng.random() < 0.3 else seed * 10**6 + step
        if number is None and id not in store.list_ids(dock):
            continue
        events.send(("begin", id, number))
        if number is None:
            store.remove(dock, id)
        else:
            store.add(dock, version(id, number), replace=True)
        events.send(("done", id, number))


def test_a_killed_writer_loses_nothing(dock):
    # The server imports everything once and starts no threads; each writer is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learnware_jax.dock.store", "pytest", "jax.numpy"])
    rng = random.Random(0)
    committed = dict.fromkeys("abc")
    commits = interrupted = 0
    for seed in range(20):
        events, writer_end = context.Pipe(duplex=False)
        writer = context.Process(target=write_for_ever, args=(dock, writer_end, seed))
        writer.start()
        writer_end.close()
        told = [events.recv() for _ in range(rng.randrange(2, 12))]
        time.sleep(rng.uniform(0, 0.01))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                told.append(events.recv())
        begun = None
        for word, *what in told:
            if word == "done":
                committed[what[0]] = what[1]
                commits += 1
            begun = what if word == "begin" else None
        interrupted += begun is not None
        found = dict.fromkeys("abc") | numbers(dock)
        allowed = {id: {number} for id, number in committed.items()}
        if begun:
            allowed[begun[0]].add(begun[1])
        assert all(found[id] in allowed[id] for id in "abc"), (found, allowed)
        committed = found
    assert commits > 0 and interrupted > 0
    store.add(dock, version("d", 1))
    assert hidden(dock) == []


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full:
        def __enter__(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return Full()


def test_a_full_disk_leaves_the_dock_as_it_was(dock, full_disk):
    store.add(dock, version("a", 1))
    for learnware in (version("a", 2), version("b", 2)):
        with full_disk, pytest.raises(OSError, match=r"add: could not write .*is unchanged"):
            store.add(dock, learnware, replace=True)
        assert hidden(dock) == []
    assert [bits(learnware) for learnware in store.load(dock)] == [bits(version("a", 1))]


def test_a_full_disk_leaves_a_users_file_as_it_was(tmp_path, full_disk):
    _, _, spec, header = version("a", 1)
    store.write_spec(tmp_path / "mine", spec, header)
    written = (tmp_path / "mine").read_bytes()
    with full_disk, pytest.raises(OSError, match="write_spec: could not write"):
        store.write_spec(tmp_path / "mine", *version("a", 2)[2:])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("mine", written)]


@pytest.mark.parametrize("part", ["card", "spec"])
def test_a_replacement_while_reading_is_noticed(dock, monkeypatch, part):
    """A writer that comes between the two files, or after both, cannot make a mixed learnware."""
    store.add(dock, version("a", 1))
    name = {"card": "read_card", "spec": "_decode"}[part]
    original = getattr(store, name)
    numbers = iter((2, 3, 4))  # an even count of swaps may hand the first inode out again

    def slow(*args, **kwargs):
        value = original(*args, **kwargs)
        for number in numbers:
            store.add(dock, version("a", number), replace=True)
        return value

    monkeypatch.setattr(store, name, slow)
    assert bits(store.read_learnware(dock, "a")) == bits(version("a", 4))


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "an earlier version"])
def test_a_learnware_set_aside_is_still_there(dock, earlier):
    """A writer killed between its two renames: readers see the old one, the next writer mends."""
    store.add(dock, version("a", 1))
    learnwares = dock / "learnwares"
    if earlier:
        (dock / ".moving").rmdir()
    left = learnwares if earlier else dock / ".moving"
    shutil.copytree(learnwares / "a", left / ".new-a")
    (learnwares / "a").rename(left / ".old-a")
    (left / ".gone-b").mkdir()
    assert store.list_ids(dock) == ["a"]
    assert bits(store.read_learnware(dock, "a")) == bits(version("a", 1))
    assert store.card_of(dock, "a") == version("a", 1).card
    with pytest.raises(FileExistsError, match="has a learnware 'a' already"):
        store.add(dock, version("a", 2))
    assert sorted(path.name for path in learnwares.iterdir()) == ["a"]
    assert hidden(dock) == []


def test_writers_do_not_list_the_learnwares(dock, monkeypatch):
    store.add(dock, version("a", 1))
    listed = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, real=real: listed.append(path) or real(path))
    store.add(dock, version("b", 1))
    store.add(dock, version("a", 2), replace=True)
    store.remove(dock, "b")
    assert dock / ".moving" in listed and dock / "learnwares" not in listed
    assert store.list_ids(dock) == ["a"] and dock / "learnwares" in listed


def test_a_replacement_while_listing_is_not_missed(dock, monkeypatch):
    """Between the two renames when learnwares are listed, done when the other folder is."""
    store.add(dock, version("a", 1))
    store.add(dock, version("b", 1))
    real, home, aside = os.listdir, dock / "learnwares/a", dock / ".moving/.old-a"

    def listdir(folder):
        if folder == dock / "learnwares" and home.exists():
            home.rename(aside)
            return real(folder)
        if folder == dock / ".moving" and aside.exists():
            monkeypatch.setattr(os, "listdir", real)
            aside.rename(home)
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    assert store.list_ids(dock) == ["a", "b"]


def test_every_change_leaves_another_mark(dock, monkeypatch):
    start = store.mark(dock)
    first = store.add(dock, version("a", 1))
    second = store.add(dock, version("a", 2), replace=True)
    third = store.remove(dock, "a")
    # Each begins where the last one ended, so that whoever else had come between would show.
    assert [*first, *second, *third] == [
        *(start, first.after, first.after),
        *(second.after, second.after, store.mark(dock)),
    ]
    assert len({start, first.after, second.after, third.after}) == 4
    (dock / "learnwares/by-hand").mkdir()
    assert store.mark(dock) != third.after


def test_a_change_waits_for_a_clock_that_stands(dock, monkeypatch):
    """A disk that counts time in steps: two changes within one would leave the same mark."""
    before = store.add(dock, version("a", 1)).after
    asked = []

    def utime(path):
        asked.append(path)
        now = before if len(asked) < 4 else before + 10**6
        real(path, ns=(now, now))

    real = os.utime
    monkeypatch.setattr(os, "utime", utime)
    store.remove(dock, "a")
    assert asked == [dock / ".moving"] * 4


def test_stamps_change_with_the_specification_alone(dock):
    for id in "ab":
        store.add(dock, version(id, 1))
    a, b, absent = map(int, store.stamps(dock, ["a", "b", "absent"]))
    assert absent == 0 and len({0, a, b}) == 3
    (dock / "learnwares/a/card.json").write_text("{}")
    assert store.stamps(dock, ["a", "b"]).tolist() == [a, b]
    file = dock / "learnwares/a/rkme.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    store.add(dock, version("a", 5), replace=True)  # as many points as version 1, so as many bytes
    os.utime(file, ns=times)
    assert store.stamps(dock, ["a"]).tolist() != [a]
    c = store.stamps(dock, ["b"]).tolist()
    (dock / "learnwares/b/rkme.safetensors").write_bytes(file.read_bytes())
    assert store.stamps(dock, ["b"]).tolist() != c


def test_unsound_learnwares_are_read_as_problems(dock):
    for id in "ab":
        store.add(dock, version(id, 1))
    (dock / "learnwares/b/card.json").unlink()
    good, bad, absent = store.read_each(dock, ["a", "b", "c"])
    assert bits(good) == bits(version("a", 1))
    assert bad.id == "b" and "restore it" in bad.reason
    assert absent.id == "c" and "has no learnware 'c'" in absent.reason


def test_one_writer_at_a_time(dock, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    store.add(dock, version("a", 1))
    (dock / ".moving/.new-b").mkdir()
    with filelock.FileLock(dock / ".lock"):
        for write in (
            lambda: store.add(dock, version("c", 1)),
            lambda: store.remove(dock, "a"),
        ):
            with pytest.raises(TimeoutError, match=r"another process .* for 0\.05 s; wait for it"):
                write()
        assert (dock / ".moving/.new-b").exists()  # the living writer's work
        assert [learnware.id for learnware in store.load(dock)] == ["a"]
    store.remove(dock, "a")
    assert list((dock / "learnwares").iterdir()) == list((dock / ".moving").iterdir()) == []


# Specification files that are damaged or lie


def forge(file: Path, arrays: dict, record: dict | str) -> None:
    """A file with a fitting checksum, made without the module: sha256(header, z, beta)."""
    if isinstance(record, dict):
        parts = [json.dumps(record, sort_keys=True).encode()]
        parts += [arrays[name].tobytes() for name in ("z", "beta") if name in arrays]
        digest = hashlib.sha256(b"\n".join(parts)).hexdigest()
        record = json.dumps(record | {"sha256": digest})
    safetensors.numpy.save_file(arrays, file, {"header": record})


def parts() -> tuple[dict, dict]:
    header = Header(1, "rkme", SPACE, {"points": 2, "n": 9, "residual": 0.0})._asdict()
    z = np.arange(2 * DIMENSION, dtype=np.float32).reshape(2, DIMENSION)
    return {"z": z, "beta": np.array([0.25, 0.75])}, header


def test_the_checksum_is_as_documented(tmp_path):
    arrays, header = parts()
    forge(tmp_path / "forged", arrays, header)
    store.write_spec(tmp_path / "written", RKME(**arrays), Header(**header))
    assert (tmp_path / "forged").read_bytes()[-96:] == (tmp_path / "written").read_bytes()[-96:]
    spec, read = store.read_spec(tmp_path / "forged")
    assert (spec.z.tobytes(), read) == (arrays["z"].tobytes(), Header(**header))


NAN = np.full((2, DIMENSION), np.nan, np.float32)
LIES = {
    "points": (lambda a, h: (a, h | {"about": {"points": 3}}), "points = 3 and dimension = 5, but"),
    "no n": (
        lambda a, h: (a, h | {"about": {"points": 2, "residual": 0.0}}),
        "n = None and residual = 0.0; want the number of independent samples",
    ),
    "no residual": (
        lambda a, h: (a, h | {"about": {"points": 2, "n": 9}}),
        "n = 9 and residual = None",
    ),
    "no points": (lambda a, h: (a, h | {"about": {}}), "points = None and dimension"),
    "dimension": (
        lambda a, h: (a, h | {"space": SPACE | {"dimension": 4}}),
        r"dimension = 4, but the arrays are z \(2, 5\) and beta \(2,\)",
    ),
    "no dimension": (lambda a, h: (a, h | {"space": {}}), "dimension is None; want the length"),
    "weights": (lambda a, h: (a | {"beta": np.ones(1)}, h), r"beta \(1,\); want"),
    "flat z": (lambda a, h: (a | {"z": a["z"].ravel()}, h), r"arrays are z \(10,\)"),
    "z type": (lambda a, h: (a | {"z": a["z"].astype(float)}, h), "z is stored as F64; want F32"),
    "beta type": (
        lambda a, h: (a | {"beta": a["beta"].astype(np.float32)}, h),
        r"beta is stored as F32; want F64 \(float64\)",
    ),
    "NaN point": (lambda a, h: (a | {"z": NAN}, h), "2 of 2 rows hold NaN"),
    "NaN weight": (lambda a, h: (a | {"beta": np.array([np.nan, 1])}, h), "1 weights are NaN"),
    "negative weight": (lambda a, h: (a | {"beta": np.array([-1.0, 2])}, h), "non-negative"),
    "no beta": (lambda a, h: ({"z": a["z"]}, h), "holds the arrays z; want beta, z"),
    "more arrays": (lambda a, h: (a | {"tau": a["z"]}, h), "arrays beta, tau, z; want"),
    "kind": (lambda a, h: (a, h | {"kind": "../x"}), r"kind is '\.\./x'; want at most 50 lower-c"),
    "schema": (lambda a, h: (a, h | {"schema": 2}), "got schema 2; this version"),
    "NaN in header": (lambda a, h: (a, h | {"about": {"points": np.nan}}), "want a finite number"),
    "header text": (lambda a, h: (a, "no json"), "not a JSON text"),
    "header list": (lambda a, h: (a, "[]"), "no field 'schema'"),
    "checksum": (lambda a, h: (a, json.dumps(h | {"sha256": "0" * 64})), "match its checksum"),
    "no checksum": (lambda a, h: (a, json.dumps(h)), "does not match its checksum"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_lies_are_found(tmp_path, lie, message):
    forge(tmp_path / "spec", *lie(*parts()))
    with pytest.raises(ValueError, match=f"^read_spec: .*spec.*{message}"):
        store.read_spec(tmp_path / "spec")


def test_any_flipped_bit_and_any_cut_is_found(tmp_path):
    arrays, header = parts()
    store.write_spec(tmp_path / "spec", RKME(**arrays), Header(**header))
    whole = (tmp_path / "spec").read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), 7)]
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        damaged.append(bytes(changed))
    for data in damaged:
        (tmp_path / "spec").write_bytes(data)
        with pytest.raises(ValueError, match=r"^read_spec: .*spec"):
            store.read_spec(tmp_path / "spec")


def test_files_of_other_kinds_are_not_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_spec: there is no .*/absent"):
        store.read_spec(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a plain file"):
        store.read_spec(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a plain file"):
        store.read_spec(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", store.MAX_SPEC_BYTES + 1)
    with pytest.raises(ValueError, match="has 67108865 bytes; want at most 67108864"):
        store.read_spec(tmp_path / "huge")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, h: (s._replace(z=s.z.astype(float)), h), TypeError, "z is float64 and is stor"),
        (lambda s, h: (s._replace(z=s.z * np.inf), h), ValueError, "2 of 2 rows hold NaN"),
        (lambda s, h: (s._replace(beta=s.beta * 2), h), ValueError, "sum to one"),
        (lambda s, h: (s._replace(z=s.z[:, :4]), h), ValueError, r"the arrays are z \(2, 4\)"),
        (lambda s, h: (s, h._replace(about={})), ValueError, "points = None"),
        (lambda s, h: (s, h._replace(about={"points": True})), ValueError, "points = True"),
        (lambda s, h: (s, h._replace(kind="RKME")), ValueError, "kind is 'RKME'; want at most"),
        (lambda s, h: (s, h._replace(kind=3)), ValueError, "kind is 3; want at most"),
        (lambda s, h: (s, h._replace(schema=2)), ValueError, "got schema 2"),
        (lambda s, h: (s, h._replace(space=SPACE | {"x": np.nan})), ValueError, "x is nan; want"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, change, error, message):
    _, _, spec, header = version("a", 1)
    with pytest.raises(error, match=message):
        store.write_spec(tmp_path / "spec", *change(spec, header))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_absent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"write_spec: could not write .*absent/spec"):
        store.write_spec(tmp_path / "absent/spec", *version("a", 1)[2:])


# Docks that are damaged or lie


def test_bad_learnwares_are_skipped_and_named(dock):
    for number, id in enumerate(("bits", "card", "good", "list", "empty", "moved")):
        store.add(dock, version(id, number))
    learnwares = dock / "learnwares"
    data = bytearray((learnwares / "bits/rkme.safetensors").read_bytes())
    data[-1] ^= 1
    (learnwares / "bits/rkme.safetensors").write_bytes(data)
    (learnwares / "card/card.json").write_text('{"name": "cut')
    (learnwares / "list/card.json").write_text("[]")
    (learnwares / "empty/rkme.safetensors").unlink()
    (learnwares / "moved").rename(learnwares / "Moved To")
    (learnwares / "stray.txt").touch()
    (learnwares / ".DS_Store").touch()
    expected = {
        "Moved To": "'Moved To' is not an id",
        "bits": "does not match its checksum",
        "card": "card.json: not a JSON text",
        "empty": r"there is no .*empty/rkme\.safetensors; restore it",
        "list": r"card\.json holds a list; want a JSON object",
        "stray.txt": r"stray\.txt is not a folder that can be read",
    }
    problems = store.check(dock)
    assert [problem.id for problem in problems] == list(expected)
    with pytest.warns(UserWarning) as caught:
        assert [bits(learnware) for learnware in store.load(dock)] == [bits(version("good", 2))]
    for problem, warning, (id, message) in zip(problems, caught, expected.items(), strict=True):
        assert pytest.RaisesExc(ValueError, match=message).matches(ValueError(problem.reason))
        assert str(warning.message).startswith(f"load: skipped '{id}' of {dock}: load: ")
    with pytest.raises(ValueError, match=r"read_learnware: .*not match its checksum"):
        store.read_learnware(dock, "bits")


OTHER_SPACES = {
    "gamma": ({"kernel": {"name": "gaussian", "gamma": 0.2}}, r"kernel\.gamma is 0\.2 and 0\.1"),
    "encoder": ({"encoder": "large"}, 'encoder is "large" and "mini"'),
    "further field": ({"max_tokens": 64}, "max_tokens is 64 and absent"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_SPACES.values(), ids=OTHER_SPACES)
def test_learnwares_of_another_space_stay_out(dock, tmp_path, changes, message):
    stranger = version("a", 1, space=SPACE | changes)
    with pytest.raises(IncompatibleSpecifications, match=f"add: 'a' and the dock .*{message}"):
        store.add(dock, stranger)
    assert store.list_ids(dock) == []
    store.create_dock(tmp_path / "other", stranger.header.space)
    store.add(tmp_path / "other", stranger)
    shutil.copytree(tmp_path / "other/learnwares/a", dock / "learnwares/a")
    with pytest.raises(IncompatibleSpecifications, match=message):
        store.read_learnware(dock, "a")
    with pytest.warns(UserWarning, match=message):
        assert store.load(dock) == []


@pytest.mark.parametrize(
    "id",
    [
        *("none", "", ".", "..", ".hidden", "a/b", "../a", "/etc", "a\\b", "a..b", "~", "*"),
        *("A", "a b", "a\n", "a\0", "é", "x" * 101),
    ],
)
def test_ids_cannot_leave_the_dock(dock, id):
    before = sorted(dock.rglob("*"))
    for call in (
        lambda: store.add(dock, version("a", 1)._replace(id=id)),
        lambda: store.remove(dock, id),
        lambda: store.read_learnware(dock, id),
    ):
        with pytest.raises(ValueError, match="is not an id; use at most 100 lower-case letters"):
            call()
    assert sorted(dock.rglob("*")) == before


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("learnwares/a", "a dock holds no links"),
        ("learnwares/a/card.json", r"card\.json is a symbolic link; a dock holds none"),
        ("learnwares/a/rkme.safetensors", r"rkme\.safetensors is a symbolic link"),
        ("learnwares", "learnwares is a symbolic link"),
        ("dock.json", r"dock\.json is a symbolic link"),
        (".moving", r"\.moving is a symbolic link"),
    ],
)
def test_links_are_not_followed(dock, tmp_path, inside, message):
    store.add(dock, version("a", 1))
    (dock / inside).rename(tmp_path / "elsewhere")
    (dock / inside).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=message):
        store.read_learnware(dock, "a")


def test_nothing_is_deleted_through_a_link(dock, tmp_path):
    (tmp_path / "elsewhere/.gone-precious").mkdir(parents=True)
    (dock / ".moving").rmdir()
    (dock / ".moving").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"add: .*\.moving is a symbolic link; a dock holds none"):
        store.add(dock, version("a", 1))
    assert (tmp_path / "elsewhere/.gone-precious").is_dir()


@pytest.mark.parametrize("stray", ["link", "dangling", "file"])
def test_strays_can_be_replaced_and_removed(dock, tmp_path, stray):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    place = dock / "learnwares/a"
    for _ in range(2):
        if stray == "file":
            place.touch()
        else:
            place.symlink_to(tmp_path / {"link": "precious", "dangling": "absent"}[stray])
        with pytest.raises(FileExistsError, match="'a' already"):
            store.add(dock, version("a", 1))
        store.add(dock, version("a", 1), replace=True)
        assert bits(store.read_learnware(dock, "a")) == bits(version("a", 1))
        store.remove(dock, "a")
    assert list((dock / "learnwares").iterdir()) == []
    assert (tmp_path / "precious/file").exists()


def test_ids_taken_and_absent(dock):
    store.add(dock, version("a", 1))
    with pytest.raises(FileExistsError, match="has a learnware 'a' already; use another id, or re"):
        store.add(dock, version("a", 2))
    assert bits(store.read_learnware(dock, "a")) == bits(version("a", 1))
    for call in (store.read_learnware, store.remove):
        with pytest.raises(FileNotFoundError, match="has no learnware 'b'; its first ids: a"):
            call(dock, "b")


@pytest.mark.parametrize(
    ("card", "error", "message"),
    [
        (["name"], TypeError, "add: the card of 'a' is a list; want a dict"),
        ({"accuracy": float("nan")}, ValueError, "add: the card of 'a': accuracy is nan; want a"),
        ({"domain": ["law"]}, ValueError, r"add: the card of 'a': its domain is \['law'\]; want a"),
        ({"texts": {1, 2}}, TypeError, "add: the card of 'a': texts is a set"),
        ({"description": "x" * 2**20}, ValueError, "takes 1048599 bytes; shorten it to at most"),
    ],
)
def test_cards_that_are_no_json_stay_out(dock, card, error, message):
    with pytest.raises(error, match=message):
        store.add(dock, version("a", 1)._replace(card=card))
    assert store.list_ids(dock) == []


USES = {
    "add": lambda path: store.add(path, version("a", 1)),
    "remove": lambda path: store.remove(path, "a"),
    "load": store.load,
    "check": store.check,
    "list_ids": store.list_ids,
    "read_header": store.read_header,
    "read_space": store.read_space,
    "read_learnware": lambda path: store.read_learnware(path, "a"),
    "read_each": lambda path: list(store.read_each(path)),
    "card_of": lambda path: store.card_of(path, "a"),
    "stamps": lambda path: store.stamps(path, ["a"]),
}


@pytest.mark.parametrize("use", USES)
def test_without_a_dock(dock, tmp_path, use):
    def refused(path, error, message):
        with pytest.raises(error, match=f"^{use}: .*{message}"):
            USES[use](path)

    refused(tmp_path, FileNotFoundError, r"no dock at .* \(it has no dock\.json\); make one with")
    assert list(tmp_path.iterdir()) == [dock]
    (tmp_path / "file").touch()
    refused(tmp_path / "file", NotADirectoryError, "is a file; give the path of a dock's folder")
    (dock / "learnwares").rmdir()
    refused(dock, NotADirectoryError, "learnwares is not a folder; restore it")
    (dock / "learnwares").mkdir()
    text = (dock / "dock.json").read_text()
    (dock / "dock.json").write_text(text[:-9])
    refused(dock, ValueError, r"dock\.json: not a JSON text")
    (dock / "dock.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    refused(dock, ValueError, r"dock\.json: got schema 2; this version")
    (dock / "dock.json").write_text(text.replace('"dimension"', '"dimensions"'))
    refused(dock, ValueError, r"dock\.json: dimension is None; want the length")


def test_docks_are_made_once(dock, tmp_path):
    written = (dock / "dock.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"create_dock: there is a dock at .* already"):
        store.create_dock(dock, SPACE | {"encoder": "large"})
    assert (dock / "dock.json").read_bytes() == written
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(NotADirectoryError, match="create_dock: a file is in the way of"):
            store.create_dock(path, SPACE)
    with pytest.raises(ValueError, match="create_dock: dimension is 0; want the length"):
        store.create_dock(tmp_path / "other", SPACE | {"dimension": 0})
    assert not (tmp_path / "other").exists()


def test_a_killed_creation_is_begun_again(tmp_path):
    (tmp_path / "learnwares").mkdir()
    (tmp_path / ".dock.json.0123abcd").write_text("{")
    store.create_dock(tmp_path, SPACE)
    assert (store.load(tmp_path), hidden(tmp_path)) == ([], [])


# Kinds

PAVE_SPACE = {
    **{"reference_sha256": "a1", "architecture_sha256": "b2", "tokenizer_sha256": "c3"},
    **{"a_sha256": "d4", "target": "answer", "template_sha256": "e5"},
    **{"rank": 16, "alpha": 32.0, "steps": 400, "rate": 1e-4, "batch": 8, "dtype": "float32"},
    **{"dimension": 7, "kernel": to_dict(Linear())},
}


def vectors(id: str, number: int, *, seeds: int = 1, **changes) -> Learnware:
    """A learnware specified by a parameter vector: a unit row for each random seed."""
    z = np.random.default_rng(number).normal(size=(seeds, PAVE_SPACE["dimension"]))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    about = {"points": seeds, "n": seeds, "residual": 0.0}
    header = Header(1, "pave", PAVE_SPACE | changes, about)
    return Learnware(id, {"name": id}, from_rows(z), header)


@pytest.fixture
def pave_dock(tmp_path) -> Path:
    store.create_dock(tmp_path / "pave", PAVE_SPACE, kind="pave")
    return tmp_path / "pave"


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_dock_of_vectors_ranks_by_cosine(pave_dock, seeds):
    added = [vectors(id, number, seeds=seeds) for number, id in enumerate("abcd")]
    for learnware in added:
        store.add(pave_dock, learnware)
    assert (pave_dock / "learnwares/a/pave.safetensors").is_file()
    assert store.read_header(pave_dock) == Header(1, "pave", PAVE_SPACE, {})
    assert store.check(pave_dock) == []
    learnwares = store.load(pave_dock)
    assert [bits(learnware) for learnware in learnwares] == [bits(learnware) for learnware in added]
    pool = build_pool(
        [learnware.spec for learnware in learnwares],
        from_dict(store.read_space(pave_dock)["kernel"]),
        ids=[learnware.id for learnware in learnwares],
        n=[learnware.header.about["n"] for learnware in learnwares],
        residual=[learnware.header.about["residual"] for learnware in learnwares],
    )
    user = vectors("user", 9, seeds=seeds).spec
    ranking = rank([user], pool, n=[seeds])

    def apart(x, y):  # 2 - 2 cos for every pair of seeds, in float64
        return 2 - 2 * x.astype(np.float64) @ y.astype(np.float64).T

    def within(x):  # its mean over pairs of different seeds
        return apart(x, x)[~np.eye(seeds, dtype=bool)].mean() if seeds > 1 else 0.0

    expected = [
        apart(user.z, z).mean() - (within(user.z) + within(z)) / 2
        for z in (learnware.spec.z for learnware in added)
    ]
    np.testing.assert_array_equal(ranking.index[0], np.argsort(expected))
    np.testing.assert_allclose(ranking.distance[0], np.sort(expected), rtol=0, atol=3e-7)


OTHER_VECTORS = [
    *(("reference_sha256", "00"), ("architecture_sha256", "00"), ("tokenizer_sha256", "00")),
    *(("a_sha256", "00"), ("target", "text"), ("template_sha256", "00")),
    *(("rank", 8), ("alpha", 16.0), ("steps", 1), ("rate", 1e-3), ("batch", 4)),
    ("dtype", "bfloat16"),
]


@pytest.mark.parametrize(("field", "value"), OTHER_VECTORS)
def test_vectors_made_otherwise_are_not_compared(pave_dock, field, value):
    stranger = vectors("a", 1, **{field: value})
    named = f"{field} is {json.dumps(value)} and {json.dumps(PAVE_SPACE[field])}"
    with pytest.raises(IncompatibleSpecifications, match=f"add: 'a' and the dock .*{named}"):
        store.add(pave_dock, stranger)
    with pytest.raises(IncompatibleSpecifications, match=f"rank: not comparable, {named}"):
        check_same_space(stranger.header, vectors("b", 2).header, what="rank")
    assert store.list_ids(pave_dock) == []


def test_a_specification_of_another_kind_stays_out(pave_dock, tmp_path):
    stranger = vectors("a", 1)
    stranger = stranger._replace(header=stranger.header._replace(kind="one_step"))
    with pytest.raises(IncompatibleSpecifications, match='kind is "one_step" and "pave"'):
        store.add(pave_dock, stranger)
    assert store.list_ids(pave_dock) == []
    # Nor does it come in under the name of the dock's files.
    store.add(pave_dock, vectors("a", 1))
    store.write_spec(pave_dock / "learnwares/a/pave.safetensors", stranger.spec, stranger.header)
    with pytest.warns(UserWarning, match='kind is "one_step" and "pave"'):
        assert store.load(pave_dock) == []


@pytest.mark.parametrize("kind", ["../x", "RKME", "", "a.b", "a/b", "é", "pave\n", "x" * 51])
def test_kinds_cannot_leave_the_dock(tmp_path, dock, kind):
    with pytest.raises(ValueError, match=r"create_dock: kind is .*; want at most 50 lower-case"):
        store.create_dock(tmp_path / "other", SPACE, kind=kind)
    assert not (tmp_path / "other").exists()
    header = store.read_header(dock)._asdict() | {"kind": kind}
    (dock / "dock.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"load: .*dock\.json: kind is .*; want at most 50"):
        store.load(dock)


def test_a_kind_that_is_no_word_is_refused(dock):
    (dock / "dock.json").write_text(json.dumps(store.read_header(dock)._asdict() | {"kind": 3}))
    with pytest.raises(ValueError, match=r"read_space: .*dock\.json: kind is a int; want a str"):
        store.read_space(dock)


def test_a_vector_of_full_size_is_written(tmp_path):
    z = np.zeros((5, 460_800), np.float32)
    z[:, 0] = 1
    space = PAVE_SPACE | {"dimension": z.shape[1]}
    header = Header(1, "pave", space, {"points": 5, "n": 5, "residual": 0.0})
    store.write_spec(tmp_path / "mine", from_rows(z), header)
    spec, read = store.read_spec(tmp_path / "mine")
    assert spec.z.tobytes() == z.tobytes() and read == header


# Adapters

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def test_an_adapter_returns_as_it_was_added_and_goes_with_its_learnware(dock):
    given = version("a", 1)
    store.add(dock, given, adapter=FILES)
    store.add(dock, version("b", 2))
    assert store.read_adapter(dock, "a") == FILES
    card = store.read_learnware(dock, "a").card
    assert card["adapter"] == {
        name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }
    assert "adapter" not in given.card
    with pytest.raises(FileNotFoundError, match=r"'b' of .* has a specification and no adapter"):
        store.read_adapter(dock, "b")
    # A card that speaks of an adapter does not bring it along, and it is not dropped in silence.
    with pytest.raises(ValueError, match="speaks of an adapter, and none is given"):
        store.add(dock, version("a", 3)._replace(card=card), replace=True)
    assert store.read_adapter(dock, "a") == FILES
    store.add(dock, version("a", 3), replace=True)
    assert not (dock / "learnwares" / "a" / "adapter").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_adapter_is_named_and_the_rest_of_the_dock_serves(dock, name):
    store.add(dock, version("a", 1), adapter=FILES)
    store.add(dock, version("b", 2), adapter=FILES)
    file = dock / "learnwares" / "a" / "adapter" / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{name} does not match its hash on the card"):
        store.read_adapter(dock, "a")
    (problem,) = store.check(dock)
    assert problem.id == "a" and name in problem.reason
    assert store.read_adapter(dock, "b") == FILES
    file.unlink()
    (problem,) = store.check(dock)
    assert "restore it" in problem.reason


def test_an_adapter_behind_a_link_is_refused(dock, tmp_path):
    store.add(dock, version("a", 1), adapter=FILES)
    folder = dock / "learnwares" / "a" / "adapter"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        store.read_adapter(dock, "a")


def test_an_adapter_of_other_files_is_refused_before_anything_is_written(dock):
    with pytest.raises(ValueError, match=r"has the files code.py; want adapter_config.json and"):
        store.add(dock, version("a", 1), adapter={"code.py": b""})
    assert store.list_ids(dock) == []


def test_an_adapter_too_large_to_read_is_refused_unread(dock, monkeypatch):
    store.add(dock, version("a", 1), adapter=FILES)
    monkeypatch.setitem(store.ADAPTER_FILES, "adapter_model.safetensors", 3)
    with pytest.raises(ValueError, match="has 7 bytes; want at most 3"):
        store.read_adapter(dock, "a")
    with pytest.raises(ValueError, match="of 'b' has 7 bytes; want at most 3"):
        store.add(dock, version("b", 2), adapter=FILES)
