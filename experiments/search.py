"""The learnwares of a large dock that are closest to each of many users, on one host or several.

Example: python -m experiments.search --config=configs/search.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("search", several_hosts=True)

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments.common import (
    data_line,
    dock_line,
    dock_space,
    embed_parts,
    is_first,
    named,
    own_points,
    reducer_options,
    say,
    update_index,
    write_json,
)
from experiments.ranking import trusted_keys
from learnware_jax.dock import index, signature, store
from learnware_jax.dock.tasks import TASKS, read_texts
from learnware_jax.selection.pool import stack
from learnware_jax.selection.search import Found, Specifications, place, pool_mesh, search
from learnware_jax.specification import kernels
from learnware_jax.specification.header import (
    Header,
    check_same_space,
    printable,
)
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import project


def check(config: ConfigDict) -> Header:
    """The dock's header; ValueError for settings that no search could be made with."""
    if not config.users or len(set(config.users)) != len(config.users):
        raise ValueError(
            f"search: got users={config.users}; want files of specifications or of texts, or names "
            "of tasks, each once."
        )
    if config.top_k < 1 or (config.most and config.most < config.top_k):
        raise ValueError(
            f"search: got top_k={config.top_k}, most={config.most}; want top_k >= 1, and most 0 "
            "(as many as it takes) or at least top_k."
        )
    header = store.read_header(config.dock)
    if header.kind != "rkme":
        raise ValueError(
            f"search: the specifications of {config.dock} are of kind {header.kind!r}; want a dock "
            "of RKMEs."
        )
    return header


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    header = check(config)
    trusted_keys(config.trust)
    for user in config.users:
        data_line(user, lambda user=user: f"{len(_given(user, config, header))}")
    lines = {"dock": dock_line(config.dock), "users": named(config.users)}
    following = "search --config=configs/search.py:quickstart --config.users='(\"FILE\",)'"
    return lines | {"next": following}


def run(config: ConfigDict) -> dict:
    """Rank the dock for each user; returns what process 0 writes to workdir/results.json."""
    header, workdir = check(config), Path(config.workdir)
    trust = trusted_keys(config.trust)
    given = {user: _given(user, config, header) for user in config.users}
    first = is_first()
    if first:
        _update(config)
    _wait("index")
    opened = index.open_index(config.dock)
    if trust is not None:
        opened = trusted(opened, trust)
    users = _specify(given, config)
    began = time.perf_counter()
    sketches, specifications = on_devices(opened)
    jax.block_until_ready(sketches)
    placed = time.perf_counter()
    found = find(opened, sketches, specifications, users, config)
    seconds = time.perf_counter() - placed
    output = {
        "dock": config.dock,
        "learnwares": int(opened.alive.sum()),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "seconds": {"place": placed - began, "search": seconds},
        "users": _results(opened, users, found),
    }
    if first:
        write_json(workdir / "results.json", output)
        _show(output, workdir)
    _wait("done")
    return output


def _given(user: str, config: ConfigDict, header: Header) -> tuple[RKME, int] | list[str]:
    """A specification and its number of rows, or texts; errors come before any work."""
    if user.endswith(".safetensors"):
        spec, its_header = store.read_spec(user)
        check_same_space(its_header, header, what=f"search: {user} and the dock {config.dock}")
        return spec, its_header.about.get("n", 1)
    return read_texts(user, column=config.column or None, limit=config.limit)


def _update(config: ConfigDict) -> None:
    """Build or complete the index of the dock, if it is behind."""
    if (Path(config.dock) / "index" / "index.json").exists() and not index.is_behind(config.dock):
        return
    count = len(store.list_ids(config.dock))
    say(f"Bringing the index of {config.dock} up to date with its {count} learnwares.")
    update_index(config.dock)


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _specify(given: dict[str, Any], config: ConfigDict) -> dict[str, tuple[RKME, int]]:
    """A specification and its number of rows for each user."""
    users = dict(given)
    texts = {name: found for name, found in given.items() if isinstance(found, list)}
    if texts:
        space, encoder = dock_space(config.dock, config.specification)
    for name, some in texts.items():
        own = name not in TASKS
        (rows,) = embed_parts(encoder, [some], space, keep=not own)
        settings = config.specification
        (reduced,) = reduce_many(
            jax.random.key(config.seed),
            [rows],
            own_points(settings, len(rows)) if own else settings.points,
            kernels.from_dict(space["kernel"]),
            **reducer_options(settings),
        )
        users[name] = reduced.spec, reduced.n
    return users


def trusted(opened: index.Index, keys: Mapping[str, str]) -> index.Index:
    """The index with the rows alone of what one of the keys has signed; warnings name the rest.

    The whole dock is read, twice: signatures are of its files, so the rows are compared with these.
    ValueError if a row differs, or if none is left.
    """
    dock = str(opened.path)
    if differing := index.check(dock):
        raise ValueError(
            f"search: the index of {dock} is not of its files ({len(differing)} rows or learnwares "
            f"differ, the first is {printable(differing[0].id)}); delete {dock}/index."
        )
    alive = np.zeros(len(opened.alive), bool)
    for learnware in signature.load(dock, keys):
        alive[index.row_of(opened, learnware.id)] = True
    if not alive.any():
        raise ValueError(
            f"search: {dock} has no learnware that one of {len(keys)} keys has signed; sign some, "
            "or do without trust."
        )
    return opened._replace(alive=alive)


def on_devices(opened: index.Index) -> tuple[Any, Specifications]:
    """An index, its sketches placed on all devices of all processes."""
    n = np.asarray(opened.n)
    biased = np.asarray(opened.self_term)
    unbiased = biased * np.where(n > 1, n / np.maximum(n - 1, 1), 1.0)
    shift = np.where(opened.alive, unbiased - biased, np.inf)
    sketches = place(pool_mesh(), opened.codes, opened.scale, opened.error, opened.rest, shift)
    return sketches, Specifications(opened.kernel, opened.z, opened.beta, unbiased)


def find(
    opened: index.Index,
    sketches: Any,
    specifications: Specifications,
    users: dict[str, tuple[RKME, int]],
    config: ConfigDict,
) -> Found:
    """The closest learnwares of every user."""
    specs, n = zip(*users.values(), strict=True)
    projected = project(opened.landmarks, opened.kernel, *stack(specs))
    return search(
        specs,
        projected.coordinates,
        projected.rest,
        sketches,
        specifications,
        n=n,
        top_k=config.top_k,
        most=config.most or None,
    )


def _results(opened: index.Index, users: dict, found: Found) -> list[dict]:
    results = []
    stems = [name if "." not in name else Path(name).stem.removesuffix(".rkme") for name in users]
    for i, (name, (_, n)) in enumerate(users.items()):
        ids = index.ids_of(opened, found.index[i])
        results.append(
            {
                "id": stems[i] if stems.count(stems[i]) == 1 else name,
                "n": int(n),
                "ranking": [
                    {"id": id, "distance": float(distance)}
                    for id, distance in zip(ids, found.distance[i], strict=True)
                ],
                "measured": int(found.measured[i]),
                "certified": bool(found.certified[i]),
            }
        )
    return results


def _show(output: dict, workdir: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for head in ("user", "n", "closest", "distance", "measured", "certified"):
        table.add_column(head, no_wrap=True)
    for user in output["users"]:
        best = user["ranking"][0]
        cells = (user["id"], user["n"], best["id"], f"{best['distance']:.4f}", user["measured"])
        table.add_row(*(Text(str(cell)) for cell in cells), "yes" if user["certified"] else "no")
    console = Console(width=max(Console().width, 130), markup=False, highlight=False)
    console.print(table)
    seconds = output["seconds"]["search"]
    console.print(
        f"{output['learnwares']} learnwares on {output['devices']} devices of "
        f"{output['processes']} processes: {seconds:.2f} s for {len(output['users'])} users, with "
        "compilation the first time.",
        soft_wrap=True,
    )
    print(f"data    {workdir / 'results.json'}")
