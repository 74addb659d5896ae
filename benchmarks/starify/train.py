"""One run of the starify study: data, steps, measures."""

import random
import time
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.starify.arms import FROZEN, build, optimizer, sizes

RECIPE: dict[str, Any] = {
    "steps": 160,
    "batch": 32,
    "longest": 48,
    "weight_decay": 0.01,
    "warmup": 0.06,
    "clip": 1.0,
}
#: batches that are sorted by length together, so that little is padding
BUCKET = 16
Texts = list[tuple[list[int], int]]


@cache
def data(small: bool, longest: int) -> dict[str, Any]:
    """Load tokenizer, the folder of the encoder, and the splits as ids and labels."""
    from transformers import AutoTokenizer

    from starlayers.datasets.pretrained import pretrained_minilm
    from starlayers.datasets.text import load_sentiment
    from starlayers.datasets.tokens import byte_level_bpe

    sentiment = load_sentiment()
    splits = {
        name: rows.select(range(64)) if small else rows for name, rows in sentiment.splits.items()
    }
    if small:
        pretrained = None
        tokenizer: Any = byte_level_bpe(splits["train"]["text"][:], 300)
    else:
        pretrained = pretrained_minilm()
        tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    parts: dict[str, Texts] = {}
    for name, rows in splits.items():
        ids = tokenizer(rows["text"][:], truncation=True, max_length=longest).input_ids
        parts[name] = list(zip(ids, rows["label"][:], strict=True))
    return {
        "tokenizer": tokenizer,
        "folder": pretrained and pretrained.folder,
        "sources": [sentiment.source, pretrained.source if pretrained else "a tiny random encoder"],
        **parts,
    }


def encoder(folder: Any) -> nn.Module:
    """Load MiniLM from its folder, or make a tiny encoder with random weights."""
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


def batches(texts: Texts, steps: int, size: int, seed: int) -> list[Texts]:
    """Draw batches of texts of nearly one length, by the seed."""
    draw = random.Random(seed)
    drawn = draw.sample(texts, steps * size)
    made = []
    for start in range(0, len(drawn), BUCKET * size):
        bucket = sorted(drawn[start : start + BUCKET * size], key=lambda text: len(text[0]))
        made += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    draw.shuffle(made)
    return made


def padded(tokenizer: Any, texts: Texts) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return padded inputs, and the labels."""
    fields = tokenizer.pad({"input_ids": [ids for ids, _ in texts]}, return_tensors="pt")
    inputs = {name: fields[name] for name in ("input_ids", "attention_mask")}
    return inputs, torch.tensor([label for _, label in texts])


@torch.inference_mode()
def measure(model: nn.Module, tokenizer: Any, texts: Texts) -> dict[str, float]:
    """Return accuracy in percent, and log loss."""
    right, loss = 0, 0.0
    texts = sorted(texts, key=lambda text: len(text[0]))
    for start in range(0, len(texts), 64):
        inputs, labels = padded(tokenizer, texts[start : start + 64])
        logits = model(**inputs)
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": 100 * right / len(texts), "log_loss": loss / len(texts)}


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
    losses = []
    began = time.perf_counter()
    for batch in drawn:
        inputs, labels = padded(tokenizer, batch)
        loss = F.cross_entropy(model(**inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    model.eval()
    measured = {split: measure(model, tokenizer, prepared[split]) for split in job["splits"]}
    last = losses[-max(1, steps // 5) :]
    return {
        **measured,
        **sizes(model),
        "train_loss": sum(last) / len(last),
        "seconds_per_step": seconds / steps,
        "sources": prepared["sources"],
    }
