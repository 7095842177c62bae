"""Kernels on embedded texts, and the blocked sums over them that everything else is made of.

Every kernel here depends on a pair of points through their squared distance t alone, up to a part
that cancels between embeddings of equal total weight:

    k(x, y) = constant + per_square (|x|^2 + |y|^2) + deficit(|x - y|^2),        deficit(0) = 0

For a translation-invariant kernel the constant is k(x, x) = 1 and the deficit is k - 1; the linear
kernel has per_square = 1/2 and the deficit -t / 2. A squared MMD needs the deficits only, so it
is computed from small numbers (expm1, not exp) and keeps eight digits where a plain float32 `exp`
keeps six. `slope` and `curvature` are the first two derivatives of the kernel in t.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray


class Gaussian(NamedTuple):
    """exp(-gamma |x - y|^2), gamma > 0. Characteristic."""

    gamma: Float[ArrayLike, ""]

    name = "gaussian"
    characteristic = True
    constant, per_square = 1.0, 0.0

    def deficit(self, t):
        return jnp.expm1(-self.gamma * t)

    def slope(self, t):
        return -self.gamma * jnp.exp(-self.gamma * t)

    def curvature(self, t):
        return self.gamma**2 * jnp.exp(-self.gamma * t)


class MultiGaussian(NamedTuple):
    """mean_l exp(-gammas_l |x - y|^2): several bandwidths at once. Characteristic."""

    gammas: Float[ArrayLike, " l"]

    name = "multi_gaussian"
    characteristic = True
    constant, per_square = 1.0, 0.0

    def _mean(self, term, t):
        # A loop, as l is small and l stacked copies of t would multiply the memory of a block.
        gammas = jnp.asarray(self.gammas, jnp.result_type(float, t))
        return sum(term(gammas[i], t) for i in range(len(gammas))) / len(gammas)

    def deficit(self, t):
        return self._mean(lambda gamma, t: jnp.expm1(-gamma * t), t)

    def slope(self, t):
        return self._mean(lambda gamma, t: -gamma * jnp.exp(-gamma * t), t)

    def curvature(self, t):
        return self._mean(lambda gamma, t: gamma**2 * jnp.exp(-gamma * t), t)


class Laplace(NamedTuple):
    """exp(-gamma |x - y|), gamma > 0, with the Euclidean norm. Characteristic.

    It has no derivative at x = y. `slope` and `curvature` are those of the kernel with |x - y|
    rounded off below 0.05 / gamma, so that a Gauss-Newton model of it exists; values are exact.
    """

    gamma: Float[ArrayLike, ""]

    name = "laplace"
    characteristic = True
    constant, per_square = 1.0, 0.0

    def _rounded(self, t):
        return jnp.sqrt(t + (0.05 / self.gamma) ** 2)

    def deficit(self, t):
        # The double `where` keeps the gradient of the square root finite at t = 0.
        root = jnp.sqrt(jnp.where(t > 0, t, 1.0))
        return jnp.where(t > 0, jnp.expm1(-self.gamma * root), 0.0)

    def slope(self, t):
        r = self._rounded(t)
        return -self.gamma / (2 * r) * jnp.exp(-self.gamma * r)

    def curvature(self, t):
        r = self._rounded(t)
        return self.gamma / (4 * r**3) * (1 + self.gamma * r) * jnp.exp(-self.gamma * r)


class InverseMultiquadric(NamedTuple):
    """(1 + gamma |x - y|^2)^(-1/2), gamma > 0. Characteristic."""

    gamma: Float[ArrayLike, ""]

    name = "inverse_multiquadric"
    characteristic = True
    constant, per_square = 1.0, 0.0

    def deficit(self, t):
        root = jnp.sqrt(1 + self.gamma * t)
        return -self.gamma * t / (root * (1 + root))  # 1/root - 1 without cancellation

    def slope(self, t):
        return -self.gamma / 2 * (1 + self.gamma * t) ** -1.5

    def curvature(self, t):
        return 0.75 * self.gamma**2 * (1 + self.gamma * t) ** -2.5


class Linear(NamedTuple):
    """x . y: the embedding is the mean, the MMD the distance of means. Not characteristic."""

    name = "linear"
    characteristic = False
    constant, per_square = 0.0, 0.5

    def deficit(self, t):
        return -t / 2

    def slope(self, t):
        return jnp.full_like(t, -0.5)

    def curvature(self, t):
        return jnp.zeros_like(t)


Kernel = Gaussian | MultiGaussian | Laplace | InverseMultiquadric | Linear
KERNELS: dict[str, type] = {
    kernel.name: kernel
    for kernel in (Gaussian, MultiGaussian, Laplace, InverseMultiquadric, Linear)
}


def to_dict(kernel: Kernel) -> dict:
    """The kernel's name and parameters as plain JSON values, for a header."""
    return {"name": kernel.name} | {
        field: np.asarray(value, np.float64).tolist() for field, value in kernel._asdict().items()
    }


def _is_positive(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < float(np.finfo(np.float32).max)


def from_dict(description: Any) -> Kernel:
    """The kernel that `to_dict` described. ValueError for an unknown name or a bad parameter."""
    if not isinstance(description, dict) or description.get("name") not in list(KERNELS):
        raise ValueError(
            f"kernel: got {description!r}; want a dict whose 'name' is one of {sorted(KERNELS)}."
        )
    cls = KERNELS[description["name"]]
    given = {field: value for field, value in description.items() if field != "name"}
    if set(given) != set(cls._fields):
        raise ValueError(
            f"kernel {cls.name}: got parameters {sorted(given)}; want {sorted(cls._fields)}."
        )
    parameters = {}
    for field, value in given.items():
        several = field == "gammas"
        numbers = value if several else [value]
        if not (isinstance(numbers, list) and numbers and all(map(_is_positive, numbers))):
            raise ValueError(
                f"kernel {cls.name}: got {field}={value!r}; want "
                f"{'a list of positive numbers' if several else 'one positive number'}."
            )
        parameters[field] = np.array(value, np.float64) if several else float(value)
    return cls(**parameters)


# Products that cancel against each other: TF32 or bf16 passes would show.
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def squared_distances(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    center: Float[ArrayLike, " d"] | None = None,
) -> Float[Array, "n m"]:
    """|x_i - y_j|^2 for every pair; what rounding cannot tell from zero is zero.

    `center` (default: the mean of y) is subtracted from both first: cancellation in the expansion
    |x|^2 + |y|^2 - 2 x.y grows with the distance of the data from the origin.
    """
    center = y.mean(0) if center is None else center
    x, y = x - center, y - center
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    t = squares - 2 * matmul(x, y.T)
    # A kernel with a kink at zero (Laplace) turns 1e-7 of rounding into 3e-4.
    return jnp.where(t > 4 * jnp.finfo(t.dtype).eps * squares, t, 0.0)


def gram(
    kernel: Kernel, x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]
) -> Float[Array, "n m"]:
    """k(x_i, y_j) for every pair of rows; for sets small enough that n m numbers may be held."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return kernel.deficit(squared_distances(x, y)) + kernel.constant + kernel.per_square * squares


def wide_dtype() -> np.dtype:
    """float64 where JAX has it switched on, else float32: the type that sums are kept in."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def _block(x, weights, index, block):
    """Rows of block `index` with their weights, without padding (which would copy x): the last
    block is moved back to fit, and the rows that it repeats get weight zero."""
    start = jnp.minimum(index * block, len(x) - block)
    fresh = start + jnp.arange(block) >= index * block
    rows = jax.lax.dynamic_slice_in_dim(x, start, block)
    return rows, jnp.where(fresh, jax.lax.dynamic_slice_in_dim(weights, start, block), 0)


def scan_blocks(body, initial, x, weights, block):
    """Sum body(rows, weights) over consecutive blocks of at most `block` rows, in the type of
    `initial`. Memory does not depend on len(x)."""
    block = min(block, len(x))

    def step(total, index):
        part = body(*_block(x, weights, index, block))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part), None

    return jax.lax.scan(step, initial, jnp.arange(-(-len(x) // block)))[0]


@partial(jax.jit, static_argnames="block")
def deficit_sums(
    kernel: Kernel,
    z: Float[ArrayLike, "m d"],
    x: Float[ArrayLike, "n d"],
    weights: Float[ArrayLike, " n"],
    *,
    block: int = 2048,
) -> Float[Array, " m"]:
    """sum_j weights_j deficit(|z_i - x_j|^2) for every z_i, in blocks of rows of x."""
    center = z.mean(0)

    def body(rows, w):
        return matmul(kernel.deficit(squared_distances(z, rows, center)), w)

    return scan_blocks(body, jnp.zeros(len(z), wide_dtype()), x, weights, block)


def mean_embedding(
    kernel: Kernel,
    z: Float[ArrayLike, "m d"],
    x: Float[ArrayLike, "n d"],
    weights: Float[ArrayLike, " n"] | None = None,
    *,
    block: int = 2048,
) -> Float[Array, " m"]:
    """The mean embedding of x at z: c_i = sum_j weights_j k(z_i, x_j), weights 1/n by default.

    O(n m d) time, O(block m) memory.
    """
    z, x = jnp.asarray(z), jnp.asarray(x)
    weights = jnp.full(len(x), 1 / len(x), x.dtype) if weights is None else jnp.asarray(weights)
    wide = wide_dtype()
    mass = weights.astype(wide).sum()
    x_square = (weights * (x * x).sum(1)).astype(wide).sum()
    z_squares = (z * z).sum(1).astype(wide)
    offset = kernel.constant * mass + kernel.per_square * (mass * z_squares + x_square)
    return deficit_sums(kernel, z, x, weights, block=block) + offset


@partial(jax.jit, static_argnames="block")
def deficit_inner(
    kernel: Kernel,
    x: Float[ArrayLike, "n d"],
    a: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "m d"],
    b: Float[ArrayLike, " m"],
    *,
    block: int = 2048,
) -> Float[Array, ""]:
    """sum_ij a_i b_j deficit(|x_i - y_j|^2) in tiles of block x block: never an (n, m) array."""

    def body(rows, w):
        return matmul(w.astype(wide_dtype()), deficit_sums(kernel, rows, y, b, block=block))

    return scan_blocks(body, jnp.zeros((), wide_dtype()), x, a, block)


def median_gamma(key: PRNGKeyArray, x: Float[ArrayLike, "n d"], *, max_rows: int = 2000) -> float:
    """The median heuristic 1 / median(|x_i - x_j|^2) over pairs of a random subsample of rows.

    Take it once for an encoder, from its own reference corpus, and keep it in the dock:
    specifications made with different gamma cannot be compared. ValueError for fewer than two rows,
    and when half of the pairs or more coincide or are not finite.
    """
    if len(x) < 2:
        raise ValueError(f"median_gamma: got {len(x)} row(s); want at least 2 to have a distance.")
    rows = jax.random.choice(key, len(x), (min(max_rows, len(x)),), replace=False)
    sample = np.asarray(x[np.asarray(rows)], np.float64)
    sample = sample - sample.mean(0)
    square = (sample**2).sum(1)
    distances = square[:, None] + square - 2 * sample @ sample.T
    median = np.median(distances[np.triu_indices(len(sample), 1)])
    if not 1e-12 * square.mean() < median < np.inf:
        raise ValueError(
            f"median_gamma: got a median squared distance of {median:.3g}; want a positive number. "
            "Remove duplicate texts and rows that are not finite, or give gamma."
        )
    # A float32 number, so that float32 and float64 programs mean the same kernel.
    return float(np.float32(1 / median))
