"""Export of StarNets to other engines, compared with PyTorch before a file is left."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbols
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from starlayers.backend import use_backend
from starlayers.vision.deploy.convolutions import converted
from starlayers.vision.deploy.formats import FORMATS, Format, Run, as_text, quiet

#: largest difference to PyTorch that a file in float32 may have, relative to the largest output
TOLERANCE = 1e-4

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """Report of what `export` wrote, and of how it compares with PyTorch.

    Attributes:
        path: of the file.
        format: its name.
        nodes: operations in the graph; `None` for formats of machine code.
        difference: largest difference to PyTorch in float32, relative to the largest output;
            `None` for Core ML away from Apple's devices.
        int8_difference: likewise of the int8 file on the calibration images; `None` without int8.
        agreement: share of the calibration images whose largest output is PyTorch's; `None`
            without int8.
        accuracy: shares of the labelled images that PyTorch and the file classify correctly;
            `None` without labelled images.
        kept: blocks that are not convolutions in the graph -> why.

    Example:
        >>> print(ExportReport(Path("net.onnx"), "onnx", 130, 2e-7))
        net.onnx: onnx, 130 nodes, differs from PyTorch by 2.0e-07 of the largest output
    """

    path: Path
    format: str
    nodes: int | None
    difference: float | None
    int8_difference: float | None = None
    agreement: float | None = None
    accuracy: tuple[float, float] | None = None
    kept: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.format]
        if self.nodes is not None:
            parts.append(f"{self.nodes} nodes")
        if self.difference is None:
            parts.append("not compared with PyTorch: its engine is not on this machine")
        else:
            parts.append(f"differs from PyTorch by {self.difference:.1e} of the largest output")
        if self.int8_difference is not None:
            parts.append(f"in int8 by {self.int8_difference:.1e}")
            parts.append(f"with the same class for {self.agreement:.2%} of the calibration images")
        if self.accuracy is not None:
            parts.append("accuracy {:.2%} in PyTorch and {:.2%} in the file".format(*self.accuracy))
        kept = [f"  {name} is no convolution: {reason}" for name, reason in self.kept.items()]
        return "\n".join([f"{self.path}: {', '.join(parts)}", *kept])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    shape: tuple[int, int, int] = (3, 224, 224),
    dynamic: bool = True,
    metadata: Mapping[str, Any] | None = None,
    int8: Tensor | Iterable[Tensor] | None = None,
    labelled: tuple[Tensor, Tensor] | Batches | None = None,
) -> ExportReport:
    """Write a network to a file for another engine, after comparing that engine with PyTorch.

    A copy in float32 and eval mode is made `portable`, captured by `torch.export` and written by
    the format's own converter. What the file computes is compared with `model` on random images
    of two sizes; a file that differs by more than 1e-4 of the largest output is not left. The
    file takes "images" (N, C, H, W), normalised as in training, and returns "logits"
    (N, classes).

    | `format` | suffix | engine | sizes that are free | int8 |
    | --- | --- | --- | --- | --- |
    | "onnx" | .onnx | onnxruntime and others | batch, height, width | onnxruntime's static one |
    | "openvino" | .xml and .bin | OpenVINO | batch, height, width | NNCF |
    | "torch" | .pt2 | AOTInductor, this CPU's kind | batch, height, width | |
    | "executorch" | .pte | ExecuTorch | none: a single image | |
    | "coreml" | .mlpackage | Core ML | none: a single image | |

    Args:
        model: a `StarNet`, or a module with one inside that takes images and returns a tensor or
            several. It is not changed.
        path: of the file, which is replaced.
        format: name of the format; default that of the path's suffix.
        shape: (C, H, W) of an image, on which the file is compared.
        dynamic: leave batch, height and width free where the format can; False for one image of
            `shape`, which engines may plan better.
        metadata: names and values that are stored in the file, such as `classes`, `mean` and
            `std`; values that are no text are stored as JSON.
        int8: normalised images (N, C, H, W), or batches of them, that show the range of every
            activation: some hundred of the training images. The file is then in int8.
        labelled: normalised images with their class numbers, or batches of such pairs, of which
            the report has the accuracy.

    Returns:
        What was written.

    Raises:
        ImportError: the converter is missing; the message says what to install.
        TypeError, ValueError: an argument does not fit: an unknown format, a suffix of another
            one, int8 in a format without it, images that are no floating (N, C, H, W), classes
            that are not as many as outputs.
        FileNotFoundError: the folder of `path` is missing.
        RuntimeError: the file and PyTorch differ; no file is left.

    Example:
        >>> import tempfile
        >>> from starlayers.vision import StarNet, export
        >>> model = StarNet(8, (1, 1), num_classes=2, stage_strides=(2, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(model, f"{folder}/net.onnx", shape=(3, 32, 32),
        ...                     metadata={"classes": ["cat", "dog"]})
        >>> report.nodes, report.difference < 1e-5
        (24, True)
    """
    path = Path(path)
    name, target = _format(path, format)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: no folder {path.parent}")
    target.check_packages(name, int8 is not None)
    dynamic = dynamic and not target.fixed
    calibration = None if int8 is None else _images("int8", int8, shape, dynamic)
    text = as_text(metadata or {})
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: model must be a module, got {type(model).__name__}")
    reference = copy.deepcopy(model).eval().float().cpu()
    graph, kept = converted(reference)
    examples = _examples(shape, dynamic)
    with torch.no_grad(), use_backend("eager"):
        wanted = [tree_leaves(reference(x)) for x in examples]
    if not wanted[0] or not all(isinstance(y, Tensor) for y in wanted[0]):
        raise TypeError(f"export: {type(model).__name__} must return a tensor, or several")
    _check_classes(metadata or {}, wanted[0])
    program = capture(graph, shape, dynamic=dynamic)
    int8_difference = agreement = accuracy = None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        file = Path(folder) / path.name
        with quiet():
            target.write(program, file, text)
            run = target.load(file)
        difference = None if run is None else _compare(run, examples, wanted, name)
        if calibration is not None:
            del run  # the file may be mapped into memory
            with quiet():
                target.quantize(file, calibration)
                run = target.load(file)
            assert run is not None
            int8_difference, agreement = _int8_differences(run, reference, calibration)
        if labelled is not None and run is not None:
            accuracy = _accuracies(reference, run, labelled, shape, dynamic)
        nodes = target.nodes(file)
        del run
        _publish(Path(folder), path)
    measured = (nodes, difference, int8_difference, agreement, accuracy)
    return ExportReport(path, name, *measured, kept)


def capture(
    graph: nn.Module, shape: tuple[int, int, int], *, dynamic: bool = True
) -> ExportedProgram:
    """Return `graph` as captured by `torch.export`, with free batch, height and width.

    Args:
        graph: module of images (N, C, H, W), in eval mode.
        shape: (C, H, W) of an image.
        dynamic: False for a single image of `shape`.
    """
    x = torch.zeros(2 if dynamic else 1, *shape)
    free = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    # otherwise PyTorch takes a map that is a single pixel for one that always is, or never
    with torch.no_grad(), use_backend("eager"), symbols.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(graph, (x,), dynamic_shapes=(free,) if dynamic else None)


def _format(path: Path, name: str | None) -> tuple[str, Format]:
    """Return the format of a name or, without one, of the path's suffix."""
    if name is None:
        by_suffix = {f.suffix: key for key, f in FORMATS.items()}
        if path.suffix not in by_suffix:
            raise ValueError(
                f"export: no format has the suffix of {path.name!r}, choose one of "
                f"{', '.join(by_suffix)}"
            )
        name = by_suffix[path.suffix]
    if name not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"export: unknown format {name!r}, choose one of {known}")
    suffix = FORMATS[name].suffix
    if path.suffix != suffix:
        raise ValueError(f"export: format {name!r} is a {suffix} file, got {path.name!r}")
    return name, FORMATS[name]


def _examples(shape: tuple[int, int, int], dynamic: bool) -> list[Tensor]:
    """Return random images, of two batches and sizes where these are free."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    sizes = [(2, *shape), (1, channels, 2 * height, width)] if dynamic else [(1, *shape)]
    return [torch.randn(size, generator=generator) for size in sizes]


def _images(
    name: str, images: Tensor | Iterable[Tensor], shape: tuple[int, int, int], dynamic: bool
) -> list[Tensor]:
    """Return images or batches of them in float32, as batches that the file takes."""
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not sum(map(len, batches)):
        raise ValueError(f"export: {name} needs images, got none")
    fixed = 1 if dynamic else 3  # number of sizes that an image has to have
    sizes = ", ".join(map(str, [*shape[:fixed], *"HW"][:3]))
    for batch in batches:
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(
                f"export: {name} needs floating images, normalised as in training, got {kind}"
            )
        if batch.ndim != 4 or batch.shape[1 : 1 + fixed] != shape[:fixed]:
            raise ValueError(f"export: {name} needs images (N, {sizes}), got {tuple(batch.shape)}")
    most = 32 if dynamic else 1
    batches = [part for batch in batches for part in batch.split(most)]
    return [batch.detach().float().cpu().contiguous() for batch in batches]


def _check_classes(metadata: Mapping[str, Any], outputs: list[Tensor]) -> None:
    classes = metadata.get("classes")
    if classes is None or isinstance(classes, str) or len(outputs) > 1:
        return
    width = outputs[0].shape[1]
    if len(classes) != width:
        raise ValueError(f"export: {len(classes)} classes in metadata for {width} outputs")


@torch.no_grad()
def _compare(run: Run, examples: list[Tensor], wanted: list[list[Tensor]], name: str) -> float:
    """Return the largest difference of a file to PyTorch, relative to the largest output.

    Raises:
        RuntimeError: it exceeds `TOLERANCE`.
    """
    worst = 0.0
    for x, want in zip(examples, wanted, strict=True):
        for y, z in zip(run(x), want, strict=True):
            difference = relative(y, z)
            if not difference <= TOLERANCE:  # NaN is a difference too
                raise RuntimeError(
                    f"export: the {name} file and PyTorch differ by {difference:.1e} of the "
                    f"largest output on images {tuple(x.shape)}, more than {TOLERANCE}; no file is "
                    "left"
                )
            worst = max(worst, difference)
    return worst


def relative(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the largest value wanted.

    Raises:
        RuntimeError: the shapes differ.
    """
    if got.shape != want.shape:
        raise RuntimeError(
            f"export: the file returns {tuple(got.shape)}, PyTorch {tuple(want.shape)}"
        )
    scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((got - want).abs().max() / scale)


@torch.no_grad()
def _int8_differences(run: Run, model: nn.Module, batches: list[Tensor]) -> tuple[float, float]:
    """Return the largest relative difference, and the share of images with the same class."""
    got, want = [], []
    for batch in batches:
        got.append(run(batch)[0])
        want.append(tree_leaves(model(batch))[0])
    y, z = torch.cat(got), torch.cat(want)
    return relative(y, z), float((y.argmax(1) == z.argmax(1)).double().mean())


@torch.no_grad()
def _accuracies(
    model: nn.Module,
    run: Run,
    labelled: tuple[Tensor, Tensor] | Batches,
    shape: tuple[int, int, int],
    dynamic: bool,
) -> tuple[float, float]:
    """Return the shares of images that PyTorch and the file classify correctly."""
    if isinstance(labelled, tuple) and isinstance(labelled[0], Tensor):
        labelled = [labelled]  # type: ignore[list-item]
    right, total = [0, 0], 0
    for images, classes in labelled:
        batches = _images("labelled", images, shape, dynamic)
        for i, compute in enumerate((lambda x: tree_leaves(model(x)), run)):
            scores = torch.cat([compute(batch)[0] for batch in batches])
            right[i] += int((scores.argmax(1) == classes.cpu()).sum())
        total += len(classes)
    return right[0] / total, right[1] / total


def _publish(folder: Path, path: Path) -> None:
    """Move the files from a temporary folder beside `path` to their place, the named one last."""
    for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
        if file.stem != path.stem:
            continue
        target = path.with_name(file.name)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(file, target)
