"""Train a star-MLP language model on English prose, measure how well it predicts, generate text.

python examples/nlp_generate.py                                 # the Brown corpus, on a CPU
python examples/nlp_generate.py --data Salesforce/wikitext:wikitext-2-raw-v1 --steps 3000
python examples/nlp_generate.py --resume runs/TIME              # after Ctrl-C or a power cut
"""

import gzip
import json
import lzma
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn import functional as F
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from starlayers.datasets.text import load_prose
from starlayers.datasets.tokens import byte_level_bpe, windows
from starlayers.nlp import StarformerConfig, StarformerForCausalLM

LENGTH = 128  # tokens in a row
OF_THIS_CALL = {"out", "resume", "prompt", "temperature", "top_p"}  # a resumed run keeps the rest


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
def bits_per_byte(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return bits per byte; each token is predicted once, with half a row or more before it."""
    end, half = tokenizer.eos_token_id, LENGTH // 2
    stream = [end, *(i for ids in tokenizer(texts).input_ids for i in [*ids, end])]
    labels = torch.tensor([*stream, *[-100] * LENGTH]).unfold(0, LENGTH, half).clone()
    rows = labels.clamp(min=0)
    labels[1:, :-half] = -100  # already counted in the previous row
    nats = 0.0
    for x, y in zip(rows.split(32), labels.split(32), strict=True):
        logits = model.eval()(x.to(model.device)).logits[:, :-1].flatten(0, 1).cpu()
        nats += F.cross_entropy(logits, y[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / len(flat(texts))


def main(
    data: Annotated[str, typer.Option(help="brown, kjv, a hub name or a file")] = "brown",
    layers: str = "star_conv attention star_conv attention",
    width: int = 128,
    act: Annotated[str, typer.Option(help="a name in starlayers.ACTIVATIONS")] = "silu",
    mlp_type: Annotated[str, typer.Option(help="star, sum or plain")] = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 2000,
    steps: int = 2200,
    batch_size: int = 8,
    lr: float = 3e-3,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run [runs/TIME]")] = None,
    resume: Annotated[Path | None, typer.Option(help="folder of a run to continue")] = None,
    prompt: str = "The",
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> dict[str, float]:
    """Train a star-MLP language model on English prose, measure it, and generate text."""
    a: dict[str, Any] = {k: v for k, v in locals().items() if k not in OF_THIS_CALL}
    folder = resume or out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if resume:
        a = json.loads((folder / "options.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = load_prose(**{"path" if Path(a["data"]).exists() else "name": a["data"]})
    split = {name: rows["text"][:] for name, rows in texts.splits.items()}
    if not resume:
        folder.mkdir(parents=True)
        tokenizer = byte_level_bpe(split["train"], a["vocabulary"])
        tokenizer.save_pretrained(folder)
        (folder / "options.json").write_text(json.dumps(a))

    set_seed(a["seed"])
    config = StarformerConfig(
        **{"hidden_act": a["act"], "mlp_type": a["mlp_type"], "hidden_size": a["width"]},
        **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        layer_types=a["layers"].split(),
        num_hidden_layers=len(a["layers"].split()),
        num_attention_heads=4,
        initializer_range=a["width"] ** -0.5,
    )
    model = StarformerForCausalLM(config)
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {a['seed']}")
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": a["steps"], "per_device_train_batch_size": a["batch_size"]},
        **{"learning_rate": a["lr"], "lr_scheduler_type": "cosine", "warmup_steps": 0.05},
        **{"weight_decay": 0.05, "seed": a["seed"], "logging_steps": 50, "report_to": "none"},
        dataloader_pin_memory=torch.cuda.is_available(),
        **{"eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.25},  # of all steps
    )
    train, held_out = (windows(tokenizer, split[s], LENGTH) for s in ("train", "validation"))
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=bool(resume and get_last_checkpoint(folder)))
    trainer.save_model()

    figures = {"Starformer": bits_per_byte(model, tokenizer, split["test"])}
    figures |= baselines(flat(split["train"]), flat(split["test"]))
    print("\nbits per byte of the test split:")
    for name, bits in sorted(figures.items(), key=lambda item: item[1]):
        print(f"{bits:8.3f}  {name}")
    set_seed(a["seed"])
    start = tokenizer([tokenizer.eos_token + prompt] * 3, return_tensors="pt").to(model.device)
    asked = {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": 100}
    for text in tokenizer.batch_decode(model.generate(**start, **asked), skip_special_tokens=True):
        print(f"\n* {text.strip()}")
    print(f"\nseed {a['seed']}; weights, tokenizer and checkpoints in {folder}")
    return figures


if __name__ == "__main__":
    typer.run(main)
