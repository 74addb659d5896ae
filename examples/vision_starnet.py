"""Train a StarNet on real images.

The smallest StarNet, with strides for small images, learns Fashion-MNIST: four epochs, a few
minutes on two cores of a CPU. Each epoch prints the accuracy on the test images. A run can be
stopped at any time and resumed; the resumed run ends with the same weights. `curves.png`,
`confusion.png`, `feature-maps.png`, metrics and weights go to the folder of the run. Where
Fashion-MNIST is not in reach, scikit-learn's digits take its place, and the first line says so.
Batch, epochs, rate and shifts follow from the number of images. It is the command
`starlayers train`, with a figure of the feature maps at the end.

python examples/vision_starnet.py                          # Fashion-MNIST
python examples/vision_starnet.py --data folder --path my_images --size 64
python examples/vision_starnet.py --data CIFAR10 --epochs 30 --crop 4 --ema 0.999
python examples/vision_starnet.py --data folder --path my_images --pretrained --layer-decay 0.7
python examples/vision_starnet.py --resume runs/TIME      # after Ctrl-C, a kill or a power cut
torchrun --nproc_per_node 2 examples/vision_starnet.py     # several GPUs, or CPU processes
"""

import sys

import _report  # noqa: F401  before torch: sets how its threads wait
import torch
from _maps import plot_maps

from starlayers.commands.vision import train_command
from starlayers.vision.training.rundir import process_state

if __name__ == "__main__":
    trained = train_command(sys.argv[1:], "python examples/vision_starnet.py", __doc__)
    if trained and process_state().is_main_process:
        _, images, net, run_dir = trained
        mean, std = (torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
        image = (images.test[0][0].float() / 255 - mean) / std
        plot_maps(net, image, mean, std, run_dir.path / "feature-maps.png")
