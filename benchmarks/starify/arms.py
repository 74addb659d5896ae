"""Arms of the starify study: the encoders, and how many parameters each adds.

With d = 384 channels and 4 d hidden ones, six layers:

    full gate           4 d (d + 1) a layer          widened by 2 d      2 d (2 d + 1)
    low-rank gate, 16   16 (5 d) + 4 d               LoRA on query and value, rank 21: the same;
                                                     on the MLP's first layer, rank 17: 1 % more
    scale gate          4 d                          IA3 on key, value and hidden channels: 6 d

IA3 on the hidden channels alone is the scale gate under another name.
"""

from typing import Any

import torch
from torch import nn

from starlayers import param_groups, starify

CLASSES = 2
#: all parameters are trained
FULL: dict[str, dict[str, Any]] = {
    "plain": {},
    "star full": {"gate": "full"},
    "star low rank": {"gate": "low_rank=16"},
    "star scale": {"gate": "scale"},
    "widened": {"widened": True},
}
#: arms of earlier records, which ended without activations and can no longer be run
PAST = ("annealed", "refitted")
#: only the new parameters and the head are trained
FROZEN: dict[str, dict[str, Any]] = {
    "full gate alone": {"gate": "full"},
    "low-rank gate alone": {"gate": "low_rank=16"},
    "LoRA": {"adapter": "lora"},
    "scale gate alone": {"gate": "scale"},
    "IA3": {"adapter": "ia3"},
    "head alone": {},
}
ARMS = FULL | FROZEN
#: where LoRA may be, and the rank that has the parameters of the low-rank gate
LORA = {"attention": (["query", "value"], 21), "mlp": (["intermediate.dense"], 17)}


class Classifier(nn.Module):
    """Linear head on the mean of a text's last states, which the encoder was trained to use."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


class WiderIn(nn.Module):
    """Linear layer with more outputs; the new ones have parameters of their own, as a gate has."""

    def __init__(self, old: nn.Linear, more: int) -> None:
        super().__init__()
        self.old, self.new = old, nn.Linear(old.in_features, more)
        # the new units start at the scale of the trained ones
        nn.init.normal_(self.new.weight, std=float(old.weight.detach().std()))
        nn.init.zeros_(self.new.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.old(x), self.new(x)], -1)


class WiderOut(nn.Module):
    """Linear layer with more inputs, whose weights are zero at first."""

    def __init__(self, old: nn.Linear, more: int) -> None:
        super().__init__()
        self.old, self.new = old, nn.Linear(more, old.out_features, bias=False)
        nn.init.zeros_(self.new.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained, new = x.tensor_split([self.old.in_features], -1)
        return self.old(trained) + self.new(new)


def widen(body: nn.Module) -> None:
    """Add half as many hidden units to every MLP: the parameters of a full gate."""
    for layer in body.encoder.layer:
        more = layer.intermediate.dense.out_features // 2
        layer.intermediate.dense = WiderIn(layer.intermediate.dense, more)
        layer.output.dense = WiderOut(layer.output.dense, more)


def adapt(body: nn.Module, adapter: str, place: str = "") -> None:
    """Add LoRA at a `place` of the table, or IA3 where its authors put it, through PEFT."""
    from peft import IA3Config, LoraConfig, inject_adapter_in_model

    if adapter == "lora":
        targets, rank = LORA[place]
        config = LoraConfig(target_modules=targets, r=rank, lora_alpha=2 * rank)
    else:
        hidden = r".*layer\.\d+\.output\.dense"
        both = rf".*\.(key|value)|{hidden}"
        config = IA3Config(target_modules=both, feedforward_modules=hidden)
    inject_adapter_in_model(config, body)


def build(arm: str, body: nn.Module, settings: dict[str, Any]) -> Classifier:
    """Make the classifier of an arm; the head is drawn first: one seed has one head in all arms."""
    kind = ARMS[arm]
    model = Classifier(body)
    body.requires_grad_(arm not in FROZEN)
    if gate := kind.get("gate"):
        starify(body, gate=gate)
    if "widened" in kind:
        widen(body)
    if adapter := kind.get("adapter"):
        adapt(body, adapter, settings.get("place", ""))
    return model


def optimizer(model: Classifier, settings: dict[str, Any], weight_decay: float) -> Any:
    """Make AdamW; new parameters beside trained ones have `times` their learning rate."""
    lr = settings["lr"]
    new_lr = lr * settings.get("times", 1)
    groups = param_groups(model, lr=lr, weight_decay=weight_decay, gate_lr=new_lr)
    wider = [m.new for m in model.modules() if isinstance(m, WiderIn | WiderOut)]
    new = [p for layer in wider for p in layer.parameters()]
    known = {id(p) for p in new}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in known]
    groups.append({"params": new, "lr": new_lr, "weight_decay": weight_decay})
    return torch.optim.AdamW([group for group in groups if group["params"]])


def sizes(model: nn.Module) -> dict[str, int]:
    """Count all parameters and those that are trained."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }
