"""Functions that build StarNets: the seven published ones, and those of weights files."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from starlayers.vision.checkpoints import load_checkpoint, pretrained_path
from starlayers.vision.starnet import StarNet
from starlayers.vision.weights import build


class Variant(NamedTuple):
    """Shape of a published StarNet, and the hub repository of its ImageNet weights."""

    base_dim: int
    depths: tuple[int, int, int, int]
    mlp_ratio: int
    hub_id: str | None = None


STARNETS = {
    "starnet_s1": Variant(24, (2, 2, 8, 3), 4, "timm/starnet_s1.in1k"),
    "starnet_s2": Variant(32, (1, 2, 6, 2), 4, "timm/starnet_s2.in1k"),
    "starnet_s3": Variant(32, (2, 2, 8, 4), 4, "timm/starnet_s3.in1k"),
    "starnet_s4": Variant(32, (3, 3, 12, 5), 4, "timm/starnet_s4.in1k"),
    "starnet_s050": Variant(16, (1, 1, 3, 1), 3),
    "starnet_s100": Variant(20, (1, 2, 4, 1), 4),
    "starnet_s150": Variant(24, (1, 2, 4, 2), 3),
}
"""Shapes of the published StarNets, by name.

Source: Ma et al., "Rewrite the Stars", arXiv 2403.19967: S1 to S4 in table 3, the smaller in
table 14.

Example:
    >>> from starlayers.vision import STARNETS
    >>> STARNETS["starnet_s1"].depths
    (2, 2, 8, 3)
"""


class Factory(Protocol):
    """Function that builds a StarNet, with the signature of timm's model functions."""

    def __call__(self, pretrained: bool = False, **kwargs: Any) -> StarNet: ...


_DOC = """Build {title}: {size} at 224x224.

The multiply-adds include those of the norms.{note}

Args:
    pretrained: load ImageNet-1k weights from the Hugging Face hub (S1 to S4 only).
    kwargs: arguments of `StarNet`; they override the published shape.

Raises:
    ValueError: `pretrained` for a model without published weights.
    ConnectionError: `pretrained`, and the hub cannot be reached.
    ImportError: `pretrained`, and huggingface_hub is not installed.

Example:
    >>> {name}(num_classes=10)(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""


def _factory(name: str, size: str, note: str = "") -> Factory:
    def build(pretrained: bool = False, **kwargs: Any) -> StarNet:
        shape = STARNETS[name]._asdict()
        hub_id = shape.pop("hub_id")
        model = StarNet(**shape | kwargs)
        if pretrained:
            load_checkpoint(model, pretrained_path(name, hub_id))
        return model

    build.__name__ = build.__qualname__ = name
    title = name.replace("starnet_", "StarNet-")
    build.__doc__ = _DOC.format(name=name, title=title, size=size, note=note)
    return build


starnet_s1 = _factory("starnet_s1", "2.87 M parameters, 425 M MACs")
starnet_s2 = _factory("starnet_s2", "3.68 M parameters, 547 M MACs")
starnet_s3 = _factory("starnet_s3", "5.75 M parameters, 757 M MACs")
starnet_s4 = _factory("starnet_s4", "7.48 M parameters, 1054 M MACs", " The paper says 1075 M.")
starnet_s050 = _factory("starnet_s050", "0.54 M parameters, 93 M MACs")
starnet_s100 = _factory("starnet_s100", "1.04 M parameters, 187 M MACs")
starnet_s150 = _factory("starnet_s150", "1.56 M parameters, 229 M MACs")

#: name -> function that builds the model.
MODELS: dict[str, Factory] = {name: globals()[name] for name in STARNETS}


def from_architecture(architecture: Mapping[str, Any], **kwargs: Any) -> StarNet:
    """Build the StarNet of an architecture, with fresh weights.

    Args:
        architecture: as `architecture` and `read_architecture` return it.
        kwargs: arguments of `StarNet` that override it, such as `num_classes` or `device`; a class
            of MLPs or norms that is not the library's or PyTorch's has to be passed here.

    Raises:
        ValueError: a network of another kind, or a class that is not passed.

    Example:
        >>> from starlayers.vision import architecture
        >>> described = architecture(StarNet(8, (1,), stage_strides=(2,)))
        >>> from_architecture(described, num_classes=3).head.out_features
        3
    """
    return build(StarNet, architecture, kwargs)
