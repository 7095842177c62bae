"""Build the wheel and the sdist, install both in clean environments, and try them there.

    python scripts/check_package.py PYTHON [PYTHON ...] [--lowest] [--tests]

Every PYTHON gets an environment of its own with the newest dependencies that setup.py allows, or
with --lowest the oldest. There the installed library is imported, ranks a dock, and runs the
examples of its public names, in a folder from which the repository cannot be imported. With --tests
the tests of the library's own modules are run on it too. An environment is some 2 GB to download,
and is removed.
Needs the packages build and uv.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of one module each, without experiments, with little compilation.
TESTS = (
    *("kernels", "rkme", "simplex", "reduce", "header", "ranking", "decision", "mixture", "store"),
    *("index", "decoder", "encoder", "lora", "weights", "stream", "pave"),
)
SMOKE = """
import doctest, importlib, sys
import learnware_jax as lw
assert "site-packages" in lw.__file__, lw.__file__
dock = lw.open_dock("docks/quickstart")
assert len(dock.learnwares) == 14
encoder = lw.load_encoder(lw.fetch(dock.space["encoder"]))
texts = ["Net profit rose to 3 million dollars.", "The dividend was cut to 5 cents a share."] * 4
x = lw.embed(encoder, texts, max_tokens=dock.space["max_tokens"])
import jax
mine = lw.reduce(jax.random.key(0), x, 4, dock.kernel)
first = dock.pool.ids[lw.rank([mine.spec], dock.pool, n=[mine.n]).index[0, 0]]
assert dock.domains[first] == "finance", first
failed = tried = 0
for name in lw.__all__:
    item = getattr(lw, name)
    for test in doctest.DocTestFinder(recurse=False).find(item, name, globs={}):
        result = doctest.DocTestRunner().run(test)
        failed, tried = failed + result.failed, tried + result.attempted
assert not failed and tried >= len(lw.__all__), (failed, tried)
print(f"{first}; {tried} lines of examples; jax {jax.__version__}, Python {sys.version.split()[0]}")
"""


def run(*command: object, **options) -> None:
    """Run a command; SystemExit that says which one failed."""
    if subprocess.run([str(part) for part in command], **options).returncode:
        sys.exit(f"check_package: {' '.join(map(str, command))[:300]} failed.")


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist. SystemExit if they lack or hold what they should not."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    library = {
        str(file.relative_to(ROOT))
        for file in ROOT.glob("learnware_jax/**/*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    if held != library:
        sys.exit(f"check_package: the wheel and the repository differ in {held ^ library}.")
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    missing = library | {"README.md", "LICENSE", "setup.py", "pyproject.toml"}
    if missing - held:
        sys.exit(f"check_package: the sdist lacks {missing - held}.")
    return wheel, sdist


def check(python: str, wheel: Path, sdist: Path, *, lowest: bool, tests: bool) -> None:
    """Install and try both in an environment of `python`."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "home")
        (home / "experiments").mkdir(parents=True)
        for data in ("docks", "experiments/results"):  # what examples read
            (home / data).symlink_to(ROOT / data)
        own, wanted = Path(scratch, "env", "bin", "python"), Path(scratch, "wanted.txt")
        # Only from a project, not from a wheel, does uv take what is in setup.py for direct.
        resolution = "lowest-direct" if lowest else "highest"
        options = ["--quiet", "--python", python, "--resolution", resolution]
        options += ["--extra", "test"] if tests else []
        run("uv", "pip", "compile", *options, ROOT / "setup.py", "-o", wanted, cwd=ROOT)
        run("uv", "venv", "--quiet", "--python", python, Path(scratch, "env"))
        run("uv", "pip", "install", "--quiet", "--python", own, "-r", wanted)
        for file in (wheel, sdist):
            install = ("uv", "pip", "install", "--quiet", "--python", own, "--no-deps")
            run(*install, "--reinstall-package", "learnware_jax", file)
            run(own, "-I", "-c", SMOKE, cwd=home)
        if tests:
            shutil.copytree(ROOT / "tests", home / "tests")
            files = [f"tests/test_{name}.py" for name in TESTS]
            run(own, "-I", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, cwd=home)


def main() -> None:
    """Build once, then check one environment after the other."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pythons", nargs="+", metavar="PYTHON", help="interpreters, by path or name"
    )
    parser.add_argument("--lowest", action="store_true", help="the oldest dependencies allowed")
    parser.add_argument("--tests", action="store_true", help="run tests of the library too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder))
        for python in arguments.pythons:
            start = time.monotonic()
            check(python, wheel, sdist, lowest=arguments.lowest, tests=arguments.tests)
            print(f"{python}: wheel and sdist pass, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
