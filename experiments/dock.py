"""Look after a dock: list its learnwares, check every file, index it, remove one, exchange one.

The index is what a search of very many learnwares reads. It is made from the dock, so it can be
deleted (DOCK/index) and built again.

Zips are those of the PyPI package `learnware`. What comes from one has the space
"learnware:TYPE", so it goes into a dock of such, which is made if there is none; what was exported
here goes back into a dock of its own space. Nothing of a zip is executed.

Examples:
  python -m experiments.dock --dock=docks/quickstart
  python -m experiments.dock --dock=docks/quickstart --check
  python -m experiments.dock --dock=docks/quickstart --index
  python -m experiments.dock --dock=docks/quickstart --remove=my-model
  python -m experiments.dock --dock=docks/others --import_zip=00000662.zip --id=their-model
  python -m experiments.dock --dock=docks/quickstart --export_zip=mine.zip --id=arithmetic
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from experiments.common import BAD_INPUT, update_index
from learnware_jax.dock import index, interop, store

DOCK = flags.DEFINE_string("dock", "docks/quickstart", "The folder of the dock.")
CHECK = flags.DEFINE_bool(
    "check", False, "Read every file and row of the index, and name what is unsound."
)
INDEX = flags.DEFINE_bool("index", False, "Build the index, or bring it up to date.")
REMOVE = flags.DEFINE_string("remove", "", "The id of a learnware to remove.")
IMPORT = flags.DEFINE_string("import_zip", "", "A zip to add to the dock, which is made if absent.")
EXPORT = flags.DEFINE_string("export_zip", "", "The zip to write the learnware --id to.")
ID = flags.DEFINE_string("id", "", "The learnware to export, or to import (default: as the file).")


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


def main(argv: list[str]) -> None:
    """Exit status: 0, 1 where a check finds something, 2 for bad input."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag.")
    logging.set_verbosity(logging.WARNING)  # JAX tells which devices it has not found
    actions = [flag for flag in (CHECK, INDEX, REMOVE, IMPORT, EXPORT) if flag.value]
    if len(actions) > 1:
        raise app.UsageError("one at a time: " + ", ".join(f"--{flag.name}" for flag in actions))
    if EXPORT.value and not ID.value:
        raise app.UsageError("--export_zip wants the --id of the learnware.")
    if ID.value and not (IMPORT.value or EXPORT.value):
        raise app.UsageError("--id goes with --import_zip or --export_zip.")
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
        elif INDEX.value:
            update_index(DOCK.value)
            print(describe_index(DOCK.value))
        elif CHECK.value:
            problems = store.check(DOCK.value)
            for problem in problems:
                print(f"{problem.id}: {problem.reason}")
            print(f"{len(store.list_ids(DOCK.value))} learnwares, {len(problems)} unsound.")
            if has_index(DOCK.value):
                differing = index.check(DOCK.value)
                for problem in differing:
                    print(f"{problem.id}: {problem.reason}")
                print(f"{describe_index(DOCK.value)} {len(differing)} rows or learnwares differ.")
                problems += differing
            sys.exit(1 if problems else 0)
        else:
            for learnware in store.load(DOCK.value):
                card, about = learnware.card, learnware.header.about
                print(f"{learnware.id:28} {card.get('domain', ''):18} n={about['n']:<6} ", end="")
                score = card.get("evaluation", {}).get("accuracy")
                print("model " if "adapter" in card else "", end="")
                print("" if score is None else f"{score:.0%} right  ", end="")
                print(card.get("description", ""))
            print(describe_index(DOCK.value) if has_index(DOCK.value) else "No index.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    app.run(main)
