"""Look after a dock: list its learnwares, check every file, remove one.

Examples:
  python -m experiments.dock --dock=docks/quickstart
  python -m experiments.dock --dock=docks/quickstart --check
  python -m experiments.dock --dock=docks/quickstart --remove=my-model
"""

import sys

from absl import app, flags

from experiments.common import BAD_INPUT
from learnware_jax.dock import store

DOCK = flags.DEFINE_string("dock", "docks/quickstart", "The folder of the dock.")
CHECK = flags.DEFINE_bool("check", False, "Read every file, and name the unsound learnwares.")
REMOVE = flags.DEFINE_string("remove", "", "The id of a learnware to remove.")


def main(argv: list[str]) -> None:
    """Exit status: 0, 1 where a check finds something, 2 for bad input."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag.")
    try:
        if REMOVE.value:
            store.remove(DOCK.value, REMOVE.value)
            print(f"removed {REMOVE.value}")
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
