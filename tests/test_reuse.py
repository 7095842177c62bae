"""slm.reuse: four ways of using selected learnwares, against what they must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from tiny import CONFIG

from learnware_jax.slm import lora, reuse
from learnware_jax.slm.decoder import forward, init_params

SCORES = np.log(
    np.array(
        [
            [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]],
            [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]],
            [[0.1, 0.7, 0.2], [0.6, 0.2, 0.2]],
        ]
    )
)
WITNESS = np.array([[0.1, 0.9], [0.5, 0.2], [0.4, 0.3]])


def adapters(scales=(2.0, 2.0, 2.0)):
    made = []
    for i, scale in enumerate(scales):
        adapter = lora.init_adapter(jax.random.key(i), CONFIG, rank=2, alpha=2 * scale)
        b = {
            name: 0.3 * jax.random.normal(jax.random.key(10 + i), leaf.shape)
            for name, leaf in adapter.b.items()
        }
        made.append(adapter._replace(b=b))
    return lora.stack(made)


def identify(stack):
    """Scores that tell which adapter of `adapters()` each member of the stack is."""
    known = adapters()
    which = [
        next(k for k in range(3) if (known.b["query"][k] == b).all()) for b in stack.b["query"]
    ]
    return SCORES[which]


def test_selected_is_the_adapter_with_the_greatest_weight():
    got = reuse.select(identify, adapters(), np.array([0.2, 0.5, 0.3]), WITNESS)
    np.testing.assert_array_equal(got, SCORES[1])


def test_every_item_goes_to_the_specification_with_most_mass_there():
    got = reuse.route(identify, adapters(), np.array([1.0, 0, 0]), WITNESS)
    np.testing.assert_array_equal(got, [SCORES[1, 0], SCORES[0, 1]])


def test_averaged_log_probabilities_by_hand():
    # One item, two choices: p = (.5, .5) and (.8, .2) at weights 1/4 and 3/4.
    scores = np.log([[[0.5, 0.5]], [[0.8, 0.2]]]) + 3.0  # unnormalised
    got = reuse.average(lambda _: scores, adapters(), np.array([0.25, 0.75]), WITNESS)
    want = [[0.25 * np.log(0.5) + 0.75 * np.log(p) for p in (0.8, 0.2)]]
    np.testing.assert_allclose(got, want)


def test_averaging_leaves_choices_that_are_not_there_out():
    scores = np.array([[[0.0, -1.0, -np.inf], [0.5, 0.1, 0.2]]] * 2)
    got = reuse.average(lambda _: scores, adapters(), np.array([0.5, 0.5]), WITNESS)
    np.testing.assert_allclose(got[0, :2], log_softmax([0.0, -1.0]))
    assert got[0, 2] == -np.inf and np.isfinite(got[1]).all()
    # An adapter without weight has no say, and its log of 0 does no harm.
    alone = reuse.average(lambda _: scores, adapters(), np.array([0.0, 1.0]), WITNESS)
    np.testing.assert_allclose(alone[0, :2], log_softmax([0.0, -1.0]))
    assert alone[0, 2] == -np.inf


def test_a_merged_adapter_changes_the_model_by_the_weighted_sum():
    stack, weights = adapters(scales=(1.0, 2.0, 0.5)), np.array([0.5, 0.3, 0.2])
    merged = reuse.weighted_sum(stack, weights)
    assert merged.a["query"].shape == (2, 32, 6)
    for name in stack.a:
        want = sum(
            w * float(s) * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
            for w, s, a, b in zip(weights, stack.scale, stack.a[name], stack.b[name], strict=True)
        )
        got = merged.scale * jnp.matmul(merged.a[name], merged.b[name], precision="highest")
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_all_weight_on_one_merges_to_that_one_in_the_model():
    params = init_params(jax.random.key(0), CONFIG, scale=0.3)
    ids = jax.random.randint(jax.random.key(1), (2, 7), 0, CONFIG.vocabulary)
    stack = adapters()
    alone = jax.tree.map(lambda leaf: leaf[1], stack)
    want, _ = forward(params, ids, config=CONFIG, adapter=alone)

    def hidden(stack):
        merged = jax.tree.map(lambda leaf: leaf[0], stack)
        return np.asarray(forward(params, ids, config=CONFIG, adapter=merged)[0])[:1]

    got = reuse.merge(hidden, stack, np.array([0.0, 1.0, 0.0]), WITNESS)
    want = np.asarray(want)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    base, _ = forward(params, ids, config=CONFIG)
    assert np.abs(want - base[0]).max() > 0.1


@pytest.mark.parametrize("way", reuse.WAYS)
def test_one_learnware_is_used_as_it_is_by_every_way(way):
    one = jax.tree.map(lambda leaf: leaf[:1], adapters())
    got = reuse.WAYS[way](lambda _: SCORES[:1], one, np.ones(1), WITNESS[:1])
    np.testing.assert_allclose(got, SCORES[0], atol=1e-12)
