"""Sketches: short vectors that stand for specifications where a million are compared.

Landmarks: the orthogonal projection of a mean embedding onto the span of the kernel at shared
landmark points (Nystrom features). What the projection leaves out is one number, its norm, and two
such numbers bound every distance from below and above.

Orthogonal random features: an unbiased estimate of a Gaussian kernel's inner products that needs no
data (Yu et al., arXiv 1610.09072).

Count sketch, for long vectors: every coordinate is added, with a random sign, to one of `width`
sums. The inner product of two sketches is unbiased with variance at most 2 |x|^2 |y|^2 / width
(Charikar et al., 2002; Weinberger et al., arXiv 0902.2206, lemma 2); cost O(size), and no matrix is
stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from learnware_jax.specification.kernels import Gaussian, Kernel, squared_distances
from learnware_jax.specification.rkme import RKME, self_deficit

CODES = {
    "int8": np.dtype(np.int8),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
# Specifications in one program: enough for full matrix products, little memory.
_TOGETHER = 512
# Points of one matrix product.
_POINTS = 2048


class Landmarks(NamedTuple):
    """An orthonormal basis of s functions in an RKHS, and the mean embedding mu_0 it is centred at.

    With D the deficit of the kernel and l_1 ... l_J the points, mu_0 = (1/J) sum_j k(l_j, .), and
    coordinate a of mu is <mu - mu_0, psi_a>, psi_a = sum_j basis_ja (k(l_j, .) - mu_0).
    """

    points: Float[ArrayLike, "J d"]  # float32
    basis: Float[ArrayLike, "J s"]  # float64, columns in the order of how much of a pool they hold
    values: Float[ArrayLike, " J"]  # float64: mean_i D(l_i, l_j), what mu_0 is at l_j


class Projected(NamedTuple):
    """Mean embeddings projected on landmarks, all float64."""

    coordinates: Float[np.ndarray, "q s"]
    rest: Float[np.ndarray, " q"]  # RKHS norm of mu - mu_0 less its projection
    self_term: Float[np.ndarray, " q"]  # sum_ij beta_i beta_j deficit, as `self_deficit`


class Coded(NamedTuple):
    """Coordinates as they are stored: scale * code, and how far that is from them."""

    code: np.ndarray  # (q, s) int8, bfloat16 or float32
    scale: Float[np.ndarray, " q"]  # float32
    error: Float[np.ndarray, " q"]  # float32: Euclidean norm of the difference, rounded up


def _deficits(kernel, x, y, center):
    return kernel.deficit(squared_distances(x, y, center))


@jax.jit
def _project(landmarks, kernel, z, beta):
    points = landmarks.points.astype(jnp.float64)
    center, grand = points.mean(0), landmarks.values.mean()

    def some(rows):
        z, beta = rows
        t = _deficits(kernel, z.reshape(-1, z.shape[-1]).astype(jnp.float64), points, center)
        c = jnp.einsum("qm,qmj->qj", beta, t.reshape(*beta.shape, -1))
        own = jax.vmap(lambda *spec: self_deficit(RKME(*spec), kernel))(z.astype(jnp.float64), beta)
        # <mu - mu_0, psi>; what `values` and c leave out is constant, and columns sum to zero.
        coordinates = (c - landmarks.values) @ landmarks.basis
        # |mu - mu_0|^2 less that of the projection (Pythagoras); rounding may leave it below zero.
        square = own + grand - 2 * c.mean(1) - (coordinates**2).sum(1)
        return coordinates, jnp.sqrt(jnp.maximum(square, 0)), own

    q, m, d = z.shape
    size = min(q, max(1, _POINTS // m))
    size = 1 << size.bit_length() - 1  # divides q, a power of two
    parts = jax.lax.map(some, (z.reshape(-1, size, m, d), beta.reshape(-1, size, m)))
    return jax.tree.map(lambda a: a.reshape(q, *a.shape[2:]), parts)


def project(
    landmarks: Landmarks,
    kernel: Kernel,
    z: Float[np.ndarray, "q m d"],
    beta: Float[np.ndarray, "q m"],
) -> Projected:
    """The projections of q mean embeddings, padded with weight zero; weights sum to one, or are
    made to.

    In float64, so that bounds on distances are bounds. For any p and q, with a the distance of
    their coordinates: a^2 + (rest_p - rest_q)^2 <= |mu_p - mu_q|^2 <= a^2 + (rest_p + rest_q)^2
    (Pythagoras, and Cauchy and Schwarz for what is left).
    """
    parts = []
    with jax.enable_x64(True):
        for start in range(0, len(z), _TOGETHER):
            weights = np.asarray(beta[start : start + _TOGETHER], np.float64)
            piece = z[start : start + _TOGETHER], weights / weights.sum(1, keepdims=True)
            count = len(weights)
            # A power of two: few shapes are compiled.
            fill = (1 << (count - 1).bit_length()) - count
            padded = (np.concatenate([a, np.repeat(a[:1], fill, 0)]) for a in piece)
            done = _project(landmarks, kernel, *padded)
            parts.append([np.asarray(a)[:count] for a in done])
    return Projected(*(np.concatenate(a) for a in zip(*parts, strict=True)))


def choose_landmarks(
    key: PRNGKeyArray,
    z: Float[np.ndarray, "q m d"],
    beta: Float[np.ndarray, "q m"],
    kernel: Kernel,
    *,
    count: int = 512,
    width: int = 256,
) -> Landmarks:
    """Landmarks for pools of specifications like these, q of them, padded with weight zero.

    `count` points are drawn, specification by specification, by weight; of the functions that they
    span, the `width` are kept that hold most of the embeddings' spread around mu_0 (principal
    components). Fewer where fewer are independent. ValueError for sizes below 1 or where all points
    are one.
    """
    if count < 1 or width < 1 or not len(z):
        raise ValueError(
            f"choose_landmarks: got {len(z)} specifications, count={count}, width={width}; want at "
            "least one of each."
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    chosen = [rng.permutation(len(z)) for _ in range(-(-count // len(z)))]
    rows = np.concatenate(chosen)[:count]
    cumulative = np.cumsum(beta[rows], 1)
    picks = (cumulative > rng.uniform(0, cumulative[:, -1])[:, None]).argmax(1)
    points = np.unique(np.asarray(z[rows, picks], np.float32), axis=0)
    with jax.enable_x64(True):
        wide = points.astype(np.float64)
        gram = np.asarray(_deficits(kernel, wide, wide, wide.mean(0)))
    values = gram.mean(0)
    power, vectors = np.linalg.eigh(gram - values - values[:, None] + values.mean())
    # Directions that rounding has made are none, and small ones are not orthogonal enough.
    good = power > 1e-8 * power[-1]
    if power[-1] <= 0:
        raise ValueError(
            f"choose_landmarks: the {len(points)} points drawn from {len(z)} specifications do not "
            "differ; give specifications of more than one task."
        )
    basis = vectors[:, good] / np.sqrt(power[good])
    # Columns sum to zero, as `_project` takes for granted; rounding, divided by a small root, is
    # not small.
    basis -= basis.mean(0)
    coordinates = project(Landmarks(points, basis, values), kernel, z, beta).coordinates
    _, axes = np.linalg.eigh(coordinates.T @ coordinates)
    basis = basis @ axes[:, ::-1][:, :width]
    return Landmarks(points, basis - basis.mean(0), values)


def quantise(coordinates: Float[np.ndarray, "q s"], dtype: str) -> Coded:
    """Coordinates as "int8" (a scale for each row), "bfloat16" or "float32" codes.

    The error is measured, not estimated, so that bounds can allow for it. ValueError for another
    dtype.
    """
    if dtype not in CODES:
        raise ValueError(f"quantise: got dtype={dtype!r}; want one of {', '.join(CODES)}.")
    coordinates = np.asarray(coordinates, np.float64)
    scale = np.ones(len(coordinates), np.float32)
    if dtype == "int8":
        largest = np.abs(coordinates).max(1) / 127
        scale = np.maximum(largest, np.finfo(np.float32).tiny).astype(np.float32)
    code = coordinates / scale[:, None]
    code = (np.rint(code).clip(-127, 127) if dtype == "int8" else code).astype(CODES[dtype])
    error = np.linalg.norm(coordinates - scale[:, None] * code.astype(np.float64), axis=1)
    return Coded(code, scale, round_up_float32(error))


def round_up_float32(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """float32 numbers that are not below x."""
    near = np.asarray(x, np.float64).astype(np.float32)
    return np.where(near < x, np.nextafter(near, np.float32(np.inf)), near)


def orthogonal_frequencies(
    key: PRNGKeyArray, kernel: Gaussian, dimension: int, count: int
) -> Float[Array, "count dimension"]:
    """Frequencies of orthogonal random features for a Gaussian kernel.

    Blocks of `dimension` rows are orthogonal, each row as long as a Gaussian vector's would be
    (Yu et al., arXiv 1610.09072, eq. 4).
    """
    blocks = -(-count // dimension)
    directions, lengths = jax.random.split(key)
    q = jax.random.orthogonal(directions, dimension, (blocks,))
    norms = jax.random.normal(lengths, (blocks * dimension, dimension))
    norms = jnp.linalg.norm(norms, axis=1, keepdims=True)
    rows = q.reshape(-1, dimension) * norms
    return jnp.sqrt(2 * jnp.asarray(kernel.gamma)) * rows[:count]


@jax.jit
def random_features(
    frequencies: Float[ArrayLike, "count d"],
    z: Float[ArrayLike, "q m d"],
    beta: Float[ArrayLike, "q m"],
) -> Float[Array, "q 2*count"]:
    """Features of mean embeddings: inner products are those of the RKHS on average."""
    angle = jnp.einsum("qmd,fd->qmf", z, frequencies, precision=jax.lax.Precision.HIGHEST)
    waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) / len(frequencies) ** 0.5
    return jnp.einsum("qmf,qm->qf", waves, beta, precision=jax.lax.Precision.HIGHEST)


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
