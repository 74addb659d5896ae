"""Cost of gates and gain of fusing on transformers' own models, timed in turn."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import interleave, kept_bytes

BASELINE = "as it is"
TEXT = """\
## Speed: gates and fusing

**What was done.** transformers' own models in float32, variants in turn, medians; time as a
ratio to the model as it is.

{encoder}, 32 texts of 32 tokens:

{encoder_table}
{decoder}, 4 texts of 1,024 tokens:

{decoder_table}
**What this shows.** On this CPU fusing keeps {kept:.2f} of what the model as it is keeps for the
backward, and takes {train:.2f} of its time for a training step ({recompute:.2f} with recompute):
at these widths the matrix products are nearly everything, and the branches are computed twice in
training. On a GPU it was not measured.

**Conditions**

{conditions}
"""


def encoder(smoke: bool) -> tuple[nn.Module, torch.Tensor]:
    """Make a BERT of the shape of MiniLM, and its input: 6 layers of 384 channels."""
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
    """Make a small Llama, and long texts."""
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
    """Return the variants of a family: functions that convert a model."""
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
    """Time all variants of a family in turn, and measure the memory that each keeps."""
    torch.manual_seed(0)
    model, tokens = {"encoder": encoder, "decoder": decoder}[family](smoke)
    chosen = variants(family)
    if smoke:  # compiling takes longer than all the rest
        chosen.pop("torch.compile", None)
    models = {name: make(deepcopy(model)) for name, make in chosen.items()}
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
    for task, call in {"forward": forward, "train": train}.items():
        runs = {name: (lambda m=m, call=call: call(m)) for name, m in models.items()}
        times = interleave(runs, baselines=[BASELINE], repeats=2 if smoke else 11)
        for name, t in times.items():
            rows[name][task] = t
    for name, m in models.items():
        rows[name]["parameters"] = sum(p.numel() for p in m.parameters())
        if name != "torch.compile":  # its saved tensors are hidden inside of one op
            rows[name]["kept_bytes"] = kept_bytes(m.train(), lambda m=m: m(tokens))
    return rows


def job(smoke: bool = False) -> Job:
    """Make the job: models and variants that are timed."""
    families = {"encoder": "BERT of MiniLM's shape", "decoder": "Llama of width 512, 4 layers"}
    names = {family: list(variants(family)) for family in families}
    return {"arm": None, "seed": None, "families": families, "variants": names, "smoke": smoke}


def work(job: Job) -> dict[str, Any]:
    """Measure both families."""
    return {family: measure(family, job["smoke"]) for family in job["families"]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return ratios to the model as it is, memory and parameters."""
    header = ["variant", "forward, time x", "training step, time x", "kept for backward, MiB"]
    body = []
    for name, row in rows.items():
        kept = f"{row['kept_bytes'] / 2**20:.1f}" if "kept_bytes" in row else "-"
        ratios = [f"{row[task]['ratio']:.2f}" for task in ("forward", "train")]
        body.append([name, *ratios, kept, f"{row['parameters']:,}"])
    return markdown_table([*header, "parameters"], body)


def tables(records: Records) -> str:
    """Return a table for each family of models."""
    (record,) = records.values()
    return "\n".join(f"{family}\n\n{table(rows)}" for family, rows in record.metrics.items())


def text(records: Records) -> str:
    """Make the page of the speed of starified models."""
    (record,) = records.values()
    assert record.definition is not None
    rows: dict[str, Any] = record.metrics["decoder"]
    return TEXT.format(
        **record.definition["families"],
        encoder_table=table(record.metrics["encoder"]),
        decoder_table=table(rows),
        kept=rows["fused"]["kept_bytes"] / rows[BASELINE]["kept_bytes"],
        train=rows["fused"]["train"]["ratio"],
        recompute=rows["fused, recompute"]["train"]["ratio"],
        conditions=conditions([record]),
    )


STUDY = Study(
    "starify-speed",
    "python -m benchmarks.starify speed",
    lambda: {"speed": job()},
    work,
    tables,
    text,
)
