"""Description and choice of a network's feature maps, as timm's backbones have them."""

from collections.abc import Sequence
from typing import Any

__all__ = ["FeatureInfo", "stage_numbers"]


class FeatureInfo(list[dict[str, Any]]):
    """List of what a network says about the feature map of each stage.

    An entry has `num_chs` (channels), `reduction` (pixels of the image for each of the map's, in
    both directions) and `module` (name of the stage). The methods are those of timm's class of this
    name; they take a number or a sequence of numbers of stages, `None` for all.

    Example:
        >>> info = FeatureInfo([{"num_chs": 16, "reduction": 4, "module": "stages.0"}])
        >>> info.channels(), info.reduction(0), info[0]["module"]
        ([16], 4, 'stages.0')
    """

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return an entry's value by key: of one stage, or a list of those of several."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the channels of the maps."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return how many pixels of the image a pixel of the maps stands for."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the names of the modules that compute the maps."""
        return self.get("module", idx)


def stage_numbers(layer: str, stages: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return the numbers of the stages that are asked for, in the order asked for.

    Args:
        layer: name of the network, for the error.
        stages: how many it has.
        indices: `None` for all, an int for that many last ones, or a sequence of numbers, negative
            ones counting from the end.

    Raises:
        ValueError: a number out of range, or none at all.

    Example:
        >>> stage_numbers("StarNet", 4, 2), stage_numbers("StarNet", 4, (-1, 0))
        ([2, 3], [3, 0])
    """
    listed: Any = range(stages) if indices is None else indices
    if isinstance(listed, int):
        listed = range(stages - listed, stages) if 0 < listed <= stages else ()
    numbers = [i + stages if i < 0 else i for i in listed]
    if not numbers or not set(numbers) <= set(range(stages)):
        raise ValueError(
            f"{layer} has stages 0 to {stages - 1}, got indices={indices!r} (an int asks for that "
            "many last stages)"
        )
    return numbers
