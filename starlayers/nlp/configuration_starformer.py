"""Configurations of the Starformer decoder, encoder and encoder-decoder."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

try:
    from starlayers.activations import get_activation
except ImportError:  # beside the weights of a saved model
    from .portable_starformer import get_activation  # type: ignore[assignment]

#: a configuration after `__post_init__`: optional fields have values, so `Any` instead of a union
ResolvedConfig = Any

MLP_TYPES = ("star", "sum", "plain")
ATTENTION_GATES = ("none", "head", "channel")
POOLINGS = ("mean", "bos")
#: accepted name of a layer type -> name that transformers' caches and masks use
LAYER_TYPES = {
    "attention": "full_attention",
    "full_attention": "full_attention",
    "star_conv": "conv",
    "conv": "conv",
    "linear_attention": "conv",  # in files that transformers 5.17 wrote
}

_TP_ATTENTION = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v", "gate")},
    "layers.*.self_attn.o_proj": "rowwise",
}
_TP_LAYER = {
    **_TP_ATTENTION,
    "layers.*.ffn.mlp.f1": "colwise",
    "layers.*.ffn.mlp.f2": "colwise",
    "layers.*.ffn.mlp.g": "rowwise",
}


@strict
class StarformerConfig(PreTrainedConfig):
    """Configuration of a star-MLP decoder; base class of the other two.

    A layer computes `x = x + mixer(norm(x))`, then `x + g(act(f1(z)) * (offset + f2(z)))` with
    `z = norm(x)`. The mixer is grouped-query attention or a `StarConv`.

    As in `LlamaConfig` are vocab_size, hidden_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, head_dim, max_position_embeddings, rope_parameters, rms_norm_eps,
    attention_bias, attention_dropout, mlp_bias, initializer_range, tie_word_embeddings, use_cache
    and the token ids.

    Args:
        intermediate_size: hidden features of the MLP. Default: 8/3 of `hidden_size`, rounded to a
            multiple of 64, at least 64. With it a star MLP (three matrices) has as many parameters
            as a plain MLP (two matrices) with `intermediate_size = 4 * hidden_size`. The default
            is the same for `mlp_type="plain"`, which then has two thirds of the parameters of a
            star MLP; pass `intermediate_size=4 * hidden_size` to compare at equal parameters.
        hidden_act: activation of the first branch, a name in `starlayers.ACTIVATIONS`; `None` for
            no activation (bilinear).
        mlp_type: "star"; "sum" for `g(act(f1(x)) + f2(x))`, the ablation of the StarNet paper; or
            "plain" for `g(act(f1(x)))`, an MLP with one branch.
        mlp_rank: number of products summed in each hidden feature.
        mlp_offset: constant added to the second branch, `offset` of `StarMLP`.
        mlp_recompute: save only the MLP's input for the backward pass and compute the branches
            again there, `recompute` of `StarMLP`.
        attention_gate: "none"; "head" or "channel" to multiply the output of the attention by
            `attention_gate_act(gate_proj(x))`, one factor per head or one per channel.
        attention_gate_act: activation of the gate, a name in `starlayers.ACTIVATIONS`, or `None`.
        layer_types: "attention" or "star_conv" for each layer. Default: attention in all layers.
            Stored under the names that transformers uses, "full_attention" and "conv".
        conv_kernel_size: tokens that a star_conv layer combines.
        conv_act: activation of both products in star_conv layers; default `None`.
        conv_bias: biases in the linear layers and the convolution of star_conv layers.
        hidden_dropout: dropout probability on the output of each mixer, cross-attention and MLP.
        classifier_dropout: dropout probability before a classification head; `None` means 0.
            `StarformerForSequenceClassification` and the question-answering heads have no dropout,
            as in transformers' own models.

    Raises:
        ValueError: sizes that do not divide each other, an odd head size, an unknown `mlp_type`,
            `attention_gate` or layer type, a list of layer types of the wrong length or without
            attention, or options of a star MLP together with `mlp_type="plain"`.

    Source: the gate is from "Gated Attention for Large Language Models", NeurIPS 2025; a short
    convolution between two products is the mixer of LFM2 (Liquid AI, 2025).

    Example:
        >>> config = StarformerConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        ...                           layer_types=["star_conv", "attention"])
        >>> config.layer_types, config.intermediate_size
        (['conv', 'full_attention'], 192)
    """

    model_type: ClassVar[str] = "starformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = _TP_LAYER
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    causal: ClassVar[bool] = True

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str | None = "silu"
    mlp_type: str = "star"
    mlp_rank: int = 1
    mlp_offset: int | float = 0.0
    mlp_recompute: bool = False
    mlp_bias: bool = False
    attention_gate: str = "none"
    attention_gate_act: str | None = "sigmoid"
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    layer_types: list[str] | None = None
    conv_kernel_size: int = 3
    conv_act: str | None = None
    conv_bias: bool = False
    hidden_dropout: int | float = 0.0
    classifier_dropout: int | float | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = max(64, round(self.hidden_size * 8 / 3 / 64) * 64)
        for option in ("hidden_act", "attention_gate_act", "conv_act"):
            try:
                get_activation(getattr(self, option))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {option}: {error}") from error
        self._check_choice("mlp_type", MLP_TYPES)
        self._check_choice("attention_gate", ATTENTION_GATES)
        self.layer_types = self._resolve_layer_types(
            "layer_types", "num_hidden_layers", causal=self.causal
        )
        if self.attention_gate == "none":
            self._remove_from_tp_plan("attn.gate_proj")
        if self.mlp_type == "plain":
            self._remove_from_tp_plan("ffn.mlp.f2")
        elif self.mlp_rank > 1:
            # branches are laid out (rank, intermediate), so a block of their rows holds parts of
            # products
            self._remove_from_tp_plan("ffn")
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Check the layer types and keep their names: transformers 5.17 renames "conv"."""
        layer_types = self.layer_types
        super().validate_layer_type()
        self.layer_types = layer_types

    def _remove_from_tp_plan(self, part: str) -> None:
        """Set a plan on this instance without the modules whose name contains `part`."""
        class_plan = self.base_model_tp_plan or {}
        plan = {name: style for name, style in class_plan.items() if part not in name}
        self.base_model_tp_plan = plan  # type: ignore[misc]

    def _check_sizes(self) -> None:
        name, heads = type(self).__name__, self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"{name}: hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={heads}; give head_dim or change one of them"
            )
        key_value_heads = self.num_key_value_heads or heads
        if heads % key_value_heads:
            raise ValueError(
                f"{name}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={key_value_heads}"
            )
        head_dim = self.head_dim or self.hidden_size // heads
        if head_dim % 2:
            raise ValueError(f"{name}: rotary embeddings need an even head size, got {head_dim}")
        star_options = (self.mlp_rank != 1, self.mlp_offset, self.mlp_recompute)
        if self.mlp_type == "sum" and any(star_options[:2]):
            raise ValueError(
                f"{name}: mlp_type='sum' has no products for mlp_rank={self.mlp_rank} and "
                f"mlp_offset={self.mlp_offset}"
            )
        if self.mlp_type == "plain" and any(star_options):
            raise ValueError(
                f"{name}: mlp_type='plain' has no second branch for mlp_rank={self.mlp_rank}, "
                f"mlp_offset={self.mlp_offset}, mlp_recompute={self.mlp_recompute}"
            )

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        if getattr(self, field) not in choices:
            raise ValueError(
                f"{type(self).__name__}: unknown {field} {getattr(self, field)!r}, choose one of "
                f"{', '.join(choices)}"
            )

    def _resolve_layer_types(self, field: str, count_field: str, *, causal: bool) -> list[str]:
        """Check the layer types in `field` and return them under transformers' names."""
        name, types = type(self).__name__, getattr(self, field)
        count = getattr(self, count_field)
        if types is None:
            return ["full_attention"] * count
        unknown = [t for t in types if t not in LAYER_TYPES]
        if unknown:
            raise ValueError(
                f"{name}: unknown {field} {unknown}, choose from 'attention' and 'star_conv'"
            )
        if len(types) != count:
            raise ValueError(f"{name}: {len(types)} {field} for {count_field}={count}")
        resolved = [LAYER_TYPES[t] for t in types]
        if causal and count and "full_attention" not in resolved:
            raise ValueError(
                f"{name}: {field} needs one 'attention' layer at least: a decoder's cache counts "
                "its tokens there"
            )
        if "conv" in resolved and not causal and self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"{name}: a star_conv encoder layer looks to both sides alike and needs an odd "
                f"conv_kernel_size, got {self.conv_kernel_size}"
            )
        return resolved


@strict
class StarformerEncoderConfig(StarformerConfig):
    """Configuration of a star-MLP encoder, in which every token sees every other.

    Args:
        classifier_pooling: input of the head of `StarformerEncoderForSequenceClassification`:
            "mean" for the mean over all tokens, "bos" for the first token.
        All others: as in `StarformerConfig`.

    Raises:
        ValueError: as `StarformerConfig`, except that no attention layer is needed; an unknown
            `classifier_pooling`; an even `conv_kernel_size` with star_conv layers.

    Example:
        >>> config = StarformerEncoderConfig(num_hidden_layers=1, layer_types=["star_conv"])
        >>> config.classifier_pooling, config.layer_types
        ('mean', ['conv'])
    """

    model_type: ClassVar[str] = "starformer_encoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = []
    causal: ClassVar[bool] = False

    classifier_pooling: str = "mean"

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_choice("classifier_pooling", POOLINGS)
        super().__post_init__(**kwargs)


@strict
class StarformerSeq2SeqConfig(StarformerConfig):
    """Configuration of a star-MLP encoder-decoder with one vocabulary and one width.

    Args:
        num_hidden_layers, layer_types: layers of the decoder.
        encoder_layers: number of layers of the encoder; default `num_hidden_layers`.
        encoder_layer_types: "attention" or "star_conv" for each layer of the encoder. Default:
            attention in all layers.
        decoder_start_token_id: first token of the decoder's input; default `bos_token_id`.
        All others: as in `StarformerConfig`, for encoder and decoder alike.

    Raises:
        ValueError: as `StarformerConfig`; an even `conv_kernel_size` with star_conv layers in the
            encoder.

    Example:
        >>> config = StarformerSeq2SeqConfig(num_hidden_layers=2, encoder_layers=4)
        >>> len(config.encoder_layer_types), config.decoder_start_token_id
        (4, 1)
    """

    model_type: ClassVar[str] = "starformer_seq2seq"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        **{f"encoder.{name}": style for name, style in _TP_LAYER.items()},
        **{f"decoder.{name}": style for name, style in _TP_LAYER.items()},
        **{f"decoder.{k.replace('self_', 'cross_')}": v for k, v in _TP_ATTENTION.items()},
        "shared": "embedding_rowwise",
        "encoder.embed_tokens": "embedding_rowwise",
        "decoder.embed_tokens": "embedding_rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = None
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "shared": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.norm": "keep_full_weight",
        "decoder.layers.*": "free_full_weight",
        "decoder.norm": "keep_full_weight",
    }

    is_encoder_decoder: bool = True
    encoder_layers: int | None = None
    encoder_layer_types: list[str] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_layers is None:
            self.encoder_layers = self.num_hidden_layers
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        self.encoder_layer_types = self._resolve_layer_types(
            "encoder_layer_types", "encoder_layers", causal=False
        )
        super().__post_init__(**kwargs)
