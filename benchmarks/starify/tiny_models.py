"""Tiny models of all families of transformers, with an input for each.

A family is a model type of transformers. Its config is made twice: as it is by default, to read
its fields, and with smaller numbers for the fields that are sizes. `SIZES` says which size a field
is, by its name; `FIELDS` has what a single family needs beside that.
"""

import inspect
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from benchmarks.starify.tiny_tables import CLASSES, FIELDS, INPUTS, SIZES, UNTRIED

Inputs = dict[str, Any]

BATCH = 2
#: number of parameters of a model that is still called tiny
LARGEST = 20_000_000
LENGTH = 16
VOCABULARY = 128
#: standard deviation of what is added to all parameters
NOISE = 0.05
#: ids of texts are below, those of special tokens above
TEXT_IDS = 96
#: tables of classes, the first that has a family decides which class is built
KINDS = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "masked LM": ("MASKED_LM",),
    "causal LM": ("CAUSAL_LM",),
    "image classification": ("IMAGE_CLASSIFICATION",),
    "multimodal LM": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "other": (
        "OBJECT_DETECTION",
        "UNIVERSAL_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "VIDEO_CLASSIFICATION",
        "TIME_SERIES_PREDICTION",
        "MASK_GENERATION",
    ),
    "base": ("",),
}


class NotBuiltError(ValueError):
    """No tiny model of a family could be built or run; the message says why."""


def families() -> dict[str, tuple[str, str]]:
    """Return model type -> (kind, name of the class) of every family with a model class."""
    found = {}
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        for kind, tables in KINDS.items():
            names = [_class_name(table, model_type) for table in tables]
            if name := next(filter(None, names), None):
                found[model_type] = kind, CLASSES.get(model_type, name)
                break
    return found


def _class_name(table: str, model_type: str) -> str | None:
    names = f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES"
    name = getattr(modeling_auto, names, {}).get(model_type)
    return name[0] if isinstance(name, (tuple, list)) else name


# configs


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Make a family's config with small sizes."""
    default = CONFIG_MAPPING[model_type]()
    return _shrunk(default, FIELDS.get(model_type, {}))


def _shrunk(default: PreTrainedConfig, special: dict[str, Any]) -> PreTrainedConfig:
    """Make a config of the class of `default`, and those inside of it, with small sizes."""
    special = FIELDS.get(default.model_type, {}) | special
    depth = special.get("num_hidden_layers", _depth(default))
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = special.get(name)
            fields[name] = _shrunk(value, inner if isinstance(inner, dict) else {})
        elif name in special:
            continue
        elif name == "num_hidden_layers" and depth:
            fields[name] = depth
        elif isinstance(value, list) and depth and len(value) == default.num_hidden_layers:
            fields[name] = value[:depth]  # one entry a layer
        elif isinstance(value, dict) and "mrope_section" in value:
            fields[name] = value | {"mrope_section": _sections(value)}
        elif name == "num_key_value_heads" and value == getattr(default, "num_attention_heads", 0):
            fields[name] = _small("num_attention_heads", value)
        elif (small := _small(name, value)) != value:
            fields[name] = small
    fields |= {
        name: v for name, v in special.items() if not isinstance(v, dict) or name not in fields
    }
    _distinct_tokens(default, fields)
    return type(default)(**fields)


def _depth(default: PreTrainedConfig) -> int:
    """Return the fewest layers, but two, that have all kinds of layers; 0 if it has no number."""
    layers = getattr(default, "num_hidden_layers", None)
    if not _is_int(layers):
        return 0
    kinds = (
        getattr(default, "layer_types", None) or getattr(default, "layers_block_type", None) or []
    )
    kinds = kinds if len(kinds) == layers else []
    return min(layers, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))


def _sections(rope: dict[str, Any]) -> list[int]:
    """Return sections of a multimodal rotary embedding that fit heads of 16 channels."""
    half = int(8 * rope.get("partial_rotary_factor", 1.0))
    return [half - 2 * (half // 4), half // 4, half // 4]


def _small(name: str, value: Any) -> Any:
    """Return a small size for a field, or `value` if it is no size."""
    if isinstance(value, (list, tuple)) and value and all(_is_int(v) for v in value):
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return type(value)(_small_list(list(value), size))
        return value
    if not _is_int(value):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


def _small_list(values: list[int], size: int) -> list[int]:
    """Shrink a list of sizes, one a stage, so that the ratios stay."""
    least = min(values)
    if least <= 0 or size <= 4:
        return [min(v, size) for v in values]
    if max(values) <= size:
        return values
    return [max(1, round(v / least)) * size for v in values]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _distinct_tokens(default: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """Give every special token beyond the small vocabulary an id of its own."""
    free = iter(range(VOCABULARY - 1, TEXT_IDS, -1))
    for name, value in vars(default).items():
        if not re.search(
            r"(^|_)(token_id|token_index|token_ids|idx|bos_id|eos_id|start_id|end_id)$", name
        ):
            continue
        if name in fields:
            continue
        if _is_int(value) and value >= TEXT_IDS:
            fields[name] = next(free)
        elif isinstance(value, list) and any(_is_int(v) and v >= TEXT_IDS for v in value):
            fields[name] = [next(free) for _ in value]


# models


def build(model_type: str) -> nn.Module:
    """Build the tiny model of a family, with the same weights at every call.

    Noise is added to all parameters: biases, norms and heads that start as zeros or ones would
    hide what is lost.

    Raises:
        NotBuiltError: transformers raised an error.
    """
    _, name = families()[model_type]
    if reason := UNTRIED.get(model_type):
        raise NotBuiltError(reason)
    try:
        with seeded(0):
            config = tiny_config(model_type)
            kind = getattr(transformers, name)
            _refuse_large(kind, config)
            model: nn.Module = kind(config).float()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(NOISE * torch.randn_like(parameter))
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    return model


def _refuse_large(kind: Any, config: PreTrainedConfig) -> None:
    """Raise NotBuiltError for a model that is not tiny, before its memory is taken."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in kind(deepcopy(config)).parameters())
    except Exception:  # some models compute while they are built
        return
    if count > LARGEST:
        raise NotBuiltError(f"{count:,} parameters are not tiny")


# inputs


def inputs_of(model_type: str, model: nn.Module) -> Inputs:
    """Return the first input that the model runs on with finite outputs.

    Raises:
        NotBuiltError: it runs on none of them.
    """
    reasons = {}
    for inputs in _candidates(model_type, model):
        try:
            outputs = run(model.eval(), inputs)
        except Exception as error:
            reasons.setdefault(f"{type(error).__name__}: {error}"[:300], list(inputs))
            continue
        if outputs and all(bool(y.isfinite().all()) for y in outputs):
            return inputs
        reasons.setdefault("outputs are not finite" if outputs else "no output", list(inputs))
    text = "; ".join(f"{reason} (given {', '.join(names)})" for reason, names in reasons.items())
    raise NotBuiltError(f"runs on no input: {text or 'none known'}")


def run(model: nn.Module, inputs: Inputs, seed: int = 7) -> list[Tensor]:
    """Return all floating-point tensors of the model's output, caches left out."""
    with seeded(seed), torch.no_grad():
        return tensors(model(**inputs))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's generators, and restore them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # wav2vec 2.0 draws its masks from it
        random.seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def tensors(output: Any, key: str = "") -> list[Tensor]:
    """Return the floating-point tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if "past_key_values" in key or "cache" in key:
        return []
    if isinstance(output, dict):
        return [t for name, value in output.items() for t in tensors(value, name)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value, key)]
    return []


def _candidates(model_type: str, model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs that might fit the model's forward, the likeliest first."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(3)
    if model_type in INPUTS:
        yield INPUTS[model_type](config, generator)
        return
    texts = _texts(config, accepted, generator)
    pictures = {
        name: list(_pictures(config, name, generator))
        for name in ("pixel_values", "pixel_values_videos")
        if name in accepted
    }
    sounds = {
        name: list(_sounds(config, name, generator))
        for name in ("input_values", "input_features")
        if name in accepted
    }
    if "grid_thw" in accepted:
        yield from _patches(config, accepted, generator)
    main = getattr(model, "main_input_name", "input_ids")
    main = main[0] if isinstance(main, list) else main
    others = [{name: v} for n in (pictures, sounds) for name, vs in n.items() for v in vs]
    required = {
        n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    decoder = {n: v for n, v in texts.items() if n.startswith("decoder")}
    if "input_ids" in texts and main == "input_ids":
        yield texts
        yield {n: v for n, v in texts.items() if not n.startswith("decoder")}
    for other in sorted(others, key=lambda o: main not in o):
        yield other
        yield other | decoder
        yield other | texts
    if len(others) > 1:
        for second in others[1:]:
            yield others[0] | second | texts
    if "input_ids" in texts:
        yield texts
    if {"hidden_states"} <= required or "inputs_embeds" in accepted:
        embeds = torch.randn(BATCH, LENGTH, _width(config), generator=generator)
        for name in ("inputs_embeds", "hidden_states"):
            if name in accepted:
                yield {name: embeds}


def _patches(config: Any, accepted: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Yield flat patches and their grid, as the towers of Qwen's vision models take them."""
    channels = next(
        (c for c in _all(config, "in_channels", "in_chans", "num_channels") if _is_int(c)), 3
    )
    frames = getattr(config, "temporal_patch_size", 1)
    size = getattr(config, "patch_size", 14)
    name = next(n for n in accepted if n in ("hidden_states", "pixel_values"))
    for shape in [
        (16, channels * frames * size**2),
        (16, channels * size**2),
        (16, channels, size, size),
    ]:
        values = torch.randn(shape, generator=generator)
        inputs = {name: values, "grid_thw": torch.tensor([[1, 4, 4]])}
        if "merge_sizes" in accepted:
            inputs["merge_sizes"] = torch.tensor([2])
        yield inputs


def _width(config: Any) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim"):
        if _is_int(value := getattr(config, name, None)):
            return value
    return 32


def _texts(config: Any, accepted: Any, generator: torch.Generator) -> Inputs:
    sizes = [n for n in _all(config, "vocab_size", "codebook_size") if _is_int(n) and n > 8]
    ids = torch.randint(5, min([TEXT_IDS, *sizes]), (BATCH, LENGTH), generator=generator)
    made: Inputs = {}
    if "input_ids" in accepted:
        made["input_ids"] = ids
    if "decoder_input_ids" in accepted:
        made["decoder_input_ids"] = ids[:, :10].flip(1)
    if "bbox" in accepted:
        made["bbox"] = torch.randint(0, 8, (BATCH, LENGTH, 2), generator=generator).repeat(1, 1, 2)
        made["bbox"][..., 2:] += 8
    return made


def _all(config: Any, *names: str) -> list[Any]:
    """Return values of fields of these names, in the config or those inside of it."""
    values = [getattr(config, n) for n in names if getattr(config, n, None) is not None]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            values += _all(value, *names)
    return values


def _pictures(config: Any, name: str, generator: torch.Generator) -> Iterator[Tensor]:
    channels = next((c for c in _all(config, "num_channels", "in_channels") if _is_int(c)), 3)
    sizes = [
        s if isinstance(s, (list, tuple)) else (s, s)
        for s in _all(config, "image_size", "input_size", "img_size")
    ]
    frames = next((f for f in _all(config, "num_frames", "frames_per_clip") if _is_int(f)), None)
    pairs = [tuple(size) for size in sizes if len(size) == 2 and all(map(_is_int, size))]
    for height, width in dict.fromkeys([*pairs, (64, 64), (128, 128), (224, 224)]):
        picture = torch.randn(1, channels, height, width, generator=generator)
        if frames or name == "pixel_values_videos":
            yield picture.unsqueeze(1).repeat(1, frames or 4, 1, 1, 1)
        yield picture
        if not frames:
            yield picture.unsqueeze(1)


def _sounds(config: Any, name: str, generator: torch.Generator) -> Iterator[Tensor]:
    names = (
        "num_mel_bins",
        "n_mels",
        "feature_size",
        "input_feat_size",
        "feature_projection_input_dim",
        "mel_bins",
        "input_dim",
        "input_size",
        "n_mel_bins",
    )
    bins = [b for b in _all(config, *names) if _is_int(b)]
    lengths = [2 * n for n in _all(config, "max_source_positions") if _is_int(n)]
    lengths += [n for n in _all(config, "max_length") if _is_int(n)]
    if name == "input_values":
        yield torch.randn(1, 4000, generator=generator)
        yield torch.randn(1, 1, 4000, generator=generator)
    for n in dict.fromkeys(bins):
        for length in dict.fromkeys([*lengths, 64]):
            yield torch.randn(1, n, length, generator=generator)
            yield torch.randn(1, length, n, generator=generator)
