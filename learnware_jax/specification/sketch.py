"""Sketches: short vectors whose inner products are those of long ones, on average.

Count sketch: every coordinate is added, with a random sign, to one of `width` sums. The inner
product of two sketches is unbiased with variance at most 2 |x|^2 |y|^2 / width (Charikar et al.,
2002; Weinberger et al., arXiv 0902.2206, lemma 2); cost O(size), and no matrix is stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray


class Sketch(NamedTuple):
    """Where each coordinate goes, and with which sign; its width is not among the arrays."""

    place: Int[Array, " size"]
    sign: Float[Array, " size"]


def make_sketch(key: PRNGKeyArray, size: int, width: int) -> Sketch:
    """A random sketch of vectors of `size` numbers by `width`; one key, one sketch."""
    if size < 1 or width < 1:
        raise ValueError(f"make_sketch: got size={size}, width={width}; want at least 1 of both.")
    place, sign = jax.random.split(key)
    return Sketch(
        jax.random.randint(place, (size,), 0, width),
        jax.random.rademacher(sign, (size,), jnp.float32),
    )


def sketch_of(
    sketch: Sketch, x: Float[ArrayLike, "*stack size"], *, width: int
) -> Float[Array, "*stack width"]:
    """The sketch of every vector of a stack. It is linear in x."""

    def one(x):
        return jax.ops.segment_sum(x.astype(jnp.float32) * sketch.sign, sketch.place, width)

    x = jnp.asarray(x)
    for _ in range(x.ndim - 1):
        one = jax.vmap(one)
    return one(x)
