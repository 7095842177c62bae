"""The index of a dock: rows that equal the dock's, whatever was changed, killed, copied or damaged
in between; and that opening it reads no rows."""

import contextlib
import json
import multiprocessing
import os
import shutil
import time
import tracemalloc
import warnings
from pathlib import Path

import filelock
import jax
import numpy as np
import oracle
import pytest
from disk import fail_calls
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.dock import index, store
from learnware_jax.dock.store import Learnware, Problem
from learnware_jax.selection.pool import stack
from learnware_jax.specification.header import Header
from learnware_jax.specification.kernels import from_dict, to_dict
from learnware_jax.specification.rkme import RKME, from_rows
from learnware_jax.specification.sketch import choose_landmarks, project

DIMENSION = 5
SPACE = {"dimension": DIMENSION, "kernel": {"name": "gaussian", "gamma": 0.1}}
KEY = jax.random.key(0)
COLUMNS = ("scale", "error", "rest", "self_term", "n", "residual", "z", "beta", "codes")


def version(id: str, number: int, *, points: int = 3, space: dict = SPACE) -> Learnware:
    """A learnware whose every part follows from `number`."""
    rng = np.random.default_rng(number)
    z = oracle.unit_rows(rng, points, space["dimension"])
    about = {"points": points, "n": 40 + number, "residual": 0.01 * number}
    spec = RKME(z, rng.dirichlet(np.ones(points)))
    return Learnware(id, {"name": id, "number": number}, spec, Header(1, "rkme", space, about))


def made(path: Path, numbers: dict[str, int], **options) -> Path:
    store.create_dock(path, options.get("space", SPACE))
    for id, number in numbers.items():
        store.add(path, version(id, number, **options))
    return path


FIRST = {"a": 1, "b": 2, "c": 3, "d": 4}


@pytest.fixture
def dock(tmp_path) -> Path:
    """A dock of four learnwares with an index."""
    made(tmp_path / "dock", FIRST)
    index.update(tmp_path / "dock", KEY)
    return tmp_path / "dock"


def clone(source: Path, target: Path) -> Path:
    """A copy in which specifications are the same files still, as stamps see it."""
    shutil.copytree(source, target, copy_function=os.link)
    if (source / "index").exists():
        shutil.rmtree(target / "index")
        shutil.copytree(source / "index", target / "index")
    return target


def numbers(path: Path) -> dict[str, int]:
    """Which version of which learnware the index holds: each row that is alive is wholly one's."""
    opened = index.open_index(path)
    rows = np.flatnonzero(opened.alive)
    held = {}
    for row, id in zip(rows, index.ids_of(opened, rows), strict=True):
        assert id not in held and index.row_of(opened, id) == row
        number = int(opened.n[row]) - 40
        points = int((opened.beta[row] > 0).sum())
        _, _, (z, beta), _ = version(id, number, points=points)
        assert_array_equal(opened.z[row, :points], z)
        assert_array_equal(opened.beta[row, :points], beta)
        assert opened.residual[row] == 0.01 * number
        held[id] = number
    return held


def agrees(path: Path) -> bool:
    """Whether nothing is left to do; then the index says so itself."""
    problems = index.check(path)
    assert not (problems and not index.is_behind(path)), problems
    return not problems


def write_json(path: Path, **changes) -> None:
    file = path / "index/index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def data_file(path: Path, name: str) -> Path:
    (file,) = (path / "index").glob(f"{name}.*")
    return file


# What rows hold


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_rows_bound_the_distances_of_the_oracle(tmp_path, kernel, dtype):
    """By the parallelogram of sketches and rests: |mu_p - mu_q|^2 in float64, of all pairs."""
    space = {"dimension": DIMENSION, "kernel": to_dict(kernel)}
    path = made(tmp_path / "dock", {f"lw{i}": i for i in range(8)}, points=4, space=space)
    index.update(path, KEY, dtype=dtype)
    opened = index.open_index(path)
    assert opened.codes.dtype.name == dtype
    coordinates = opened.codes.astype(np.float64) * opened.scale[:, None]
    specs = [version(id, int(id[2:]), points=4).spec for id in index.ids_of(opened, range(8))]
    for i, p in enumerate(specs):
        wanted = oracle.inner(kernel, p, p) - 1  # k(x, x) = 1, also for Linear on unit rows
        assert_allclose(opened.self_term[i], wanted, atol=1e-7)
        for j, q in enumerate(specs[:i]):
            distance = oracle.squared_mmd(kernel, p, q)
            near = np.linalg.norm(coordinates[i] - coordinates[j])
            slack = opened.error[i] + opened.error[j]
            low = max(near - slack, 0) ** 2 + (opened.rest[i] - opened.rest[j]) ** 2
            high = (near + slack) ** 2 + (opened.rest[i] + opened.rest[j]) ** 2
            assert low - 1e-7 <= distance <= high + 1e-7


def test_an_index_holds_the_dock(dock):
    opened = index.open_index(dock)
    assert numbers(dock) == FIRST
    assert opened.header == store.read_header(dock)
    assert opened.kernel == from_dict(SPACE["kernel"])
    assert_array_equal(opened.n, [41, 42, 43, 44])
    assert index.ids_of(opened, [3, 0]) == ["d", "a"]
    assert not index.is_behind(dock) and index.check(dock) == []
    with pytest.raises(ValueError, match=r"row_of: the index of .* has no learnware 'e'"):
        index.row_of(opened, "e")


def test_smaller_specifications_are_padded_as_pools_are(tmp_path):
    path = made(tmp_path / "dock", {"a": 1}, points=4)
    store.add(path, version("b", 2, points=2))
    index.update(path, KEY)
    opened = index.open_index(path)
    z, beta = stack([version("b", 2, points=2).spec], 4)
    assert_array_equal(opened.z[1], z[0])
    assert_array_equal(opened.beta[1], beta[0])
    # Padding changes no sketch: the same specification alone.
    made_alone = project(opened.landmarks, opened.kernel, z[:, :2], beta[:, :2])
    assert_allclose(opened.rest[1], made_alone.rest[0], rtol=1e-6, atol=1e-7)
    assert_allclose(opened.self_term[1], made_alone.self_term[0], rtol=1e-12)
    index.append(path, ["c"], z[:, :2], beta[:, :2], n=[42], residual=[0.02])
    opened = index.open_index(path)
    assert_array_equal(opened.z[2], z[0])
    assert_array_equal(opened.beta[2], beta[0])


def test_specifications_of_one_vector_are_indexed(tmp_path):
    space = {"dimension": 7, "kernel": {"name": "linear"}}
    store.create_dock(tmp_path / "dock", space, "pave")
    vectors = oracle.unit_rows(np.random.default_rng(0), 6, 7)
    for i, vector in enumerate(vectors):
        header = Header(1, "pave", space, {"points": 1, "n": 1, "residual": 0.0})
        learnware = Learnware(f"v{i}", {}, from_rows(vector[None]), header)
        store.add(tmp_path / "dock", learnware)
    index.update(tmp_path / "dock", KEY, dtype="float32")
    opened = index.open_index(tmp_path / "dock")
    assert_array_equal(opened.z[:, 0], vectors)
    apart = np.linalg.norm(opened.codes[:, None] - opened.codes, axis=2) ** 2
    wide = vectors.astype(np.float64)
    assert_allclose(apart, ((wide[:, None] - wide) ** 2).sum(2), atol=1e-6)


def bulk(count: int, start: int = 0) -> dict:
    """Arguments for `append`."""
    versions = [version(f"lw{i}", i) for i in range(start, start + count)]
    z, beta = stack([learnware.spec for learnware in versions])
    return {
        "ids": [learnware.id for learnware in versions],
        "z": z,
        "beta": beta,
        "n": np.arange(start, start + count) + 40,
        "residual": 0.01 * np.arange(start, start + count),
    }


def empty(path: Path, points: int = 3) -> Path:
    """A dock without learnwares, and an index without rows."""
    store.create_dock(path, SPACE)
    given = bulk(30)
    landmarks = choose_landmarks(KEY, given["z"], given["beta"], from_dict(SPACE["kernel"]))
    index.create(path, landmarks, points=points)
    return path


def assert_same_rows(a: Path, b: Path) -> None:
    one, other = (index.open_index(path) for path in (a, b))
    assert index.ids_of(one, range(len(one.n))) == index.ids_of(other, range(len(other.n)))
    for name in COLUMNS:
        # A rest of nothing is the root of rounding.
        near = 3e-8 if name == "rest" else 1e-9
        assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6, atol=near)


@pytest.mark.parametrize("cuts", [[50], [1, 2, 30], range(1, 50)])
def test_rows_do_not_depend_on_how_they_came(tmp_path, monkeypatch, cuts):
    given = bulk(50)
    whole = empty(tmp_path / "whole")
    index.append(whole, **given)
    parts = empty(tmp_path / "parts")
    monkeypatch.setattr(index, "BATCH_BYTES", 400)  # some learnwares at once
    for begin, end in zip([0, *cuts], [*cuts, 50], strict=True):
        if begin < end:
            index.append(parts, **{name: a[begin:end] for name, a in given.items()})
    assert_same_rows(whole, parts)
    assert numbers(parts) == {f"lw{i}": i for i in range(50)}


def test_learnwares_added_one_by_one_are_as_in_an_update(dock, tmp_path):
    added = {"e": 5, "f": 6}
    other = clone(dock, tmp_path / "other")
    for id, number in added.items():
        index.add(dock, version(id, number), adapter=None)
        store.add(other, version(id, number))
        assert not index.is_behind(dock) and index.is_behind(other)
    assert index.update(other, KEY) == index.Updated(2, 0, [], False)
    assert_same_rows(dock, other)
    assert store.list_ids(dock) == [*"abcdef"] and index.check(dock) == []


def test_appending_takes_no_memory_for_all_rows(tmp_path, monkeypatch):
    count, points, dimension = 2000, 16, 64
    space = SPACE | {"dimension": dimension}
    store.create_dock(tmp_path / "dock", space)
    z = np.lib.format.open_memmap(tmp_path / "z.npy", "w+", np.float32, (count, points, dimension))
    z[:] = np.random.default_rng(0).normal(size=z.shape)
    beta = np.full((count, points), 1 / points)
    landmarks = choose_landmarks(KEY, z[:9], beta[:9], from_dict(SPACE["kernel"]), width=8)
    index.create(tmp_path / "dock", landmarks, points=points)
    monkeypatch.setattr(index, "BATCH_BYTES", 1 << 18)
    ids = [f"lw{i}" for i in range(count)]
    tracemalloc.start()
    try:
        index.append(tmp_path / "dock", ids, z, beta, n=np.full(count, 9), residual=np.zeros(count))
        assert tracemalloc.get_traced_memory()[1] < z.nbytes / 2
    finally:
        tracemalloc.stop()
    assert_array_equal(index.open_index(tmp_path / "dock").z, z)


def test_opening_a_million_rows_reads_none(tmp_path):
    path, count = empty(tmp_path / "dock"), 1_100_000
    index.append(path, **bulk(4))
    one = {name: data_file(path, name).stat().st_size // 4 for name in ("codes", "rows", "points")}
    for name, size in one.items():
        os.truncate(data_file(path, name), count * size)
    write_json(path, rows=count)
    tracemalloc.start()
    try:
        opened = index.open_index(path)
        assert tracemalloc.get_traced_memory()[1] < count  # a byte a row would be seen
    finally:
        tracemalloc.stop()
    assert len(opened.codes) == len(opened.z) == len(opened.alive) == count
    assert index.row_of(opened, "lw3") == 3
    assert not opened.alive[4:].any()
    index.append(path, **bulk(1, start=4))
    assert index.row_of(index.open_index(path), "lw4") == count


# Changes


def test_the_dead_stay_in_their_rows(dock):
    before = index.open_index(dock)
    index.tombstone(dock, ["b", "d"])
    assert numbers(dock) == {"a": 1, "c": 3}
    # An index that was open sees them die, and keeps all else.
    assert_array_equal(before.alive, [True, False, True, False])
    assert index.ids_of(before, [1]) == ["b"]
    with pytest.raises(ValueError, match="has no learnware 'b'"):
        index.row_of(before, "b")
    assert index.is_behind(dock)  # the dock has them still
    with pytest.raises(ValueError, match=r"tombstone: 1 of 2 ids are not in the index, .* 'b'"):
        index.tombstone(dock, ["a", "b"])
    assert numbers(dock) == {"a": 1, "c": 3}
    assert index.update(dock, KEY)[:2] == (2, 0)
    assert numbers(dock) == FIRST and agrees(dock)


def test_an_open_index_keeps_its_rows_while_others_write(dock):
    before = index.open_index(dock)
    copies = {name: np.array(getattr(before, name)) for name in COLUMNS}
    index.add(dock, version("e", 5))
    index.add(dock, version("f", 6, points=2))
    with pytest.warns(UserWarning, match="has 7 points"):
        index.add(dock, version("g", 7, points=7))
    assert index.update(dock, KEY).built  # the old files are gone
    for name, copy in copies.items():
        assert_array_equal(getattr(before, name), copy, err_msg=name)
    assert before.alive.all() and index.ids_of(before, range(4)) == [*"abcd"]
    assert numbers(dock) == FIRST | {"e": 5, "f": 6, "g": 7}


def test_add_and_remove_keep_up_with_the_dock(dock):
    index.add(dock, version("e", 5))
    index.add(dock, version("a", 6), replace=True)
    index.remove(dock, "b")
    wanted = {"a": 6, "c": 3, "d": 4, "e": 5}
    assert numbers(dock) == wanted and agrees(dock) and not index.is_behind(dock)
    assert {learnware.id: learnware.card["number"] for learnware in store.load(dock)} == wanted
    assert len(index.open_index(dock).alive) == 6
    with pytest.raises(FileExistsError, match="has a learnware 'a' already"):
        index.add(dock, version("a", 7))
    with pytest.raises(FileNotFoundError, match="has no learnware 'b'"):
        index.remove(dock, "b")
    assert numbers(dock) == wanted and agrees(dock)


def test_without_an_index_the_dock_alone_changes(tmp_path):
    path = made(tmp_path / "dock", {"a": 1})
    index.add(path, version("b", 2))
    index.remove(path, "a")
    assert store.list_ids(path) == ["b"] and not (path / "index").exists()


BEHIND = {
    "add": lambda dock: store.add(dock, version("e", 5)),
    "replace": lambda dock: store.add(dock, version("a", 5), replace=True),
    "remove": lambda dock: store.remove(dock, "a"),
    "by hand": lambda dock: shutil.copytree(dock / "learnwares/a", dock / "learnwares/e"),
}


@pytest.mark.parametrize("change", BEHIND)
def test_an_index_that_is_behind_says_so_until_it_is_updated(dock, change):
    assert not index.is_behind(dock)
    BEHIND[change](dock)
    assert index.is_behind(dock)
    # What is added now says nothing of what was missed.
    index.add(dock, version("f", 6))
    index.remove(dock, "f")
    assert index.is_behind(dock) and not agrees(dock)
    index.update(dock, KEY)
    assert agrees(dock) and not index.is_behind(dock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_writer_at_the_same_time_is_noticed(dock, monkeypatch, when):
    """One who knows nothing of the index, just before or just after the learnware is added."""
    real = store.add

    def add(path, learnware, **options):
        monkeypatch.setattr(store, "add", real)
        if when == "before":
            real(path, version("x", 8))
        change = real(path, learnware, **options)
        if when == "after":
            real(path, version("e", 9), replace=True)
        return change

    monkeypatch.setattr(store, "add", add)
    index.add(dock, version("e", 5))
    assert index.is_behind(dock) and not agrees(dock)
    index.update(dock, KEY)
    assert agrees(dock)
    assert numbers(dock) == FIRST | ({"x": 8, "e": 5} if when == "before" else {"e": 9})


def test_update_follows_every_change(dock):
    store.add(dock, version("e", 5))
    store.add(dock, version("b", 6), replace=True)
    store.remove(dock, "c")
    assert sorted(index.check(dock)) == [
        ("b", "changed since it came into the index"),
        ("c", "in the index, but not in the dock"),
        ("e", "not in the index"),
    ]
    done = []
    assert index.update(dock, KEY, progress=done.append) == index.Updated(2, 2, [], False)
    assert done == [2, 4]  # a and d were done
    assert numbers(dock) == {"a": 1, "b": 6, "d": 4, "e": 5}
    assert agrees(dock) and index.update(dock, KEY) == index.Updated(0, 0, [], False)
    # A specification written over where it lies is seen when one looks.
    _, _, spec, header = version("a", 7)
    store.write_spec(dock / "learnwares/a/rkme.safetensors", spec, header)
    assert index.update(dock, KEY)[:2] == (1, 1)
    assert numbers(dock)["a"] == 7


def test_unsound_learnwares_are_skipped_and_named(dock):
    file = dock / "learnwares/b/rkme.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    (dock / "learnwares/stray.txt").touch()
    assert ("b", "unsound, but in the index") in index.check(dock)
    with pytest.warns(UserWarning) as caught:
        updated = index.update(dock, KEY)
    assert [str(warning.message).split(":")[:2] for warning in caught] == [
        ["update", f" skipped 'b' of {dock}"],
        ["update", f" skipped 'stray.txt' of {dock}"],
    ]
    assert updated[:2] == (0, 1) and [problem.id for problem in updated.skipped] == [
        "b",
        "stray.txt",
    ]
    assert numbers(dock) == {"a": 1, "c": 3, "d": 4} and agrees(dock)
    file.write_bytes(whole)
    (dock / "learnwares/stray.txt").unlink()
    assert index.update(dock, KEY)[:2] == (1, 0)
    assert numbers(dock) == FIRST


def test_a_row_that_was_not_made_from_the_dock_is_made_again(dock):
    index.append(dock, **bulk(1))
    assert index.is_behind(dock)
    store.add(dock, version("lw0", 9))
    assert ("lw0", "changed since it came into the index") in index.check(dock)
    # Nor is it taken for the learnware's while that is set aside.
    (dock / "learnwares/lw0").rename(dock / ".moving/.old-lw0")
    assert index.update(dock, KEY)[:2] == (1, 1)
    assert numbers(dock) == FIRST | {"lw0": 9}


def test_a_larger_specification_widens_the_index(dock):
    with pytest.warns(UserWarning, match=r"'e' is in the dock and not in its index: it has 7 poin"):
        index.add(dock, version("e", 5, points=7))
    assert index.is_behind(dock) and numbers(dock) == FIRST
    store.add(dock, version("f", 6, points=9))
    assert index.update(dock, KEY) == index.Updated(6, 0, [], True)
    assert numbers(dock) == FIRST | {"e": 5, "f": 6}
    assert index.open_index(dock).z.shape == (6, 9, DIMENSION) and agrees(dock)


def test_an_index_of_mostly_dead_rows_is_made_anew(dock):
    index.update(dock, KEY)
    for number in (5, 6, 7, 8):
        index.add(dock, version("a", number), replace=True)
    assert not index.update(dock, KEY).built  # four of eight
    index.add(dock, version("a", 9), replace=True)
    assert index.update(dock, KEY) == index.Updated(4, 0, [], True)
    assert len(index.open_index(dock).alive) == 4
    assert numbers(dock) == FIRST | {"a": 9} and agrees(dock)


def test_landmarks_are_chosen_again_when_the_dock_has_grown(dock):
    landmarks = index.open_index(dock).landmarks
    for number in range(5, 16):
        index.add(dock, version(f"lw{number}", number))
    assert not index.update(dock, KEY).built
    index.add(dock, version("lw16", 16))  # four times four
    assert index.update(dock, KEY).built
    assert len(index.open_index(dock).landmarks.points) > len(landmarks.points)
    assert agrees(dock)


def test_landmarks_from_many_stay(dock, monkeypatch):
    monkeypatch.setattr(index, "SAMPLE", 4)
    for number in range(5, 17):
        index.add(dock, version(f"lw{number}", number))
    assert not index.update(dock, KEY).built


def test_a_dock_that_loses_all_keeps_an_empty_index(dock):
    for id in FIRST:
        store.remove(dock, id)
    assert index.update(dock, KEY) == index.Updated(0, 4, [], False)
    assert numbers(dock) == {} and not index.is_behind(dock)
    index.add(dock, version("e", 5))
    assert numbers(dock) == {"e": 5} and agrees(dock)


def test_a_dock_without_sound_learnwares_gets_no_index(tmp_path):
    path = made(tmp_path / "dock", {})
    with pytest.raises(ValueError, match=r"update: .* has no sound learnware to choose landmarks"):
        index.update(path, KEY)
    with pytest.raises(FileNotFoundError, match=r"open_index: .* has no index; build one with"):
        index.open_index(path)


def test_a_copy_with_its_times_serves_and_is_made_anew_on_the_next_change(dock, tmp_path):
    shutil.copytree(dock, tmp_path / "copy")
    assert not index.is_behind(tmp_path / "copy") and index.check(tmp_path / "copy") == []
    assert numbers(tmp_path / "copy") == FIRST
    store.add(tmp_path / "copy", version("e", 5))
    assert index.is_behind(tmp_path / "copy")
    assert index.update(tmp_path / "copy", KEY) == index.Updated(5, 4, [], True)
    assert numbers(tmp_path / "copy") == FIRST | {"e": 5} and agrees(tmp_path / "copy")


# Writers that are killed


class Stop(Exception):
    pass


def stop_at(done: int):
    def progress(count):
        if count >= done:
            raise Stop

    return progress


def test_a_build_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "BATCH_BYTES", 1)
    path = made(tmp_path / "dock", FIRST)
    with pytest.raises(Stop):
        index.update(path, KEY, progress=stop_at(3))
    assert numbers(path) == {"a": 1, "b": 2, "c": 3} and index.is_behind(path)
    assert index.update(path, KEY) == index.Updated(1, 0, [], False)
    assert numbers(path) == FIRST and agrees(path)


def test_readers_keep_the_old_rows_until_all_of_the_new_are_there(dock, monkeypatch):
    monkeypatch.setattr(index, "BATCH_BYTES", 1)
    for id, number in FIRST.items():
        store.add(dock, version(id, number + 4), replace=True)
    with pytest.raises(Stop):
        index.update(dock, KEY, progress=stop_at(3))
    assert numbers(dock) == FIRST and index.is_behind(dock)
    assert len(list((dock / "index").iterdir())) == 6  # index.json, four files of it, the lock
    index.update(dock, KEY)
    assert numbers(dock) == {id: number + 4 for id, number in FIRST.items()} and agrees(dock)


def test_what_a_killed_writer_left_behind_the_rows_is_written_over(dock):
    sizes = {}
    for name in ("codes", "rows", "points"):
        file = data_file(dock, name)
        sizes[name] = file.stat().st_size
        with open(file, "ab") as stream:
            stream.write(b"\xff" * 77)
    assert numbers(dock) == FIRST and agrees(dock)
    index.add(dock, version("e", 5))
    assert numbers(dock) == FIRST | {"e": 5} and agrees(dock)
    for name, size in sizes.items():
        assert data_file(dock, name).stat().st_size >= size // 4 * 5


def test_files_of_no_index_go_and_files_of_others_stay(dock):
    folder = dock / "index"
    kept = {file.name for file in folder.iterdir()} | {"notes.txt", "codes.txt"}
    for name in ("notes.txt", "codes.txt", "codes.01234567.bin", ".index.json.0123abcd"):
        (folder / name).touch()
    (folder / ".landmarks.01234567.safetensors.0123abcd").touch()
    index.add(dock, version("e", 5))
    assert {file.name for file in folder.iterdir()} == kept


OPERATIONS = {
    "add": lambda dock: index.add(dock, version("e", 5)),
    "replace": lambda dock: index.add(dock, version("a", 5), replace=True),
    "remove": lambda dock: index.remove(dock, "a"),
    "append": lambda dock: index.append(dock, **bulk(2)),
    "tombstone": lambda dock: index.tombstone(dock, ["a"]),
    "update": lambda dock: index.update(dock, KEY),
    "build": lambda dock: index.update(dock, KEY),
    "build anew": lambda dock: index.update(dock, KEY),
}


@pytest.fixture(scope="module")
def docks(tmp_path_factory):
    """For each operation a dock as it is before."""
    root = tmp_path_factory.mktemp("docks")
    for name in OPERATIONS:
        path = made(root / name, FIRST)
        if name != "build":
            index.update(path, KEY)
        if name == "update":
            store.add(path, version("e", 5))
            store.add(path, version("b", 6), replace=True)
            store.remove(path, "c")
        if name == "build anew":
            store.add(path, version("e", 5, points=5))
    return root


# What the index has meanwhile, beside what it had and what it will have: a learnware that was
# replaced is away until its new row counts, and an index that is built begins without rows.
MEANWHILE = {"replace": {"b": 2, "c": 3, "d": 4}, "update": {"a": 1, "d": 4}, "build": {}}


@pytest.mark.parametrize("later", ["later calls work", "later calls fail"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whichever_call_fails_the_index_opens_and_an_update_mends_it(
    docks, tmp_path, operation, later
):
    """Call k fails, alone (a passing fault) or with all later ones (what a kill leaves behind)."""

    def held(dock):
        return numbers(dock) if (dock / "index/index.json").exists() else None

    OPERATIONS[operation](done := clone(docks / operation, tmp_path / "done"))
    old, new = held(docks / operation), held(done)
    seen = []
    for k in range(200):
        dock = clone(docks / operation, tmp_path / str(k))
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_calls(patch, range(k, k + 1 if later == "later calls work" else 10**6))
            try:
                OPERATIONS[operation](dock)
            except OSError as error:
                assert "No space left on device" in str(error)
                raised = True
        if len(calls) <= k:
            break
        seen.append(held(dock))
        assert seen[-1] in (old, MEANWHILE.get(operation), new) if raised else seen[-1] == new
        if seen[-1] is not None:
            agrees(dock)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            index.update(dock, KEY)
        assert agrees(dock) and not index.is_behind(dock)
        assert numbers(dock) == {
            learnware.id: learnware.card["number"] for learnware in store.load(dock)
        }
        shutil.rmtree(dock)
    assert old in seen and new in seen


def write_for_ever(dock: Path, events) -> None:
    """Tell what is about to happen, then do it."""
    for number in range(5, 10**6):
        events.send(number)
        index.add(dock, version(f"lw{number % 3}", number), replace=True)
        if number % 3 == 0:
            index.remove(dock, f"lw{number % 3}")


@pytest.mark.parametrize("seconds", [0.0, 0.004, 0.01])
def test_a_killed_writer_loses_nothing(dock, seconds):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learnware_jax.dock.index", "pytest", "oracle"])
    events, writer_end = context.Pipe(duplex=False)
    writer = context.Process(target=write_for_ever, args=(dock, writer_end))
    writer.start()
    writer_end.close()
    for _ in range(7):  # the first compiles
        events.recv()
    time.sleep(seconds)
    writer.kill()
    writer.join()
    assert FIRST.items() <= numbers(dock).items()
    agrees(dock)
    index.update(dock, KEY)
    assert agrees(dock) and not index.is_behind(dock)


def test_an_index_built_anew_while_it_is_opened_is_opened(dock, monkeypatch):
    real = index._read_landmarks

    def read(path, state, *, where):
        monkeypatch.setattr(index, "_read_landmarks", real)
        with pytest.warns(UserWarning, match="has 7 points"):
            index.add(path, version("e", 5, points=7))
        assert index.update(path, KEY).built
        return real(path, state, where=where)

    monkeypatch.setattr(index, "_read_landmarks", read)
    opened = index.open_index(dock)
    assert index.ids_of(opened, range(5)) == [*"abcde"] and opened.z.shape[1] == 7


def test_one_writer_at_a_time(dock, monkeypatch):
    monkeypatch.setattr(index, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(dock / "index/.lock"):
        for write in (
            lambda: index.add(dock, version("e", 5)),
            lambda: index.remove(dock, "a"),
            lambda: index.update(dock, KEY),
            lambda: index.append(dock, **bulk(1)),
        ):
            with pytest.raises(
                TimeoutError, match=r"another process .* the index .* 0\.05 s; wait"
            ):
                write()
        assert numbers(dock) == FIRST  # readers do not wait
    assert store.list_ids(dock) == [*"abcd"] and agrees(dock)


# Damage


def cut(name, size=-1):
    return lambda dock: os.truncate(file := data_file(dock, name), file.stat().st_size + size)


def flip(dock):
    file = data_file(dock, "landmarks")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def pipe(dock):
    file = data_file(dock, "rows")
    file.unlink()
    os.mkfifo(file)


def other_space(dock):
    file = dock / "dock.json"
    file.write_text(file.read_text().replace("0.1", "0.2"))


AGAIN = r"delete .*dock/index and build it again with `update`: nothing of it is lost"
DAMAGE = {
    "codes cut": (cut("codes"), rf"codes\..* has \d+ bytes; want .* for 4 rows; {AGAIN}"),
    "rows cut": (cut("rows"), rf"rows\..* has \d+ bytes; want .* at least \d+ for 4 rows; {AGAIN}"),
    "points cut": (cut("points", -100), rf"points\..* for 4 rows; {AGAIN}"),
    "pipe": (pipe, rf"rows\..* has 0 bytes; want a plain file of at least .*{AGAIN}"),
    "no codes": (lambda d: data_file(d, "codes").unlink(), rf"there is no .*codes.*{AGAIN}"),
    "no landmarks": (lambda d: data_file(d, "landmarks").unlink(), "there is no .*landmarks"),
    "landmarks": (flip, rf"landmarks\..* does not match its checksum; {AGAIN}"),
    "landmarks cut": (cut("landmarks"), rf"does not match its checksum; {AGAIN}"),
    "landmarks grown": (cut("landmarks", 10**6), r"landmarks.* bytes; want at most"),
    "json": (cut("index", -9), rf"index\.json is damaged; {AGAIN}"),
    "json list": (lambda d: (d / "index/index.json").write_text("[]"), "has schema None, and this"),
    "schema": (lambda d: write_json(d, schema=2), rf"has schema 2, .* reads 1; use .*, or {AGAIN}"),
    "field": (lambda d: write_json(d, more=1), rf"index\.json is damaged; {AGAIN}"),
    "rows": (lambda d: write_json(d, rows=-1), "is damaged"),
    "more rows": (lambda d: write_json(d, rows=5), "want a plain file of at least .* for 5 rows"),
    "dtype": (lambda d: write_json(d, dtype="int4"), "is damaged"),
    "files": (lambda d: write_json(d, files="../../x"), "is damaged"),
    "mark": (lambda d: write_json(d, mark="now"), "is damaged"),
    "space": (other_space, rf"of another kind or space than dock\.json names; {AGAIN}"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_nothing_is_added_to_it(dock, damage, message):
    damage(dock)
    listed = store.list_ids(dock)
    for use in (
        lambda: index.open_index(dock),
        lambda: index.append(dock, **bulk(1)),
        lambda: index.add(dock, version("e", 5)),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            use()
    assert store.list_ids(dock) == listed
    # The remedy is one.
    shutil.rmtree(dock / "index")
    if message != DAMAGE["space"][1]:
        index.update(dock, KEY)
        assert agrees(dock)


@pytest.mark.parametrize("name", ["index", "index.json", "landmarks", "codes", "rows", "points"])
def test_links_are_not_followed(dock, tmp_path, name):
    place = {"index": dock / "index", "index.json": dock / "index/index.json"}.get(name)
    place = place or data_file(dock, name)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    for use in (
        lambda: index.open_index(dock),
        lambda: index.add(dock, version("e", 5)),
        lambda: index.update(dock, KEY),
    ):
        with pytest.raises(ValueError, match="is a symbolic link; a dock holds none"):
            use()
    assert store.list_ids(dock) == [*"abcd"]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("rows", "self_term"), ("rows", "residual"), ("rows", "n"), ("rows", "rest")),
        *(("points", "z"), ("points", "beta"), ("codes", "codes")),
    ],
)
def test_check_finds_rows_that_have_changed(dock, name, field):
    file = data_file(dock, name)
    opened = index.open_index(dock)
    table = {
        "rows": opened.n.base,
        "points": opened.z.base,
        "codes": opened.codes,
    }[name]
    while isinstance(table.base, np.memmap):
        table = table.base
    changed = np.array(table)
    cell = changed if field == "codes" else changed[field]
    cell[2] = cell[2] + 3
    changed.tofile(file)
    (problem,) = index.check(dock)
    assert problem.id == "c" and problem.reason.startswith(f"its row is damaged ({field}")
    assert "build it again" in problem.reason


# Bad input


GOOD = bulk(3)
BAD = {
    "none": ({name: a[:0] for name, a in GOOD.items()}, "got 0 ids, .*at least one"),
    "points": (
        {"z": np.repeat(GOOD["z"], 2, 1), "beta": np.ones((3, 6)) / 6},
        "k from 1 to 3, whi",
    ),
    "no points": ({"z": GOOD["z"][:, :0], "beta": GOOD["beta"][:, :0]}, "k from 1 to 3"),
    "dimension": ({"z": GOOD["z"][:, :, :4]}, r"z \(3, 3, 4\).*want z \(q, k, 5\)"),
    "weights": ({"beta": GOOD["beta"][:, :2]}, r"beta \(3, 2\)"),
    "ids": ({"ids": ["a"]}, r"got 1 ids, z \(3, 3, 5\)"),
    "n": ({"n": [9]}, r"n \(1,\)"),
    "residual": ({"residual": [0.0]}, r"residual \(1,\)"),
    "z type": ({"z": GOOD["z"].astype(float)}, "z is float64 and is stored as float32; round it"),
    "n type": ({"n": np.ones(3)}, "n is float64; want integers"),
    "id": ({"ids": ["x", "../y", "z"]}, "'../y' is not an id"),
    "repeated": ({"ids": ["x", "y", "x"]}, "1 of 3 ids repeat another one"),
    "known": ({"ids": ["x", "b", "a"]}, "2 of 3 ids are in the index already, .* 'b'"),
    "NaN": (
        {"z": np.where(np.arange(3)[:, None, None] == 1, np.float32(np.nan), GOOD["z"])},
        "3 of 9 rows",
    ),
    "signed": ({"beta": GOOD["beta"] - [[0], [1], [0]]}, "1 of 3 learnwares .* 'lw1'"),
    "NaN weight": ({"beta": GOOD["beta"] * np.nan}, "3 of 3 learnwares"),
    "n 0": ({"n": [9, 9, 0]}, "n below 1.* 'lw2'"),
    "residual NaN": ({"residual": [np.inf, 0.0, 0.0]}, "not finite; the first is 'lw0'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_before_anything_is_written(dock, changes, message):
    def contents():
        return {file.name: file.read_bytes() for file in (dock / "index").iterdir()}

    before = contents()
    given = GOOD | changes
    with pytest.raises((ValueError, TypeError), match=f"^append: .*{message}"):
        index.append(dock, **given)
    assert contents() == before


def test_bad_indexes_are_not_made(dock, tmp_path):
    landmarks = index.open_index(dock).landmarks
    with pytest.raises(FileExistsError, match=r"create: there is an index at .* already"):
        index.create(dock, landmarks, points=3)
    other = made(tmp_path / "other", {})
    for changes, options, message in (
        (
            {},
            {"points": 0},
            "got dtype='int8' and points=0; want one of int8, bfloat16, float32 an",
        ),
        ({}, {"points": 3, "dtype": "int4"}, "got dtype='int4'"),
        ({"points": landmarks.points[:, :4]}, {"points": 3}, "got landmarks of shapes"),
        ({"values": landmarks.values[:2]}, {"points": 3}, "got landmarks of shapes"),
    ):
        with pytest.raises(ValueError, match=f"create: {message}"):
            index.create(other, landmarks._replace(**changes), **options)
    for use in (
        index.open_index,
        index.is_behind,
        index.check,
        lambda path: index.append(path, **bulk(1)),
        lambda path: index.tombstone(path, ["a"]),
    ):
        with pytest.raises(FileNotFoundError, match="has no index; build one with `update`"):
            use(other)
        with pytest.raises(FileNotFoundError, match="no dock at"):
            use(tmp_path)
    with contextlib.suppress(FileNotFoundError):
        index.update(tmp_path, KEY)
    assert not (tmp_path / "index").exists()


def test_problems_are_those_of_the_store(dock):
    store.remove(dock, "a")
    assert index.check(dock) == [Problem("a", "in the index, but not in the dock")]
