"""The language examples in their short form: their figures, their resuming, their errors."""

import functools
import gzip
import json
import lzma
import math
import random
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import sacrebleu
import torch
import transformers
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from starlayers import nlp
from starlayers.datasets.text import load_prose, load_sentiment, load_translation
from starlayers.datasets.tokens import byte_level_bpe

pytestmark = pytest.mark.usefixtures("frozen_heap")
EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = ("nlp_sentiment", "nlp_generate", "nlp_translate")
ENGLISH = "sun moon star river stone house tree bird wind rain fire road".split()  # noqa: SIM905
SPANISH = (
    "sol luna estrella rio piedra casa arbol ave viento lluvia fuego camino".split()  # noqa: SIM905
)


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def assert_row(printed: str, *cells: object) -> None:
    """Assert that a line of a printed table has these cells."""
    assert re.search("^" + " +".join(re.escape(str(cell)) for cell in cells) + "$", printed, re.M)


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # an unknown name asks no hub
    monkeypatch.chdir(tmp_path)


# --- sentiment

SENTIMENT = {"vocabulary": 300, "width": 16, "masked": 0.0, "dropout": 0.0, "lr": 2e-2}


@pytest.fixture
def reviews(tmp_path):
    draw = random.Random(0)
    words = {"bad": ["awful", "dull", "dire"], "good": ["great", "lovely", "superb"]}
    rows = ["text,label"]
    for i in range(300):
        label = "good" if i % 3 else "bad"
        some = [*draw.choices(ENGLISH, k=6), *draw.choices(words[label], k=i % 4 > 0)]
        draw.shuffle(some)
        rows.append(f"{' '.join(some)},{label}")
    (tmp_path / "reviews.csv").write_text("\n".join(rows))
    return str(tmp_path / "reviews.csv")


def test_sentiment(reviews, tmp_path, capsys):
    story = example("nlp_sentiment")
    figures = story["main"](data=reviews, epochs=4, **SENTIMENT, out=tmp_path / "run")
    printed = capsys.readouterr().out
    splits = load_sentiment(path=reviews).splits
    train, test = splits["train"], splits["test"]

    truth = test["label"][:]
    assert Counter(truth) == {0: 10, 1: 20}
    assert figures["majority class"] == {"accuracy": 2 / 3, "f1": pytest.approx(0.8 / 2)}
    words = TfidfVectorizer().fit(train["text"])
    linear = LogisticRegression(max_iter=1000).fit(words.transform(train["text"]), train["label"])
    said = linear.predict(words.transform(test["text"]))
    assert figures["TF-IDF + logistic regression"] == {
        "accuracy": accuracy_score(truth, said),
        "f1": f1_score(truth, said, average="macro"),
    }

    # what was saved says what was measured, a sentence at a time
    model = nlp.StarformerEncoderForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    with torch.inference_mode():
        found = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in test["text"]]
    said = [int(logits.argmax()) for logits in found]
    right = sum(a == b for a, b in zip(said, truth, strict=True))
    assert figures["Starformer"]["accuracy"] == pytest.approx(right / 30)
    assert right / 30 > 0.75  # a quarter say nothing
    assert model.config.id2label == {0: "bad", 1: "good"}

    for name, figure in figures.items():
        assert_row(printed, name, f"{figure['accuracy']:.2%}", f"{figure['f1']:.2%}")
    cells = Counter(zip(truth, said, strict=True))
    for i, name in enumerate(["bad", "good"]):
        assert_row(printed, name, cells[i, 0], cells[i, 1])
    shown = re.findall(r"^\* (\d+)% (\w+), is (\w+): (.*)$", printed, re.M)
    wrong = [i for i in range(30) if said[i] != truth[i]]
    sure = {i: float(found[i].softmax(-1).max()) for i in wrong}
    assert len(shown) == min(5, len(wrong)) > 0
    for (percent, answer, label, text), i in zip(shown, sorted(wrong, key=lambda i: -sure[i])):
        assert abs(int(percent) - 100 * sure[i]) < 1
        assert answer != label == ["bad", "good"][truth[i]]
        assert text in test["text"][:]
    assert "; seed 0\n" in printed
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run").glob("checkpoint-*"))

    again = story["main"](data=reviews, epochs=4, **SENTIMENT, out=tmp_path / "again")
    assert again == figures
    assert_same_weights(tmp_path / "again", tmp_path / "run")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sentiment_hides_tokens_in_training_only(reviews, tmp_path, monkeypatch):
    seen: dict[bool, list] = {True: [], False: []}
    forward = nlp.StarformerEncoderForSequenceClassification.forward

    @functools.wraps(forward)  # the Trainer reads the signature
    def watched(self, input_ids=None, **kwargs):
        seen[self.training].append(input_ids)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(nlp.StarformerEncoderForSequenceClassification, "forward", watched)
    given = {**SENTIMENT, "masked": 0.4, "longest": 9}
    example("nlp_sentiment")["main"](data=reviews, epochs=2, **given, out=tmp_path / "run")
    ids = torch.cat([i.flatten() for i in seen[True] if i.shape[1] == 9])
    assert float((ids == 3)[ids != 0].float().mean()) == pytest.approx(0.4, abs=0.04)
    assert not any((ids == 3).any() for ids in seen[False])
    assert all(ids.shape[1] <= 9 for ids in seen[False])


# --- generation

PROSE = {"vocabulary": 300, "width": 32, "steps": 40, "layers": "conv attention"}


@pytest.fixture
def book(tmp_path):
    draw = random.Random(0)
    lines = [f"The {' '.join(draw.choices(ENGLISH, k=8))}." for _ in range(720)]
    lines[7] = "Größe: 5 €"
    paragraphs = ["\n".join(lines[i : i + 6]) for i in range(0, 720, 6)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    return str(tmp_path / "book.txt")


def test_generate(book, tmp_path, capsys):
    story = example("nlp_generate")
    run = tmp_path / "run"
    figures = story["main"](data=book, **PROSE, out=run, prompt="The moon")
    printed = capsys.readouterr().out
    split = {name: rows["text"][:] for name, rows in load_prose(path=book).splits.items()}
    test = b"".join(text.encode() + b"\0" for text in split["test"])
    train = b"".join(text.encode() + b"\0" for text in split["train"])

    shares = [n / len(test) for n in Counter(test).values()]
    entropy = -sum(p * math.log2(p) for p in shares)
    assert figures["entropy of single bytes"] == pytest.approx(entropy, rel=1e-9)
    assert figures["gzip"] == 8 * len(gzip.compress(test)) / len(test)
    assert figures["xz"] == 8 * len(lzma.compress(test, preset=9)) / len(test)
    together, alone = (len(lzma.compress(text, preset=9)) for text in (train + test, train))
    assert figures["xz after the training text"] == 8 * (together - alone) / len(test)
    assert figures["interpolated 6-gram of bytes"] == pytest.approx(by_hand(train, test, 6))

    model = nlp.StarformerForCausalLM.from_pretrained(run).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    stream = [2, *(i for text in split["test"] for i in [*tokenizer(text).input_ids, 2])]
    assert len(stream) > 300
    bits = 0.0
    with torch.inference_mode():
        for i in range(1, len(stream)):
            # from the row's beginning, half a row or more before the token but for the first row
            begin = max(0, i // 64 - 1) * 64
            logits = model(torch.tensor([stream[begin:i]])).logits[0, -1]
            bits -= float(logits.log_softmax(-1)[stream[i]]) / math.log(2)
    assert figures["Starformer"] == pytest.approx(bits / len(test), rel=1e-4)
    assert figures["Starformer"] < entropy

    order = [name for _, name in sorted((bits, name) for name, bits in figures.items())]
    table = re.findall(r"^ *(\d\.\d{3})  (.*)$", printed, re.M)
    assert table == [(f"{figures[name]:.3f}", name) for name in order]
    samples = printed.split("\n* ")[1:]
    assert len(samples) == 3 == len(set(samples))
    assert all(sample.startswith("The moon") for sample in samples)
    assert "; seed 0\n" in printed


def by_hand(train: bytes, test: bytes, order: int) -> float:
    """`ngram_bits` as its definition reads."""
    text, begin = train + test, len(train)
    counts = [Counter() for _ in range(order)]
    for n in range(order):
        for i in range(begin):
            counts[n][before(text, i, n), text[i]] += 1
    totals, kinds = ([Counter() for _ in range(order)] for _ in range(2))
    for n in range(order):
        for (context, _), times in counts[n].items():
            totals[n][context] += times
            kinds[n][context] += 1
    bits = 0.0
    for i in range(begin, len(text)):
        p = 1 / 256
        for n in range(order):
            context = before(text, i, n)
            if c := totals[n][context]:
                t = kinds[n][context]
                p = (counts[n][context, text[i]] + t * p) / (c + t)
        bits -= math.log2(p)
    return bits / len(test)


def before(text: bytes, i: int, n: int) -> tuple:
    """The n bytes before the i-th, where there is none the beginning."""
    return (*[None] * (n - i), *text[max(0, i - n) : i])


def test_the_ngram_is_a_distribution():
    ngram_bits = example("_text")["ngram_bits"]
    train, before = b"abracadabra, barbara", b"abra"
    for order in (1, 2, 3, 5):
        known = 4 * ngram_bits(train, before, order)
        total = sum(
            2 ** -(5 * ngram_bits(train, before + bytes([b]), order) - known) for b in range(256)
        )
        assert total == pytest.approx(1)


@pytest.mark.parametrize("length", [0, 1, 2, 126, 127, 128, 190, 191, 192, 193, 1000])
def test_every_token_is_counted_once(length):
    tokenizer = byte_level_bpe([], 260)  # a token a byte
    given: list[torch.Tensor] = []

    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids):
            given.append(ids)
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*ids.shape, 260))

    text = "".join(random.Random(0).choices("ab€", k=length))
    size = len(text.encode()) + 1  # the end counts
    bits = example("_text")["bits_per_byte"](Uniform(), tokenizer, [text])
    assert bits == pytest.approx(math.log2(260), rel=1e-5)
    rows = torch.cat(given)
    assert rows[0, : size + 1].tolist() == [2, *tokenizer(text).input_ids, 2][:128]


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_undisturbed_one(book, tmp_path, monkeypatch, capsys):
    story = example("nlp_generate")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    figures = story["main"](data=book, **PROSE, seed=3, out=whole)
    samples = capsys.readouterr().out.split("\n* ")[1:]

    steps = []
    training_step = transformers.Trainer.training_step

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 16:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        story["main"](data=book, **PROSE, seed=3, out=broken)
    assert not (broken / "model.safetensors").exists()
    assert {p.name for p in broken.glob("checkpoint-*")} == {"checkpoint-10"}
    assert story["main"](resume=broken) == figures
    assert steps[16:] == list(range(10, 40))
    assert_same_weights(broken, whole)
    printed = capsys.readouterr().out
    assert printed.split("\n* ")[1:] == [s.replace(str(whole), str(broken)) for s in samples]

    # a finished run trains no more, and writes what it is asked for
    assert story["main"](resume=broken, prompt="The stone") == figures
    assert len(steps) == 16 + 30
    assert_same_weights(broken, whole)
    assert "\n* The stone" in capsys.readouterr().out
    assert json.loads((broken / "options.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_starts_again(book, tmp_path, monkeypatch):
    story, run = example("nlp_generate"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            story["main"](data=book, **PROSE, out=run)
    story["main"](resume=run)
    assert (run / "checkpoint-40").is_dir()
    with pytest.raises(FileNotFoundError):
        story["main"](resume=tmp_path)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


# --- translation


@pytest.fixture
def phrases(tmp_path):
    draw = random.Random(0)
    rows = ["en\tes"]
    for i in range(1200):
        words = draw.choices(range(12), k=2 + i % 3)
        rows.append(
            " ".join(ENGLISH[w] for w in words) + "\t" + " ".join(SPANISH[w] for w in words)
        )
    (tmp_path / "phrases.tsv").write_text("\n".join(rows))
    return str(tmp_path / "phrases.tsv")


def test_translate(phrases, tmp_path, capsys):
    given = {"vocabulary": 320, "width": 32, "batch_size": 64, "steps": 150, "lr": 1e-2}
    figures = example("nlp_translate")["main"](
        data=phrases, **given, longest=16, tested=40, beams=2, shown=3, out=tmp_path / "run"
    )
    printed = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    model = nlp.StarformerForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    pairs = [
        pair
        for pair in load_translation(path=phrases).splits["test"]["translation"]
        if all(len(tokenizer(text).input_ids) < 16 for text in pair.values())
    ][:40]
    source, wanted = ([pair[code] for pair in pairs] for code in ("en", "es"))
    assert figures["source, copied"] == {
        "bleu": sacrebleu.corpus_bleu(source, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(source, [wanted]).score,
    }
    said = []
    for text in source:  # one by one: padding changes nothing
        ids = tokenizer(text + "</s>", return_tensors="pt").input_ids
        beam = model.generate(ids, num_beams=2, max_new_tokens=32)
        said.append(tokenizer.decode(beam[0], skip_special_tokens=True))
    chrf = sacrebleu.corpus_chrf(said, [wanted]).score
    assert figures["Starformer"]["chrf"] == pytest.approx(chrf, abs=0.5)
    assert chrf > 2 * figures["source, copied"]["chrf"]
    for name, figure in figures.items():
        assert_row(printed, name, f"{figure['bleu']:.2f}", f"{figure['chrf']:.2f}")
    shown = re.findall(r"^en: (.*)\ntranslation: (.*)\nes: (.*)$", printed, re.M)
    assert [(a, c) for a, _, c in shown] == list(zip(source, wanted, strict=True))[:3]
    assert "; seed 0\n" in printed


# --- surgery on a pretrained encoder


@pytest.fixture
def encoder(reviews, tmp_path):
    torch.manual_seed(0)
    tokenizer = byte_level_bpe(load_sentiment(path=reviews).splits["train"]["text"][:], 300)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.slow
def test_starify(reviews, encoder, tmp_path, capsys):
    main = example("starify_minilm")["main"]
    given = {"data": reviews, "model": encoder, "steps": 60, "lr": 3e-3, "gate_lr": 3e-3}
    figures = main(**given, gates="full low_rank=2 scale")
    printed = capsys.readouterr().out
    assert f"weights: local folder {encoder}" in printed
    for gate in ("full", "low_rank=2", "scale"):
        assert f"starified with gate={gate!r} is apart from plain by 0.0\n" in printed

    majority = figures.pop("majority class")
    assert majority == {"accuracy": 2 / 3, "f1": pytest.approx(0.8 / 2), "parameters": 0}
    plain = figures["plain"]["parameters"]
    added = {name: figure["parameters"] - plain for name, figure in figures.items()}
    layer = {"plain": 0, "full": 33 * 64, "low_rank=2": 2 * (32 + 64) + 64, "scale": 64}
    assert added == {name: 2 * size for name, size in layer.items()}
    assert all(figure["accuracy"] > 0.8 for figure in figures.values()), figures
    for name, figure in figures.items():
        shares = (f"{figure[key]:.2%}" for key in ("accuracy", "f1"))
        assert_row(printed, name, *shares, f"{figure['parameters']:,}")

    assert main(**given, gates="scale")["scale"] == figures["scale"]
    assert (tmp_path / "runs" / "starify_minilm" / "starify.png").is_file()


# --- what must raise


@pytest.mark.parametrize("name", STORIES)
def test_an_unknown_data_set_is_told_the_names(name, tmp_path):
    known = {"nlp_sentiment": "movie-reviews", "nlp_generate": "brown", "nlp_translate": "bible"}
    with pytest.raises(FileNotFoundError, match=f"'nothing/here' is none of '{known[name]}"):
        example(name)["main"](data="nothing/here", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", STORIES)
def test_a_folder_in_use_and_an_unknown_mlp_are_refused(name, tmp_path, reviews, book, phrases):
    data = dict(zip(STORIES, (reviews, book, phrases), strict=True))[name]
    main = example(name)["main"]
    with pytest.raises(FileExistsError):
        main(data=data, vocabulary=300, out=tmp_path)
    with pytest.raises(ValueError, match="unknown mlp_type 'stat'"):
        main(data=data, vocabulary=300, mlp_type="stat", out=tmp_path / "a")
    with pytest.raises(ValueError, match="layer_types \\['mamba'\\]"):
        main(data=data, vocabulary=300, layers="mamba", out=tmp_path / "b")


@pytest.mark.parametrize("name", STORIES)
def test_the_command_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--data", "--act", "--mlp-type", "--seed", "--out", "--layers", "--lr"):
        assert option in shown
