"""Star operation `act(x W1 + b1) * (x W2 + b2)` as a first-class PyTorch layer."""

from starlayers.activations import ACTIVATIONS, get_activation, register_activation
from starlayers.backend import backend_name, use_backend
from starlayers.explain import explain
from starlayers.functional import star, star_mlp, star_packed
from starlayers.modules import DropPath, StarBlock, StarMLP, StarOp
from starlayers.surgery import from_pretrained, param_groups, starify

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "DropPath",
    "StarBlock",
    "StarMLP",
    "StarOp",
    "backend_name",
    "explain",
    "from_pretrained",
    "get_activation",
    "param_groups",
    "register_activation",
    "star",
    "star_mlp",
    "star_packed",
    "starify",
    "use_backend",
]
