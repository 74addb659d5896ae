"""Llama's MLP and a Llama of one layer, as they are, with Liger's kernels, and starified.

`python -m benchmarks.starify.variants '<job>'` prints, as JSON, the memory of every variant of a
job, and on a GPU the time. Without a GPU no kernel of Triton runs: `fake_gpu` compiles and leaves
out the launches, so that every library keeps exactly the tensors that it keeps on a GPU, with
garbage in them.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import fake_gpu
from benchmarks.harness.timing import interleave, kept_bytes

BASELINE, COMPILED = "definition", "torch.compile"
CHECKPOINTED = "gradient checkpointing"
FUSED, RECOMPUTED = "fused", "fused, recompute"
LIGER, TILED = "Liger SwiGLU", "Liger tiled MLP"
#: variants of an MLP
MLPS = (BASELINE, COMPILED, LIGER, TILED, FUSED, RECOMPUTED, CHECKPOINTED)
#: those that run on a CPU
NATIVE = (BASELINE, COMPILED, FUSED, RECOMPUTED, CHECKPOINTED)
WHOLE, BOTH = "Liger, whole", "Liger without SwiGLU, fused with recompute"
#: variants of a model, with a loss. Liger comes last: it changes transformers' modules for good
MODELS = (BASELINE, CHECKPOINTED, RECOMPUTED, WHOLE, BOTH)

Call = Callable[[], Tensor]


def liger() -> Any:
    """Import Liger.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import liger_kernel.transformers
    except ImportError as error:
        raise ImportError("the study beside Liger needs it: pip install liger-kernel") from error
    return liger_kernel.transformers


def config(job: dict[str, Any]) -> Any:
    """Return the config of a Llama of one layer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=job["hidden"],
        intermediate_size=job["inner"],
        num_hidden_layers=1,
        num_attention_heads=max(1, job["hidden"] // 64),
        vocab_size=job.get("vocabulary", 8),
    )


def twin(module: Any) -> Any:
    """Return a copy of a module with the same parameters, not copies of them."""
    return deepcopy(module, {id(p): p for p in module.parameters()})


def mlp(name: str, base: nn.Module, job: dict[str, Any]) -> nn.Module:
    """Return a variant of Llama's MLP with the parameters of `base`."""
    from starlayers import starify

    if name in (LIGER, TILED):
        kinds = liger()
        with torch.device("meta"):
            other: nn.Module = (
                kinds.LigerSwiGLUMLP if name == LIGER else kinds.LigerTiledSwiGLUMLP
            )(config(job))
        other.load_state_dict(base.state_dict(keep_vars=True), assign=True)
        return other
    if name in (FUSED, RECOMPUTED):
        return starify(twin(base), mode="fuse", recompute=name == RECOMPUTED)
    other = twin(base)
    return torch.compile(other) if name == COMPILED else other  # type: ignore[return-value]


def mlp_calls(job: dict[str, Any]) -> tuple[nn.Module, dict[str, Call], Tensor]:
    """Return the MLP, a call of the forward of every variant, and the input."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    place = {"device": job["device"], "dtype": getattr(torch, job["dtype"])}
    base = LlamaMLP(config(job)).to(**place)
    x = torch.randn(1, job["tokens"], job["hidden"], **place, requires_grad=True)
    calls: dict[str, Call] = {}
    for name in job["variants"]:
        module = mlp(name, base, job)
        calls[name] = partial(module, x)
        if name == CHECKPOINTED:
            calls[name] = partial(checkpoint, module, x, use_reentrant=False)
    return base, calls, x


def model(name: str, base: Any) -> Any:
    """Return a variant of a whole model with the parameters of `base`."""
    from starlayers import starify

    other = twin(base)
    if name == CHECKPOINTED:
        other.gradient_checkpointing_enable({"use_reentrant": False})
    if name == WHOLE:
        liger().apply_liger_kernel_to_llama(model=other)
    if name == BOTH:
        liger().apply_liger_kernel_to_llama(model=other, swiglu=False)
    if name in (RECOMPUTED, BOTH):
        starify(other, mode="fuse", recompute=True)
    return other.train()


def step(call: Call) -> None:
    """Run forward and backward."""
    y = call()
    y.backward(torch.ones_like(y))


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Return the most bytes that a call has allocated beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def memory(module: nn.Module, call: Call, device: str) -> dict[str, int]:
    """Return what a forward keeps for its backward, and the peak of both."""
    step(call)  # what is allocated once is there, gradients of the weights among it
    kept = kept_bytes(module, call)
    return {"kept_bytes": kept, "peak_bytes": peak_bytes(partial(step, call), device)}


def gpu_clock(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes on the GPU."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def check(base: nn.Module, calls: dict[str, Call], x: Tensor) -> None:
    """Compare output and gradients of all variants with the definition's.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    wanted: list[Tensor] = []
    for name, call in {BASELINE: calls[BASELINE], **calls}.items():
        y = call()
        gradients = torch.autograd.grad(y.float().square().mean(), [x, *base.parameters()])
        tensors = [y.detach(), *gradients]
        wanted = wanted or tensors
        for got, want in zip(tensors, wanted, strict=True):
            error = float((got - want).float().norm() / want.float().norm())
            least = 1e-4 if x.dtype == torch.float32 else 3e-2
            assert error < least, f"{name}: relative difference {error}"


def times(job: dict[str, Any], clock: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Check the variants of an MLP, and time their training steps in turn."""
    base, calls, x = mlp_calls(job)
    check(base, calls, x)
    runs = {name: partial(step, call) for name, call in calls.items()}
    return interleave(runs, baselines=[BASELINE], repeats=job["rounds"], clock=clock)


def measure(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measure the memory of all variants of a job, and on a GPU the times of an MLP's."""
    device = job["device"]
    rows: dict[str, dict[str, Any]] = {}
    if job["part"] == "MLP":
        base, calls, _ = mlp_calls(job)
        for name, call in calls.items():
            rows[name] = memory(base, call, device)
        if device == "cuda":
            for name, timed in times(job, gpu_clock).items():
                rows[name]["train"] = timed
        return rows
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    net = LlamaForCausalLM(config(job)).to(device, getattr(torch, job["dtype"]))
    tokens = torch.randint(job["vocabulary"], (1, job["tokens"]), device=device)
    for name in job["variants"]:
        variant = model(name, net)
        rows[name] = memory(variant, lambda v=variant: v(tokens, labels=tokens).loss, device)
    return rows


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["device"] == "cpu":
        fake_gpu.install()
        torch.set_num_threads(1)
    print(json.dumps(measure(asked)))
