"""Starify from transformers' Trainer: one callback."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from starlayers.surgery import gate_parameters, starify
from starlayers.surgery.forwards import check_forwards
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import installed


class StarifyCallback(TrainerCallback):
    """Callback that starifies the model of a transformers `Trainer` when the Trainer is made.

    At the end of its constructor the Trainer has the model on its device, and makes the optimizer
    and what wraps the model (DDP, FSDP, DeepSpeed, `torch.compile`) only in `train()`. So the gates
    are in all of them, and in the checkpoints; `trainer.evaluate()` sees the stars as well.

    Trainers of TRL and others that are subclasses of `Trainer` call it in the same way.

    Args:
        options: arguments of `starlayers.starify`: `mode`, `gate`, `grow`, `recompute`, ...

    Raises:
        TypeError, ValueError: when the Trainer is made, those of `starify`; a ValueError also for
            new gates with an optimizer that exists already.
        RuntimeError: when training begins, if it is too late: the callback was added to a Trainer
            that existed, or the Trainer made a new model with `model_init`.
        ValueError: when training begins, if `use_liger_kernel=True` has replaced forwards of star
            layers, or if gates are missing in the optimizer.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from starlayers.nlp import StarifyCallback
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=16, vocab_size=9,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> callback = StarifyCallback(mode="fuse", recompute=True)
        >>> trainer = Trainer(model, arguments, callbacks=[callback])
        >>> model.model.layers[0].mlp.star.fused
        True
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.names: list[str] | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.options.get("mode", "star") == "star" and kwargs.get("optimizer") is not None:
            raise ValueError(
                "StarifyCallback: this Trainer was given an optimizer, which does not have the "
                "gates: call starify(model) before the optimizer is made, without this callback"
            )
        starify(model, **self.options)
        self.names = _names(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.names is None:
            raise RuntimeError(
                "StarifyCallback: it was added to a Trainer that exists, and its optimizer and "
                "wrapped model are made by now: give it to Trainer(..., callbacks=[...])"
            )
        if len(now := _names(model)) < len(self.names):
            raise RuntimeError(
                f"StarifyCallback: the model had {len(self.names)} star layers when the Trainer "
                f"was made and has {len(now)} now: the Trainer has another model, of model_init "
                "for example, which should then call starify itself, without this callback"
            )
        check_forwards(model)
        _check_optimizer(model, kwargs.get("optimizer"))


def _names(model: nn.Module) -> list[str]:
    return [name_of(path, star) for path, _, star in installed(model)]


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise a ValueError if an optimizer has parameters of the model but not all its gates."""
    groups = getattr(optimizer, "param_groups", ())
    held = {id(p) for group in groups for p in group["params"]}
    # FSDP, DeepSpeed and layer-wise optimizers hold parameters of their own, or none
    if not any(id(p) in held for p in model.parameters()):
        return
    gates = [p for p in gate_parameters(model) if p.requires_grad]
    if missing := sum(id(p) not in held for p in gates):
        raise ValueError(
            f"StarifyCallback: {missing} of {len(gates)} parameters of gates are not in the "
            f"optimizer that {type(optimizer).__name__} holds: a create_optimizer of your own "
            "leaves them out, freeze them or add starlayers.surgery.gate_parameters(model)"
        )
