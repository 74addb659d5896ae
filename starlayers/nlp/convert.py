"""Llama to Starformer and back: a silu star MLP without offset is Llama's MLP."""

import copy
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from starlayers.activations import get_activation
from starlayers.nlp.configuration_starformer import Filled, StarformerConfig
from starlayers.nlp.modeling_starformer import StarformerForCausalLM

__all__ = ["from_llama", "to_llama"]

#: parameter names of a layer, Llama's and ours; attention and input norm have the same in both
RENAMED = {
    "mlp.gate_proj": "ffn.mlp.f1",
    "mlp.up_proj": "ffn.mlp.f2",
    "mlp.down_proj": "ffn.mlp.g",
    "post_attention_layernorm": "ffn.pre.norm",
}
#: transformers' names of activations that have another in `ACTIVATIONS`
ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "linear": "identity",
    "relu2": "squared_relu",
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def from_llama(model: LlamaForCausalLM) -> StarformerForCausalLM:
    """The Starformer that computes what this Llama computes, with copies of its weights.

    The model's dtype, device, generation config and train/eval state stay; all parameters are
    trainable and of that one dtype afterwards.

    Raises:
        TypeError: the model is no `LlamaForCausalLM`.
        ValueError: its activation has no row in `starlayers.ACTIVATIONS`, or it holds adapters or
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
    config = StarformerConfig(**_shared(model.config), hidden_act=act)
    return _copied(model, StarformerForCausalLM, config, RENAMED)


def to_llama(model: StarformerForCausalLM) -> LlamaForCausalLM:
    """The Llama that computes what this Starformer computes, with copies of its weights.

    That opens what reads Llama checkpoints: GGUF converters, vLLM, TGI. They know silu alone;
    transformers' own Llama also takes most other activations. `hidden_dropout`, which Llama has
    not, is left behind.

    Raises:
        TypeError: the model is no `StarformerForCausalLM`.
        ValueError: the model has parts that a Llama has not; the message lists them.

    Example:
        >>> config = StarformerConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        ...                           num_attention_heads=2)
        >>> type(to_llama(StarformerForCausalLM(config))).__name__
        'LlamaForCausalLM'
    """
    if not isinstance(model, StarformerForCausalLM):
        raise TypeError(
            f"to_llama takes starlayers' StarformerForCausalLM, got {_full_name(model)}; where "
            "that came from a folder's own code, import starlayers.nlp before loading it"
        )
    config: Filled = model.config
    theirs = {row: name for name, row in ACTIVATION_NAMES.items() if name != "gelu_new"}
    act = get_activation(config.hidden_act).name
    foreign = [
        f"{name}={getattr(config, name)!r}"
        for name, llamas in {
            "mlp_type": "star",
            "mlp_rank": 1,
            "mlp_offset": 0.0,
            "attention_gate": "none",
        }.items()
        if getattr(config, name) != llamas
    ]
    types = enumerate(config.layer_types)
    foreign += [f"layer {i} of star_conv" for i, kind in types if kind != "full_attention"]
    if theirs.get(act, act) not in ACT2FN:
        foreign.append(f"hidden_act={config.hidden_act!r}")
    if foreign:
        raise ValueError(f"a Llama has no {', '.join(foreign)}")
    llama = LlamaConfig(**_shared(config), hidden_act=theirs.get(act, act))
    return _copied(model, LlamaForCausalLM, llama, {v: k for k, v in RENAMED.items()})


def _full_name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def _shared(config: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS}


def _copied(source: PreTrainedModel, kind: Any, config: Any, renamed: dict[str, str]) -> Any:
    config._attn_implementation = source.config._attn_implementation
    with no_init_weights():
        target = kind._from_config(config, dtype=source.dtype)
    target.tie_weights()  # which making it without initial weights leaves out
    target.to(source.device)
    state = {_renamed(name, renamed): t for name, t in source.state_dict().items()}
    foreign = sorted(state.keys() ^ target.state_dict().keys())
    if foreign:
        raise ValueError(
            f"{type(source).__name__} has other weights than its configuration says, such as "
            f"{foreign[0]}: merge adapters and undo quantisation first"
        )
    target.load_state_dict(state)
    for name, buffer in source.named_buffers():  # rotary frequencies: `.to(dtype)` rounds them too
        target.get_buffer(name).data = buffer.clone()
    target.config.dtype = source.config.dtype
    target.generation_config = copy.deepcopy(source.generation_config)
    return target.train(source.training)


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if f".{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name
