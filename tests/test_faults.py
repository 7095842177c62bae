"""What goes wrong around a program: kills, full disks, read-only folders, other writers, clocks."""

import builtins
import errno
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import pytest
import test_finetune as tuned

from configs import faults as faults_config
from experiments import build, faults, finetune, specify
from experiments.common import write_json
from learnware_jax.dock import index, materials, store
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.slm.finetune import load_checkpoint, save_checkpoint
from learnware_jax.specification.kernels import Gaussian

KEY = jax.random.key(0)
REMEDY = "Free space, get leave to write there, or choose another place"


@pytest.fixture
def dock(tmp_path) -> Path:
    """Learnwares a to e, each at version 1, and their index."""
    faults._prepare_index(tmp_path / "home")
    index.update(tmp_path / "home/dock", KEY)
    return tmp_path / "home/dock"


def refuse(patch: pytest.MonkeyPatch, code: int, failing=lambda k: True) -> list[str]:
    """Let the calls that change files fail whose numbers `failing` names; gives those made."""
    made = []

    def watched(name, real):
        def call(*args, **options):
            mode = args[1] if len(args) > 1 else options.get("mode", "r")
            if name == "open" and not faults.writes(mode):
                return real(*args, **options)
            made.append(name)
            if failing(len(made) - 1):
                raise OSError(code, os.strerror(code), str(args[0]))
            return real(*args, **options)

        return call

    for name in faults.CALLS:
        patch.setattr(os, name, watched(name, getattr(os, name)))
    opened = watched("open", open)
    patch.setattr(builtins, "open", opened)
    patch.setattr(io, "open", opened)
    return made


@pytest.fixture
def full_disk():
    """Files cannot grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def dead(code: str) -> None:
    """Run Python code in a process that is killed at its end."""
    code += "\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


# Full disks


WRITES = {
    "create_dock": lambda home: store.create_dock(home / "new", faults.SPACE),
    "add": lambda home: store.add(home / "dock", faults._version("f", 2)),
    "replace": lambda home: store.add(home / "dock", faults._version("a", 2), replace=True),
    "remove": lambda home: store.remove(home / "dock", "a"),
    "tombstone": lambda home: index.tombstone(home / "dock", ["a"]),
    "index.add": lambda home: index.add(home / "dock", faults._version("f", 2)),
    "write_spec": lambda home: store.write_spec(home / "mine", *faults._version("a", 1)[2:]),
    "write_json": lambda home: write_json(home / "results.json", {"a": 1}),
}


@pytest.mark.parametrize("name", WRITES)
def test_whichever_call_fails_the_error_says_where_why_and_what_to_do(dock, name):
    home, k = dock.parent, 0
    while True:
        shutil.copytree(home, copy := home.with_name(f"{k}"))
        try:
            with pytest.MonkeyPatch.context() as patch:
                made = refuse(patch, errno.ENOSPC, k.__eq__)
                WRITES[name](copy)
        except OSError as error:
            wanted = r"^\[Errno 28\] \w+: could not write .* \(No space left on device\); .*\. "
            assert re.search(wanted + REMEDY, str(error)), str(error)
            assert isinstance(error.__cause__, OSError) and error.__cause__.__cause__ is None
        else:
            if len(made) <= k:
                break
        store.add(copy / "dock", faults._version("g", 1))
        assert faults._docked(copy / "dock").keys() - {"a", "f"} == {*"bcdeg"}
        index.update(copy / "dock", KEY)
        assert index.check(copy / "dock") == []
        if "write" not in name:  # whoever locks sweeps as well
            stray = {path.name for path in (copy / "dock").rglob(".*")}
            assert stray == {".lock", ".moving"}
        shutil.rmtree(copy)
        k += 1
    assert k > 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, full_disk):
    states = []
    tuned.train(tuned.run(0), report=lambda done, state, *_: states.append(state))
    save_checkpoint(tmp_path, states[4], "own")
    for size in (0, 300, 2000):
        full_disk(size)
        with pytest.raises(OSError, match=r"could not write .*/10; .* unharmed, .*Free space"):
            save_checkpoint(tmp_path, states[9], "own")
        full_disk(resource.RLIM_INFINITY)
        assert [path.name for path in tmp_path.iterdir()] == ["5"]
        tuned.assert_same_bits(load_checkpoint(tmp_path, states[0], "own"), states[4])
    save_checkpoint(tmp_path, states[9], "own")
    tuned.assert_same_bits(load_checkpoint(tmp_path, states[0], "own"), states[9])


def test_a_checkpoint_whose_deletion_was_stopped_does_not_count(tmp_path, monkeypatch):
    state = tuned.trained(0)[0]
    for step in (5, 10):
        with monkeypatch.context() as patch:
            # A killed deletion: some file is gone, others are left.
            patch.setattr(shutil, "rmtree", lambda home, **_: os.unlink(home / "state/_METADATA"))
            save_checkpoint(tmp_path, state._replace(step=state.step * 0 + step), "own", keep=1)
    assert (tmp_path / "5/state").is_dir()
    shutil.rmtree(tmp_path / "10")
    assert load_checkpoint(tmp_path, state, "own") is None
    save_checkpoint(tmp_path, state, "own")
    assert [path.name for path in tmp_path.iterdir()] == ["20"]


# Folders that are read-only


def test_a_read_only_dock_serves_and_says_why_nothing_is_written(dock, monkeypatch):
    kernel, user = Gaussian(0.5), faults._version("a", 1)
    refuse(monkeypatch, errno.EROFS)
    learnwares = store.load(dock)
    pool = build_pool(
        [learnware.spec for learnware in learnwares],
        kernel,
        ids=[learnware.id for learnware in learnwares],
        n=[10] * 5,
        residual=[0.0] * 5,
    )
    assert pool.ids[int(rank([user.spec], pool, n=[10]).index[0, 0])] == "a"
    assert not index.is_behind(dock) and index.check(dock) == []
    for write in [*list(WRITES.values())[:-1], lambda home: index.update(home / "dock", KEY)]:
        with pytest.raises(OSError, match=rf"could not write .*Read-only file system.*{REMEDY}"):
            write(dock.parent)


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        refuse(patch, errno.EROFS)
        message = "could not write to the cache .*Read-only.*set LEARNWARE_CACHE to a folder"
        with pytest.raises(OSError, match=message):
            materials.fetch("simple-icd-10-cm")
        with pytest.raises(SystemExit, match=message):
            materials.main(["simple-icd-10-cm"])


# Two writers at once, and those that are dead


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    """The encoder of the jobs, out of a cache of theirs."""
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(materials.MATERIALS, faults.ENCODER, faults._material(faults.ENCODER, ""))


@pytest.mark.parametrize("name", ["specify", "build", "finetune"])
def test_a_second_run_is_told_and_a_dead_one_holds_nothing(tmp_path, encoder, name):
    run, lock, doing, other = {
        "specify": (specify.run, "work/.lock", "is making a specification", "workdir"),
        "build": (build.run, "dock/.building", "is building", "dock"),
        "finetune": (finetune.run, "work/a/.lock", "is training", "workdir"),
    }[name]
    faults.JOBS[name].prepare(tmp_path)
    config = getattr(faults, f"{name}_settings")(tmp_path)
    lock = tmp_path / lock
    lock.parent.mkdir(parents=True)
    if name == "finetune":
        config.together, config.data = 1, {"a": config.data.a.to_dict()}
    dead(f"import filelock\nfilelock.FileLock({str(lock)!r}).acquire()")
    with (
        filelock.FileLock(lock),
        pytest.raises(TimeoutError, match=rf"{doing}.*; wait for it, or name .*--config\.{other}"),
    ):
        run(config)
    assert [path.name for path in lock.parent.iterdir()] == [lock.name]
    run(config)
    assert len(list(lock.parent.iterdir())) > 1


def test_what_another_build_has_made_meanwhile_is_not_made_again(tmp_path, encoder, monkeypatch):
    faults._prepare_build(tmp_path)
    config, made = faults.build_settings(tmp_path), []
    real = store.locked

    def locked(*args, **options):
        monkeypatch.setattr(store, "locked", real)
        made.append(build.run(config)["added"])
        return real(*args, **options)

    monkeypatch.setattr(store, "locked", locked)
    assert build.run(config)["added"] == []
    assert made == [[f"learnware-{i}" for i in range(3)]]


def test_a_fetch_says_that_it_waits_for_another(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(filelock.FileLock, "acquire", _busy_once(filelock.FileLock.acquire))
    with caplog.at_level(logging.WARNING), materials._lock(tmp_path / "cache"):
        pass
    assert f"{tmp_path / 'cache'}: another process is fetching; waiting" in caplog.text


def _busy_once(real):
    def acquire(lock, *args, **options):
        if options.get("blocking") is False:
            raise filelock.Timeout(lock.lock_file)
        return real(lock, *args, **options)

    return acquire


# Clocks


def test_a_clock_that_was_set_back_brings_no_old_mark(dock):
    hour = 3600 * 10**9
    os.utime(dock / "learnwares", ns=(0, store.mark(dock) + hour))
    index.update(dock, KEY)
    marks = [store.mark(dock)]
    for write in (WRITES["add"], WRITES["replace"], WRITES["remove"]):
        write(dock.parent)
        assert index.is_behind(dock)
        marks.append(store.mark(dock))
    assert marks == sorted(set(marks))
    index.update(dock, KEY)
    assert not index.is_behind(dock) and index.check(dock) == []


def test_an_update_waits_for_a_clock_that_stands(dock, monkeypatch):
    """What comes by other means within one step of the clock would leave the same mark."""
    mark, asked, real = store.mark(dock), [], os.utime

    def utime(path, **options):
        asked.append(path)
        now = mark if len(asked) < 4 else mark + 10**6
        real(path, ns=(now, now))

    monkeypatch.setattr(os, "utime", utime)
    index.update(dock, KEY)
    assert asked == [dock / "index"] * 4


def test_an_update_that_was_stopped_leaves_the_index_behind(dock, monkeypatch):
    """Specifications written over in their place change no mark, and their old rows are dead."""
    for id in "ab":
        file = dock / "learnwares" / id / "rkme.safetensors"
        store.write_spec(file, *faults._version(id, 3)[2:])
    # The folder of a learnware has another time, that of all of them has not.
    assert not index.is_behind(dock)
    with monkeypatch.context() as patch:
        patch.setattr(index, "_append_dock", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.update(dock, KEY)
    assert {problem.id for problem in index.check(dock)} == {"a", "b"}
    assert index.is_behind(dock)
    index.update(dock, KEY)
    assert not index.is_behind(dock) and index.check(dock) == []


# What was stopped goes on to the same bits


def test_a_build_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    tmp_path, encoder, monkeypatch
):
    faults._prepare_build(tmp_path)
    for name in ("whole", "stopped"):
        shutil.copytree(tmp_path / "adapters", tmp_path / name / "adapters")
    build.run(faults.build_settings(tmp_path / "whole"))
    real = index.add

    def add(path, learnware, **options):
        if learnware.id.endswith("1"):
            raise KeyboardInterrupt
        real(path, learnware, **options)

    config = faults.build_settings(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(index, "add", add)
        with pytest.raises(KeyboardInterrupt):
            build.run(config)
    assert build.run(config)["added"] == ["learnware-1", "learnware-2"]
    found, wanted = (faults._docked(tmp_path / name / "dock") for name in ("stopped", "whole"))
    assert found == wanted and len(wanted) == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adapters that were trained together."""
    folder = tmp_path_factory.mktemp("made")
    faults._prepare_finetune(folder)
    finetune.run(faults.finetune_settings(folder))
    return folder


@pytest.fixture
def adapters(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_stack_of_which_half_is_written_is_made_to_the_same_bits(made, adapters):
    """Alone, the second adapter would be trained anew, and rounded otherwise."""
    assert len(list(adapters.glob("work/stack-*/stack.json"))) == 1
    (adapters / "work/b/summary.json").unlink()
    finetune.run(faults.finetune_settings(adapters))
    assert faults._tuned(adapters) == faults._tuned(made)
    assert not (adapters / "work/b/checkpoints").exists()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


@pytest.mark.parametrize(
    ("name", "damage", "at"),
    [
        ("adapter/adapter_model.safetensors", flip, -1),
        ("adapter/adapter_model.safetensors", cut, 100),
        ("adapter/adapter_config.json", flip, 40),
        ("summary.json", cut, 100),
        ("summary.json", cut, 0),
        ("summary.json", flip, -100),
    ],
)
def test_a_damaged_adapter_is_named_and_made_again(made, adapters, name, damage, at):
    config, file = faults.finetune_settings(adapters), adapters / "work/a" / name
    damage(file, at)
    with pytest.raises(ValueError, match=rf"finetune: {file} is .*damaged; delete .*summary\.json"):
        finetune.run(config)
    (adapters / "work/a/summary.json").unlink()
    finetune.run(config)
    assert faults._tuned(adapters) == faults._tuned(made)


def test_metrics_that_were_damaged_before_the_checkpoint_are_refused(adapters):
    (adapters / "work/a/summary.json").unlink()
    (file,) = adapters.glob("work/stack-*/metrics.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:5] + b"\xff" + b"".join(lines[2:]))
    with pytest.raises(
        ValueError, match=rf"{file} is damaged before step 4, .* delete .*stack-\w+ to"
    ):
        finetune.run(faults.finetune_settings(adapters))


def test_a_summary_without_hashes_is_taken_as_it_is(made, adapters):
    """Earlier versions wrote none."""
    file = adapters / "work/a/summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps({k: summary[k] for k in summary if k not in ("sha256", "files")}))
    finetune.run(faults.finetune_settings(adapters))
    assert "sha256" not in json.loads(file.read_text())


def test_embedded_rows_that_a_killed_writer_left_are_deleted(tmp_path, encoder):
    faults._prepare_specify(tmp_path)
    (tmp_path / "work").mkdir()
    ours = [f".{name}.01" for name in (specify.STATE, "rkme.safetensors", "results.json")]
    for name in (*ours, ".others.safetensors.01"):
        (tmp_path / "work" / name).touch()
    specify.run(faults.specify_settings(tmp_path))
    names = {path.name for path in (tmp_path / "work").iterdir()}
    kept = {".others.safetensors.01", ".lock", "results.json", "rkme.safetensors"}
    assert names == kept


# Damaged caches


def test_a_damaged_data_set_of_the_cache_is_fetched_again(tmp_path, monkeypatch, caplog):
    import datasets

    calls = []

    def load(name, cache_dir):
        calls.append(name)
        return {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train", "test")}

    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path))
    monkeypatch.delenv("LEARNWARE_MIRROR", raising=False)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    home = tmp_path / "datasets/far/away"
    whole = {file.name: file.read_bytes() for file in materials.fetch_dataset("far/away")}
    for count, harm in enumerate(
        (
            lambda: flip(home / "test.jsonl", 3),
            lambda: cut(home / "train.jsonl", 5),
            lambda: (home / "test.jsonl").unlink(),
            lambda: cut(home / "manifest.json", 9),
        )
    ):
        materials.fetch_dataset("far/away")
        assert len(calls) == 1 + count
        harm()
        files = materials.fetch_dataset("far/away")
        assert {file.name: file.read_bytes() for file in files} == whole
    assert "file test.jsonl is damaged; it is not used" in caplog.text
    (tmp_path / "datasets/far/own").mkdir()
    (tmp_path / "datasets/far/own/train.jsonl").write_text("{}")
    assert [file.name for file in materials.fetch_dataset("far/own")] == ["train.jsonl"]


def test_a_damaged_program_of_the_compilation_cache_is_compiled_again(tmp_path):
    script = """
import jax, sys
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
print(jax.jit(lambda x: (x * x).sum() + 3)(jax.numpy.arange(4.0)))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]

    def call():
        return subprocess.run(command, capture_output=True, text=True, check=True)

    assert call().stdout == "17.0\n"
    for file in tmp_path.glob("*-cache"):
        flip(file, file.stat().st_size // 2)
    again = call()
    assert again.stdout == "17.0\n" and "Error reading persistent compilation" in again.stderr


# Kills


def test_kills_are_counted_and_a_run_goes_on(tmp_path):
    config = faults_config.get_config("smoke")
    config.workdir, config.kills = str(tmp_path), {"index": (1, 2)}
    output = faults.run(config)
    assert output["kills"] == 3 and output["lost"] == output["differing"] == 0
    assert sum(output["jobs"]["index"]["at_calls"].values()) == 2
    assert sum(output["phases"].values()) == 3
    assert output["runs"]["index"]["calls"] > 100
    file = tmp_path / "results.json"
    assert json.loads(file.read_text()) == output
    # The run had been stopped before its last kill.
    rows = output.pop("rows")
    write_json(file, output | {"rows": rows[:2]})
    again = faults.run(config)
    assert again["rows"] == rows[:2] + again["rows"][2:] and again["kills"] == 3
    assert [row["call"] for row in again["rows"]] == [row["call"] for row in rows]


def test_what_is_lost_or_differs_is_seen(dock):
    home = dock.parent
    assert faults._check_index(home, home, []) == []
    store.remove(dock, "a")
    assert faults._check_index(home, home, []) == ["the dock's learnwares"]
    store.add(dock, faults._version("a", 1))
    assert faults._check_index(home, home, []) == []
    file = dock / "learnwares/c/rkme.safetensors"
    store.write_spec(file, *faults._version("c", 8)[2:])
    assert faults._check_index(home, home, []) == ["c"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="rkme"):
        faults._check_index(home, home, [])


def test_differences_by_hand():
    found = {"a": [1, {"b": b"x"}], "c": 1}
    assert faults._differing(found, {"a": [1, {"b": b"x"}], "c": 1}, "it") == []
    assert faults._differing(found, {"a": [1, {"b": b"y"}], "d": 1}, "it") == [
        *("it a 1 b", "it c", "it d")
    ]
    assert faults._differing(found, None, "it") == ["it"]
