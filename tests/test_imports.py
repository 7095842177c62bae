"""Imports point one way, cost little, and do nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "learnware_jax"
# Of the library itself, what each of its packages may import.
ALLOWED = {
    "specification": {"specification"},
    "selection": {"specification", "selection"},
    "dock": {"specification", "selection", "dock"},
    "slm": {"specification", "slm"},
    "figures": set(),
    "interface": {"specification", "selection", "dock", "slm"},
}
FORBIDDEN = {"experiments", "configs", "absl", "ml_collections"}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in LIBRARY.rglob("*.py")
    if path.name != "__init__.py"
)


def imported(path):
    """The full names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    wrong = {
        (path.name, name)
        for path in [*LIBRARY.glob(f"{package}.py"), *(LIBRARY / package).rglob("*.py")]
        for name in imported(path)
        if name.startswith("learnware_jax") and name.split(".")[1] not in ALLOWED[package]
    }
    assert not wrong


def test_every_package_has_a_place_in_the_order():
    assert {name.split(".")[1] for name in MODULES} == set(ALLOWED)


def test_the_library_knows_no_experiments_and_no_flags():
    wrong = {
        (path.name, name)
        for path in LIBRARY.rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN
    }
    assert not wrong


def test_importing_changes_no_configuration_and_starts_no_device():
    code = f"""
import jax
before = dict(jax.config.values)
import {", ".join(MODULES)}
print(*[name for name, value in jax.config.values.items() if before.get(name) != value])
from jax._src import xla_bridge
if xla_bridge._backends:
    print("a backend was started")
"""
    assert python(code) == []


def test_ranking_needs_none_of_the_heavy_libraries():
    code = """
import sys
import learnware_jax.specification.reduce, learnware_jax.selection.decision
import learnware_jax.figures
heavy = {"pandas", "datasets", "sklearn", "matplotlib", "transformers", "pyarrow", "tokenizers"}
print(*sorted(heavy & set(sys.modules)))
"""
    assert python(code) == []
