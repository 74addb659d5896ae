"""Loading and exporting of StarNet weights in the authors', timm's and our names."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starlayers.vision.names import POINTWISE, adopt_names, has_timm_names, timm_name
from starlayers.vision.weights import architecture, checksum, differences, read_metadata

if TYPE_CHECKING:
    from starlayers.vision.starnet import StarNet


#: data beside the weights: timm's CheckpointSaver writes the arguments of the command line
SAFE: Any = [argparse.Namespace]


@dataclass(frozen=True)
class LoadReport:
    """Summary of what `load_checkpoint` copied and adapted.

    Attributes:
        source: whose names the checkpoint uses, "timm" (the authors' too) or "starlayers".
        loaded: number of tensors copied.
        adapted: a sentence for each part of the checkpoint that did not fit as it was.

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
    model: "StarNet", checkpoint: str | os.PathLike[str] | Mapping[str, object]
) -> LoadReport:
    """Load weights into `model`, in place; on an error nothing is changed.

    A first convolution for another number of image channels is adapted: summed to one channel, or
    repeated and rescaled. With another number of classes `model` keeps its own head.

    Args:
        model: network to load into, not fused.
        checkpoint: state dict, or path of a file in safetensors' or torch's format (read with
            `weights_only=True`). The authors' `.pth.tar` (`{"state_dict": ...}`), timm's and our
            own names are understood, and the prefixes that `DistributedDataParallel` and
            `torch.compile` leave.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing or unexpected key or another shape (each is listed), a file that is
            truncated or no checkpoint, one that says that it is of another architecture, such as
            other strides (see `save_weights`), or a fused model.
        TypeError: `checkpoint` is neither a path nor a mapping.
        ImportError: a `.safetensors` file, and safetensors is not installed.

    Example:
        >>> from starlayers.vision import StarNet
        >>> source = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=10)
        >>> target = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5, in_chans=1)
        >>> for line in load_checkpoint(target, source.state_dict()).adapted: print(line)
        stem.conv: 3 input channels summed to 1
        head: checkpoint has 10 classes, model keeps its own head of 5
    """
    if isinstance(checkpoint, Mapping):
        state = unwrap(checkpoint)
    else:
        state = unwrap(_read(checkpoint))
        _check_metadata(model, state, checkpoint)
    timm_names = has_timm_names(state)
    adopt_names(state)
    target = model.state_dict()
    if "stem.bn.weight" in state and "stem.bn.weight" not in target:
        raise ValueError("the model is fused: load the checkpoint first, then call fuse()")
    adapted: list[str] = []
    _adapt_stem(state, target, adapted)
    _adapt_head(state, target, adapted)
    for key, value in target.items():
        if key not in state and key.endswith("num_batches_tracked"):
            state[key] = value  # older checkpoints lack the counter
    _check(state, target)
    model.load_state_dict(state)
    return LoadReport("timm" if timm_names else "starlayers", len(state), tuple(adapted))


def to_timm_state_dict(model: "StarNet") -> dict[str, Tensor]:
    """Return the weights under the names and shapes of timm's StarNet.

    The authors' networks use the same names. The tensors are views of the model's own, so
    `load_checkpoint(model, to_timm_state_dict(model))` changes no bit.

    Raises:
        ValueError: the model is fused; timm's has BatchNorms.

    Example:
        >>> from starlayers.vision import StarNet
        >>> state = to_timm_state_dict(StarNet(8, (1, 1), stage_strides=(2, 2)))
        >>> tuple(state["stages.0.1.f1.conv.weight"].shape)
        (32, 8, 1, 1)
    """
    state = model.state_dict()
    if "stem.bn.weight" not in state:
        raise ValueError("the model is fused: timm's StarNet has BatchNorms; export before fuse()")
    return {
        timm_name(key): value[..., None, None] if POINTWISE.search(key) else value
        for key, value in state.items()
    }


def pretrained_path(name: str, hub_id: str | None) -> Path:
    """Return the local file of the ImageNet weights in `hub_id`, downloaded if necessary."""
    if hub_id is None:
        raise ValueError(f"{name} has no published weights; starnet_s1 to starnet_s4 have")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError(
            f"{name}(pretrained=True) needs huggingface_hub: pip install 'starlayers[vision]'"
        ) from error
    file = "model.safetensors"
    try:
        with suppress(OSError):  # not in the cache
            return Path(hub.hf_hub_download(hub_id, file, local_files_only=True))
        # one question first: without a network, the download tries again for half a minute
        hub.get_hf_file_metadata(hub.hf_hub_url(hub_id, file), timeout=5)
        return Path(hub.hf_hub_download(hub_id, file, etag_timeout=5))
    except Exception as error:  # the client raises a dozen kinds, from OSError to its own
        raise ConnectionError(
            f"could not fetch {hub_id} from the Hugging Face hub ({type(error).__name__}); "
            f"download model.safetensors of {hub_id} elsewhere and pass its path to "
            "starlayers.vision.load_checkpoint(model, path), or to starlayers train --start"
        ) from error


def _read(path: str | os.PathLike[str]) -> Mapping[str, object]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is a path or a mapping, got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    load: Callable[[Path], Any] = _torch_load
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as load
        except ImportError as error:
            raise ImportError(
                f"{path.name} needs safetensors: pip install 'starlayers[vision]'"
            ) from error
    try:
        loaded = load(path)
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        if objects := _objects_in(path):
            # not from the error, which is about options of torch.load, in a terminal's colours
            raise ValueError(
                f"{path} holds objects of {', '.join(objects)}, which only code named by the "
                "file can make, and which is not run here. Load it where you trust it, and save "
                "its weights alone: torch.save(checkpoint['state_dict'], path)"
            ) from None
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no checkpoint: {_plain(error)}"
        ) from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _torch_load(path: Path) -> Any:
    with torch.serialization.safe_globals(SAFE):
        return torch.load(path, map_location="cpu", weights_only=True)


def _objects_in(path: Path) -> list[str]:
    """Return the classes and functions that a file of `torch.save` names and that are not data."""
    try:
        with torch.serialization.safe_globals(SAFE):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no such file, or one that is broken
        return []


def _plain(error: Exception) -> str:
    """Return the message of an error without a terminal's colours and torch's advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()


def unwrap(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict inside `raw`, without prefixes of model wrappers."""
    inner = (raw[key] for key in ("state_dict", "model") if isinstance(raw.get(key), Mapping))
    raw = next(inner, raw)
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


def _adapt_stem(state: dict[str, Tensor], target: dict[str, Tensor], adapted: list[str]) -> None:
    """Fit the first convolution in `state` to the image channels of `target`."""
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
    """Keep the head of `target` if `state` has none, or other classes."""
    loaded, own = state.get("head.weight"), target.get("head.weight")
    if own is None:
        if loaded is not None:
            adapted.append(f"head: checkpoint's {len(loaded)} classes dropped, model has none")
            state.pop("head.weight"), state.pop("head.bias", None)
    elif loaded is None or loaded.shape[0] != own.shape[0]:
        has = "no head" if loaded is None else f"{loaded.shape[0]} classes"
        adapted.append(f"head: checkpoint has {has}, model keeps its own head of {own.shape[0]}")
        state.update({k: target[k] for k in ("head.weight", "head.bias")})


def _check_metadata(
    model: "StarNet", state: dict[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raise a ValueError if a file says that it is of another network, or was changed since."""
    metadata = read_metadata(path)
    saved = metadata.get("architecture")
    differing = differences(saved, architecture(model)) if saved else []
    if differing:
        raise ValueError(
            f"{path} is of another network: {'; '.join(differing)}. Build the model with these "
            "arguments (starlayers.vision.from_architecture does so), or pass the weights alone, "
            "safetensors.torch.load_file(path), to load them all the same"
        )
    if metadata.get("sha256", written := checksum(state)) != written:
        raise ValueError(f"{path} was changed since it was written: its weights have another sum")


def _check(state: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raise a ValueError that lists every key and shape in which `state` differs."""
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
