"""Parameter vectors (PAVE): a task as the change of a reference model's parameters that fits it.

Method: arXiv 2505.13425, with the settings of the package learnware 0.4.0.post1, but for its
dropout of 0.1. Task vectors compared by cosine: Vu et al., EMNLP 2022 (TuPaTE).

Nothing here knows a model. A loss is a `jax.tree_util.Partial` called as loss(params, rows); it
returns the summed loss and the summed weight of rows, a pytree whose leaves have the rows in front.
What a Partial holds are arguments of the compiled program, not constants in it. `params` are the
trained parameters alone, a pytree of arrays (layers, ...): B of a low-rank adapter, whose A is
frozen and shared by all vectors that are to be compared. Each layer of a leaf is one tensor.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from learnware_jax.specification.rkme import RKME

Tree = Any
Loss = Partial


class Settings(NamedTuple):
    """How a parameter vector is fitted: AdamW, cosine decay to zero after a linear warm-up."""

    steps: int
    batch: int  # rows a step
    rate: float
    decay: float  # weight decay of AdamW
    warmup: float  # share of the steps
    clip: float  # greatest global norm of a gradient, that of the pull included
    pull: float  # weight of the mean over tensors of |B - B_start|_1


PUBLISHED = Settings(steps=400, batch=2, rate=1e-5, decay=0.5, warmup=0.03, clip=1.0, pull=1.0)


class Fit(NamedTuple):
    """The change of the parameters, and the mean loss of every step before it was made."""

    change: Tree
    loss: Float[Array, "*seeds steps"]


def check_settings(settings: Settings) -> None:
    """ValueError that names the first setting out of range."""
    wanted = {
        "steps": (settings.steps >= 1, "at least 1"),
        "batch": (settings.batch >= 1, "at least 1"),
        "rate": (settings.rate > 0, "a positive number"),
        "decay": (settings.decay >= 0, "0 or more"),
        "warmup": (0 <= settings.warmup < 1, "at least 0 and below 1"),
        "clip": (settings.clip > 0, "a positive number"),
        "pull": (settings.pull >= 0, "0 or more"),
    }
    for name, (right, want) in wanted.items():
        if not right:
            raise ValueError(f"pave: got {name}={getattr(settings, name)!r}; want {want}.")


def draw_rows(key: PRNGKeyArray, n: int, settings: Settings) -> Int[Array, "steps batch"]:
    """Which of n rows each step sees: epochs, every one shuffled, one behind the other.

    ValueError for no rows, and for settings out of range.
    """
    check_settings(settings)
    if n < 1:
        raise ValueError(f"draw_rows: got n={n}; want at least one row.")
    wanted = settings.steps * settings.batch
    keys = jax.random.split(key, -(-wanted // n))
    epochs = jax.vmap(lambda k: jax.random.permutation(k, n))(keys)
    return epochs.ravel()[:wanted].reshape(settings.steps, settings.batch)


def optimiser(settings: Settings) -> optax.GradientTransformation:
    """Clipping, then AdamW with betas 0.9 and 0.999; the first step of the warm-up is at rate 0."""
    warmup = math.ceil(settings.warmup * settings.steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.rate, warmup, max(settings.steps, warmup + 1), 0.0
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip), optax.adamw(rate, weight_decay=settings.decay)
    )


def pull_to(params: Tree, start: Tree) -> Float[Array, ""]:
    """Mean over tensors of the sum of |params - start|: what keeps a fit near its start.

    Its subgradient at the start is 0.
    """
    leaves = jax.tree.leaves(params)
    tensors = sum(len(leaf) for leaf in leaves)
    # Not abs: JAX's derivative of |x| at 0 is 1, and every fit starts there.
    far = jax.tree.map(lambda p, s: ((p - s) * jnp.sign(p - s)).sum(), params, start)
    total: Any = sum(jax.tree.leaves(far))
    return total / tensors


def _fit(loss, start, rows, order, update, pull):
    def objective(params, chosen):
        summed, weight = loss(params, chosen)
        mean = summed / weight
        return mean + pull * pull_to(params, start), mean

    def step(carry, index):
        params, state = carry
        chosen = jax.tree.map(lambda leaf: leaf[index], rows)
        (_, mean), gradient = jax.value_and_grad(objective, has_aux=True)(params, chosen)
        change, state = update.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), mean

    (params, _), losses = jax.lax.scan(step, (start, update.init(start)), order)
    return Fit(jax.tree.map(jnp.subtract, params, start), losses)


@functools.partial(jax.jit, static_argnames="settings")
def fit(
    loss: Loss,
    start: Tree,
    rows: Tree,
    order: Int[Array, "*seeds steps batch"],
    *,
    settings: Settings,
) -> Fit:
    """Fit the rows of a task from `start` on, once for every order of them, in one program.

    The objective of a step is the loss over the weight of its rows, plus `settings.pull` times
    `pull_to`. Orders (s, steps, batch) give changes with a first axis s.
    """
    one = functools.partial(_fit, loss, start, rows, update=optimiser(settings), pull=settings.pull)
    return jax.vmap(one)(order) if order.ndim == 3 else one(order)


@functools.partial(jax.jit, static_argnames=("settings", "together"))
def fit_many(
    loss: Loss,
    start: Tree,
    rows: Tree,
    order: Int[Array, "tasks steps batch"],
    *,
    settings: Settings,
    together: int,
) -> Fit:
    """`fit` for many tasks: rows (tasks, n, ...) and one order each, `together` at a time."""

    def one(task):
        return _fit(loss, start, *task, update=optimiser(settings), pull=settings.pull)

    return jax.lax.map(one, (rows, order), batch_size=together)


@functools.partial(jax.jit, static_argnames="together")
def one_step(loss: Loss, start: Tree, rows: Tree, *, together: int) -> Tree:
    """Minus the gradient at `start` of the loss of all rows over their weight, streamed.

    `together` rows are in memory at a time. Its direction is the limit of a fit by plain gradient
    descent as steps and rate go to zero; AdamW's first step goes along the sign of each coordinate
    instead.
    """

    def add(total, chunk):
        (_, weight), summed = jax.value_and_grad(loss, has_aux=True)(start, chunk)
        return jax.tree.map(jnp.add, total, (summed, weight)), None

    n = len(jax.tree.leaves(rows)[0])
    whole, total = n // together * together, (jax.tree.map(jnp.zeros_like, start), jnp.float32(0))
    if whole:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, together, *x.shape[1:]), rows)
        total, _ = jax.lax.scan(add, total, chunks)
    if whole < n:
        total, _ = add(total, jax.tree.map(lambda x: x[whole:], rows))
    summed, weight = total
    return jax.tree.map(lambda leaf: -leaf / weight, summed)


@functools.partial(jax.jit, static_argnames=("together", "keep"))
def row_gradients(
    loss: Loss, start: Tree, rows: Tree, *, together: int, keep: Callable[[Tree], Tree]
) -> tuple[Tree, Float[Array, " n"]]:
    """What `keep` keeps of the gradient at `start` of each row's summed loss, and its weights.

    `together` rows go through the model at once. The gradients of n rows have n times the
    parameters' size: keep them rounded, or their sketch.
    """

    def one(row):
        alone = jax.tree.map(lambda x: x[None], row)
        (_, weight), gradient = jax.value_and_grad(loss, has_aux=True)(start, alone)
        return keep(gradient), weight

    return jax.lax.map(one, rows, batch_size=together)


def linear_loss(gradients: Tree, weights: Float[ArrayLike, " n"]) -> Loss:
    """The loss of which every row has the gradient it had at the start, wherever one is.

    Its rows are indices into `gradients`, leaves (n, ...) as `row_gradients` returns them. A fit of
    it costs no pass through the model, and is the fit of the true loss as far as that is linear:
    the published settings move B by so little that it is.
    """
    return Partial(_linear, gradients, jnp.asarray(weights))


def _linear(gradients, weights, params, index):
    def product(g, p):
        return (g[index].astype(jnp.float32).sum(0) * p).sum()

    return sum(jax.tree.leaves(jax.tree.map(product, gradients, params))), weights[index].sum()


def flatten(change: Tree, *, by_tensor: bool = False) -> Float[Array, "*stack p"]:
    """A change, or a stack of them, as vectors of unit norm.

    by_tensor: every tensor is brought to one norm first, so that a cosine of vectors is the mean of
    the tensors' cosines. A tensor, or a vector, of zeros stays one.
    """

    def normalise(x):
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.where(norm > 0, norm, 1)

    def rows(leaf, axes):
        return leaf.astype(jnp.float32).reshape(*leaf.shape[:axes], -1)

    leaves = jax.tree.leaves(change)
    # (*stack, layers, rank, out)
    stack = leaves[0].ndim - 3
    if by_tensor:
        leaves = [normalise(rows(leaf, stack + 1)) for leaf in leaves]
    return normalise(jnp.concatenate([rows(leaf, stack) for leaf in leaves], axis=-1))


def mean_embedding_of(vectors: Float[ArrayLike, "s p"]) -> RKME:
    """The specification of unit vectors of one task, one a seed, for the linear kernel.

    Its inner product with another one's is the mean cosine over pairs of seeds; between single
    vectors squared MMD is 2 - 2 cosine, so `selection.ranking` ranks by cosine. Unbiased self terms
    (with n = s) leave out what a seed has in common with itself. ValueError for a vector that has
    no unit norm: zeros have no direction.
    """
    z = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(z, axis=1)
    if not np.all(np.abs(norms - 1) < 1e-3):
        raise ValueError(
            f"mean_embedding_of: got norms {norms}; want unit vectors (see flatten). A zero vector "
            "has no direction: fit more steps, or at a greater rate."
        )
    return RKME(z, np.full(len(z), 1 / len(z)))


def agreement(vectors: Float[ArrayLike, "s p"]) -> float:
    """Mean cosine over pairs of different seeds, -1 to 1. ValueError for fewer than two."""
    z = np.asarray(vectors, np.float64)
    if len(z) < 2:
        raise ValueError(f"agreement: got {len(z)} vector; want one of each of 2 or more seeds.")
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    cosines = z @ z.T
    s = len(z)
    return float((cosines.sum() - np.trace(cosines)) / (s * (s - 1)))


def published_score(cosine: ArrayLike) -> Array:
    """sigmoid(cosine / 0.1), 0 to 1: how the published system shows a cosine. The order is its."""
    return jax.nn.sigmoid(jnp.asarray(cosine) / 0.1)
