"""Decoders from files: Hugging Face folders (safetensors) and llama.cpp files (GGUF).

Nothing of a file is executed: chat templates are left alone (see `slm.prompts`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learnware_jax.slm import decoder
from learnware_jax.specification.header import parse_json, printable
from learnware_jax.specification.tensors import header_bytes, read_stored

DTYPES = ("float32", "bfloat16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 2**24
MAX_PARTS = 2**21  # of a GGUF file's settings, each an array; Llama 3 has half as many

# Names of our modules in the files; a layer's stand below `model.layers.N` or `blk.N`.
IN_FOLDER = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "norm_attention": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "norm_query": "self_attn.q_norm",
    "norm_key": "self_attn.k_norm",
    "norm_feedforward": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
IN_GGUF = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "norm_attention": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "norm_query": "attn_q_norm",
    "norm_key": "attn_k_norm",
    "norm_feedforward": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}

# Settings of a GGUF file that are sizes, and the greatest that is read.
GGUF_SIZES = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "context_length"), 2**31 - 1),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), 2**31 - 1),
    "attention.key_length": 2**31 - 1,
    "block_count": 1024,
}

# What transformers takes for a setting that config.json leaves out; None: derived from others.
DEFAULTS = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")  # what else they are follows from the others
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 1024

# The splitting of texts that goes with a name in `tokenizer.ggml.pre`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "smollm": None,  # digits one by one, then GPT-2's own expression
    "qwen2": WORDS.format(digits=""),
    "llama-bpe": WORDS.format(digits="{1,3}"),
}


class Model(NamedTuple):
    """A decoder read from files; the hashes are for headers."""

    params: Any  # decoder.Params
    config: decoder.Config
    tokenizer: Any  # of the tokenizers library; pads, cuts and adds nothing
    name: str
    weights_sha256: str  # of the file; of the sorted names and hashes as JSON where sharded
    tokenizer_sha256: str  # of tokenizer.json; of Tokenizer.to_str() where built from a GGUF file
    start: int | None  # token before a text, where the family puts one there
    end: int  # token that ends an answer


class Tensors(NamedTuple):
    """The tensors of one or more files: their shapes, and how to read one."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def load_model(path: str | Path, *, dtype: str = "float32") -> Model:
    """Read a model from a .gguf file, or from a folder.

    A folder holds config.json, tokenizer.json and model.safetensors (or
    model.safetensors.index.json and its shards), or else exactly one .gguf file. Matrices are kept
    in `dtype` ("float32" or "bfloat16"), norms and biases in float32. Raises FileNotFoundError if
    files are missing, ValueError if they are damaged, of a model that `decoder` has no form for, or
    if a parameter stays empty or a tensor unused (both listed).

    >>> from learnware_jax import fetch, load_model
    >>> model = load_model(fetch("SmolLM2-135M-Instruct"))
    >>> model.config.layers, model.config.width
    (30, 576)
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"load_model: got dtype={dtype!r}; want one of {', '.join(DTYPES)}.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"load_model: {path} is no .gguf file; name one, or the folder of a model."
            )
        return _load_gguf(path, dtype)
    if not path.is_dir():
        raise FileNotFoundError(f"load_model: there is no file or folder {path}.")
    weights = next((path / name for name in (SINGLE, INDEX) if (path / name).is_file()), None)
    needed = {name: (path / name).is_file() for name in ("config.json", "tokenizer.json")}
    if weights is not None and all(needed.values()):
        return _load_folder(path, weights, dtype)
    packed = sorted(path.glob("*.gguf"))
    if len(packed) == 1:
        return _load_gguf(packed[0], dtype)
    if packed:
        raise ValueError(
            f"load_model: {path} holds {len(packed)} .gguf files; name one: "
            f"{', '.join(file.name for file in packed)}."
        )
    missing = [name for name, there in needed.items() if not there]
    missing += [f"{SINGLE} (or {INDEX}, or one .gguf file)"] if weights is None else []
    raise FileNotFoundError(f"load_model: {path} lacks {', '.join(missing)}.")


def load_hub(repo_id: str, *, revision: str | None = None, dtype: str = "float32") -> Model:
    """Read model `OWNER/NAME` of the hub; its safetensors are kept in the hub's own cache."""
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise ValueError(f"load_hub: {repo_id!r} is no model name; wanted OWNER/NAME.")
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors", INDEX]
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=wanted
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"load_hub: {repo_id} could not be fetched: {type(error).__name__}: {error}"
        ) from None
    return load_model(folder, dtype=dtype)._replace(name=repo_id)


def read_config(settings: dict) -> decoder.Config:
    """The sizes of a llama, mistral, qwen2 or qwen3 from the settings in its config.json.

    Raises ValueError if a size is missing or if a setting asks for what `decoder` does not have.
    """
    family = settings.get("model_type")
    if family not in [*DEFAULTS]:
        raise ValueError(
            f"read_config: model_type is {family!r:.100}; only {', '.join(DEFAULTS)} can be read."
        )
    given = DEFAULTS[family] | settings
    wrong = [
        f"{key} is {given.get(key)!r:.100}, not a positive integer up to {most}"
        for key, most in (*((key, MAX_SIZE) for key in SIZES), ("num_hidden_layers", MAX_LAYERS))
        if not _is_size(given.get(key), most)
    ]
    wrong += [
        f"{key} is {given[key]!r:.100}, neither null nor a positive integer"
        for key in OPTIONAL_SIZES
        if given.get(key) is not None and not _is_size(given[key], MAX_SIZE)
    ]
    fixed = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None}
    wrong += [
        f"{key} is {given[key]!r:.100}, only {only!r} can be read"
        for key, only in fixed.items()
        if given.get(key, only) != only
    ]
    epsilon = given.get("rms_norm_eps", 1e-6)
    wrong += [] if _is_positive(epsilon) else [f"rms_norm_eps is {epsilon!r:.100}"]
    if wrong:
        raise ValueError(f"read_config: {'; '.join(wrong)}.")
    theta, scaling = _read_rope(given)
    heads, width = given["num_attention_heads"], given["hidden_size"]
    return _checked(
        decoder.Config(
            vocabulary=given["vocab_size"],
            layers=given["num_hidden_layers"],
            width=width,
            feedforward=given["intermediate_size"],
            heads=heads,
            kv_heads=given["num_key_value_heads"] or heads,
            head_width=given.get("head_dim") or width // heads,
            epsilon=float(epsilon),
            theta=theta,
            positions=given["max_position_embeddings"],
            scaling=scaling,
            attention_bias={"qwen2": True, "mistral": False}.get(
                family, bool(given.get("attention_bias", False))
            ),
            qk_norm=family == "qwen3",
            tied=bool(given.get("tie_word_embeddings", False)),
            windows=_read_windows(family, given),
        )
    )


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _checked(config: decoder.Config) -> decoder.Config:
    if config.heads % config.kv_heads or config.head_width % 2:
        raise ValueError(
            f"read_config: {config.heads} heads of width {config.head_width} and "
            f"{config.kv_heads} of keys and values do not go together."
        )
    return config


def _read_rope(given: dict) -> tuple[float, decoder.RopeScaling | None]:
    # transformers 5 writes rope_parameters with theta inside; 4 wrote rope_scaling beside it.
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"read_config: rotary positions are {rope!r:.100}; want an object.")
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    if not _is_positive(theta):
        raise ValueError(f"read_config: rope_theta is {theta!r:.100}; want a positive number.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    part = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or part != 1:
        raise ValueError(
            f"read_config: rotary positions are of type {kind!r:.100} on a share of {part!r:.20} "
            "of a head; only 'default' and 'llama3' on all of it can be read."
        )
    if kind == "default":
        return float(theta), None
    keys = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    if missing := [key for key in keys if key not in rope]:
        raise ValueError(f"read_config: llama3 rotary positions lack {', '.join(missing)}.")
    if wrong := [f"{key} is {rope[key]!r:.100}" for key in keys if not _is_positive(rope[key])]:
        raise ValueError(f"read_config: {', '.join(wrong)}; want positive numbers.")
    factor, low, high, positions = (rope[key] for key in keys)
    return float(theta), decoder.RopeScaling(float(factor), float(low), float(high), int(positions))


def _read_windows(family: str, given: dict) -> tuple[int, ...]:
    """How far each layer looks back; empty if all look at everything."""
    layers, window = given["num_hidden_layers"], given.get("sliding_window")
    if family == "llama" or (family != "mistral" and not given.get("use_sliding_window", False)):
        window = None
    if not window:
        return ()
    full = 0 if family == "mistral" else given["max_window_layers"]
    if not _is_size(window, MAX_SIZE) or type(full) is not int:
        raise ValueError(
            f"read_config: sliding_window is {window!r:.100} and max_window_layers {full!r:.100}; "
            "want integers."
        )
    kinds = given.get("layer_types") or [
        "full_attention" if i < full else "sliding_attention" for i in range(layers)
    ]
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in [*known] for k in kinds):
        raise ValueError(
            f"read_config: layer_types is {kinds!r:.500}; want {' or '.join(known)} for each of "
            f"{layers}."
        )
    windows = tuple(known[kind] for kind in kinds)
    return windows if any(windows) else ()


def _load_folder(folder: Path, weights: Path, dtype: str) -> Model:
    settings = _read_json(folder / "config.json")
    try:
        config = read_config(settings)
    except ValueError as error:
        raise ValueError(f"load_model: {folder / 'config.json'}: {error}") from None
    files = [weights] if weights.name == SINGLE else _shards(weights)
    tensors = _open_safetensors(files)
    tokenizer, start = _read_tokenizer(folder / "tokenizer.json")
    _check_vocabulary(tokenizer, config, folder)
    end = _read_end(folder, settings, tokenizer)
    params = _read_params(tensors, config, IN_FOLDER, "model.layers", folder, dtype)
    hashes = sorted((file.name, file_sha256(file)) for file in files)
    listed = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return Model(
        params=params,
        config=config,
        tokenizer=tokenizer,
        name=folder.name,
        weights_sha256=hashes[0][1] if weights.name == SINGLE else listed,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
        start=start,
        end=end,
    )


def _read_json(file: Path) -> dict:
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"load_model: {file} has {size} bytes; want at most {MAX_JSON_BYTES}.")
    try:
        content = parse_json(file.read_bytes(), where="it")
    except ValueError as error:
        raise ValueError(f"load_model: {file} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"load_model: {file} holds a {type(content).__name__}; want an object.")
    return content


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    names = [*names.values()] if isinstance(names, dict) else []
    plain = all(
        isinstance(name, str)
        and (name.isprintable() and len(name.encode()) <= 255)
        and Path(name).name == name
        for name in names
    )
    names = sorted(set(names)) if plain else []
    if not names:
        raise ValueError(f"load_model: {index} has no weight_map from tensors to files beside it.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"load_model: {index.parent} lacks {', '.join(missing)}.")
    return [index.parent / name for name in names]


def _open_safetensors(files: list[Path]) -> Tensors:
    import safetensors

    shapes, where = {}, {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                head = stream.read(8)
                head += stream.read(header_bytes(head) - 8)
            _, stored = read_stored(head, file.stat().st_size)
            opened = safetensors.safe_open(file, "numpy")
        except (ValueError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"load_model: {file} is no whole safetensors file: {error}; fetch it again."
            ) from None
        for name, array in stored.items():
            if array.dtype not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"load_model: {printable(name)} in {file} is of type {array.dtype}; only F32, "
                    "F16 and BF16 can be read."
                )
            shapes[name], where[name] = array.shape, opened
    return Tensors(shapes, lambda name: where[name].get_tensor(name))


def _read_tokenizer(file: Path) -> tuple[Any, int | None]:
    """The tokenizer without its additions, and the token that it would put before a text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        marked = tokenizer.encode("a").ids
        tokenizer.post_processor = None
        bare = tokenizer.encode("a").ids
    except BaseException as error:
        # The library raises Exception itself, and where it panics what is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"load_model: {file} is no tokenizer: {printable(str(error))}") from None
    if marked[len(marked) - len(bare) :] != bare or len(marked) > len(bare) + 1:
        raise ValueError(
            f"load_model: {file} makes {marked} of a text that is {bare}; want at most one token "
            "more, in front."
        )
    return tokenizer, marked[0] if len(marked) > len(bare) else None


def _check_vocabulary(tokenizer, config: decoder.Config, where: Path) -> None:
    """More rows than tokens are usual, so that they divide well; more tokens are an error."""
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not 0 < tokens <= config.vocabulary:
        raise ValueError(
            f"load_model: {where} has a tokenizer of {tokens} tokens and weights for "
            f"{config.vocabulary}; take both from one model."
        )


def _read_end(folder: Path, settings: dict, tokenizer) -> int:
    """eos of tokenizer_config.json (in models of chats, of a turn), else that of config.json."""
    file = folder / "tokenizer_config.json"
    token = _read_json(file).get("eos_token") if file.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    named = settings.get("eos_token_id")
    end: Any
    if isinstance(token, str) and token:
        # Of half a character no token is made.
        end = tokenizer.token_to_id(token.encode(errors="replace").decode())
    else:
        end = named[0] if isinstance(named, list) and named else named
    if not _is_token(end, tokenizer):
        raise ValueError(
            f"load_model: {folder} names no token that ends a text: eos_token of "
            f"tokenizer_config.json is {token!r:.100}, eos_token_id of config.json is "
            f"{named!r:.100}."
        )
    return end


def _is_token(value: Any, tokenizer) -> bool:
    return (
        type(value) is int and 0 <= value <= MAX_SIZE and tokenizer.id_to_token(value) is not None
    )


def _load_gguf(file: Path, dtype: str) -> Model:
    import gguf

    class Reader(gguf.GGUFReader):
        parts = 0

        def __setattr__(self, name, value):
            # It cuts the file into 250,000 slices: of a memmap they cost three times an array's.
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

        def _get(self, offset, dtype, count=1, override_order=None):
            # It takes slices beyond the end for empty ones, and may go on with these for ever.
            self.parts += 1
            if not 0 <= offset <= offset + int(count) * np.dtype(dtype).itemsize <= len(self.data):
                raise ValueError(f"it ends before byte {offset} and what should be there")
            if self.parts > MAX_PARTS:
                raise ValueError(f"its settings have more than {MAX_PARTS} parts")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(file)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"load_model: {file} is no whole GGUF file: {printable(str(error))}; fetch it again."
        ) from None
    entries = {tensor.name: tensor for tensor in reader.tensors}
    # Their sizes stand in the opposite order of NumPy's.
    shapes = {name: tuple(map(int, entry.shape[::-1])) for name, entry in entries.items()}

    def dequantize(name):
        entry = entries[name]
        try:
            return gguf.quants.dequantize(entry.data, entry.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"load_model: {name} in {file} is quantized as {entry.tensor_type.name}, which "
                "cannot be read."
            ) from None

    try:
        config = _gguf_config(meta, Tensors(shapes, dequantize))
        tokenizer = _gguf_tokenizer(meta)
        end = meta["tokenizer.ggml.eos_token_id"]
        start = None
        if meta.get("tokenizer.ggml.add_bos_token", meta["tokenizer.ggml.pre"] == "llama-bpe"):
            start = meta["tokenizer.ggml.bos_token_id"]
        for token in (end, start):
            if token is not None and not _is_token(token, tokenizer):
                raise ValueError(f"its mark {token!r:.100} is no token.")
    except KeyError as error:
        raise ValueError(f"load_model: {file} lacks the key {error}.") from None
    except ValueError as error:
        raise ValueError(f"load_model: {file}: {error}") from None
    _check_vocabulary(tokenizer, config, file)
    rotated = {"attn_q": config.heads, "attn_k": config.kv_heads}

    def read(name):
        array = dequantize(name)
        heads = rotated.get(name.split(".")[-2])
        if meta["general.architecture"] == "llama" and heads:
            # llama.cpp turns neighbouring coordinates, so the rows of a head were reordered for it.
            split = array.reshape(heads, -1, 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        return array

    shapes.pop("rope_freqs.weight", None)  # is in config.scaling
    return Model(
        params=_read_params(Tensors(shapes, read), config, IN_GGUF, "blk", file, dtype),
        config=config,
        tokenizer=tokenizer,
        name=file.stem,
        weights_sha256=file_sha256(file),
        tokenizer_sha256=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        start=start,
        end=end,
    )


def _gguf_config(meta: dict, tensors: Tensors) -> decoder.Config:
    family = meta["general.architecture"]
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(
            f"architecture is {family!r:.100}; only llama, qwen2 and qwen3 can be read."
        )
    # The tokens, for which a list stands, are checked with the tokenizer.
    wrong = [
        f"{family}.{key} is {value!r:.100}, not a positive integer up to {most}"
        for key, most in GGUF_SIZES.items()
        if not _is_size(value := meta.get(f"{family}.{key}", 1), most)
    ]
    epsilon = meta[f"{family}.attention.layer_norm_rms_epsilon"]
    theta = meta.get(f"{family}.rope.freq_base", 10_000.0)
    if wrong or not (_is_positive(epsilon) and _is_positive(theta)):
        wrong += [f"epsilon is {epsilon!r:.100} and the base of positions {theta!r:.100}"]
        raise ValueError(f"{'; '.join(wrong)}.")
    heads, width = meta[f"{family}.attention.head_count"], meta[f"{family}.embedding_length"]
    head_width = meta.get(f"{family}.attention.key_length", width // heads)
    fixed = {
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
        "rope.scaling.type": "none",
        "attention.sliding_window": 0,
    }
    wrong = [
        f"{family}.{key} is {printable(str(meta[f'{family}.{key}']), 100)}, only {only} can be read"
        for key, only in fixed.items()
        if meta.get(f"{family}.{key}", only) != only
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")
    config = decoder.Config(
        vocabulary=len(meta["tokenizer.ggml.tokens"]),
        layers=meta[f"{family}.block_count"],
        width=width,
        feedforward=meta[f"{family}.feed_forward_length"],
        heads=heads,
        kv_heads=meta.get(f"{family}.attention.head_count_kv", heads),
        head_width=head_width,
        epsilon=epsilon,
        theta=theta,
        positions=meta[f"{family}.context_length"],
        attention_bias="blk.0.attn_q.bias" in tensors.shapes,
        qk_norm=family == "qwen3",
        tied="output.weight" not in tensors.shapes,
    )
    if "rope_freqs.weight" in tensors.shapes:
        config = config._replace(scaling=_gguf_scaling(tensors.read("rope_freqs.weight"), config))
    return _checked(config)


def _gguf_scaling(divisors: np.ndarray, config: decoder.Config) -> decoder.RopeScaling:
    """The file keeps what each frequency is divided by. Of the numbers behind it, all but the
    factor have been the same in every Llama: they are tried, and refused if they do not fit."""
    scaling = decoder.RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
    plain, scaled = (decoder._frequencies(config._replace(scaling=s)) for s in (None, scaling))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not the llama3 scaling of 8192 positions.")
    return scaling


def _gguf_tokenizer(meta: dict):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    kind, pre = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(
            f"its tokenizer is {kind!r} with splitting {pre!r}; only 'gpt2' with "
            f"{', '.join(map(repr, SPLITS))} can be read."
        )
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    given = meta["tokenizer.ggml.merges"]
    if not (
        all(isinstance(value, list) for value in (tokens, types, given))
        and all(isinstance(text, str) for text in (*tokens, *given))
    ):
        raise ValueError("its tokens, their types and merges are no lists of texts and numbers.")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"its {len(tokens)} tokens have {len(types)} types and {len(ids)} distinct names."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in given]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"its merge {wrong[0]!r:.100} is not of two tokens.")
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises this very class
        raise ValueError(f"its tokenizer cannot be built: {printable(str(error))}.") from None
    if SPLITS[pre] is None:
        first, second = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    else:
        first = Split(Regex(SPLITS[pre]), "isolated")
        second = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([first, second])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's own file has it; llama.cpp does not
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp's numbers: unknown 2, control 3, user-defined 4.
    for special, numbers in ((True, (2, 3)), (False, (4,))):
        named = [token for token, number in zip(tokens, types, strict=True) if number in numbers]
        tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in named])
    return tokenizer


def _read_params(
    tensors: Tensors, config: decoder.Config, names: dict, stem: str, where: Path, dtype: str
) -> decoder.Params:
    """The parameters of `decoder`; every tensor is used once, and one is held at a time."""
    if len(tensors.shapes) < config.layers:
        raise ValueError(
            f"load_model: the weights in {where} are {len(tensors.shapes)} tensors, and its "
            f"settings say {config.layers} layers; take both from one model."
        )
    leaves, tree = jax.tree_util.tree_flatten_with_path(decoder.param_shapes(config))
    groups, shapes = [], {}
    for path, leaf in leaves:
        in_layer, module, kind = _read_path(path)
        ending = f"{names[module]}.{'bias' if kind == 'bias' else 'weight'}"
        numbers = range(config.layers)
        groups.append([f"{stem}.{i}.{ending}" for i in numbers] if in_layer else [ending])
        shape = leaf.shape[1:] if in_layer else leaf.shape
        # Files keep matrices of linear maps as (out, in).
        shapes |= dict.fromkeys(groups[-1], shape[::-1] if kind == "kernel" else shape)
    empty = [name for name in shapes if name not in tensors.shapes]
    unused = sorted(
        name
        for name in tensors.shapes
        if name not in shapes and not _spare(name, tensors, config, names)
    )
    misfits = [
        f"{name} is {tensors.shapes[name]}, not {shape}"
        for name, shape in shapes.items()
        if tensors.shapes.get(name, shape) != shape
    ]
    if empty or unused or misfits:
        raise ValueError(
            f"load_model: the weights in {where} do not fit its settings. Parameters without a "
            f"tensor: {', '.join(empty) or 'none'}. Tensors without a use: "
            f"{printable(', '.join(unused), 10_000) or 'none'}. Other shapes: "
            f"{'; '.join(misfits) or 'none'}."
        )
    params = []
    for (path, leaf), group in zip(leaves, groups, strict=True):
        in_layer, _, kind = _read_path(path)
        kept = np.empty(leaf.shape, jnp.dtype(dtype if kind in ("kernel", "embed") else "float32"))
        for place, name in zip(kept if in_layer else [kept], group, strict=True):
            array = tensors.read(name)
            place[...] = array.T if kind == "kernel" else array
        params.append(jnp.asarray(kept))
    return jax.tree.unflatten(tree, params)


def _read_path(path) -> tuple[bool, str, str]:
    """Whether a parameter belongs to a layer, its module, and its kind."""
    keys = [key.key for key in path]
    in_layer = keys[0] == "layers"
    return in_layer, keys[in_layer], keys[-1]


def _spare(name: str, tensors: Tensors, config: decoder.Config, names: dict) -> bool:
    """Whether a tensor says nothing that the parameters do not say."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name.endswith("self_attn.o_proj.bias"):  # comes with attention_bias, and often is zero
        return not tensors.read(name).any()
    head, embed = f"{names['head']}.weight", f"{names['embed']}.weight"
    if name == head and config.tied and embed in tensors.shapes:
        if not np.array_equal(tensors.read(head), tensors.read(embed)):
            raise ValueError(
                f"load_model: {head} differs from {embed}, but tie_word_embeddings is true."
            )
        return True
    return False


def file_sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
