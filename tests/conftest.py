"""Shapes in annotations are checked while tests run, and only then."""

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("learnware_jax", "beartype.beartype")

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Every compiled program holds mappings of memory, of which Linux allows a process 65,530:
    beyond them the compiler crashes. Programs are let go long before."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
