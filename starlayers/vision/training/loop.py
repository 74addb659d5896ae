"""The training loop for image classifiers: resumable, distributed, deterministic per seed."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from tqdm import tqdm

from starlayers.datasets.images import ImageData
from starlayers.vision.training.augment import Augmented, Shuffled, image_transform, mixing
from starlayers.vision.training.recipe import TrainConfig, averaged, param_groups, scheduler
from starlayers.vision.training.rundir import RunDir, process_state

__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `history` has one dict of metrics per epoch, the last epoch last.

    `finished` is False when Ctrl-C stopped it; `confusion` counts (true, predicted) of the last
    validation; `seconds` is the training time without validation.

    Example:
        >>> TrainResult([{"test_accuracy": 0.9}], None, True, 1.0).test_accuracy
        0.9
    """

    history: list[dict[str, Any]]
    confusion: Tensor | None
    finished: bool
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """Accuracy of the last validation, 0 to 1; NaN before the first."""
        return float(self.history[-1]["test_accuracy"]) if self.history else math.nan


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    run_dir: RunDir | None = None,
    *,
    progress: bool = True,
) -> TrainResult:
    """Train `model` on `data` and validate it after every epoch.

    Runs on whatever device and however many processes accelerate finds (`torchrun` for several).
    With a `run_dir` it writes metrics, weights and a state from which an interrupted run, killed
    or stopped with Ctrl-C, goes on to the numbers of an undisturbed one: order and augmentation
    depend on (seed, epoch, image) and the rest of the randomness on (seed, step).

    Args:
        model: from images (N, C, H, W), normalised by `data.mean` and `std`, to logits.
        data: what `load_images` returns.
        config: the recipe.
        run_dir: where results go, `None` for nowhere; a state in it is resumed.
        progress: show a bar with loss, accuracy and images per second.

    Raises:
        ValueError: more images per step than there are.

    Example:
        >>> from starlayers.vision import StarNet
        >>> from starlayers.datasets.images import load_images
        >>> net = StarNet(8, (1, 1), num_classes=10, in_chans=1, stem_stride=1,
        ...               stage_strides=(1, 2))
        >>> result = train(net, load_images("digits"), TrainConfig(epochs=1), progress=False)
        >>> 0 <= result.test_accuracy <= 1
        True
    """
    return _Run(model, data, config, run_dir, progress).run()


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Progress:
    """Where the run is; saved with its state."""

    def __init__(self) -> None:
        self.epoch, self.step, self.seconds = 0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        config: TrainConfig,
        run_dir: RunDir | None,
        progress: bool,
    ) -> None:
        self.config, self.data, self.run_dir = config, data, run_dir
        set_seed(config.seed)
        # accelerate remembers the first precision of a process and refuses another one
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=process_state().device.type == "cpu",
            mixed_precision="bf16" if config.amp else "no",
            dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True),
        )
        self.bar = progress and self.accelerator.is_main_process
        device = self.accelerator.device
        if config.compile:
            model.compile()
        optimizer = torch.optim.AdamW(
            param_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital'")  # torchdata's own business
            self.model, self.optimizer, self.train_loader = self.accelerator.prepare(
                model, optimizer, self._train_loader()
            )
        # not through prepare(): the state of the run has no place for a validation half way
        self.test_loader = prepare_data_loader(
            self._loader(data.test, 512), device, put_on_device=True
        )
        self.scheduler = scheduler(
            self.optimizer.optimizer, config, config.epochs * len(self.train_loader)
        )
        self.mix = mixing(len(data.classes), mixup=config.mixup, cutmix=config.cutmix)
        self.mean = torch.tensor(data.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(data.std, device=device).view(-1, 1, 1)
        classes = len(data.classes)
        # gathered by hand: the bar, shown by one process, must not wait for the others
        metric: dict[str, Any] = {"sync_on_compute": False}
        self.loss = MeanMetric(**metric).to(device)
        self.accuracy = MulticlassAccuracy(classes, average="micro", **metric).to(device)
        self.confusion = MulticlassConfusionMatrix(classes, **metric).to(device)
        for m in (self.loss, self.accuracy):
            m.persistent(True)  # an epoch resumed half way reports its first half too
        plain = self.accelerator.unwrap_model(self.model)
        self.ema = averaged(plain, config.ema)
        self.progress = _Progress()
        parts = (self.scheduler, self.progress, self.loss, self.accuracy)
        self.accelerator.register_for_checkpointing(*parts, *([self.ema] if config.ema else []))
        self.history: list[dict[str, Any]] = []
        self.interrupted = self.stop = False

    def _train_loader(self) -> Any:
        c, data = self.config, self.data
        images: Any = data.train
        if len(images) < c.batch_size:
            raise ValueError(
                f"batch_size={c.batch_size} is more than the {len(images)} training images; "
                "choose a smaller one"
            )
        transform = image_transform(
            data.shape[-1], flip=c.flip, crop=c.crop, randaugment=c.randaugment
        )
        self.augmented = Augmented(images, transform, c.seed) if transform else None
        order = Shuffled(len(images), c.seed)
        return self._loader(self.augmented or images, c.batch_size, sampler=order, drop_last=True)

    def _loader(self, images: Any, batch_size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size,
            num_workers=self.config.workers,
            worker_init_fn=_leave_interrupts_to_the_parent,
            **options,
        )

    def run(self) -> TrainResult:
        if self.run_dir:
            self.run_dir.load(self.accelerator)
            self.history = self.run_dir.metrics(up_to_step=self.progress.step)
        with self._finish_step_on_interrupt():
            for epoch in range(self.progress.epoch, self.config.epochs):
                if not self._train_epoch(epoch):
                    break
                self._end_epoch()
                self._agree_on_stop()
                if self.stop:
                    break
        finished = self.progress.epoch == self.config.epochs
        if finished and not self.confusion.update_called:  # killed after the last state
            self._validate()
        confusion = self.confusion.compute().cpu() if self.confusion.update_called else None
        result = TrainResult(self.history, confusion, finished, self.progress.seconds)
        if self.run_dir and finished and self.accelerator.is_main_process:
            weights = self._validated().state_dict()
            self.run_dir.finish(weights, self.history, confusion, self.data.classes)
        return result

    def _train_epoch(self, epoch: int) -> bool:
        """Train to the end of `epoch`; False when interrupted before it."""
        if self.augmented:
            self.augmented.set_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        self.model.train()
        total = len(self.train_loader)
        done = self.progress.step - epoch * total
        label = f"epoch {epoch + 1}/{self.config.epochs}"
        bar = tqdm(total=total, initial=done, desc=label, disable=not self.bar, unit="step")
        began = time.perf_counter()
        with bar:
            for images, labels in self.train_loader:
                self._step(images, labels)
                took, began = time.perf_counter() - began, time.perf_counter()
                self.progress.seconds += took
                bar.update()
                self._show(bar, len(images) / took)
                at_end = self.progress.step == (epoch + 1) * total
                self._agree_on_stop()
                if not at_end and (self.stop or self.progress.step % self.config.save_every == 0):
                    self._save()
                if self.stop and not at_end:
                    return False
        return True

    def _step(self, images: Tensor, labels: Tensor) -> None:
        c = self.config
        key = (c.seed, self.progress.step, self.accelerator.process_index)
        torch.manual_seed(hash(key) & (2**63 - 1))
        images, targets = self._normalise(images), labels
        if self.mix:
            images, targets = self.mix(images, labels)
        with self.accelerator.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=c.label_smoothing)
        self.accelerator.backward(loss)
        if c.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if c.ema:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        self.loss.update(loss.detach())
        self.accuracy.update(logits.detach().float(), labels)
        self.progress.step += 1

    def _end_epoch(self) -> None:
        test = self._validate()
        self.progress.epoch += 1
        line = {
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": self._over_processes(self.loss),
            "train_accuracy": self._over_processes(self.accuracy),
            **test,
            "seconds": round(self.progress.seconds, 2),
        }
        self.loss.reset()
        self.accuracy.reset()
        self.history.append(line)
        if self.run_dir and self.accelerator.is_main_process:
            self.run_dir.write_metrics(self.history)
        self._save()
        if self.bar:
            tqdm.write(
                f"epoch {line['epoch']}: train loss {line['train_loss']:.4f}, "
                f"test accuracy {line['test_accuracy']:.2%}, test loss {line['test_loss']:.4f}"
            )

    def _over_processes(self, metric: MeanMetric | MulticlassAccuracy) -> float:
        # a plain mean is exact, since every process had equally many images
        return float(self.accelerator.reduce(metric.compute(), "mean"))

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        model = self._validated()
        model.eval()
        self.confusion.reset()
        total, count = 0.0, 0
        for images, labels in self.test_loader:
            with self.accelerator.autocast():
                logits = model(self._normalise(images))
            logits, labels = self.accelerator.gather_for_metrics((logits.float(), labels))
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            self.confusion.update(logits, labels)
        matrix = self.confusion.compute()
        return {"test_loss": total / count, "test_accuracy": matrix.trace().item() / count}

    def _validated(self) -> nn.Module:
        plain = self.accelerator.unwrap_model(self.model)
        return cast(nn.Module, self.ema.module if self.config.ema else plain)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def _save(self) -> None:
        if self.run_dir:
            self.run_dir.save(self.accelerator, self.progress.step)

    def _show(self, bar: Any, images_per_second: float) -> None:
        if self.bar and self.progress.step % 10 == 0:
            rate = images_per_second * self.accelerator.num_processes
            loss, accuracy = self.loss.compute(), self.accuracy.compute()
            bar.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.1%}, {rate:.0f} images/s")

    def _agree_on_stop(self) -> None:
        # all processes must leave the loop at the same step, or the others wait for ever
        self.stop = self.interrupted
        if self.accelerator.num_processes > 1:
            if self.interrupted:
                self.accelerator.set_trigger()
            self.stop = self.accelerator.check_trigger()

    @contextmanager
    def _finish_step_on_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return

        def on_interrupt(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt  # asked twice
            self.interrupted = True

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
