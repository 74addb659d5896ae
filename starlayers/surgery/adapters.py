"""Adapters of PEFT that were trained on starified models."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import gate_of, name_of
from starlayers.surgery.hidden import GatedHidden
from starlayers.surgery.install import installed, role_of
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.site import join

__all__ = ["bind_adapter", "gate_names", "load_adapter"]

#: arguments of `from_pretrained` that choose which file of a hub or cache is read
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

#: file that PEFT writes beside an adapter's weights
CONFIG_FILE = "adapter_config.json"

#: key of that file for the base that an adapter was trained on
BASE = "star_base"

#: written after the adapter's type in the file: stock PEFT raises a KeyError with the whole name,
#: where it would drop unknown keys with a warning and load the adapter onto any base
GUARD = " on a starified model (load this adapter with starlayers.surgery.load_adapter)"

#: elements of a tensor, and projections of these, that its fingerprint is made of
ELEMENTS, PROJECTIONS = 4096, 4

#: largest difference of fingerprints: bfloat16 rounds by 0.002, other weights differ by about 1
TOLERANCE = 0.02


def gate_names(model: nn.Module) -> list[str]:
    """Return names of a starified model's gates for `modules_to_save` of a PEFT config.

    PEFT takes every module whose name ends with one of them, so `"gate"` would also take the
    routers of mixtures of experts. These names match gates and grown products, and nothing else.

    Raises:
        ValueError: the model has no gates, or a name of one is the end of another module's name.

    Example:
        >>> from starlayers.surgery import starify
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return self.fc2(self.act(self.fc1(x)))
        >>> gate_names(starify(nn.ModuleList([MLP(), MLP()])))
        ['fc1.gate']
    """
    gates = _gates(model)
    if not gates:
        raise ValueError(f"gate_names: this {type(model).__name__} has no gates of starify")
    others = [name for name, _ in model.named_modules(remove_duplicate=False) if name not in gates]
    names: list[str] = []
    for gate in gates:
        if gate.endswith(tuple(names)):
            continue
        parts = gate.split(".")
        least = 1 if parts[-1] == "star_grown" else 2
        ends = (".".join(parts[-n:]) for n in range(least, len(parts) + 1))
        name = next((e for e in ends if not any(other.endswith(e) for other in others)), None)
        if name is None:
            raise ValueError(
                f"gate_names: {gate} is the end of the name of another module, which PEFT would "
                "train too; save the whole model in place of an adapter"
            )
        names.append(name)
    return names


def _gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the gates and grown products of a model, by name."""
    gates = {}
    for path, _, star in installed(model):
        gate = gate_of(star)
        leaf = "star_gate" if isinstance(star, GatedHidden) else "star_grown"
        leaf = f"{star.site.inp}.gate" if isinstance(star, StarProjection) else leaf
        if gate is not None:
            gates[join(path, leaf)] = gate
    return gates


def bind_adapter(config: Any, model: nn.Module) -> Any:
    """Make the config of an adapter remember the starified model it will be trained on.

    The adapter is saved as always, but its folder loads with `load_adapter` alone, onto a model
    with the same gates; PEFT's own functions refuse it with the name of that function, where they
    would load it onto a plain model without a word.

    Adapters with layers of their own (LoRA and its relatives) are bound by themselves when they
    are saved, so this is for prompt and prefix tuning: call it before `get_peft_model`.

    Args:
        config: a `PeftConfig`, such as `LoraConfig`; its class becomes a subclass of what it is.
        model: the starified model.

    Returns:
        `config` itself.

    Raises:
        ValueError: the model has no gates, so that no adapter depends on them.

    Example:
        >>> from peft import PromptTuningConfig, get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from starlayers.surgery import starify
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> model = starify(BertModel(small), gate="scale")
        >>> config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
        >>> adapted = get_peft_model(model, bind_adapter(config, model))
    """
    if not _gates(model):
        raise ValueError(
            f"bind_adapter: this {type(model).__name__} has no gates, so that its adapters load "
            "onto the plain model as they are"
        )
    config.star_base = _base(model, getattr(config, "modules_to_save", None) or ())
    if not _is_bound(config):
        config.__class__ = _bound(type(config))  # type: ignore[arg-type]
    return config


def _is_bound(config: Any) -> bool:
    return isinstance(config, _Bound)


def settle_adapter_hooks(model: nn.Module) -> None:
    """Have the adapters of a starified model bound when they are saved, in place.

    PEFT reads the state dict of the model before it writes the adapter's config: a hook of the
    model binds the config then. Models without gates have no hook.
    """
    for part in model.modules():
        if part is not model and not hasattr(part, "save_pretrained"):
            continue
        hooks = part._state_dict_pre_hooks
        present = [key for key, hook in hooks.items() if hook is _bind_all]  # type: ignore[comparison-overlap]
        wanted = bool(_gates(part))
        if wanted and not present:
            part.register_state_dict_pre_hook(_bind_all)
        for key in [] if wanted else present:
            del hooks[key]


def _bind_all(model: nn.Module, *_: Any) -> None:
    """Bind the adapters of a model that are not bound yet."""
    configs = vars(model).get("peft_config")
    if isinstance(configs, dict):
        for config in configs.values():
            if not _is_bound(config):
                bind_adapter(config, model)


class _Bound:
    """Config of an adapter that writes which starified model it belongs to."""

    star_base: dict[str, Any]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        file = Path(save_directory) / CONFIG_FILE
        content = json.loads(file.read_text())
        content |= {"peft_type": content["peft_type"] + GUARD, BASE: self.star_base}
        written = file.with_suffix(".tmp")
        with written.open("w") as stream:
            stream.write(json.dumps(content, indent=2, sort_keys=True))
            stream.flush()
            os.fsync(stream.fileno())
        written.replace(file)

    def __reduce__(self) -> Any:
        return _restored, (type(self).__mro__[2], vars(self))


@cache
def _bound(kind: Any) -> Any:
    """Return the subclass of a config class that remembers its base."""
    return type(f"Star{kind.__name__}", (_Bound, kind), {"__doc__": _Bound.__doc__})


def _restored(kind: type, state: dict[str, Any]) -> Any:
    config: Any = object.__new__(_bound(kind))
    vars(config).update(state)
    return config


def load_adapter(model: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load an adapter that was trained on a starified model onto one with the same gates.

    Args:
        model: the starified model: from `starlayers.from_pretrained`, or starified in the same way
            if the adapter has the gates itself (`modules_to_save=gate_names(model)`). A `PeftModel`
            of it gets one adapter more, under the name `adapter_name`.
        path: a folder, or the name of an adapter on the hub.
        kwargs: arguments of `peft.PeftModel.from_pretrained`.

    Returns:
        A `PeftModel`.

    Raises:
        ValueError: the adapter was trained on a plain model, or on one with other gates or with
            other weights in them.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from starlayers.surgery import gate_names, starify
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> model = starify(BertModel(small), gate="scale")
        >>> config = LoraConfig(target_modules=["query"], modules_to_save=gate_names(model))
        >>> folder = tempfile.mkdtemp()
        >>> get_peft_model(model, config).save_pretrained(folder)
        >>> base = starify(BertModel(small), gate="scale")
        >>> type(load_adapter(base, folder)).__name__
        'PeftModel'
    """
    from peft import PeftConfig, PeftModel
    from transformers.utils import cached_file

    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    content = json.loads(Path(cached_file(path, CONFIG_FILE, **hub)).read_text())
    saved = content.pop(BASE, None)
    if saved is None:
        raise ValueError(
            f"load_adapter: the adapter at {path} tells of no starified model: it was trained on a "
            "plain one, or by an earlier starlayers; load it with peft.PeftModel"
        )
    kind = content["peft_type"].removesuffix(GUARD)
    # written by its folder's PEFT, which may have fields that this one has not
    config = PeftConfig.from_peft_type(**(content | {"peft_type": kind}))
    is_adapted = isinstance(model, PeftModel)
    plain: Any = model.get_base_model() if is_adapted else model
    base = _base(plain, getattr(config, "modules_to_save", None) or ())
    if reason := _difference(saved, base):
        raise ValueError(f"load_adapter: the adapter at {path} was trained on {reason}")
    config = bind_adapter(config, plain)
    config.star_base = saved
    if not is_adapted:
        return PeftModel.from_pretrained(model, path, config=config, **kwargs)
    name = kwargs.pop("adapter_name", "default")
    model.add_adapter(name, config)
    model.load_adapter(path, name, **kwargs)  # does not read the config of one that is there
    return model


def _base(model: nn.Module, saved: Any) -> dict[str, Any]:
    """Return what an adapter depends on: the star layers, and those weights it does not save.

    Weights that are quantised, offloaded or divided over processes are left out.
    """
    layers = {
        name_of(path, star): f"grow={star.star.grown}"
        if isinstance(star, GatedMLP)
        else role_of(star).spec  # type: ignore[union-attr]
        for path, _, star in installed(model)
        if gate_of(star) is not None
    }
    weights = {
        f"{name}.{key.replace('base_layer.', '')}": _fingerprint(parameter)
        for name, gate in _gates(model).items()
        if not name.endswith(tuple(saved))
        for key, parameter in getattr(gate, "original_module", gate).named_parameters()
        if type(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and not parameter.is_meta
    }
    return {"layers": layers, "weights": weights}


@torch.no_grad()
def _fingerprint(parameter: Tensor) -> list[float]:
    """Return the norm of some elements of a tensor, and projections of them to random numbers."""
    flat = parameter.flatten()
    some = flat[:: max(1, len(flat) // ELEMENTS)][:ELEMENTS].to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = PROJECTIONS, len(some)
    axes = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return [float(some.norm()), *(axes @ some).tolist()]


def _difference(saved: dict[str, Any], base: dict[str, Any]) -> str | None:
    """Return how the base of an adapter differs from a model, `None` if it does not."""
    for name in saved["layers"].keys() | base["layers"].keys():
        was, now = (b["layers"].get(name, "no gate") for b in (saved, base))
        if was != now:
            return f"a model with {was} at {name}, and this one has {now}"
    for name, values in saved["weights"].items():
        others = base["weights"].get(name, values)
        allowed = TOLERANCE * max(values[0], others[0])
        if not all(abs(a - b) <= allowed for a, b in zip(values, others)):
            return f"a model with other weights in {name}: starlayers.from_pretrained loads them"
    return None
