"""Learnwares of the package `learnware`: its distances, its files both ways, and zips that lie."""

import io
import json
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from absl import flags
from absl.testing import flagsaver

from experiments import dock as dock_command
from learnware_jax.dock import interop, store
from learnware_jax.dock.store import Learnware
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.specification.header import Header, IncompatibleSpecifications
from learnware_jax.specification.kernels import from_dict
from learnware_jax.specification.rkme import RKME

FIXTURES = Path(__file__).parent / "fixtures"
MADE = json.loads((FIXTURES / "learnware_rkme.json").read_text())
NAMES, FILES = MADE["names"], MADE["files"]
DISTANCES = np.array(MADE["distances"])
PLAIN = json.loads(FILES["low"])
SPACE = {"encoder": "mini", "dimension": 5, "kernel": {"name": "gaussian", "gamma": 0.25}}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9}
SEMANTIC = {
    "Name": {"Type": "String", "Values": "loans"},
    "Description": {"Type": "String", "Values": "texts of loans"},
    "Scenario": {"Type": "Tag", "Values": ["Business", "Financial"]},
    "License": {"Type": "Class", "Values": ["MIT"]},
}


def entry(**changes) -> dict:
    """An entry of stat_specifications."""
    return {
        "module_path": "learnware.specification",
        "class_name": "RKMETableSpecification",
        "file_name": "rkme.json",
        "kwargs": {},
    } | changes


def members(spec: str = FILES["low"], semantic=SEMANTIC, **entry_changes) -> dict[str, bytes]:
    """What a zip of the package holds, by name."""
    config = {"model": {"class_name": "Model"}, "stat_specifications": [entry(**entry_changes)]}
    held = {"learnware.yaml": yaml.safe_dump(config), "rkme.json": spec, "__init__.py": "1 / 0"}
    if semantic is not None:
        held["semantic_specification.json"] = json.dumps(semantic)
    return {name: text.encode() for name, text in held.items()}


def pack(held, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with these members: pairs of a name, or a ZipInfo, and bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in held:
            archive.writestr(name, data)
    return stream.getvalue()


def zip_of(path: Path, *args, **kwargs) -> Path:
    path.write_bytes(pack(members(*args, **kwargs).items()))
    return path


def own() -> Learnware:
    rng = np.random.default_rng(0)
    spec = RKME(rng.normal(size=(3, 5)).astype(np.float32), rng.dirichlet(np.ones(3)))
    about = {"points": 3, "n": 40, "residual": 0.01, "seed": 7}
    card = {"name": "sums", "domain": "mathematics", "model": {"name": "SmolLM2-135M"}}
    return Learnware("own", card, spec, Header(1, "rkme", SPACE, about))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Specifications


def test_distances_are_the_packages():
    specs = [interop.read_rkme(FILES[name].encode()) for name in NAMES]
    ours = np.array([[interop.distance(p, q) for q in specs] for p in specs])
    np.testing.assert_allclose(ours, DISTANCES, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(ours.argsort(1), DISTANCES.argsort(1))


@pytest.mark.parametrize("name", [*NAMES, "wide", "text"])
def test_specifications_survive_reading_and_writing(name):
    fields = json.loads(FILES[name])
    found = interop.read_rkme(FILES[name].encode())
    np.testing.assert_array_equal(found.spec.z, fields["z"])
    np.testing.assert_array_equal(found.spec.beta, fields["beta"])
    assert found.spec.z.dtype == found.spec.beta.dtype == np.float64
    assert interop.write_rkme(found) == FILES[name].encode()


def test_float32_points_are_written_with_all_their_digits():
    found = interop.read_rkme(FILES["low"].encode())
    rounded = found._replace(spec=RKME(found.spec.z.astype(np.float32), found.spec.beta))
    back = interop.read_rkme(interop.write_rkme(rounded))
    np.testing.assert_array_equal(back.spec.z.astype(np.float32), rounded.spec.z)
    assert interop.distance(rounded, back) == 0


def test_distances_in_other_spaces_are_refused():
    low, wide, text = (interop.read_rkme(FILES[name].encode()) for name in ("low", "wide", "text"))
    with pytest.raises(ValueError, match=r"0\.1, 'RKMETableSpecification', 8.* and \(0\.5"):
        interop.distance(low, wide)
    with pytest.raises(ValueError, match="RKMETextSpecification"):
        interop.distance(low, text)


def changed(**changes) -> str:
    return json.dumps(PLAIN | changes)


def without(field: str) -> str:
    return json.dumps({name: value for name, value in PLAIN.items() if name != field})


Z, BETA = PLAIN["z"], PLAIN["beta"]
BAD_JSON = {
    "not JSON": (FILES["low"][:-1], "not a JSON text"),
    "no object": ("[1]", "got a list"),
    "deep": ("[" * 100_000, "not a JSON text"),
    "deep but whole": ("[" * 60 + "]" * 60, "nested deeper"),
    "NaN": (changed(z=[[float("nan")] * 8] * 10), "want a finite number"),
    "infinity": (FILES["low"].replace('"gamma":0.1', '"gamma":1e999'), "gamma is inf"),
    "infinite beta": (changed(beta=[float("inf")] * 10), "want a finite number"),
    "no z": (without("z"), "has no z"),
    "no rows": (changed(z=[]), "z is not a list"),
    "no columns": (changed(z=[[]] * 10), "at least one row and one column"),
    "flat": (changed(z=Z[0]), "z is not a list"),
    "images": (changed(z=[Z, Z]), "z is not a list"),
    "strings": (changed(z=[["1"] * 8] * 10), "z is not a list"),
    "booleans": (changed(z=[[True] * 8] * 10), "z is not a list"),
    "ragged": (changed(z=[*Z[:-1], Z[0][:-1]]), "7 to 8 numbers"),
    "overflow": (changed(z=[[1e300] * 8] * 10), "overflow float32"),
    "beyond float64": (changed(z=[[10**400] * 8] * 10), "an integer of 1329 bits"),
    "weights": (changed(beta=BETA[:-1]), "one floating-point weight a point"),
    "nested weights": (changed(beta=[[b] for b in BETA]), "beta is not a list"),
    "no simplex": (changed(beta=[-0.1, 1.1] + [0.0] * 8), "non-negative and sum to one"),
    "signed": (FILES["signed"], "non-negative and sum to one"),
    "zero gamma": (changed(gamma=0), "one positive number"),
    "gamma of strings": (changed(gamma="0.1"), "one positive number"),
    "no gamma": (without("gamma"), "has no gamma"),
    "no num_points": (without("num_points"), "has no num_points"),
    "no rows behind": (changed(num_points=0), "num_points is 0"),
    "fractional rows": (changed(num_points=2.5), "num_points is 2.5"),
    "image": (changed(type="RKMEImageSpecification"), "whose kernel is Gaussian"),
    "long type": (changed(type="x" * 10**6), "its type is 'xxx"),
    "long gamma": (changed(gamma="x" * 10**6), "gamma='xxx"),
    "language": (changed(language="en"), "language is 'en'"),
    "too large": (" " * (2**25 + 1), "33554433 bytes"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_specifications_are_refused(tmp_path, case):
    text, reason = BAD_JSON[case]
    with pytest.raises(ValueError, match=reason):
        interop.read_rkme(text.encode())
    # Spaces would be refused for their ratio.
    method = zipfile.ZIP_STORED if case == "too large" else zipfile.ZIP_DEFLATED
    (tmp_path / "a.zip").write_bytes(pack(members(text).items(), method))
    refuse(tmp_path, reason)


# Zips of the package


def refuse(folder: Path, reason: str) -> None:
    """a.zip is refused with one line that names the file and the reason; nothing is written."""
    store.create_dock(folder / "there", SPACE)
    before = snapshot(folder)
    for dock in ("there", "absent"):
        with pytest.raises(ValueError, match=reason) as raised:
            interop.import_zip(folder / dock, folder / "a.zip", "x")
        assert str(raised.value).startswith(f"read_zip: {folder / 'a.zip'}")
        assert len(str(raised.value)) < 700 and "\n" not in str(raised.value)
    assert snapshot(folder) == before and not (folder / "absent").exists()


def test_a_zip_of_the_packages_own_template():
    zipped = interop.read_zip(FIXTURES / "learnware_zip.zip")
    assert interop.write_rkme(zipped.specification) == FILES["low"].encode()
    assert zipped.card == {"name": "", "domain": "", "description": ""}
    assert zipped.adapter is None


def test_the_semantic_specification_that_the_yaml_names_is_read(tmp_path):
    held = dict(with_specs(entry(), semantic_specification={"file_name": "other.json"}))
    held["other.json"] = held.pop("semantic_specification.json")
    (tmp_path / "a.zip").write_bytes(pack(held.items()))
    assert interop.read_zip(tmp_path / "a.zip").card["name"] == "loans"


def test_learnwares_of_the_package_make_a_dock(tmp_path):
    for name in NAMES:
        interop.import_zip(tmp_path / "dock", zip_of(tmp_path / "a.zip", FILES[name]), name)
    assert store.check(tmp_path / "dock") == []
    space = store.read_space(tmp_path / "dock")
    assert space == {
        "encoder": "learnware:RKMETableSpecification",
        "dimension": 8,
        "kernel": {"name": "gaussian", "gamma": 0.1},
    }
    docked = [store.read_learnware(tmp_path / "dock", name) for name in NAMES]
    assert docked[0].card == {
        "name": "loans",
        "domain": "Business, Financial",
        "description": "texts of loans",
        "semantic_specification": SEMANTIC,
    }
    about = {"points": 10, "n": 60, "residual": 0.0, "residual_known": False}
    assert docked[0].header.about == about
    # float32 points cost digits, as the module says.
    specs = [interop.Specification(one.spec, 0.1, 60) for one in docked]
    ours = np.array([[interop.distance(p, q) for q in specs] for p in specs])
    np.testing.assert_allclose(ours, DISTANCES, rtol=0, atol=2e-8)
    np.testing.assert_array_equal(ours.argsort(1), DISTANCES.argsort(1))
    pool = build_pool(
        [one.spec for one in docked],
        from_dict(space["kernel"]),
        ids=NAMES,
        n=[one.header.about["n"] for one in docked],
        residual=[one.header.about["residual"] for one in docked],
    )
    user = interop.read_rkme(FILES["high"].encode())
    ranking = rank([user.spec], pool, n=[user.n])
    assert pool.ids[ranking.index[0][0]] == "high"


def test_text_keeps_its_language_on_the_way_through_a_dock(tmp_path):
    file = zip_of(tmp_path / "a.zip", FILES["text"], class_name="RKMETextSpecification")
    interop.import_zip(tmp_path / "dock", file, "text")
    interop.export_zip(tmp_path / "dock", "text", tmp_path / "b.zip")
    zipped = interop.read_zip(tmp_path / "b.zip")
    assert zipped.specification.type == "RKMETextSpecification"
    assert zipped.specification.language == ("en", "fr")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        semantic = json.loads(archive.read("semantic_specification.json"))
    assert semantic["License"] == SEMANTIC["License"]
    assert semantic["Scenario"] == SEMANTIC["Scenario"]


@pytest.mark.parametrize(
    ("spec", "difference"),
    [(FILES["wide"], "kernel.gamma is 0.5 and 0.1"), (FILES["text"], "encoder is ")],
    ids=["gamma", "type"],
)
def test_a_dock_refuses_another_space(tmp_path, spec, difference):
    interop.import_zip(tmp_path / "dock", zip_of(tmp_path / "a.zip"), "low")
    before = snapshot(tmp_path / "dock")
    kind = json.loads(spec)["type"]
    with pytest.raises(IncompatibleSpecifications, match=difference):
        interop.import_zip(
            tmp_path / "dock", zip_of(tmp_path / "a.zip", spec, class_name=kind), "other"
        )
    assert snapshot(tmp_path / "dock") == before


def test_what_a_dock_refuses_leaves_no_dock(tmp_path):
    with pytest.raises(ValueError, match="is not an id"):
        interop.import_zip(tmp_path / "dock", zip_of(tmp_path / "a.zip"), "../up")
    assert not (tmp_path / "dock").exists()


def with_yaml(text: str | bytes) -> list:
    data = text if isinstance(text, bytes) else text.encode()
    return [*(members() | {"learnware.yaml": data}).items()]


def with_specs(*entries, **rest) -> list:
    return with_yaml(yaml.safe_dump({"stat_specifications": [*entries], **rest}))


def with_member(name, data=b"") -> list:
    return [*members().items(), (name, data)]


def link(name: str, kind: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = (kind | 0o777) << 16
    return made


def patched(data: bytes, offset: int, value: bytes, local: int | None = None) -> bytes:
    """A zip whose first entry has other bytes in the directory, and in its local header."""
    made = bytearray(data)
    for place in [data.index(b"PK\1\2") + offset] + ([] if local is None else [local]):
        made[place : place + len(value)] = value
    return bytes(made)


BOMB = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in ("ab", "bc", "cd", "de"))
GOOD = pack(members().items())
BAD_ZIPS = {
    "up": (lambda: pack(with_member("../x")), r"'../x' leads out of the zip"),
    "up inside": (lambda: pack(with_member("a/../../x")), "leads out of the zip"),
    "absolute": (lambda: pack(with_member("/etc/x")), "leads out of the zip"),
    "backslash": (lambda: pack(with_member("a\\x")), "leads out of the zip"),
    "drive": (lambda: pack(with_member("C:x")), "leads out of the zip"),
    "NUL": (lambda: pack(with_member("a%x")).replace(b"a%x", b"a\0x"), "leads out of the zip"),
    "escape": (lambda: pack(with_member("\x1b[2J")), "or not printable"),
    "long path": (lambda: pack(with_member("x" * 501)), "at most 500 characters"),
    "link": (lambda: pack(with_member(link("x"), b"/etc/passwd")), "'x' is a link"),
    "device": (lambda: pack(with_member(link("x", stat.S_IFCHR))), "'x' is a link or a device"),
    "same twice": (lambda: pack(with_member("./rkme.json", b"{}")), "two members 'rkme.json'"),
    "many members": (
        lambda: pack([(f"{i}", b"") for i in range(10_001)], zipfile.ZIP_STORED),
        "10001 members",
    ),
    "great directory": (
        lambda: pack([(f"{i:060000}", b"") for i in range(40)]),
        "a directory of 240",
    ),
    "bomb": (lambda: pack(with_member("x", bytes(10**7))), "10000000 bytes in 97"),
    "declared bomb": (lambda: patched(GOOD, 24, b"\xff\xff\xff\x7f"), "want a ratio of at most"),
    "long yaml": (lambda: pack(with_yaml("#" * 70_000)), "70000 bytes; want at most 65536"),
    "fewer bytes declared": (lambda: patched(GOOD, 24, b"\x09\0\0\0"), "damaged.*CRC"),
    "encrypted": (lambda: patched(GOOD, 8, b"\1", local=6), "encrypted"),
    "lzma": (lambda: pack(members().items(), zipfile.ZIP_LZMA), "compressed by method 14"),
    "cut": (lambda: GOOD[:-30], "damaged, or not a zip"),
    "no zip": (lambda: b"PK" * 100, "damaged, or not a zip"),
    "changed": (lambda: GOOD[:50] + b"xx" + GOOD[52:], "damaged, or not a zip"),
    "no yaml": (lambda: pack([*members().items()][1:]), "no file 'learnware.yaml'"),
    "no specification": (lambda: pack(with_specs(entry(file_name="a"))), "no file 'a' in it"),
    "a folder": (
        lambda: pack([*with_specs(entry(file_name="a")), ("a/", b"")]),
        "no file 'a' in it",
    ),
    "file leads out": (lambda: pack(with_specs(entry(file_name="../a"))), "leads out of the zip"),
    "file is no name": (lambda: pack(with_specs(entry(file_name=[1]))), r"got \[1\]; want the"),
    "semantic leads out": (
        lambda: pack(with_specs(entry(), semantic_specification={"file_name": "/etc/passwd"})),
        "leads out of the zip",
    ),
    "semantic is absent": (
        lambda: pack(with_specs(entry(), semantic_specification={"file_name": "a"})),
        "no file 'a' in it",
    ),
    "yaml object": (
        lambda: pack(with_yaml("a: !!python/object/apply:os.system [ls]")),
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system' in line 1",
    ),
    "yaml tag": (lambda: pack(with_yaml("a: !!timestamp x")), "not plain YAML.*the tag"),
    "yaml tuple": (lambda: pack(with_yaml("a: !!python/tuple x")), "not plain YAML"),
    "yaml alias": (lambda: pack(with_yaml(BOMB)), "not plain YAML .an alias in line 2"),
    "deep yaml": (lambda: pack(with_yaml("[" * 60_000)), "nested deeper than 50"),
    "broken yaml": (lambda: pack(with_yaml("a: [")), "not plain YAML"),
    "bad date": (lambda: pack(with_yaml("a: 2001-99-99")), "not plain YAML"),
    "bytes": (lambda: pack(with_yaml(b"\xff\xfe\xfd")), "not plain YAML"),
    "no mapping": (lambda: pack(with_yaml("text")), "got a str; want a mapping"),
    "no list": (lambda: pack(with_yaml("stat_specifications: 1")), "not a list of mappings"),
    "no spec": (lambda: pack(with_specs()), r"its specifications are \[\]; want"),
    "code": (lambda: pack(with_specs(entry(module_path="a.py"))), "of the module learnware"),
    "other class": (lambda: pack(with_specs(entry(class_name="RKMEImageSpecification"))), "want"),
    "two specs": (lambda: pack(with_specs(entry(), entry())), "want one of"),
    "other type": (
        lambda: pack(with_specs(entry(class_name="RKMETextSpecification"))),
        "calls it a RKMETextSpecification",
    ),
    "semantic list": (lambda: pack(members(semantic=[]).items()), "not a JSON object"),
    "semantic NaN": (
        lambda: pack(members(semantic={"Name": float("nan")}).items()),
        "want a finite number",
    ),
    "semantic name": (lambda: pack(members(semantic={"Name": "x"}).items()), "Name is 'x'; want"),
    "semantic tags": (
        lambda: pack(members(semantic={"Scenario": {"Values": [1]}}).items()),
        "want Values that are a list of strings",
    ),
    "great card": (
        lambda: pack(members(semantic={"a": "x" * 600_000}).items(), zipfile.ZIP_STORED),
        "its card takes 600",
    ),
    "own record": (lambda: pack(members(semantic={"learnware_jax": 1}).items()), "got no card"),
    "own header": (
        lambda: pack(
            members(
                semantic={
                    "learnware_jax": {
                        "card": {},
                        "header": Header(1, "rkme", SPACE, {"points": 10, "n": 60})._asdict(),
                    }
                }
            ).items()
        ),
        "'dimension': 5.*, and the specification .*'dimension': 8",
    ),
}


@pytest.mark.parametrize("case", BAD_ZIPS)
def test_bad_zips_are_refused(tmp_path, case):
    make, reason = BAD_ZIPS[case]
    (tmp_path / "a.zip").write_bytes(make())
    refuse(tmp_path, reason)


def test_an_absent_zip_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        interop.read_zip(tmp_path / "a.zip")


def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    """Any byte changed, any length: refused in words, or the same learnware."""
    rng = np.random.default_rng(0)
    whole = pack(members().items(), zipfile.ZIP_STORED)
    start = whole.index(b"PK\1\2")
    # What lies before the directory is covered by checksums; the rest is structure, taken whole.
    places = [*rng.integers(0, start, 100), *range(start, len(whole))]
    (tmp_path / "a.zip").write_bytes(whole)
    expected = interop.read_zip(tmp_path / "a.zip").specification
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        for data in (bytes(damaged), whole[:place]):
            (tmp_path / "a.zip").write_bytes(data)
            try:
                found = interop.read_zip(tmp_path / "a.zip").specification
                assert interop.write_rkme(found) == interop.write_rkme(expected)
            except ValueError as error:
                assert str(error).startswith("read_zip: ")
                refused += 1
    assert refused > len(places)


# Zips of ours


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["specification", "adapter"])
def test_ours_goes_out_and_comes_back(tmp_path, adapter):
    store.create_dock(tmp_path / "dock", SPACE)
    store.add(tmp_path / "dock", own(), adapter=adapter)
    interop.export_zip(tmp_path / "dock", "own", tmp_path / "own.zip")
    interop.import_zip(tmp_path / "other", tmp_path / "own.zip", "own")
    assert store.check(tmp_path / "other") == []
    assert snapshot(tmp_path / "other") == snapshot(tmp_path / "dock")
    interop.export_zip(tmp_path / "other", "own", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "own.zip").read_bytes()


def test_an_exported_zip_does_not_claim_the_packages_encoder(tmp_path):
    interop.write_zip(tmp_path / "own.zip", own())
    zipped = interop.read_zip(tmp_path / "own.zip")
    assert zipped.specification.type == "RKMETableSpecification"
    assert zipped.specification.gamma == 0.25 and zipped.specification.n == 40


@pytest.mark.parametrize(
    "kernel", [{"name": "linear"}, {"name": "multi_gaussian", "gammas": [0.1]}, None]
)
def test_other_kernels_are_not_exported(tmp_path, kernel):
    header = own().header._replace(space=SPACE | {"kernel": kernel})
    with pytest.raises(ValueError, match="knows an rkme with a gaussian kernel"):
        interop.write_zip(tmp_path / "own.zip", own()._replace(header=header))
    assert not (tmp_path / "own.zip").exists()


def test_other_kinds_are_not_exported(tmp_path):
    header = own().header._replace(kind="pave")
    with pytest.raises(ValueError, match="of kind 'pave'"):
        interop.write_zip(tmp_path / "own.zip", own()._replace(header=header))


def test_an_adapter_is_exported_whole_or_not(tmp_path):
    with pytest.raises(ValueError, match="disagree on an adapter"):
        interop.write_zip(tmp_path / "own.zip", own(), adapter=ADAPTER)


# The package itself, where it is installed


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # it makes folders there
        pytest.importorskip("learnware")
        import learnware.client
        import learnware.market
        import learnware.specification

        yield learnware


@pytest.mark.parametrize(("m", "d", "gamma"), [(10, 8, 0.1), (30, 384, 0.26)])
def test_the_package_computes_the_same_distances(package, tmp_path, m, d, gamma):
    rng = np.random.default_rng(0)
    made, read, written = [], [], []
    for i in range(4):
        x = rng.normal(0.1 * i, 1, (3 * m, d)) / np.sqrt(d)
        made.append(package.specification.generate_rkme_table_spec(x, gamma, m, cuda_idx=-1))
        made[-1].save(str(tmp_path / "a"))
        read.append(interop.read_rkme((tmp_path / "a").read_bytes()))
        (tmp_path / "b").write_bytes(interop.write_rkme(read[-1]))
        written.append(package.specification.RKMETableSpecification(cuda_idx=-1))
        written[-1].load(str(tmp_path / "b"))
    theirs = np.array([[p.dist(q) for q in made] for p in made])
    np.testing.assert_array_equal([[p.dist(q) for q in written] for p in written], theirs)
    ours = np.array([[interop.distance(p, q) for q in read] for p in read])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ours.argsort(1), theirs.argsort(1))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["specification", "adapter"])
def test_the_package_loads_what_was_exported(package, tmp_path, adapter):
    store.create_dock(tmp_path / "dock", SPACE)
    store.add(tmp_path / "dock", own(), adapter=adapter)
    interop.export_zip(tmp_path / "dock", "own", tmp_path / "own.zip")
    loaded = package.client.LearnwareClient().load_learnware(str(tmp_path / "own.zip"))
    assert loaded.id == "own"
    specification = loaded.get_specification()
    np.testing.assert_array_equal(
        specification.get_stat_spec_by_name("RKMETableSpecification").get_z(), own().spec.z
    )
    semantic = specification.get_semantic_spec()
    checker = package.market.EasySemanticChecker
    assert checker.check_semantic_spec(semantic)[0] == checker.NONUSABLE_LEARNWARE
    reason = "SmolLM2-135M" if adapter else "without a model"
    with pytest.raises(NotImplementedError, match=reason):
        loaded.predict(np.zeros((1, 5)))
    market = package.market.instantiate_learnware_market("test", rebuild=True)
    added, _ = market.add_learnware(
        str(tmp_path / "own.zip"), semantic, checker_names=["EasySemanticChecker"]
    )
    user = package.specification.RKMETableSpecification(gamma=0.25, cuda_idx=-1)
    user.generate_stat_spec_from_data(np.random.default_rng(1).normal(size=(30, 5)), K=4)
    info = package.market.BaseUserInfo(semantic_spec={}, stat_info={"RKMETableSpecification": user})
    found = market.search_learnware(info).get_single_results()
    assert [item.learnware.id for item in found] == [added]


# The command line


def call(*options: str) -> None:
    with flagsaver.flagsaver():
        flags.FLAGS(["dock", *options])
        dock_command.main(["dock"])


def test_the_command_exchanges_learnwares(tmp_path, capsys):
    store.create_dock(tmp_path / "dock", SPACE)
    store.add(tmp_path / "dock", own(), adapter=ADAPTER)
    call(f"--dock={tmp_path}/dock", f"--export_zip={tmp_path}/new.zip", "--id=own")
    call(f"--dock={tmp_path}/other", f"--import_zip={tmp_path}/new.zip")
    call(f"--dock={tmp_path}/other", f"--import_zip={tmp_path}/new.zip", "--id=own")
    assert store.list_ids(tmp_path / "other") == ["new", "own"]
    with pytest.raises(SystemExit) as stopped:
        call(f"--dock={tmp_path}/other", f"--import_zip={tmp_path}/new.zip")
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert f"added new to {tmp_path}/other" in said.out
    assert said.err.startswith("error: add: ") and "has a learnware 'new' already" in said.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--check", "--export_zip=a"], "one at a time: --check, --export_zip"),
        (["--export_zip=a"], "wants the --id"),
        (["--id=a"], "goes with"),
    ],
)
def test_the_command_wants_one_thing_at_a_time(options, reason):
    with pytest.raises(dock_command.app.UsageError, match=reason):
        call(*options)
