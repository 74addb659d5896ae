"""What gates cost and what fusing saves: transformers' own models, interleaved in one run."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, environment, interleave, markdown_table, write_json
from benchmarks.nlp_speed import kept_bytes

BASELINE = "as it is"


def encoder(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """The shape of MiniLM: 6 layers of 384 channels."""
    from transformers import BertConfig, BertModel

    width = 48 if smoke else 384
    config = BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=1 if smoke else 6,
        num_attention_heads=12,
        intermediate_size=4 * width,
    )
    return BertModel(config), torch.randint(1000, (2, 8) if smoke else (32, 32))


def decoder(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """A small Llama on long texts."""
    from transformers import LlamaConfig, LlamaModel

    width = 48 if smoke else 512
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=1 if smoke else 4,
        num_attention_heads=8,
        intermediate_size=96 if smoke else 1408,
        max_position_embeddings=1024,
    )
    return LlamaModel(config), torch.randint(1000, (2, 8) if smoke else (4, 1024))


def variants(family: str) -> dict[str, Callable[[nn.Module], Any]]:
    from starlayers import starify

    if family == "encoder":
        return {
            BASELINE: lambda m: m,
            "full gate": lambda m: starify(m),
            "full gate, recompute": lambda m: starify(m, recompute=True),
            "low-rank gate, 16": lambda m: starify(m, gate="low_rank=16"),
            "scale gate": lambda m: starify(m, gate="scale"),
        }
    return {
        BASELINE: lambda m: m,
        "torch.compile": lambda m: torch.compile(m),
        "fused": lambda m: starify(m, mode="fuse"),
        "fused, recompute": lambda m: starify(m, mode="fuse", recompute=True),
        "grown by one product": lambda m: starify(m, grow=1),
    }


def measure(family: str, smoke: bool) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    model, tokens = {"encoder": encoder, "decoder": decoder}[family](smoke)
    models = {name: make(deepcopy(model)) for name, make in variants(family).items()}
    want = model.eval()(tokens).last_hidden_state
    for name, other in models.items():  # no time of a model that computes something else
        got = other.eval()(tokens).last_hidden_state
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=name)

    def train(m: nn.Module) -> None:
        m.train()
        m(tokens).last_hidden_state.square().mean().backward()
        m.zero_grad()

    def forward(m: nn.Module) -> None:
        m.eval()
        with torch.no_grad():
            m(tokens)

    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    for what, call in {"forward": forward, "train": train}.items():
        runs = {name: (lambda m=m, call=call: call(m)) for name, m in models.items()}
        times = interleave(runs, baselines=[BASELINE], repeats=2 if smoke else 11)
        for name, t in times.items():
            rows[name][what] = t
    for name, m in models.items():
        rows[name]["parameters"] = sum(p.numel() for p in m.parameters())
        if name != "torch.compile":  # which keeps what it likes, inside of one op
            rows[name]["kept_bytes"] = kept_bytes(m.train(), lambda m=m: m(tokens))
    return rows


def run(smoke: bool, out: Path = RESULTS) -> None:
    results = {family: measure(family, smoke) for family in ("encoder", "decoder")}
    for family, rows in results.items():
        print(f"{family}\n{table(rows)}")
    name = "starify-speed-smoke.json" if smoke else "starify-speed.json"
    write_json(out / name, {"rows": results, "environment": environment()})


def table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["variant", "forward, time x", "training step, time x", "kept for backward, MiB"]
    body = []
    for name, row in rows.items():
        kept = f"{row['kept_bytes'] / 2**20:.1f}" if "kept_bytes" in row else "-"
        ratios = [f"{row[what]['ratio']:.2f}" for what in ("forward", "train")]
        body.append([name, *ratios, kept, f"{row['parameters']:,}"])
    return markdown_table([*header, "parameters"], body)
