"""BatchNorm statistics of the weights as they are, for validation after few training steps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["frozen_norms", "reestimate_norms"]


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorms that keep their statistics: those of frozen parts of the model.

    A norm is frozen if none of its own parameters is trained while other parameters of the model
    are, or if it is in eval mode while the model is in training mode.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> _ = model[0].requires_grad_(False)
        >>> frozen_norms(model) == [model[0]]
        True
    """
    trained = any(p.requires_grad for p in model.parameters())

    def frozen(norm: nn.Module) -> bool:
        own = [p.requires_grad for p in norm.parameters()]
        return (trained and bool(own) and not any(own)) or (model.training and not norm.training)

    return [m for m in model.modules() if isinstance(m, _BatchNorm) and frozen(m)]


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm by averages over `batches`, in place.

    Running statistics follow the weights with a delay of tens of steps. After a short training,
    or in an average of weights, they belong to other weights, and a network that fits its training
    images fails in eval mode. Call this before such a network is validated or saved.

    The forwards run in training mode, without gradients; then every module is in its mode again.
    Norms of frozen parts (see `frozen_norms`) keep their statistics. PyTorch's
    `torch.optim.swa_utils.update_bn` does the same, but resets frozen norms too.

    Args:
        model: the network; without BatchNorm nothing is computed.
        batches: inputs of the model, as in training: of the same size and augmentation. 20 batches
            are as good as the running statistics of weights that stand still.

    Raises:
        ValueError: `batches` is empty.
        Exception: an error of a forward. The statistics are then as before.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(1))
        >>> reestimate_norms(model, [torch.full((1, 1, 2, 2), x) for x in (2.0, 4.0)])
        >>> model[0].running_mean
        tensor([3.])
    """
    kept = frozen_norms(model)
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m not in kept
    ]
    if not norms:
        return
    modes = {m: m.training for m in model.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [{name: b.clone() for name, b in norm.named_buffers()} for norm in norms]
    count = 0
    try:
        model.train()
        for norm in kept:
            norm.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
        for batch in batches:
            model(batch)
            count += 1
        if not count:
            raise ValueError("reestimate_norms: batches is empty; give at least one batch")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
