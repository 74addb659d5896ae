"""One run of the starify study: the data, the steps, the figures."""

import random
import time
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.starify_arms import FROZEN, build, optimizer, sizes, without_activations

RECIPE: dict[str, Any] = {
    "steps": 160,
    "batch": 32,
    "longest": 48,
    "weight_decay": 0.01,
    "warmup": 0.06,
    "clip": 1.0,
}
#: batches that are divided off together, by length, so that little is padding
BUCKET = 16
REFIT_BATCHES = 32
Rows = list[tuple[list[int], int]]


@cache
def data(small: bool, longest: int) -> dict[str, Any]:
    """Tokenizer, where the encoder is, and the splits as ids and labels."""
    from transformers import AutoTokenizer

    from starlayers.datasets.pretrained import pretrained_minilm
    from starlayers.datasets.text import load_sentiment
    from starlayers.datasets.tokens import byte_level_bpe

    found = load_sentiment()
    splits = {
        name: rows.select(range(64)) if small else rows for name, rows in found.splits.items()
    }
    if small:
        pretrained = None
        tokenizer: Any = byte_level_bpe(splits["train"]["text"][:], 300)
    else:
        pretrained = pretrained_minilm()
        tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    parts: dict[str, Rows] = {}
    for name, rows in splits.items():
        ids = tokenizer(rows["text"][:], truncation=True, max_length=longest).input_ids
        parts[name] = list(zip(ids, rows["label"][:], strict=True))
    return {
        "tokenizer": tokenizer,
        "folder": pretrained and pretrained.folder,
        "sources": [found.source, pretrained.source if pretrained else "a tiny random encoder"],
        **parts,
    }


def encoder(folder: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    if folder is not None:
        return BertModel.from_pretrained(folder, add_pooling_layer=False)
    tiny = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    return BertModel(tiny, add_pooling_layer=False)


def batches(rows: Rows, steps: int, size: int, seed: int) -> list[Rows]:
    """Batches of one length or nearly so, in the order and of the rows that the seed draws."""
    draw = random.Random(seed)
    drawn = draw.sample(rows, steps * size)
    found = []
    for start in range(0, len(drawn), BUCKET * size):
        bucket = sorted(drawn[start : start + BUCKET * size], key=lambda row: len(row[0]))
        found += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    draw.shuffle(found)
    return found


def padded(tokenizer: Any, rows: Rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    fields = tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
    inputs = {name: fields[name] for name in ("input_ids", "attention_mask")}
    return inputs, torch.tensor([label for _, label in rows])


@torch.inference_mode()
def figures(model: nn.Module, tokenizer: Any, rows: Rows) -> dict[str, float]:
    """Accuracy in per cent, and log loss."""
    right, loss = 0, 0.0
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), 64):
        inputs, labels = padded(tokenizer, rows[start : start + 64])
        logits = model(**inputs)
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": 100 * right / len(rows), "log_loss": loss / len(rows)}


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune the job's arm from its seed and measure it on the splits the job names."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the pooler is left out
    logging.disable_progress_bar()
    recipe = job["recipe"]
    prepared = data(job["small"], recipe["longest"])
    tokenizer, steps = prepared["tokenizer"], recipe["steps"]
    torch.manual_seed(job["seed"])
    model = build(job["arm"], encoder(prepared["folder"]), job["settings"]).train()
    torch.manual_seed(job["seed"])  # arms draw their new weights, dropout is to be the same
    # beside frozen weights none: IA3's vectors would decay towards 0, not 1
    weight_decay = 0.0 if job["arm"] in FROZEN else recipe["weight_decay"]
    optimiser = optimizer(model, job["settings"], weight_decay)
    warmup = max(1, round(recipe["warmup"] * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    drawn = batches(prepared["train"], steps, recipe["batch"], job["seed"])
    first = [padded(tokenizer, rows)[0] for rows in drawn[:REFIT_BATCHES]]
    anneal = without_activations(job["arm"], model, first, steps)
    losses = []
    began = time.perf_counter()
    for rows in drawn:
        inputs, labels = padded(tokenizer, rows)
        loss = F.cross_entropy(model(**inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if anneal is not None:
            anneal.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    model.eval()
    measured = {split: figures(model, tokenizer, prepared[split]) for split in job["splits"]}
    last = losses[-max(1, steps // 5) :]
    return {
        **measured,
        **sizes(model),
        "train_loss": sum(last) / len(last),
        "seconds_per_step": seconds / steps,
        "sources": prepared["sources"],
    }
