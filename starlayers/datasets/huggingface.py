"""Read rows with Hugging Face's `datasets`, from local files or the hub, and select columns."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlayers.datasets.optional import require
from starlayers.datasets.splits import divide, share

datasets: Any = require("datasets")
huggingface_hub: Any = require("huggingface_hub")

__all__ = [
    "Splits",
    "StrPath",
    "add_missing_splits",
    "class_labels",
    "language_pairs",
    "read_splits",
    "select_columns",
    "take",
    "translation_rows",
]

HUB_TIMEOUT_S = 5
SPLITS: tuple[str, ...] = ("train", "validation", "test")
ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
Splits = dict[str, Any]  # name of a split -> datasets.Dataset
StrPath = str | os.PathLike[str]


def read_splits(name: str, path: StrPath | None, known: Sequence[str]) -> tuple[str, str, Splits]:
    """Read a local data set, or one of the hub if `path` is `None`.

    Args:
        name: name on the hub, `repository` or `repository:configuration`.
        path: file or folder to read in place of it.
        known: names that need no hub, for the error message.

    Returns:
        Name of the data set, its source in words, and its splits.

    Raises:
        FileNotFoundError: the path does not exist, or the hub does not have the name.
        ValueError: a kind of file that is not read, a file that cannot be parsed, or no split
            "train" among several.
    """
    if path is None:
        source, splits = f"Hugging Face hub, {name}", _read_hub(name, known)
    else:
        name, source, splits = Path(path).stem, f"local data {path}", _read_local(Path(path))
        if Path(path).suffix == ".txt":
            source += ", a paragraph a row"
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    splits = {ALIASES.get(split, split): rows for split, rows in splits.items()}
    if "train" not in splits:
        raise ValueError(f"{source} has no split 'train'; it has {_quoted(splits)}")
    return name, source, {split: splits[split] for split in SPLITS if split in splits}


def _read_local(path: Path) -> Splits:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        # a data set that is mapped from its files has its intermediate results written beside them
        saved = datasets.load_from_disk(str(path), keep_in_memory=True)
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path.name}: files read are {_quoted(READERS)}, not {path.suffix!r}")
        reader, options = READERS[path.suffix]
        options = {**options, "data_files": str(path)}
    elif any(path.rglob("*.txt")):
        reader, options = "text", {"data_dir": str(path), "sample_by": "document"}
    else:
        reader, options = str(path), {}
    try:
        for file in [path] if path.is_file() else path.rglob("*.json*"):
            if file.suffix in (".json", ".jsonl"):  # whose reader takes any bytes
                _require_utf8(file)
        return dict(datasets.load_dataset(reader, **options))
    except FileNotFoundError:
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise _unreadable(path, error.__cause__ or error) from error
    except (EOFError, OSError, StopIteration, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _require_utf8(file: Path) -> None:
    """Raise a UnicodeDecodeError for a file that is no UTF-8."""
    with file.open(encoding="utf-8") as lines:
        while lines.read(2**20):
            pass


def _unreadable(path: Path, error: BaseException) -> ValueError:
    empty = isinstance(error, StopIteration)
    what = "it is empty" if empty else str(error) or type(error).__name__
    return ValueError(f"{path} cannot be read: {what}. Text files must be UTF-8")


def _read_hub(name: str, known: Sequence[str]) -> Splits:
    repository, _, configuration = name.partition(":")
    message = (
        f"{name!r} is none of {_quoted(known)}, and the hub has no such data set in reach "
        f"(tried {huggingface_hub.constants.ENDPOINT} for {HUB_TIMEOUT_S} s; HF_HUB_OFFLINE=1 "
        "reads what was downloaded before): pass path=, data of your own, or another name"
    )
    if not datasets.config.HF_HUB_OFFLINE:
        # without a network, load_dataset by itself retries for half a minute or much longer
        try:
            huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the class depends on the HTTP library of the hub's client
            raise FileNotFoundError(f"{message}. {type(error).__name__}: {error}") from error
    try:
        return dict(datasets.load_dataset(repository, configuration or None))
    except OSError as error:
        raise FileNotFoundError(f"{message}. {type(error).__name__}: {error}") from error


def select_columns(splits: Splits, renamed: dict[str, str]) -> Splits:
    """Keep the columns `renamed` (old name: new name) and the rows that have a value in each.

    Raises:
        ValueError: a split lacks one of the columns.
    """
    selected = {}
    for split, rows in splits.items():
        for column in renamed:
            if column not in rows.column_names:
                present = _quoted(rows.column_names)
                raise ValueError(f"no column {column!r} in split {split!r}; there are {present}")
        rows = rows.select_columns(list(renamed))
        for column in renamed:
            if rows.data.column(column).null_count:
                rows = rows.filter(lambda value: value is not None, input_columns=[column])
        selected[split] = rows.rename_columns(renamed)
    return selected


def class_labels(splits: Splits, column: str) -> Splits:
    """Make `label` a `ClassLabel` with the same names in every split.

    Rows whose `ClassLabel` is negative have no class and are removed; a validation or test split
    without any class is removed as a whole.

    Args:
        splits: rows with a column `label`.
        column: the user's name of that column, for the error message.

    Raises:
        ValueError: the labels are neither names nor whole numbers.
    """
    feature = splits["train"].features["label"]
    labels = {split: list(rows["label"]) for split, rows in splits.items()}
    if isinstance(feature, datasets.ClassLabel):
        labelled = {
            split: rows.select([i for i, y in enumerate(labels[split]) if y >= 0])
            for split, rows in splits.items()
        }
        return {split: rows for split, rows in labelled.items() if split == "train" or len(rows)}
    for split, ys in labels.items():  # an integer column with gaps was read as floating point
        labels[split] = [int(y) if isinstance(y, float) and y.is_integer() else y for y in ys]
    values = {y for ys in labels.values() for y in ys}
    if {type(y) for y in values} not in ({str}, {int}, {bool}):
        raise ValueError(
            f"column {column!r} holds {feature}, which is no class; labels are names or whole "
            f"numbers, not {', '.join(repr(y) for y in list(values)[:3])}"
        )
    for split, ys in labels.items():
        last = ys[-1] if ys and isinstance(ys[-1], str) and ys.count(ys[-1]) == 1 else ""
        whole = [y for y in values if last and y != last and str(y).startswith(last)]
        if whole:
            raise ValueError(
                f"the last row of split {split!r} has the label {last!r}, which no other row has, "
                f"and which begins {whole[0]!r}: its file is truncated"
            )
    numbers = {y: i for i, y in enumerate(sorted(values))}
    feature = datasets.ClassLabel(names=[str(y) for y in numbers])
    encoded = {}
    for split, rows in splits.items():
        column_values = [numbers[y] for y in labels[split]]
        rows = rows.remove_columns("label")
        encoded[split] = rows.add_column("label", column_values, feature=feature)
    return encoded


def language_pairs(splits: Splits, source: str, target: str) -> Splits:
    """Make a column `translation` of two languages, from such a column or one column for each.

    Raises:
        ValueError: a split lacks one of the languages.
    """
    pairs = {}
    for split, rows in splits.items():
        nested = "translation" in rows.column_names
        feature = rows.features["translation"] if nested else rows.features
        present = list(getattr(feature, "languages", feature))
        for language in (source, target):
            if language not in present:
                raise ValueError(
                    f"no language {language!r} in split {split!r}; there are {_quoted(present)}"
                )
        rows = rows.map(
            _pick_languages,
            fn_kwargs={"nested": nested, "languages": (source, target)},
            remove_columns=rows.column_names,
            features=_pair_features(source, target),
        )
        pairs[split] = rows.filter(lambda pair: all(pair.values()), input_columns=["translation"])
    return pairs


def _pick_languages(row: Any, nested: bool, languages: tuple[str, str]) -> dict[str, Any]:
    texts = row["translation"] if nested else row
    return {"translation": {language: texts[language] for language in languages}}


def translation_rows(pairs: Sequence[tuple[str, str]], source: str, target: str) -> Any:
    """Make rows of `translation`, leaving out pairs with a text that occurred before."""
    seen: set[tuple[str, str]] = set()
    rows = []
    for a, b in pairs:
        keys = (source, a.casefold()), (target, b.casefold())
        if not seen.intersection(keys):
            rows.append({source: a, target: b})
            seen.update(keys)
    return datasets.Dataset.from_dict({"translation": rows}, _pair_features(source, target))


def _pair_features(source: str, target: str) -> Any:
    return datasets.Features(translation=datasets.Translation(languages=[source, target]))


def take(rows: Any, parts: dict[str, list[int]]) -> Splits:
    """Select the rows of every split by their numbers."""
    return {split: rows.select(numbers) for split, numbers in parts.items()}


def add_missing_splits(
    splits: Splits, source: str, strata: str | None = None
) -> tuple[Splits, str]:
    """Hold out the splits that are missing, 10 % of the training rows each.

    Args:
        splits: at least "train".
        source: source of the data in words.
        strata: column whose classes are divided one by one.

    Returns:
        All three splits, and `source` with a note on those that were divided off.

    Raises:
        ValueError: too few rows.
    """
    missing = [name for name in SPLITS if name not in splits]
    if not missing:
        return splits, source
    train = splits["train"]
    try:
        parts = divide(list(train[strata]) if strata else [None] * len(train), share(10), missing)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    splits = {**splits, **take(train, parts)}
    note = f"{source}; {' and '.join(missing)} divided off train here, 10 % each"
    return {split: splits[split] for split in SPLITS}, note


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
