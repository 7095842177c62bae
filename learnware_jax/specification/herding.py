"""Kernel herding: samples that follow an embedding, drawn without touching the embedding.

Welling, ICML 2009; Chen, Welling and Smola, UAI 2010.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Real

from learnware_jax.specification.kernels import Kernel, gram, mean_embedding
from learnware_jax.specification.rkme import RKME, check_rkme, check_rows, on_sphere


@partial(jax.jit, static_argnames="count")
def herd_indices(
    kernel: Kernel, c: Float[Array, " n"], candidates: Float[Array, "n d"], *, count: int
) -> Int[Array, " count"]:
    """Which candidates herding picks, in order and with repetition.

    At step t = 1, 2, ... the pick maximises t c(x) - sum_{s < t} k(x_s, x), where c(x) = mu(x) is
    the embedding to be followed, at the candidates.
    """

    def step(score, _):
        # score = t c - the sum over earlier picks.
        pick = jnp.argmax(score)
        row = gram(kernel, candidates[pick][None], candidates)[0]
        return score + c - row.astype(c.dtype), pick.astype(jnp.int32)

    return jax.lax.scan(step, c, None, length=count)[1]


def herd(
    key: PRNGKeyArray,
    spec: RKME,
    kernel: Kernel,
    count: int,
    *,
    candidates: Real[ArrayLike, "n d"] | None = None,
    candidates_per_sample: int = 100,
    spread: float = 0.25,
) -> Float[np.ndarray, "count d"]:
    """`count` rows whose mean embedding follows `spec`'s; `spec` is only read.

    Picks among `candidates` where given (say, rows of a public corpus). Otherwise among
    `candidates_per_sample * count` draws around the points of `spec`, chosen by weight: Gaussian
    noise whose expected length is `spread` times the median distance between points, put back on
    the unit sphere when the points lie on it. Signed weights are refused (ValueError).
    """
    check_rkme(spec, where="herd")
    if count < 1:
        raise ValueError(f"herd: got count={count}; want at least 1.")
    z = np.asarray(spec.z, np.float32)
    if candidates is None:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        weights = np.asarray(spec.beta, np.float64)
        total = candidates_per_sample * count
        centers = z[rng.choice(len(z), total, p=weights / weights.sum())]
        gaps = np.linalg.norm(z[:, None] - z[None], axis=-1)[np.triu_indices(len(z), 1)]
        scale = spread * (np.median(gaps) if len(gaps) else 1.0) / np.sqrt(z.shape[1])
        candidates = centers + scale * rng.standard_normal(centers.shape).astype(np.float32)
        if on_sphere(z):
            candidates = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    else:
        candidates = check_rows(candidates, where="herd: candidates")
        if candidates.shape[1] != z.shape[1]:
            raise ValueError(
                f"herd: got candidates of dimension {candidates.shape[1]} for a specification of "
                f"dimension {z.shape[1]}; embed both with one encoder."
            )
    candidates = jnp.asarray(candidates, jnp.float32)
    with jax.enable_x64(True):
        c = mean_embedding(kernel, candidates, jnp.asarray(z), jnp.asarray(spec.beta))
        picks = herd_indices(kernel, c, candidates, count=count)
    return np.asarray(candidates)[np.asarray(picks)]
