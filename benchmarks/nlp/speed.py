"""Tokens per second and memory of MLPs and mixers, timed in turn on the CPU."""

from typing import Any

import torch

from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import interleave, kept_bytes
from benchmarks.nlp.tasks import MODEL, VARIANTS, build, parameters

BASELINES = ["plain gelu"]
PROMPT, NEW = 8, 32
TEXT = """\
## Speed: star MLPs, gates and hybrids on a CPU

**What was done.** The models of the prose task of the language study on one
thread, batch {batch} of {length} tokens; generation of {new} tokens after {prompt} for two
texts. Variants take turns; medians, and time as a ratio to the plain GELU MLP in the same round.
The machine had other work, so absolute rates are low.

{table}
**What this shows.**

- At matched parameters a star MLP costs what the plain one does, within {worst:.0f} % of
  training time, and keeps {more:.0f} % more for the backward, since it has two branches
  (`mlp_recompute` keeps neither).
- A hybrid takes {hybrid_train:.2f} of the plain model's time in training, keeps {cache:.2f} of
  the cache, and takes {hybrid_generate:.2f} of the time to generate: its convolution's many
  small steps cost more on a CPU than attention over few tokens.

**Conditions**

{conditions}
"""


def cache_bytes(model: Any, tokens: torch.Tensor) -> int:
    """Return the bytes of the cache of a generation after these tokens."""
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += getattr(layer, "conv_states", {}).values()
        total += sum(t.numel() * t.element_size() for t in held if t is not None)
    return total


def job(smoke: bool = False) -> Job:
    """Make the job: models and sizes that are timed."""
    sizes = {"batch": 2, "length": 16, "new": 2, "repeats": 1}
    if not smoke:
        sizes = {"batch": 16, "length": 128, "new": NEW, "repeats": 15}
    models = {"task": "prose", "model": MODEL, "variants": VARIANTS}
    return {"arm": None, "seed": None, **models, **sizes, "prompt": PROMPT}


def work(job: Job) -> dict[str, Any]:
    """Time training, forward and generation of all variants in turn, and measure memory."""
    from starlayers import use_backend

    torch.set_num_threads(1)
    tokens = torch.randint(4, 2000, (job["batch"], job["length"]))
    prompt = tokens[:2, : job["prompt"]]
    models: dict[str, Any] = {}
    for name, options in job["variants"].items():
        torch.manual_seed(0)
        models[name] = build("prose", options)

    for name, model in models.items():  # no time of a layer that computes something else
        with torch.no_grad():
            fast = model.eval()(tokens).logits
            with use_backend("eager"):
                slow = model(tokens).logits
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3, msg=name)

    def train(model: Any) -> None:
        model.train()
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad()

    def forward(model: Any) -> None:
        model.eval()
        with torch.no_grad():
            model(tokens)

    def generate(model: Any) -> None:
        new = job["new"]
        model.eval().generate(prompt, min_new_tokens=new, max_new_tokens=new, do_sample=False)

    tasks = {"train": train, "forward": forward, "generate": generate}
    counts = {
        "train": tokens.numel(),
        "forward": tokens.numel(),
        "generate": len(prompt) * job["new"],
    }
    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    for task, call in tasks.items():
        variants = {name: (lambda m=m, call=call: call(m)) for name, m in models.items()}
        times = interleave(variants, baselines=BASELINES, repeats=job["repeats"])
        for name, t in times.items():
            rows[name][task] = {**t, "tokens_per_s": 1e3 * counts[task] / t["median_ms"]}
    for name, model in models.items():
        model.train()
        rows[name]["kept_bytes"] = kept_bytes(model, lambda m=model: m(tokens, labels=tokens))
        with use_backend("eager"):
            rows[name]["kept_bytes_eager"] = kept_bytes(
                model, lambda m=model: m(tokens, labels=tokens)
            )
        rows[name]["cache_bytes"] = cache_bytes(model.eval(), tokens[:1])
        rows[name]["parameters"] = parameters(model)
    return rows


def table(rows: dict[str, dict[str, Any]], length: int) -> str:
    """Return speeds, ratios to the plain MLP and memory."""
    header = ["variant", "training", "forward", "generation", "kept for backward, MiB"]
    header.append(f"cache of {length} tokens, KiB")
    body = [
        [name]
        + [
            f"{row[task]['tokens_per_s']:.0f} tok/s, time x {row[task]['ratio']:.2f}"
            for task in ("train", "forward", "generate")
        ]
        + [f"{row['kept_bytes'] / 2**20:.1f}", f"{row['cache_bytes'] / 2**10:.1f}"]
        for name, row in rows.items()
    ]
    return markdown_table(header, body)


def tables(records: Records) -> str:
    """Return the table of the one record."""
    (record,) = records.values()
    assert record.definition is not None
    return table(record.metrics, record.definition["length"])


def text(records: Records) -> str:
    """Make the page of the speed of language models."""
    (record,) = records.values()
    assert record.definition is not None
    rows = record.metrics
    plain, hybrid, star = rows["plain gelu"], rows["hybrid"], rows["star silu"]
    stars = [row for name, row in rows.items() if name.startswith("star")]
    return TEXT.format(
        **{name: record.definition[name] for name in ("batch", "length", "new", "prompt")},
        table=tables(records),
        worst=100 * (max(row["train"]["ratio"] for row in stars) - 1),
        more=100 * (star["kept_bytes"] / plain["kept_bytes"] - 1),
        hybrid_train=hybrid["train"]["ratio"],
        hybrid_generate=hybrid["generate"]["ratio"],
        cache=hybrid["cache_bytes"] / plain["cache_bytes"],
        conditions=conditions([record]),
    )


STUDY = Study(
    "nlp-speed",
    "python -m benchmarks.nlp speed",
    lambda: {"speed": job()},
    work,
    tables,
    text,
)
