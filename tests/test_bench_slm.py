"""The benchmark of language models at its smoke size, and the torch model that it compares with."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_decoders
from numpy.testing import assert_allclose

from configs import bench_slm as bench_slm_config
from experiments import bench_slm
from learnware_jax.slm.weights import load_model


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    config = bench_slm_config.get_config("smoke").lock()
    config.workdir = str(tmp_path_factory.mktemp("bench"))
    found = bench_slm.run(config)
    assert json.loads((Path(config.workdir) / "results.json").read_text()) == found
    return found


def test_every_piece_of_work_is_measured(output):
    ours = {(row["work"], row["way"]) for row in output["rows"] if not row["torch_threads"]}
    assert ours == {
        (work, way)
        for work, ways in {
            "LoRA step, 2 x 16": ("ours float32", "ours bfloat16"),
            "forward, 2 x 16": ("ours float32", "ours bfloat16"),
            "decoding, batch 2": ("ours float32", "ours bfloat16"),
            "3 adapters, 2 x 16 each, float32": ("in one step", "one after another"),
            "2 choices": ("after one prompt", "each after its own prompt"),
        }.items()
        for way in ways
    }
    tokens = {row["work"]: row["tokens"] for row in output["rows"]}
    assert list(tokens.values()) == [2 * 16, 2 * 16, 2 * 6, 3 * 2 * 16, 4 * (16 + 2 * 3)]


def test_numbers_follow_from_the_times(output):
    rows = {(row["work"], row["way"]): row for row in output["rows"]}
    for row in rows.values():
        rates = row["tokens"] / np.array(row["seconds"])
        assert len(rates) == 3
        assert row["tokens_per_second"]["median"] == pytest.approx(np.median(rates))
        assert row["tokens_per_second"]["low"] == rates.min()
        if "fraction_of_product" in row:
            assert row["fraction_of_product"]["low"] > 0
    assert len(output["ratios"]) >= 5
    for ratio in output["ratios"]:
        of, to = (np.array(rows[ratio["work"], ratio[side]]["seconds"]) for side in ("of", "to"))
        assert ratio["times_as_fast"]["median"] == pytest.approx(np.median(to / of))


def test_all_ways_do_the_same_work(output):
    checks = output["checks"]
    losses = {
        when: [value for name, value in checks.items() if name.startswith(when)]
        for when in ("loss at first", "loss after 3 steps")
    }
    assert len(losses["loss at first"]) >= 2
    for values in losses.values():
        assert_allclose(values, values[0], rtol=2e-3)
    # Untrained adapters and trained ones differ by more than the types of operands do.
    assert losses["loss at first"][0] - losses["loss after 3 steps"][0] > 0.02
    assert checks["difference of the last mean losses, float32"] < 1e-4
    assert checks["greatest difference in nats, 2 choices"] < 1e-3
    assert 0 < checks["greatest difference of logits, ours bfloat16"] < 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tensors_are_those_of_the_file(family):
    import safetensors.numpy

    folder = make_decoders.FOLDER / family
    model = load_model(folder)
    wanted = safetensors.numpy.load_file(folder / "model.safetensors")
    found = bench_slm.state_dict(model.params, model.config)
    if model.config.tied:
        assert_allclose(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert_allclose(found[name], array, err_msg=name)


def test_matrices_are_counted_once_a_token():
    model = load_model(make_decoders.FOLDER / "qwen2")  # 3 layers; its head is the embedding
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert bench_slm.matrix_numbers(model.params, model.config) == 3 * layer + 96 * 32
    model = load_model(make_decoders.FOLDER / "llama")
    assert bench_slm.matrix_numbers(model.params, model.config) == 2 * layer + 96 * 32


def test_torch_has_the_same_logits():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    params, model = bench_slm.opened(bench_slm_config.get_config("smoke"))
    ids = np.random.default_rng(0).integers(0, model.vocabulary, (2, 20))
    ours = bench_slm.scores(params, jnp.asarray(ids), config=model, dtype="float32")
    with torch.no_grad():
        theirs = bench_slm.torch_model(params, model)(torch.from_numpy(ids)).logits.numpy()
    assert_allclose(ours, theirs, atol=5e-5)
    with pytest.raises(ValueError, match="only a plain Llama"):
        bench_slm.torch_model(params, model._replace(qk_norm=True))
