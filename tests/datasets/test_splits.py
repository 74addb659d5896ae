"""Divisions of rows into splits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlayers.datasets.splits import divide, share
from tests.helpers import properties


def test_every_stratum_is_divided_and_nothing_is_lost():
    strata = ["a"] * 100 + ["b"] * 40 + ["c"] * 3 + ["d"] * 2
    parts = divide(strata, share(20))
    assert sorted(i for part in parts.values() for i in part) == list(range(145))
    for name in ("validation", "test"):
        assert Counter(strata[i] for i in parts[name]) == {"a": 5, "b": 2, "c": 1}
        assert parts[name] != sorted(parts[name])
    assert [share(10)(n) for n in (0, 1, 2, 3, 14, 16, 1000)] == [0, 0, 0, 1, 1, 2, 100]


def test_a_division_is_always_the_same():
    parts = divide([0] * 10, share(5))
    assert parts == divide([0] * 10, share(5))
    assert parts == {"train": [3, 4, 2, 0, 9, 6], "validation": [7, 8], "test": [1, 5]}


def test_only_the_splits_named_are_divided_off():
    parts = divide("aabb", lambda n: n // 2, ["test"])
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 2, "test": 2}
    assert list(divide("aaa", share(3), ["x", "y"])) == ["train", "x", "y"]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows(rows):
    message = f"{rows} rows are too few to divide off 'validation', 'test': pass more rows"
    with pytest.raises(ValueError, match=message):
        divide([None] * rows, share(10))


@properties
@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=90), st.integers(2, 30))
def test_each_row_is_in_one_split(strata, parts):
    held_out = share(parts)
    counts = Counter(strata)
    if all(held_out(n) == 0 for n in counts.values()):
        return
    division = divide(strata, held_out)
    assert sorted(row for rows in division.values() for row in rows) == list(range(len(strata)))
    for name in ("validation", "test"):
        assert Counter(strata[row] for row in division[name]) == {
            stratum: held_out(n) for stratum, n in counts.items() if held_out(n)
        }
