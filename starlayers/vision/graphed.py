"""Networks whose calls are replayed as CUDA graphs."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starlayers.dispatch import Plan
from starlayers.vision.graphs import Graphs
from starlayers.vision.training_graph import TrainingGraph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Graphed"]


class Graphed(nn.Module):
    """Network that keeps CUDA graphs of inference and of training steps, where they were asked for.

    Its forward asks `_graphs()` first.
    """

    def _graphs(self) -> Graphs | TrainingGraph | None:
        """Return the CUDA graphs that were asked for, if there are any those of the mode."""
        if torch.compiler.is_compiling():
            return None
        graphs = self.__dict__.get("graphs")
        return self.__dict__.get("training_graph", graphs) if self.training else graphs

    def plan(self, x: Tensor) -> Plan | None:
        """Return the plan for images `x`: a CUDA graph or why not; `None` if none was asked for."""
        graphs = self._graphs()
        if graphs is None:
            return None
        reason = graphs.reason(self, x)
        return Plan("step by step", reason) if reason else Plan("CUDA graph")

    def train(self, mode: bool = True) -> "Self":
        """Set the mode of training, and drop graphs of inference, which are captured again."""
        graphs = self.__dict__.get("graphs")
        if graphs is not None:
            graphs.forget()
        return super().train(mode)

    def graph_training(self, x: Tensor) -> "Self":
        """Capture a training step on images like `x` as CUDA graphs; steps replay them from now on.

        The forward and the backward are then one launch each, whatever the host is doing. Images
        of another shape, type or autocast, such as a last smaller batch, run as before, and
        `explain(model, x)` says why. Call it in training mode, under the autocast of the steps,
        before the network is wrapped for data-parallel training, and again after it was changed
        (`.to`, another head, frozen parameters). Second derivatives are not captured.

        Args:
            x: images (N, in_chans, H, W) on a GPU.

        Returns:
            The model. Buffers and random numbers are as they were.

        Raises:
            RuntimeError: the step cannot be captured, with the reason.

        Example:
            >>> from starlayers.vision import StarNet
            >>> model = StarNet(8, (1,), stage_strides=(2,))
            >>> model.graph_training(torch.randn(2, 3, 32, 32))
            Traceback (most recent call last):
            ...
            RuntimeError: StarNet: no CUDA graph of training: input is a Tensor on 'cpu', and ...
        """
        self.training_graph = TrainingGraph()  # a part of the state that is captured
        try:
            self.training_graph.capture(self, x)
        except BaseException:
            del self.training_graph
            raise
        return self
