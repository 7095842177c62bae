"""Shapes in annotations are checked while tests run, and only then."""

from jaxtyping import install_import_hook

install_import_hook("learnware_jax", "beartype.beartype")
