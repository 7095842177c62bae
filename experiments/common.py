"""What experiments share: their start, their files, texts made into specifications."""

import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import logging as python_logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save

from learnware_jax.dock import index, store
from learnware_jax.dock.materials import cache_dir, fetch
from learnware_jax.dock.tasks import TASKS
from learnware_jax.slm.encoder import Encoder, embed, load_encoder
from learnware_jax.specification import kernels, privacy
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.reduce import PUBLISHING, Reduced

# A process that has not been heard of for so long is gone.
HEARTBEAT_SECONDS = 20
# Between lines on progress where there is no terminal for a bar.
SECONDS_BETWEEN_LINES = 20


def keep_compiled() -> None:
    """Keep compiled programs, so that a second run starts in seconds. JAX asks for the folder when
    it first compiles, and not again."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def log_plainly() -> None:
    """Show what the library logs as plain lines, and of others their warnings."""
    python_logging.getLogger().setLevel(python_logging.WARNING)
    library = python_logging.getLogger("learnware_jax")
    library.setLevel(python_logging.INFO)
    library.handlers = [python_logging.StreamHandler()]  # plain lines on standard error
    library.propagate = False


def lost(error: BaseException) -> str:
    """What an error says of other processes of the run that are gone, "" for other errors."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return ""
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot reach the others: one of "
        "them ended, or the network did. See what it said, then start all of them again; the dock "
        f"is as it was.\n({str(error).splitlines()[0]})"
    )


def is_first() -> bool:
    """Whether this process is the one that writes and shows results."""
    return jax.process_index() == 0


def join_hosts(values: flags.FlagValues) -> bool:
    """Join the processes of this run, if flags say so, or SLURM, or a TPU slice; whether it did.

    ValueError for one flag without the others, TimeoutError where they do not meet.
    """
    given = (values.coordinator, values.num_processes, values.process_id)
    if None in given:
        if given != (None, None, None):
            raise ValueError(
                f"got --coordinator={given[0]}, --num_processes={given[1]}, --process_id="
                f"{given[2]}; want all three of them, or none."
            )
        # JAX finds out the rest. On a TPU it asks the host's metadata, also for a slice of one.
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        tpu = importlib.util.find_spec("libtpu") and [
            *Path("/dev").glob("accel*"),
            *Path("/dev").glob("vfio/*"),
        ]
        if tasks == 1 and not tpu:
            return False
    elif not 0 <= values.process_id < values.num_processes:
        raise ValueError(
            f"got --process_id={values.process_id}, --num_processes={values.num_processes}; want "
            "an id from 0 to one less than the number."
        )
    # JAX aborts a process whose fellows are gone, and says so; our stack would only hide it.
    faulthandler.disable()
    say("Waiting for the other processes.")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        # Processes meet before there is work: what they meet in waits for them, but opening it
        # has a limit of half a minute. One opening is for processes, one for all devices.
        multihost_utils.sync_global_devices("joined")
        mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec("all"))
        ones = jax.make_array_from_callback(
            (jax.device_count(),), everywhere, lambda index: np.ones(1, np.float32)
        )
        jax.jit(jnp.sum)(ones).block_until_ready()
    except RuntimeError as error:
        raise TimeoutError(
            "the processes of this run did not meet; start all of them within a few minutes, with "
            f"one coordinator that each can reach.\n({str(error).splitlines()[0]})"
        ) from error
    return True


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: the old file or the new one. ValueError for NaN or infinity."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with store.explained(f"to {path.parent}", store.UNCHANGED, where="write_json"):
        path.parent.mkdir(parents=True, exist_ok=True)
    store.write_file(path, text.encode(), where="write_json")


def say(message: str) -> None:
    """A line to the person who waits, on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress while the block runs; gives the function that advances it.

    A bar on a terminal; elsewhere a plain line now and then.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    done, shown, told = 0, 0, time.monotonic()

    def count(more: int) -> None:
        nonlocal done, shown, told
        done += more
        progress.advance(task, more)
        if progress.disable and time.monotonic() - told > SECONDS_BETWEEN_LINES:
            shown, told = done, time.monotonic()
            say(f"{description}: {done:,} of {total:,}")

    with Progress(console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task(description, total=total)
        yield count
    if 0 < shown < done:  # who saw it begin sees it end
        say(f"{description}: {done:,} of {total:,}")


def setting(name: str, value: object) -> str:
    """A setting as a shell takes it, for commands that are proposed."""
    return shlex.quote(f"--config.{name}={value}")


def named(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    shown = ", ".join([*names[:4], "..."] if len(names) > 5 else names)
    return f"{len(names)} ({shown})"


def dock_line(path: str) -> str:
    """What is in the dock at `path`; FileNotFoundError or ValueError if it cannot be read."""
    kind = store.read_header(path).kind
    return f"{path}: {len(store.list_ids(path))} learnwares, specified by {kind}"


def data_line(source: str, count: Callable[[], str]) -> str:
    """Somebody's data in words: files are counted, which may raise; the rest is fetched later."""
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):
        return f"{source}: {count()}"
    if "/" not in source and source not in TASKS:
        count()
    return f"{source}, a task or data set, fetched if it is not here"


def open_encoder(settings: ConfigDict) -> Encoder:
    """The sentence encoder of `settings.encoder`, fetched if need be."""
    return load_encoder(fetch(settings.encoder))


def space_of(encoder: Encoder, settings: ConfigDict) -> dict[str, Any]:
    """Everything but the kernel that changes distances between specifications, for headers."""
    return {
        "encoder": settings.encoder,
        "encoder_sha256": encoder.weights_sha256,
        "tokenizer_sha256": encoder.tokenizer_sha256,
        "max_tokens": settings.max_tokens,
        "dtype": settings.dtype,
        "dimension": encoder.config.width,
    }


def dock_space(path: str, settings: ConfigDict) -> tuple[dict[str, Any], Encoder]:
    """The space of the dock at `path`, and the encoder of `settings`.

    ValueError if the dock's specifications are not made of embedded texts, or with another encoder.
    """
    header = store.read_header(path)
    if header.kind != "rkme":
        raise ValueError(
            f"{path}: its specifications are of kind {header.kind!r}, those of embedded texts "
            f"'rkme'; name a dock of RKMEs, or rank this one by specifications of its kind."
        )
    space, encoder = header.space, open_encoder(settings)
    for field, have in (
        ("encoder_sha256", encoder.weights_sha256),
        ("tokenizer_sha256", encoder.tokenizer_sha256),
    ):
        if space.get(field) != have:
            raise ValueError(
                f"{path}: its {field} is {space.get(field)}, that of the encoder at hand {have}; "
                "name the dock's encoder, or make a new dock."
            )
    return space, encoder


def check_kernel(settings: ConfigDict) -> None:
    """ValueError for what `kernel_of` would refuse, before there are embedded texts."""
    kernel_of(settings, 0, np.array([[0.0], [1.0]]))


def is_private(settings: ConfigDict) -> bool:
    """Whether specifications are to be differentially private."""
    return math.isfinite(float(settings.privacy.epsilon))


def check_publishing(settings: ConfigDict) -> None:
    """ValueError for a reducer that publishes rows and was not allowed to by name, and for privacy
    that cannot be had."""
    named, private = settings.publish_rows, settings.privacy
    if named not in ("", settings.reducer):
        raise ValueError(
            f"specification: got publish_rows={named!r} and reducer={settings.reducer!r}; want the "
            "reducer's name, or nothing."
        )
    try:
        privacy.gaussian_noise(float(private.epsilon), private.delta)
    except ValueError as error:
        raise ValueError(f"specification.privacy: {error}") from error
    if is_private(settings):
        if settings.kernel.name != "linear" and settings.kernel.gamma == "median":
            raise ValueError(
                "specification: a kernel.gamma of 'median' is taken from the texts themselves, and "
                "is not private; give a number."
            )
    elif settings.reducer in PUBLISHING and not named:
        raise ValueError(
            f"specification: the reducer {settings.reducer!r} publishes embeddings of the texts as "
            "they are, from which texts can be found again; use gauss_newton, or say --config."
            f"specification.publish_rows={settings.reducer} if everybody may know the texts."
        )


def warn_of_publishing(settings: ConfigDict) -> None:
    """A warning for a reducer that publishes rows, by permission."""
    if settings.publish_rows and not is_private(settings):
        say(
            f"warning: {settings.reducer} publishes embeddings of the texts as they are; whoever "
            "has a text can see whether it is among them."
        )


def kernel_of(settings: ConfigDict, seed: int, x: np.ndarray) -> kernels.Kernel:
    """The kernel of a new dock; a gamma of "median" is taken from the embedded texts x.

    ValueError for an unknown kernel or a gamma that is no positive number.
    """
    if settings.gamma == "median":
        gamma = kernels.median_gamma(jax.random.key(seed), x)
    else:
        try:
            gamma = float(settings.gamma)
        except ValueError:
            raise ValueError(
                f"kernel: got gamma={settings.gamma!r}; want a positive number or 'median'."
            ) from None
    description = {"name": settings.name}
    if settings.name == "multi_gaussian":
        description["gammas"] = [gamma * multiple for multiple in settings.multiples]
    elif settings.name != "linear":
        description["gamma"] = gamma
    return kernels.from_dict(description)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], space: dict[str, Any], *, keep: bool
) -> np.ndarray:
    """Embedded texts (n, d). With `keep`, for public texts only, they are kept in the cache."""
    options = {"max_tokens": space["max_tokens"], "dtype": space["dtype"]}
    if not keep:
        return embed(encoder, texts, **options)
    key = [space[f] for f in ("encoder_sha256", "tokenizer_sha256", "max_tokens", "dtype")]
    digest = hashlib.sha256(json.dumps([key, list(texts)]).encode()).hexdigest()
    file = cache_dir() / "embeddings" / f"{digest}.safetensors"
    if file.exists():
        try:
            with safe_open(file, "numpy") as opened:
                x, said = opened.get_tensor("x"), (opened.metadata() or {}).get("sha256")
            if said == hashlib.sha256(x.tobytes()).hexdigest():
                return x
            raise ValueError("no checksum, or another one")
        except Exception as error:  # safetensors has one error for every damage
            logging.warning("%s is damaged (%s) and is made again.", file, error)
    x = np.ascontiguousarray(embed(encoder, texts, **options))
    data = save({"x": x}, {"sha256": hashlib.sha256(x.tobytes()).hexdigest()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        store.write_file(file, data, where="embed_texts")
    except OSError as error:
        logging.warning("Embedded texts are not kept: %s", error)
    return x


def embed_parts(
    encoder: Encoder, parts: Sequence[Sequence[str]], space: dict[str, Any], *, keep: bool
) -> list[np.ndarray]:
    """Embedded texts of several tasks in one call: full batches, and one bar with the time left."""
    texts = [text for part in parts for text in part]
    x = embed_texts(encoder, texts, space, keep=keep)
    return np.split(x, np.cumsum([len(part) for part in parts])[:-1])


def header_of(space: dict[str, Any], settings: ConfigDict, seed: int, reduced: Reduced) -> Header:
    """The header of a reduced set: its space, and how it was made."""
    about = {
        "n": reduced.n,
        "points": len(reduced.spec.beta),
        "residual": reduced.residual,
        "gap": reduced.gap,
        "iterations": reduced.iterations,
        "reducer": settings.reducer,
        "start": settings.start,
        "steps": settings.steps,
        "seed": seed,
        **made_by(),
    }
    return Header(SCHEMA, "rkme", space, about)


def made_by() -> dict[str, str]:
    """When something was made and by which configuration, for headers."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        # Only the configuration's name: overrides may hold paths that are nobody's business.
        "command": " ".join(a for a in sys.argv[1:] if a.startswith("--config=")),
    }


def reducer_options(settings: ConfigDict) -> dict[str, Any]:
    """Keyword arguments for `reduce_many`."""
    return {"method": settings.reducer, "start": settings.start, "steps": settings.steps}


def own_points(settings: ConfigDict, count: int) -> int:
    """Points for somebody's own texts: as many points as texts could give the texts away."""
    return min(settings.points, max(1, count // 2))


def update_index(dock: str) -> None:
    """Build the dock's index or bring it up to date, with a progress bar."""
    shown = 0
    with bar("index", len(store.list_ids(dock))) as advance:

        def progress(done):
            nonlocal shown
            advance(done - shown)
            shown = done

        # Landmarks are the same for the same dock.
        index.update(dock, jax.random.key(0), progress=progress)
