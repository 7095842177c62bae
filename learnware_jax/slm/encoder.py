"""The sentence encoder: a BERT with mean pooling whose rows are the x of every specification.

Architecture: Devlin et al., arXiv 1810.04805. Pooling: Reimers and Gurevych, arXiv 1908.10084.
"""

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import Precision
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

DTYPES = ("float32", "bfloat16")
SHORTEST_BUCKET = 16
SECONDS_BEFORE_BAR = 3.0

# HIGHEST: accelerators would otherwise round float32 operands to TF32 or bfloat16.
EXACT = {"precision": Precision.HIGHEST, "preferred_element_type": jnp.float32}

# What mean pooling leaves out: a counter 0, 1, 2, ... and the head over the first token.
UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}

# Names of our modules in the file; a layer's stand below `encoder.layer.N`.
IN_FILE = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_feedforward": "output.LayerNorm",
}


class Config(NamedTuple):
    """The sizes of a BERT, and the epsilon of its layer norms."""

    vocabulary: int
    positions: int
    segments: int
    layers: int
    heads: int
    width: int
    feedforward: int
    epsilon: float


class Encoder(NamedTuple):
    """A sentence encoder read from a folder; the hashes are of its files, for headers."""

    params: Any  # nested dicts of float32 arrays; those of the layers are stacked, (layers, ...)
    config: Config
    tokenizer: Any
    name: str
    weights_sha256: str
    tokenizer_sha256: str


class Layer(nnx.Module):
    """One post-norm transformer layer. Products take operands of `dtype`; all else is float32."""

    def __init__(self, config: Config, dtype: str, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=jnp.dtype(dtype), rngs=rngs, **EXACT)
        self.heads, self.dtype = config.heads, dtype
        self.query = linear(config.width, config.width)
        self.key = linear(config.width, config.width)
        self.value = linear(config.width, config.width)
        self.out = linear(config.width, config.width)
        self.norm_attention = _norm(config, rngs)
        self.up = linear(config.width, config.feedforward)
        self.down = linear(config.feedforward, config.width)
        self.norm_feedforward = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b t d"], real: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        x = self.norm_attention(x + self.out(self.attend(x, real)))
        return self.norm_feedforward(x + self.down(nnx.gelu(self.up(x), approximate=False)))

    def attend(self, x: Float[Array, "b t d"], real: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """Softmax attention of every token to the real tokens of its text."""
        q, k, v = (
            linear(x).reshape(*x.shape[:2], self.heads, -1).astype(self.dtype)
            for linear in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, **EXACT) / q.shape[-1] ** 0.5
        scores = jnp.where(real[:, None, None, :], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        mixed = jnp.einsum("bhqk,bkhd->bhqd", weights.astype(self.dtype), v, **EXACT)
        # Divided here, not before the product, so that (t, t) scores are read once less: with this
        # order of axes the whole model is a tenth faster on CPU at 128 tokens.
        return (mixed / weights.sum(-1, keepdims=True)).swapaxes(1, 2).reshape(x.shape)


class Bert(nnx.Module):
    """Token ids to text embeddings of unit norm."""

    def __init__(self, config: Config, dtype: str, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.segments = nnx.Embed(config.segments, config.width, rngs=rngs)
        self.norm = _norm(config, rngs)
        stack = nnx.vmap(lambda rngs: Layer(config, dtype, rngs))
        self.layers = stack(rngs.split(config.layers))

    def __call__(self, ids: Int[Array, "b t"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
        """Mean over the first `lengths` tokens of every row of `ids`, scaled to unit norm."""
        places = jnp.arange(ids.shape[1])
        real = places < lengths[:, None]
        x = self.words(ids) + self.positions(places) + self.segments(jnp.zeros_like(ids))
        # Scanned, not unrolled: as fast, and quicker to compile.
        scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = scan(lambda x, layer: layer(x, real))(self.norm(x), self.layers)
        total = jnp.where(real[..., None], x, 0).sum(1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, use_fast_variance=False, rngs=rngs)


@functools.cache
def _structure(config: Config, dtype: str) -> tuple[nnx.GraphDef, dict]:
    """The model without numbers, and its parameters as nested dicts of shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Bert(config, dtype, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _forward(params, ids, lengths, *, config: Config, dtype: str):
    return nnx.merge(_structure(config, dtype)[0], params)(ids, lengths)


def load_encoder(folder: str | Path) -> Encoder:
    """Read an encoder from `config.json`, `model.safetensors` and `tokenizer.json` of `folder`.

    Raises FileNotFoundError if one is not there, ValueError if it is no such BERT, if a parameter
    stays empty or a tensor unused (both listed), or if tokenizer and weights do not fit.

    >>> from learnware_jax import fetch, load_encoder
    >>> encoder = load_encoder(fetch("all-MiniLM-L6-v2"))
    >>> encoder.config.layers, encoder.config.width
    (6, 384)
    """
    import safetensors.numpy
    from tokenizers import Tokenizer

    folder = Path(folder)
    files = [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"load_encoder: {folder} lacks {', '.join(missing)}.")
    settings, weights, vocabulary = (file.read_bytes() for file in files)
    config = _read_config(json.loads(settings), folder)
    tokenizer = Tokenizer.from_buffer(vocabulary)
    # Its file asks for 128 tokens, always; `embed` cuts and pads by itself.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() != config.vocabulary:
        raise ValueError(
            f"load_encoder: {folder} has a tokenizer of {tokenizer.get_vocab_size()} tokens and "
            f"weights for {config.vocabulary}; take both from one model."
        )
    return Encoder(
        params=_read_params(safetensors.numpy.load(weights), config, folder),
        config=config,
        tokenizer=tokenizer,
        name=folder.name,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        tokenizer_sha256=hashlib.sha256(vocabulary).hexdigest(),
    )


def _read_config(settings: dict, folder: Path) -> Config:
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    given = {key: settings.get(key) for key in wanted}
    if given != wanted:
        raise ValueError(f"load_encoder: {folder} says {given}; only {wanted} can be read.")
    return Config(
        vocabulary=settings["vocab_size"],
        positions=settings["max_position_embeddings"],
        segments=settings["type_vocab_size"],
        layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        width=settings["hidden_size"],
        feedforward=settings["intermediate_size"],
        epsilon=settings["layer_norm_eps"],
    )


def _read_params(tensors: dict[str, np.ndarray], config: Config, folder: Path) -> dict:
    """`tensors`, named as in the file, as the parameters of `Bert`; every one is used once."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(_structure(config, "float32")[1])
    names, shapes = [], {}
    for path, leaf in leaves:
        *above, module, kind = (key.key for key in path)
        suffix = "bias" if kind == "bias" else "weight"
        stems = [f"encoder.layer.{i}." for i in range(config.layers)] if above else [""]
        names.append([f"{stem}{IN_FILE[module]}.{suffix}" for stem in stems])
        shape = leaf.shape[1:] if above else leaf.shape
        # The file keeps matrices of linear maps as (out, in).
        shapes |= dict.fromkeys(names[-1], shape[::-1] if kind == "kernel" else shape)
    empty = sorted(shapes.keys() - tensors.keys())
    unused = sorted(tensors.keys() - shapes.keys() - UNUSED)
    if empty or unused:
        raise ValueError(
            f"load_encoder: the weights in {folder} do not fit config.json. Parameters without a "
            f"tensor: {', '.join(empty) or 'none'}. Tensors without a use: "
            f"{', '.join(unused) or 'none'}."
        )
    misfits = [
        f"{name} is {tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape
    ]
    if misfits:
        raise ValueError(
            f"load_encoder: the weights in {folder} do not fit config.json: {'; '.join(misfits)}."
        )
    params = []
    for (path, leaf), group in zip(leaves, names, strict=True):
        kernel = path[-1].key == "kernel"
        arrays = [tensors[name].T if kernel else tensors[name] for name in group]
        params.append(jnp.asarray(np.stack(arrays).reshape(leaf.shape), jnp.float32))
    return jax.tree.unflatten(tree, params)


def embed(
    encoder: Encoder,
    texts: Iterable,  # of str; not said here, for the error below to name what is not
    *,
    max_tokens: int = 128,
    dtype: str = "float32",
    batch_tokens: int = 1024,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n d"]:
    """One float32 row of unit norm for every text, in the order of `texts`.

    A text is cut to `max_tokens` tokens, the first and last of which are the model's own marks;
    MiniLM was trained on 128, and on PubMedQA matches questions to abstracts no better with 256.
    `dtype` ("float32" or "bfloat16") is that of the operands of matrix products. Batches have
    `batch_tokens` tokens, padding included, at one of a few widths, each compiled once; a row does
    not depend on the other texts but for rounding. Raises TypeError or ValueError for what is not
    a text or holds no token, and for settings out of range.

    With a `mesh` of this process's devices, the texts of a batch are cut over its axis "data" (of
    type Auto), `batch_tokens` are for each device, and the parameters are copied to all.

    >>> from learnware_jax import embed, fetch, load_encoder
    >>> encoder = load_encoder(fetch("all-MiniLM-L6-v2"))
    >>> x = embed(encoder, ["Oil rose again.", "Crude was up.", "He went to school."])
    >>> x.shape, bool(x[0] @ x[1] > x[0] @ x[2])
    ((3, 384), True)
    """
    texts = _checked(texts)
    if dtype not in DTYPES:
        raise ValueError(f"embed: got dtype={dtype!r}; want one of {', '.join(DTYPES)}.")
    if not 3 <= max_tokens <= encoder.config.positions:
        raise ValueError(
            f"embed: got max_tokens={max_tokens}; {encoder.name} takes 3 to "
            f"{encoder.config.positions}."
        )
    if batch_tokens < max_tokens:
        raise ValueError(
            f"embed: got batch_tokens={batch_tokens}; want at least max_tokens={max_tokens}."
        )
    tokens = [encoding.ids for encoding in encoder.tokenizer.encode_batch_fast(texts)]
    hollow = [i for i, ids in enumerate(tokens) if len(ids) <= 2]
    if hollow:
        raise ValueError(
            f"embed: {len(hollow)} of {len(texts)} texts hold no token (empty, or only blanks and "
            f"control characters), the first is text {hollow[0]}; leave them out."
        )
    tokens = [ids if len(ids) <= max_tokens else ids[: max_tokens - 1] + ids[-1:] for ids in tokens]
    rows = np.empty((len(texts), encoder.config.width), np.float32)
    params, devices = encoder.params, 1
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        devices = mesh.shape["data"]
    batches = _batches([len(ids) for ids in tokens], max_tokens, batch_tokens, devices)
    for width, members in _with_bar(batches, progress):
        ids = np.zeros((devices * (batch_tokens // width), width), np.int32)
        lengths = np.ones(len(ids), np.int32)  # an empty row would be divided by zero
        for row, member in enumerate(members):
            ids[row, : len(tokens[member])] = tokens[member]
            lengths[row] = len(tokens[member])
        if mesh is not None:
            ids, lengths = jax.device_put(
                (ids, lengths), NamedSharding(mesh, PartitionSpec("data"))
            )
        out = _forward(params, ids, lengths, config=encoder.config, dtype=dtype)
        rows[members] = np.asarray(out)[: len(members)]
    return rows


def _checked(texts: Iterable) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("embed: got one string; want a sequence of texts, [text] for one.")
    texts = list(texts)
    if not texts:
        raise ValueError("embed: got no texts; want at least one.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"embed: text {i} is a {type(text).__name__}; want str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"embed: text {i} holds half a surrogate pair at character {error.start}; repair "
                "it where it was decoded."
            ) from None
    return texts


def _batches(
    lengths: list[int], max_tokens: int, batch_tokens: int, devices: int
) -> list[tuple[int, np.ndarray]]:
    """Every text once, as (width, indices of texts of at most so many tokens)."""
    widths = [SHORTEST_BUCKET]
    while widths[-1] < max_tokens:
        widths.append(2 * widths[-1])
    widths[-1] = max_tokens
    buckets = np.searchsorted(widths, lengths)
    batches = []
    for bucket, width in enumerate(widths):
        members = np.flatnonzero(buckets == bucket)
        size = devices * (batch_tokens // width)
        batches += [(width, members[i : i + size]) for i in range(0, len(members), size)]
    return batches


def _with_bar(batches: list, progress: bool) -> Iterator:
    """The batches; on a terminal, a bar appears if they take more than a few seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (progress and console.is_interactive):
        yield from batches
        return
    bar = Progress(console=console)
    task = bar.add_task("embedding texts", total=len(batches))
    begin = time.monotonic()
    try:
        for batch in batches:
            if time.monotonic() - begin > SECONDS_BEFORE_BAR:
                bar.start()
            yield batch
            bar.advance(task)
    finally:
        bar.stop()
