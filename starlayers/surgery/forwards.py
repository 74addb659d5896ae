"""Forwards that other libraries replaced on an instance, so that its class's never runs."""

import inspect
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import name_of
from starlayers.surgery.hidden import GatedHidden
from starlayers.surgery.install import installed

#: package -> how to have both
REMEDIES = {
    "liger_kernel": (
        "keep Liger from the MLPs with swiglu=False (geglu=False for GEGLU), in TrainingArguments "
        "liger_kernel_config={'swiglu': False}"
    ),
    "accelerate": "starify before dispatch_model, or load with a device_map that offloads nothing",
}


def replaced_forward(module: nn.Module) -> str | None:
    """Return who replaced the forward of a module on the instance, `None` if nobody did.

    Liger's `apply_liger_kernel_to_...(model=...)` and accelerate's hooks do that. Such a module
    does not run what its class computes, and a new class has no effect.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> replaced_forward(layer)
        >>> layer.forward = lambda x: x
        >>> replaced_forward(layer)
        'its forward was replaced by <lambda> of starlayers.surgery.forwards'
    """
    forward = vars(module).get("forward")
    if forward is None:
        return None
    function = forward.func if isinstance(forward, partial) else forward
    function = function.__func__ if isinstance(function, MethodType) else function
    if "_hf_hook" in vars(module):  # accelerate's wrapper has the name of what it wraps
        return "its forward was replaced by a hook of accelerate"
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"its forward was replaced by {name} of {_package(function)}"


def _package(function: Any) -> str:
    module = getattr(function, "__module__", None) or "an unknown module"
    return module.partition(".")[0] if module.startswith("liger_kernel.") else module


def remedy(replaced: str) -> str:
    """Return what to do about a result of `replaced_forward`."""
    known = (text for package, text in REMEDIES.items() if package in replaced)
    return next(known, "starify the model before that is done, or leave its MLPs alone there")


def bypassed(star: nn.Module) -> str | None:
    """Return why a `GatedMLP` does not run, `None` if it does.

    A forward that was wrapped and still calls the star's own is no reason.
    """
    if not isinstance(star, Adopted) or _calls_own_forward(star):
        return None
    return replaced_forward(star)


def check_forwards(model: nn.Module) -> None:
    """Raise an error if a star layer's forward was replaced, so that it does not run.

    Raises:
        ValueError: with the first such layer and what to do.
    """
    for path, _, star in installed(model):
        if (replaced := bypassed(star)) is None:
            continue
        grown = isinstance(star, GatedMLP) and star.star.grown
        lost = " and its grown products are lost" if grown else ""
        lost = " and its gate is lost" if isinstance(star, GatedHidden) else lost
        raise ValueError(
            f"{name_of(path, star)} is a star layer, but {replaced}, so the star does not run"
            f"{lost}: {remedy(replaced)}"
        )


def _calls_own_forward(module: nn.Module) -> bool:
    """Return True if a module runs its class's forward, perhaps through wrappers."""
    forward = vars(module).get("forward")
    if forward is None:
        return True

    def is_own(function: Any) -> bool:
        return getattr(function, "__func__", None) is type(module).forward

    return is_own(inspect.unwrap(forward, stop=is_own))


def liger_mlps(model: nn.Module) -> dict[str, str]:
    """Return the MLPs that are modules of Liger: name in the model -> why they are left."""
    reason = (
        "it is Liger's {}, because the model was built after Liger was applied in this process: "
        "build it before, or apply Liger with swiglu=False"
    )
    return {
        name: reason.format(type(module).__name__)
        for name, module in model.named_modules()
        if type(module).__module__.startswith("liger_kernel.") and "MLP" in type(module).__name__
    }
