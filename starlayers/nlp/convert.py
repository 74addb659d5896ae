"""Conversion between Llama and Starformer.

A silu star MLP without offset is Llama's MLP.
"""

import copy
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from starlayers.activations import get_activation
from starlayers.nlp.configuration_starformer import ResolvedConfig, StarformerConfig
from starlayers.nlp.modeling_starformer import StarformerForCausalLM

#: name in a Llama layer -> name in a Starformer layer; attention and input norm have equal names
PARAMETER_NAMES = {
    "mlp.gate_proj": "ffn.mlp.f1",
    "mlp.up_proj": "ffn.mlp.f2",
    "mlp.down_proj": "ffn.mlp.g",
    "post_attention_layernorm": "ffn.pre.norm",
}
#: activation name in transformers -> name in `ACTIVATIONS`, where they differ
ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "linear": "identity",
    "relu2": "squared_relu",
}
#: fields that a Llama does not have -> the value with which a Starformer computes the same
LLAMA_VALUES = {"mlp_type": "star", "mlp_rank": 1, "mlp_offset": 0.0, "attention_gate": "none"}
#: fields with the same meaning in both configurations: all of equal name, but for the activation
SHARED_FIELDS = LlamaConfig.__annotations__.keys() & StarformerConfig.__annotations__.keys()
SHARED_FIELDS -= {"hidden_act"}


def from_llama(model: LlamaForCausalLM) -> StarformerForCausalLM:
    """Convert a Llama into a Starformer that computes the same.

    The result has copies of the weights and the model's dtype, device, generation config and
    train/eval mode. All its parameters are trainable and have one dtype.

    Args:
        model: any `LlamaForCausalLM`, without adapters and quantised weights.

    Returns:
        A `StarformerForCausalLM`. Its logits are equal bit for bit on the eager backend.

    Raises:
        TypeError: the model is no `LlamaForCausalLM`.
        ValueError: its activation is not in `starlayers.ACTIVATIONS`, or it holds adapters or
            quantised weights.

    Example:
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 5, 2]])
        >>> torch.equal(from_llama(llama)(ids).logits, llama(ids).logits)
        True
    """
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"from_llama takes a LlamaForCausalLM, got {_full_name(model)}")
    act = model.config.hidden_act
    act = get_activation(ACTIVATION_NAMES.get(act, act)).name
    config = StarformerConfig(**_shared_fields(model.config), hidden_act=act)
    return _convert(model, StarformerForCausalLM, config, PARAMETER_NAMES)


def to_llama(model: StarformerForCausalLM) -> LlamaForCausalLM:
    """Convert a Starformer into a Llama that computes the same.

    Programs that read Llama checkpoints (GGUF converters, vLLM, TGI) can then run the model. They
    support silu only; transformers' own Llama also takes most other activations. The result has
    copies of the weights and the model's dtype, device, generation config and train/eval mode.
    `hidden_dropout` is dropped, since Llama has none.

    Args:
        model: a `StarformerForCausalLM` with star MLPs of rank 1 without offset, no attention gate
            and no star_conv layer.

    Returns:
        A `LlamaForCausalLM`.

    Raises:
        TypeError: the model is no `StarformerForCausalLM`.
        ValueError: the model has parts that a Llama has not; the message lists them.

    Example:
        >>> config = StarformerConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        ...                           num_attention_heads=2)
        >>> model, ids = StarformerForCausalLM(config).eval(), torch.tensor([[1, 5, 2]])
        >>> torch.allclose(to_llama(model)(ids).logits, model(ids).logits, atol=1e-6)
        True
    """
    if not isinstance(model, StarformerForCausalLM):
        raise TypeError(
            f"to_llama takes starlayers' StarformerForCausalLM, got {_full_name(model)}; if it was "
            "loaded with the code in its folder, import starlayers.nlp before loading it"
        )
    config: ResolvedConfig = model.config
    act = get_activation(config.hidden_act).name
    llama_names = {ours: name for name, ours in ACTIVATION_NAMES.items() if name != "gelu_new"}
    llama_act = llama_names.get(act, act)
    values = {field: getattr(config, field) for field in LLAMA_VALUES}
    unsupported = [f"{k}={v!r}" for k, v in values.items() if v != LLAMA_VALUES[k]]
    unsupported += [
        f"layer {i} of star_conv" for i, t in enumerate(config.layer_types) if t != "full_attention"
    ]
    if llama_act not in ACT2FN:
        unsupported.append(f"hidden_act={config.hidden_act!r}")
    if unsupported:
        raise ValueError(f"a Llama has no {', '.join(unsupported)}")
    llama_config = LlamaConfig(**_shared_fields(config), hidden_act=llama_act)
    llama_parameters = {ours: name for name, ours in PARAMETER_NAMES.items()}
    return _convert(model, LlamaForCausalLM, llama_config, llama_parameters)


def _full_name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def _shared_fields(config: Any) -> dict[str, Any]:
    return {field: copy.deepcopy(getattr(config, field)) for field in SHARED_FIELDS}


def _convert(
    source: PreTrainedModel, target_class: Any, config: Any, parameter_names: dict[str, str]
) -> Any:
    """Create a `target_class` with the weights of `source` under their new names."""
    config._attn_implementation = source.config._attn_implementation
    with no_init_weights():
        target = target_class._from_config(config, dtype=source.dtype)
    target.tie_weights()  # no_init_weights skips it
    target.to(source.device)
    state = {_rename(name, parameter_names): t for name, t in source.state_dict().items()}
    mismatched = sorted(state.keys() ^ target.state_dict().keys())
    if mismatched:
        raise ValueError(
            f"{type(source).__name__} has other weights than its configuration says, such as "
            f"{mismatched[0]}: merge adapters and undo quantisation first"
        )
    target.load_state_dict(state)
    # `source.to(dtype)` may have rounded the rotary frequencies, which are in no state dict
    for name, buffer in source.named_buffers():
        target.get_buffer(name).data = buffer.clone()
    target.config.dtype = source.config.dtype
    target.generation_config = copy.deepcopy(source.generation_config)
    return target.train(source.training)


def _rename(name: str, new_names: dict[str, str]) -> str:
    for old, new in new_names.items():
        if f".{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name
