"""Names of the library in the namespaces of ultralytics and torchvision, and the YAML files."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torchvision.models import _api as registry

from starlayers.vision.models import MODELS, Factory

__all__ = ["add_name", "add_starnets", "model_yaml"]

FILES = Path(__file__).parent


def model_yaml(name: str) -> str:
    """Return the path of one of the library's model files, for `ultralytics.YOLO`.

    Args:
        name: "yolo-starnet_s050", a detector on the maps of a StarNet; or "yolo11n-starcsp" (also
            with "s", "m", "l" or "x" for "n"), YOLO11 with `StarCSP` for its stages.

    Raises:
        ValueError: another name, with those that there are.

    Example:
        >>> from pathlib import Path
        >>> from starlayers.vision.yolo import model_yaml
        >>> Path(model_yaml("yolo11n-starcsp")).name  # ultralytics takes the size from the name
        'yolo11n-starcsp.yaml'
    """
    names = sorted(file.stem for file in FILES.glob("*.yaml"))
    if re.sub(r"(?<=^yolo11)[nsmlx](?=-)", "", name) not in names:
        raise ValueError(f"model_yaml: there are {' and '.join(names)}, got {name!r}")
    return str(FILES / f"{name}.yaml")


def add_name(module: ModuleType, name: str, thing: Any) -> None:
    """Add a name to a module; raise RuntimeError if it stands for something else there.

    Example:
        >>> import types
        >>> module = types.ModuleType("rows")
        >>> add_name(module, "StarCSP", nn.Identity)
        >>> module.StarCSP.__name__
        'Identity'
    """
    if vars(module).setdefault(name, thing) is not thing:
        raise RuntimeError(
            f"{module.__name__} has a {name} of its own, {vars(module)[name]!r}; starlayers does "
            "not replace it"
        )


def add_starnets() -> None:
    """Add the StarNets to torchvision's models; raise ValueError if one of the names is taken.

    Example:
        >>> from torchvision.models import get_model
        >>> add_starnets()
        >>> get_model("starlayers_starnet_s050", num_classes=5)(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 5])
    """
    for name, build in BUILDERS.items():
        if registry.BUILTIN_MODELS.get(name) is not build:
            registry.register_model(name)(build)


def _builder(factory: Factory) -> Callable[..., nn.Module]:
    """Return a function that builds a StarNet of two parts, with torchvision's signature."""

    def build(*, weights: str | None = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        if weights not in (None, "DEFAULT"):
            raise ValueError(f"StarNet: weights must be None or 'DEFAULT', got {weights!r}")
        net = factory(pretrained=weights is not None, **kwargs)
        # ultralytics' TorchVision(split=True) returns the result of each of these steps, and leaves
        # the norm and the head away, as it leaves away the pool and the head of a ResNet
        steps = nn.Sequential(net.stem, *net.stages, net.norm)
        head = nn.Sequential(net.global_pool, net.flatten, net.head_drop, net.head)
        return nn.Sequential(OrderedDict(features=steps, classifier=head))

    return build


BUILDERS = {f"starlayers_{name}": _builder(factory) for name, factory in MODELS.items()}
