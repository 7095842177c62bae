"""The command line of an experiment: help, settings, what a run will do, one-paragraph errors.

Nothing heavy is imported here, so that help and mistakes are answered before JAX starts.
"""

import ast
import difflib
import dis
import importlib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType, TracebackType

from absl import app, flags
from ml_collections import ConfigDict, config_flags

FAILURE, BAD_INPUT, LOST, INTERRUPTED = 1, 2, 3, 130
STATUS = """\
Exit status: 0; 1 for a failure, which is a fault of the program; 2 for what you can mend, such as a
misspelt setting or a file that is not there; 3 where another process of the run is gone; 130 after
an interrupt."""
COMMON = """\
--config.dry_run=true checks the settings and what can be checked of the input, says what a run
would do and where it would write, and does nothing. --debug shows the traceback of an error."""
DRY = "A dry run: nothing was done."
HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")
OURS = ("learnware_jax", "experiments", "configs", "__main__")


def launch(name: str, *, several_hosts: bool = False) -> None:
    """Be the command `python -m experiments.NAME`.

    A program calls this before it imports anything else; it is imported under its own name once
    there is something to run. It has

        run(config) -> dict              the work
        preview(config) -> dict          what run will do, each part under a word, and under "next"
                                         a command to try then, `NAME ARGUMENTS`; raises for bad
                                         input, as run does before it works

    With `several_hosts`, processes on several hosts may run it together.
    """
    sys.exit(main(name, sys.argv[1:], several_hosts=several_hosts))


def main(name: str, arguments: Sequence[str], *, several_hosts: bool = False) -> int:
    """Run the program NAME with these arguments; the exit status."""
    return guarded(lambda: _main(name, arguments, several_hosts), debug=wants_debug(arguments))


def wants_debug(arguments: Sequence[str]) -> bool:
    """Whether arguments ask for tracebacks; they may be too wrong to be parsed."""
    return any(re.fullmatch(r"--?debug(=(true|t|1))?", each, re.IGNORECASE) for each in arguments)


def _main(name: str, arguments: Sequence[str], several_hosts: bool) -> int:
    if any(argument in HELP for argument in arguments):
        print(help_of(name, arguments))
        return 0
    config, values = read(name, arguments, several_hosts=several_hosts)
    dry_run = config.dry_run
    with config.unlocked():
        del config.dry_run  # of the command, not of the program
    check_workdir(config)
    program = importlib.import_module(f"experiments.{name}")
    common = importlib.import_module("experiments.common")
    common.keep_compiled()
    joined = several_hosts and not dry_run and common.join_hosts(values)
    try:
        what = program.preview(config)
        following = what.pop("next")
        lines = outline(about(*chosen(name, arguments)), what, config)
        if dry_run:
            print("\n".join([*lines, DRY]))
            return 0
        common.say("\n".join(lines))
        common.log_plainly()  # what preview has read is read again, and told once
        program.run(config)
    except BaseException as error:
        if not joined:
            raise
        # A tidy end would wait for the other processes.
        status = explain(error, debug=values.debug, lost=common.lost(error))
        sys.stdout.flush()
        os._exit(status)
    if not joined or common.is_first():
        print(f"{'next':9} python -m experiments.{following}")
    return 0


def guarded(work: Callable[[], int], *, debug: bool) -> int:
    """What `work` returns, or the exit status of the error that it raised, which is explained."""
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        return explain(error, debug=debug)


def explain(error: BaseException, *, debug: bool, lost: str = "") -> int:
    """Say in one paragraph what went wrong; the exit status. `lost` explains a lost process."""
    if debug:
        traceback.print_exception(error)
    status, text = BAD_INPUT, f"error: {error}"
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has seen enough, and nobody reads what is left of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    if lost:
        status, text = LOST, f"error: {lost}"
    elif isinstance(error, KeyboardInterrupt):
        status, text = INTERRUPTED, "interrupted: the same command does what is not done yet."
    elif isinstance(error, OSError) and error.strerror == os.strerror(error.errno or 0):
        # Of the system, and not explained: most often a disk that is full or read-only.
        text += "; what was there before is unchanged. Free space, or name another place"
    elif not (isinstance(error, OSError | flags.Error | app.UsageError) or _raised_here(error)):
        status = FAILURE
        text = (
            f"failure: {type(error).__name__}: {error}\nThis is a fault of the program, not of "
            "your input. The same command with --debug shows the traceback; please send it, with "
            "the command and the versions (pip freeze), to those who maintain the program."
        )
    if status in (BAD_INPUT, LOST) and not debug:
        text += "\n(--debug shows where.)"
    print(text, file=sys.stderr, flush=True)
    return status


def _raised_here(error: BaseException) -> bool:
    """Whether the error is one that our code found and explains: a `raise` in a file of ours.

    Other errors of the same types, such as a ValueError of NumPy, are faults.
    """
    if not isinstance(error, ValueError | TypeError | FloatingPointError | ImportError):
        return False
    last: TracebackType | None = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None or last.tb_lasti < 0:
        return False
    where = last.tb_frame.f_globals.get("__name__", "").split(".")[0]
    operation = last.tb_frame.f_code.co_code[last.tb_lasti]
    return where in OURS and operation == dis.opmap["RAISE_VARARGS"]


# ---- settings


def read(
    name: str, arguments: Sequence[str], *, several_hosts: bool = False
) -> tuple[ConfigDict, flags.FlagValues]:
    """The configuration, locked, with `dry_run`, and the other flags.

    FileNotFoundError for a configuration that is not there; ValueError for a size, setting, value
    or flag that is wrong, with the closest right one.
    """
    config = load(*chosen(name, arguments))
    config.dry_run = False
    values = flags.FlagValues()
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    if several_hosts:
        for flag, define, text in (
            ("coordinator", flags.DEFINE_string, "HOST:PORT of process 0; same for all processes."),
            ("num_processes", flags.DEFINE_integer, "How many processes run together."),
            ("process_id", flags.DEFINE_integer, "Which of them this is, from 0."),
        ):
            define(flag, None, text, flag_values=values)
    rest = _without_file(arguments)
    known = dict(leaves(config))
    for argument in rest:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and (key := re.sub(r"\[.*", "", match[1])) not in known:
            raise ValueError(_wrong_key(key, known))
        flag = re.match(r"--?([^=]+)", argument)
        right = ["config", *values, *(f"no{flag}" for flag in values)]
        if flag and not match and flag[1] not in right:
            candidates = [*right, *(f"config.{key}" for key in known)]
            raise ValueError(f"--{flag[1]} is no flag.{_closest(flag[1], candidates, '--')}")
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[name, *rest])
    try:
        left = values([name, *rest])[1:]
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if not match:
            raise ValueError(str(error)) from error
        wanted = _kind(known[re.sub(r"\[.*", "", match[1])])
        raise ValueError(f"--config.{match[1]}: got {match[2]!r}; want {wanted}.") from error
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if left:
        raise ValueError(f"{left[0]!r} is no flag; settings are --config.NAME=VALUE.")
    return values.config, values


def chosen(name: str, arguments: Sequence[str]) -> tuple[Path, str]:
    """The configuration file and the size that the arguments name, or the default ones."""
    given = f"configs/{name}.py"
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            given = following if match[1] is None else match[1]
    file, _, size = given.partition(":")
    return Path(file), size


def _without_file(arguments: Sequence[str]) -> list[str]:
    """The arguments but --config=FILE."""
    rest, skip = [], False
    for argument in arguments:
        if not skip and not re.match(r"--?config(=|$)", argument):
            rest.append(argument)
        skip = not skip and argument in ("-config", "--config")
    return rest


def load(file: Path, size: str) -> ConfigDict:
    """The configuration of a file for a size, or for its default one where that is ""."""
    if not file.is_file():
        there = [str(path) for path in sorted(Path("configs").glob("[!_]*.py"))]
        raise FileNotFoundError(
            f"--config: there is no file {file}.{_closest(str(file), there)} Run from the folder "
            "that has configs/, or name a file of your own."
        )
    get_config = _module(file).get_config
    if not size:
        return get_config()
    if not inspect.signature(get_config).parameters:
        raise ValueError(f"--config: {file} has no sizes; leave :{size} out.")
    try:
        return get_config(size)
    except ValueError as error:
        raise ValueError(
            f"--config: {error}{_closest(size, list(about_sizes(_docstring(file))), ':')}"
        ) from error


def _module(file: Path) -> ModuleType:
    """A configuration as a module. ValueError if it cannot be one."""
    spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
    if spec is None:
        raise ValueError(f"--config: {file} is no Python file; want one with get_config(size).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of somebody's own file: anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config: {file} cannot be run: {said}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {file} has no get_config(size).")
    return module


def leaves(config: ConfigDict, prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of every setting; sections, which hold others, are among them."""
    found = []
    for key, value in config.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, ConfigDict):
            found += leaves(value, f"{prefix}{key}.")
    return found


def _wrong_key(key: str, known: dict[str, object]) -> str:
    # A right name without the section that it is in comes before a similar one.
    same = [name for name in known if name.endswith(f".{key}")]
    meant = f" Did you mean --config.{min(same, key=len)}?" if same else ""
    return (
        f"--config.{key}: there is no such setting."
        f"{meant or _closest(key, list(known), '--config.')} --help lists them."
    )


def _closest(given: str, right: Sequence[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(given, right, 1, cutoff=0.5)
    return f" Did you mean {prefix}{found[0]}?" if found else ""


def _kind(value: object) -> str:
    if isinstance(value, ConfigDict):
        return f"none for a section, but for a setting in it: {', '.join(value)}"
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}, such as {value!r}")


# ---- what is said before a run


def about_sizes(doc: str) -> dict[str, str]:
    """Size -> what a configuration's docstring says of it: what it does, and how long it takes.

    That is what stands behind, or indented below, `python -m experiments.NAME --config=FILE:SIZE`;
    such lines without any share what the next one has. Without a size, "" is the default one.
    """
    found: dict[str, str] = {}
    command = re.compile(r"python -m \S+ --config=[^\s:]+(?::(\S+))?(?: \S+)*(.*)", re.DOTALL)
    parts = re.split(r"\n(?=\S)|\n\n", re.sub(r" \\\n\s+", " ", doc))
    following = ""
    for match in reversed([match for part in parts if (match := command.match(part))]):
        following = " ".join(match[2].split()) or following
        found[match[1] or ""] = following
    return found


def about(file: Path, size: str) -> str:
    """What the docstring of a configuration says of a size, or of the default one for ""."""
    told = about_sizes(_docstring(file))
    default = _default_size(file)
    said = told.get(default) or told.get("") if size in ("", default) else told.get(size)
    return said or "no time is noted for this size"


def _default_size(file: Path) -> str:
    parameters = inspect.signature(_module(file).get_config).parameters.values()
    return next((each.default for each in parameters), "")


def _docstring(file: Path) -> str:
    """The docstring of a Python file, without running it."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def outline(said: str, what: dict[str, str], config: ConfigDict) -> list[str]:
    """Lines on what a run will do, how long it takes as far as is said, and where it will write."""
    lines = []
    for word, text in {"about": said, **what, **already(config)}.items():
        shown = textwrap.wrap(text, 90, break_long_words=False, break_on_hyphens=False)
        lines += [f"{head:9} {line}" for head, line in zip_longest([word], shown, fillvalue="")]
    return lines


def check_workdir(config: ConfigDict) -> None:
    """OSError if the workdir of a configuration cannot be one."""
    if "workdir" not in config:
        return
    place = Path(config.workdir).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(
            f"--config.workdir={config.workdir}: {place} is no folder that can be written to; name "
            "another."
        )


def already(config: ConfigDict) -> dict[str, str]:
    """Where a run will write, and what is there."""
    if "workdir" not in config:
        return {}
    workdir = Path(config.workdir)
    there = sorted(workdir.iterdir()) if workdir.is_dir() else []
    said = "nothing is there yet"
    if there:
        newest = time.strftime(
            "%Y-%m-%d %H:%M", time.gmtime(max(p.lstat().st_mtime for p in there))
        )
        names = [path.name + "/" * path.is_dir() for path in there]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        said = f"there already: {', '.join(names[:6])}{more} (the newest of {newest} UTC)"
    return {"writes": f"{workdir}: {said}"}


# ---- help


def help_of(name: str, arguments: Sequence[str]) -> str:
    """What --help shows."""
    file, size = chosen(name, arguments)
    config = load(file, size)
    parts = [
        _docstring(Path(__file__).with_name(f"{name}.py")),
        f"Sizes and times ({file}):",
        _docstring(file),
        f"Settings, --config.NAME=VALUE, as they are for {file}{':' if size else ''}{size}:",
        settings_table(config),
        COMMON,
        STATUS,
    ]
    return "\n\n".join(parts)


def settings_table(config: ConfigDict) -> str:
    """Settings with their values, a section a line."""
    lines = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            told = " ".join(
                f".{name}..." if isinstance(each, ConfigDict) else f".{name}={_short(each)}"
                for name, each in value.items()
            )
        else:
            told = _short(value)
        lines += textwrap.wrap(
            told,
            100,
            initial_indent=f"  {key:18} ",
            subsequent_indent=" " * 21,
            max_lines=4,
            placeholder=" ...",
            break_on_hyphens=False,
        ) or [f"  {key}"]
    return "\n".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
