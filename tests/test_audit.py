"""The audit at its smoke size, and what a build does so that a dock gives away less."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import audit as audit_config
from configs import build as build_config
from configs import select as select_config
from configs import specify as specify_config
from experiments import audit, build, specify
from experiments.common import dock_space, embed_texts
from experiments.ranking import open_dock
from learnware_jax.dock import index, store
from learnware_jax.dock.tasks import load_task
from learnware_jax.specification import privacy
from learnware_jax.specification.header import Header, size_and_residual
from learnware_jax.specification.rkme import RKME


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = audit_config.get_config("smoke")
    config.workdir = str(tmp_path_factory.mktemp("audit"))
    return config


@pytest.fixture(scope="module")
def output(config):
    return audit.run(config)


def test_audit_writes_a_row_for_every_kind(config, output):
    assert json.loads((Path(config.workdir) / "audit.json").read_text()) == output
    found = [
        (row["kind"], row["reducer"], row["n"], row["m"], row["epsilon"]) for row in output["rows"]
    ]
    private = [("rkme", "private", 30, 8), ("mean", "", 30, None), ("sketch", "", 30, None)]
    assert found == [
        ("rkme", "random", 30, 8, "inf"),
        ("rkme", "gauss_newton from noise", 30, 8, "inf"),
        *((*kind, epsilon) for epsilon in (1.0, "inf") for kind in private),
        *(("one_step", "", 30, None, epsilon) for epsilon in (1.0, "inf")),
        *(("pave", "dp_sgd", 30, None, epsilon) for epsilon in (1.0, "inf")),
    ]
    lines = (Path(config.workdir) / "audit.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + len(found) and "rkme | random | 30 | 8 | inf" in lines[4]


def test_attacks_find_what_is_there(output):
    """A mean of 30 texts in hundreds of dimensions gives all of them away, also as a reduced set
    that holds none of them; random rows are copies; noise for epsilon = 1 hides both."""
    rows = {(row["kind"], row["reducer"], row["epsilon"]): row for row in output["rows"]}
    for kind in (
        ("mean", ""),
        ("sketch", ""),
        ("one_step", ""),
        ("rkme", "gauss_newton from noise"),
    ):
        assert rows[*kind, "inf"]["auc"] > 0.98 and rows[*kind, "inf"]["tpr_at_1pct"] > 0.9
    copied = rows["rkme", "random", "inf"]
    assert copied["copies"] == copied["member_rate"] == 1
    assert 0.58 < copied["auc"] < 0.5 + 0.5 * 8 / 30 + 0.05
    for row in output["rows"]:
        if row["kind"] == "rkme" and row["reducer"] != "random":
            assert row["copies"] == 0
        if row["epsilon"] == 1.0:
            assert (row["auc_bound"], row["tpr_bound"]) == privacy.leakage_bound(1.0, 1e-6)
            # Eight specifications of 30 rows: a standard error of about 0.03.
            assert row["auc"] < row["auc_bound"] + 0.1 and row["tpr_at_1pct"] < 0.15
    assert all(row["quality"] == 1 for row in output["rows"][:2])


def test_audit_goes_on_where_it_stopped(config, output, monkeypatch):
    """Rows that are there are read, and the one that is not is made the same again."""
    records = sorted((Path(config.workdir) / "rows").iterdir())
    assert len(records) == len(output["rows"])
    gone = next(r for r in records if json.loads(r.read_text())["kind"] == "mean")
    wanted = json.loads(gone.read_text())
    gone.unlink()
    made = []
    true = audit.audit
    monkeypatch.setattr(audit, "audit", lambda *a: made.append(a[0].kind) or true(*a))
    audit.run(config)
    assert made == ["mean"]
    again = json.loads(gone.read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in wanted.items() if k != "seconds"
    }


def test_few_shadows_and_impossible_epsilons_are_refused(config):
    bad = config.copy_and_resolve_references()
    bad.shadows = {"30": 4}
    with pytest.raises(ValueError, match="want at least 8"):
        audit.run(bad)
    bad = config.copy_and_resolve_references()
    bad.epsilons = (0.0,)
    with pytest.raises(ValueError, match="want epsilon above 0"):
        audit.run(bad)


def test_the_share_of_words_is_the_greatest_one_by_hand():
    texts = [frozenset(["a", "b", "c", "d"]), frozenset(["x", "y"]), frozenset(["a", "b"])]
    words = frozenset(["a", "b", "e"])
    assert audit._likest(words, texts, np.array([True, True, False])) == 2 / 5
    assert audit._likest(words, texts, np.array([True, True, True])) == 2 / 3


# ---- builds


@pytest.fixture
def small(tmp_path):
    config = build_config.get_config("smoke")
    config.dock, config.tasks = str(tmp_path / "dock"), ("piqa", "recurrences")
    return config


@pytest.mark.parametrize("reducer", ["random", "herding"])
def test_reducers_that_publish_rows_are_refused_unless_named(small, reducer, capsys):
    small.specification.reducer = reducer
    with pytest.raises(ValueError, match=rf"publish_rows={reducer} if everybody may know"):
        build.run(small)
    assert not Path(small.dock).exists()
    small.specification.publish_rows = reducer
    build.run(small)
    assert f"warning: {reducer} publishes embeddings" in capsys.readouterr().err
    found = store.read_learnware(small.dock, "piqa")
    space, encoder = dock_space(small.dock, small.specification)
    task = build.tasks_of(["piqa"])[0]
    x = embed_texts(encoder, build.developer_half(task, small), space, keep=True)
    assert len(privacy.copies(found.spec.z, x)) == len(found.spec.z)


def test_naming_another_reducer_is_refused(small):
    small.specification.publish_rows = "herding"
    with pytest.raises(ValueError, match="want the reducer's name"):
        build.run(small)


def test_points_that_are_texts_are_refused_whatever_made_them(small):
    """As many points as texts, started from texts: the texts themselves."""
    small.specification.start, small.specification.points = "rows", 32
    with pytest.raises(ValueError, match=r"32 of the 32 points of 'piqa' are embeddings of its"):
        build.run(small)
    assert store.list_ids(small.dock) == []


def test_a_private_dock_holds_public_points_and_tells_no_numbers(small):
    small.specification.privacy.epsilon = "3"
    small.specification.privacy.public = ("natural-questions", "procedures")
    build.run(small)
    texts = [t for name in small.specification.privacy.public for t in load_task(name, 500)]
    space, encoder = dock_space(small.dock, small.specification)
    public = embed_texts(encoder, texts, space, keep=True)
    for learnware in store.load(small.dock):
        about = learnware.header.about
        assert not {"n", "residual", "seed", "gap"} & set(about)
        said = about["privacy"]
        assert (said["mechanism"], said["epsilon"], said["delta"]) == ("gaussian", 3.0, 1e-6)
        assert said["neighbours"] == "replace one row" and said["dimension"] == 256
        assert len(privacy.copies(learnware.spec.z, public)) == len(learnware.spec.z)
        assert size_and_residual(learnware.header) == (1, 256 * said["noise"] ** 2)
        # 32 texts: noise would tell, but for its rounding.
        assert np.log2(said["noise"]) % 1 == 0
    # It is ranked as any other dock, and indexed.
    dock = open_dock(small.dock, select_config.get_config("smoke").specification)
    np.testing.assert_array_equal(dock.pool.n[:2], [1, 1])
    index.update(small.dock, jax.random.key(0))
    assert index.check(small.dock) == []


def test_two_private_builds_differ(small, tmp_path):
    """Their noise comes from the system, not from the seed."""
    small.specification.privacy.epsilon = "1"
    found = []
    for name in ("a", "b"):
        small.dock = str(tmp_path / name)
        build.run(small)
        spec = store.read_learnware(small.dock, "piqa").spec
        found.append((spec.z.tobytes(), spec.beta.tobytes()))
    assert found[0] != found[1]


def test_a_bandwidth_from_private_texts_is_refused(small):
    small.specification.privacy.epsilon = "1"
    small.specification.kernel.gamma = "median"
    with pytest.raises(ValueError, match="is not private; give a number"):
        build.run(small)


def test_specify_refuses_what_it_cannot_keep(tmp_path):
    config = specify_config.get_config("smoke")
    config.workdir, config.specification.privacy.epsilon = str(tmp_path / "w"), "1"
    with pytest.raises(ValueError, match="makes no private specifications"):
        specify.run(config)
    config.specification.privacy.epsilon, config.specification.reducer = "inf", "herding"
    with pytest.raises(ValueError, match="publish_rows=herding"):
        specify.run(config)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan"])
def test_an_impossible_epsilon_is_refused(small, epsilon):
    small.specification.privacy.epsilon = epsilon
    with pytest.raises(ValueError, match=r"specification\.privacy: .* want epsilon above 0"):
        build.run(small)
    assert not Path(small.dock).exists()


# ---- headers


SAID = {"mechanism": "gaussian", "dimension": 3, "noise": 1.0, "epsilon": 1.0, "delta": 0.1}
LIES = (
    *({"dimension": 0}, {"dimension": 2**40}, {"dimension": 3.0}, {"noise": -1.0}, {"noise": 0.0}),
    *({"noise": 1e200}, {"epsilon": 0.0}, {"delta": 2.0}, {"mechanism": None}),
)


def private_header(**said):
    space = {"kernel": {"name": "gaussian", "gamma": 0.5}, "dimension": 3}
    release = privacy.Release(np.zeros(7), 0.2)
    about = privacy.statement(release, epsilon=1.0, delta=1e-6, features="these") | said
    return Header(1, "rkme", space, {"points": 2, "privacy": about})


SPEC = RKME(np.eye(3, dtype=np.float32)[:2], np.array([0.5, 0.5]))


def test_a_private_header_is_kept_and_counts_as_one_row(tmp_path):
    store.write_spec(tmp_path / "a.safetensors", SPEC, private_header())
    _, header = store.read_spec(tmp_path / "a.safetensors")
    assert header == private_header()
    assert size_and_residual(header) == (1, 7 * 0.25**2)


@pytest.mark.parametrize(
    "about",
    [
        {"n": 10},
        {"residual": 0.1},
        *({"privacy": SAID | lie} for lie in LIES),
        {"privacy": {"noise": 1.0}},
        {"privacy": "yes"},
    ],
)
def test_headers_that_say_too_much_or_nothing_are_refused(tmp_path, about):
    header = private_header()
    with pytest.raises(ValueError, match="want the mechanism and its dimension"):
        store.write_spec(
            tmp_path / "a.safetensors", SPEC, header._replace(about=header.about | about)
        )
