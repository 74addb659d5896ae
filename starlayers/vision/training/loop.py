"""Training loop of image classifiers: resumable, distributed, deterministic."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from tqdm import tqdm

from starlayers.vision.norm_statistics import frozen_norms, reestimate_norms
from starlayers.vision.training.accelerator import make_accelerator
from starlayers.vision.training.augment import (
    Augmented,
    ShuffleSampler,
    batch_transform,
    image_transform,
    mix_seeds,
)
from starlayers.vision.training.data import TrainData, class_weights, labels_of
from starlayers.vision.training.interrupts import Interrupts, ignore_interrupts
from starlayers.vision.training.recipe import (
    TrainConfig,
    ema_model,
    freeze_stages,
    lr_scheduler,
    make_optimizer,
)
from starlayers.vision.training.rundir import RunDir

VALIDATION_BATCH = 512
#: classes from which on the top-5 accuracy says something
TOP5_CLASSES = 6


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        history: metrics of each epoch, in order: `epoch`, `step` (so far), `lr` (of the next
            step, the largest of all layers), `train_loss`, `train_accuracy` (`None` with mixup or
            cutmix, whose images have no single class), `test_loss`, `test_accuracy`, from 6
            classes on `test_top5_accuracy`, `seconds` (of training so far).
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
    a second one stops at once. To fine-tune, pass a trained model, and data with the mean and std
    that it was trained with.

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
            are of one value, the model has another number of outputs than the data has classes, or
            the recipe asks for what this model or machine has not: stages to freeze, blocks for
            `layer_decay`, a GPU for float16 or `sync_bn`, a folder for `log_with`.
        ImportError: a recipe that needs timm or a tracker, and it is not installed.

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
        self.accelerator = make_accelerator(config, run_dir)
        self.loader: Callable[..., DataLoader[Any]] = partial(
            DataLoader, num_workers=config.workers, worker_init_fn=ignore_interrupts
        )
        self.show_progress = progress and self.accelerator.is_main_process
        device = self.accelerator.device
        freeze_stages(model, config.freeze)
        if config.sync_bn and self.accelerator.num_processes > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.compile:
            model.compile()
        optimizer = make_optimizer(model, config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital'")  # raised inside torchdata
            self.model, self.optimizer, self.train_loader = self.accelerator.prepare(
                model, optimizer, self._train_loader()
            )
        # not through prepare(), which would save the position of a validation with the state
        self.test_loader = prepare_data_loader(
            self.loader(data.test, VALIDATION_BATCH), device, put_on_device=True
        )
        self.epoch_steps = math.ceil(len(self.train_loader) / config.accumulate)
        steps = config.epochs * self.epoch_steps
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
        self.interrupts = Interrupts(self.accelerator)

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
            data.shape[-1],
            flip=c.flip,
            crop=c.crop,
            randaugment=c.randaugment,
            resized_crop=c.resized_crop,
            erase=c.erase,
            fill=[round(255 * mean) for mean in data.mean],
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
        with self.interrupts.finish_step():
            for epoch in range(self.epoch, self.config.epochs):
                if not self._train_epoch(epoch):
                    break
                self._end_epoch()
                if self.interrupts.agree():
                    break
        for tracker in self.accelerator.trackers:
            tracker.finish()
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
        steps, accumulate = self.epoch_steps, self.config.accumulate
        done = self.step - epoch * steps
        label = f"epoch {epoch + 1}/{self.config.epochs}"
        began = time.perf_counter()
        with tqdm(
            total=steps, initial=done, desc=label, disable=not self.show_progress, unit="step"
        ) as bar:
            batches = iter(self.train_loader)
            while group := list(islice(batches, accumulate)):
                self._step(group)
                seconds, began = time.perf_counter() - began, time.perf_counter()
                self.seconds += seconds
                bar.update()
                self._show(bar, sum(len(images) for images, _ in group) / seconds)
                stop = self.interrupts.agree()
                if self.step == (epoch + 1) * steps:
                    continue  # last step: saved after the validation
                if stop or self.step % self.config.save_every == 0:
                    self._save()
                if stop:
                    return False
        return True

    def _step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Update the weights by the gradient of the mean loss over all images of the batches."""
        c = self.config
        total = sum(len(images) for images, _ in batches)
        for i, (images, labels) in enumerate(batches):
            last = i + 1 == len(batches)
            # the processes exchange their gradients once
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                seed = (c.seed, self.step, self.accelerator.process_index, *([i] if i else []))
                torch.manual_seed(mix_seeds(*seed))
                self._backward(images, labels, len(images) / total)
        if c.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:  # for an overflow in float16
            self.scheduler.step()
        self.optimizer.zero_grad()
        if c.ema:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        self.step += 1

    def _backward(self, images: Tensor, labels: Tensor, share: float) -> None:
        """Add to the gradients those of a batch that is `share` of the images of its step."""
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
                logits, targets, self.class_weights, label_smoothing=self.config.label_smoothing
            )
        self.accelerator.backward(loss if share == 1 else loss * share)
        self.loss.update(loss.detach(), len(images))
        if not self.mix:
            self.accuracy.update(logits.detach().float(), labels)

    def _end_epoch(self) -> None:
        if self.config.norm_batches:
            with self.accelerator.autocast():
                reestimate_norms(self._validated_model(), self._norm_batches())
        test = self._validate()
        self.epoch += 1
        metrics = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": max(self.scheduler.get_last_lr()),
            "train_loss": self._mean_over_processes(self.loss),
            "train_accuracy": None if self.mix else self._mean_over_processes(self.accuracy),
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
        known = {name: value for name, value in metrics.items() if value is not None}
        self.accelerator.log(known, step=self.step)
        self._save()
        if self.show_progress:
            top5 = metrics.get("test_top5_accuracy")
            tqdm.write(
                f"epoch {metrics['epoch']}: train loss {metrics['train_loss']:.4f}, "
                f"test accuracy {metrics['test_accuracy']:.2%}, "
                + ("" if top5 is None else f"top 5 {top5:.2%}, ")
                + f"test loss {metrics['test_loss']:.4f}"
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
        total, count, in_top5 = 0.0, 0, 0
        top5 = len(self.data.classes) >= TOP5_CLASSES
        for images, labels in self.test_loader:
            with self.accelerator.autocast():
                logits = model(self._normalise(images))
            logits, labels = self.accelerator.gather_for_metrics((logits.float(), labels))
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            self.confusion.update(logits, labels)
            if top5:
                in_top5 += int((logits.topk(5).indices == labels[:, None]).sum())
        right = self.confusion.compute().trace().item()
        result = {"test_loss": total / count, "test_accuracy": right / count}
        return result | ({"test_top5_accuracy": in_top5 / count} if top5 else {})

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
            accuracy = "" if self.mix else f"acc {self.accuracy.compute():.1%}, "
            bar.set_postfix_str(f"loss {self.loss.compute():.3f}, {accuracy}{rate:.0f} images/s")
