"""Every notebook runs from its own folder, draws its figures, warns of nothing, and is right."""

import ast
import json
import re
import sys
from pathlib import Path

import jupytext
import numpy as np
import pytest
from nbclient import NotebookClient
from scipy.stats import binomtest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"), key=lambda file: file.stem)
IMPORTED = {"learnware_jax", "numpy", "jax", "pandas", "matplotlib"}
# Of each notebook: its figures, and what the test wants to know of its variables.
WANTED = {
    "first_selection": (
        1,
        """dict(
    texts=texts,
    written=file.read_text().split("\\n"),
    selected=selected,
    decision=found.decision,
    points=len(mine.spec.beta),
    nearest=float(((mine.spec.z[:, None] - x) ** 2).sum(2).min()),
    right=share["right"].tolist(),
    counted=[int((answers[name] == answers["wanted"]).sum()) for name in right],
    rows=len(rows),
)""",
    ),
    "geometry": (
        6,
        """dict(
    witness=float(difference),
    mmd=float(squared_mmd(p, q, kernel)),
    x=x.astype(float).tolist(),
    y=y.astype(float).tolist(),
    off={name: float(value) for name, value in off.items()},
    pca=pca.tolist(),
    squared=squared.tolist(),
    cosines=list(cosines.values()),
    sums=[float(share.sum()) for share in shares.values()],
    modules=attribution[list(start.b)].sum(axis=1).tolist(),
    correlations=[float(np.mean(every)), float(np.mean(rest))],
)""",
    ),
    "new_specification": (
        1,
        """dict(
    rows=[trigram_rows(texts).mean(0).tolist() for texts in (owners[3], users[5])],
    distance=float(squared["trigrams"][5, 3]),
    same=trigram_rows(["abca", "ABCA", "xyz", "aaaa"]).tolist(),
    first={kind: int((picks == place)[same].sum()) for kind, picks in first.items()},
    split=[int(by_embeddings), int(by_trigrams)],
    chance=float(chance),
)""",
    ),
    "reading_a_ranking": (
        3,
        """dict(
    found=found.ids[:2],
    undominated=found.undominated,
    decisions={name: ranked.decision for name, ranked in strangers.items()},
    beyond={name: bool(r.distance[0] > dock.threshold) for name, r in strangers.items()},
    width=grown["width"].tolist(),
    sets=grown["set"].tolist(),
    weights=dict(zip(mixture.ids, mixture.weights.tolist())),
    mixed=[alone.squared_mmd, mixture.squared_mmd],
    unseen=unseen["task"].tolist(),
)""",
    ),
}


def executed(file):
    """A notebook after its run, and its variables as WANTED asks for them."""
    notebook = jupytext.read(file)
    asked = jupytext.reads(f"# %%\nprint(__import__('json').dumps({WANTED[file.stem][1]}))", "py")
    notebook.cells += asked.cells
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(file.parent)}},
    ).execute()
    *shown, answer = (cell for cell in notebook.cells if cell.cell_type == "code")
    outputs = [output for cell in shown for output in cell.outputs]
    return outputs, json.loads(answer.outputs[0].text)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda file: file.stem)
def run(request):
    return request.param.stem, *executed(request.param)


def test_there_is_a_check_for_every_notebook_and_none_has_outputs():
    assert [file.stem for file in NOTEBOOKS] == sorted(WANTED)
    # What somebody's Jupyter leaves there is never committed.
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"notebooks/*.ipynb", ".ipynb_checkpoints/"} <= set(ignored)
    kept = [
        file.name
        for file in (ROOT / "notebooks").iterdir()
        if file.suffix != ".ipynb" and file.name not in ("__pycache__", ".ipynb_checkpoints")
    ]
    assert sorted(kept) == [file.name for file in NOTEBOOKS]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_import_the_library_and_link_what_is_there(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) <= IMPORTED
    links = re.findall(r"\]\(([^)]+)\)", file.read_text())
    assert links and [link for link in links if not (file.parent / link).exists()] == []


def test_every_figure_is_drawn_and_nothing_is_complained_of(run):
    name, outputs, _ = run
    assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []
    drawn = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(drawn) == WANTED[name][0]
    # A figure that is not the last thing in its cell is not shown, only named.
    assert not [
        o
        for o in outputs
        if re.match(r"<Figure|\[<", o.get("data", {}).get("text/plain", "")) and o not in drawn
    ]


def test_what_a_notebook_says_is_so(run):
    name, _, found = run
    CHECKS[name](found)


def check_first_selection(found):
    assert found["texts"] == found["written"] and len(found["texts"]) == 64
    assert found["selected"] == found["decision"] == "reuters-companies"
    assert found["points"] == 32
    assert found["nearest"] > 1e-3  # no point is a text
    np.testing.assert_allclose(found["right"], np.array(found["counted"]) / found["rows"])
    base, selected = found["right"]
    assert selected > base + 0.1


def check_geometry(found):
    x, y = np.array(found["x"]), np.array(found["y"])

    def mean_kernel(a, b):
        return np.exp(-0.1 * ((a[:, None] - b) ** 2).sum(2)).mean()

    mmd = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert abs(found["mmd"] - mmd) < 1e-6 and abs(found["witness"] - mmd) < 1e-6
    # Kernel PCA draws nothing longer than it is; MDS is the better of the two on the whole.
    squared, pca = np.array(found["squared"]), np.array(found["pca"])
    assert (((pca[:, None] - pca) ** 2).sum(2) <= squared + 1e-4).all()
    assert found["off"]["MDS"] < found["off"]["kernel PCA"]
    np.testing.assert_allclose(found["sums"], found["cosines"], atol=1e-5)
    np.testing.assert_allclose(found["modules"], found["cosines"], atol=1e-5)
    # Of both kinds of vector: the task of the same domain is the closer one.
    one_step, far_step, pave, far_pave = found["cosines"]
    assert one_step > far_step + 0.1 and pave > far_pave + 0.1
    every, rest = found["correlations"]
    assert 0 < rest < every


def check_new_specification(found):
    p, q = map(np.array, found["rows"])
    np.testing.assert_allclose(found["distance"], ((p - q) ** 2).sum(), atol=1e-6)
    abca, same, xyz, aaaa = map(np.array, found["same"])
    # " ab", "abc", "bca", "ca " once each; case does not count.
    np.testing.assert_allclose(sorted(abca)[-5:], [0, 0.5, 0.5, 0.5, 0.5])
    assert (abca == same).all() and abca @ xyz == 0
    # " aa" and "aa " once, "aaa" twice.
    np.testing.assert_allclose(sorted(aaaa)[-4:], [0, 0.5, 0.5, 0.5**0.5], rtol=1e-6)
    assert found["first"]["RKME of embeddings"] == found["first"]["mean of embeddings"] == 14
    assert 10 <= found["first"]["trigrams"] < 14
    by_embeddings, by_trigrams = found["split"]
    assert by_embeddings > by_trigrams
    assert found["chance"] == pytest.approx(binomtest(by_trigrams, sum(found["split"])).pvalue)


def check_reading_a_ranking(found):
    assert found["found"] == ["medmcqa-clinics", "medmcqa-sciences"]
    assert found["undominated"] == ["medmcqa-clinics"]
    assert found["decisions"]["molecules"] == "none"
    assert found["decisions"]["sitcom-dialogue"] == "headlines"
    assert {name: given == "none" for name, given in found["decisions"].items()} == found["beyond"]
    assert (np.diff(found["width"]) < 0).all() and found["sets"][0] > found["sets"][-1] == 1
    wires = found["weights"].pop("reuters-commodities")
    assert abs(wires - 0.5) < 0.1 and set(found["weights"]) <= {
        "medmcqa-clinics",
        "medmcqa-sciences",
    }
    alone, mixed = found["mixed"]
    assert mixed < alone / 2
    assert len(found["unseen"]) == 5


CHECKS = {
    "first_selection": check_first_selection,
    "geometry": check_geometry,
    "new_specification": check_new_specification,
    "reading_a_ranking": check_reading_a_ranking,
}
