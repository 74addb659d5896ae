"""Commands that train, test and use a StarNet on image files."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from starlayers.commands.export import export_command
    from starlayers.commands.files import image_files
    from starlayers.commands.networks import (
        EARLIER_SMALL_IMAGES,
        SMALL_IMAGES,
        Start,
        build,
        open_start,
    )
    from starlayers.datasets.image_folder import load_image
    from starlayers.datasets.images import ImageData, load_images
    from starlayers.vision import StarNet, TrainedNet, architecture, from_architecture, load_run
    from starlayers.vision.models import MODELS
    from starlayers.vision.training import RunDir, TrainConfig, TrainResult, train
    from starlayers.vision.training.rundir import process_state
except ImportError as error:
    raise ImportError(
        f"the commands for images need pip install 'starlayers[training,datasets]' ({error})"
    ) from error

__all__ = ["build", "run", "train_command"]

#: steps below which a network that starts at random has hardly learned
FEW_STEPS = 300
#: network that is trained from a random start
DEFAULT = "starnet_s050"
#: options of a run beside its recipe
SETUP = ("model", "data", "path", "size", "drop_path", "pretrained", "start")
#: what a run takes from the weights that it starts from
NORMALISATION = ("mean", "std")
BATCH = 64


def run(command: str, words: Sequence[str]) -> int:
    """Run one of the commands on the words after its name; return its exit status."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": lambda words: 0 if train_command(words) else 1,
        "eval": _eval,
        "predict": _predict,
        "export": export_command,
    }
    try:
        return commands[command](words)
    # the user's own input, or a missing package: the message says it all
    except (ValueError, OSError, ImportError) as error:
        print(f"starlayers {command}: {str(error).removeprefix(f'{command}: ')}", file=sys.stderr)
        return 2


def train_command(
    words: Sequence[str], program: str = "starlayers train", text: str = ""
) -> tuple[TrainResult, ImageData, StarNet, RunDir] | None:
    """Train as the words of a command line say, and print what happens.

    What the words leave open is chosen by the data, see `TrainConfig.for_data`.

    Args:
        words: after the name of the command; `--help` prints them all.
        program: name under which the command is called, in messages.
        text: what `--help` says first; of a docstring, the part up to the commands.

    Returns:
        Result, data, network and folder; `None` if the run was stopped and can be resumed.
    """
    options = vars(_train_parser(program, text).parse_args(words))
    resume: Path | None = options["resume"]
    recipe = {f.name: options[f.name] for f in fields(TrainConfig) if f.name in options}
    saved: dict[str, Any] = {}
    if resume:
        saved = RunDir.read_config(resume)
        options |= {name: saved.get(name) for name in SETUP}
        recipe = {f.name: saved[f.name] for f in fields(TrainConfig) if f.name in saved}
    # a saved state brings the weights
    start = None if resume and RunDir.has_state(resume) else _start(options)
    size = options["size"] or (start.metadata["size"][0] if start else 64)
    images = load_images(options["data"], path=options["path"], size=size, skip_unreadable=True)
    normalisation: dict[str, Any] = {name: saved.get(name) for name in NORMALISATION}
    if start:
        normalisation = start.normalisation(images.shape[0])
    if normalisation["mean"]:
        images = replace(images, **normalisation)
    chosen = {k: v for k, v in recipe.items() if v is not None}
    config = TrainConfig.for_data(images, finetune=bool(start), **chosen)
    model = start.model if start else options["model"] or (None if resume else DEFAULT)
    torch.manual_seed(config.seed)
    adapted: tuple[str, ...] = ()
    if start:
        net, adapted = start.build(images, options["drop_path"])
    elif saved.get("architecture"):
        net = from_architecture(saved["architecture"])
    else:
        small = EARLIER_SMALL_IMAGES if resume else SMALL_IMAGES
        net = build(model or DEFAULT, images, options["drop_path"], small=small)
    setup = {name: options[name] for name in SETUP} | normalisation
    setup |= {key: setup[key] and str(setup[key]) for key in ("path", "start")}
    setup |= {"size": size, "model": model, "pretrained": bool(options["pretrained"])}
    setup["architecture"] = architecture(net)
    folder = resume or options["out"] or RunDir.fresh_path("runs")
    run_dir = RunDir(folder, {**setup, **vars(config)}, resume=bool(resume))

    parameters = sum(p.numel() for p in net.parameters())
    show = process_state().print  # by one process, however many there are
    show(f"{model or 'StarNet'}: {parameters:,} parameters; data: {images.source}")
    if start:
        known = "its own" if start.known else "ImageNet's, as the file does not say them"
        show(f"starts from {start.file}; images are normalised by mean and std: {known}")
    for line in (*adapted, *_recipe(config, images, bool(normalisation["mean"]))):
        show(line)
    result = train(net, images, config, run_dir)
    if not result.finished:
        show(f"stopped; go on with: {program} --resume {run_dir.path}")
        return None
    show(
        f"test accuracy {result.test_accuracy:.2%} after {config.epochs} epochs, "
        f"{result.seconds:.0f} s of training; weights and plots in {run_dir.path}"
    )
    return result, images, net, run_dir


def _start(options: dict[str, Any]) -> Start | None:
    """Return the weights that the options name to start from, if they name any."""
    if options["start"] and options["pretrained"]:
        raise ValueError("--pretrained and --start are two weights to start from: choose one")
    if not (options["start"] or options["pretrained"]):
        return None
    return open_start(Path(options["start"]) if options["start"] else None, options["model"])


def _recipe(config: TrainConfig, images: ImageData, started: bool) -> Iterator[str]:
    data: Any = images.train
    steps = -(-len(data) // (config.batch_size * config.accumulate))
    changes = ["mirrored"] * bool(config.flip)
    changes += [f"shifted by {config.crop} pixels"] * bool(config.crop)
    yield (
        f"{len(data):,} training images of {len(images.classes)} classes"
        f"{', ' * bool(changes)}{' and '.join(changes)}; {config.epochs} epochs of {steps} steps, "
        f"batch {config.batch_size}, rate {config.lr:g}"
    )
    if config.epochs * steps < FEW_STEPS and not started:
        yield (
            f"{config.epochs * steps} steps are few for a network that starts at random: raise "
            "--epochs or lower --batch-size, or leave them out, and the data decide"
        )


def _train_parser(program: str, text: str) -> argparse.ArgumentParser:
    text = text.split("\n\npython ")[0] or "Train a StarNet on images, or resume a stopped run."
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [OPTIONS]",
        description=text,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=40),
    )
    add = parser.add_argument
    add(
        "--model",
        choices=MODELS,
        metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default {DEFAULT}, or starnet_s1 with --pretrained)",
    )
    add(
        "--pretrained",
        action="store_true",
        help="start from the published ImageNet weights (default off)",
    )
    add(
        "--start",
        type=Path,
        metavar="RUN",
        help="folder of a run, or weights file, to start from; a head for other classes is "
        "replaced (default none)",
    )
    add(
        "--data",
        default="fashion-mnist",
        help="fashion-mnist (default), digits, folder, or a torchvision name such as CIFAR10",
    )
    add("--path", type=Path, help="folder of the images, read only (default the cache)")
    add(
        "--size",
        type=int,
        help="side to which images of a folder are resized (default 64, or that of the weights to "
        "start from)",
    )
    add("--out", type=Path, help="folder of the run (default runs/TIME)")
    add("--resume", type=Path, help="folder of a run to go on with, as it began (default none)")
    add(
        "--drop-path",
        type=float,
        default=0.0,
        help="stochastic depth of the last block (default 0)",
    )
    helps = dict(re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", _arguments(TrainConfig), re.M))
    for names, text in list(helps.items()):
        helps |= dict.fromkeys(names.split(", "), text)
    chosen = ("batch_size", "epochs", "lr", "flip", "crop", "ema")
    for field in fields(TrainConfig):
        default = "default by the data" if field.name in chosen else f"default {field.default}"
        line = " ".join(helps[field.name].split()).rstrip(".").replace("`", "").replace("%", "%%")
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            add(option, action="store_true", default=None, help=f"{line} (default off)")
        else:
            kind: Any = field.type
            add(option, type=kind, metavar=kind.__name__.upper(), help=f"{line} ({default})")
    return parser


def _arguments(kind: type) -> str:
    """Return the part of a docstring that describes the arguments."""
    return (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]


def _eval(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="starlayers eval",
        description="Test a trained network, on the test images of its run or on others.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, or a weights file")
    parser.add_argument("--data", help="other images than those of the run, as for train")
    parser.add_argument("--path", type=Path, help="folder of these images")
    options = parser.parse_args(words)
    net = load_run(options.run)
    if options.data or options.path:
        setup = {"data": options.data or "folder", "path": options.path}
    else:
        folder = options.run if options.run.is_dir() else options.run.parent
        setup = RunDir.read_config(folder)
    images = load_images(setup["data"], path=setup["path"], size=net.size[0], skip_unreadable=True)
    if tuple(images.classes) != net.classes:
        raise ValueError(
            f"the network knows the classes {', '.join(net.classes)}; {images.source} has "
            f"{', '.join(images.classes)}"
        )
    counts = _right_by_class(net, images)
    right, total = counts.sum(0).tolist()
    print(f"{right} of {total} right: {right / total:.2%} on {images.source}")
    for name, (good, n) in zip(net.classes, counts.tolist(), strict=True):
        print(f"  {name}: {good} of {n}")
    return 0


def _right_by_class(net: TrainedNet, images: ImageData) -> Tensor:
    """Return for each class how many test images were right, and how many there are."""
    counts = torch.zeros(len(net.classes), 2, dtype=torch.long)
    loader = torch.utils.data.DataLoader(images.test, BATCH)
    for pixels, labels in loader:
        right = net.logits(pixels).argmax(1).cpu() == labels
        counts[:, 0].index_add_(0, labels, right.long())
        counts[:, 1].index_add_(0, labels, torch.ones_like(labels))
    return counts


def _predict(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="starlayers predict",
        description="Name the classes of image files. Files in folders named like classes are "
        "counted as right or wrong. Files that cannot be read are named, and the exit status is 1.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, or a weights file")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=1, help="classes shown for each image (1)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    options = parser.parse_args(words)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    net = load_run(options.run)
    files = [file for path in options.images for file in image_files(path)]
    right, labelled, unread = 0, 0, 0
    for file in files:
        try:
            image = load_image(file, (len(net.mean), *net.size))
        except ValueError as error:
            print(error, file=sys.stderr)
            unread += 1
            continue
        (classes,) = net.predict(image[None], options.top)
        if options.json:
            print(json.dumps({"file": str(file), "classes": dict(classes)}))
        else:
            print(f"{file}  {', '.join(f'{name} {share:.1%}' for name, share in classes)}")
        if file.parent.name in net.classes:
            labelled += 1
            right += classes[0][0] == file.parent.name
    if labelled and not options.json:
        print(f"{right} of {labelled} right: {right / labelled:.2%}")
    return 1 if unread else 0
