"""Every command: help, settings, dry runs, errors and exit codes."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import build, command, common
from experiments import dock as dock_command

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = sorted(
    path.stem
    for path in (REPOSITORY / "experiments").glob("*.py")
    if "\n    launch(" in path.read_text()
)
SIZES = [
    (name, size)
    for name in PROGRAMS
    for size in command.about_sizes(command._docstring(REPOSITORY / "configs" / f"{name}.py"))
]
SCORES = "task,base,a-1,a-2,b-1\nx,1,2,3,4\ny,2,3,1,5\nz,4,4,2,1\n"
PICKS = "task,pick\nx,a\ny,b\nz,b\n"
# What a program needs besides its configuration.
INPUT = {
    "replay": ["--config.scores=scores.csv", "--config.picks=picks.csv"],
    "report": ["--config.study=experiments/results/study.json"],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder in which commands find what the repository has; nothing is in the cache."""
    for name in ("configs", "docks", "experiments"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "scores.csv").write_text(SCORES)
    (tmp_path / "picks.csv").write_text(PICKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEARNWARE_CACHE", str(tmp_path / "cache"))
    for change in ("keep_compiled", "log_plainly"):  # of the whole process
        monkeypatch.setattr(common, change, lambda: None)
    return tmp_path


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def smoke(name: str) -> str:
    sizes = [size for program, size in SIZES if program == name]
    return f"configs/{name}.py" + (":smoke" if "smoke" in sizes else "")


def parses(line: str) -> None:
    """Fails unless the arguments `NAME ARGUMENTS` of `python -m experiments.` can be read."""
    name, *arguments = shlex.split(re.sub(r" \[.*?\]", "", line))
    if name == "dock":
        for argument in arguments:
            flag = argument.partition("=")[0].removeprefix("--")
            assert flag in [each.name for each in (dock_command.DOCK, *dock_command.ACTIONS)]
    else:
        command.read(name, arguments)


def test_every_configuration_has_a_program():
    files = (REPOSITORY / "configs").glob("[!_]*.py")
    assert sorted(file.stem for file in files) == PROGRAMS
    assert len(PROGRAMS) >= 22


def test_help_is_answered_before_anything_heavy_is_imported():
    code = f"""
import contextlib, io, runpy, sys
for name in {PROGRAMS!r}:
    sys.argv, text = ["-m", "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_module(f"experiments.{{name}}", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        assert stopped.code == 0, (name, stopped.code)
    assert f"python -m experiments.{{name}} --config=configs/{{name}}.py" in text.getvalue(), name
    assert not {{"jax", "flax", "scipy", "numpy", "pandas"}} & sys.modules.keys(), name
print("all")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.stdout, done.stderr) == ("all\n", "")


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_of_help_can_be_run(name, here):
    text = command.help_of(name, [f"--config={smoke(name)}"])
    told = text[: text.index("\nSettings, --config.NAME=VALUE")]
    lines = re.sub(r" \\\n\s+", " ", told).split("\n")
    examples = [line.partition("python -m experiments.")[2] for line in lines]
    examples = [re.split(r" {2,}", example)[0] for example in examples if example]
    assert len(examples) >= 2 and any(example.startswith(name) for example in examples)
    for example in examples:
        parses(example)
    assert "Exit status: 0; 1 for a failure" in text and "--config.dry_run=true" in text
    for key in command.load(*command.chosen(name, [f"--config={smoke(name)}"])):
        assert re.search(rf"^  {key} ", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_size_exists_and_has_a_text(name, size, here):
    file = Path(f"configs/{name}.py")
    assert "dry_run" not in command.load(file, size)  # results of old runs are found by settings
    assert re.search(r"\d+ (s|min|h)\b|[Nn]ever run", command.about(file, size))


def test_the_text_of_a_size_is_what_stands_behind_or_below_its_command():
    doc = """About.

python -m experiments.x --config=configs/x.py         2 h on
    2 cores
python -m experiments.x --config=configs/x.py:a --config.b=1 \\
    --config.c=2
python -m experiments.x --config=configs/x.py:b
    Both: 3 min.
python -m experiments.x --config=configs/x.py:c   4 s

Not this: 5 s.
"""
    assert command.about_sizes(doc) == {
        "": "2 h on 2 cores",
        "a": "Both: 3 min.",
        "b": "Both: 3 min.",
        "c": "4 s",
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_misspelt_setting_suggests_the_right_one(name, here):
    known = dict(command.leaves(command.load(*command.chosen(name, []))))
    for key in list(known)[:: 1 + len(known) // 100]:
        said = command._wrong_key(f"{key}q", known)
        assert said.startswith(f"--config.{key}q: there is no such setting. Did you mean --config.")
        assert f"--config.{key}?" in said
    with pytest.raises(ValueError, match=rf"Did you mean --config\.{re.escape(key)}\?"):
        command.read(name, [f"--config.{key}q=1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.data=x"],
            "--config.data: there is no such setting. Did you mean --config.user",
        ),
        (["--config.usr.data=x"], "Did you mean --config.user.data?"),
        (["--config.seed=abc"], "--config.seed: got 'abc'; want a whole number."),
        (["--config.top_k=1.5"], "--config.top_k: got '1.5'; want a whole number."),
        (["--config.level=high"], "--config.level: got 'high'; want a number."),
        (["--config.users.same=maybe"], "--config.users.same: got 'maybe'; want true or false."),
        (["--config.user=3"], "for a setting in it: column, data, limit."),
        (["--confg=configs/select.py"], "--confg is no flag. Did you mean --config?"),
        (["--debugg"], "--debugg is no flag. Did you mean --debug?"),
        (["--confg.seed=3"], "--confg.seed is no flag. Did you mean --config.seed?"),
        (["--coordinator=a:1"], "--coordinator is no flag."),
        (["select"], "'select' is no flag"),
        (
            ["--config=configs/slect.py"],
            "no file configs/slect.py. Did you mean configs/select.py?",
        ),
        (["--config="], "there is no file ."),
        (["--config=configs/select.py:smok"], "got size 'smok'; want one of quickstart, "),
        (["--config=configs/select.py:smok"], "Did you mean :smoke?"),
        (["--config", "configs/select.py:smok", "--config.seed=1"], "Did you mean :smoke?"),
        (["--config=configs/report.py:smoke"], "configs/report.py has no sizes; leave :smoke out."),
        (["--config.workdir=LICENSE"], "--config.workdir=LICENSE: "),
    ],
)
def test_a_wrong_command_line_is_explained_in_a_paragraph(here, capsys, arguments, message):
    assert command.main("select", [*arguments, "--config.dry_run=true"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
    assert said.err.startswith("error: ") and "Traceback" not in said.err
    assert "\n\n" not in said.err and said.err.count("\n") == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py", "def get_config(:", "mine.py cannot be run: SyntaxError: "),
        ("mine.py", "raise KeyError('x')", "mine.py cannot be run: KeyError: 'x'"),
        ("mine.py", "config = 1", "mine.py has no get_config(size)."),
        ("mine.json", "{}", "mine.json is no Python file; want one with get_config(size)."),
    ],
)
def test_a_file_that_is_no_configuration_is_bad_input(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert command.main("select", [f"--config={tmp_path / name}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--debug", "-debug", "--debug=true", "--debug=1"])
def test_a_traceback_is_shown_where_it_is_asked_for(here, capsys, flag):
    assert command.main("select", [flag, "--config.usr.data=x"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert command.main("select", ["--debug=false", "--config.usr.data=x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_settings_are_read_as_they_are_given(here, tmp_path):
    config, values = command.read(
        "search",
        [
            *("--config", "configs/search.py:smoke", "--config.top_k", "7", "--debug"),
            *("""--config.users=("a", 'b=c')""", "--config.specification.points=3"),
            *("--coordinator=a:1", "--num_processes=2", "--process_id=0"),
        ],
        several_hosts=True,
    )
    assert (config.top_k, config.users, config.specification.points) == (7, ("a", "b=c"), 3)
    assert (values.debug, values.coordinator, values.process_id) == (True, "a:1", 0)
    assert config.limit == 24 and config.is_locked and config.dry_run is False
    own = tmp_path / "mine.py"
    own.write_text(
        '"""Mine.\n\npython -m experiments.geometry --config=FILE:b    9 min"""\n'
        "from configs import geometry\n\n\n"
        "def get_config(size='b'):\n    return geometry.get_config('smoke')\n"
    )
    assert command.read("geometry", [f"--config={own}:b", "--noconfig.dry_run"])[0].map == "mds"
    assert command.about(own, "") == "9 min"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(name, home, capsys):
    def listing():
        every = [*home.rglob("*"), *(REPOSITORY / "docks").rglob("*")]
        return {(path, path.lstat().st_mtime_ns) for path in every}

    (home / "work").mkdir()
    (home / "work" / "old.txt").write_text("of another run")
    arguments = [f"--config={smoke(name)}", *INPUT.get(name, []), "--config.dry_run=true"]
    if name != "build":
        arguments.append("--config.workdir=work")
    before = listing()
    assert command.main(name, arguments) == 0
    assert listing() == before
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.split("\n")
    told = command.about(*command.chosen(name, arguments))
    assert " ".join(said.out.split()).startswith(f"about {told} ")
    assert re.search(r"\d+ (s|min)\b|min\.", told) and lines[-2:] == [command.DRY, ""]
    assert name == "build" or "work: there already: old.txt (the newest of " in said.out


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_no_size_is_too_much_for_a_dry_run(name, size, home, capsys):
    file = f"configs/{name}.py{':' if size else ''}{size}"
    status = command.main(name, [f"--config={file}", "--config.dry_run=true"])
    said = capsys.readouterr()
    assert status == (2 if said.err else 0) and (said.err == "") != (said.out == "")
    assert set(home.iterdir()) == {
        home / made for made in ("configs", "docks", "experiments", "scores.csv", "picks.csv")
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_to_try_next_can_be_run(name, home):
    config, _ = command.read(name, [f"--config={smoke(name)}", *INPUT.get(name, [])])
    parses(importlib.import_module(f"experiments.{name}").preview(config)["next"])


def test_proposed_commands_are_quoted(home):
    shutil.copytree(home / "docks/quickstart", home / "my dock's")
    own = ["--config.user.data=picks.csv", "--config.user.column=task"]
    config, _ = command.read("select", [*own, "--config.dock=my dock's"])
    told = importlib.import_module("experiments.select").preview(config)["next"]
    assert "--config.dock=my dock's" in shlex.split(told)


def test_a_dry_run_opens_no_model(home, monkeypatch):
    """A base model may have to be downloaded; only what lies in the folders is checked."""

    def opened(settings):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(build, "open_model", opened)
    folder = home / "adapters" / "sums"
    shutil.copytree(home / "docks/quickstart/learnwares/arithmetic/adapter", folder)
    (folder / "texts.txt").write_text("17 + 25\n3 + 4\n")
    arguments = ["--config=configs/build.py:own", f"--config.adapters={home / 'adapters'}"]
    config, _ = command.read("build", [*arguments, f"--config.dock={home / 'new'}"])
    told = build.preview(config)
    assert told["dock"] == f"{home / 'new'}: 0 learnwares are there; to be made: 1 (sums)"
    assert told["adapters"].startswith("1 (sums), checked against SmolLM2-135M-Instruct when")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="sums: adapter: "):
        build.preview(config)


def test_a_run_goes_on_from_what_is_there(home):
    """Lines count what has been made already."""
    for name in ("recurrences", "arithmetic"):
        config, _ = command.read("finetune", ["--config=configs/finetune.py:smoke"])
        (home / config.workdir / name).mkdir(parents=True)
        (home / config.workdir / name / "summary.json").write_text("{}")
        count = len([*(home / config.workdir).iterdir()])
        preview = importlib.import_module("experiments.finetune").preview(config)
        assert f"; {count} are there, " in preview["adapters"]
    config, _ = command.read("faults", ["--config=configs/faults.py:smoke"])
    (home / config.workdir).mkdir()
    faults = importlib.import_module("experiments.faults")
    plan = {"kills": config.kills.to_dict(), "seed": config.seed}
    for old, told in (
        (plan, "; 3 are done"),
        (plan | {"seed": 9}, "2 of specify"),
        (None, "ecify"),
    ):
        content = json.dumps({"plan": old, "rows": [1, 2, 3], "runs": {}, "seconds": 1.0})
        (home / config.workdir / "results.json").write_text(content if old else '{"users": []}')
        assert faults.preview(config)["kills"].endswith(told)


def test_somebodys_data_is_counted_or_refused(home):
    (home / "mine.csv").write_text("text\nfirst line\nsecond line\nthird line\n")
    build = ["--config=configs/build.py:own", "--config.learnware.id=m"]
    for name, arguments, word, wanted in (
        ("select", ["--config.user.data=mine.csv"], "users", "mine.csv: 3 texts"),
        ("specify", ["--config.data=mine.csv"], "data", "mine.csv: about 4 rows"),
        ("select", ["--config.user.data=a/b"], "users", "a/b, a task or data set, fetched"),
        ("build", [*build, "--config.learnware.data=mine.csv"], "dock", "to be made: 1 (m)"),
    ):
        config, _ = command.read(name, arguments)
        assert wanted in importlib.import_module(f"experiments.{name}").preview(config)[word]
    for name, arguments, wanted in (
        ("select", ["--config.user.data=none.csv"], "there is no file none.csv"),
        ("select", ["--config.user.data=mine.csv", "--config.user.column=x"], "x"),
        ("select", ["--config.dock=none"], "there is no dock at none"),
        ("specify", ["--config.dock=none", "--config.data=mine.csv"], "no dock at none"),
        ("search", ["--config.users=('none.csv',)"], "none.csv"),
        ("build", [*build, "--config.learnware.data=none.csv"], "none.csv"),
        ("evaluate", ["--config.tasks=('fiqa2',)"], "'fiqa2' is no task"),
        ("finetune", ["--config.data.mine.source=none.csv"], "none.csv"),
    ):
        config, _ = command.read(name, arguments)
        with pytest.raises((ValueError, OSError), match=re.escape(wanted)):
            importlib.import_module(f"experiments.{name}").preview(config)


# ---- a program that does as it is told


@pytest.fixture
def program(home, monkeypatch):
    """What a program NAME with a configuration does in place of its work."""

    def make(work):
        made = types.ModuleType("experiments.tried")
        made.run, made.preview = work, lambda config: {"data": "none", "next": "dock --check"}
        monkeypatch.setitem(sys.modules, "experiments.tried", made)
        (home / "own.py").write_text(
            '"""Own.\n\npython -m experiments.tried --config=own.py    7 s"""\n'
            "from ml_collections import ConfigDict\n\n\n"
            "def get_config():\n    return ConfigDict(dict(workdir='out', count=3))\n"
        )
        return lambda *more: command.main("tried", ["--config=own.py", *more])

    return make


def refuse(config):
    raise ValueError("tried: got 3; want 4.")


def refuse_file(config):
    raise FileNotFoundError("tried: there is no file x.")


def full(config):
    raise OSError(28, os.strerror(28), "out/x")


def wrong_product(config):
    return np.ones(2) @ np.ones(3)  # a ValueError, but none of ours


def wrong_type(config):
    return len(3)


def wrong_key(config):
    return {}["x"]


def wrong_setting(config):
    return config.cuont


def interrupt(config):
    raise KeyboardInterrupt


# The tests' own functions stand for the programs'.
@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (refuse, 2, "error: tried: got 3; want 4.\n(--debug shows where.)\n"),
        (refuse_file, 2, "error: tried: there is no file x.\n(--debug shows where.)\n"),
        (full, 2, "Free space, or name another place\n(--debug shows where.)\n"),
        (wrong_product, 1, "failure: ValueError: matmul: "),
        (
            wrong_type,
            1,
            "failure: TypeError: object of type 'int' has no len()\nThis is a fault of",
        ),
        (wrong_key, 1, "failure: KeyError: 'x'\nThis is a fault of the program"),
        (wrong_setting, 1, "failure: AttributeError: "),
        (interrupt, 130, "interrupted: the same command does what is not done yet.\n"),
    ],
)
def test_errors_are_told_apart(program, monkeypatch, capsys, work, status, said):
    monkeypatch.setattr(command, "OURS", (*command.OURS, __name__.split(".")[0]))
    call = program(work)
    assert call() == status
    err = capsys.readouterr().err
    head, _, rest = err.partition("\nwrites    out: nothing is there yet\n")
    assert head == "about     7 s\ndata      none" and said in rest and "Traceback" not in err
    assert "\n\n" not in rest and rest.count("\n") <= 2
    assert call("--debug") == status
    assert f"in {work.__name__}\n" in capsys.readouterr().err


def test_a_run_ends_with_what_to_try_next(program, capsys):
    seen = []
    assert program(lambda config: seen.append(config.to_dict()))("--config.count=5") == 0
    assert seen == [{"workdir": "out", "count": 5}]
    said = capsys.readouterr()
    assert said.out == "next      python -m experiments.dock --check\n"
    assert said.err == "about     7 s\ndata      none\nwrites    out: nothing is there yet\n"


def test_progress_is_lines_in_a_pipe_and_a_bar_on_a_terminal(monkeypatch, capsys):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", -1)
    with common.bar("rows", 2000) as advance:
        advance(5)
        advance(1200)
    assert capsys.readouterr().err == "rows: 5 of 2,000\nrows: 1,205 of 2,000\n"
    with common.bar("rows", 12) as advance:
        advance(5)
        monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", 60)
        advance(6)
        advance(1)
    assert capsys.readouterr().err == "rows: 5 of 12\nrows: 12 of 12\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with common.bar("rows", 2000) as advance:
        advance(5)
    assert "\x1b[" in sys.stderr.getvalue() and "5 of" not in sys.stderr.getvalue()


# ---- real commands


def real(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )


def test_a_real_run_is_plain_in_a_pipe(tmp_path):
    done = real(
        "experiments.geometry",
        "--config=configs/geometry.py:smoke",
        "--config.dock=docks/quickstart",
        f"--config.workdir={tmp_path / 'work'}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("about     10 s\ndock      docks/quickstart: 14 learnwares")
    *_, results, following, end = done.stdout.split("\n")
    assert end == "" and results == str(tmp_path / "work" / "results.json")
    assert following.startswith("next      python -m experiments.")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x9b]", done.stdout + done.stderr)


def test_real_exit_codes():
    done = real("experiments.select", "--config.usr.data=x")
    assert done.returncode == 2 and "Did you mean --config.user.data?" in done.stderr
    assert real("experiments.dock", "--chek").returncode == 2
    helped = real("experiments.dock", "--help")
    assert helped.returncode == 0
    for flag in (dock_command.DOCK, *dock_command.ACTIONS, dock_command.DEBUG):
        assert re.search(rf"^  --{flag.name} ", helped.stdout, re.MULTILINE)
    assert "python -m experiments.dock --dock=docks/quickstart --check" in helped.stdout
