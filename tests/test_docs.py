"""What is written for readers: links lead somewhere, commands parse, examples run, and so on."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from absl import flags

from experiments import command
from scripts import site

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PROGRAMS = sorted([*ROOT.glob("configs/[!_]*.py"), *ROOT.glob("experiments/[!_]*.py")])
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FLAG = r"""--[\w.]+(?:=(?:'[^']*'|"[^"]*"|[^\s\]`'"]+)*)?"""
COMMAND = re.compile(rf"python -m ([\w.]+)((?:\s+\[?{FLAG}\]?)*)")


def read(file):
    """A page, or the docstring of a program; lines that go on are joined."""
    text = file.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(text)) or "" if file.suffix == ".py" else text
    return text.replace("\\\n", " ")


def prose(text):
    return SPAN.sub("", FENCE.sub("", text))


def code(text):
    """Fenced blocks and spans of code; lists of words, as YAML has them, become commands."""
    spans = [match[2] for match in SPAN.finditer(FENCE.sub("", text))]
    parts = [*(match[3] for match in FENCE.finditer(text)), *spans]
    return [re.sub(r'",\s*"', " ", part) if '"-m"' in part else part for part in parts]


def anchors(page):
    titles = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- links and names of files


@EVERY_PAGE
def test_links_lead_to_something(page):
    for link in LINK.findall(prose(read(page))):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, f"{link}: want https://HOST/..."
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.is_relative_to(ROOT) and target.is_file(), f"{link}: no such file"
        assert not parts.fragment or parts.fragment in anchors(target), f"{link}: no such heading"


@EVERY_PAGE
def test_files_that_are_named_exist(page):
    folders = "configs|docks|docs|experiments|learnware_jax|notebooks|scripts|tests"
    for part in code(read(page)):
        for name in re.findall(rf"(?:^|[\s=])((?:{folders})/[a-z_/.]+\.\w+)\b", part):
            assert (ROOT / name).exists(), f"{name}: no such file"


def test_readme_names_every_module_and_every_program():
    readme = read(ROOT / "README.md")
    files = readme[readme.index("## Files") :]
    modules = [file.name for file in ROOT.glob("learnware_jax/**/*.py") if file.stat().st_size]
    assert {name for name in modules if name not in files} == set()
    table = readme[readme.index("## Commands") : readme.index("## Data")]
    programs = [file.stem for file in ROOT.glob("configs/[!_]*.py")]
    assert {name for name in programs if not re.search(rf"\b{name}\b", table)} == set()


# ---- commands


def quoted(file):
    """(module, arguments) of every command that a page or a docstring quotes."""
    for part in code(read(file)) if file.suffix == ".md" else [read(file)]:
        for module, given in COMMAND.findall(part):
            found = [shlex.split(each)[0].rstrip(",.;") for each in re.findall(FLAG, given)]
            # A variable of the shell could be anything: a number serves for any.
            found = [re.sub(r"\$\(?\w+\)?", "7", each) for each in found]
            yield module, [each if "(" in each else each.rstrip(")") for each in found]


def refused(module, arguments):
    """Why a command would be refused, or nothing."""
    package, _, name = module.partition(".")
    if not importlib.util.find_spec(module):
        return "no such module"
    if package == "experiments" and Path("configs", f"{name}.py").exists():
        try:
            command.read(name, arguments, several_hosts=name == "search")
        except (ValueError, OSError) as error:
            return str(error)
    elif package == "experiments":
        importlib.import_module(module)
        unknown = {each[2:].partition("=")[0] for each in arguments} - set(flags.FLAGS)
        return f"no such flags: {unknown}" if unknown else ""
    return ""


def test_commands_parse(monkeypatch):
    """The module is there, and so are the configuration, its size and every setting's name."""
    monkeypatch.chdir(ROOT)
    every = {
        (file.name, module, tuple(arguments))
        for file in [*PAGES, *PROGRAMS]
        for module, arguments in quoted(file)
    }
    assert len(every) > 100
    wrong = [(*one, why) for one in sorted(every) if (why := refused(one[1], list(one[2])))]
    assert not wrong, "\n".join(map(str, wrong))


def test_settings_and_sizes_that_are_named_exist(monkeypatch):
    """Also those in the middle of a sentence."""
    monkeypatch.chdir(ROOT)
    files = sorted(Path("configs").glob("[!_]*.py"))
    sizes = {file: getattr(command._module(file), "SIZES", ("",)) for file in files}
    known = {
        key
        for file in files
        for size in sizes[file]
        for key, _ in command.leaves(command.load(file, size))
    } | {"dry_run"}
    for file in [*PAGES, *PROGRAMS]:
        text = read(file)
        keys = set(re.findall(r"--config\.([a-z_.]+[a-z_])\b", text)) - known
        assert not keys, f"{file.name}: no configuration has {keys}"
        for name, size in re.findall(r"(configs/[a-z_]+\.py):([\w.-]*\w)", text):
            command.load(Path(name), size)  # ValueError for another size


def test_targets_and_extras_that_are_named_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = ast.parse((ROOT / "setup.py").read_text())
    (table,) = (
        each.value
        for each in setup.body
        if isinstance(each, ast.Assign) and each.targets[0].id == "EXTRAS"
    )
    extras = {key.value for key in table.keys}
    for page in PAGES:
        for part in code(read(page)):
            assert set(re.findall(r"^ *make (\w+)", part, re.MULTILINE)) <= targets, part
            for names in re.findall(r"\.\[([\w,]+)\]", part):
                assert set(names.split(",")) <= extras, part


# ---- examples


def test_examples_run(tmp_path):
    """As a reader runs them, without checks of types; what takes a language model is left out."""
    pages = [read(ROOT / "docs" / name) for name in ("library.md", "howto.md")]
    blocks = re.findall(r"^```python\n(.*?)^```$", "".join(pages), re.DOTALL | re.MULTILINE)
    short = [block for block in blocks if "model" not in block]
    assert len(blocks) == len(short) + 2
    (tmp_path / "docks").symlink_to(ROOT / "docks")
    ran = subprocess.run(
        [sys.executable, "-c", "".join(short)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "['high', 'middle', 'low']" in ran.stdout and "finance\n" in ran.stdout


# ---- the site


class Page(HTMLParser):
    """What a page has: ids, tags, and what it loads."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.tags, self.loads = set(), [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids.add(given.get("id"))
        if tag in ("script", "img", "iframe") or given.get("rel") == "stylesheet":
            self.loads.append(given.get("src") or given.get("href") or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_every_public_name_of_every_module_is_on_a_page(built):
    for file in ROOT.glob("learnware_jax/**/*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        names = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        if nodes:
            page = Page(built / "modules" / f"{module}.html")
            assert {f"{module}.{name}" for name in names} <= page.ids, module


def test_pages_load_nothing_from_elsewhere(built):
    for file in built.rglob("*.html"):
        if file.name != "study.html":  # has a test of its own
            assert not [each for each in Page(file).loads if "//" in each], file.name


def test_formulas_become_mathml(built):
    text = prose(read(ROOT / "docs" / "mathematics.md"))
    formulas = len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL))
    assert formulas > 50
    page = (built / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math ") == formulas
    # What the converter does not know it writes as it stands, with its backslash.
    assert not re.findall(r"<m[a-z]+>\\[^<]*", page)


def test_docstrings_are_text_and_not_markup():
    docstring = "<p, q> of [a]; `x[0] < 1`.\n\n    f[0] < 1\n\n>>> f[0]\n1\n\nEnd."
    assert site.readable(docstring) == (
        "&#60;p, q> of &#91;a]; `x[0] < 1`.\n\n    f[0] < 1\n\n```pycon\n>>> f[0]\n1\n```\n\nEnd."
    )


def test_links_of_the_site():
    root = site.site_links("[a](docs/a.md#b) [c](SECURITY.md) [n](notebooks/n.py)", in_docs=False)
    assert root == "[a](a.md#b) [c](security.md) n (`notebooks/n.py`)"
    page = site.site_links("[r](../README.md#b) [a](a.md) ![f](f.png)", in_docs=True)
    assert page == "[r](index.md#b) [a](a.md) ![f](f.png)"
