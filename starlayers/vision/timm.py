"""Registration of the StarNets with timm, as `starlayers_starnet_s1` and so on.

Importing this module registers them. They are built by timm's own factory and take its arguments:
`features_only` and `out_indices`, `checkpoint_path`, `pretrained_cfg_overlay`, `bn_momentum` and
the rest; `timm.list_models("starlayers_*")` lists them. Names of timm's own stay as they are.

Example:
    >>> import timm
    >>> import starlayers.vision.timm
    >>> model = timm.create_model("starlayers_starnet_s050", num_classes=10)
    >>> timm.data.resolve_model_data_config(model)["interpolation"]
    'bicubic'
    >>> backbone = timm.create_model("starlayers_starnet_s050", features_only=True)
    >>> backbone.feature_info.channels()
    [16, 32, 64, 128]
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers.create_norm import get_norm_layer
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("starlayers.vision.timm needs timm: pip install timm") from error

from starlayers.vision.checkpoints import unwrap
from starlayers.vision.models import MODELS, STARNETS, Factory
from starlayers.vision.names import adopt_names
from starlayers.vision.starnet import StarNet

__all__: list[str] = []  # register_model adds the names


def _config(hub_id: str | None) -> dict[str, Any]:
    """Return timm's description of published weights, and of the images they want."""
    return {
        "url": "",
        "hf_hub_id": hub_id,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head",
        "paper_ids": "arXiv:2403.19967",
        "paper_name": "Rewrite the Stars",
        "origin_url": "https://github.com/ma-xu/Rewrite-the-Stars",
        "license": "apache-2.0",
    }


# register_model looks for a table of this name
default_cfgs = generate_default_cfgs(
    {
        f"starlayers_{name}.{'in1k' if variant.hub_id else 'untrained'}": _config(variant.hub_id)
        for name, variant in STARNETS.items()
    }
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return timm's, the authors' or our weights under our names; timm calls it to load a file.

    Example:
        >>> state = {"state_dict": {"module.stem.0.bn.bias": Tensor([1.0])}}
        >>> list(checkpoint_filter_fn(state, StarNet(8, (1,), stage_strides=(2,))))
        ['stem.bn.bias']
    """
    weights = unwrap(state)
    adopt_names(weights)
    return weights


def _norm_layer(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `kwargs` with timm's options of norms joined into `norm_layer`."""
    options = {
        name: kwargs.pop(f"bn_{name}") for name in ("momentum", "eps") if f"bn_{name}" in kwargs
    }
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d
    if "norm_layer" in kwargs:
        norm_layer = get_norm_layer(kwargs["norm_layer"])
    if options or "norm_layer" in kwargs:
        kwargs["norm_layer"] = partial(norm_layer, **options)
    return kwargs


def _entry_point(name: str, factory: Factory) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        shape = STARNETS[name]._asdict()
        shape.pop("hub_id")
        arguments = shape | _norm_layer(kwargs)
        stages = tuple(range(len(arguments["depths"])))
        model: nn.Module = build_model_with_cfg(
            StarNet,
            create.__name__,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": stages, "flatten_sequential": True},
            **arguments,
        )
        return model

    create.__name__ = create.__qualname__ = f"starlayers_{name}"
    create.__module__ = __name__
    create.__doc__ = factory.__doc__
    return create


for _name, _factory in MODELS.items():
    register_model(_entry_point(_name, _factory))
