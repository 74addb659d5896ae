"""Train a small Starformer on prose, measure how well it predicts, and let it write.

A decoder of two `star_conv` and two attention layers learns a byte-level vocabulary and the text.
It is measured in bits per byte of text it has not seen, beside compressors and an n-gram model,
which it should be ahead of; its sentences are grammatical in parts and mean little. About four
minutes on a CPU. `loss.png`, weights, tokenizer and checkpoints go to the folder of the run.

python examples/nlp_generate.py                                 # the Brown corpus, on a CPU
python examples/nlp_generate.py --data my.txt                   # a row is a paragraph
python examples/nlp_generate.py --data Salesforce/wikitext:wikitext-2-raw-v1 --steps 3000
python examples/nlp_generate.py --resume runs/TIME              # after Ctrl-C or a power cut
"""

import json
from pathlib import Path
from typing import Annotated, Any

import _report
import _text
import typer
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from starlayers.datasets.text import load_prose
from starlayers.datasets.tokens import byte_level_bpe, windows
from starlayers.nlp import StarformerConfig, StarformerForCausalLM

LENGTH = 128  # tokens in a row
OF_THIS_CALL = {"out", "resume", "prompt", "temperature", "top_p"}  # a resumed run keeps the rest
DATA = (
    "brown, kjv, a hub name, or a file (txt, csv, tsv, json, parquet; column text). In a .txt file "
    "each paragraph is one row: an empty line ends it"
)


def main(
    data: Annotated[str, typer.Option(help=DATA)] = "brown",
    layers: str = "star_conv attention star_conv attention",
    width: int = 128,
    act: _text.Act = "silu",
    mlp_type: _text.MlpType = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 2000,
    steps: int = 2200,
    batch_size: int = 8,
    lr: float = 3e-3,
    seed: int = 0,
    out: _text.Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="folder of a run to continue", show_default="none")
    ] = None,
    prompt: str = "The",
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> dict[str, float]:
    a: dict[str, Any] = {k: v for k, v in locals().items() if k not in OF_THIS_CALL}
    folder = resume or _text.run_folder(out)
    if resume:
        a = json.loads((folder / "options.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = _text.load(load_prose, a["data"])
    split = {name: rows["text"][:] for name, rows in texts.splits.items()}
    if not resume:
        folder.mkdir(parents=True)
        tokenizer = byte_level_bpe(split["train"], a["vocabulary"])
        tokenizer.save_pretrained(folder)
        (folder / "options.json").write_text(json.dumps(a))

    set_seed(a["seed"])
    fields = _text.shape(tokenizer, a["layers"], a["width"], a["act"], a["mlp_type"])
    model = StarformerForCausalLM(StarformerConfig(**fields, initializer_range=a["width"] ** -0.5))
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {a['seed']}")
    recipe = {"max_steps": a["steps"], "per_device_train_batch_size": a["batch_size"]}
    recipe |= {"learning_rate": a["lr"], "warmup_steps": 0.05, "seed": a["seed"]}
    recipe |= {"logging_steps": 50, "eval_strategy": "steps"}
    recipe |= {"eval_steps": 0.25, "save_steps": 0.25}  # of all steps
    arguments = TrainingArguments(**_text.options(folder, **recipe))
    rows, held_out = (windows(tokenizer, split[s], LENGTH) for s in ("train", "validation"))
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out)
    _text.train(trainer, folder, bool(resume and get_last_checkpoint(folder)))

    figures = {"Starformer": _text.bits_per_byte(model, tokenizer, split["test"], LENGTH)}
    figures |= _text.baselines(_text.flat(split["train"]), _text.flat(split["test"]))
    ranked = sorted(figures.items(), key=lambda item: item[1])
    body = [(f"{bits:.3f}", name) for name, bits in ranked]
    _report.table(("bits", "predicted by"), body, "bits per byte of the test split:")
    set_seed(a["seed"])
    start = tokenizer([tokenizer.eos_token + prompt] * 3, return_tensors="pt").to(model.device)
    asked = {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": 100}
    for text in tokenizer.batch_decode(model.generate(**start, **asked), skip_special_tokens=True):
        print(f"\n* {text.strip()}")
    print(f"\nseed {a['seed']}; loss.png, weights, tokenizer and checkpoints in {folder}")
    return figures


if __name__ == "__main__":
    _report.run(main, __doc__)
