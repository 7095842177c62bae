"""What experiments share about vector specifications: a reference model's loss, rows as tokens."""

import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import save

from experiments.common import bar
from experiments.models import describe, encode
from learnware_jax.dock.store import write_file
from learnware_jax.slm import finetune, lora, prompts
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.finetune import Batch, Text
from learnware_jax.slm.weights import Model
from learnware_jax.specification import pave
from learnware_jax.specification.sketch import make_sketch, sketch_of

TARGETS = ("answers", "outputs", "prompts")
ROW_SKETCH = 0  # seed of the sketch of rows' gradients
# Without an instruction: it names the task.
TEMPLATE = prompts.Template("bare", "{instruction}{text}\nAnswer:")


class Reference(NamedTuple):
    """A reference model with the adapter that every vector of a space starts from."""

    model: Model
    adapter: Adapter  # A frozen and shared, B zero
    loss: Partial  # of B and a Batch of rows; see specification.pave
    settings: ConfigDict


def open_reference(model: Model, settings: ConfigDict) -> Reference:
    """The reference that `settings` names; a section of configs/families.py says what is in it."""
    adapter = lora.init_adapter(
        jax.random.key(settings.lora.seed),
        model.config,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        targets=tuple(settings.lora.targets),
    )
    loss = functools.partial(
        _loss, config=model.config, settings=_settings(settings.widths, settings.dtype)
    )
    return Reference(model, adapter, Partial(loss, model.params, adapter), settings)


def _settings(widths, dtype):
    """Those of the library's loss and batches; the others say nothing of a gradient."""
    return finetune.Settings(
        steps=1,
        batch=1,
        warmup=0.0,
        final=0.0,
        clip=1.0,
        decay=0.0,
        train="b",
        accumulate=1,
        widths=tuple(widths),
        dtype=dtype,
        remat=False,
    )


def _loss(params, adapter, b, rows, *, config, settings):
    return finetune.loss_sum(params, adapter._replace(b=b), rows, config=config, settings=settings)


def space_of(reference: Reference, target: str) -> dict:
    """Everything that changes a vector of this reference model, for headers.

    Coordinates are those of (layer, rank, output), outputs of the modules side by side.
    """
    _check_target(target)
    settings = reference.settings
    a = hashlib.sha256()
    for name in sorted(reference.adapter.a):
        a.update(np.asarray(reference.adapter.a[name]).tobytes())
    size = sum(leaf.size for leaf in jax.tree.leaves(reference.adapter.b))
    return {
        "reference": describe(reference.model, TEMPLATE),
        "target": target,
        "lora": settings.lora.to_dict() | {"targets": list(settings.lora.targets)},
        "a_sha256": a.hexdigest(),
        "tokens": settings.widths[-1],
        "dtype": settings.dtype,
        "kernel": {"name": "linear"},
        "dimension": size,
    }


def _check_target(target):
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; want one of {', '.join(TARGETS)}.")


def texts_of(reference: Reference, pairs: Sequence[tuple[str, str]], target: str) -> list[Text]:
    """Texts as tokens, and where those that are learned begin: the answers, or all of a prompt.

    `pairs` are texts and what the target wants after them. Texts are cut to the settings' width.
    ValueError for an unknown target.
    """
    _check_target(target)
    model, width = reference.model, reference.settings.widths[-1]
    head = [] if model.start is None else [model.start]
    found = []
    for text, answer in pairs:
        if target == "prompts":
            ids = [*head, *encode(model, text)][:width]
            # A token is learned from those before it: a single one from the end of another text.
            ids = ids if len(ids) > 1 else [model.end, *ids]
            found.append(Text(ids, 1))
            continue
        behind = encode(model, f" {answer}")
        before = encode(model, prompts.render(TEMPLATE, instruction="", text=""))
        body = encode(model, text)[: width - len(head) - len(before) - len(behind)]
        found.append(Text([*head, *body, *before, *behind], len(head) + len(body) + len(before)))
    return found


def batches_of(
    texts: Sequence[Text], widths: Sequence[int], together: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The texts in batches of like width, each with the places of its rows; leaves (together, ...).

    Behind the last rows of a width its last one is repeated.
    """
    buckets = np.searchsorted(widths, [len(text.ids) for text in texts])
    for bucket in sorted(set(buckets)):
        members = np.flatnonzero(buckets == bucket)
        batch = finetune.make_batch([[texts[i] for i in members]], _settings(widths, "float32"))
        batch = jax.tree.map(lambda leaf: leaf[0, 0], batch)
        for i in range(0, len(members), together):
            places = members[i : i + together]
            short = together - len(places)
            yield (
                places,
                jax.tree.map(
                    lambda x, i=i, s=short: np.pad(x[i : i + together], ((0, s), (0, 0)), "edge"),
                    batch,
                ),
            )


def row_gradients(reference: Reference, texts: Sequence[Text], *, together: int):
    """The gradient at the start of every row's loss, leaves (n, layers, rank, out) in bfloat16.

    Also the weights (n,): how many tokens each row's loss is summed over.
    """
    n, b = len(texts), reference.adapter.b
    gradients = {name: np.zeros((n, *leaf.shape), jnp.bfloat16) for name, leaf in b.items()}
    weights = np.zeros(n, np.float32)
    with bar(f"gradients of {n} rows", n) as advance:
        for places, batch in batches_of(texts, reference.settings.widths, together):
            found, weight = pave.row_gradients(
                reference.loss, b, batch, together=together, keep=_rounded
            )
            for name, leaf in found.items():
                gradients[name][places] = np.asarray(leaf)[: len(places)]
            weights[places] = np.asarray(weight)[: len(places)]
            advance(len(places))
    return gradients, weights


def _rounded(gradient):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gradient)


class Sample(NamedTuple):
    """Some rows of a task, by their places, and the seed they were drawn with."""

    places: np.ndarray
    seed: int


class Vectors(NamedTuple):
    """Vector specifications of samples of a task, and what every row contributes to them."""

    pave: np.ndarray  # (samples, p), unit norm
    one_step: np.ndarray  # (samples, p), unit norm
    # (samples, p): empirical Fisher information, of the mean loss over a row's learned tokens
    fisher: np.ndarray
    rows: np.ndarray  # (n, row_width): sketches of rows' gradients, unit norm
    seconds: np.ndarray  # (3,): of the gradients, of the fits, of the rest


def make_vectors(
    reference: Reference,
    texts: Sequence[Text],
    samples: Sequence[Sample],
    *,
    settings: pave.Settings,
    together: int,
    row_width: int,
) -> Vectors:
    """One pass of gradients over the texts, then every sample's vectors without the model.

    A parameter vector is a fit of the loss made linear at the start (`pave.linear_loss`).
    """
    finetune.check_texts(texts, _settings(reference.settings.widths, reference.settings.dtype))
    begin = time.perf_counter()
    gradients, weights = row_gradients(reference, texts, together=together)
    # B's leaves in one, (n, layers, rank, all outputs): fewer and larger operations.
    gradients = jnp.concatenate([gradients[name] for name in reference.adapter.b], axis=-1)
    jax.block_until_ready(gradients)
    passed = time.perf_counter()
    loss = pave.linear_loss(gradients, weights)
    # `pull_to` sees one leaf where there are several.
    settings = settings._replace(pull=settings.pull / len(reference.adapter.b))
    start = jnp.zeros(gradients.shape[1:], jnp.float32)
    places = jnp.arange(len(texts))
    fitted = []
    for sample in samples:
        order = pave.draw_rows(jax.random.key(sample.seed), len(sample.places), settings)
        change = pave.fit(loss, start, places, sample.places[order], settings=settings).change
        fitted.append(np.asarray(pave.flatten(change)))
    fits = time.perf_counter()
    chosen = np.zeros((len(samples), len(texts)), np.float32)
    for row, sample in zip(chosen, samples, strict=True):
        row[sample.places] = 1
    one_step, fisher, rows = _from_rows(gradients, weights, chosen, width=row_width)
    ended = time.perf_counter()
    seconds = np.diff([begin, passed, fits, ended])
    return Vectors(np.stack(fitted), *map(np.asarray, (one_step, fisher, rows)), seconds)


@functools.partial(jax.jit, static_argnames="width")
def _from_rows(gradients, weights, chosen, *, width):
    n = len(gradients)
    flat = gradients.reshape(n, -1)
    total = jnp.matmul(chosen.astype(flat.dtype), flat, preferred_element_type=jnp.float32)
    # The sum's sign is turned: a fit goes against the gradient.
    one_step = pave.flatten(-total.reshape(len(chosen), *gradients.shape[1:]))
    counts = chosen / chosen.sum(1, keepdims=True) / weights**2
    squares = jnp.matmul(counts, jnp.square(flat.astype(jnp.float32)))
    sketch = make_sketch(jax.random.key(ROW_SKETCH), flat.shape[1], width)
    rows = jax.lax.map(lambda row: sketch_of(sketch, row, width=width), flat)
    return one_step, squares, rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def by_tensor(reference: Reference, vectors: np.ndarray) -> np.ndarray:
    """Vectors (s, p) with every tensor of the adapter brought to one norm."""
    b = reference.adapter.b
    layers, rank = next(iter(b.values())).shape[:2]
    leaves = vectors.reshape(len(vectors), layers, rank, -1)
    cuts = np.cumsum([leaf.shape[-1] for leaf in b.values()])[:-1]
    return np.asarray(pave.flatten(np.split(leaves, cuts, axis=-1), by_tensor=True))


def keep_vectors(file: Path, digest: str, make) -> Vectors:
    """Vectors out of a file, or made and kept there; those of another digest are made again."""
    if file.exists():
        with safe_open(file, "numpy") as opened:
            if (opened.metadata() or {}).get("digest") == digest:
                return Vectors(*(_unpacked(opened.get_tensor(name)) for name in Vectors._fields))
    made = make()
    arrays = {name: _packed(name, array) for name, array in made._asdict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, save(arrays, {"digest": digest}), where="keep_vectors")
    return Vectors(*(_unpacked(arrays[name]) for name in Vectors._fields))


def _packed(name, array):
    # Coordinates of unit vectors are about 1 / sqrt(p): too small for float16 as they are.
    if name in ("pave", "one_step"):
        return (array * np.float32(array.shape[1] ** 0.5)).astype(np.float16)
    return np.asarray(array, np.float32)


def _unpacked(array):
    if array.dtype != np.float16:
        return array
    vectors = array.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
