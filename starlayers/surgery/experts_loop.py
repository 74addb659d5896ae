"""Loop over experts that calls their gate, and its comparison with a class's own loop."""

import inspect
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starlayers.surgery.experts_gate import own_attributes, without_weights
from starlayers.surgery.reads import recorded_reads
from starlayers.surgery.sandbox import sandbox_copy

#: attributes that `loop_over_experts` reads; a loop that reads others is not the same
READS = frozenset(("act_fn", "post_expert_norm"))
WEIGHTS = frozenset(("num_experts", "gate_up_proj", "down_proj"))

#: sizes of the stand-in: experts, tokens, experts a token, hidden channels
EXPERTS, TOKENS, CHOICES, HIDDEN = 4, 9, 2, 6


def loop_over_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the sum over each token's experts of weight times expert, one expert at a time.

    An expert is `post_expert_norm(gate(x W1) W2)`, where the gate is `experts._apply_gate`, the
    norm optional, and both weights transposed unless `experts.is_transposed`. An index of
    `num_experts` stands for no expert.

    Shapes: (tokens, in), (tokens, k), (tokens, k) -> (tokens, in).
    """
    y = torch.zeros_like(hidden_states)
    with torch.no_grad():
        chosen = F.one_hot(top_k_index, experts.num_experts + 1).permute(2, 1, 0)
        used = chosen.sum((1, 2)).nonzero().flatten().tolist()
    for expert in used:
        if expert == experts.num_experts:
            continue
        choice, token = torch.where(chosen[expert])
        h = experts._apply_gate(_linear(experts, "gate_up_proj", hidden_states[token], expert))
        h = _linear(experts, "down_proj", h, expert)
        if getattr(experts, "has_post_expert_norm", False):
            h = experts.post_expert_norm(h)
        h = h * top_k_weights[token, choice, None]
        y.index_add_(0, token, h.to(y.dtype))
    return y


def _linear(experts: Any, name: str, x: Tensor, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    return x @ weight if experts.is_transposed else F.linear(x, weight)


class Loop(NamedTuple):
    """Result of `verify_loop`.

    Args:
        reason: why the class's own loop cannot be replaced, "" if it can.
        reads: names of the attributes that it reads, without the weights.
    """

    reason: str
    reads: tuple[str, ...] = ()


def verify_loop(experts: nn.Module) -> Loop:
    """Compare the loop of the experts' class with `loop_over_experts`.

    Both run on a small stand-in with random weights; outputs and all gradients have to agree in
    every bit, in float32 and bfloat16, in eval and train mode. A loop that calls `_apply_gate`
    itself needs no replacement.
    """
    own = inspect.unwrap(type(experts).forward)
    if own is type(experts).forward or "_apply_gate" in own.__code__.co_names:
        return Loop("the loop of its class calls the gate")
    if getattr(experts, "has_bias", False):
        return Loop("the loop of its class has biases")
    names = set[str]()
    try:
        for dtype, train in product((torch.float32, torch.bfloat16), (False, True)):
            stand_in = _stand_in(experts, dtype).train(train)
            with recorded_reads(stand_in) as reads:
                _outputs(stand_in, own, dtype, EXPERTS)
            names |= set(own_attributes(experts, reads)) - WEIGHTS
            if unknown := names - READS:
                return Loop(f"the loop of its class reads {min(unknown)!r}", tuple(sorted(names)))
            if not _same_bits(stand_in, own, dtype):
                return Loop("the loop of its class computes other bits", tuple(sorted(names)))
    except Exception as error:  # a foreign module may raise anything
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__} {lines[0][:80]}"
        return Loop(f"the loop of its class cannot be tried: {reason}", tuple(sorted(names)))
    return Loop("", tuple(sorted(names)))


def _stand_in(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of experts with few channels and random weights."""
    small: Any = sandbox_copy(without_weights(experts))
    transposed, width = bool(vars(experts).get("is_transposed")), _width(experts)
    generator = torch.Generator("cpu").manual_seed(3)
    for name, shape in (("gate_up_proj", (2 * HIDDEN, width)), ("down_proj", (width, HIDDEN))):
        shape = shape[::-1] if transposed else shape
        size = (EXPERTS, *shape)
        values = torch.randn(size, generator=generator, device="cpu", dtype=dtype)
        small._parameters[name] = nn.Parameter(values / width**0.25)
    small.num_experts = EXPERTS
    for child in small.children():
        child.to("cpu", dtype)
    stand_in: nn.Module = small
    return stand_in


def _width(experts: nn.Module) -> int:
    """Return the number of input channels: that of the weights, since norms need it."""
    weight: Any = experts.gate_up_proj
    return int(weight.shape[-2 if vars(experts).get("is_transposed") else -1])


def _same_bits(stand_in: nn.Module, own: Any, dtype: torch.dtype) -> bool:
    """Return True if both loops agree, also for choices of no expert if the class knows them."""
    for choices in (EXPERTS, EXPERTS + 1):
        try:
            expected = _outputs(stand_in, own, dtype, choices)
        except RuntimeError:
            if choices == EXPERTS:
                raise
            continue  # loops of older versions raise, and no router makes such a choice
        actual = _outputs(stand_in, loop_over_experts, dtype, choices)
        if not all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)):
            return False
    return True


def _outputs(stand_in: nn.Module, loop: Any, dtype: torch.dtype, choices: int) -> list[Tensor]:
    """Return output and gradients of a loop on random tokens with `choices` possible choices."""
    generator = torch.Generator("cpu").manual_seed(5)
    width = _width(stand_in)
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        x, g = (torch.randn(TOKENS, width, generator=generator, dtype=dtype) for _ in range(2))
        weights = torch.rand(TOKENS, CHOICES, generator=generator, dtype=dtype)
        index = torch.rand(TOKENS, choices, generator=generator).argsort(1)[:, :CHOICES]
        inputs = [x.requires_grad_(), weights.requires_grad_(), *stand_in.parameters()]
        with torch.autocast("cpu", enabled=False):
            y = loop(stand_in, x, index, weights)
            return [y, *torch.autograd.grad(y, inputs, g.to(y.dtype))]
