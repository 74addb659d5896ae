"""What measures and penalises coefficients needs PyTorch alone."""

import subprocess
import sys

CHILD = """
import sys, warnings
import torch
before = {name.split(".")[0] for name in sys.modules}
warnings.simplefilter("error")
from starlayers import StarOp
from starlayers.coefficients import CoefficientPenalty, SpectrumLogger, expand, spectrum
op = StarOp(3, 2, act=None)
spectrum(op), SpectrumLogger(op).step(0), str(expand(op)[0])
CoefficientPenalty(op, balance=0.1)().backward()
after = {name.split(".")[0] for name in sys.modules if "." not in name}
names = {"matplotlib", "optuna", "sklearn", "sympy", "scipy", "stable_baselines3", "tensorboard",
         "transformers", "triton", "tqdm"}
print(sorted((after - before) & names))
"""


def test_it_loads_torch_alone_and_warns_of_nothing():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[]"
