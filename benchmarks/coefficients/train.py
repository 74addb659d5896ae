"""Training of the nets in the studies of penalties and of eigenfeatures."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starlayers.coefficients import CoefficientPenalty


def fit(
    net: nn.Module,
    x: Tensor,
    labels: Tensor,
    recipe: dict[str, Any],
    *,
    penalty: CoefficientPenalty | None = None,
    strength: float = 0.0,
    weight_decay: float = 0.0,
    noise: float = 0.0,
) -> None:
    """Train `net` by AdamW and one cycle of the learning rate, and put it into eval mode.

    `recipe` has "epochs", "batch" and "lr"; `noise` is the standard deviation of the noise on
    every input.
    """
    optimizer = torch.optim.AdamW(net.parameters(), recipe["lr"], weight_decay=weight_decay)
    steps = recipe["epochs"] * -(-len(x) // recipe["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], steps, pct_start=0.1)
    for _ in range(recipe["epochs"]):
        for indices in torch.randperm(len(x)).split(recipe["batch"]):
            batch = x[indices]
            if noise:
                batch = batch + noise * torch.randn_like(batch)
            loss = F.cross_entropy(net(batch), labels[indices])
            if penalty is not None:
                loss = loss + strength * penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
