"""Specifications of what models are for, and docks that rank models by them.

What most uses need, by name; each is read from its module when first asked for, so that importing
this package costs nothing. The rest is in the packages specification, selection, slm and dock.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnware_jax.dock.materials import fetch
    from learnware_jax.dock.opening import open_dock
    from learnware_jax.dock.tasks import read_texts
    from learnware_jax.interface import ask, frame, load_adapter, read_results
    from learnware_jax.selection.decision import select
    from learnware_jax.selection.pool import build_pool
    from learnware_jax.selection.ranking import rank
    from learnware_jax.slm.encoder import embed, load_encoder
    from learnware_jax.slm.weights import load_model
    from learnware_jax.specification.reduce import reduce
    from learnware_jax.specification.rkme import RKME

__all__ = [
    "RKME",
    "ask",
    "build_pool",
    "embed",
    "fetch",
    "frame",
    "load_adapter",
    "load_encoder",
    "load_model",
    "open_dock",
    "rank",
    "read_results",
    "read_texts",
    "reduce",
    "select",
]

_MODULES = {
    "dock.materials": ("fetch",),
    "dock.opening": ("open_dock",),
    "dock.tasks": ("read_texts",),
    "interface": ("ask", "frame", "load_adapter", "read_results"),
    "selection.decision": ("select",),
    "selection.pool": ("build_pool",),
    "selection.ranking": ("rank",),
    "slm.encoder": ("embed", "load_encoder"),
    "slm.weights": ("load_model",),
    "specification.reduce": ("reduce",),
    "specification.rkme": ("RKME",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
