"""The spectra of a model's star layers during training: TensorBoard, Trainer, stable-baselines3."""

import os
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from starlayers.coefficients.optional import require
from starlayers.coefficients.spectrum import spectrum
from starlayers.modules import positive_int

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

__all__ = ["SpectrumLogger"]


class Writer(Protocol):
    """What is asked of a writer of scalars, such as TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Store a number of a step."""


class SpectrumLogger:
    """Logs the summary of every star layer's `Spectrum` while a model is trained.

    Call `step(step)` in the loop, or take a callback. The scalars are named
    "coefficients/<layer>/<number>", and "coefficients/mean/<number>" for the mean over layers; they
    are written to `writer` and kept in `history`, pairs of step and scalars.

    Args:
        model: a model with star layers.
        writer: something with `add_scalar(tag, value, step)`, a folder for TensorBoard, or `None`.
        every: steps between two measurements; the first call is measured.
        entropy: whether to include the entropy, which costs `(d + 1)^2` operations a channel.

    Raises:
        ImportError: a folder is given and tensorboard is not there.
        TypeError, ValueError: `every` is no integer of at least 1, or there are no star layers.

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
        self,
        model: nn.Module,
        writer: "Writer | str | os.PathLike[str] | None" = None,
        every: int = 100,
        *,
        entropy: bool = False,
    ) -> None:
        self.every = positive_int("SpectrumLogger", "every", every)
        self.model, self.entropy = model, entropy
        spectrum(model, entropy=False)  # an error now rather than in the middle of training
        self.writer: Writer | None = (
            _summary_writer(writer) if isinstance(writer, str | os.PathLike) else writer
        )
        self.history: list[tuple[int, dict[str, float]]] = []
        self._next: int | None = None

    def step(self, step: int) -> dict[str, float] | None:
        """Measure and log where `every` steps have passed; returns the scalars, or `None`."""
        if self._next is not None and step < self._next:
            return None
        # the next multiple, because steps may come in strides: environments, accumulation
        self._next = (step // self.every + 1) * self.every
        scalars = self.measure()
        self.history.append((step, scalars))
        if self.writer is not None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
        return scalars

    def measure(self) -> dict[str, float]:
        """The scalars of the model as it is now."""
        summaries = {
            name or type(self.model).__name__: found.summary()
            for name, found in spectrum(self.model, entropy=self.entropy).items()
        }
        numbers = next(iter(summaries.values()))
        if len(summaries) > 1:
            summaries["mean"] = {
                n: sum(s[n] for s in summaries.values()) / len(summaries) for n in numbers
            }
        return {
            f"coefficients/{layer}/{n}": v for layer, s in summaries.items() for n, v in s.items()
        }

    def as_trainer_callback(self, trainer: Any = None) -> Any:
        """A callback for transformers' `Trainer`, by its global step.

        Args:
            trainer: whose `log` gets the scalars as well, and with it the log history and whatever
                it reports to: `trainer.add_callback(logger.as_trainer_callback(trainer))`.

        Raises:
            ImportError: transformers is not there.
        """
        require("as_trainer_callback", "transformers", extra="nlp")
        from transformers import TrainerCallback

        logger = self

        class SpectrumCallback(TrainerCallback):  # type: ignore[misc]
            """Measures after a step of the optimizer, on the main process."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not state.is_world_process_zero:
                    return
                scalars = logger.step(state.global_step)
                if scalars is not None and trainer is not None:
                    trainer.log(scalars)

        return SpectrumCallback()

    def as_sb3_callback(self) -> "BaseCallback":
        """A callback for stable-baselines3's `learn`, by its number of environment steps.

        The scalars go to the model's own logger, and from there to its TensorBoard, at its dumps.

        Raises:
            ImportError: stable-baselines3 is not there.
        """
        require("as_sb3_callback", "stable_baselines3.common.callbacks", extra="rl")
        from stable_baselines3.common.callbacks import BaseCallback

        logger = self

        class SpectrumCallback(BaseCallback):
            """Measures after a step of the environments."""

            def _on_step(self) -> bool:
                for tag, value in (logger.step(self.num_timesteps) or {}).items():
                    self.logger.record(tag, value)
                return True

        return SpectrumCallback()


def _summary_writer(folder: "str | os.PathLike[str]") -> Writer:
    require("SpectrumLogger", "torch.utils.tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Writer = SummaryWriter(os.fspath(folder))
    return writer
