"""What memory a device needs to fine-tune under a configuration, before anything is loaded.

`python -m experiments.finetune --config=configs/finetune.py:qwen2.5-7b --config.plan=true`

Sums of array sizes, for L layers, a part of b rows of t tokens (batch / accumulate, the greatest
width), h heads, and everything that a row touches divided over the devices:

    parameters    as stored, cut over the devices under sharding="full"
    adapters      4 bytes a number of A and B; gradients and the optimiser's two moments of those
                  trained; all but gradients twice, since a step returns new ones
    kept          what the derivative needs of the layers: with remat L (b, t, width) in float32,
                  else L times what one layer keeps, as JAX's own derivative says
    layer         what is alive while one layer is differentiated: with remat what it keeps, made
                  again, and always two (b, h, t, t) in float32 for attention
    logits        two (positions, vocabulary) in float32, positions = min(b t, finetune.CHUNK)
    weights       of the layer or the head in use: gathered under sharding="full", and a copy where
                  products have operands of another type than the stored one

Layers and logits are not alive at once: the greater counts. What a compiler adds, or saves by
fusion, is not known here: totals of fifteen small programs were 0.9 to 1.2 of what XLA gives for a
CPU, and 0.6 in one of bfloat16 (a CPU makes float32 copies of all layers).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.models import open_model
from learnware_jax.slm import decoder, finetune, lora
from learnware_jax.slm.decoder import Config
from learnware_jax.slm.finetune import Settings
from learnware_jax.slm.weights import DTYPES, read_config

GIB = 2**30
CARDS = (16, 24, 40, 80)  # GiB
USABLE = 0.9  # of a device's memory; the rest is the driver's, the compiler's and lost in gaps
MATRICES = ("kernel", "embed")  # are stored in the model's dtype, norms and biases in float32


class Traced(NamedTuple):
    """The arrays of one training step, without numbers in them, and what its derivative keeps."""

    params: Any
    state: finetune.State
    batch: finetune.Batch
    layer: int  # bytes that a layer keeps for its derivative, all rows
    carry: int  # the same with remat
    outside: int  # kept outside of the layers, without scores of the vocabulary


def run(config: ConfigDict) -> dict:
    """Print and return what a device needs, in bytes; ValueError for what cannot work at all.

    Of "bytes", "total" is the most at any one time. "devices_needed" says how many devices of so
    many GiB hold it, None for no number that the rows divide over.
    """
    # Here, since experiments.finetune itself imports this module.
    from experiments.finetune import settings_of

    settings = settings_of(config)
    finetune.check_settings(settings)
    devices = count_devices(config)
    sizes = config.model.sizes.to_dict()
    model = read_config(sizes) if sizes else open_model(config.model).config
    traced = trace(model, settings, config)
    needs = functools.partial(
        device_bytes, traced, model, settings, fully=config.sharding == "full"
    )
    output = {
        "model": config.model.name,
        "devices": devices,
        "parameters": count(traced.params),
        "trained": sum(count(getattr(traced.state.adapter, field)) for field in settings.train),
        "bytes": needs(devices=devices),
        "devices_needed": {},
    }
    rows = rows_of(settings)
    most = 1 if config.sharding == "none" else rows
    possible = [n for n in range(1, most + 1) if rows % n == 0]
    for card in CARDS:
        fit = [n for n in possible if needs(devices=n)["total"] <= USABLE * card * GIB]
        output["devices_needed"][card] = min(fit, default=None)
    _print(output, settings, config)
    return output


def rows_of(settings: Settings) -> int:
    """Rows that are in memory at once, over all devices."""
    return settings.batch // settings.accumulate


def count_devices(config: ConfigDict) -> int:
    """The devices that a run would use. ValueError for a batch that does not divide over them."""
    if config.sharding not in ("none", "data", "full") or config.devices < 0:
        raise ValueError(
            f"plan: got sharding={config.sharding!r}, devices={config.devices}; want none, data or "
            "full, and a number of devices, or 0 for those that are here."
        )
    if config.sharding == "none":
        if config.devices > 1:
            raise ValueError(
                f"plan: got devices={config.devices} with sharding='none', which uses one; set "
                "sharding to data or full."
            )
        return 1
    devices = config.devices or jax.device_count()
    rows = config.batch // config.accumulate
    if rows % devices:
        raise ValueError(
            f"plan: batch={config.batch} in {config.accumulate} parts is {rows} rows, which do not "
            f"divide over {devices} devices; set batch to a multiple of "
            f"{config.accumulate * devices}."
        )
    return devices


def abstract_params(config: Config, dtype: str) -> Any:
    """Shapes and types of the parameters that `weights.load_model` gives in `dtype`."""
    if dtype not in DTYPES:
        raise ValueError(f"plan: got model.dtype={dtype!r}; want one of {', '.join(DTYPES)}.")

    def typed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype if path[-1].key in MATRICES else "float32")

    return jax.tree_util.tree_map_with_path(typed, decoder.param_shapes(config))


def trace(model: Config, settings: Settings, config: ConfigDict) -> Traced:
    """Check one step to the shape, and count what its derivative keeps; nothing is computed."""
    together, tokens = config.together, settings.widths[-1]
    if together < 1:
        raise ValueError(f"plan: got together={together}; want at least 1.")
    if tokens > model.positions:
        raise ValueError(
            f"plan: widths go up to {tokens} tokens, the model takes {model.positions}."
        )
    params = abstract_params(model, config.model.dtype)

    def init(model):
        adapter = lora.init_adapter(
            jax.random.key(0),
            model,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=tuple(config.lora.targets),
        )
        return lora.stack([adapter] * together)

    state = jax.eval_shape(lambda: finetune.init_state(init(model), settings))
    # At most every token is learned.
    shape = (together, settings.accumulate, rows_of(settings), tokens)
    ints, weight = (jax.ShapeDtypeStruct(shape, kind) for kind in ("int32", "float32"))
    batch = finetune.Batch(ints, ints, ints, weight)
    step = functools.partial(finetune.step, config=model, settings=settings)
    rates = jax.ShapeDtypeStruct((together,), "float32")
    new, _ = jax.eval_shape(step, state, batch, rates, params)
    if jax.tree.map(_type, new) != jax.tree.map(_type, state):
        raise ValueError("plan: a step changes the shapes of its state.")

    def keeps(layers, remat):
        cut = model._replace(layers=layers, windows=model.windows[:layers])
        return together * kept_bytes(
            abstract_params(cut, config.model.dtype),
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                jax.eval_shape(lambda: init(cut)),
            ),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), batch),
            cut,
            settings._replace(remat=remat),
        )

    one = keeps(1, True)
    carry, layer = keeps(2, True) - one, keeps(2, False) - keeps(1, False)
    outside = one - carry
    if positions(settings) == math.prod(shape[2:]):  # else made again, chunk by chunk
        outside -= together * 4 * positions(settings) * model.vocabulary
    return Traced(params, state, batch, layer, carry, outside)


def _type(leaf) -> tuple:
    return leaf.shape, leaf.dtype


def positions(settings: Settings) -> int:
    """Positions whose logits are in memory at once, if every token is learned."""
    rows, tokens = rows_of(settings), settings.widths[-1]
    return rows * max(1, min(tokens, finetune.CHUNK // rows))


def kept_bytes(params, adapter, batch, config: Config, settings: Settings) -> int:
    """Bytes from the forward to the backward pass, those of parameters and inputs left out."""

    def residuals(params, adapter, batch):
        def loss(trained):
            changed = adapter._replace(**trained)
            return finetune.loss_sum(params, changed, batch, config=config, settings=settings)[0]

        trained = {field: getattr(adapter, field) for field in settings.train}
        return jax.tree.leaves(jax.vjp(loss, trained)[1])

    program = jax.make_jaxpr(residuals)(params, adapter, batch).jaxpr
    given = set(program.invars)
    kept = {x for x in program.outvars if not isinstance(x, jax.extend.core.Literal)} - given
    return nbytes([x.aval for x in kept])


def device_bytes(
    traced: Traced, model: Config, settings: Settings, *, devices: int, fully: bool
) -> dict[str, int]:
    """What one of `devices` holds, part by part, and the most at any one time as "total"."""
    # A mesh of one device many times over: shapes are cut for it, nothing is put on it.
    mesh = Mesh(np.array([jax.devices()[0]] * devices), ("data",))
    fully = fully and devices > 1
    places = finetune.param_shardings(traced.params, mesh, fully=fully)
    own = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        traced.params,
        places,
    )
    adapter, together = traced.state.adapter, len(traced.batch.ids)
    trained = [getattr(adapter, field) for field in settings.train]
    pairs = together * rows_of(settings) * model.heads * settings.widths[-1] ** 2
    scores = together * positions(settings) * model.vocabulary
    head = {"embed": traced.params["embed"]} if model.tied else traced.params["head"]
    kept = model.layers * (traced.carry if settings.remat else traced.layer)
    always = {
        "parameters": nbytes(own),
        "adapters": nbytes(adapter),
        "optimiser": nbytes(traced.state.optimiser),
        "gradients": nbytes(trained) * (2 if settings.accumulate > 1 else 1),
        "new_adapters_and_optimiser": nbytes(traced.state),
        "batch": nbytes(traced.batch) // devices,
        "kept": (traced.outside + kept) // devices,
    }
    layer = {
        "layer": (2 * 4 * pairs + (traced.layer if settings.remat else 0)) // devices,
        "layer_weights": _used(traced.params["layers"], settings.dtype, fully) // model.layers,
    }
    logits = {
        "logits": 2 * 4 * scores // devices,
        "head_weights": _used(head, settings.dtype, fully),
    }
    most = max(sum(layer.values()), sum(logits.values()))
    return always | layer | logits | {"total": sum(always.values()) + most}


def _used(params: Any, dtype: str, fully: bool) -> int:
    """Bytes of parameters as products take them: gathered, and copied into another type."""
    copies = [
        math.prod(leaf.shape) * jnp.dtype(dtype).itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in MATRICES and leaf.dtype != dtype
    ]
    return sum(copies) + (nbytes(params) if fully else 0)


def count(tree: Any) -> int:
    """Numbers in the arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _print(output: dict, settings: Settings, config: ConfigDict) -> None:
    print(
        f"{output['model']}: {output['parameters']:,} parameters in {config.model.dtype}, "
        f"{output['trained']:,} numbers trained in {config.together} "
        f"adapter{'s' * (config.together > 1)} of rank {config.lora.rank}."
    )
    print(
        f"{rows_of(settings)} rows of {settings.widths[-1]} tokens at once, products in "
        f"{settings.dtype}, remat={settings.remat}, sharding={config.sharding}, devices: "
        f"{output['devices']}. Every device holds"
    )
    for part, size in output["bytes"].items():
        print(f"  {part.replace('_', ' '):28} {size / GIB:9.3f} GiB")
    print("(layer and logits not at once, so the greater counts). A step fits its shapes.")
    for card, devices in output["devices_needed"].items():
        needed = f"{devices} device{'s' * (devices > 1)}" if devices else "too small, cut like this"
        print(f"  {card} GiB each: {needed}")
