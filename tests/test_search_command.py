"""`experiments.search`: the exact ranking of a dock, by one process or several, or a clear end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from configs import search as search_config
from experiments import search
from experiments.ranking import pool_of
from learnware_jax.dock import store
from learnware_jax.selection.ranking import rank
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.kernels import Gaussian, to_dict
from learnware_jax.specification.rkme import RKME

ROOT = Path(__file__).parents[1]
KERNEL, D, N = Gaussian(0.2), 5, 30
SPACE = {"dimension": D, "kernel": to_dict(KERNEL)}


def specification(rng):
    z = rng.normal(size=(4, D)) + rng.integers(6) * np.eye(D)[rng.integers(D)]
    about = {"n": N, "points": 4, "residual": 0.0}
    return RKME(z.astype(np.float32), rng.dirichlet(np.ones(4))), Header(
        SCHEMA, "rkme", SPACE, about
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A dock of forty learnwares, and the files of two users."""
    home, rng = tmp_path_factory.mktemp("search"), np.random.default_rng(0)
    store.create_dock(home / "dock", SPACE)
    for i in range(40):
        spec, header = specification(rng)
        store.add(home / "dock", store.Learnware(f"l{i:02}", {"domain": "x"}, spec, header))
    for name in ("anna", "ben"):
        store.write_spec(home / f"{name}.rkme.safetensors", *specification(rng))
    return home


def settings(material, workdir):
    config = search_config.get_config("smoke")
    config.dock, config.workdir = str(material / "dock"), str(workdir)
    config.users = tuple(str(material / f"{name}.rkme.safetensors") for name in ("anna", "ben"))
    return config


def test_it_finds_what_distances_to_all_find(material, tmp_path):
    output = search.run(settings(material, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == output
    assert output["learnwares"] == 40
    learnwares = store.load(material / "dock")
    pool = pool_of(learnwares, KERNEL)
    for user, name in zip(output["users"], ("anna", "ben"), strict=True):
        spec, _ = store.read_spec(material / f"{name}.rkme.safetensors")
        want = rank([spec], pool, n=[N], top_k=5)
        assert user["certified"] and user["n"] == N and user["measured"] <= 40
        assert [entry["id"] for entry in user["ranking"]] == [pool.ids[i] for i in want.index[0]]
        assert_allclose([e["distance"] for e in user["ranking"]], want.distance[0], atol=1e-7)


def test_texts_and_tasks_are_users_of_a_dock_of_texts(tmp_path):
    config = search_config.get_config("smoke")
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(f"Is drug {i} safe for a patient with asthma?" for i in range(12)))
    config.workdir, config.dock = str(tmp_path / "work"), str(tmp_path / "dock")
    for path in sorted((ROOT / "docks/quickstart").rglob("*")):
        copy = tmp_path / "dock" / path.relative_to(ROOT / "docks/quickstart")
        if path.is_dir() and "index" not in copy.parts:
            copy.mkdir(parents=True)
        elif path.suffix in (".json", ".safetensors") and "adapter" not in path.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    config.users = ("medicationqa", str(file))
    task, mine = search.run(config)["users"]
    assert (task["id"], task["n"], mine["id"], mine["n"]) == ("medicationqa", 24, "mine", 12)
    for user in (task, mine):
        assert user["ranking"][0]["id"].startswith("medmcqa")
    for written in Path(config.workdir).iterdir():
        assert b"asthma" not in written.read_bytes()


def test_the_index_follows_the_dock(material, tmp_path):
    config = settings(material, tmp_path)
    before = search.run(config)
    gone = before["users"][0]["ranking"][0]["id"]
    card, spec, header = store.read_learnware(config.dock, gone)[1:]
    store.remove(config.dock, gone)
    after = search.run(config)
    ids = [entry["id"] for entry in after["users"][0]["ranking"]]
    assert ids[:4] == [entry["id"] for entry in before["users"][0]["ranking"][1:]]
    assert after["learnwares"] == 39
    store.add(config.dock, store.Learnware(gone, card, spec, header))
    assert search.run(config)["users"] == before["users"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("users", (), r"users=\(\); want files"),
        ("users", ("fiqa", "fiqa"), "each once"),
        ("top_k", 0, "top_k=0, most=0"),
        ("most", 3, "top_k=5, most=3"),
        ("dock", "nowhere", "no dock at nowhere"),
    ],
)
def test_bad_settings(material, tmp_path, name, value, message):
    config = settings(material, tmp_path / "work")
    config[name] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search.run(config)
    assert not (tmp_path / "work").exists()


def test_a_specification_of_another_space_is_refused(material, tmp_path):
    config = settings(material, tmp_path)
    spec, header = store.read_spec(config.users[0])
    other = header._replace(space=SPACE | {"kernel": to_dict(Gaussian(0.3))})
    store.write_spec(tmp_path / "other.rkme.safetensors", spec, other)
    config.users = (str(tmp_path / "other.rkme.safetensors"),)
    with pytest.raises(ValueError, match=r"other\.rkme\.safetensors and the dock .*gamma"):
        search.run(config)


# As a program, with the library's search replaced by the end of the process.
DYING = """
import os, runpy, signal, sys
import learnware_jax.selection.search as library
library.search = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("experiments.search", run_name="__main__", alter_sys=True)
"""


def together(material, workdir, dying=None, without_file=None):
    """Two processes of one run; returns (exit status, standard error) of each.

    One may be killed in its search, or be without a user's file.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    config = settings(material, workdir)
    processes = []
    for i in range(2):
        program = ["-c", DYING] if i == dying else ["-m", "experiments.search"]
        users = tuple(f"{user}{'.gone' * (i == without_file)}" for user in config.users)
        users = tuple(user.replace(".safetensors.gone", ".gone.safetensors") for user in users)
        arguments = [
            *("--config=configs/search.py:smoke", f"--config.dock={config.dock}"),
            *(f"--config.workdir={workdir}", f"--config.users={users!r}"),
            *(f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"),
        ]
        flags = "--xla_force_host_platform_device_count=2"
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments],
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=150)[1] for process in processes]
    return [(p.returncode, e) for p, e in zip(processes, errors, strict=True)]


def test_two_processes_find_what_one_finds(material, tmp_path):
    alone = search.run(settings(material, tmp_path / "alone"))
    for status, error in together(material, tmp_path / "two"):
        assert status == 0, error
    found = json.loads((tmp_path / "two/results.json").read_text())
    assert found["users"] == alone["users"]  # distances too, to the last bit
    assert (found["devices"], found["processes"]) == (4, 2)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_whose_fellow_is_killed_says_so_and_ends(material, tmp_path, dying):
    search.run(settings(material, tmp_path / "alone"))  # the index is up to date
    ends = together(material, tmp_path / "two", dying=dying)
    assert ends[dying][0] == -signal.SIGKILL
    status, error = ends[1 - dying]
    # Whoever notices first speaks: the experiment, or JAX, which then aborts the process.
    ours = f"error: process {1 - dying} of 2 cannot reach the others: one of them ended"
    assert (status, ours in error) == (3, True) or "another task died" in error, error
    assert status in (3, -signal.SIGABRT)
    assert not (tmp_path / "two").exists()


def test_a_process_with_bad_input_says_so_and_both_end(material, tmp_path):
    search.run(settings(material, tmp_path / "alone"))
    ends = together(material, tmp_path / "two", without_file=1)
    status, error = ends[1]
    assert status == 2 and "error: read_spec: there is no " in error and "Traceback" not in error
    status, error = ends[0]
    assert status in (3, -signal.SIGABRT)
    assert "cannot reach the others" in error or "another task died" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "want all three of them, or none"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "want an id from 0 to one less than the number",
        ),
    ],
)
def test_bad_flags(flags, message):
    command = [sys.executable, "-m", "experiments.search", "--config=configs/search.py:smoke"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
