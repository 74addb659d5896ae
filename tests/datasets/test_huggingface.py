"""Rows of local files and of the hub, their columns, and the splits made of them."""

import json
from collections import Counter

import datasets
import huggingface_hub
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Translation

from starlayers.datasets import huggingface
from starlayers.datasets.text import load_prose, load_sentiment, load_translation
from tests.datasets.support import assert_same, everything, sizes, unchanged, unreachable_hub


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_a_csv_file_with_other_column_names(tmp_path):
    table = tmp_path / "mine.csv"
    lines = [f"{i},sentence {i},{['bad', 'good', 'good'][i % 3]}" for i in range(60)]
    table.write_text("\n".join(["id,words,verdict", *lines, "60,,good"]))
    data = load_sentiment(path=table, text_column="words", label_column="verdict")
    assert data.name == "mine"
    note = "validation and test divided off train here, 10 % each"
    assert data.source == f"local data {table}; {note}"
    assert sizes(data) == (48, 6, 6)
    for split, rows in data.splits.items():
        assert rows.column_names == ["text", "label"]
        assert rows.features["label"] == ClassLabel(names=["bad", "good"])
        assert 3 * Counter(rows["label"])[0] == len(rows), split
        for row in rows:
            assert row["label"] == int(int(row["text"].split()[1]) % 3 > 0)
    assert len(set(everything(data, "text"))) == 60  # the one without text is left out
    assert_same(data, load_sentiment(path=table, text_column="words", label_column="verdict"))
    with pytest.raises(
        ValueError, match="no column 'text' in split 'train'; there are 'id', 'words'"
    ):
        load_sentiment(path=table)
    with pytest.raises(ValueError, match=r"no column 'stars'.*'verdict'"):
        load_sentiment(path=table, text_column="words", label_column="stars")


def test_jsonl_with_numbers_and_a_folder_with_its_own_splits(tmp_path):
    lines = [json.dumps({"text": f"t{i}", "label": 5 * (i % 2)}) for i in range(40)]
    for file, part in (("train", lines[:20]), ("dev", lines[20:30]), ("test", lines[30:])):
        (tmp_path / f"{file}.jsonl").write_text("\n".join(part))
    data = load_sentiment(path=tmp_path)
    assert data.source == f"local data {tmp_path}"
    assert sizes(data) == (20, 10, 10)
    assert data.splits["validation"]["text"][:] == [f"t{i}" for i in range(20, 30)]
    assert data.splits["test"].features["label"].names == ["0", "5"]
    one = load_sentiment(path=tmp_path / "train.jsonl")
    assert sizes(one) == (16, 2, 2)


def test_parquet_and_data_sets_saved_to_disk(tmp_path):
    rows = Dataset.from_dict({"text": list("abcdefghij"), "label": [0, 1] * 5})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    assert sizes(load_sentiment(path=tmp_path / "rows.parquet")) == (6, 2, 2)
    assert sizes(load_sentiment(path=tmp_path / "saved")) == (6, 2, 2)
    both = load_sentiment(path=tmp_path / "both")
    assert both.source.endswith("; validation divided off train here, 10 % each")
    assert sizes(both) == (8, 2, 10)


def test_plain_text(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {i}\nof the book." for i in range(30)))
    data = load_prose(path=book)
    assert sizes(data) == (24, 3, 3)
    assert sorted(everything(data, "text"))[1] == "Paragraph 1\nof the book."
    for i in range(4):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / f"{i}.txt").write_text(f"One\n\nand {i}.\n")
    data = load_prose(path=tmp_path / "many")
    assert sizes(data) == (2, 1, 1)
    assert sorted(everything(data, "text"))[3] == "One\n\nand 3.\n"


def test_translations_in_columns_of_their_own_or_in_one(tmp_path):
    pairs = [{"en": f"one {i}", "fr": f"un {i}", "de": f"eins {i}"} for i in range(20)]
    (tmp_path / "wide.jsonl").write_text("\n".join(map(json.dumps, [*pairs, {"en": "lone"}])))
    nested = [json.dumps({"id": i, "translation": pair}) for i, pair in enumerate(pairs)]
    (tmp_path / "nested.jsonl").write_text("\n".join(nested))
    for file in ("wide", "nested"):
        data = load_translation(path=tmp_path / f"{file}.jsonl", target_language="fr")
        assert sizes(data) == (16, 2, 2)
        assert data.splits["train"].features == {"translation": Translation(languages=["en", "fr"])}
        got = everything(data, "translation")
        assert sorted(p["en"] for p in got) == sorted(p["en"] for p in pairs)
        assert all(p["fr"] == p["en"].replace("one", "un") and len(p) == 2 for p in got)
        with pytest.raises(ValueError, match=r"no language 'es' in split 'train'; there are.*'fr'"):
            load_translation(path=tmp_path / f"{file}.jsonl")


def test_bad_files_and_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        load_prose(path=tmp_path / "nowhere")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"a.xlsx: files read are '.csv', .*, not '.xlsx'"):
        load_prose(path=tmp_path / "a.xlsx")
    (tmp_path / "scores.csv").write_text("text,label\n" + "a,0.5\nb,0.25\n" * 10)
    with pytest.raises(ValueError, match=r"column 'label' holds .*float64.*no class.*0.5"):
        load_sentiment(path=tmp_path / "scores.csv")
    (tmp_path / "few.csv").write_text("text\na\nb\n")
    with pytest.raises(ValueError, match="2 rows are too few to divide off 'validation', 'test'"):
        load_prose(path=tmp_path / "few.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load_prose(path=tmp_path / "empty")


# --- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the data sets put into it; returns them and what was asked for."""
    has, asked = {}, []

    def info(self, repository, timeout):
        asked.append((repository, timeout))
        if repository not in has:
            raise RuntimeError(f"404: {repository}")

    def load(repository, configuration=None):
        asked.append((repository, configuration))
        return has[repository]

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return has, asked


def test_other_names_are_the_hubs(hub):
    has, asked = hub
    rows = Dataset.from_dict({"sentence": [f"s{i}" for i in range(20)], "label": [0, 1] * 10})
    rows = rows.cast_column("label", ClassLabel(names=["no", "yes"]))
    unlabelled = Dataset.from_dict({"sentence": ["?"], "label": [-1]}, features=rows.features)
    has["nyu-mll/glue"] = DatasetDict(
        train=rows, validation=rows.select(range(4)), test=unlabelled, extra=unlabelled
    )
    data = load_sentiment("nyu-mll/glue:sst2", text_column="sentence")
    assert asked == [("nyu-mll/glue", 5), ("nyu-mll/glue", "sst2")]
    assert data.name == "nyu-mll/glue:sst2"
    note = "test divided off train here, 10 % each"
    assert data.source == f"Hugging Face hub, nyu-mll/glue:sst2; {note}"
    assert sizes(data) == (18, 4, 2)
    assert data.splits["test"].features["label"].names == ["no", "yes"]
    assert Counter(data.splits["test"]["label"]) == {0: 1, 1: 1}
    has["odd"] = DatasetDict(test=rows, other=rows)
    with pytest.raises(ValueError, match="hub, odd has no split 'train'; it has 'test', 'other'"):
        load_prose("odd", text_column="sentence")


@pytest.mark.parametrize(
    ("load", "known"),
    [
        (load_sentiment, "'movie-reviews'"),
        (load_prose, "'brown', 'kjv'"),
        (load_translation, "'bible-en-es', 'libreoffice-en-de', .*, 'libreoffice-en-es'"),
    ],
)
def test_an_unknown_name_is_told_what_there_is(hub, load, known):
    for name in ("brwon", "de", "libreoffice-en-it"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is none of {known}, .*404: {name}"):
            load(name)


def test_offline_mode_reads_what_was_downloaded(hub, monkeypatch):
    has, asked = hub
    has["books"] = DatasetDict(train=Dataset.from_dict({"text": list("abcdefghij")}))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert sizes(load_prose("books")) == (8, 1, 1)
    assert asked == [("books", None)]


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_out_of_reach_is_given_up_in_seconds(monkeypatch, answers):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface, "HUB_TIMEOUT_S", 0.5)
    with (
        unreachable_hub(monkeypatch, answers) as address,
        pytest.raises(FileNotFoundError, match=f"'my/books' is none of.*tried {address}"),
    ):
        load_prose("my/books")


@pytest.mark.parametrize(
    "kind", ["csv", "tsv", "json", "jsonl", "parquet", "saved", "both", "folder"]
)
def test_a_path_is_never_written_to(tmp_path, kind):
    rows = Dataset.from_dict({"text": [*"abcdefghijkl", None], "label": [0, 1] * 6 + [None]})
    pairs = Dataset.from_dict({"en": [*"abcdefghijkl", None], "es": [*"mnopqrstuvwxy"]})
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, table in (("rows", rows), ("pairs", pairs)):
        file = folder / name
        if kind == "saved":
            table.save_to_disk(file)
        elif kind == "both":
            DatasetDict(train=table, test=table).save_to_disk(file)
        elif kind == "folder":
            file.mkdir()
            table.to_json(file / "train.jsonl")
        elif kind == "tsv":
            table.to_csv(folder / f"{name}.tsv", sep="\t", index=False)
        else:
            export = getattr(table, f"to_{'json' if kind == 'jsonl' else kind}")
            export(folder / f"{name}.{kind}")
    suffix = "" if kind in ("saved", "both", "folder") else f".{kind}"
    with unchanged(folder):
        reviews = load_sentiment(path=folder / f"rows{suffix}")
        assert len(reviews.splits["train"]) == (10 if kind == "both" else 8)
        translations = load_translation(path=folder / f"pairs{suffix}")
        assert len(translations.splits["train"]) == (11 if kind == "both" else 10)
        load_prose(path=folder / f"rows{suffix}")
        with pytest.raises(ValueError, match="no column 'words'"):
            load_prose(path=folder / f"rows{suffix}", text_column="words")


FRENCH = {
    "mine.csv": "text,label\nTrès bien,1\n",
    "mine.jsonl": '{"text": "Très bien", "label": 1}\n' * 20,
    "mine.json": '[{"text": "Très bien", "label": 1}]',
}


@pytest.mark.parametrize("name", FRENCH)
def test_a_file_in_another_encoding_is_named(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(FRENCH[name].encode("latin-1"))
    with pytest.raises(ValueError, match=f"{file} cannot be read: .*Text files must be UTF-8"):
        load_sentiment(path=file)
    if name != "mine.csv":
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: .*UTF-8"):
            load_sentiment(path=tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("empty.csv", b""),
        ("empty.parquet", b""),
        ("damaged.parquet", b"PAR1garbage"),
        ("cut.json", b'[{"text": "a", "label": 1'),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} cannot be read: "):
        load_sentiment(path=file)


def test_a_label_that_is_cut_off_is_no_class(tmp_path):
    file = tmp_path / "mine.csv"
    rows = "text,label\n" + "good,positive\nbad,negative\n" * 10
    file.write_text(rows + "good,posi")
    with pytest.raises(ValueError, match=r"label 'posi', .* begins 'positive': its file is trunc"):
        load_sentiment(path=file)
    file.write_text(rows + "odd,neutral")  # a class of one row
    assert len(load_sentiment(path=file).splits["train"].features["label"].names) == 3


def test_too_few_paragraphs_are_told_what_a_row_is(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("line\n" * 4000)
    message = f"local data {file}, a paragraph a row: 1 rows are too few to divide off"
    with pytest.raises(ValueError, match=message):
        load_prose(path=file)


def test_labels_that_are_numbers_with_gaps_or_booleans(tmp_path):
    gaps = "text,label\n" + "a,2\nb,\nc,10\n" * 10
    for name, table, names in (
        ("gaps.csv", gaps, ["2", "10"]),
        ("flags.csv", "text,label\n" + "a,True\nb,False\n" * 10, ["False", "True"]),
    ):
        (tmp_path / name).write_text(table)
        data = load_sentiment(path=tmp_path / name)
        assert data.splits["train"].features["label"].names == names
        assert sizes(data) == (16, 2, 2)


@pytest.mark.parametrize("alias", ["valid", "val", "dev", "validation"])
def test_names_of_the_validation_split(hub, alias):
    has, _ = hub
    rows = Dataset.from_dict({"text": list("abcdefghij")})
    has["x"] = DatasetDict({"train": rows, alias: rows.select(range(3)), "test": rows})
    data = load_prose("x")
    assert data.source == "Hugging Face hub, x"
    assert sizes(data) == (10, 3, 10)


def test_a_hub_that_fails_after_its_answer(hub, monkeypatch):
    has, _ = hub
    has["x"] = None

    def fail(repository, configuration=None):
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        FileNotFoundError, match=r"'x' is none of 'brown', 'kjv'.*ConnectionError: reset"
    ):
        load_prose("x")


def test_pairs_with_a_text_that_was_there_before_are_left_out():
    pairs = [("A", "x"), ("b", "y"), ("a", "z"), ("c", "Y"), ("d", "z")]
    rows = huggingface.translation_rows(pairs, "en", "de")
    assert rows["translation"][:] == [
        {"en": "A", "de": "x"}, {"en": "b", "de": "y"}, {"en": "d", "de": "z"}
    ]  # fmt: skip
