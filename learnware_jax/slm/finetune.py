"""Fine-tuning of low-rank adapters on a frozen model, one adapter or a stack of them at once.

A run is a fold of `step` over batches that depend on the settings and the data alone, so a run that
was stopped goes on from any kept state to the same bits. Optimiser: AdamW (Loshchilov and Hutter,
arXiv 1711.05101), linear warm-up, cosine decay, gradients clipped by their global norm.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from learnware_jax.slm.decoder import Adapter, Config, Params, forward, logits
from learnware_jax.slm.weights import file_sha256

MANIFEST = "manifest.json"
CHUNK = 4096  # positions whose logits are in memory at once


class Settings(NamedTuple):
    """How to fine-tune. `rate` is apart: the adapters of a stack may have one each."""

    steps: int
    batch: int  # rows a step
    warmup: float  # share of the steps
    final: float  # share of the rate that is left at the end
    clip: float  # greatest global norm of a gradient
    decay: float  # weight decay
    train: str  # "ab", or "b" alone with A as it is
    accumulate: int  # parts that a batch is cut into, one in memory at a time
    widths: tuple[int, ...]  # tokens; a batch is padded to the least width that holds it
    dtype: str  # of the operands of products: "float32" or "bfloat16"
    remat: bool


class Text(NamedTuple):
    """Tokens of one example; those from `first` on are learned."""

    ids: Sequence[int]
    first: int


class Batch(NamedTuple):
    """Rows to learn from: after token `at` of a row follows `target`; weight 0 is padding."""

    ids: Int[Array, "*stack part row token"]
    at: Int[Array, "*stack part row learned"]
    target: Int[Array, "*stack part row learned"]
    weight: Float[Array, "*stack part row learned"]


class State(NamedTuple):
    """Everything that a step changes."""

    adapter: Adapter
    optimiser: Any
    step: Int[Array, "*stack"]


class Metrics(NamedTuple):
    """Of one step: mean loss a learned token in nats, and the gradient's norm before clipping."""

    loss: Float[Array, "*stack"]
    norm: Float[Array, "*stack"]


def check_settings(settings: Settings) -> None:
    """ValueError that names the first setting out of range."""
    widths = settings.widths
    wanted = {
        "steps": (settings.steps >= 1, "at least 1"),
        "batch": (settings.batch >= 1, "at least 1"),
        "warmup": (0 <= settings.warmup < 1, "at least 0 and below 1"),
        "final": (0 <= settings.final <= 1, "0 to 1"),
        "clip": (settings.clip > 0, "a positive number"),
        "decay": (settings.decay >= 0, "0 or more"),
        "train": (settings.train in ("b", "ab"), "'b' or 'ab'"),
        "accumulate": (
            settings.accumulate >= 1 and settings.batch % settings.accumulate == 0,
            f"a divisor of batch={settings.batch}",
        ),
        "widths": (
            bool(widths) and list(widths) == sorted(set(widths)) and widths[0] >= 2,
            "increasing numbers of tokens, 2 or more",
        ),
        "dtype": (settings.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
    }
    for name, (right, want) in wanted.items():
        if not right:
            raise ValueError(f"finetune: got {name}={getattr(settings, name)!r}; want {want}.")


def schedule(texts: Sequence[Text], settings: Settings, seed: int) -> Iterator[np.ndarray]:
    """Indices of the rows of every step: `settings.steps` arrays of `settings.batch`.

    Every epoch is shuffled; the epochs, one behind the other, are sorted by length within stretches
    of 16 batches (fewer where there are fewer texts), so that a batch holds texts of like length
    and little padding.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([len(text.ids) for text in texts])
    # A stretch longer than an epoch would sort the copies of a text into one batch.
    batches = min(16, max(1, len(texts) // settings.batch))
    stretch, waiting, made = batches * settings.batch, np.array([], int), 0
    while made < settings.steps:
        while len(waiting) < stretch:
            waiting = np.concatenate([waiting, rng.permutation(len(texts))])
        taken, waiting = waiting[:stretch], waiting[stretch:]
        taken = taken[np.argsort(lengths[taken], kind="stable")]
        for rows in rng.permutation(taken.reshape(batches, settings.batch)):
            if made < settings.steps:
                yield rows
                made += 1


def make_batch(parts: Sequence[Sequence[Text]], settings: Settings) -> Batch:
    """The texts of one step, for each adapter of a stack, padded to one width."""
    longest = max(len(text.ids) for texts in parts for text in texts)
    width = next((w for w in settings.widths if w >= longest), None)
    if width is None:
        raise ValueError(
            f"finetune: a text has {longest} tokens, the widest batch {settings.widths[-1]}; cut "
            "the texts, or name a greater width."
        )
    most = max(len(text.ids) - int(text.first) for texts in parts for text in texts)
    learned = min(width, 1 << (most - 1).bit_length())  # a power of two: few shapes to compile
    shape = (len(parts), len(parts[0]))
    ids = np.zeros((*shape, width), np.int32)
    at, target, weight = (np.zeros((*shape, learned), kind) for kind in (int, int, np.float32))
    for i, texts in enumerate(parts):
        for j, (tokens, first) in enumerate(texts):
            count = len(tokens) - first
            ids[i, j, : len(tokens)] = tokens
            at[i, j, :count] = np.arange(first, len(tokens)) - 1
            target[i, j, :count] = tokens[first:]
            weight[i, j, :count] = 1
    cut = (len(parts), settings.accumulate, len(parts[0]) // settings.accumulate, -1)
    return Batch(
        *(x.reshape(cut) for x in (ids, at.astype(np.int32), target.astype(np.int32), weight))
    )


def check_texts(texts: Sequence[Text], settings: Settings, *, name: str = "the texts") -> None:
    """ValueError unless there are texts, each with something to learn, none too long."""
    if not texts:
        raise ValueError(f"finetune: {name} is empty; want at least one example.")
    for i, (ids, first) in enumerate(texts):
        if not 1 <= first < len(ids) <= settings.widths[-1]:
            raise ValueError(
                f"finetune: example {i} of {name} has {len(ids)} tokens, learned from {first} on; "
                f"want a prompt, an answer, and at most {settings.widths[-1]} tokens in all."
            )


def init_state(adapter: Adapter, settings: Settings) -> State:
    """The state before the first step. A stack of adapters gives a stack of states."""

    def one(adapter):
        trained = _trained(adapter, settings.train)
        return State(adapter, optimiser(settings).init(trained), jnp.int32(0))

    return jax.vmap(one)(adapter) if adapter.scale.ndim else one(adapter)


@functools.cache
def optimiser(settings: Settings) -> optax.GradientTransformation:
    """Clipping and AdamW at a peak rate of 1; `step` multiplies by the rate."""
    warmup = max(1, round(settings.warmup * settings.steps))
    rate = optax.warmup_cosine_decay_schedule(
        1 / warmup, 1.0, warmup, max(settings.steps, warmup + 1), settings.final
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, weight_decay=settings.decay),
    )


def loss_sum(
    params: Params, adapter: Adapter | None, batch: Batch, *, config: Config, settings: Settings
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy in nats and summed weight of one part of a batch (rows, tokens)."""
    hidden, _ = forward(
        params,
        batch.ids,
        config=config,
        adapter=adapter,
        dtype=settings.dtype,
        remat=settings.remat,
    )
    hidden = jnp.take_along_axis(hidden, batch.at[..., None], axis=1)
    rows, learned = batch.at.shape
    span = max(1, min(learned, CHUNK // rows))

    def chunk(hidden, target, weight):
        scores = logits(params, hidden, config=config, dtype=settings.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, target)
        return (losses * weight).sum()

    if span >= learned:
        return chunk(hidden, batch.target, batch.weight), batch.weight.sum()
    short = -learned % span

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, span, *x.shape[2:]), 1, 0)

    parts = (cut(hidden), cut(batch.target), cut(batch.weight))
    losses = jax.lax.map(jax.checkpoint(lambda part: chunk(*part)), parts)
    return losses.sum(), batch.weight.sum()


def _step(state, batch, rate, params, *, config, settings):
    trained = _trained(state.adapter, settings.train)

    def summed(trained, part):
        return loss_sum(
            params, state.adapter._replace(**trained), part, config=config, settings=settings
        )

    def accumulate(total, part):
        (loss, weight), gradient = jax.value_and_grad(summed, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, total, (loss, weight, gradient)), None

    if settings.accumulate == 1:
        part = jax.tree.map(lambda x: x[0], batch)
        (loss, weight), gradient = jax.value_and_grad(summed, has_aux=True)(trained, part)
    else:
        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, weight, gradient), _ = jax.lax.scan(accumulate, zero, batch)
    # Divided once, after all parts: the gradient of the whole batch, however it is cut.
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    norm = optax.tree.norm(gradient)
    updates, inner = optimiser(settings).update(gradient, state.optimiser, trained)
    updates = jax.tree.map(lambda u: rate * u, updates)
    adapter = state.adapter._replace(**optax.apply_updates(trained, updates))
    return State(adapter, inner, state.step + 1), Metrics(loss / weight, norm)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def step(
    state: State,
    batch: Batch,
    rate: Float[Array, "*stack"],
    params: Params,
    *,
    config: Config,
    settings: Settings,
) -> tuple[State, Metrics]:
    """One update. A stack of states takes a stack of batches and of rates, in one program.

    The loss is the mean over the learned tokens of the batch.
    """
    one = functools.partial(_step, config=config, settings=settings)
    if state.step.ndim:
        return jax.vmap(one, in_axes=(0, 0, 0, None))(state, batch, rate, params)
    return one(state, batch, rate, params)


def _trained(adapter: Adapter, train: str) -> dict:
    return {field: getattr(adapter, field) for field in train}


def shard_params(params: Params, mesh: Mesh, *, fully: bool) -> Params:
    """Parameters on every device of the mesh's axis "data", or `fully` cut over its devices.

    A parameter is cut along its longest axis that the number of devices divides; the axis of the
    layers is never cut, since they are needed one after another.
    """
    return jax.device_put(params, param_shardings(params, mesh, fully=fully))


def param_shardings(params: Params, mesh: Mesh, *, fully: bool) -> Params:
    """Where `shard_params` puts each parameter; takes arrays or their shapes."""
    devices = mesh.shape["data"]

    def place(path, leaf):
        stacked = path[0].key == "layers"
        axes = [i for i in range(int(stacked), leaf.ndim) if leaf.shape[i] % devices == 0]
        if not (fully and axes):
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree_util.tree_map_with_path(place, params)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch with its rows cut over the mesh's axis "data"."""

    def place(x):
        spec = PartitionSpec(*[None] * (x.ndim - 2), "data", None)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return Batch(*map(place, batch))


class Run(NamedTuple):
    """A fine-tuning run: what is learned, how, and from which seed. One entry an adapter."""

    texts: tuple[Sequence[Text], ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Settings

    def digest(self, weights_sha256: str, model: Params, config: Config, adapter: Adapter) -> str:
        """A hash of all that the result depends on, the adapters at the start too.

        Not of the devices: on other ones sums may be rounded otherwise.
        """
        stored = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model)})
        parts = [weights_sha256, stored, config, self.rates, self.seeds, self.settings]
        content = hashlib.sha256(json.dumps(parts).encode())
        for texts in self.texts:
            rows = [[*map(int, ids), int(first)] for ids, first in texts]
            content.update(json.dumps(rows).encode())
        for leaf in jax.tree.leaves(adapter):
            content.update(np.asarray(leaf).tobytes())
        return content.hexdigest()


def train(
    params: Params,
    config: Config,
    adapter: Adapter,
    run: Run,
    *,
    mesh: Mesh | None = None,
    state: State | None = None,
    report: Callable[[int, State, Metrics, int], None] = lambda *_: None,
) -> State:
    """Fine-tune a stack of adapters, from `state` on if one is given; returns the last state.

    `report` is called after every step with the steps done, the state, the metrics, and the tokens
    of the batch, padding left out. FloatingPointError at the first loss that is not finite.
    """
    settings = run.settings
    check_settings(settings)
    for texts in run.texts:
        check_texts(texts, settings)
    current = init_state(adapter, settings) if state is None else state
    if mesh is not None:
        current: State = jax.device_put(current, NamedSharding(mesh, PartitionSpec()))
    begun = int(current.step[0])
    plans = [schedule(t, settings, s) for t, s in zip(run.texts, run.seeds, strict=True)]
    rates = jnp.asarray(run.rates, jnp.float32)
    for done, rows in enumerate(zip(*plans, strict=True), 1):
        if done <= begun:
            continue
        parts = [[t[i] for i in r] for t, r in zip(run.texts, rows, strict=True)]
        batch = make_batch(parts, settings)
        tokens = sum(len(text.ids) for texts in parts for text in texts)
        batch = batch if mesh is None else shard_batch(batch, mesh)
        current, metrics = step(current, batch, rates, params, config=config, settings=settings)
        metrics = Metrics(*map(np.asarray, metrics))
        sound = np.isfinite(metrics.loss) & np.isfinite(metrics.norm)
        if not sound.all():
            worst = int(np.flatnonzero(~sound)[0])
            raise FloatingPointError(
                f"finetune: the loss of adapter {worst} is {metrics.loss[worst]} and the norm of "
                f"its gradient {metrics.norm[worst]} at step {done} of {settings.steps}, at a rate "
                f"of {run.rates[worst]}; lower the rate, or lengthen the warm-up. Checkpoints made "
                "before are unharmed."
            )
        report(done, current, metrics, tokens)
    return current


def save_checkpoint(folder: str | Path, state: State, digest: str, *, keep: int = 2) -> Path:
    """Write the state as folder/STEP, with a manifest of the hashes of its files.

    A checkpoint without its manifest, written last, does not count: a killed writer leaves the
    ones before. Only the newest `keep` are kept. OSError if it cannot be written.
    """
    import orbax.checkpoint as orbax

    folder = Path(folder).absolute()
    home = folder / str(int(state.step.ravel()[0]))
    try:
        _drop(home)  # left by a killed writer: orbax would refuse
        with orbax.StandardCheckpointer() as writer:
            writer.save(home / "state", _as_dict(state))
        for path in (home, *home.rglob("*")):
            _flush(path)
        hashes = {str(file.relative_to(home)): file_sha256(file) for file in _files(home)}
        partial = home / f".{MANIFEST}"
        partial.write_text(json.dumps({"run": digest, "files": hashes}, indent=1))
        _flush(partial)
        partial.replace(home / MANIFEST)
        _flush(home)
        kept = _checkpoints(folder)[-keep:]
        for other in folder.iterdir():
            if other.name.isdigit() and other not in kept:
                _drop(other)
    except (OSError, ValueError, RuntimeError) as error:  # a full disk is orbax's ValueError
        shutil.rmtree(home, ignore_errors=True)
        raise OSError(
            f"save_checkpoint: could not write {home}; the checkpoints before it are unharmed, and "
            "the run goes on from the newest. Free space, or get leave to write there. The system "
            f"said: {str(error)[:300]}"
        ) from error
    return home


def _drop(home: Path) -> None:
    """Delete a checkpoint, which counts no more before the first of its files goes."""
    (home / MANIFEST).unlink(missing_ok=True)
    if home.exists():
        shutil.rmtree(home)


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: str | Path, like: State, digest: str) -> State | None:
    """The newest checkpoint of a run, or None if there is none.

    `like` is a state of the run, for its structure. ValueError if the checkpoint is of another run,
    or if a file in it is damaged or missing: it is named.
    """
    import orbax.checkpoint as orbax

    found = _checkpoints(Path(folder).absolute())
    if not found:
        return None
    home = found[-1]

    def refuse(file, what):
        raise ValueError(
            f"load_checkpoint: {file} is {what}; delete {home} to go on from the checkpoint before "
            "it."
        )

    try:
        manifest = json.loads((home / MANIFEST).read_bytes())
        run, hashes = manifest["run"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        refuse(home / MANIFEST, "damaged")
    if run != digest:
        raise ValueError(
            f"load_checkpoint: {home} is of a run with another model, data or settings; give this "
            "run a folder of its own, or delete that one."
        )
    for name, expected in hashes.items():
        file = home / name
        if not file.is_file():
            refuse(file, "missing")
        if file_sha256(file) != expected:
            refuse(file, "damaged")
    # To one device, whatever devices it was saved from.
    place = SingleDeviceSharding(jax.local_devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for name, leaf in _as_dict(like).items()
    }
    with orbax.StandardCheckpointer() as reader:
        arrays = reader.restore(home / "state", shapes)
    leaves = [arrays[str(i)] for i in range(len(arrays))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _as_dict(state: State) -> dict[str, Array]:
    # By number: the file then needs to know none of optax's classes.
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    homes = [file.parent for file in folder.glob(f"*/{MANIFEST}") if file.parent.name.isdigit()]
    return sorted(homes, key=lambda home: int(home.name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
