"""Low-rank adapters (Hu et al., arXiv 2106.09685): made, merged, stacked, read from PEFT, written.

PEFT keeps an adapter as two files, adapter_config.json and adapter_model.safetensors. Here they are
a mapping from those names to bytes, so that no function needs to know where they lie.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from learnware_jax.slm.decoder import Adapter, Config, Params, param_shapes
from learnware_jax.slm.weights import IN_FOLDER
from learnware_jax.specification.header import parse_json, printable
from learnware_jax.specification.tensors import read_stored

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ("query", "key", "value", "out")
# Our modules in a checkpoint of Hugging Face, which PEFT's names follow.
IN_FILE = {name: IN_FOLDER[name] for name in (*ATTENTION, "gate", "up", "down")}
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype("bfloat16")}
# What changes the meaning of the arrays, with the values under which they mean x A B alpha / r.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Others change the model itself before anything is learned.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
MAX_RANK = 1024  # a stack is padded to the greatest rank in it


def init_adapter(
    key: Array, config: Config, *, rank: int, alpha: float, targets: Sequence[str] = ATTENTION
) -> Adapter:
    """An adapter that changes nothing yet: A uniform in +-1 / sqrt(inputs), as PEFT's; B zero.

    A of a module depends on the key and the module alone: adapters made with one key share it.
    ValueError for a rank below 1, an alpha that is no positive number, or an unknown target.
    """
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"init_adapter: got rank={rank}, alpha={alpha}; want a rank of at least 1 and a "
            "positive alpha."
        )
    unknown = [name for name in targets if name not in IN_FILE]
    if unknown or not targets:
        raise ValueError(
            f"init_adapter: got targets={tuple(targets)}; want some of {', '.join(IN_FILE)}."
        )
    a, b = {}, {}
    for name in targets:
        layers, inputs, outputs = param_shapes(config)["layers"][name]["kernel"].shape
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        bound = inputs**-0.5
        a[name] = jax.random.uniform(own, (layers, inputs, rank), minval=-bound, maxval=bound)
        b[name] = jnp.zeros((layers, rank, outputs))
    return Adapter(a, b, jnp.float32(alpha / rank))


def merge(params: Params, adapter: Adapter, *, sign: float = 1.0) -> Params:
    """Parameters of a model that acts as `params` with the adapter. Sums are made in float32."""
    layers = dict(params["layers"])
    for name in adapter.a:
        kernel = layers[name]["kernel"]
        change = jnp.matmul(adapter.a[name], adapter.b[name], precision="highest")
        merged = kernel.astype(jnp.float32) + sign * adapter.scale * change
        layers[name] = layers[name] | {"kernel": merged.astype(kernel.dtype)}
    return params | {"layers": layers}


def unmerge(params: Params, adapter: Adapter) -> Params:
    """The parameters that `merge` was given, up to rounding in their dtype."""
    return merge(params, adapter, sign=-1.0)


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of one shape as one, with a new first axis. ValueError if their shapes differ."""
    if not adapters:
        raise ValueError("stack: got no adapters; want at least one.")
    shapes = [jax.tree.map(jnp.shape, adapter) for adapter in adapters]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"stack: adapter {i} has the shapes {shape}, adapter 0 has {shapes[0]}; stack only "
                "adapters of one rank and one set of targets (see `pad`)."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def pad(adapter: Adapter, like: Adapter) -> Adapter:
    """The same change in the targets and the rank of `like`, which must be no smaller.

    What is added is zero, so that adapters of several ranks and targets can be stacked.
    """
    lost = adapter.a.keys() - like.a.keys()
    if lost:
        raise ValueError(f"pad: {', '.join(sorted(lost))} is not among {', '.join(like.a)}.")
    a, b = {}, {}
    for name, wide in like.a.items():
        extra = wide.shape[-1] - (adapter.a[name].shape[-1] if name in adapter.a else 0)
        if extra < 0:
            raise ValueError(
                f"pad: the adapter has rank {wide.shape[-1] - extra}, that to be like only "
                f"{wide.shape[-1]}."
            )
        if name not in adapter.a:
            a[name], b[name] = jnp.zeros_like(wide), jnp.zeros_like(like.b[name])
        else:
            a[name] = jnp.pad(adapter.a[name], ((0, 0), (0, 0), (0, extra)))
            b[name] = jnp.pad(adapter.b[name], ((0, 0), (0, extra), (0, 0)))
    return Adapter(a, b, adapter.scale)


def to_peft(
    adapter: Adapter, *, base: str, dtype: str = "bfloat16", note: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The two files of PEFT. `base` names the model; `note` is kept in the configuration.

    `dtype` is that of the stored numbers: "bfloat16" rounds to 8 bits, relative error 2^-9.
    """
    import safetensors.numpy

    rank = next(iter(adapter.a.values())).shape[-1]
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": float(adapter.scale) * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(IN_FILE[name].split(".")[1] for name in adapter.a),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    if note:
        settings["learnware_jax"] = dict(note)
    tensors = {}
    for name in adapter.a:
        for kind, stacked in (("A", adapter.a[name]), ("B", adapter.b[name])):
            rounded = np.asarray(jnp.asarray(stacked, jnp.dtype(dtype)))
            for layer, matrix in enumerate(rounded):
                tensors[_name_in_file(layer, name, kind)] = np.ascontiguousarray(matrix.T)
    return {
        CONFIG_FILE: (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode(),
        WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"}),
    }


def from_peft(files: Mapping[str, bytes], config: Config) -> Adapter:
    """The adapter in the two files of PEFT, in float32, for a model of this `config`.

    ValueError if a file is missing or damaged, if the adapter is no plain LoRA, if a tensor is
    unused, missing, of another shape or not finite.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        raise ValueError(f"from_peft: {' and '.join(missing)} is not there.")
    try:
        settings = parse_json(files[CONFIG_FILE], where="it")
        rank, alpha = settings["r"], float(settings["lora_alpha"])
        given = settings["target_modules"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"from_peft: {CONFIG_FILE} is no configuration of LoRA: {printable(repr(error))}."
        ) from None
    scale = np.nan
    if type(rank) is int and 1 <= rank <= MAX_RANK:
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.float32(scale))
    if not finite:
        raise ValueError(
            f"from_peft: {CONFIG_FILE} has r={rank!r:.50}, lora_alpha={alpha}; want a rank of at "
            f"least 1, a whole number up to {MAX_RANK}, and a finite alpha."
        )
    strange = {
        key: settings[key]
        for key, plain in PLAIN.items()
        if settings.get(key, plain[0]) not in plain
    }
    if strange:
        raise ValueError(
            f"from_peft: {strange!r:.500} is not supported; want a plain LoRA ({', '.join(PLAIN)} "
            "at their defaults). Merge the adapter into its model with PEFT instead."
        )
    modules = {path.split(".")[1]: name for name, path in IN_FILE.items()}
    if not isinstance(given, list) or not given or any(name not in [*modules] for name in given):
        raise ValueError(
            f"from_peft: target_modules is {given!r:.500}; want a list of some of "
            f"{', '.join(modules)}."
        )
    data = files[WEIGHTS_FILE]
    try:
        _, stored = read_stored(data, len(data))
    except ValueError as error:
        raise ValueError(
            f"from_peft: {WEIGHTS_FILE} is no whole safetensors file: {error}."
        ) from None
    for name, array in stored.items():
        if array.dtype not in DTYPES:
            raise ValueError(
                f"from_peft: {printable(name)} is of type {array.dtype}; want {', '.join(DTYPES)}."
            )
    shapes = {}
    for name in (modules[module] for module in given):
        layers, inputs, outputs = param_shapes(config)["layers"][name]["kernel"].shape
        for layer in range(layers):
            shapes[_name_in_file(layer, name, "A")] = (rank, inputs)
            shapes[_name_in_file(layer, name, "B")] = (outputs, rank)
    tensors = {}
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - stored.keys())]
    wrong += [f"{printable(name)} has no use" for name in sorted(stored.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & stored.keys()):
        dtype, shape, begin, end = stored[name]
        if shape != shapes[name]:
            wrong.append(f"{name} is {shape}, not {shapes[name]}")
            continue
        # safetensors.numpy writes bfloat16 and does not read it.
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[dtype]).reshape(shape)
        if not np.isfinite(tensors[name].astype(np.float32)).all():
            wrong.append(f"{name} holds numbers that are not finite")
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(f"from_peft: the adapter does not fit the model: {shown}.")
    stacks = {"A": {}, "B": {}}
    for kind, gathered in stacks.items():
        for name in (modules[module] for module in given):
            matrices = [tensors[_name_in_file(i, name, kind)].T for i in range(config.layers)]
            gathered[name] = jnp.asarray(np.stack(matrices).astype(np.float32))
    return Adapter(stacks["A"], stacks["B"], jnp.float32(scale))


def _name_in_file(layer: int, name: str, kind: str) -> str:
    return f"base_model.model.model.layers.{layer}.{IN_FILE[name]}.lora_{kind}.weight"
