"""Parameters in groups for an optimizer: what decays, what does not, and what starify added."""

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
    """The trainable parameters of a model in named groups, as `torch.optim` takes them.

    Groups: "decay" (matrices and larger), "no_decay" (biases, norms, other vectors) and
    "star_gates" (what `starify` added, which decays towards the model as it was). Empty groups and
    frozen parameters are left out.

    Args:
        model: any module, starified or not.
        lr: learning rate of the model's own parameters.
        weight_decay: of "decay".
        gate_lr: learning rate of the gates; default `lr`. One step of Adam moves a full gate by up
            to `gate_lr` times the norm of its input, so wide models want small ones.
        gate_weight_decay: of "star_gates"; default `weight_decay`.

    Raises:
        ValueError: a rate or a decay is negative, or nothing is trainable.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> [(g["name"], len(g["params"])) for g in param_groups(model, 1e-4)]
        [('decay', 2), ('no_decay', 2), ('star_gates', 2)]
    """
    gate_lr = lr if gate_lr is None else gate_lr
    gate_weight_decay = weight_decay if gate_weight_decay is None else gate_weight_decay
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "gate_lr": gate_lr,
        "gate_weight_decay": gate_weight_decay,
    }
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"param_groups: {name} must be at least 0, got {value}")
    gates = {id(p) for p in gate_parameters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"param_groups: no parameter of this {type(model).__name__} is trainable")
    own = [p for p in trainable if id(p) not in gates]
    groups = [
        ("decay", [p for p in own if p.ndim > 1], lr, weight_decay),
        ("no_decay", [p for p in own if p.ndim <= 1], lr, 0.0),
        ("star_gates", [p for p in trainable if id(p) in gates], gate_lr, gate_weight_decay),
    ]
    return [
        {"name": name, "params": params, "lr": rate, "weight_decay": decay}
        for name, params, rate, decay in groups
        if params
    ]
