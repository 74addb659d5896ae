"""Weights in and out: the authors' checkpoints, timm's, ours, and the Hugging Face hub."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starlayers.vision.starnet import StarNet

__all__ = ["LoadReport", "load_checkpoint", "pretrained_path", "to_timm_state_dict"]

# timm and the authors use the same names; ours are the block's (pre, mlp, post).
_BLOCK_KEYS = {
    "pre.conv": "dwconv.conv",
    "pre.bn": "dwconv.bn",
    "mlp.f1": "f1.conv",
    "mlp.f2": "f2.conv",
    "mlp.g": "g.conv",
    "post.bn": "g.bn",
    "post.conv": "dwconv2.conv",
}
_OURS_TO_TIMM = [(re.compile(r"^stem\.(conv|bn)\."), r"stem.0.\1.")] + [
    (re.compile(rf"^(stages\.\d+\.\d+)\.{re.escape(ours)}\."), rf"\1.{timm}.")
    for ours, timm in _BLOCK_KEYS.items()
]
_TIMM_TO_OURS = [(re.compile(r"^stem\.0\.(conv|bn)\."), r"stem.\1.")] + [
    (re.compile(rf"^(stages\.\d+\.\d+)\.{re.escape(timm)}\."), rf"\1.{ours}.")
    for ours, timm in _BLOCK_KEYS.items()
]
_POINTWISE = re.compile(r"\.(mlp\.(f1|f2|g)|(f1|f2|g)\.conv)\.weight$")


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did: whose names the file used, tensors copied, what was adapted.

    Example:
        >>> print(LoadReport("timm", 100, ("head: kept fresh, 10 classes",)))
        loaded 100 tensors (timm names); head: kept fresh, 10 classes
    """

    source: str
    loaded: int
    adapted: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([f"loaded {self.loaded} tensors ({self.source} names)", *self.adapted])


def load_checkpoint(
    model: StarNet, checkpoint: str | os.PathLike[str] | Mapping[str, object]
) -> LoadReport:
    """Copy weights into `model`, in place, adapting what may differ; all or nothing.

    Reads the authors' `.pth.tar` (`{"state_dict": ...}`, with `weights_only=True`), timm's and
    our state dicts, from a file (`.safetensors` or torch's format) or a mapping. A first
    convolution for another number of channels is adapted (summed to one channel, or repeated and
    rescaled); a head with another number of classes is left as `model` has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing or unexpected key or another shape (each listed), a file that is
            truncated or no checkpoint, or a fused model.
        TypeError: neither a path nor a mapping.

    Example:
        >>> source = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=10)
        >>> target = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5, in_chans=1)
        >>> for line in load_checkpoint(target, source.state_dict()).adapted: print(line)
        stem.conv: 3 input channels summed to 1
        head: checkpoint has 10 classes, model keeps its own head of 5
    """
    raw = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    state = _unwrap(raw)
    theirs = any(key.startswith("stem.0.") for key in state)
    if theirs:
        state = {_rename(key, _TIMM_TO_OURS): value for key, value in state.items()}
    target = model.state_dict()
    if "stem.bn.weight" in state and "stem.bn.weight" not in target:
        raise ValueError("the model is fused: load the checkpoint first, then call fuse()")
    adapted: list[str] = []
    _adapt_stem(state, target, adapted)
    _adapt_head(state, target, adapted)
    for key, value in target.items():
        given = state.get(key)
        if given is not None and _POINTWISE.search(key) and given.ndim == value.ndim + 2:
            state[key] = given.flatten(1)
        if given is None and key.endswith("num_batches_tracked"):
            state[key] = value  # older checkpoints do not carry the counter
    _check(state, target)
    model.load_state_dict(state)
    return LoadReport("timm" if theirs else "starlayers", len(state), tuple(adapted))


def to_timm_state_dict(model: StarNet) -> dict[str, Tensor]:
    """The model's weights under the names and shapes of timm's StarNet (and the authors').

    Bit-identical on the way back: `load_checkpoint(model, to_timm_state_dict(model))`. The
    tensors are views of the model's own.

    Raises:
        ValueError: the model is fused; timm's has BatchNorms.

    Example:
        >>> state = to_timm_state_dict(StarNet(8, (1, 1), stage_strides=(2, 2)))
        >>> tuple(state["stages.0.1.f1.conv.weight"].shape)
        (32, 8, 1, 1)
    """
    state = model.state_dict()
    if "stem.bn.weight" not in state:
        raise ValueError("the model is fused: timm's StarNet has BatchNorms; export before fuse()")
    return {
        _rename(key, _OURS_TO_TIMM): value[..., None, None] if _POINTWISE.search(key) else value
        for key, value in state.items()
    }


def pretrained_path(name: str, hub_id: str | None) -> Path:
    """Download (or find in the cache) the ImageNet weights of a published StarNet.

    Raises:
        ValueError: there are none for that model.
        ConnectionError: the hub cannot be reached and the file is not in its cache.
    """
    if hub_id is None:
        raise ValueError(f"{name} has no published weights; starnet_s1 to starnet_s4 have")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "model.safetensors", etag_timeout=5))
    except Exception as error:  # the hub raises a dozen kinds, from OSError to its own
        raise ConnectionError(
            f"could not fetch {hub_id} from the Hugging Face hub ({type(error).__name__}); "
            f"download model.safetensors of {hub_id} elsewhere and pass its path to "
            "starlayers.vision.load_checkpoint(model, path)"
        ) from error


def _read(path: str | os.PathLike[str]) -> Mapping[str, object]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is a path or a mapping, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no checkpoint: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _unwrap(raw: Mapping[str, object]) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        inner = raw.get(wrapper)
        if isinstance(inner, Mapping):
            raw = inner
            break
    prefixes = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
    state = {}
    for key, value in raw.items():
        if not isinstance(key, str):
            raise ValueError(f"not a state dict: key {key!r} is a {type(key).__name__}")
        while key.startswith(prefixes):
            key = key.split(".", 1)[1]
        if not isinstance(value, Tensor):
            raise ValueError(f"not a state dict: {key!r} holds a {type(value).__name__}")
        state[key] = value
    return state


def _rename(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        key, n = pattern.subn(replacement, key)
        if n:
            break
    return key


def _adapt_stem(state: dict[str, Tensor], target: dict[str, Tensor], adapted: list[str]) -> None:
    key = "stem.conv.weight"
    weight = state.get(key)
    if weight is None or weight.ndim != 4 or weight.shape[1] == target[key].shape[1]:
        return
    old, new = weight.shape[1], target[key].shape[1]
    if new == 1:
        state[key] = weight.sum(1, keepdim=True)
        adapted.append(f"stem.conv: {old} input channels summed to 1")
    else:
        index = torch.arange(new) % old
        state[key] = weight[:, index] * (old / new)
        adapted.append(f"stem.conv: {old} input channels repeated to {new} and rescaled")


def _adapt_head(state: dict[str, Tensor], target: dict[str, Tensor], adapted: list[str]) -> None:
    given, own = state.get("head.weight"), target.get("head.weight")
    if own is None:
        if given is not None:
            adapted.append(f"head: checkpoint's {len(given)} classes dropped, model has none")
            state.pop("head.weight"), state.pop("head.bias", None)
    elif given is None or given.shape[0] != own.shape[0]:
        has = "no head" if given is None else f"{given.shape[0]} classes"
        adapted.append(f"head: checkpoint has {has}, model keeps its own head of {own.shape[0]}")
        state.update({k: target[k] for k in ("head.weight", "head.bias")})


def _check(state: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    problems = [f"missing {key}" for key in target if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in target]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the model has {tuple(value.shape)}"
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if problems[20:] else [])
        raise ValueError("the checkpoint is of another model:\n  " + "\n  ".join(shown))
