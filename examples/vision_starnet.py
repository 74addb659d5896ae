"""Train a StarNet on real images.

The smallest StarNet, with strides for small images, learns Fashion-MNIST: four epochs, a few
minutes on two cores of a CPU. Each epoch prints the accuracy on the test images. A run can be
stopped at any time and resumed; the resumed run ends with the same weights. `curves.png`,
`confusion.png`, `feature-maps.png`, metrics and weights go to the folder of the run. Where
Fashion-MNIST is not in reach, scikit-learn's digits take its place, and the first line says so.

python examples/vision_starnet.py                          # Fashion-MNIST
python examples/vision_starnet.py --data folder --path my_images --size 64
python examples/vision_starnet.py --data CIFAR10 --epochs 30 --crop 4 --ema 0.999
python examples/vision_starnet.py --resume runs/TIME      # after Ctrl-C, a kill or a power cut
torchrun --nproc_per_node 2 examples/vision_starnet.py     # several GPUs, or CPU processes
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import _report
import torch
import typer
from _maps import plot_maps

from starlayers.datasets.images import ImageData, load_images
from starlayers.vision import StarNet
from starlayers.vision.models import MODELS
from starlayers.vision.training import TrainConfig, train
from starlayers.vision.training.rundir import RunDir, process_state

# The published strides reduce a 28x28 image to one pixel. These give maps with sides of 14, 14, 7,
# 4 and 4, on which a 7x7 kernel would mostly read padding, and 3x3 trains twice as fast on a CPU.
SMALL_IMAGES = {"stage_strides": (1, 2, 2, 1), "kernel_size": 3}


def build(name: str, data: ImageData, drop_path: float) -> StarNet:
    return MODELS[name](
        in_chans=data.shape[0],
        num_classes=len(data.classes),
        drop_path_rate=drop_path,
        **(SMALL_IMAGES if data.shape[-1] < 96 else {}),
    )


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = "starnet_s050",
    data: Annotated[
        str, typer.Option(help="fashion-mnist, digits, folder, or a torchvision name (CIFAR10)")
    ] = "fashion-mnist",
    path: Annotated[
        Path | None, typer.Option(help="folder of the images, read only", show_default="cache")
    ] = None,
    size: Annotated[int, typer.Option(help="side to which images of a folder are resized")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="folder of the run", show_default="runs/TIME")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="folder of a run to go on with", show_default="none")
    ] = None,
    drop_path: float = 0.0,
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    schedule: Annotated[str, typer.Option(help="cosine or onecycle")] = "cosine",
    label_smoothing: float = 0.1,
    flip: Annotated[float, typer.Option(help="probability of a mirrored image")] = 0.5,
    crop: Annotated[int, typer.Option(help="random shift, pixels")] = 0,
    randaugment: Annotated[int, typer.Option(help="number of RandAugment operations")] = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    ema: Annotated[float, typer.Option(help="decay of averaged weights, 0 for none")] = 0.998,
    amp: Annotated[bool, typer.Option("--amp", help="bf16, off by default")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="off by default")] = False,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="steps between saved states")] = 200,
    workers: Annotated[int, typer.Option(help="processes that load images")] = 0,
) -> None:
    options: dict[str, Any] = dict(locals())
    if resume:
        options |= RunDir.read_config(resume)
    elif model not in MODELS:
        raise typer.BadParameter(f"unknown model {model!r}, choose one of {', '.join(MODELS)}")
    names = [f.name for f in fields(TrainConfig) if f.name in options]
    config = TrainConfig(**{name: options[name] for name in names})
    images = load_images(options["data"], path=options["path"], size=options["size"])
    torch.manual_seed(config.seed)
    net = build(options["model"], images, options["drop_path"])
    setup = {name: options[name] for name in ("model", "data", "path", "size", "drop_path")}
    setup["path"] = None if setup["path"] is None else str(setup["path"])
    folder = resume or out or RunDir.fresh_path("runs")
    run_dir = RunDir(folder, {**setup, **vars(config)}, resume=bool(resume))

    parameters = sum(p.numel() for p in net.parameters())
    print_once = process_state().print  # by one process, however many there are
    print_once(f"{options['model']}: {parameters:,} parameters; data: {images.source}")
    result = train(net, images, config, run_dir)
    if not result.finished:
        command = f"python examples/vision_starnet.py --resume {run_dir.path}"
        print_once(f"stopped; go on with: {command}")
        return
    print_once(
        f"test accuracy {result.test_accuracy:.2%} after {config.epochs} epochs, "
        f"{result.seconds:.0f} s of training; weights and plots in {run_dir.path}"
    )
    if process_state().is_main_process:
        mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
        image = (images.test[0][0].float() / 255 - mean) / std
        plot_maps(net, image, mean, std, run_dir.path / "feature-maps.png")


if __name__ == "__main__":
    _report.run(main, __doc__)
