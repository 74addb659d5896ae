"""Liger's kernels and starify on the MLP of Llama, and on a Llama of one layer with its loss.

Predictions, made from the sources, when one MLP's memory had been counted and nothing was timed:

1. Liger's SwiGLU and `mode="fuse"` keep the same: the input, both branches and their product, four
   of the definition's five tensors. torch.compile keeps no more.
2. `recompute=True` keeps the input alone, as gradient checkpointing and Liger's tiled MLP do. At
   its peak it needs as much as the definition; the tiled MLP does not, and wins there.
3. In a whole model Liger wins by its loss, which makes no logits. Both together keep the least.
4. On a CPU fusing takes the definition's time, and recomputing a third more: one matrix product of
   three is computed again. torch.compile is fastest.
"""

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.harness.records import Record
from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock
from benchmarks.starify import variants

DEVICES = ("cpu", "cuda")
TOKENS = 2048
VOCABULARY = 32_000
#: channels -> hidden channels of Llama-like models, and rounds of the times
WIDTHS = {1024: (2816, 15), 2048: (5632, 7), 4096: (11008, 3)}
DTYPES = ("bfloat16", "float32")
TEXT = """\
## Beside Liger: memory and time

**The question.** Liger's kernels replace SwiGLU, norms, rotary embedding and loss of a model for a
GPU; `starify(mode="fuse")` replaces its MLPs. What does each keep for the backward, what does a
training step need at its peak, and what does it cost?

**Predictions**, from the sources, when one MLP's memory had been counted and nothing was timed:

{predictions}

**What was done.** transformers' own `LlamaMLP` and one-layer `LlamaForCausalLM`, {tokens:,} tokens,
Liger {liger}. Liger's kernels run on no CPU. Without a GPU, memory is counted with kernels that are
compiled for an H100 and not launched: every library keeps the tensors that it keeps there (a fused
MLP runs PyTorch's matrix products and one kernel for the product). Time is that of what runs on the
device: training steps in turn, CPU time of one thread, medians of the ratios to the definition.
Before they are timed, outputs and all gradients of the variants are compared; what did not run was
not. The peak is that of forward and backward, beyond weights, their gradients and input.

Kept for the backward by one MLP, MiB:

{kept}
Peak of a training step of one MLP, MiB:

{peak}
Time of a training step of one MLP, as a ratio to the definition's:

{time}
A Llama of one layer with {vocabulary:,} tokens in its vocabulary, and its loss, MiB:

{model}
**What this shows.**

{answer}

**Conditions**

{conditions}
"""


def jobs(smoke: bool = False, devices: tuple[str, ...] = DEVICES) -> dict[str, Job]:
    """Make all jobs on the given devices."""
    widths = {64: (172, 2)} if smoke else WIDTHS
    tokens = 32 if smoke else TOKENS
    made: dict[str, Job] = {}
    for device in devices:
        common = {"arm": None, "seed": None, "tokens": tokens, "device": device}
        for hidden, (inner, rounds) in widths.items():
            sizes = common | {"hidden": hidden, "inner": inner}
            for dtype in DTYPES:
                chosen = [v for v in variants.MLPS if not smoke or v != variants.COMPILED]
                made[f"MLP-{hidden}-{dtype}-{device}"] = {
                    "part": "MLP", **sizes, "dtype": dtype, "variants": chosen, "rounds": rounds
                }  # fmt: skip
        for hidden in list(widths)[:2]:
            made[f"model-{hidden}-bfloat16-{device}"] = {
                "part": "model", **common, "hidden": hidden, "inner": widths[hidden][0],
                "dtype": "bfloat16", "variants": list(variants.MODELS),
                "vocabulary": 96 if smoke else VOCABULARY,
            }  # fmt: skip
    return made


def here() -> tuple[str, ...]:
    """Return the devices of this machine."""
    return DEVICES if torch.cuda.is_available() else DEVICES[:1]


def work(job: Job) -> dict[str, Any]:
    """Count in a process of its own; on a CPU, time here what runs there."""
    variants.liger()
    command = [sys.executable, "-m", "benchmarks.starify.variants", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    rows: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    if job["part"] == "MLP" and job["device"] == "cpu":
        native = [name for name in job["variants"] if name in variants.NATIVE]
        for name, timed in variants.times(job | {"variants": native}, cpu_clock).items():
            rows[name]["train"] = timed
    return rows


def of_part(records: Records, part: str) -> list[Record]:
    """Return the records of the MLPs or of the models."""
    return [r for r in records.values() if (r.definition or {})["part"] == part]


def device_of(record: Record) -> str:
    """Return the device of a record as a reader knows it."""
    on_gpu = (record.definition or {})["device"] == "cuda"
    return str(record.hardware["gpu"]) if on_gpu else "CPU"


def table(records: list[Record], cell: Any) -> str:
    """Return a table with a row for each record and a column for each variant."""
    names = list(dict.fromkeys(name for r in records for name in r.metrics))
    lines = []
    for record in records:
        job = record.definition or {}
        start = [f"{job['hidden']:,} x {job['inner']:,}", job["dtype"], device_of(record)]
        lines.append([*start, *[cell(record.metrics.get(name, {})) for name in names]])
    return markdown_table(["channels", "dtype", "device", *names], lines)


def mebibytes(key: str) -> Any:
    """Return a function that writes a row's number of bytes in MiB."""
    return lambda row: f"{row[key] / 2**20:,.1f}" if key in row else "-"


def ratio(row: dict[str, Any]) -> str:
    """Write the ratio of a row's time, "-" if it was not timed."""
    return f"{row['train']['ratio']:.2f}" if "train" in row else "-"


def model_table(records: Records) -> str:
    """Return memory kept and peak of the models, one row a variant."""
    lines = [
        [f"{(r.definition or {})['hidden']:,}", device_of(r), name]
        + [mebibytes(key)(row) for key in ("kept_bytes", "peak_bytes")]
        for r in of_part(records, "model")
        for name, row in r.metrics.items()
    ]
    return markdown_table(["channels", "device", "variant", "kept", "peak"], lines)


def mlp_tables(records: Records) -> dict[str, str]:
    """Return the tables of the MLPs: memory kept, peak, time."""
    mlps = of_part(records, "MLP")
    keys = {"kept": mebibytes("kept_bytes"), "peak": mebibytes("peak_bytes"), "time": ratio}
    return {name: table(mlps, cell) for name, cell in keys.items()}


def tables(records: Records) -> str:
    """Return all tables."""
    return "\n".join([*mlp_tables(records).values(), model_table(records)])


def bounds(records: list[Record], name: str, over: str, key: str) -> str:
    """Return the range over the records of the ratio of two variants' numbers."""
    ratios = [r.metrics[name][key] / r.metrics[over][key] for r in records]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def time_bounds(records: list[Record], name: str) -> str:
    """Return the range over the records of a variant's ratio of time."""
    ratios = [r.metrics[name]["train"]["ratio"] for r in records]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def answer(records: Records) -> str:
    """Say what the records show, prediction by prediction, losses included."""
    v, mlps, models = variants, of_part(records, "MLP"), of_part(records, "model")
    on_cpu = [r for r in mlps if (r.definition or {})["device"] == "cpu"]

    def share(name: str, key: str, over: str = v.BASELINE) -> str:
        return bounds(models if over == v.WHOLE or name == v.WHOLE else mlps, name, over, key)

    kept, peak = "kept_bytes", "peak_bytes"
    times = {n: time_bounds(on_cpu, n) for n in v.NATIVE[1:]}
    lines = [
        f"*Kept, without recompute: no less than Liger or the compiler.* Liger's SwiGLU keeps "
        f"{share(v.LIGER, kept)} of the definition, fused {share(v.FUSED, kept)}, torch.compile "
        f"{share(v.COMPILED, kept)}, as predicted.",
        f"*Kept, with recompute: the input*, {share(v.RECOMPUTED, kept)}; Liger's tiled MLP "
        f"{share(v.TILED, kept)} and gradient checkpointing of the MLP "
        f"{share(v.CHECKPOINTED, kept)} keep the same, and need no starify.",
        f"*At the peak of one MLP there is no gain over Liger*: fused {share(v.FUSED, peak)} of "
        f"the definition, with recompute {share(v.RECOMPUTED, peak)}, Liger's SwiGLU "
        f"{share(v.LIGER, peak)}, torch.compile {share(v.COMPILED, peak)}. With recompute the "
        "definition's peak was predicted. The tiled MLP, which cuts the tokens into "
        f"tokens / channels parts, needs {share(v.TILED, peak)}: least of all with two parts, at "
        "1,024 channels; with one part it has no advantage. What is kept counts once a layer, the "
        "peak of an MLP once a model.",
        f"*In a whole model Liger wins by its loss*: it keeps {share(v.WHOLE, kept)} of the "
        f"definition with {share(v.WHOLE, peak)} of its peak; fused with recompute alone keeps "
        f"{bounds(models, v.RECOMPUTED, v.BASELINE, kept)}. Liger for all but the MLPs and "
        f"starify for these keep {share(v.BOTH, kept, v.WHOLE)} of what Liger alone keeps, with "
        f"{share(v.BOTH, peak, v.WHOLE)} of its peak, in this one layer.",
        f"*Time on this CPU*: fused {times[v.FUSED]}, which at these widths is the definition; "
        f"with recompute {times[v.RECOMPUTED]}, checkpointing {times[v.CHECKPOINTED]}, "
        f"torch.compile {times[v.COMPILED]}. A third more was predicted for recompute: wrong, "
        "since two of nine matrix products of a step are repeated.",
    ]
    if len(on_cpu) == len(mlps):
        lines.append("Speed and true peak on a GPU, where Liger's kernels run, were not measured.")
    return "\n".join(f"- {line}" for line in lines)


def text(records: Records) -> str:
    """Make the part of the page."""
    assert __doc__
    predictions = __doc__.partition(":\n\n")[2].strip()
    first = next(iter(records.values()))
    return TEXT.format(
        predictions=predictions,
        tokens=TOKENS,
        vocabulary=VOCABULARY,
        liger=first.versions["liger-kernel"],
        **mlp_tables(records),
        model=model_table(records),
        answer=answer(records),
        conditions=conditions(records.values()),
    )


STUDY = Study("starify-liger", "python -m benchmarks.starify liger", jobs, work, tables, text)
