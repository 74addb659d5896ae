"""StarNets for torch.hub.

    import torch
    model = torch.hub.load("OWNER/REPOSITORY", "starnet_s1", pretrained=True)
    model = torch.hub.load("path/of/a/checkout", "starnet_s050", source="local", num_classes=10)

The entry points are those of `starlayers.vision`, with their arguments.
"""

from starlayers.vision import (
    starnet_s050,
    starnet_s1,
    starnet_s2,
    starnet_s3,
    starnet_s4,
    starnet_s100,
    starnet_s150,
)

dependencies = ["torch", "einops"]

__all__ = [
    "starnet_s050",
    "starnet_s1",
    "starnet_s2",
    "starnet_s3",
    "starnet_s4",
    "starnet_s100",
    "starnet_s150",
]
