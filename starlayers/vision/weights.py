"""Weights files of StarNets that say what they are of: architecture, classes, normalisation.

One safetensors file holds the weights and, as JSON in its metadata, all that using them takes.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from starlayers.coefficients import modules as variants
from starlayers.modules import StarMLP
from starlayers.vision.blocks import ConvNorm, StarBlock2d

if TYPE_CHECKING:
    from starlayers.vision.starnet import StarNet

__all__ = [
    "architecture",
    "build",
    "checksum",
    "differences",
    "read_architecture",
    "read_metadata",
    "save_weights",
]

M = TypeVar("M", bound=nn.Module)

#: key of our JSON in the metadata of a safetensors file
KEY = "starlayers"
#: name in an architecture -> class of the MLPs of its blocks
MLP_LAYERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        StarMLP,
        variants.SumMLP,
        variants.RankStarMLP,
        variants.ScaledStarMLP,
        variants.DynamicStarMLP,
    )
}
#: name in an architecture -> class of its norms
NORM_LAYERS: dict[str, type[nn.Module]] = {"BatchNorm2d": nn.BatchNorm2d}
#: entries that a network may have otherwise than its weights: the head and the first convolution
#: are adapted, and the rest changes training alone or is changed on purpose
ADAPTED = {"num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "output_stride"}


def architecture(model: nn.Module) -> dict[str, Any]:
    """Return the architecture of a StarNet as values that JSON can hold.

    It is read off the network as it is now, with the head and the mode of fusion that it has. Its
    entries are arguments of `StarNet`, but for "class" ("StarNet"), "fused" (after `fuse()`) and
    "pruned" (without its last norm). `mlp_layer` and `norm_layer` are dictionaries of a class name
    and what else differs from the defaults of that class.

    Raises:
        TypeError: `model` is no StarNet.
        ValueError: a StarNet whose layers were changed in a way that its arguments cannot express.

    Example:
        >>> from starlayers.vision import StarNet
        >>> model = StarNet(8, (1, 1), stage_strides=(1, 2), num_classes=10)
        >>> found = architecture(model)
        >>> found["stage_strides"], found["kernel_size"], found["mlp_layer"]
        ([1, 2], 7, {'class': 'StarMLP'})
    """
    # by its parts: starnet.py imports this module
    if not all(hasattr(model, part) for part in ("stem", "stages", "global_pool", "in_chans")):
        raise TypeError(f"an architecture is read off a StarNet, got {type(model).__name__}")
    try:
        return _architecture(model)  # type: ignore[arg-type]
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise _changed(str(error)) from error


def _architecture(model: "StarNet") -> dict[str, Any]:
    downs: list[Any] = []
    blocks: list[Any] = []
    depths, strides, dilation = [], [], 1
    for stage in model.stages.children():
        layers: Any = list(stage.children())
        kinds = [ConvNorm, *[StarBlock2d] * max(1, len(layers) - 1)]
        if len(layers) != len(kinds) or not all(map(isinstance, layers, kinds)):
            raise _changed("a stage is not one ConvNorm followed by StarBlock2d")
        down, *rest = layers
        inside = _one("dilation", (b.pre.conv.dilation[0] for b in rest))
        downs.append(down)
        depths.append(len(rest))
        blocks += rest
        strides.append(down.conv.stride[0] * inside // dilation)
        dilation = inside
    dims = [down.conv.out_channels for down in downs]
    if dims != [dims[0] * 2**i for i in range(len(dims))]:
        raise _changed(f"its stages have {dims} channels")
    stem_stride = model.stem.conv.stride[0]
    ratio = _one("mlp_ratio", (b.mlp.hidden_features / b.dim for b in blocks))
    found: dict[str, Any] = {
        "class": "StarNet",
        "base_dim": dims[0],
        "depths": depths,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "drop_rate": model.drop_rate,
        "drop_path_rate": getattr(blocks[-1].drop_path, "p", 0.0),
        "act": _one("act", [model.act, *(b.mlp.act for b in blocks)]),
        "mlp_layer": _one("mlp_layer", (_mlp(b.mlp) for b in blocks)),
        "global_pool": model.global_pool.pool_type,
        "kernel_size": _one("kernel_size", (b.pre.conv.kernel_size[0] for b in blocks)),
        "stem_stride": stem_stride,
        "stage_strides": strides,
    }
    if dilation > 1:
        found["output_stride"] = stem_stride * math.prod(d.conv.stride[0] for d in downs)
    norms = [_norm(m) for m in model.modules() if isinstance(m, _BatchNorm)]
    if norms:
        found["norm_layer"] = _one("norm_layer", norms)
    if isinstance(model.stem.bn, nn.Identity):
        found["fused"] = True
    if isinstance(model.norm, nn.Identity):
        found["pruned"] = True
    return found


def build(kind: type[M], architecture: Mapping[str, Any], kwargs: Mapping[str, Any]) -> M:
    """Build the network of an architecture by its class; `from_architecture` says the rest."""
    arguments = dict(architecture)
    name = arguments.pop("class", "StarNet")
    fused, pruned = arguments.pop("fused", False), arguments.pop("pruned", False)
    if name != "StarNet":
        raise ValueError(f"the architecture is of a {name}, and StarNets are built here")
    for option, table in (("mlp_layer", MLP_LAYERS), ("norm_layer", NORM_LAYERS)):
        if option in arguments and option not in kwargs:
            arguments[option] = _layer(option, arguments[option], table)
    model: Any = kind(**arguments | dict(kwargs))
    if pruned:
        model.norm = nn.Identity()
    return model.fuse() if fused else model  # type: ignore[no-any-return]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return in what two architectures differ that makes weights of one wrong in the other.

    Classes, image channels, pooling, dropout and `output_stride` may differ.

    Example:
        >>> differences({"stem_stride": 1, "num_classes": 5}, {"stem_stride": 2, "num_classes": 9})
        ['stem_stride is 1 in the file and 2 in the model']
    """
    return [
        f"{key} is {saved.get(key)!r} in the file and {own.get(key)!r} in the model"
        for key in {**saved, **own}
        if key not in ADAPTED and _function(saved.get(key)) != _function(own.get(key))
    ]


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights to a safetensors file, with what using them takes in its metadata.

    The file is complete whenever it is there under its name. A network other than a StarNet, or one
    whose layers were changed, is written without an architecture; the latter with a warning.

    Args:
        model: the network.
        path: file to write, `*.safetensors`; its folder must exist.
        classes: names of the classes, in the order of the outputs.
        mean, std: of the images' channels, as they are normalised for the network.
        size: side of the images, or (height, width).
        state: weights to write instead of the network's own, such as their average.

    Raises:
        ValueError: another suffix; a number of names or channels that is not the network's; only
            one of `mean` and `std`.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from starlayers.vision import StarNet
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> model = StarNet(8, (1,), stage_strides=(1,), num_classes=2, in_chans=1)
        >>> save_weights(model, path, classes=["cat", "dog"], mean=[0.5], std=[0.25], size=28)
        >>> read_metadata(path)["classes"], read_architecture(path)["stage_strides"]
        (['cat', 'dog'], [1])
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as *.safetensors, got {path.name!r}")
    save = _safetensors(path).torch.save
    content: dict[str, Any] = {"version": 1}
    try:
        content["architecture"] = architecture(model)
    except TypeError:  # another network
        pass
    except ValueError as error:
        warnings.warn(f"{path} is written without an architecture: {error}", stacklevel=2)
    content |= _usage(model, classes, mean, std, size)
    weights = dict(model.state_dict() if state is None else state)
    # cloned, because safetensors refuses tensors that share memory, as tied weights do
    dense = torch.contiguous_format
    weights = {k: v.detach().cpu().clone(memory_format=dense) for k, v in weights.items()}
    content["sha256"] = checksum(weights)
    partial_file = path.with_name(f"{path.name}.partial")
    with partial_file.open("wb") as stream:
        stream.write(_ordered(save(weights, {"format": "pt", KEY: json.dumps(content)})))
        stream.flush()
        os.fsync(stream.fileno())
    partial_file.replace(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_weights` wrote beside the weights; no weight is read.

    Returns:
        Those of "architecture", "classes", "mean", "std", "size" (height, width) and "sha256" that
        the file has: none for files of others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_weights(nn.Linear(4, 2), path, classes=["cat", "dog"], size=(28, 56))
        >>> found = read_metadata(path)
        >>> found["classes"], found["size"]
        (['cat', 'dog'], [28, 56])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix != ".safetensors":
        return {}
    try:
        with _safetensors(path).safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY, "{}")
        content = json.loads(text)
    except Exception as error:  # safetensors has several kinds for a broken file
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no checkpoint: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its metadata under {KEY!r} is a {type(content).__name__}")
    content.pop("version", None)
    return content


def read_architecture(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the architecture that a weights file is of; `None` if it does not say.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_metadata`.

    Example:
        >>> import tempfile
        >>> from starlayers.vision import StarNet, from_architecture, load_checkpoint
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_weights(StarNet(8, (1, 1), stage_strides=(1, 2), num_classes=10), path)
        >>> model = from_architecture(read_architecture(path))
        >>> load_checkpoint(model, path).loaded == len(model.state_dict())
        True
    """
    return read_metadata(path).get("architecture")


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values.

    Example:
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.zeros(2, 1)}
        >>> checksum(a) == checksum(b), len(checksum(a))
        (False, 64)
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        t = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()


def _ordered(file: bytes) -> bytes:
    """Return a safetensors file with its metadata in order, so that equal runs are equal bytes.

    The library writes them in an order that changes from call to call.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the weights
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def _usage(model: nn.Module, classes: Any, mean: Any, std: Any, size: Any) -> dict[str, Any]:
    """Return the metadata on classes and images, checked against the network."""
    content: dict[str, Any] = {}
    outputs, channels = (getattr(model, name, None) for name in ("num_classes", "in_chans"))
    if classes is not None:
        content["classes"] = [str(name) for name in classes]
        if outputs is not None and len(classes) != outputs:
            raise ValueError(f"{len(classes)} classes are named, the network has {outputs} outputs")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together; one of them is missing")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            content[name] = [float(value) for value in values]
            if channels is not None and len(content[name]) != channels:
                raise ValueError(
                    f"{name} has {len(content[name])} values, the network sees {channels} channels"
                )
    if size is not None:
        sides = [size, size] if isinstance(size, int) else list(size)
        content["size"] = [int(side) for side in sides]
        if len(sides) != 2:
            raise ValueError(f"size is one side or (height, width), got {size!r}")
    return content


def _mlp(mlp: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"class": _name(type(mlp), MLP_LAYERS)}
    if isinstance(mlp, variants.RankStarMLP):
        found["rank"] = mlp.rank
    star: Any = getattr(mlp, "star", mlp)  # sums of products have it inside
    if star.offset:
        found["offset"] = star.offset
    if star.f1.bias is None:
        found["bias"] = False
    return found


def _norm(norm: _BatchNorm) -> dict[str, Any]:
    # the norms of several processes hold the same weights and compute the same without training
    kind = nn.BatchNorm2d if type(norm) is nn.SyncBatchNorm else type(norm)
    found: dict[str, Any] = {"class": _name(kind, NORM_LAYERS)}
    for option, default in (("eps", 1e-5), ("momentum", 0.1)):
        if getattr(norm, option) != default:
            found[option] = getattr(norm, option)
    return found


def _name(kind: type, table: Mapping[str, type]) -> str:
    own = table.get(kind.__name__) is kind
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _layer(name: str, found: Any, table: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Return the class, with its options, that an architecture names."""
    options = dict(found)
    kind = table.get(options.pop("class"))
    if kind is None:
        raise ValueError(
            f"{name} of this architecture is {found['class']!r}, which is not the library's: pass "
            f"the class itself, {name}=..."
        )
    return partial(kind, **options) if options else kind  # type: ignore[no-any-return]


def _function(value: Any) -> Any:
    """Return the part of an entry that decides what the network computes."""
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if k != "momentum"}
    return list(value) if isinstance(value, tuple) else value or None


def _one(name: str, values: Iterable[Any]) -> Any:
    listed = list(values)
    if any(value != listed[0] for value in listed):
        raise _changed(f"{name} differs between its blocks")
    return listed[0]


def _changed(how: str) -> ValueError:
    return ValueError(f"this StarNet was changed after it was made, no arguments give it: {how}")


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{path.name} needs safetensors: pip install 'starlayers[vision]'"
        ) from error
    return safetensors
