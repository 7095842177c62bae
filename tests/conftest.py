"""Shapes in annotations are checked while tests run, and only then."""

import gc

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("learnware_jax", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Every compiled program holds mappings of memory, of which Linux allows a process 65,530:
    with thousands of them the compiler crashes. Those of a module are let go with it."""
    yield
    jax.clear_caches()
    gc.collect()
