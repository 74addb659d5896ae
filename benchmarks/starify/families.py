"""Every family of transformers through `starify`: what is converted, and what is left and why.

For each family a tiny model is built with random weights. Outputs in eval and in train mode and
all gradients are held against those of the model as it was: after `mode="fuse"`, after `revert`,
and after `mode="star"`. What `surgery.report` lists is held against `census`.
"""

import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.starify.census import census, unlisted
from benchmarks.starify.tiny_models import Inputs, build, families, inputs_of, run, seeded, tensors
from starlayers import starify, use_backend
from starlayers.surgery import report, revert

SEED = 7


class Probe:
    """A model's outputs and gradients, always from the same buffers, seeds and inputs."""

    def __init__(self, model: nn.Module, inputs: Inputs, loud: float) -> None:
        self.model, self.inputs, self.factor = model, inputs, loud
        self.parameters = list(model.named_parameters())
        self.buffers = [
            (module, name, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def evaluated(self) -> list[Tensor]:
        """Return the outputs in eval mode."""
        self._restore()
        return run(self.model.eval(), self.inputs, SEED)

    def loud(self) -> list[Tensor]:
        """Return the outputs in eval mode with all matrices `factor` times as large."""
        matrices = [p for _, p in self.parameters if p.ndim > 1 and p.is_floating_point()]
        kept = [p.detach().clone() for p in matrices]
        with torch.no_grad():
            for p in matrices:
                p.mul_(self.factor)
        try:
            return self.evaluated()
        finally:
            with torch.no_grad():
                for p, old in zip(matrices, kept):
                    p.copy_(old)

    def trained(self) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        """Return the outputs in train mode with seeded dropout, and all gradients."""
        self._restore()
        self.model.train()
        for _, parameter in self.parameters:
            parameter.grad = None
        with seeded(SEED):
            outputs = tensors(self.model(**self.inputs))
            loss = sum(
                (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum()
                for y in outputs
            )
            assert isinstance(loss, Tensor)
            loss.backward()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.parameters}
        return [y.detach() for y in outputs], gradients

    def _restore(self) -> None:
        for module, name, buffer in self.buffers:
            if name in module._buffers:  # statistics of a normalisation, for example
                module._buffers[name] = buffer.clone()


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest absolute difference; infinite where a shape or a NaN differs."""
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        return float("inf")
    # infinities and NaN that both have are no difference
    same = [((a == b) | (a.isnan() & b.isnan())) for a, b in zip(ours, theirs)]
    largest = [
        float((a.double() - b.double()).masked_fill(equal, 0.0).abs().max())
        for a, b, equal in zip(ours, theirs, same)
    ]
    return max((x if x == x else float("inf") for x in largest), default=0.0)


def gradient_difference(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]
) -> tuple[float, str]:
    """Return the largest relative difference of a gradient, and the parameter's name."""
    worst = 0.0, ""
    for name, want in theirs.items():
        got = ours[name]
        if want is None or got is None:
            error = 0.0 if want is got else float("inf")
        else:
            norm = float(want.double().norm())
            error = float((got.double() - want.double()).norm())
            error = error / norm if norm else error * float("inf") if error else 0.0
            error = error if error == error else float("inf")
        worst = max(worst, (error, name))
    return worst


@dataclass
class Reference:
    """What the model computed before it was changed; `problem` is why it cannot be compared."""

    evaluated: list[Tensor]
    loud: list[Tensor] | None
    trained: tuple[list[Tensor], dict[str, Tensor | None]] | None
    problem: str = ""


def reference(probe: Probe) -> Reference:
    """Run the model twice in both modes; what differs by itself is not compared."""
    evaluated = probe.evaluated()
    try:
        loud = probe.loud()
    except Exception:  # lengths that a speech model predicts are out of bounds
        loud = None
    if difference(probe.evaluated(), evaluated):
        return Reference(evaluated, loud, None, "not deterministic in eval mode")
    try:
        trained = probe.trained()
        again = probe.trained()
    except Exception as error:  # some models cannot be trained without labels
        return Reference(
            evaluated, loud, None, f"no training: {type(error).__name__}: {error}"[:200]
        )
    if difference(again[0], trained[0]) or gradient_difference(again[1], trained[1])[0]:
        return Reference(evaluated, loud, None, "not deterministic in train mode")
    return Reference(evaluated, loud, trained)


def compare(probe: Probe, before: Reference) -> dict[str, Any]:
    """Return how far the model's outputs and gradients are from what they were."""
    measured: dict[str, Any] = {"eval": difference(probe.evaluated(), before.evaluated)}
    if before.loud is not None:
        measured["loud"] = difference(probe.loud(), before.loud)
    if before.trained is not None:
        outputs, gradients = probe.trained()
        measured["train"] = difference(outputs, before.trained[0])
        measured["gradients"], name = gradient_difference(gradients, before.trained[1])
        if measured["gradients"]:
            measured["gradient of"] = name
    return measured


def convert(probe: Probe, before: Reference, exact: bool, **options: Any) -> dict[str, Any]:
    """Starify the model, compare, and revert it; return what happened.

    Errors are kept as text under "error" ("no MLP to replace" is one of them); nothing else hides
    them. With `exact` the model's own bits are asked for, through the eager backend.
    """
    model = probe.model
    kinds = {name: type(module) for name, module in model.named_modules()}
    start = time.perf_counter()
    try:
        starify(model, **options)
    except ValueError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"error": f"starify: {type(error).__name__}: {error}"[:500]}
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"converted": len(report(model).replaced), "seconds": seconds}
    backend: AbstractContextManager[Any] = use_backend("eager") if exact else nullcontext()
    try:
        with backend:
            result |= compare(probe, before)
    except Exception as error:
        result["error"] = f"run: {type(error).__name__}: {error}"[:500]
    try:
        revert(model)
        changed = [
            name for name, module in model.named_modules() if kinds.get(name) is not type(module)
        ]
        result["classes left"] = changed[:5] if len(kinds) == len(list(model.modules())) else ["*"]
        result["reverted"] = difference(probe.evaluated(), before.evaluated)
    except Exception as error:
        result["error"] = f"revert: {type(error).__name__}: {error}"[:500]
    return result


def check(model_type: str, loud: float = 20.0) -> dict[str, Any]:
    """Put a family through all of it, and return plain data.

    The outputs are also compared with all matrices `loud` times as large, so that limits of
    branches show.

    Raises:
        NotBuiltError: no tiny model could be built or run.
    """
    kind, name = families()[model_type]
    start = time.perf_counter()
    model = build(model_type)
    inputs = inputs_of(model_type, model)
    probe = Probe(model, inputs, loud)
    ran = _run_modules(probe)
    before = reference(probe)
    rows = report(model).rows
    candidates = census(model)
    missing = unlisted(candidates, rows)
    return {
        "kind": kind,
        "class": name,
        "inputs": sorted(inputs),
        "not compared": before.problem,
        "found": dict(Counter(f"{row.form}: {row.state}" for row in rows)),
        "left": dict(Counter(row.detail for row in rows if row.state == "skipped")),
        "not run": sum(row.state != "skipped" and row.name not in ran for row in rows),
        "unlisted": dict(Counter(f"{c.kind} ({c.form})" for c in missing)),
        "explained": dict(Counter(f"{c.kind}: {c.explained}" for c in candidates if c.explained)),
        "fuse": convert(probe, before, exact=True, mode="fuse"),
        "star": convert(probe, before, exact=True, mode="star", gate="scale"),
        "seconds": time.perf_counter() - start,
    }


def _run_modules(probe: Probe) -> set[str]:
    """Return the names of the modules that the input reaches."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in probe.model.named_modules()
    ]
    try:
        probe.evaluated()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def problems(result: dict[str, Any]) -> list[str]:
    """Return what is wrong in the result of `check`; nothing if all promises are kept."""
    found = [f"not in the report: {n} x {name}" for name, n in result["unlisted"].items()]
    if "" in result["left"]:
        found.append("skipped without a reason")
    for mode in ("fuse", "star"):
        got = result[mode]
        if "refused" in got:
            continue
        if "error" in got:
            found.append(f"{mode}: {got['error']}")
        for key in ("eval", "loud", "train", "reverted"):
            if got.get(key, 0.0) != 0.0:
                found.append(f"{mode}: outputs differ by {got[key]:.3g} ({key})")
        if got.get("gradients", 0.0) > 1e-6:
            found.append(f"{mode}: gradient of {got['gradient of']}: {got['gradients']:.3g}")
        if got.get("classes left"):
            found.append(f"{mode}: revert leaves {', '.join(got['classes left'])}")
    return found
