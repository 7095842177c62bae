"""The page: it opens anywhere, says what Markdown says, and calls a tie a tie."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import page_in_browser
import pytest
from test_findings import OPTIONS, five_users

from configs import report as report_config
from experiments import report
from experiments.findings import findings, label

FIGURES = ("gap.svg", "gap.png", "scores.svg", "scores.png")
VOID = {"meta", "br", "hr", "img", "link", "input"}
MADE = {
    **{
        "command": "python -m experiments.study --config=configs/study.py:smoke",
        "commit": "c0ffee",
    },
    **{"hardware": "2 cores", "seeds": {"users": [0, 1]}, "settings": {"rows": 4}},
    **{"seconds": {"training": 1234.4}, "date": "2030-01-01"},
}


class Page(HTMLParser):
    """What a browser would find: open elements, loads, names, and tables of texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.references, self.tables = [], [], [], [], []
        self.seen, self.texts, self.metas, self.wide = set(), [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._look(tag, attrs)
        if tag in ("table", "svg") and self.last != ("div", [("class", "scroll")]):
            self.wide.append(tag)
        self.last = (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._look(tag, attrs)

    def _look(self, tag, attrs):
        self.seen.add(tag)
        if tag == "meta":
            self.metas |= {dict(attrs).get("name"): dict(attrs).get("content")}
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                (self.references if value.startswith("#") else self.loads).append(value.lstrip("#"))
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
            if name == "id":
                self.ids.append(value)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" in self.open:
            self.loads += re.findall(r"@import.*|url\((?!#).*", data)
        self.texts.append(data)


def study():
    evidence = five_users()
    evidence.users[4] = evidence.users[4]._replace(name="law-<b>&amp;|w")
    evidence.scores["<i>odd</i>"] = evidence.scores["rkme"]
    return {**findings(evidence, **OPTIONS), "made": MADE}


def write(content, folder):
    config = report_config.get_config()
    config.study, config.workdir = str(folder / "study.json"), str(folder / "report")
    Path(config.study).write_text(content if isinstance(content, str) else json.dumps(content))
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a report, and its page."""
    config = write(study(), tmp_path_factory.mktemp("report"))
    report.run(config)
    folder = Path(config.workdir)
    return folder, Page((folder / "report.html").read_text())


def test_the_page_is_whole_and_loads_nothing(made):
    _, page = made
    assert page.open == [] and page.loads == []
    assert {"svg", "table", "style"} <= page.seen
    assert not page.seen & {"script", "link", "img", "iframe", "i"}
    # Names of one figure are not those of the other, and all that is referred to is there.
    assert len(set(page.ids)) == len(page.ids) and set(page.references) <= set(page.ids)
    assert page.references


def test_a_phone_can_show_the_page(made):
    _, page = made
    assert page.metas["viewport"] == "width=device-width, initial-scale=1"
    # What is wider than a phone scrolls in its own box.
    assert page.wide == [] and {"table", "svg"} <= page.seen


needs_browser = pytest.mark.skipif(not page_in_browser.browser(), reason="no Chromium on the path")


@needs_browser
@pytest.mark.parametrize("width", page_in_browser.WIDTHS.values())
def test_a_browser_without_a_network_shows_all_of_the_page(made, width):
    folder, _ = made
    seen = page_in_browser.look(folder / "report.html", width)
    assert (seen.inner, seen.scroll) == (width, width)
    assert seen.out == seen.problems == seen.requests == []
    assert seen.letters >= 13


@needs_browser
def test_a_browser_finds_what_is_wrong_with_a_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width, initial-scale=1'>"
        "<p style='width: 900px; font-size: 8px'>wide</p><img src='missing.png'>"
        "<script>console.error('an error'); null.x</script>"
    )
    seen = page_in_browser.look(page, 360)
    assert seen.out == ["P: wide"] and seen.scroll > 900 - 1 and seen.letters == 8
    assert [url.rpartition("/")[2] for url in seen.requests] == ["missing.png"]
    problems = " ".join(seen.problems)
    assert all(word in problems for word in ("an error", "TypeError", "missing.png"))


def test_the_page_and_markdown_have_the_same_tables(made):
    folder, page = made
    lines = (folder / "report.md").read_text().splitlines()
    cells = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|") and not line.startswith("|---")
    ]
    assert cells == [row for table in page.tables for row in table]
    rows = {row[0]: row for row in page.tables[0]}
    assert rows["RKME of texts"][1] == "0.531 ± 0.031"
    assert set(rows) == {"contender", *map(label, study()["splits"]["a"])}


def test_names_are_texts(made):
    folder, page = made
    assert "law-<b>&amp;|w" in page.texts and "<i>odd</i>" in page.texts
    assert "law-<b>" not in (folder / "report.html").read_text()


def test_the_page_says_how_it_was_made(made):
    _, page = made
    text = "".join(page.texts)
    for value in (MADE["command"], "c0ffee", "2 cores", '{"users": [0, 1]}', "1,234"):
        assert value in text
    captions = [text for text in page.texts if text.startswith(("Share of the gap", "Balanced"))]
    origin = f'{MADE["command"]}; commit c0ffee; seeds {{"users": [0, 1]}}; 2 cores.'
    assert len(captions) == 2 and all(caption.endswith(origin) for caption in captions)


def test_the_same_study_is_the_same_page(made, tmp_path):
    folder, _ = made
    config = write(study(), tmp_path)
    report.run(config)
    for name in ("report.html", "report.md", *FIGURES):
        assert (Path(config.workdir) / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            (0.1, 0.01, 0.2),
            "It is better than the cosine of mean embeddings, by +0.10 [+0.01, +0.2",
        ),
        ((0.1, -0.01, 0.2), "Against the cosine of mean embeddings it is a tie: +0.10 [-0.01, +0."),
        ((0.1, 0.0, 0.2), "Against the cosine of mean embeddings it is a tie: +0.10 [+0.00, +0."),
        ((-0.1, -0.2, -0.01), "It is worse than the cosine of mean embeddings, by -0.10 [-0.20, "),
        ((None, None, None), "It cannot be compared with the cosine of mean embeddings there."),
    ],
)
def test_a_tie_is_called_a_tie(ends, said):
    content = study()
    content["splits"] = {"a": content["splits"]["a"]}
    content["comparisons"]["a"]["mean_cosine"] = dict(
        zip(("difference", "lower", "upper"), ends, strict=True)
    )
    assert [line.startswith(said) for line in report.headline(content)].count(True) == 1


@pytest.mark.parametrize(
    ("split", "ends", "said"),
    [
        (
            "a",
            (0.95, 0.91, 0.99),
            "0.95 of the gap [0.91, 0.99], at least the 0.9 that was asked for.",
        ),
        (
            "a",
            (0.9, 0.8, 0.99),
            "[0.80, 0.99], at least the 0.9 that was asked for, though the inter",
        ),
        (
            "a",
            (0.89, 0.8, 0.99),
            "0.89 of the gap [0.80, 0.99] and misses the 0.9 that was asked for.",
        ),
        ("b", (0.61, 0.6, 0.7), "[0.60, 0.70], at least the 0.6 that was asked for."),
        ("b", (0.59, 0.5, 0.7), "and misses the 0.6 that was asked for."),
        ("c", (0.1, 0.0, 0.7), "it closes 0.10 of the gap [0.00, 0.70]."),
        ("c", (None, None, None), "there is no gap to close"),
    ],
)
def test_a_missed_bar_is_said(split, ends, said):
    content = study()
    content["splits"][split]["rkme"] |= dict(
        zip(("gap_closed", "lower", "upper"), ends, strict=True)
    )
    (line,) = [one for one in report.headline(content) if one.startswith(f"On split {split} ")]
    assert said in line


def test_the_headline_counts_by_hand():
    lines = report.headline(study())
    assert lines[0].startswith("The dock has 3 learnwares, and 5 tasks ask for one.")
    assert lines[0].endswith("judged here is RKME of texts, chosen on other tasks.")
    assert lines[1].startswith("On split a (tasks of the dock, other rows) its picks score 0.531, ")
    assert "It beats the base model by more than one standard error on 1 of 2 tasks" in lines[-3]
    assert lines[-2].startswith(
        "Its threshold for abstention serves 25% of split c, 75% of split a,"
    )
    # A user's 1/4 of picks, of one user in two on a, of all on b and c.
    assert (
        lines[-1] == "Of its picks, these are corrupted learnwares: 12% on a, 25% on b, 25% on c."
    )


def refused(content, folder, message):
    config = write(content, folder)
    with pytest.raises(ValueError, match=rf"study\.json: {message}"):
        report.run(config)
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"this is no JSON \(.*\); want a study\.json of experiments\.study\.$"),
        ([1], r"this is a list; want"),
        ({"splits": {}}, r"learnwares, tasks, best_family, comparisons, .*, made, a split missing"),
    ],
)
def test_what_is_no_study_is_refused(content, message, tmp_path):
    refused(content, tmp_path, message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("rows",), r"rows missing or of another kind; want"),
        (("made", "commit"), r"made\.commit missing"),
        (("splits", "b", "rkme", "score"), r"'score' is missing; want"),
        (("rows", 0, "contenders", "oracle"), r"'oracle' is missing; want"),
    ],
)
def test_what_a_study_lacks_is_named(path, message, tmp_path):
    content = json.loads(json.dumps(study()))
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    refused(content, tmp_path, message)


def test_a_file_that_is_not_there_is_named(tmp_path):
    config = report_config.get_config()
    config.study, config.workdir = str(tmp_path / "none.json"), str(tmp_path / "report")
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file; want a study"):
        report.run(config)
