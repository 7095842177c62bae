"""One specification of many rows: every kind of source, runs that were stopped, what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import oracle
import pandas
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import specify as specify_config
from experiments import bench_reduce, specify
from experiments.common import open_encoder, space_of
from learnware_jax.dock import store
from learnware_jax.slm.encoder import embed
from learnware_jax.specification.kernels import Gaussian, to_dict
from learnware_jax.specification.reduce import reduce
from learnware_jax.specification.rkme import from_rows

REPOSITORY = Path(__file__).parent.parent
TEXTS = [f"Is drug number {i} safe with “{i % 7} pills”, a day?" for i in range(60)]
WIDTH = 384
ROWS, CAPACITY = 2_500, 1_600


def small(tmp_path, data, **changes):
    config = specify_config.get_config("smoke").lock()
    config.workdir, config.data = str(tmp_path / "work"), str(data)
    config.specification.reducer = "random"  # so that nothing is compiled
    config.specification.publish_rows = "random"
    config.anchors, config.capacity, config.piece = 8, CAPACITY, 16
    for name, value in changes.items():
        config[name] = value
    return config


def made(tmp_path):
    return store.read_spec(tmp_path / "work" / "rkme.safetensors")


def same_bits(a, b):
    assert_array_equal(a[0].z, b[0].z)
    assert_array_equal(a[0].beta, b[0].beta)
    assert a[1].about["residual"] == b[1].about["residual"] and a[1].space == b[1].space


def stand_in(encoder, texts, **_):
    """Rows of unit norm that follow from the text alone."""
    seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") for t in texts]
    rows = np.stack([np.random.default_rng(s).standard_normal(WIDTH, np.float32) for s in seeds])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(specify, "embed", stand_in)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return oracle.unit_rows(rng, ROWS, WIDTH, spread=2)


@pytest.fixture
def rows_file(tmp_path, x):
    np.save(tmp_path / "rows.npy", x)
    return tmp_path / "rows.npy"


def test_texts_give_what_compression_at_once_gives(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(TEXTS))
    config = small(tmp_path, tmp_path / "mine.txt", piece=100)
    config.specification.reducer = "gauss_newton"
    config.specification.publish_rows = ""
    output = specify.run(config)
    encoder = open_encoder(config.specification)
    x = embed(encoder, TEXTS, max_tokens=config.specification.max_tokens)
    key = jax.random.split(jax.random.key(0))[1]
    settings = config.specification
    wanted = reduce(key, x, 16, Gaussian(0.1), start=settings.start, steps=settings.steps)
    spec, header = made(tmp_path)
    assert_array_equal(spec.z, wanted.spec.z)
    assert_array_equal(spec.beta, wanted.spec.beta)
    assert header.space == space_of(encoder, settings) | {"kernel": to_dict(Gaussian(0.1))}
    assert (header.about["n"], header.about["residual"]) == (60, wanted.residual)
    assert json.loads((tmp_path / "work" / "results.json").read_text()) == output
    assert (output["n"], output["points"]) == (60, 16)
    # In pieces, the same but for rounding.
    config.piece = 7
    specify.run(config)
    assert_allclose(made(tmp_path)[0].z, spec.z, atol=1e-2)
    assert sorted(file.name for file in (tmp_path / "work").iterdir()) == [
        ".lock",
        "results.json",
        "rkme.safetensors",
    ]


def write(folder, kind):
    file = folder / f"mine.{kind}"
    table = pandas.DataFrame({"id": range(61), "question": [*TEXTS[:30], " ", *TEXTS[30:]]})
    match kind:
        case "jsonl":
            table.to_json(file, orient="records", lines=True)
        case "json":
            table.to_json(file, orient="records")
        case "csv":
            table.to_csv(file, index=False, encoding="utf-8-sig")
        case "tsv":
            table.to_csv(file, index=False, sep="\t")
        case "parquet":
            table.to_parquet(file)
        case "txt":
            file.write_text("\ufeff" + "\r\n".join(table["question"]), newline="")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_every_format_gives_its_texts(tmp_path, cheap, monkeypatch, kind):
    seen = []
    monkeypatch.setattr(
        specify, "embed", lambda e, texts, **_: seen.append(texts) or stand_in(e, texts)
    )
    assert specify.run(small(tmp_path, write(tmp_path, kind)))["n"] == 60
    assert [text for texts in seen for text in texts] == [" ".join(text.split()) for text in TEXTS]
    assert [len(texts) for texts in seen] == (
        [16, 15, 16, 13] if kind != "json" else [16, 16, 16, 12]
    )


def test_cells_of_a_table_are_words(tmp_path, cheap):
    file = tmp_path / "mine.csv"
    file.write_text('text,b\nNA,1\nnull,2\n007,3\n"two\nlines",4\n"",5\n')
    assert specify.run(small(tmp_path, file))["n"] == 4
    z = made(tmp_path)[0].z
    assert np.isin(z[:, 0], stand_in(None, ["NA", "null", "007", "two lines"])[:, 0]).all()


def test_columns_are_chosen_once_or_named(tmp_path, cheap):
    rows = [
        {"text": f"word {i}", "other": f"a much longer text with number {i}"} for i in range(40)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for column, texts in (
        ("", [row["text"] for row in rows]),
        ("other", [row["other"] for row in rows]),
        ("text+other", [f"{row['text']} {row['other']}" for row in rows]),
    ):
        specify.run(small(tmp_path, file, column=column))
        z = made(tmp_path)[0].z
        assert np.isin(z[:, 0], stand_in(None, texts)[:, 0]).all(), column
    with pytest.raises(ValueError, match=r"in rows 1 to 16 of .*no column 'none'; it has text"):
        specify.run(small(tmp_path, file, column="none"))


def test_embedded_rows_from_a_file(tmp_path, rows_file, x):
    config = small(tmp_path, rows_file, piece=300)
    config.specification.reducer = "gauss_newton"
    config.specification.publish_rows = ""
    output = specify.run(config)
    spec, header = made(tmp_path)
    assert output["n"] == header.about["n"] == ROWS
    exact = bench_reduce.Referee(x, 0.1).squared_mmd(*spec)  # the oracle would take 20 GB
    at_once = reduce(jax.random.key(0), x, 16, Gaussian(0.1), start="noise", steps=10)
    assert exact < 1.03 * at_once.residual
    assert_allclose(output["residual"], exact, rtol=0.1)
    # Anchors are of all rows, so pieces make no difference.
    config.piece = 1000
    specify.run(config)
    same_bits(made(tmp_path), (spec, header))


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    tmp_path, rows_file, cheap, monkeypatch, kind
):
    file = rows_file if kind == "npy" else write(tmp_path, kind)
    changes = {"piece": 300 if kind == "npy" else 16, "save_seconds": 0.0}
    specify.run(small(tmp_path, file, **changes))
    whole, state = made(tmp_path), tmp_path / "work" / specify.STATE
    assert not state.exists()
    calls, update = [], specify.update

    def failing(stream, x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(stream, x)

    monkeypatch.setattr(specify, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        specify.run(small(tmp_path, file, **changes))
    assert state.exists()
    (tmp_path / "work" / "rkme.safetensors").unlink()
    before, _ = calls[:2], calls.clear()
    calls += [0] * 3  # it fails no more
    specify.run(small(tmp_path, file, **changes))
    same_bits(made(tmp_path), whole)
    assert not state.exists()
    # No row was worked off twice.
    assert sum(before) + sum(calls) == whole[1].about["n"]


SLOWLY = """
import sys, time
from experiments import specify
sys.path.insert(0, "tests")
import test_specify as t
from pathlib import Path
update = specify.update
specify.update = lambda stream, x: time.sleep(0.1) or update(stream, x)
specify.run(t.small(Path(sys.argv[1]), sys.argv[2], piece=50, save_seconds=0.0))
"""


def test_a_killed_run_ends_with_the_same_bits(tmp_path, rows_file):
    state = tmp_path / "work" / specify.STATE
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(tmp_path), str(rows_file)], cwd=REPOSITORY
    )
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.exists() and not (tmp_path / "work" / "rkme.safetensors").exists()
    config = small(tmp_path, rows_file, piece=50, save_seconds=0.0)
    specify.run(config)
    stopped = made(tmp_path)
    specify.run(config)
    same_bits(made(tmp_path), stopped)


@pytest.fixture
def stopped(tmp_path, rows_file, monkeypatch):
    """The state of a stopped run, its configuration, and the patch taken off."""

    def failing(stream, x):
        if stream.n > 600:
            raise KeyboardInterrupt
        return update(stream, x)

    update = specify.update
    monkeypatch.setattr(specify, "update", failing)
    config = small(tmp_path, rows_file, piece=300, save_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        specify.run(config)
    monkeypatch.setattr(specify, "update", update)
    return tmp_path / "work" / specify.STATE, config


def test_a_state_of_another_run_is_refused_by_name(stopped, rows_file, x):
    state, config = stopped
    kept = state.read_bytes()
    for name, value in (("seed", 1), ("piece", 200), ("capacity", 1_700), ("anchors", 9)):
        config[name], before = value, config[name]
        message = (
            f"other settings: {name} is {before} there and {value} here. Delete .*{state.name}"
        )
        with pytest.raises(ValueError, match=message):
            specify.run(config)
        config[name] = before
    config.specification.kernel.gamma = "0.2"
    with pytest.raises(ValueError, match=r"kernel is .*'0\.1'.* there and .*'0\.2'.* here"):
        specify.run(config)
    config.specification.kernel.gamma = "0.1"
    os.utime(rows_file, (1, 1))
    with pytest.raises(ValueError, match=r"data is .* there and .*'modified': 1000000000.* here"):
        specify.run(config)
    assert state.read_bytes() == kept


def test_a_damaged_state_is_refused(stopped):
    state, config = stopped
    sound = state.read_bytes()
    for place in (20, len(sound) // 2, len(sound) - 1):
        state.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(ValueError, match=r"stream.safetensors is damaged\. Delete"):
            specify.run(config)
    state.write_bytes(sound[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        specify.run(config)


def test_a_dock_gives_kernel_and_encoder(tmp_path, cheap):
    config = small(tmp_path, write(tmp_path, "txt"), dock=str(tmp_path / "dock"))
    space = space_of(open_encoder(config.specification), config.specification)
    space["max_tokens"], space["kernel"] = 48, to_dict(Gaussian(0.7))
    store.create_dock(config.dock, space)
    specify.run(config)
    spec, header = made(tmp_path)
    assert header.space == space
    rows = stand_in(None, [" ".join(text.split()) for text in TEXTS])
    exact = oracle.squared_mmd(Gaussian(0.7), from_rows(rows.astype(np.float64)), spec)
    assert_allclose(header.about["residual"], exact, rtol=1e-3)
    store.add(config.dock, store.Learnware("mine", {}, spec, header))


def test_half_as_many_points_as_texts_and_a_median_bandwidth(tmp_path, cheap):
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:9]))
    config = small(tmp_path, tmp_path / "few.txt")
    config.specification.kernel.gamma = "median"
    assert specify.run(config)["points"] == 4
    rows = stand_in(None, [" ".join(text.split()) for text in TEXTS[:9]]).astype(np.float64)
    apart = ((rows[:, None] - rows) ** 2).sum(-1)[np.triu_indices(9, 1)]
    gamma = made(tmp_path)[1].space["kernel"]["gamma"]
    assert_allclose(gamma, 1 / np.median(apart), rtol=1e-6)


def test_data_sets_from_a_mirror_and_as_a_stream(tmp_path, cheap, monkeypatch):
    import datasets

    rows = [{"text": text} for text in TEXTS]
    home = tmp_path / "mirror" / "some" / "questions"
    home.mkdir(parents=True)
    monkeypatch.setenv("LEARNWARE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(specify, "open_encoder", lambda settings: None)
    space = {"max_tokens": 32, "dtype": "float32", "dimension": WIDTH}
    monkeypatch.setattr(specify, "space_of", lambda encoder, settings: space)
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    assert specify.run(small(tmp_path, "some/questions"))["n"] == 60
    assert specify.run(small(tmp_path, "some/questions:test"))["n"] == 20
    asked = []

    def load_dataset(*names, split, streaming):
        asked.append((*names, split, streaming))
        parts = {"train": iter(rows[:40]), "test": iter(rows[40:])}
        return parts[split] if split else parts

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert specify.run(small(tmp_path, "other/questions/en"))["n"] == 60
    assert specify.run(small(tmp_path, "other/questions:test"))["n"] == 20
    assert asked == [
        ("other/questions", "en", None, True),
        ("other/questions", "test", True),
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match=r"'other/questions' is neither .* said: ZeroDivisionError"):
        specify.run(small(tmp_path, "other/questions"))


ON_EIGHT_DEVICES = """
import sys
import jax
sys.path.insert(0, "tests")
import test_specify as t
from experiments import specify
from pathlib import Path
assert jax.local_device_count() == 8
meshes, embed = [], specify.embed
def watched(*arguments, mesh, **options):
    meshes.append(mesh.shape["data"])
    return embed(*arguments, mesh=mesh, **options)
specify.embed = watched
specify.run(t.small(Path(sys.argv[1]), sys.argv[2], piece=100))
assert meshes == [8]
"""


def test_all_devices_embed(tmp_path):
    file = write(tmp_path, "txt")
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path), str(file)],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    many = made(tmp_path)
    specify.run(small(tmp_path, file, piece=100))
    assert_allclose(many[0].z, made(tmp_path)[0].z, atol=1e-6)


def bad_file(folder, name, content):
    file = folder / name
    if isinstance(content, np.ndarray):
        np.save(file, content)
    else:
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one text\n", r"holds 1 text\(s\) and no two that differ"),
        ("a.txt", b"same\nsame\n same \n", r"holds 3 text\(s\) and no two that differ"),
        ("a.txt", b" \n\n", "holds no text: every line or cell is blank"),
        ("a.txt", b"", "holds no text"),
        ("a.csv", b"", "holds no text"),
        ("a.txt", b"x\0y", "a.txt is a binary file; want text in UTF-8"),
        ("a.txt", b"caf\xe9\nb\n", "a.txt is not UTF-8 .*iconv"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv is not UTF-8 .*iconv"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", "a.csv is no valid table"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "a.jsonl line 3 is no valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2 is a str; want all objects, or all strings"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is a list; want all objects"),
        ("a.jsonl", b'{"text": 3}\n', "rows 1 to 1 of .*a.jsonl, .*has no column of texts"),
        ("a.npy", np.ones((3, 5), np.float32), "has rows of dimension 5, the encoder 384"),
        ("a.npy", np.ones(3), r"a.npy holds float64 of shape \(3,\)"),
        ("a.npy", np.ones((3, WIDTH), int), "a.npy holds int64 of shape"),
        ("a.npy", np.full((3, WIDTH), np.nan), "3 of 3 rows hold NaN"),
        ("a.npy", b"nothing", "a.npy is no npy file that can be mapped"),
    ],
)  # fmt: skip
def test_bad_data(tmp_path, cheap, name, content, message):
    with pytest.raises(ValueError, match=message):
        specify.run(small(tmp_path, bad_file(tmp_path, name, content)))
    assert not (tmp_path / "work" / "rkme.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": ""}, ValueError, "nothing to specify; set --config.data"),
        ({"data": "none.txt"}, FileNotFoundError, "specify: there is no file none.txt"),
        ({"data": "tests"}, ValueError, "tests is a folder"),
        ({"data": "fiqua"}, ValueError, "'fiqua' is no file and no task"),
        ({"piece": 0}, ValueError, "got piece=0, anchors=8 and points=16; want at least 1"),
        ({"dock": "nowhere"}, FileNotFoundError, "no dock at nowhere"),
    ],
)
def test_bad_settings(tmp_path, cheap, monkeypatch, changes, error, message):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(error, match=message):
        specify.run(small(tmp_path, **{"data": write(tmp_path, "txt")} | changes))


def test_the_smoke_size_runs(tmp_path):
    config = specify_config.get_config("smoke").lock()
    config.workdir = str(tmp_path / "work")
    output = specify.run(config)
    assert output["n"] > 600 and output["points"] == 16
    assert 0 < output["residual"] < 2e-3
