"""StarNets and star blocks in the models of ultralytics: YOLO by a YAML file.

Importing this module adds names, and replaces none: `StarCSP` to the classes that rows of a YAML
file may name, and the StarNets, as `starlayers_starnet_s1` and so on, to torchvision's registry of
models, from which a row `TorchVision` takes them. Files of `model.save` and of a training load
again after the same import. Two YAML files come with it: `model_yaml`.

Example:
    >>> import starlayers.vision.yolo
    >>> from ultralytics import YOLO
    >>> model = YOLO(starlayers.vision.yolo.model_yaml("yolo11n-starcsp"))
    >>> {type(m).__name__ for m in model.model.model} >= {"Conv", "StarCSP", "Detect"}
    True
"""

try:
    from ultralytics.nn import tasks
except ImportError as error:
    raise ImportError(
        "starlayers.vision.yolo needs ultralytics: pip install ultralytics (on a machine without "
        "a screen ultralytics-opencv-headless)"
    ) from error

from starlayers.vision.yolo.csp import StarCSP
from starlayers.vision.yolo.names import add_name, add_starnets, model_yaml

__all__ = ["StarCSP", "model_yaml"]

add_name(tasks, "StarCSP", StarCSP)
add_starnets()
