"""Plans of memory against counts by hand and against XLA's own figures."""

import jax
import jax.numpy as jnp
import pytest
from fixtures import make_decoders

from configs import finetune as finetune_config
from experiments import finetune as experiment
from experiments import plan
from learnware_jax.slm import finetune
from learnware_jax.slm.weights import load_model, read_config

# Of a layer: queries and out, keys and values, feed-forward, norms, and biases where Qwen has them.
QWEN_7B_LAYER = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944 + 2 * 3584 + (3584 + 2 * 512)
LLAMA_8B_LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
QWEN_HALF_B_LAYER = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 2 * 896 + (896 + 2 * 128)
# Embedding, layers, last norm, and a head of its own but for the smallest.
QWEN_7B = 2 * 152_064 * 3584 + 28 * QWEN_7B_LAYER + 3584
LLAMA_8B = 2 * 128_256 * 4096 + 32 * LLAMA_8B_LAYER + 4096
QWEN_HALF_B = 151_936 * 896 + 24 * QWEN_HALF_B_LAYER + 896
# Of rank 16: inputs and outputs of queries, out, keys, values.
QWEN_7B_TRAINED = 28 * 16 * (4 * 3584 + 2 * (3584 + 512))
LLAMA_8B_TRAINED = 32 * 16 * (4 * 4096 + 2 * (4096 + 1024))
QWEN_HALF_B_TRAINED = 24 * 16 * (896 + 2 * 128)  # B of queries, keys, values


def planned(size="smoke", **changes):
    config = finetune_config.get_config(size)
    config.update(changes | {"plan": True})
    return config.lock()


def tiny(**changes):
    sizes = dict(
        model_type="llama",
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = dict(sizes=sizes, dtype="float32")
    return planned(**dict(model=model, dtype="float32", widths=(64,), batch=4) | changes)


@pytest.mark.parametrize(
    ("size", "parameters", "trained", "published"),
    [
        ("qwen2.5-7b", QWEN_7B, QWEN_7B_TRAINED, 7.62e9),
        ("llama3.1-8b", LLAMA_8B, LLAMA_8B_TRAINED, 8.03e9),
        ("qwen2.5-0.5b", QWEN_HALF_B, QWEN_HALF_B_TRAINED, 0.494e9),
    ],
)
def test_a_step_of_the_papers_fits_and_is_counted(size, parameters, trained, published, capsys):
    output = experiment.run(planned(size))
    assert (output["parameters"], output["trained"]) == (parameters, trained)
    assert parameters == pytest.approx(published, rel=1e-3)
    assert f"{parameters:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [8, 64])
def test_bytes_by_hand(rank):
    sizes = plan.run(planned("qwen2.5-7b", lora={"rank": rank}))["bytes"]
    # Two bytes a number, and four where it is of a norm or a bias.
    small = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    assert sizes["parameters"] == 2 * QWEN_7B + 2 * small
    trained = QWEN_7B_TRAINED * rank // 16
    assert sizes["adapters"] == 4 * trained + 4  # the scale
    assert sizes["gradients"] == 4 * trained
    # Two moments, and the steps done, counted once for Adam and once for the rate.
    assert sizes["optimiser"] == 8 * trained + 8
    # The residual stream of 16 rows before every layer, and not much else.
    stream = 16 * 2048 * 3584 * 4
    assert 28 * stream <= sizes["kept"] < 33 * stream
    assert sizes["logits"] == 2 * 4 * finetune.CHUNK * 152_064
    assert sizes["layer_weights"] == sizes["head_weights"] == 0


def test_two_devices_halve_what_is_cut():
    one, two, four = (
        plan.run(planned("llama3.1-8b", devices=n, sharding=how))["bytes"]
        for n, how in ((1, "full"), (2, "full"), (4, "data"))
    )
    halved = ("parameters", "kept", "layer", "logits", "batch")
    assert all(one[part] == 2 * two[part] for part in halved)
    assert all(one[part] == two[part] for part in ("adapters", "optimiser", "gradients"))
    # A layer and the head are gathered whole.
    assert two["layer_weights"] == 2 * LLAMA_8B_LAYER + 2 * 2 * 4096
    assert two["head_weights"] == 2 * 4096 * 128_256
    assert four["parameters"] == one["parameters"] and 4 * four["kept"] == one["kept"]


def test_devices_needed_are_the_fewest_that_hold_it():
    output = plan.run(planned("llama3.1-8b", devices=1))
    for card, devices in output["devices_needed"].items():
        totals = [
            plan.run(planned("llama3.1-8b", devices=n))["bytes"]["total"]
            for n in (devices, max(1, devices // 2))
        ]
        assert totals[0] <= plan.USABLE * card * 2**30
        assert devices == 1 or totals[1] > plan.USABLE * card * 2**30
    alone = plan.run(planned("llama3.1-8b", sharding="none"))["devices_needed"]
    assert alone[16] is None


@pytest.mark.parametrize("remat", [False, True])
def test_total_is_within_a_factor_of_two_of_xla(remat):
    config = tiny(remat=remat, together=2, accumulate=2)
    settings, model = experiment.settings_of(config), read_config(config.model.sizes.to_dict())
    traced = plan.trace(model, settings, config)
    rates = jax.ShapeDtypeStruct((2,), jnp.float32)
    lowered = finetune.step.lower(
        traced.state, traced.batch, rates, traced.params, config=model, settings=settings
    )
    found = lowered.compile().memory_analysis()
    wanted = found.temp_size_in_bytes + found.argument_size_in_bytes
    total = plan.run(config)["bytes"]["total"]
    assert wanted / 2 < total < wanted * 2


def test_remat_keeps_less_and_more_adapters_take_more():
    kept, remade, two = (
        plan.run(tiny(remat=remat, together=n))["bytes"]
        for remat, n in ((False, 1), (True, 1), (True, 2))
    )
    assert remade["kept"] < kept["kept"] / 4 and remade["layer"] > kept["layer"]
    assert two["kept"] == 2 * remade["kept"] and two["parameters"] == remade["parameters"]


def test_parameters_have_the_types_of_loaded_ones():
    for family in make_decoders.MODELS:
        model = load_model(make_decoders.FOLDER / family, dtype="bfloat16")
        expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        assert plan.abstract_params(model.config, "bfloat16") == expected


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_without_sizes_the_model_is_opened(family):
    folder = make_decoders.FOLDER / family
    output = plan.run(planned(model=dict(name=str(folder)), widths=(32,)))
    assert output["parameters"] == plan.count(load_model(folder).params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sharding="full", devices=3), "batch=4 in 1 parts is 4 rows, which do not divide"),
        (dict(sharding="data", devices=4, accumulate=2), "set batch to a multiple of 8"),
        (dict(devices=2), "devices=2 with sharding='none', which uses one"),
        (dict(sharding="fully"), "sharding='fully'"),
        (dict(together=0), "together=0"),
        (dict(widths=(64, 4096)), "widths go up to 4096 tokens, the model takes 2048"),
        (dict(accumulate=3), "accumulate=3"),
        (dict(lora=dict(rank=0)), "rank=0"),
        (dict(model=dict(dtype="float8")), "dtype='float8'"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    config = tiny()
    with config.unlocked():
        config.update(changes)
    with pytest.raises(ValueError, match=message):
        plan.run(config)
