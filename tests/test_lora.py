"""Low-rank adapters against merged matrices and PEFT; files of PEFT, whole and damaged."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_peft
from numpy.testing import assert_allclose, assert_array_equal
from tiny import CONFIG

from learnware_jax.slm import finetune, lora
from learnware_jax.slm.decoder import Adapter, forward, init_params, logits, param_shapes
from learnware_jax.slm.weights import load_model

IDS = np.random.default_rng(0).integers(0, 97, (3, 12))
ALL = tuple(lora.IN_FILE)
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG, scale=0.3)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def score(params, ids, adapter=None, *, config=CONFIG, dtype="float32"):
    hidden, _ = forward(params, ids, config=config, adapter=adapter, dtype=dtype)
    return logits(params, hidden, config=config, dtype=dtype)


def adapter(rank=3, alpha=6.0, targets=ALL, seed=0):
    """One that changes something."""
    rng, a, b = np.random.default_rng(seed), {}, {}
    for name in targets:
        layers, inputs, outputs = param_shapes(CONFIG)["layers"][name]["kernel"].shape
        a[name] = jnp.asarray(rng.normal(size=(layers, inputs, rank)) / 6, jnp.float32)
        b[name] = jnp.asarray(rng.normal(size=(layers, rank, outputs)) / 8, jnp.float32)
    return Adapter(a, b, jnp.float32(alpha / rank))


def init(rank=4, alpha=8.0, targets=("query",)):
    return lora.init_adapter(jax.random.key(0), CONFIG, rank=rank, alpha=alpha, targets=targets)


def assert_equal_trees(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


def assert_close(found, wanted):
    assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_new_adapter_changes_nothing(params):
    made = lora.init_adapter(jax.random.key(1), CONFIG, rank=3, alpha=6.0, targets=ALL)
    assert all(np.abs(a).min() > 0 for a in made.a.values())
    assert_array_equal(score(params, IDS, made), score(params, IDS))
    assert_equal_trees(lora.merge(params, made), params)


def test_a_is_uniform_and_depends_on_key_and_module_alone():
    make = functools.partial(lora.init_adapter, config=CONFIG, rank=50, alpha=8.0)
    made, some = (make(jax.random.key(1), targets=targets) for targets in (ALL, ("up", "query")))
    assert some.a.keys() == some.b.keys() == {"query", "up"}
    for name in some.a:
        assert_array_equal(some.a[name], made.a[name])
    # Every two of these have one shape, and would be one if the module or the key did not count.
    assert np.abs(made.a["gate"] - made.a["up"]).max() > 0.1
    assert np.abs(made.a["key"] - made.a["value"]).max() > 0.1
    assert np.abs(make(jax.random.key(2)).a["query"] - made.a["query"]).max() > 0.1
    for name, inputs in (("query", 32), ("down", 48)):
        a = np.asarray(made.a[name])
        assert a.shape == (2, inputs, 50)
        bound = inputs**-0.5
        assert 0.99 * bound < np.abs(a).max() <= bound
        assert_allclose(a.var(), bound**2 / 3, rtol=0.05)
        assert np.abs(a[0] - a[1]).max() > 0.1  # layers have numbers of their own
    assert made.scale == np.float32(8 / 50)


def test_forward_equals_merged_parameters(params):
    changed = adapter()
    wanted = score(lora.merge(params, changed), IDS)
    assert_close(score(params, IDS, changed), wanted)
    assert np.abs(wanted - score(params, IDS)).max() > 1


def test_merge_is_w_plus_scale_a_b(params):
    changed = adapter(rank=2, alpha=5.0, targets=("down",))
    a, b = np.asarray(changed.a["down"], float), np.asarray(changed.b["down"], float)
    merged = lora.merge(params, changed)
    kernel = np.asarray(params["layers"]["down"]["kernel"])
    assert_allclose(merged["layers"]["down"]["kernel"], kernel + 2.5 * a @ b, atol=1e-6)
    merged["layers"]["down"] = params["layers"]["down"]
    assert_equal_trees(merged, params)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_unmerge_undoes_merge(params, dtype, tolerance):
    before = jax.tree.map(lambda x: x.astype(dtype), params)
    copy = jax.tree.map(np.array, before)
    changed = adapter()
    merged = lora.merge(before, changed)
    after = lora.unmerge(merged, changed)
    assert_equal_trees(jax.tree.map(np.array, before), copy)  # the argument is as it was
    for name in ALL:
        kernel, middle, back = (x["layers"][name]["kernel"] for x in (before, merged, after))
        assert back.dtype == kernel.dtype == middle.dtype
        kernel, middle, back = (np.asarray(x, np.float32) for x in (kernel, middle, back))
        assert np.abs(middle - kernel).max() > 0.1
        assert_allclose(back, kernel, rtol=0, atol=tolerance * np.abs(middle).max())


def test_a_stack_is_its_adapters(params):
    each = [adapter(seed=seed, alpha=3.0 + seed) for seed in range(3)]
    together = lora.stack(each)
    assert together.a["query"].shape == (3, 2, 32, 3) and together.scale.shape == (3,)
    found = jax.vmap(score, (None, None, 0))(params, IDS, together)
    for scores, one in zip(found, each, strict=True):
        assert_close(scores, score(params, IDS, one))


def test_padding_changes_nothing_and_lets_adapters_be_stacked(params):
    like, small = adapter(), adapter(rank=2, alpha=7.0, targets=("value", "gate"), seed=1)
    padded = lora.pad(small, like)
    together = lora.stack([like, padded, like])
    found = jax.vmap(score, (None, None, 0))(params, IDS, together)
    for scores, one in zip(found, (like, small, like), strict=True):
        assert_close(scores, score(params, IDS, one))
    # Its files keep the scale, although alpha / rank is of another rank.
    files = lora.to_peft(padded, base="tiny", dtype="float32")
    assert_equal_trees(lora.from_peft(files, CONFIG), padded)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lora.stack([]), "stack: got no adapters"),
        (lambda: lora.stack([adapter(), adapter(rank=2)]), "stack: adapter 1 has the shapes"),
        (lambda: lora.stack([adapter(), adapter(targets=["up"])]), r"one set of targets \(see `pa"),
        (lambda: lora.pad(adapter(), adapter(targets=["up"])), "pad: down, gate, key, out, query"),
        (
            lambda: lora.pad(adapter(rank=4), adapter()),
            "pad: the adapter has rank 4, that to be like only 3",
        ),
        (lambda: init(rank=0), "init_adapter: got rank=0, alpha=8.0; want a rank of at least 1"),
        (lambda: init(alpha=0.0), "alpha=0.0; want .* a positive alpha"),
        (lambda: init(alpha=float("nan")), "alpha=nan"),
        (lambda: init(alpha=float("inf")), "alpha=inf"),
        (lambda: init(targets=("q_proj",)), r"got targets=\('q_proj',\); want some of query, "),
        (lambda: init(targets=()), r"got targets=\(\)"),
    ],
)
def test_adapters_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rank, alpha", [(3, 10.0), (8, 16.0), (7, 0.3)])
def test_files_keep_float32_exactly(rank, alpha):
    changed = adapter(rank=rank, alpha=alpha, targets=("out", "query", "up"))
    files = lora.to_peft(changed, base="some/model", dtype="float32", note={"template": "plain"})
    assert_equal_trees(lora.from_peft(files, CONFIG), changed)
    settings = json.loads(files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "some/model"
    assert settings["target_modules"] == ["o_proj", "q_proj", "up_proj"]
    assert settings["r"] == rank and settings["lora_alpha"] == pytest.approx(alpha, rel=1e-7)
    assert settings["learnware_jax"] == {"template": "plain"}
    tensors = safetensors.numpy.load(files["adapter_model.safetensors"])
    assert len(tensors) == 2 * 2 * 3
    assert_array_equal(tensors[Q_A], changed.a["query"][0].T)
    assert "learnware_jax" not in json.loads(
        lora.to_peft(changed, base="", dtype="float32")["adapter_config.json"]
    )


def test_files_in_bfloat16_round_once():
    changed = adapter()
    files = lora.to_peft(changed, base="tiny")
    found = lora.from_peft(files, CONFIG)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), changed)
    assert_equal_trees(found, rounded._replace(scale=changed.scale))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(changed), strict=True):
        assert_allclose(a, b, rtol=2**-8, atol=0)
    assert np.abs(found.a["up"] - changed.a["up"]).max() > 0
    stored = dict(safetensors.deserialize(files[lora.WEIGHTS_FILE]))
    assert {view["dtype"] for view in stored.values()} == {"BF16"}
    assert lora.to_peft(found, base="tiny") == files  # and then no more


def test_float16_and_other_settings_are_read():
    changed = adapter(rank=4, alpha=6.0)
    files = lora.to_peft(changed, base="tiny", dtype="float16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), changed)
    assert_equal_trees(lora.from_peft(files, CONFIG), rounded)
    files = edit(files, use_rslora=True, bias=None, rank_pattern=None, unheard_of=3)
    assert lora.from_peft(files, CONFIG).scale == 3  # 6 / sqrt(4)
    needed = ("r", "lora_alpha", "target_modules")
    settings = {name: json.loads(files["adapter_config.json"])[name] for name in needed}
    least = files | {"adapter_config.json": json.dumps(settings).encode()}
    assert_equal_trees(lora.from_peft(least, CONFIG), rounded)


@functools.cache
def whole():
    return lora.to_peft(adapter(), base="tiny", dtype="float32")


def edit(files, **changes):
    settings = json.loads(files["adapter_config.json"]) | changes
    return files | {"adapter_config.json": json.dumps(settings).encode()}


def swap(files, change):
    tensors = safetensors.numpy.load(files["adapter_model.safetensors"])
    change(tensors)
    return files | {"adapter_model.safetensors": safetensors.numpy.save(tensors)}


def broken(change):
    """A change of the tensors' file, as a change of both files."""
    return lambda files: swap(files, change)


def cut(name, count):
    return lambda files: files | {name: files[name][:count]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: edit(files, use_dora=True), r"\{'use_dora': True\} is not supported"),
        (lambda files: edit(files, bias="all"), r"\{'bias': 'all'\} is not supported"),
        (lambda files: edit(files, modules_to_save=["lm_head"]), "'modules_to_save'.*Merge the ad"),
        (lambda files: edit(files, rank_pattern={"q_proj": 8}), "'rank_pattern': {'q_proj': 8}"),
        (lambda files: edit(files, alpha_pattern={"q_proj": 8}), "'alpha_pattern'"),
        (lambda files: edit(files, peft_type="IA3"), "'peft_type': 'IA3'"),
        (lambda files: edit(files, fan_in_fan_out=True), "'fan_in_fan_out': True"),
        (lambda files: edit(files, layers_to_transform=[0]), "'layers_to_transform'"),
        (lambda files: edit(files, trainable_token_indices=[3]), "'trainable_token_indices'"),
        (lambda files: edit(files, layer_replication=[[0, 2]]), "'layer_replication'"),
        (lambda files: edit(files, use_qalora=True), "'use_qalora'"),
        (lambda files: edit(files, lora_bias=True), "'lora_bias'"),
        (lambda files: edit(files, alora_invocation_tokens=[1]), "'alora_invocation_tokens'"),
        (lambda files: edit(files, use_bdlora={}), "'use_bdlora'"),
        (lambda files: edit(files, kasa_config={}), "'kasa_config'"),
        (lambda files: edit(files, target_modules="all-linear"), "target_modules is 'all-linear'"),
        (lambda files: edit(files, target_modules=[]), r"target_modules is \[\]; want a list"),
        (lambda files: edit(files, target_modules=["c_attn"]), "some of q_proj, k_proj, v_proj"),
        (lambda files: edit(files, target_modules=[["q_proj"]]), "target_modules is "),
        (lambda files: edit(files, r="four"), "r=.four., "),
        (lambda files: edit(files, r=2.9), "r=2.9, .*a whole number"),
        (lambda files: edit(files, lora_alpha=1e300), "lora_alpha=1e"),
        (lambda files: edit(files, init_lora_weights="pissa"), "pissa"),
        (lambda files: edit(files, r=None), "r=None"),
        (lambda files: edit(files, r=0), "r=0"),
        (lambda files: edit(files, r=float("inf")), "r is inf"),
        (lambda files: edit(files, lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda files: edit(files, lora_alpha=float("inf")), "lora_alpha is inf"),
        (lambda files: files | {"adapter_config.json": b"[1]"}, "adapter_config.json is no conf"),
        (lambda files: files | {"adapter_config.json": b"\xff{}"}, "adapter_config.json is no con"),
        (lambda files: files | {"adapter_config.json": b"{}"}, "KeyError.*'r'"),
        (cut("adapter_config.json", 100), "adapter_config.json is no configuration of LoRA"),
        (cut("adapter_model.safetensors", 3), "adapter_model.safetensors is no whole safetensors"),
        (cut("adapter_model.safetensors", 900), "adapter_model.safetensors is no whole safetens"),
        (cut("adapter_model.safetensors", -4), "adapter_model.safetensors is no whole safetenso"),
        (lambda files: {}, "adapter_config.json and adapter_model.safetensors is not there"),
        (lambda files: {n: files[n] for n in files if "model" not in n}, "adapter_model.safetens"),
        (broken(lambda tensors: tensors.pop(Q_A)), f"does not fit the model: {Q_A} is missing"),
        (broken(lambda tensors: tensors.update(x=np.ones(1, np.float32))), "x has no use"),
        (
            broken(lambda tensors: tensors.update({Q_A: tensors[Q_A].T.copy()})),
            rf"{Q_A} is \(32, 3\), not \(3, 32\)",
        ),
        (
            broken(lambda tensors: tensors.update({Q_A: np.full((3, 32), np.nan, np.float32)})),
            f"{Q_A} holds numbers that are not finite",
        ),
        (
            broken(lambda tensors: tensors.update({Q_A: np.full((3, 32), np.inf, np.float16)})),
            "numbers that are not finite",
        ),
        (
            broken(lambda tensors: tensors.update({Q_A: tensors[Q_A].astype(np.float64)})),
            f"{Q_A} is of type F64; want F32, F16, BF16",
        ),
        (
            broken(lambda tensors: tensors.update({Q_A: tensors[Q_A].astype(np.int32)})),
            f"{Q_A} is of type I32",
        ),
        (lambda files: edit(files, r=2), "and 24 more"),  # of 28
        (lambda files: edit(files, target_modules=["q_proj"]), "has no use.*and 20 more"),
    ],
)
def test_what_is_no_plain_adapter_of_the_model_is_refused(change, message):
    files = change(whole())
    with pytest.raises(ValueError, match=f"(?s)from_peft: .*{message}"):
        lora.from_peft(files, CONFIG)


def test_an_adapter_of_another_model_is_refused():
    files = lora.to_peft(adapter(), base="tiny")
    for other in (CONFIG._replace(layers=3), CONFIG._replace(kv_heads=4)):
        with pytest.raises(ValueError, match="does not fit the model"):
            lora.from_peft(files, other)


@pytest.fixture(scope="module")
def reference():
    """A tiny Llama, the files of PEFT's adapter for it, and what torch makes of them."""
    files = {
        name: (make_peft.FOLDER / name).read_bytes()
        for name in (lora.CONFIG_FILE, lora.WEIGHTS_FILE)
    }
    return load_model(make_peft.MODEL), files, np.load(make_peft.FOLDER / "reference.npz")


def test_logits_equal_those_of_peft(reference):
    model, files, stored = reference
    read = lora.from_peft(files, model.config)
    assert set(read.a) == {"query", "key", "value", "out"} and read.scale == 2
    found = score(model.params, stored["ids"], read, config=model.config)
    assert_allclose(found, stored["logits"], rtol=0, atol=1e-4)
    assert np.abs(found - score(model.params, stored["ids"], config=model.config)).max() > 1


@pytest.mark.parametrize("train", make_peft.RUNS)
def test_ten_steps_equal_those_of_torch_and_peft(reference, train):
    """Losses before every step, and norms of gradients, of ten different batches."""
    model, files, stored = reference
    rate, decay = make_peft.RUNS[train]
    settings = finetune.Settings(
        steps=make_peft.STEPS,
        batch=make_peft.ROWS,
        warmup=make_peft.WARMUP / make_peft.STEPS,
        final=make_peft.FINAL,
        clip=make_peft.CLIP,
        decay=decay,
        train=train,
        accumulate=1,
        widths=(make_peft.WIDTH,),
        dtype="float32",
        remat=False,
    )
    state = finetune.init_state(lora.from_peft(files, model.config), settings)
    losses, norms = [], []
    for rows in zip(stored["batches"], stored["lengths"], stored["first"], strict=True):
        texts = [
            finetune.Text(ids[:length], first) for ids, length, first in zip(*rows, strict=True)
        ]
        batch = finetune.make_batch([texts], settings)
        # One shape for all: columns of no weight are padding.
        learned = ((0, 0),) * 3 + ((0, make_peft.WIDTH - batch.at.shape[-1]),)
        batch = finetune.Batch(batch.ids, *(np.pad(x, learned) for x in batch[1:]))
        batch = jax.tree.map(lambda x: x[0], batch)
        state, metrics = finetune.step(
            state, batch, jnp.float32(rate), model.params, config=model.config, settings=settings
        )
        losses.append(metrics.loss)
        norms.append(metrics.norm)
    assert_allclose(losses, stored[f"losses_{train}"], rtol=0, atol=1e-4)
    assert_allclose(norms, stored[f"norms_{train}"], rtol=1e-3)
    assert min(norms) > make_peft.CLIP  # so that clipping is seen


def test_live_peft_reads_what_is_written(reference, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    model, files, stored = reference
    read = lora.from_peft(files, model.config)
    wide = lora.init_adapter(
        jax.random.key(3), model.config, rank=6, alpha=9.0, targets=("down", "gate", "query")
    )
    rng = np.random.default_rng(1)
    wide = wide._replace(
        b={n: jnp.asarray(rng.normal(size=x.shape) / 8, jnp.float32) for n, x in wide.b.items()}
    )
    for i, written in enumerate((read, wide)):
        for dtype in ("float32", "bfloat16"):
            home = tmp_path / f"{i}{dtype}"
            home.mkdir()
            made = lora.to_peft(written, base="tiny", dtype=dtype, note={"template": "plain"})
            for name, content in made.items():
                (home / name).write_bytes(content)
            base = transformers.LlamaForCausalLM.from_pretrained(
                make_peft.MODEL, dtype=torch.float32
            )
            theirs = peft.PeftModel.from_pretrained(base, home).eval()
            with torch.no_grad():
                wanted = theirs(torch.tensor(stored["ids"]).long()).logits.numpy()
            rounded = lora.from_peft(made, model.config)
            found = score(model.params, stored["ids"], rounded, config=model.config)
            assert_allclose(found, wanted, rtol=0, atol=1e-4)
            assert np.abs(wanted - stored["logits"]).max() > (0.1 if i else -1)
