"""Training loop of image classifiers: resumable, distributed, deterministic."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
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

from starlayers.vision.norm_statistics import frozen_norms, reestimate_norms
from starlayers.vision.training.augment import (
    Augmented,
    ShuffleSampler,
    batch_transform,
    image_transform,
    mix_seeds,
)
from starlayers.vision.training.data import TrainData, class_weights, labels_of
from starlayers.vision.training.recipe import TrainConfig, ema_model, lr_scheduler, param_groups
from starlayers.vision.training.rundir import RunDir, process_state

VALIDATION_BATCH = 512


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        history: metrics of each epoch, in order: `epoch`, `step` (so far), `lr` (of the next
            step), `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy`, `seconds` (of
            training so far).
        confusion: counts (true class, predicted class) of the last validation; `None` before it.
        finished: False if Ctrl-C stopped the run.
        seconds: time of training, without validation, of all parts of a resumed run.

    Example:
        >>> history = [{"test_accuracy": 0.8}, {"test_accuracy": 0.9}]
        >>> TrainResult(history, None, finished=True, seconds=1.0).test_accuracy
        0.9
    """

    history: list[dict[str, Any]]
    confusion: Tensor | None
    finished: bool
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """Accuracy of the last validation, 0 to 1; NaN before it."""
        return float(self.history[-1]["test_accuracy"]) if self.history else math.nan


def train(
    model: nn.Module,
    data: TrainData,
    config: TrainConfig,
    run_dir: RunDir | None = None,
    *,
    progress: bool = True,
) -> TrainResult:
    """Train `model` on `data` and validate it after every epoch.

    Uses the device and the processes that accelerate finds (`torchrun` starts several). With a
    `run_dir` it writes metrics, weights and a state. A run that was killed or stopped with Ctrl-C
    goes on from that state to the numbers of an undisturbed one: order and augmentation depend on
    (seed, epoch, image), and the rest of the randomness on (seed, step). Ctrl-C finishes the step;
    a second one stops at once.

    Args:
        model: from images (N, C, H, W), normalised by `data.mean` and `data.std`, to logits
            (N, classes).
        data: training and test images, for example of `load_images`.
        config: the recipe.
        run_dir: folder for the results, `None` for none; a state in it is resumed.
        progress: show a bar with loss, accuracy and images per second.

    Raises:
        TypeError: `run_dir` is not a `RunDir`.
        ValueError: `config.batch_size` is more than the number of training images, all of them
            are of one value, or the model has another number of outputs than the data has classes.

    Example:
        >>> from starlayers.vision import StarNet
        >>> from starlayers.datasets.images import load_images
        >>> model = StarNet(8, (1, 1), num_classes=10, in_chans=1, stem_stride=1,
        ...                 stage_strides=(1, 2))
        >>> config = TrainConfig(epochs=1, batch_size=64, lr=2e-2)
        >>> result = train(model, load_images("digits"), config, progress=False)
        >>> result.finished, result.history[-1]["step"]  # 1,437 images in batches of 64
        (True, 23)
    """
    if not (run_dir is None or isinstance(run_dir, RunDir)):
        raise TypeError(
            f"train: run_dir must be a RunDir or None, got {run_dir!r}; make one by "
            f"RunDir({str(run_dir)!r}, vars(config), resume=False)"
        )
    if max(data.std) <= 1e-6:
        raise ValueError(
            f"train: the training images have the deviations {tuple(data.std)}: all pixels are of "
            "one value, and there is nothing to learn; look at the files"
        )
    return _Run(model, data, config, run_dir, progress).run()


def _ignore_interrupts(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; only the parent acts on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Run:
    """One call of `train`: model, optimizer, data loaders, metrics and progress."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainData,
        config: TrainConfig,
        run_dir: RunDir | None,
        progress: bool,
    ) -> None:
        self.config, self.data, self.run_dir = config, data, run_dir
        set_seed(config.seed)
        # accelerate keeps the precision of the first run in a process and refuses another one
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=process_state().device.type == "cpu",
            mixed_precision="bf16" if config.amp else "no",
            dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True),
        )
        self.loader: Callable[..., DataLoader[Any]] = partial(
            DataLoader, num_workers=config.workers, worker_init_fn=_ignore_interrupts
        )
        self.show_progress = progress and self.accelerator.is_main_process
        device = self.accelerator.device
        if config.compile:
            model.compile()
        optimizer = torch.optim.AdamW(
            param_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital'")  # raised inside torchdata
            self.model, self.optimizer, self.train_loader = self.accelerator.prepare(
                model, optimizer, self._train_loader()
            )
        # not through prepare(), which would save the position of a validation with the state
        self.test_loader = prepare_data_loader(
            self.loader(data.test, VALIDATION_BATCH), device, put_on_device=True
        )
        steps = config.epochs * len(self.train_loader)
        self.scheduler = lr_scheduler(self.optimizer.optimizer, config, steps)
        classes = len(data.classes)
        self.class_weights = None
        if config.balance == "loss":
            self.class_weights = class_weights(self.labels, classes).to(device)
        self.mix = batch_transform(classes, mixup=config.mixup, cutmix=config.cutmix)
        self.mean = torch.tensor(data.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(data.std, device=device).view(-1, 1, 1)
        # not synchronised by compute(): the progress bar is shown by one process, which must not
        # wait for the others
        options: dict[str, Any] = {"sync_on_compute": False}
        self.loss = MeanMetric(**options).to(device)
        self.accuracy = MulticlassAccuracy(classes, average="micro", **options).to(device)
        self.confusion = MulticlassConfusionMatrix(classes, **options).to(device)
        for metric in (self.loss, self.accuracy):
            metric.persistent(True)  # an epoch resumed half way reports its first half too
        self.ema = ema_model(self.accelerator.unwrap_model(self.model), config.ema)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        state = (self.scheduler, self, self.loss, self.accuracy)
        self.accelerator.register_for_checkpointing(*state, *([self.ema] if config.ema else []))
        self.history: list[dict[str, Any]] = []
        self.interrupted = False

    def state_dict(self) -> dict[str, Any]:
        """Return the finished epochs, steps and seconds, which are saved with the state."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

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
        # BatchNorm cannot be trained on one value; several processes need equally many images
        drop = len(images) % c.batch_size == 1 or self.accelerator.num_processes > 1
        sampler = self._sampler()
        return self.loader(self.augmented or images, c.batch_size, sampler=sampler, drop_last=drop)

    def _sampler(self) -> ShuffleSampler:
        images: Any = self.data.train
        weights = None
        if self.config.balance == "sampling":
            labels = self.labels
            weights = class_weights(labels, len(self.data.classes))[labels]
        return ShuffleSampler(len(images), self.config.seed, weights)

    @cached_property
    def labels(self) -> Tensor:
        """Class numbers of the training images."""
        return labels_of(self.data.train)

    def run(self) -> TrainResult:
        if self.run_dir:
            self.run_dir.load(self.accelerator)
            self.history = self.run_dir.metrics(up_to_step=self.step)
        with self._finish_step_on_interrupt():
            for epoch in range(self.epoch, self.config.epochs):
                if not self._train_epoch(epoch):
                    break
                self._end_epoch()
                if self._agree_on_stop():
                    break
        finished = self.epoch == self.config.epochs
        if finished and not self.confusion.update_called:  # resumed after the last epoch
            self._validate()
        confusion = self.confusion.compute().cpu() if self.confusion.update_called else None
        result = TrainResult(self.history, confusion, finished, self.seconds)
        if self.run_dir and finished and self.accelerator.is_main_process:
            self.run_dir.finish(self._validated_model(), self.data, self.history, confusion)
        return result

    def _train_epoch(self, epoch: int) -> bool:
        """Train to the end of `epoch`; return False if interrupted before it."""
        if self.augmented:
            self.augmented.set_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        self.model.train()
        for norm in frozen_norms(self.model):
            norm.eval()  # a frozen part is what it was, its statistics too
        steps = len(self.train_loader)
        done = self.step - epoch * steps
        label = f"epoch {epoch + 1}/{self.config.epochs}"
        began = time.perf_counter()
        with tqdm(
            total=steps, initial=done, desc=label, disable=not self.show_progress, unit="step"
        ) as bar:
            for images, labels in self.train_loader:
                self._step(images, labels)
                seconds, began = time.perf_counter() - began, time.perf_counter()
                self.seconds += seconds
                bar.update()
                self._show(bar, len(images) / seconds)
                stop = self._agree_on_stop()
                if self.step == (epoch + 1) * steps:
                    continue  # last step: saved after the validation
                if stop or self.step % self.config.save_every == 0:
                    self._save()
                if stop:
                    return False
        return True

    def _step(self, images: Tensor, labels: Tensor) -> None:
        c = self.config
        seed = mix_seeds(c.seed, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)
        images, targets = self._normalise(images), labels
        if self.mix:
            images, targets = self.mix(images, labels)
        with self.accelerator.autocast():
            logits = self.model(images)
            if logits.shape[1:] != (len(self.data.classes),):
                raise ValueError(
                    f"train: the model returns {tuple(logits.shape)} for {len(images)} images, and "
                    f"the data has {len(self.data.classes)} classes; build the model with "
                    f"num_classes={len(self.data.classes)}"
                )
            loss = F.cross_entropy(
                logits, targets, self.class_weights, label_smoothing=c.label_smoothing
            )
        self.accelerator.backward(loss)
        if c.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if c.ema:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        self.loss.update(loss.detach(), len(images))
        self.accuracy.update(logits.detach().float(), labels)
        self.step += 1

    def _end_epoch(self) -> None:
        if self.config.norm_batches:
            with self.accelerator.autocast():
                reestimate_norms(self._validated_model(), self._norm_batches())
        test = self._validate()
        self.epoch += 1
        metrics = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": self._mean_over_processes(self.loss),
            "train_accuracy": self._mean_over_processes(self.accuracy),
            **test,
            "seconds": round(self.seconds, 2),
        }
        self.loss.reset()
        self.accuracy.reset()
        self.history.append(metrics)
        if self.run_dir and self.accelerator.is_main_process:
            accuracies = [h["test_accuracy"] for h in self.history]
            if accuracies[-1] > max(accuracies[:-1], default=-1.0):
                self.run_dir.write_weights("best.safetensors", self._validated_model(), self.data)
            self.run_dir.write_metrics(self.history)
        self._save()
        if self.show_progress:
            tqdm.write(
                f"epoch {metrics['epoch']}: train loss {metrics['train_loss']:.4f}, "
                f"test accuracy {metrics['test_accuracy']:.2%}, "
                f"test loss {metrics['test_loss']:.4f}"
            )

    def _norm_batches(self) -> Iterator[Tensor]:
        """Yield the first batches of the epoch once more, the same in every process."""
        c, data = self.config, self.data
        images: Any = self.augmented or data.train
        sampler = self._sampler()
        sampler.set_epoch(self.epoch)
        order = list(islice(sampler, c.norm_batches * c.batch_size))
        loader = self.loader(images, c.batch_size, sampler=order, drop_last=True)
        for i, (batch, labels) in enumerate(loader):
            torch.manual_seed(mix_seeds(c.seed, self.step, i))  # of dropout and mixing
            batch = self._normalise(batch.to(self.accelerator.device))
            yield self.mix(batch, labels.to(batch.device))[0] if self.mix else batch

    def _mean_over_processes(self, metric: MeanMetric | MulticlassAccuracy) -> float:
        # a plain mean over processes is exact, because each had equally many images
        return float(self.accelerator.reduce(metric.compute(), "mean"))

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        model = self._validated_model()
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

    def _validated_model(self) -> nn.Module:
        """Return the network that is validated and saved: the average if there is one."""
        trained = self.accelerator.unwrap_model(self.model)
        return cast(nn.Module, self.ema.module if self.config.ema else trained)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def _save(self) -> None:
        if self.run_dir:
            self.run_dir.save(self.accelerator, self.step)

    def _show(self, bar: Any, images_per_second: float) -> None:
        if self.show_progress and self.step % 10 == 0:
            rate = images_per_second * self.accelerator.num_processes
            loss, accuracy = self.loss.compute(), self.accuracy.compute()
            bar.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.1%}, {rate:.0f} images/s")

    def _agree_on_stop(self) -> bool:
        # all processes must leave the loop at the same step, or the others would wait forever
        if self.accelerator.num_processes == 1:
            return self.interrupted
        if self.interrupted:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()  # type: ignore[no-any-return]

    @contextmanager
    def _finish_step_on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C end the run after the step, and a second Ctrl-C at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signal handlers can be set in the main thread only
            return

        def on_interrupt(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt  # the second Ctrl-C
            self.interrupted = True

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
