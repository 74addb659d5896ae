"""Data sets of files and of the hub: read, reduced to the columns asked for, divided."""

import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

__all__ = [
    "Splits",
    "StrPath",
    "complete",
    "divide",
    "language_pair",
    "only_columns",
    "read",
    "share",
    "translations",
    "with_classes",
]

HUB_TIMEOUT_S = 5
SPLITS: tuple[str, ...] = ("train", "validation", "test")
ALSO_CALLED = {"valid": "validation", "val": "validation", "dev": "validation"}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
Splits = dict[str, datasets.Dataset]
StrPath = str | os.PathLike[str]


def read(name: str, path: StrPath | None, known: Sequence[str]) -> tuple[str, str, Splits]:
    """A name, words on the source, and the splits there, of a local data set or one of the hub."""
    if path is None:
        source, found = f"Hugging Face hub, {name}", _hub(name, known)
    else:
        name, source, found = Path(path).stem, f"local data {path}", _local(Path(path))
    if len(found) == 1:
        found = {"train": next(iter(found.values()))}
    found = {ALSO_CALLED.get(split, split): rows for split, rows in found.items()}
    if "train" not in found:
        raise ValueError(f"{source} has no split 'train'; it has {_listed(found)}")
    return name, source, {split: found[split] for split in SPLITS if split in found}


def _local(path: Path) -> Splits:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path.name}: files read are {_listed(READERS)}, not {path.suffix!r}")
        reader, options = READERS[path.suffix]
        return dict(datasets.load_dataset(reader, data_files=str(path), **options))
    if any(path.rglob("*.txt")):
        options = {"data_dir": str(path), "sample_by": "document"}
        return dict(datasets.load_dataset("text", **options))
    return dict(datasets.load_dataset(str(path)))


def _hub(name: str, known: Sequence[str]) -> Splits:
    repository, _, configuration = name.partition(":")
    what = (
        f"{name!r} is none of {_listed(known)}, and the hub has no such data set in reach "
        f"(tried {huggingface_hub.constants.ENDPOINT} for {HUB_TIMEOUT_S} s; HF_HUB_OFFLINE=1 "
        "reads what was downloaded before): pass path=, data of your own, or another name"
    )
    if not datasets.config.HF_HUB_OFFLINE:
        # load_dataset itself tries for half a minute where there is no network, or much longer
        try:
            huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # of an HTTP library that differs from version to version
            raise FileNotFoundError(f"{what}. {type(error).__name__}: {error}") from error
    try:
        return dict(datasets.load_dataset(repository, configuration or None))
    except OSError as error:
        raise FileNotFoundError(f"{what}. {type(error).__name__}: {error}") from error


def only_columns(found: Splits, renamed: dict[str, str]) -> Splits:
    """The columns `renamed` (old name: new name) of every split, rows with nothing in them out."""
    reduced = {}
    for split, rows in found.items():
        for column in renamed:
            if column not in rows.column_names:
                there = _listed(rows.column_names)
                raise ValueError(f"no column {column!r} in split {split!r}; there are {there}")
        rows = rows.select_columns(list(renamed))
        for column in renamed:
            if rows.data.column(column).null_count:
                rows = rows.filter(lambda value: value is not None, input_columns=[column])
        reduced[split] = rows.rename_columns(renamed)
    return reduced


def with_classes(found: Splits, column: str) -> Splits:
    """`label` as `ClassLabel`, the same in every split; `column` is what the user calls it."""
    declared = found["train"].features["label"]
    labels = {split: list(rows["label"]) for split, rows in found.items()}
    if isinstance(declared, datasets.ClassLabel):
        kept = {s: [i for i, y in enumerate(ys) if y >= 0] for s, ys in labels.items()}
        whole = {s: rows.select(kept[s]) for s, rows in found.items()}
        return {s: rows for s, rows in whole.items() if s == "train" or len(rows)}
    for split, ys in labels.items():  # an integer column with gaps was read as floating point
        labels[split] = [int(y) if isinstance(y, float) and y.is_integer() else y for y in ys]
    values = {y for ys in labels.values() for y in ys}
    if {type(y) for y in values} not in ({str}, {int}, {bool}):
        raise ValueError(
            f"column {column!r} holds {declared}, which is no class; labels are names or whole "
            f"numbers, not {', '.join(repr(y) for y in list(values)[:3])}"
        )
    order = {y: i for i, y in enumerate(sorted(values))}
    feature = datasets.ClassLabel(names=[str(y) for y in order])
    encoded = {}
    for split, rows in found.items():
        numbers = [order[y] for y in labels[split]]
        encoded[split] = rows.remove_columns("label").add_column("label", numbers, feature=feature)
    return encoded


def language_pair(found: Splits, source: str, target: str) -> Splits:
    """`translation` with two languages, out of such a column or of one column for each."""
    pairs = {}
    for split, rows in found.items():
        nested = "translation" in rows.column_names
        feature = rows.features["translation"] if nested else rows.features
        there = list(getattr(feature, "languages", feature))
        for language in (source, target):
            if language not in there:
                raise ValueError(
                    f"no language {language!r} in split {split!r}; there are {_listed(there)}"
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


def translations(pairs: Sequence[tuple[str, str]], source: str, target: str) -> datasets.Dataset:
    """Rows of `translation`, pairs with a text that was there before left out."""
    seen: set[tuple[str, str]] = set()
    rows = []
    for a, b in pairs:
        keys = (source, a.casefold()), (target, b.casefold())
        if not seen.intersection(keys):
            rows.append({source: a, target: b})
            seen.update(keys)
    return datasets.Dataset.from_dict({"translation": rows}, _pair_features(source, target))


def _pair_features(source: str, target: str) -> datasets.Features:
    return datasets.Features(translation=datasets.Translation(languages=[source, target]))


def share(parts: int) -> Callable[[int], int]:
    """How many of n rows to hold out: one in `parts`, but one of three and none of two."""
    return lambda rows: min(max(1, round(rows / parts)), rows // 3)


def divide(
    rows: datasets.Dataset,
    held_out: Callable[[int], int],
    strata: Sequence[Hashable] | None = None,
    names: Sequence[str] = ("validation", "test"),
) -> Splits:
    """`train` and the splits `names`, shuffled, always the same.

    Every split of `names` gets `held_out(n)` of the n rows of each stratum.
    """
    if strata is None:
        strata = [None] * len(rows)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    left = {stratum: dict.fromkeys(names, held_out(n)) for stratum, n in Counter(strata).items()}
    parts: dict[str, list[int]] = {"train": [], **{name: [] for name in names}}
    for i in order:
        wanting = left[strata[i]]
        split = next((name for name in names if wanting[name]), "train")
        if split != "train":
            wanting[split] -= 1
        parts[split].append(i)
    if not all(parts.values()):
        raise ValueError(f"{len(rows)} rows are too few to divide off {_listed(names)}")
    return {split: rows.select(indices) for split, indices in parts.items()}


def complete(found: Splits, strata: str | None = None) -> tuple[Splits, str]:
    """All three splits, and words on those that were divided off `train` here."""
    missing = [name for name in SPLITS if name not in found]
    if not missing:
        return found, ""
    train = found["train"]
    divided = divide(train, share(10), list(train[strata]) if strata else None, missing)
    note = f"; {' and '.join(missing)} divided off train here, 10 % each"
    whole = {**found, **divided}
    return {split: whole[split] for split in SPLITS}, note


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
