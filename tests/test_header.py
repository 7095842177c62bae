"""The header: canonical text, refusals in both directions, and which spaces are the same."""

import copy
import json

import numpy as np
import pytest

from learnware_jax.specification.header import (
    Header,
    IncompatibleSpecifications,
    check_same_space,
    from_json,
    size_and_residual,
    to_json,
)

SPACE = {"encoder": "mini", "dimension": 3, "kernel": {"name": "gaussian", "gamma": 0.1}}
HEADER = Header(1, "rkme", SPACE, {"n": 10, "points": 2})


def with_space(**changes) -> Header:
    return HEADER._replace(space={**copy.deepcopy(SPACE), **changes})


def test_text_is_canonical():
    shuffled = Header(
        1,
        "rkme",
        {"kernel": {"gamma": 0.1, "name": "gaussian"}, "dimension": 3, "encoder": "mini"},
        {"points": 2, "n": 10},
    )
    expected = (
        '{"about": {"n": 10, "points": 2}, "kind": "rkme", "schema": 1, "space": {"dimension": 3, '
        '"encoder": "mini", "kernel": {"gamma": 0.1, "name": "gaussian"}}}'
    )
    assert to_json(HEADER) == to_json(shuffled) == expected


@pytest.mark.parametrize(
    "value",
    [
        0.1 + 0.2,
        5e-324,
        -0.0,
        1.7976931348623157e308,
        2**63 - 1,
        True,
        None,
        "é\ud800\n",
        [[], {}, 1],
    ],
    ids=repr,
)
def test_values_read_back_equal(value):
    read = from_json(to_json(HEADER._replace(about={"value": value}))).about["value"]
    assert repr(read) == repr(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_written(value):
    with pytest.raises(ValueError, match=r"to_json: space\.kernel\.gamma is -?(nan|inf); want a"):
        to_json(with_space(kernel={"gamma": value}))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_not_read(text):
    with pytest.raises(ValueError, match=r"from_json: about\.n is -?(nan|inf); want a finite"):
        from_json(to_json(HEADER).replace('"n": 10', f'"n": {text}'))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"seeds": (1, 2)}, r"about\.seeds is a tuple"),
        ({"residual": np.float32(0.5)}, r"about\.residual is a float32"),
        ({"texts": [{"a": {1}}]}, r"about\.texts\[0\]\.a is a set"),
        ({"by_class": {3: "x"}}, r"about\.by_class has the key 3; JSON wants strings"),
    ],
)
def test_values_that_are_not_json_are_not_written(about, message):
    with pytest.raises(TypeError, match=message):
        to_json(HEADER._replace(about=about))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"got schema 2; this version of learnware_jax reads schema 1\. Use the"),
        ({"schema": True}, "got schema True; this version"),
        ({"schema": "1"}, "got schema '1'; this version"),
        ({"kind": 7}, "kind is a int; want a str"),
        ({"space": ["gaussian"]}, "space is a list; want a dict"),
        ({"about": None}, "about is a NoneType; want a dict"),
        ({"extra": 1}, "got the fields about, extra, kind, schema, space; want exactly about, kin"),
    ],
)
def test_fields_of_another_type_are_not_read(changes, message):
    with pytest.raises(ValueError, match=f"^from_json: {message}"):
        from_json(json.dumps(HEADER._asdict() | changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON text"),
        ('{"schema": 1', "not a JSON text"),
        (b"\xff\xfe{", "not a JSON text"),
        ("[1]", "no field 'schema'"),
        ("{}", "no field 'schema'"),
        ("[" * 200_000, "not a JSON text"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 levels"),
    ],
    ids=["empty", "cut", "bytes", "list", "object", "deepest", "deep"],
)
def test_other_texts_are_not_read(text, message):
    with pytest.raises(ValueError, match=f"^file.json: .*{message}"):
        from_json(text, where="file.json")


def test_same_space_whatever_it_is_about():
    other = Header(1, "rkme", dict(reversed(SPACE.items())), {"n": 99})
    check_same_space(HEADER, other, what="rank")
    check_same_space(HEADER, with_space(dimension=3.0), what="rank")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            with_space(kernel={"name": "gaussian", "gamma": 0.2}),
            r"rank: user and dock: not comparable, kernel\.gamma is 0\.1 and 0\.2\. Remake one",
        ),
        (with_space(encoder="large"), 'encoder is "mini" and "large"'),
        (with_space(max_tokens=128), "max_tokens is absent and 128"),
        (with_space(kernel="linear"), 'kernel is {.*} and "linear"'),
        (with_space(dimension=4, encoder=None), 'dimension is 3 and 4; encoder is "mini" and null'),
        (HEADER._replace(kind="pave"), 'kind is "rkme" and "pave"'),
    ],
)
def test_differences_are_named(other, message):
    with pytest.raises(IncompatibleSpecifications, match=message):
        check_same_space(HEADER, other, what="rank: user and dock")
    with pytest.raises(IncompatibleSpecifications):
        check_same_space(other, HEADER, what="rank: user and dock")


@pytest.mark.parametrize(
    ("n", "points", "believed"),
    [(2, 2, 1), (31, 4, 1), (32, 32, 32), (40, 41, 1), (40, 40, 40), (1, 1, 1), (10**6, 64, 10**6)],
)
def test_few_rows_and_fewer_than_points_are_not_believed(n, points, believed):
    about = {"n": n, "points": points, "residual": 0.25}
    assert size_and_residual(Header(1, "rkme", {}, about)) == (believed, 0.25)
    # Of a vector, rows are random seeds, and there are few.
    assert size_and_residual(Header(1, "pave", {}, about)) == (n, 0.25)
