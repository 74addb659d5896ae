"""Import of the library: quiet, nothing but torch; kernels load when needed."""

import subprocess
import sys

import pytest

CHILD = """
import sys, warnings
import torch
before = set(sys.modules)
warnings.simplefilter("error")
import starlayers
loaded = set(sys.modules) - before
print(*sorted(name for name in loaded if name.split(".")[0] != "starlayers"))
print(*sorted(name for name in loaded if name.split(".")[0] == "starlayers"))
print(torch.cuda.is_initialized())
print(starlayers.star(torch.tensor([2.0]), torch.tensor([3.0])).tolist())

warnings.resetwarnings()
from starlayers import StarMLP, backend, use_backend
backend.MIN_HIDDEN_BYTES_INFERENCE = backend.MIN_HIDDEN_BYTES_TRAINING = 0
mlp, x = StarMLP(2), torch.ones(1, 2)
with use_backend("eager"):
    expected = mlp(x)
print("starlayers.kernels.star_mlp" in sys.modules)
print(torch.allclose(mlp(x), expected))
print("starlayers.kernels.star_mlp" in sys.modules)
print("starlayers.kernels.device" in sys.modules)
"""


@pytest.fixture(scope="module")
def child():
    """Output of a fresh process, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_core_import_loads_torch_alone_and_warns_of_nothing(child):
    others, own, initialized, value = child[:4]
    forbidden = {"triton", "transformers", "stable_baselines3", "timm", "torchvision", "einops"}
    assert not forbidden & {name.split(".")[0] for name in others.split()}
    assert others.split() == []
    # kernels are loaded by the first layer that needs them, adapters by their own import
    assert [name for name in own.split() if not name.startswith("starlayers.surgery")] == [
        "starlayers",
        "starlayers.activations",
        "starlayers.backend",
        "starlayers.functional",
        "starlayers.modules",
    ]
    assert initialized == "False"
    assert value == "[6.0]"


def test_kernels_load_on_the_first_fused_call_only(child):
    before, agrees, after, device = child[4:]
    assert (before, agrees, after) == ("False", "True", "True")
    assert device == "False"  # Triton code, which a CPU never needs
