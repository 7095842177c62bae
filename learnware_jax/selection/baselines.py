"""What a ranking by specifications has to beat."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from learnware_jax.specification.rkme import RKME


def mean_cosine(users: Sequence[RKME], learnwares: Sequence[RKME]) -> Float[np.ndarray, "q M"]:
    """Cosine of mean embeddings, centred by the mean over the learnwares; higher is closer.

    The linear kernel's ranking, up to norms: on topics of sentence embeddings it is hard to beat.
    A mean that coincides with the centre has no direction; its cosines are 0.
    """

    def means(specs):
        return np.stack([np.asarray(s.beta, np.float64) @ np.asarray(s.z) for s in specs])

    pool = means(learnwares)
    center = pool.mean(0)
    rounding = 1e-12 * np.abs(pool).max()

    def directions(rows):
        rows = rows - center
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > rounding, norms, np.inf)

    return directions(means(users)) @ directions(pool).T
