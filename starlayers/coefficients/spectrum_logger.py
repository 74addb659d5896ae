"""Logs of the spectra of star layers during training."""

import os
from typing import TYPE_CHECKING, Any

from torch import nn

from starlayers.checks import positive_int
from starlayers.coefficients.optional import require
from starlayers.coefficients.spectrum import spectrum

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

__all__ = ["SpectrumLogger"]


class SpectrumLogger:
    """Logger of the summaries of every star layer's `Spectrum` during training.

    Call `step(step)` in the training loop, or use a callback for transformers' `Trainer` or
    stable-baselines3. The scalars are named
    "coefficients/<layer>/<number>", and "coefficients/mean/<number>" for the mean over layers; they
    are written to `writer` and kept in `history`, pairs of step and scalars.

    Args:
        model: a model with star layers.
        writer: an object with `add_scalar(tag, value, step)`, a folder for TensorBoard, or `None`.
        every: number of steps between two measurements; the first call measures.
        entropy: include the entropy, which takes `(d + 1)^2` operations a channel.

    Raises:
        ImportError: `writer` is a folder and tensorboard is not installed.
        TypeError, ValueError: `every` is not an integer of at least 1, or there are no star layers.

    Example:
        >>> from starlayers import StarOp
        >>> model = nn.Sequential(StarOp(8, 16), StarOp(16, 4))
        >>> log = SpectrumLogger(model, every=10)
        >>> for step in range(25):
        ...     _ = log.step(step)
        >>> [step for step, _ in log.history]
        [0, 10, 20]
        >>> 0 < log.history[0][1]["coefficients/mean/participation"] < 1
        True
    """

    def __init__(
        self, model: nn.Module, writer: Any = None, every: int = 100, *, entropy: bool = False
    ) -> None:
        self.every = positive_int("SpectrumLogger", "every", every)
        self.model, self.entropy = model, entropy
        spectrum(model, entropy=False)  # an error now rather than in the middle of training
        if isinstance(writer, str | os.PathLike):
            require("SpectrumLogger", "torch.utils.tensorboard", "tensorboard", extra="plots")
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(os.fspath(writer))
        self.writer = writer
        self.history: list[tuple[int, dict[str, float]]] = []
        self._next: int | None = None

    def step(self, step: int) -> dict[str, float] | None:
        """Measure and log if `every` steps have passed; return the scalars, or `None`."""
        if self._next is not None and step < self._next:
            return None
        # the next multiple: steps may increase by more than 1, with several environments say
        self._next = (step // self.every + 1) * self.every
        scalars = self.measure()
        self.history.append((step, scalars))
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
        return scalars

    def measure(self) -> dict[str, float]:
        """Return the scalars of the model with its present weights."""
        summaries = {
            name or type(self.model).__name__: layer.summary()
            for name, layer in spectrum(self.model, entropy=self.entropy).items()
        }
        numbers = next(iter(summaries.values()))
        if len(summaries) > 1:
            layers = list(summaries.values())
            summaries["mean"] = {n: sum(s[n] for s in layers) / len(layers) for n in numbers}
        return {
            f"coefficients/{layer}/{n}": v for layer, s in summaries.items() for n, v in s.items()
        }

    def as_trainer_callback(self, trainer: Any = None) -> Any:
        """Return a callback for transformers' `Trainer` that logs by its global step.

        Args:
            trainer: trainer whose `log` also gets the scalars, and so its log history and the
                services it reports to: `trainer.add_callback(logger.as_trainer_callback(trainer))`.

        Raises:
            ImportError: transformers is not installed.
        """
        require("as_trainer_callback", "transformers", extra="nlp")
        from transformers import TrainerCallback

        logger = self

        class SpectrumCallback(TrainerCallback):  # type: ignore[misc]
            """Callback that measures after a step of the optimizer, on the main process."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not state.is_world_process_zero:
                    return
                scalars = logger.step(state.global_step)
                if scalars is not None and trainer is not None:
                    trainer.log(scalars)

        return SpectrumCallback()

    def as_sb3_callback(self) -> "BaseCallback":
        """Return a callback for stable-baselines3 that logs by environment steps.

        The model's own logger gets the scalars, and writes them when it dumps.

        Raises:
            ImportError: stable-baselines3 is not installed.
        """
        require("as_sb3_callback", "stable_baselines3.common.callbacks", extra="rl")
        from stable_baselines3.common.callbacks import BaseCallback

        logger = self

        class SpectrumCallback(BaseCallback):
            """Callback that measures after a step of the environments."""

            def _on_step(self) -> bool:
                for tag, value in (logger.step(self.num_timesteps) or {}).items():
                    self.logger.record(tag, value)
                return True

        return SpectrumCallback()
