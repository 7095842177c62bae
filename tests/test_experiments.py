"""Every experiment at its smoke size, in one dock, through the functions behind the commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import bench_rank as bench_rank_config
from configs import bench_reduce as bench_reduce_config
from configs import build as build_config
from configs import geometry as geometry_config
from configs import select as select_config
from experiments import bench_rank, bench_reduce, build, evaluation, geometry, select
from experiments.common import open_encoder, write_json
from learnware_jax.dock import store

REPOSITORY = Path(__file__).parent.parent
QUESTIONS = [f"Is drug number {i} safe for a patient with asthma?" for i in range(24)]


@pytest.fixture(scope="module")
def dock(tmp_path_factory):
    config = build_config.get_config("smoke")
    config.dock = str(tmp_path_factory.mktemp("smoke") / "dock")
    build.run(config)
    return config.dock


@pytest.fixture
def config(dock, tmp_path):
    config = select_config.get_config("smoke")
    config.lock()
    config.dock, config.workdir = dock, str(tmp_path / "work")
    return config


def test_build_goes_on_where_it_stopped(dock, tmp_path):
    config = build_config.get_config("smoke")
    config.dock = str(tmp_path / "dock")
    every, config.tasks = config.tasks, config.tasks[:2]
    assert build.run(config)["added"] == list(config.tasks)
    config.tasks = every
    assert build.run(config)["added"] == list(every[2:])
    assert build.run(config)["added"] == []
    for a, b in zip(store.load(dock), store.load(config.dock), strict=True):
        assert (a.id, a.card, a.header.space) == (b.id, b.card, b.header.space)


def test_the_same_seed_builds_the_same_bits(dock, tmp_path):
    config = build_config.get_config("smoke")
    config.dock = str(tmp_path / "dock")
    build.run(config)
    for a, b in zip(store.load(dock), store.load(config.dock), strict=True):
        np.testing.assert_array_equal(a.spec.z, b.spec.z)
        np.testing.assert_array_equal(a.spec.beta, b.spec.beta)


def test_dock_holds_what_the_catalogue_says(dock):
    for learnware in store.load(dock):
        about = learnware.header.about
        assert about["n"] == 32 and about["points"] == len(learnware.spec.beta) == 16
        assert 0 < about["residual"] < 0.01 and about["gap"] < 1e-9
        assert learnware.header.space["kernel"] == {"name": "gaussian", "gamma": 0.1}


def test_select_writes_the_interface_and_finds_own_tasks(config):
    output = select.run(config)
    assert json.loads((Path(config.workdir) / "results.json").read_text()) == output
    assert [user["kind"] for user in output["users"]] == ["same"] * 6 + ["unseen"] * 2 + ["outside"]
    for user in output["users"]:
        assert list(user) == [
            *("id", "kind", "domain", "n", "ranking", "undominated", "decision", "mixture"),
            "seconds",
        ]
        distances = [entry["distance"] for entry in user["ranking"]]
        assert distances == sorted(distances) and len(distances) == 6
        for entry in user["ranking"]:
            assert list(entry) == ["id", "domain", "distance", "lower", "upper"]
            assert entry["lower"] < entry["distance"] < entry["upper"]
        assert user["undominated"][0] == user["ranking"][0]["id"]
        fits = distances[0] <= output["threshold"]
        assert user["decision"] == (user["ranking"][0]["id"] if fits else "none")
        assert sum(part["weight"] for part in user["mixture"]) == pytest.approx(1)
        if user["kind"] == "same":
            assert user["decision"] == user["id"]
    assert output["users"][-1]["decision"] == "none"
    assert (Path(config.workdir) / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert "| molecules | outside |" in (Path(config.workdir) / "report.md").read_text()


def test_own_texts_leave_nothing_but_a_specification(config, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("experiments.common.cache_dir", lambda: cache)
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(QUESTIONS))
    config.user.data = str(file)
    (user,) = select.run(config)["users"]
    assert (user["id"], user["kind"], user["n"]) == ("mine", "own", 24)
    assert user["ranking"][0]["domain"] == "medicine"
    assert not cache.exists()
    spec, header = store.read_spec(Path(config.workdir) / "mine.rkme.safetensors")
    assert len(spec.beta) == 12 and header.about["n"] == 24
    for written in Path(config.workdir).iterdir():
        assert b"asthma" not in written.read_bytes()


def test_own_learnware_joins_a_dock_and_is_found(config, dock, tmp_path):
    config.dock = str(tmp_path / "dock")
    shutil.copytree(dock, config.dock)
    own = build_config.get_config("own")
    own.dock, own.learnware.id, own.learnware.domain = config.dock, "asthma", "medicine"
    own.learnware.data = str(tmp_path / "train.txt")
    own.specification = build_config.specification(smoke=True)
    Path(own.learnware.data).write_text("\n".join(QUESTIONS))
    assert build.run(own)["added"] == ["asthma"]
    with pytest.raises(ValueError, match=r"asthma: .* has another learnware of that id already"):
        build.run(own)
    config.user.data = str(tmp_path / "user.txt")
    Path(config.user.data).write_text("\n".join(q.replace("safe", "good") for q in QUESTIONS))
    assert select.run(config)["users"][0]["decision"] == "asthma"


def test_a_data_set_is_read_from_the_mirror_by_its_hub_id(config, tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "someone" / "questions"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"question": q}) for q in QUESTIONS))
    monkeypatch.setenv("LEARNWARE_MIRROR", str(tmp_path / "mirror"))
    config.user.data = "someone/questions"
    assert select.run(config)["users"][0]["n"] == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user.data": "one.txt"}, "holds 1 text; a ranking with intervals needs at least 2"),
        ({"user.data": "absent.txt"}, "there is no file"),
        ({"user.data": "no-such-task"}, "is no file and no known task"),
        ({"dock": "nowhere"}, "there is no dock at"),
        ({"top_k": -1}, "top_k=-1"),
        ({"level": 1.5}, "level=1.5"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(config, tmp_path, change, message):
    (tmp_path / "one.txt").write_text("only this\n")
    for key, value in change.items():
        paths = {"one.txt", "absent.txt", "nowhere"}
        config.update_from_flattened_dict({key: str(tmp_path / value) if value in paths else value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        select.run(config)
    assert not Path(config.workdir).exists()


def test_a_dock_of_another_encoder_is_refused(config, dock, tmp_path):
    space = store.read_space(dock) | {"encoder_sha256": "0" * 64}
    config.dock = str(tmp_path / "other")
    store.create_dock(config.dock, space)
    learnware = store.load(dock)[0]
    header = learnware.header._replace(space=space)
    store.add(config.dock, learnware._replace(header=header))
    with pytest.raises(ValueError, match="its encoder_sha256 is 000"):
        select.run(config)


def test_a_dock_that_is_not_made_of_texts_is_refused(config, dock, tmp_path):
    config.dock = str(tmp_path / "other")
    store.create_dock(config.dock, store.read_space(dock), kind="one_step")
    with pytest.raises(ValueError, match=r"are of kind 'one_step', .*; name a dock of RKMEs"):
        select.run(config)
    assert not Path(config.workdir).exists()
    own = build_config.get_config("smoke")
    own.dock = config.dock
    with pytest.raises(ValueError, match="are of kind 'one_step'"):
        build.run(own)


def test_evaluation_counts_what_it_says():
    config = select_config.get_config("smoke")
    config.evaluation.seeds, config.evaluation.rows = (0, 1), (8, 64)
    summary = evaluation.summarise(config, open_encoder(config.specification))
    rows = {(row["n"], row["method"]): row for row in summary["rows"]}
    assert set(rows) == {
        (n, method) for n in (8, 64) for method in ("rkme", "mean_cosine", "random")
    }
    for (n, method), row in rows.items():
        assert row["users"] == {"same": 6, "unseen": 2, "outside": 1}
        if method == "random":
            assert row["outside_abstained"]["mean"] == 0 and row["same_served"]["mean"] == 1
        elif n == 64:
            assert row["same_top1"] == {"mean": 1.0, "stderr": 0.0}


def test_geometry_maps_close_learnwares_close(dock, tmp_path):
    for kind in geometry.MAPS:
        config = geometry_config.get_config("smoke")
        config.dock, config.workdir, config.map = dock, str(tmp_path / kind), kind
        output = geometry.run(config)
        squared = np.array(output["squared_mmd"])
        np.testing.assert_allclose(squared, squared.T)
        assert (np.diag(squared) == 0).all() and output["correlation"] > 0.7
        for name in ("map", "heat_map"):
            assert (tmp_path / kind / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert b"<svg" in (tmp_path / kind / f"{name}.svg").read_bytes()


def test_kernel_pca_recovers_points_of_the_plane():
    points = np.random.default_rng(0).normal(size=(7, 2))
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    found = geometry.kernel_pca(squared)
    np.testing.assert_allclose(((found[:, None] - found[None]) ** 2).sum(-1), squared, atol=1e-12)


def test_bench_reduce_ranks_methods_in_float64(tmp_path):
    config = bench_reduce_config.get_config("smoke")
    config.workdir = str(tmp_path)
    rows = {row["method"]: row for row in bench_reduce.run(config)["rows"]}
    assert rows["ours"]["mmd2"] < 0.5 * rows["random"]["mmd2"]
    assert rows["ours"]["mmd2"] < 0.8 * rows["herding"]["mmd2"]
    assert {(row["n"], row["m"], row["bandwidth"]) for row in rows.values()} == {
        (300, 10, "median")
    }


def test_bench_rank_agrees_with_float64(tmp_path):
    config = bench_rank_config.get_config("smoke")
    config.workdir = str(tmp_path)
    for row in bench_rank.run(config)["rows"]:
        assert row["max_error"] < 2e-7 and row["top10_same"]
        assert row["product_rate_fraction"] > 0 and row["ms_per_query"] > 0


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_command_line_explains_bad_input_in_a_paragraph(tmp_path):
    command = [sys.executable, "-m", "experiments.select", "--config=configs/select.py:smoke"]
    done = subprocess.run(
        [*command, f"--config.user.data={tmp_path / 'none.txt'}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: read_file: there is no file")
    assert "Traceback" not in done.stderr


def test_dock_command_lists_checks_and_removes(dock, tmp_path):
    path = tmp_path / "dock"
    shutil.copytree(dock, path)

    def call(*options):
        command = [sys.executable, "-m", "experiments.dock", f"--dock={path}", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    assert "asdiv" in call().stdout
    file = path / "learnwares" / "asdiv" / "rkme.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    checked = call("--check")
    assert checked.returncode == 1 and "asdiv: " in checked.stdout
    assert "6 learnwares, 1 unsound." in checked.stdout
    assert call("--remove=asdiv").returncode == 0
    assert call("--check").stdout == "5 learnwares, 0 unsound.\n"
    assert call().stdout.endswith("\nNo index.\n")


def test_dock_command_looks_after_the_index(dock, tmp_path):
    path = tmp_path / "dock"
    shutil.copytree(dock, path)

    def call(*options):
        command = [sys.executable, "-m", "experiments.dock", f"--dock={path}", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    built = call("--index").stdout
    size = sum(file.stat().st_size for file in (path / "index").iterdir())
    assert built == f"Index: 6 rows, 0 dead, {size:,} bytes, up to date.\n"
    assert call("--remove=asdiv").returncode == 0
    checked = call("--check")
    assert checked.returncode == 0
    assert checked.stdout == (
        f"5 learnwares, 0 unsound.\nIndex: 6 rows, 1 dead, {size:,} bytes, up to date. "
        "0 rows or learnwares differ.\n"
    )
    gone, *_ = store.list_ids(path)
    store.remove(path, gone)
    checked = call("--check")
    assert checked.returncode == 1
    assert f"{gone}: in the index, but not in the dock\n" in checked.stdout
    assert "behind the dock: update it with --index. 1 rows or" in checked.stdout
    assert "behind the dock" in call().stdout
    assert call("--index").stdout.endswith("up to date.\n")
    (path / "index" / "index.json").write_text("{")
    done = call("--index")
    assert done.returncode == 2 and done.stderr.startswith("error: update: ")
    assert "delete" in done.stderr and "Traceback" not in done.stderr
