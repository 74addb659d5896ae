"""Parameter groups for an optimizer: decay, no decay, and gates."""

from typing import Any

from torch import nn

from starlayers.surgery.gates import gate_parameters

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.01,
    gate_lr: float | None = None,
    gate_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into groups for an optimizer.

    Groups: "decay" (parameters of two or more dimensions), "no_decay" (biases, norms and other
    vectors) and "star_gates" (parameters that `starify` added; weight decay pulls them to zero,
    towards the original model). Empty groups and frozen parameters are left out.

    Args:
        model: any module, starified or not.
        lr: learning rate of "decay" and "no_decay".
        weight_decay: weight decay of "decay".
        gate_lr: learning rate of "star_gates"; default `lr`. One step of Adam moves a full gate by
            up to `gate_lr` times the norm of its input, so wide models need small values.
        gate_weight_decay: weight decay of "star_gates"; default `weight_decay`.

    Returns:
        Groups with the keys "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: a rate or a decay is negative, or no parameter is trainable.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> groups = param_groups(model, lr=1e-4, gate_lr=1e-3)
        >>> [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [('decay', 2, 0.0001, 0.01), ('no_decay', 2, 0.0001, 0.0), ('star_gates', 2, 0.001, 0.01)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    gate_lr = lr if gate_lr is None else gate_lr
    gate_weight_decay = weight_decay if gate_weight_decay is None else gate_weight_decay
    numbers = (lr, weight_decay, gate_lr, gate_weight_decay)
    for name, value in zip(("lr", "weight_decay", "gate_lr", "gate_weight_decay"), numbers):
        if value < 0:
            raise ValueError(f"param_groups: {name} must be at least 0, got {value}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"param_groups: no parameter of this {type(model).__name__} is trainable")
    gate_ids = {id(p) for p in gate_parameters(model)}
    gates = [p for p in trainable if id(p) in gate_ids]
    others = [p for p in trainable if id(p) not in gate_ids]
    groups = [
        ("decay", [p for p in others if p.ndim > 1], lr, weight_decay),
        ("no_decay", [p for p in others if p.ndim <= 1], lr, 0.0),
        ("star_gates", gates, gate_lr, gate_weight_decay),
    ]
    return [
        {"name": name, "params": params, "lr": rate, "weight_decay": decay}
        for name, params, rate, decay in groups
        if params
    ]
