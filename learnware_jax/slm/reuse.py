"""From selected learnwares to answers: four ways of using them, with one signature.

These choose among given answers. Where a model writes its own, `weighted_sum` makes the merged
model, and the written answers are picked as `route` picks scores.

Call `way(score, adapters, weights, witness)`; it returns the scores (n, c) of n items.

score     adapters (a stack) -> (k, n, c): log-likelihoods of c choices by each adapter
adapters  a stack of the k selected adapters
weights   (k,) at least 0, summing to one: those of the mixture of their specifications
witness   (k, n): mu_k(x) at every item, the witness function of each selected specification
          against nothing (Gretton et al. 2012, section 2.3, with q = 0)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from learnware_jax.slm.decoder import Adapter

Score = Callable[[Adapter], Float[np.ndarray, "k n c"]]


def select(score: Score, adapters: Adapter, weights, witness) -> Float[np.ndarray, "n c"]:
    """The scores of the adapter with the greatest weight."""
    first = int(np.argmax(weights))
    return score(jax.tree.map(lambda leaf: leaf[first : first + 1], adapters))[0]


def merge(score: Score, adapters: Adapter, weights, witness) -> Float[np.ndarray, "n c"]:
    """The scores of one adapter whose change is the weighted sum of theirs."""
    return score(jax.tree.map(lambda leaf: leaf[None], weighted_sum(adapters, weights)))[0]


def route(score: Score, adapters: Adapter, weights, witness) -> Float[np.ndarray, "n c"]:
    """For every item the scores of the adapter whose specification has most mass there."""
    return score(adapters)[np.argmax(witness, axis=0), np.arange(witness.shape[1])]


def average(score: Score, adapters: Adapter, weights, witness) -> Float[np.ndarray, "n c"]:
    """Weighted means of the log-probabilities among the choices."""
    each = log_softmax(score(adapters), axis=-1)
    absent = np.isneginf(each).all(0)
    mean = np.einsum("k,knc->nc", np.asarray(weights), np.where(absent, 0, each))
    return np.where(absent, -np.inf, mean)


WAYS = {"selected": select, "merged": merge, "routed": route, "averaged": average}


def weighted_sum(adapters: Adapter, weights: Float[np.ndarray, " k"]) -> Adapter:
    """One adapter whose change of the model is the weighted sum of those of a stack, exactly.

    Its rank is the sum of their ranks: the A side by side, the B scaled and one below the other.
    """
    factor = jnp.asarray(weights, jnp.float32) * adapters.scale

    def beside(a):  # (k, layers, in, rank) -> (layers, in, k rank)
        return jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1)

    def below(b):  # (k, layers, rank, out) -> (layers, k rank, out)
        b = factor[:, None, None, None] * b
        return jnp.moveaxis(b, 0, 1).reshape(b.shape[1], -1, b.shape[3])

    return Adapter(
        {name: beside(a) for name, a in adapters.a.items()},
        {name: below(b) for name, b in adapters.b.items()},
        jnp.float32(1),
    )
