"""StarNet, DemoNet and their parts for images.

Install with `pip install 'starlayers[vision]'`.
"""

try:
    import einops as _einops  # noqa: F401
except ImportError as error:
    raise ImportError("starlayers.vision needs einops: pip install 'starlayers[vision]'") from error

from starlayers.vision.blocks import ConvNorm, StarBlock2d
from starlayers.vision.checkpoints import LoadReport, load_checkpoint, to_timm_state_dict
from starlayers.vision.demonet import DemoNet
from starlayers.vision.deploy.convolutions import portable
from starlayers.vision.deploy.exporting import ExportReport, export
from starlayers.vision.models import (
    STARNETS,
    from_architecture,
    starnet_s050,
    starnet_s1,
    starnet_s2,
    starnet_s3,
    starnet_s4,
    starnet_s100,
    starnet_s150,
)
from starlayers.vision.norm_statistics import reestimate_norms
from starlayers.vision.starnet import StarNet
from starlayers.vision.trained import TrainedNet, load_run
from starlayers.vision.weights import (
    architecture,
    read_architecture,
    read_metadata,
    save_weights,
)

__all__ = [
    "STARNETS",
    "ConvNorm",
    "DemoNet",
    "ExportReport",
    "LoadReport",
    "StarBlock2d",
    "StarNet",
    "TrainedNet",
    "architecture",
    "export",
    "from_architecture",
    "load_checkpoint",
    "load_run",
    "portable",
    "read_architecture",
    "read_metadata",
    "reestimate_norms",
    "save_weights",
    "starnet_s050",
    "starnet_s1",
    "starnet_s2",
    "starnet_s3",
    "starnet_s4",
    "starnet_s100",
    "starnet_s150",
    "to_timm_state_dict",
]
