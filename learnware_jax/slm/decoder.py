"""Decoder-only language models: the Llama, Mistral, Qwen2 and Qwen3 families from one module.

Architecture: Touvron et al., arXiv 2302.13971 (RMS norms, rotary positions, gated feed-forward);
grouped heads: Ainslie et al., arXiv 2305.13245; rotary positions: Su et al., arXiv 2104.09864;
low-rank adapters: Hu et al., arXiv 2106.09685.

Parameters, adapters and caches are pytrees of arrays; those of the layers are stacked,
(layers, ...), and scanned. Operands of products have the `dtype` that a call names ("float32" or
"bfloat16"); sums, norms and the residual stream are float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float, Int

Params = dict[str, Any]


class RopeScaling(NamedTuple):
    """How Llama 3.1 stretches its rotary positions beyond those it was first trained on."""

    factor: float
    low: float
    high: float
    positions: int


class Config(NamedTuple):
    """The sizes of a decoder, and what tells the families apart."""

    vocabulary: int
    layers: int
    width: int
    feedforward: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float
    theta: float
    positions: int
    scaling: RopeScaling | None = None
    attention_bias: bool = False  # on queries, keys and values: Qwen2
    qk_norm: bool = False  # Qwen3
    tied: bool = False  # the head is the embedding
    windows: tuple[int, ...] = ()  # tokens that each layer looks back on; 0, or no entry: all


class Adapter(NamedTuple):
    """A low-rank change of linear maps: x W becomes x W + scale (x A) B.

    Keyed by module ("query", "key", "value", "out", "gate", "up", "down"). A stack of adapters has
    one more axis in front of every array.
    """

    a: dict[str, Float[Array, "*stack layers in rank"]]
    b: dict[str, Float[Array, "*stack layers rank out"]]
    scale: Float[Array, "*stack"]


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot s holds the token at position s."""

    k: Float[Array, "layers batch slots kv_heads head_width"]
    v: Float[Array, "layers batch slots kv_heads head_width"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, w: Array, dtype: str) -> Array:
    """x w over the last axis of x and the first of the matrix w; operands of `dtype`, float32 sums.

    So is its derivative: JAX's own would multiply float32 cotangents, at half the speed or less
    where the processor has units for bfloat16.
    """
    return _dot(x, w, ((x.ndim - 1,), (0,)), dtype)


def _product_forward(x, w, dtype):
    return product(x, w, dtype), (x, w)


def _product_backward(dtype, operands, cotangent):
    x, w = operands
    leading = tuple(range(x.ndim - 1))
    dx = _dot(cotangent, w, ((x.ndim - 1,), (1,)), dtype)
    dw = _dot(x, cotangent, (leading, leading), dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


def _dot(x, y, contracted, dtype):
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (contracted, ((), ())),
        # HIGHEST: accelerators would otherwise round float32 operands to TF32 or bfloat16.
        precision=Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )


class Linear(nnx.Module):
    """x W (+ bias) (+ scale (x A) B)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x, dtype: str, low_rank=None):
        y = product(x, self.kernel[...], dtype)
        if self.bias is not None:
            y = y + self.bias[...]
        if low_rank is not None:
            a, b, scale = low_rank
            y = y + scale * product(product(x, a, dtype), b, dtype)
        return y


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config):
        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        self.config = config
        self.norm_attention = _norm(config, config.width)
        self.query = Linear(config.width, queries, bias=config.attention_bias)
        self.key = Linear(config.width, keys, bias=config.attention_bias)
        self.value = Linear(config.width, keys, bias=config.attention_bias)
        self.out = Linear(queries, config.width)
        if config.qk_norm:
            self.norm_query = _norm(config, config.head_width)
            self.norm_key = _norm(config, config.head_width)
        self.norm_feedforward = _norm(config, config.width)
        self.gate = Linear(config.width, config.feedforward)
        self.up = Linear(config.width, config.feedforward)
        self.down = Linear(config.feedforward, config.width)

    def __call__(self, x, positions, window, adapter, cache, dtype: str):
        """The residual stream after this layer, and its cache with these tokens."""

        def apply(name, x):
            low_rank = None
            if adapter is not None and name in adapter.a:
                low_rank = adapter.a[name], adapter.b[name], adapter.scale
            return getattr(self, name)(x, dtype, low_rank)

        mixed, cache = self.attend(apply, self.norm_attention(x), positions, window, cache, dtype)
        x = x + apply("out", mixed)
        y = self.norm_feedforward(x)
        return x + apply("down", jax.nn.silu(apply("gate", y)) * apply("up", y)), cache

    def attend(self, apply, x, positions, window, cache, dtype):
        heads = (*x.shape[:2], -1, self.config.head_width)
        q, k, v = (apply(name, x).reshape(heads) for name in ("query", "key", "value"))
        if self.config.qk_norm:
            q, k = self.norm_query(q), self.norm_key(k)
        angles = positions[..., None] * _frequencies(self.config)
        q, k, v = (y.astype(dtype) for y in (_rotate(q, angles), _rotate(k, angles), v))
        if cache is not None:
            write = jax.vmap(
                lambda slots, new, at: jax.lax.dynamic_update_slice(
                    slots, new.astype(slots.dtype), (at, 0, 0)
                )
            )
            cache = k, v = tuple(
                write(slots, new, positions[:, 0]) for slots, new in zip(cache, (k, v), strict=True)
            )
            k, v = k.astype(dtype), v.astype(dtype)
        # A token's slot is its position, so causality hides padding and slots not yet written.
        slots = jnp.arange(k.shape[1])
        if cache is None:
            slots = positions[:, None, :]
        behind = positions[:, :, None] - slots
        seen = behind >= 0
        if window is not None:
            seen &= (behind < window) | (window == 0)
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            mixed = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
        return mixed.reshape(*x.shape[:2], -1), cache


class Decoder(nnx.Module):
    """The parameters of a whole model; `forward` and `logits` run it."""

    def __init__(self, config: Config):
        self.embed = nnx.Param(jnp.zeros((config.vocabulary, config.width)))
        self.layers = nnx.vmap(lambda _: Layer(config))(jnp.arange(config.layers))
        self.norm = _norm(config, config.width)
        if not config.tied:
            self.head = Linear(config.width, config.vocabulary)


def _norm(config: Config, width: int) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        width, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=nnx.Rngs(0)
    )


@functools.cache
def _structure(config: Config) -> tuple[nnx.GraphDef, Params]:
    """The model without numbers, and its parameters as nested dicts of shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config)))
    return graph, nnx.to_pure_dict(state)


def param_shapes(config: Config) -> Params:
    """The parameters as nested dicts of `jax.ShapeDtypeStruct`."""
    return _structure(config)[1]


def init_params(key: Array, config: Config, *, scale: float = 0.02) -> Params:
    """Random parameters: normal matrices of standard deviation `scale`, unit norms, no biases."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))

    def draw(key, path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        if path[-1].key == "bias":
            return jnp.zeros(leaf.shape)
        return scale * jax.random.normal(key, leaf.shape)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [draw(k, path, leaf) for k, (path, leaf) in zip(keys, leaves, strict=True)]
    )


def init_cache(config: Config, batch: int, slots: int, dtype: str = "float32") -> Cache:
    """An empty cache for `batch` texts of at most `slots` tokens."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def forward(
    params: Params,
    ids: Int[Array, "b t"],
    *,
    config: Config,
    adapter: Adapter | None = None,
    cache: Cache | None = None,
    start: Int[Array, " b"] | None = None,
    dtype: str = "float32",
    remat: bool = False,
) -> tuple[Float[Array, "b t d"], Cache | None]:
    """The normed residual stream at every token, for `logits`; and the cache with these tokens.

    Token i of a row has position start + i (start 0 if not given). Padding stands on the right and
    is harmless: no token sees one behind it. With `cache`, tokens see those that it holds, and must
    fit into its slots. `remat` stores one (b, t, d) a layer for the derivative and computes the
    rest again.
    """
    graph, _ = _structure(config)
    model = nnx.merge(graph, params)
    places = jnp.arange(ids.shape[1])
    positions = jnp.broadcast_to(places, ids.shape) if start is None else start[:, None] + places
    x = model.embed[...][ids].astype(jnp.float32)
    layer_graph, layers = nnx.split(model.layers)
    windows = np.array(config.windows) if any(config.windows) else None

    scale = None if adapter is None else adapter.scale

    def step(x, layer):
        state, window, low_rank, cached = layer
        if low_rank is not None:
            low_rank = Adapter(*low_rank, scale)
        return nnx.merge(layer_graph, state)(x, positions, window, low_rank, cached, dtype)

    low_rank = None if adapter is None else (adapter.a, adapter.b)
    # Inside a scan nothing merges what is computed again with what was there.
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    x, cached = jax.lax.scan(step, x, (layers, windows, low_rank, cache and tuple(cache)))
    return model.norm(x), cached and Cache(*cached)


def logits(
    params: Params, hidden: Float[Array, "*b d"], *, config: Config, dtype: str = "float32"
) -> Float[Array, "*b vocabulary"]:
    """Scores of every token of the vocabulary as the next one, at the positions given."""
    head = params["embed"].T if config.tied else params["head"]["kernel"]
    return product(hidden, head, dtype)


@functools.partial(jax.jit, static_argnames=("config", "steps", "end", "dtype"))
def generate(
    params: Params,
    ids: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    *,
    config: Config,
    adapter: Adapter | None = None,
    steps: int,
    end: int,
    dtype: str = "float32",
) -> Int[Array, "b steps"]:
    """The likeliest next token, `steps` times, after the first `lengths` tokens of every row.

    After token `end` a row holds `end` only. All in one program: a scan over cached tokens.
    """
    cache = init_cache(config, len(ids), ids.shape[1] + steps, dtype)
    shared = {"config": config, "adapter": adapter, "dtype": dtype}
    hidden, cache = forward(params, ids, cache=cache, **shared)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]

    def choose(hidden, done):
        token = jnp.argmax(logits(params, hidden, config=config, dtype=dtype), -1)
        token = jnp.where(done, end, token)
        return token, done | (token == end)

    def step(carry, _):
        token, done, position, cache = carry
        hidden, cache = forward(params, token[:, None], cache=cache, start=position, **shared)
        token, done = choose(hidden[:, 0], done)
        return (token, done, position + 1, cache), token

    first, done = choose(last, jnp.zeros(len(ids), bool))
    _, rest = jax.lax.scan(step, (first, done, lengths, cache), None, steps - 1)
    return jnp.concatenate([first[:, None], rest.T], 1)


def _frequencies(config: Config) -> np.ndarray:
    """Radians a position of each pair of coordinates (Su et al., section 3.2.2; Llama 3.1)."""
    half = np.arange(0, config.head_width, 2) / config.head_width
    frequencies = config.theta**-half
    if config.scaling is not None:
        factor, low, high, positions = config.scaling
        turns = positions * frequencies / (2 * np.pi)
        # High frequencies stay, low ones are divided, those between are blended.
        share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = share * frequencies + (1 - share) * frequencies / factor
    return frequencies.astype(np.float32)


def _rotate(x: Float[Array, "b t h w"], angles: Float[Array, "b t half"]):
    """Rotary positions: coordinate i is paired with i + w / 2."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
