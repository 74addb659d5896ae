"""Registration of the StarNets with timm, as `starlayers_starnet_s1` and so on.

Importing this module registers them. Names of timm's own stay as they are.

Example:
    >>> import timm
    >>> import starlayers.vision.timm
    >>> model = timm.create_model("starlayers_starnet_s050", num_classes=10)
    >>> timm.data.resolve_model_data_config(model)["interpolation"]
    'bicubic'
"""

from typing import Any

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import register_model
except ImportError as error:
    raise ImportError("starlayers.vision.timm needs timm: pip install timm") from error

from starlayers.vision.models import MODELS, Factory
from starlayers.vision.starnet import StarNet

__all__: list[str] = []  # register_model adds the names

# timm.create_model passes these to every model function, for its own loading of weights
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _entry_point(name: str, factory: Factory) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> StarNet:
        kwargs = {k: v for k, v in kwargs.items() if k not in _TIMM_ONLY}
        if kwargs.pop("features_only", False):
            raise ValueError(
                f"{create.__name__} has no features_only; call model.forward_intermediates(x)"
            )
        model = factory(pretrained, **kwargs)
        model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
            "input_size": (model.in_chans, 224, 224),
            "num_classes": model.num_classes,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.conv",
            "classifier": "head",
        }
        return model

    create.__name__ = create.__qualname__ = f"starlayers_{name}"
    create.__module__ = __name__
    create.__doc__ = factory.__doc__
    return create


for _name, _factory in MODELS.items():
    register_model(_entry_point(_name, _factory))
