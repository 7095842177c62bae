"""Look after a dock: list its learnwares, check every file, remove one, exchange one.

Zips are those of the PyPI package `learnware`. What comes from one has the space
"learnware:TYPE", so it goes into a dock of such, which is made if there is none; what was exported
here goes back into a dock of its own space. Nothing of a zip is executed.

Examples:
  python -m experiments.dock --dock=docks/quickstart
  python -m experiments.dock --dock=docks/quickstart --check
  python -m experiments.dock --dock=docks/quickstart --remove=my-model
  python -m experiments.dock --dock=docks/others --import_zip=00000662.zip --id=their-model
  python -m experiments.dock --dock=docks/quickstart --export_zip=mine.zip --id=arithmetic
"""

import sys
from pathlib import Path

from absl import app, flags

from experiments.common import BAD_INPUT
from learnware_jax.dock import interop, store

DOCK = flags.DEFINE_string("dock", "docks/quickstart", "The folder of the dock.")
CHECK = flags.DEFINE_bool("check", False, "Read every file, and name the unsound learnwares.")
REMOVE = flags.DEFINE_string("remove", "", "The id of a learnware to remove.")
IMPORT = flags.DEFINE_string("import_zip", "", "A zip to add to the dock, which is made if absent.")
EXPORT = flags.DEFINE_string("export_zip", "", "The zip to write the learnware --id to.")
ID = flags.DEFINE_string("id", "", "The learnware to export, or to import (default: as the file).")


def main(argv: list[str]) -> None:
    """Exit status: 0, 1 where a check finds something, 2 for bad input."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag.")
    actions = [flag for flag in (CHECK, REMOVE, IMPORT, EXPORT) if flag.value]
    if len(actions) > 1:
        raise app.UsageError("one at a time: " + ", ".join(f"--{flag.name}" for flag in actions))
    if EXPORT.value and not ID.value:
        raise app.UsageError("--export_zip wants the --id of the learnware.")
    if ID.value and not (IMPORT.value or EXPORT.value):
        raise app.UsageError("--id goes with --import_zip or --export_zip.")
    try:
        if REMOVE.value:
            store.remove(DOCK.value, REMOVE.value)
            print(f"removed {REMOVE.value}")
        elif IMPORT.value:
            id = ID.value or Path(IMPORT.value).stem
            interop.import_zip(DOCK.value, IMPORT.value, id)
            print(f"added {id} to {DOCK.value}")
        elif EXPORT.value:
            interop.export_zip(DOCK.value, ID.value, EXPORT.value)
            print(f"wrote {EXPORT.value}")
        elif CHECK.value:
            problems = store.check(DOCK.value)
            for problem in problems:
                print(f"{problem.id}: {problem.reason}")
            print(f"{len(store.list_ids(DOCK.value))} learnwares, {len(problems)} unsound.")
            sys.exit(1 if problems else 0)
        else:
            for learnware in store.load(DOCK.value):
                card, about = learnware.card, learnware.header.about
                print(f"{learnware.id:28} {card.get('domain', ''):18} n={about['n']:<6} ", end="")
                score = card.get("evaluation", {}).get("accuracy")
                print("model " if "adapter" in card else "", end="")
                print("" if score is None else f"{score:.0%} right  ", end="")
                print(card.get("description", ""))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    app.run(main)
