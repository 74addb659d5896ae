"""Tokens per second and memory of MLPs and mixers, interleaved in one run on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, interleave, markdown_table, write_json
from benchmarks.nlp_tasks import VARIANTS, build, parameters

BASELINES = ["plain gelu"]
BATCH, LENGTH, PROMPT, NEW = 16, 128, 8, 32


def kept_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def cache_bytes(model: Any, tokens: torch.Tensor) -> int:
    """Bytes of the cache of a generation after these tokens."""
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += getattr(layer, "conv_states", {}).values()
        total += sum(t.numel() * t.element_size() for t in held if t is not None)
    return total


def run(smoke: bool, out: Path = RESULTS) -> None:
    from starlayers import use_backend

    repeats = 2 if smoke else 15
    length = 16 if smoke else LENGTH
    tokens = torch.randint(4, 2000, (2 if smoke else BATCH, length))
    prompt = tokens[:2, :PROMPT]
    models: dict[str, Any] = {}
    for name, options in VARIANTS.items():
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
        model.eval().generate(prompt, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)

    work = {"train": train, "forward": forward, "generate": generate}
    counts = {"train": tokens.numel(), "forward": tokens.numel(), "generate": prompt.shape[0] * NEW}
    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    for what, call in work.items():
        variants = {name: (lambda m=m, call=call: call(m)) for name, m in models.items()}
        times = interleave(variants, baselines=BASELINES, repeats=repeats)
        for name, t in times.items():
            rows[name][what] = {**t, "tokens_per_s": 1e3 * counts[what] / t["median_ms"]}
    for name, model in models.items():
        model.train()
        rows[name]["kept_bytes"] = kept_bytes(model, lambda m=model: m(tokens, labels=tokens))
        with use_backend("eager"):
            rows[name]["kept_bytes_eager"] = kept_bytes(
                model, lambda m=model: m(tokens, labels=tokens)
            )
        rows[name]["cache_bytes"] = cache_bytes(model.eval(), tokens[:1])
        rows[name]["parameters"] = parameters(model)
    print(table(rows, length))
    name = "nlp-speed-smoke.json" if smoke else "nlp-speed.json"
    shape = {"batch": tokens.shape[0], "length": length, "prompt": PROMPT, "new": NEW}
    write_json(out / name, {"rows": rows, **shape, "environment": environment()})


def table(rows: dict[str, dict[str, Any]], length: int) -> str:
    header = ["variant", "training", "forward", "generation", "kept for backward, MiB"]
    header.append(f"cache of {length} tokens, KiB")
    body = [
        [name]
        + [
            f"{row[w]['tokens_per_s']:.0f} tok/s, time x {row[w]['ratio']:.2f}"
            for w in ("train", "forward", "generate")
        ]
        + [f"{row['kept_bytes'] / 2**20:.1f}", f"{row['cache_bytes'] / 2**10:.1f}"]
        for name, row in rows.items()
    ]
    return markdown_table(header, body)
