"""What the documentation needs beyond Markdown: a MkDocs hook, named in mkdocs.yml.

README.md and its neighbours become pages, every public module gets one, and formulas become MathML,
which browsers show without a script or a network.
"""

import html
import re
import textwrap
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
SOURCES = "configs|experiments|learnware_jax|notebooks|scripts|tests|CITATION.cff|LICENSE"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def public_modules() -> list[str]:
    """The modules of the library, as they are imported, but for empty ones and private ones."""
    files = sorted(ROOT.glob("learnware_jax/**/*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if f.stat().st_size]
    names = [name.removesuffix(".__init__") for name in names]
    return [name for name in names if "._" not in name]


def site_links(markdown: str, *, in_docs: bool) -> str:
    """Links between Markdown files, as they are in the repository, made those of the site."""
    up = "../" if in_docs else ""
    for source, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"]({up}{source}", f"]({page}")
    if not in_docs:
        markdown = markdown.replace("](docs/", "](")
    # The site has no sources: a link to one becomes its name.
    return re.sub(rf"\[([^]]*)\]\(({up}(?:{SOURCES})[^)]*)\)", r"\1 (`\2`)", markdown)


def mathml(page: str) -> str:
    """The HTML of a page, with MathML for its TeX."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2])
        if match[1] == "span":
            return convert(tex)
        return f'<div class="formula">{convert(tex, display="block")}</div>'

    return FORMULA.sub(formula, page)


def readable(docstring: str) -> str:
    """A docstring in plain text as Markdown: examples fenced, and no < or [ taken for markup."""

    def paragraph(text: str) -> str:
        if text.lstrip().startswith(">>>"):
            return f"```pycon\n{textwrap.dedent(text)}\n```"
        if text.startswith("    "):
            return text
        parts = re.split(r"(`[^`]*`)", text)
        parts[::2] = [re.sub(r"[<[$]", lambda m: f"&#{ord(m[0])};", part) for part in parts[::2]]
        return "".join(parts)

    return "\n\n".join(map(paragraph, docstring.split("\n\n")))


class Docstrings(griffe.Extension):
    """Makes every docstring `readable`."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)


def on_config(config: MkDocsConfig) -> None:
    """List the modules behind the pages of mkdocs.yml."""
    assert config.nav is not None
    config.nav.append({"Modules": [f"modules/{name}.md" for name in public_modules()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not in docs/."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in public_modules():
        title = f"---\ntitle: {name.removeprefix('learnware_jax.')}\n---\n\n"
        files.append(File.generated(config, f"modules/{name}.md", content=f"{title}::: {name}\n"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page."""
    return site_links(markdown, in_docs=page.file.src_uri not in ROOT_PAGES.values())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert the formulas of a page."""
    return mathml(html)
