"""Look after a dock: list its learnwares, check, index, remove, exchange and sign them.

The index is what a search of very many learnwares reads. It is made from the dock, so it can be
deleted (DOCK/index) and built again.

Zips are those of the PyPI package `learnware`. What comes from one has the space
"learnware:TYPE", so it goes into a dock of such, which is made if there is none; what was exported
here goes back into a dock of its own space. Nothing of a zip is executed.

A signature says who vouches for a learnware; --config.trust=KEYS of experiments.select and
experiments.search, a file of public keys (lines "ssh-ed25519 AAAA... name"), leaves out all others.

Examples:
  python -m experiments.dock --dock=docks/quickstart
  python -m experiments.dock --dock=docks/quickstart --check
  python -m experiments.dock --dock=docks/quickstart --index
  python -m experiments.dock --dock=docks/quickstart --remove=my-model
  python -m experiments.dock --dock=docks/others --import_zip=00000662.zip --id=their-model
  python -m experiments.dock --dock=docks/quickstart --export_zip=mine.zip --id=arithmetic
  python -m experiments.dock --new_key=my_key
  python -m experiments.dock --dock=docks/mine --sign=my_key
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging

from experiments import command
from learnware_jax.dock import index, interop, signature, store
from learnware_jax.specification.header import printable

DOCK = flags.DEFINE_string("dock", "docks/quickstart", "The folder of the dock.")
CHECK = flags.DEFINE_bool(
    "check", False, "Read every file and row of the index, and name what is unsound."
)
INDEX = flags.DEFINE_bool("index", False, "Build the index, or bring it up to date.")
REMOVE = flags.DEFINE_string("remove", "", "The id of a learnware to remove.")
IMPORT = flags.DEFINE_string("import_zip", "", "A zip to add to the dock, which is made if absent.")
EXPORT = flags.DEFINE_string("export_zip", "", "The zip to write the learnware --id to.")
NEW_KEY = flags.DEFINE_string("new_key", "", "A file to write a new private key to.")
SIGN = flags.DEFINE_string("sign", "", "A private key (PEM or OpenSSH) to sign learnwares with.")
ID = flags.DEFINE_string(
    "id", "", "The learnware to export, import (default: as the file) or sign (default: all)."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
ACTIONS = (CHECK, INDEX, REMOVE, IMPORT, EXPORT, NEW_KEY, SIGN)


def has_index(dock: str) -> bool:
    """Whether the dock has an index, sound or not."""
    return Path(dock, "index", "index.json").exists()


def describe_index(dock: str) -> str:
    """How large the dock's index is, and whether the dock has changed since."""
    opened = index.open_index(dock)
    rows, alive = len(opened.alive), int(opened.alive.sum())
    size = sum(file.stat().st_size for file in Path(dock, "index").iterdir())
    state = "behind the dock: update it with --index" if index.is_behind(dock) else "up to date"
    return f"Index: {rows} rows, {rows - alive} dead, {size:,} bytes, {state}."


def make_key(file: str) -> str:
    """Write a new private key, for its owner's eyes alone; the public key."""
    key = signature.new_key()
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise FileExistsError(
            f"--new_key: there is a file {file} already, perhaps a key; name another."
        ) from error
    with open(descriptor, "wb") as stream:
        stream.write(key)
    return signature.public_text(key)


def sign(dock: str, id: str, file: str) -> list[store.Problem]:
    """Sign a learnware, or all that are sound; the others."""
    key = store.read_bytes(Path(file), signature.MAX_KEY_BYTES, links=True, where="--sign")
    public = signature.public_text(key, where=f"--sign: {file}")
    if id:
        signature.sign(dock, id, key)
        print(f"signed {id} with {public}")
        return []
    ids, problems = store.list_ids(dock), []
    for each in ids:
        try:
            signature.sign(dock, each, key)
        except ValueError as error:
            problems.append(store.Problem(each, str(error)))
    print(f"signed {len(ids) - len(problems)} learnwares of {len(ids)} with {public}")
    return problems


def describe(learnware: store.Learnware) -> str:
    """A line of what a learnware says of itself; whatever a stranger wrote is safe to show."""
    card = learnware.card
    evaluation = card.get("evaluation")
    score = evaluation.get("accuracy") if isinstance(evaluation, dict) else None
    said = [
        f"{learnware.id:28} {printable(card.get('domain', '')):18}",
        f"n={learnware.header.about.get('n', '?'):<6}",
        *(["model"] if "adapter" in card else []),
        *([f"{score:.0%} right "] if isinstance(score, float) else []),
        printable(str(card.get("description", ""))),
    ]
    return " ".join(said)


def show(problems: list[store.Problem]) -> None:
    """A line a problem; a folder may have any name."""
    for problem in problems:
        print(f"{printable(problem.id)}: {problem.reason}")


def main(argv: list[str]) -> None:
    """Exit status: 0, 1 where a check finds something, 2 for bad input."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag.")
    logging.set_verbosity(logging.WARNING)  # JAX tells which devices it has not found
    actions = [flag for flag in ACTIONS if flag.value]
    if len(actions) > 1:
        raise app.UsageError("one at a time: " + ", ".join(f"--{flag.name}" for flag in actions))
    if EXPORT.value and not ID.value:
        raise app.UsageError("--export_zip wants the --id of the learnware.")
    if ID.value and not (IMPORT.value or EXPORT.value or SIGN.value):
        raise app.UsageError("--id goes with --import_zip, --export_zip or --sign.")
    try:
        if REMOVE.value:
            index.remove(DOCK.value, REMOVE.value)
            print(f"removed {REMOVE.value}")
        elif IMPORT.value:
            id = ID.value or Path(IMPORT.value).stem
            interop.import_zip(DOCK.value, IMPORT.value, id)
            print(f"added {id} to {DOCK.value}")
        elif EXPORT.value:
            interop.export_zip(DOCK.value, ID.value, EXPORT.value)
            print(f"wrote {EXPORT.value}")
        elif NEW_KEY.value:
            print(make_key(NEW_KEY.value))
        elif SIGN.value:
            problems = sign(DOCK.value, ID.value, SIGN.value)
            show(problems)
            sys.exit(1 if problems else 0)
        elif INDEX.value:
            from experiments.common import update_index  # the language models come with it

            update_index(DOCK.value)
            print(describe_index(DOCK.value))
        elif CHECK.value:
            problems = store.check(DOCK.value)
            show(problems)
            print(f"{len(store.list_ids(DOCK.value))} learnwares, {len(problems)} unsound.")
            if has_index(DOCK.value):
                differing = index.check(DOCK.value)
                show(differing)
                print(f"{describe_index(DOCK.value)} {len(differing)} rows or learnwares differ.")
                problems += differing
            sys.exit(1 if problems else 0)
        else:
            for learnware in store.load(DOCK.value):
                print(describe(learnware))
            print(describe_index(DOCK.value) if has_index(DOCK.value) else "No index.")
    except (ValueError, OSError) as error:
        sys.exit(command.explain(error, debug=DEBUG.value))


def help_text() -> str:
    """What --help shows."""
    lines = [
        f"  --{flag.name:12} {flags.FLAGS[flag.name].help}" for flag in (DOCK, ID, *ACTIONS, DEBUG)
    ]
    status = (
        "Exit status: 0; 1 where --check or --sign finds what is unsound, and for a failure, which "
        "is a\nfault of the program; 2 for what you can mend; 130 after an interrupt."
    )
    return "\n".join([__doc__, *lines, "", status])


def run(arguments: list[str]) -> int:
    """The command with these arguments; its exit status, unless that is SystemExit's."""
    if any(argument in command.HELP for argument in arguments):
        print(help_text())
    else:
        main(flags.FLAGS(["dock", *arguments]))
    return 0


if __name__ == "__main__":
    sys.exit(command.guarded(lambda: run(sys.argv[1:]), debug=command.wants_debug(sys.argv)))
