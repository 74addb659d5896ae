"""Three tasks of the language study: models, data, training and measures."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

#: what all models have in common; the study states it, so that a library's default decides nothing
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 128**-0.5,
    "pad_token_id": 0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
#: options of a star MLP, which a plain one does not have
STAR = {"mlp_type": "star", "mlp_offset": 0.0}
HYBRID = ["star_conv", "attention"]
GATE = "sigmoid"
#: MLPs are compared under plain attention, mixers under the silu star MLP
MLPS: dict[str, dict[str, Any]] = {
    "plain gelu": {"mlp_type": "plain", "hidden_act": "gelu"},
    "star relu6": {**STAR, "hidden_act": "relu6"},
    "star gelu": {**STAR, "hidden_act": "gelu"},
    "star silu": {**STAR, "hidden_act": "silu"},
    "star bilinear": {**STAR, "hidden_act": None},
    "star silu rank 2": {**STAR, "hidden_act": "silu", "mlp_rank": 2},
}
MIXERS: dict[str, dict[str, Any]] = {
    "gate per head": {"attention_gate": "head", "attention_gate_act": GATE},
    "gate per channel": {"attention_gate": "channel", "attention_gate_act": GATE},
    "hybrid": {"layer_types": HYBRID, "conv_kernel_size": 3, "conv_act": None},
}
VARIANTS = MLPS | {name: MLPS["star silu"] | mixer for name, mixer in MIXERS.items()}
BASELINE = {**dict.fromkeys(MLPS, "plain gelu"), **dict.fromkeys(MIXERS, "star silu")}

LAYERS = {"sentiment": 2, "prose": 4, "translation": 2}
VOCABULARY = {"sentiment": 4000, "prose": 2000, "translation": 4000}
RECIPES: dict[str, dict[str, Any]] = {
    "sentiment": {"epochs": 2, "batch": 32, "lr": 1e-3, "weight_decay": 0.05, "dropout": 0.2},
    "prose": {"steps": 400, "batch": 16, "length": 128, "lr": 3e-3, "weight_decay": 0.05},
    "translation": {"epochs": 2, "batch": 32, "longest": 32, "lr": 2e-3, "weight_decay": 0.05},
}
#: metric of a task -> whether more is better; the first decides
METRICS: dict[str, dict[str, bool]] = {
    "sentiment": {"accuracy": True, "f1": True},
    "prose": {"bits_per_byte": False},
    "translation": {"chrf": True, "bleu": True, "bits_per_byte": False},
}


def build(task: str, options: dict[str, Any], dropout: float = 0.0) -> nn.Module:
    """Make a model of the task's size with as many parameters as the plain one has."""
    width = _matched_width(task, options)
    return _model(task, {**options, "intermediate_size": width}, dropout)


def _model(task: str, options: dict[str, Any], dropout: float = 0.0) -> nn.Module:
    from starlayers import nlp

    options = dict(options)
    layers = LAYERS[task]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY[task],
        "num_hidden_layers": layers,
        "hidden_dropout": dropout,
        **MODEL,
    }
    if "layer_types" in options:
        layer_types = [options["layer_types"][i % 2] for i in range(layers)]
        options["layer_types"] = layer_types
        if task == "translation":
            options["encoder_layer_types"] = layer_types
    settings |= options
    if task == "sentiment":
        config = nlp.StarformerEncoderConfig(**settings, classifier_dropout=dropout)
        return nlp.StarformerEncoderForSequenceClassification(config)
    if task == "prose":
        return nlp.StarformerForCausalLM(nlp.StarformerConfig(**settings))
    return nlp.StarformerForConditionalGeneration(nlp.StarformerSeq2SeqConfig(**settings))


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def _matched_width(task: str, options: dict[str, Any]) -> int:
    def size(options: dict[str, Any], width: int) -> int:
        with torch.device("meta"):
            return parameters(_model(task, {**options, "intermediate_size": width}))

    wanted = size(MLPS["plain gelu"], 4 * MODEL["hidden_size"])
    one, two = size(options, 1), size(options, 2)  # parameters are linear in the width
    return 1 + round((wanted - one) / (two - one))


@cache
def data(task: str, small: bool) -> dict[str, Any]:
    """Load tokenizer and tokenised splits of a task; a part of them where `small`."""
    from starlayers.datasets.text import load_prose, load_sentiment, load_translation
    from starlayers.datasets.tokens import byte_level_bpe, windows

    loaders: dict[str, Callable[[], Any]] = {
        "sentiment": load_sentiment,
        "prose": load_prose,
        "translation": load_translation,
    }
    splits = loaders[task]().splits
    if small:
        sizes = {"train": 64 if task != "prose" else 4, "test": 16 if task != "prose" else 1}
        for part, size in sizes.items():
            splits[part] = splits[part].select(range(size))
    column = "translation" if task == "translation" else "text"
    texts = splits["train"][column][:]
    flat = [t for pair in texts for t in pair.values()] if task == "translation" else texts
    tokenizer = byte_level_bpe(flat, VOCABULARY[task])
    recipe = RECIPES[task]
    parts: dict[str, Any] = {}
    for part in ("train", "test"):
        if task == "prose":
            parts[part] = windows(tokenizer, splits[part]["text"][:], recipe["length"])
        elif task == "sentiment":
            ids = tokenizer(splits[part]["text"][:]).input_ids
            labels = splits[part]["label"][:]
            parts[part] = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
        else:
            parts[part] = _pairs(tokenizer, splits[part]["translation"][:], recipe["longest"])
    return {"tokenizer": tokenizer, **parts}


def _pairs(tokenizer: Any, pairs: list[dict[str, str]], longest: int) -> list[dict[str, Any]]:
    end = tokenizer.eos_token_id
    fitting = []
    for pair in pairs:
        source, target = tokenizer([pair["en"], pair["es"]]).input_ids
        if max(len(source), len(target)) < longest:
            fitting.append({"input_ids": [*source, end], "labels": [*target, end]})
    return fitting


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's model from its seed and measure it on the test split."""
    import tempfile
    import time

    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    task, recipe = job["task"], job["recipe"]
    prepared = data(task, job["small"])
    torch.manual_seed(job["seed"])
    model = build(task, job["options"], recipe.get("dropout", 0.0))
    collate: Any = default_data_collator
    if task == "sentiment":
        collate = DataCollatorWithPadding(prepared["tokenizer"])
    elif task == "translation":
        collate = DataCollatorForSeq2Seq(prepared["tokenizer"], model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=recipe.get("steps", -1),
            num_train_epochs=recipe.get("epochs", 1),
            per_device_train_batch_size=recipe["batch"],
            learning_rate=recipe["lr"],
            weight_decay=recipe["weight_decay"],
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=1.0,
            seed=job["seed"],
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=prepared["train"], data_collator=collate)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **MEASURES[task](model.eval(), prepared),
        "train_loss": losses[-1] if losses else None,
        "seconds": seconds,
        "parameters": parameters(model),
        "intermediate_size": model.config.intermediate_size,
    }


@torch.no_grad()
def _sentiment(model: Any, prepared: dict[str, Any]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    texts = prepared["test"]
    predictions: list[int] = []
    for start in range(0, len(texts), 64):
        batch = [{"input_ids": t["input_ids"]} for t in texts[start : start + 64]]
        padded = prepared["tokenizer"].pad(batch, return_tensors="pt")
        predictions += model(**padded).logits.argmax(-1).tolist()
    labels = [t["labels"] for t in texts]
    return {
        "accuracy": 100 * accuracy_score(labels, predictions),
        "f1": 100 * f1_score(labels, predictions, zero_division=0.0),
    }


@torch.no_grad()
def _prose(model: Any, prepared: dict[str, Any]) -> dict[str, float]:
    windows, tokenizer = torch.tensor(prepared["test"]["input_ids"][:]), prepared["tokenizer"]
    bits = sum(
        model(batch, labels=batch).loss.item() * batch[:, 1:].numel() / math.log(2)
        for batch in windows.split(16)
    )
    # `</s>` stands for the end of a text: a byte like any other
    texts = (tokenizer.decode(w[1:], skip_special_tokens=True) for w in windows)
    size = sum(len(text.encode()) for text in texts)
    size += int((windows[:, 1:] == tokenizer.eos_token_id).sum())
    return {"bits_per_byte": bits / size}


@torch.no_grad()
def _translation(model: Any, prepared: dict[str, Any]) -> dict[str, float]:
    import sacrebleu
    from transformers import DataCollatorForSeq2Seq

    tokenizer = prepared["tokenizer"]
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    bits, size = 0.0, 0
    translations: list[str] = []
    references: list[str] = []
    for start in range(0, len(prepared["test"]), 64):
        batch = collate(prepared["test"][start : start + 64])
        kept = batch["labels"] != -100
        bits += model(**batch).loss.item() * int(kept.sum()) / math.log(2)
        wanted = [
            tokenizer.decode(ids[keep], skip_special_tokens=True)
            for ids, keep in zip(batch["labels"], kept, strict=True)
        ]
        size += sum(len(r.encode()) + 1 for r in wanted)
        references += wanted
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=48,
            do_sample=False,
        )
        translations += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return {
        "bleu": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
        "bits_per_byte": bits / size,
    }


MEASURES = {"sentiment": _sentiment, "prose": _prose, "translation": _translation}
