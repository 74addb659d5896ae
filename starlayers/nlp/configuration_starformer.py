"""Configurations of the Starformer family: decoder, encoder, encoder-decoder."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

__all__ = ["StarformerConfig", "StarformerEncoderConfig", "StarformerSeq2SeqConfig"]

#: a configuration after `__post_init__`, which fills in the fields that may be left `None`
Filled = Any

MLP_TYPES = ("star", "sum", "plain")
ATTENTION_GATES = ("none", "head", "channel")
POOLINGS = ("mean", "bos")
#: what a user may write, and the name transformers' caches and masks know it by
LAYER_TYPES = {
    "attention": "full_attention",
    "full_attention": "full_attention",
    "star_conv": "conv",
    "conv": "conv",
    "linear_attention": "conv",  # what transformers before 5.18 makes of it
}

_TP_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.gate_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_TP_MLP = {
    "layers.*.ffn.mlp.f1": "colwise",
    "layers.*.ffn.mlp.f2": "colwise",
    "layers.*.ffn.mlp.g": "rowwise",
}


@strict
class StarformerConfig(PreTrainedConfig):
    """Configuration of a star-MLP decoder, and the base of the other two.

    A layer is `x + mixer(norm(x))`, then `x + g(act(f1(norm(x))) * (offset + f2(norm(x))))`.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        head_dim, max_position_embeddings, rope_parameters, rms_norm_eps, attention_bias,
        attention_dropout, mlp_bias, initializer_range, tie_word_embeddings, use_cache and the
            token ids: as in `LlamaConfig`.
        intermediate_size: channels of the star product; default 8/3 of `hidden_size`, rounded to
            a multiple of 64, which has the parameters of a plain MLP of 4 times `hidden_size`.
        hidden_act: a row of `starlayers.ACTIVATIONS` for the first branch; `None` for none.
        mlp_type: "star"; "sum", the paper's ablation; or "plain", `g(act(f1(x)))`, the baseline.
        mlp_rank, mlp_offset, mlp_recompute: `rank`, `offset`, `recompute` of `starlayers.StarMLP`;
            to recompute saves the memory of the MLPs' branches in training, for a third product.
        attention_gate: "none"; "head" or "channel" for a star after the attention: its output
            times `attention_gate_act` of a linear branch of the input, per head or per channel.
        attention_gate_act: a row of `starlayers.ACTIVATIONS`.
        layer_types: "attention" or "star_conv" for each layer; default all attention. They are
            stored under transformers' own names, "full_attention" and "conv".
        conv_kernel_size, conv_act, conv_bias: of the star_conv layers.
        hidden_dropout: dropout on what a mixer or MLP adds.
        classifier_dropout: dropout before a classification head.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown name.

    Source: the gate after attention is from "Gated Attention for Large Language Models", NeurIPS
    2025; a short convolution between two products is the mixer of LFM2.

    Example:
        >>> config = StarformerConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        ...                           layer_types=["star_conv", "attention"])
        >>> config.layer_types, config.intermediate_size
        (['conv', 'full_attention'], 192)
    """

    model_type: ClassVar[str] = "starformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {**_TP_ATTENTION, **_TP_MLP}
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
        self._check_choice("mlp_type", MLP_TYPES)
        self._check_choice("attention_gate", ATTENTION_GATES)
        self.layer_types = self._checked_layers(
            "layer_types", "num_hidden_layers", causal=self.causal
        )
        if self.attention_gate == "none":
            self._leave_out_of_tp_plan("attn.gate_proj")
        if self.mlp_type == "plain":
            self._leave_out_of_tp_plan("ffn.mlp.f2")
        elif self.mlp_rank > 1:
            # a branch is laid out (rank, intermediate): its rows cannot be split in one piece
            self._leave_out_of_tp_plan("ffn")
        super().__post_init__(**kwargs)

    def _leave_out_of_tp_plan(self, part: str) -> None:
        whole = self.base_model_tp_plan or {}
        plan = {name: style for name, style in whole.items() if part not in name}
        self.base_model_tp_plan = plan  # type: ignore[misc]

    def _check_sizes(self) -> None:
        owner, heads = type(self).__name__, self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"{owner}: hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={heads}; give head_dim or change one of them"
            )
        groups = self.num_key_value_heads or heads
        if heads % groups:
            raise ValueError(
                f"{owner}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={groups}"
            )
        if (self.head_dim or self.hidden_size // heads) % 2:
            size = self.head_dim or self.hidden_size // heads
            raise ValueError(f"{owner}: rotary embeddings need an even head size, got {size}")
        stars_own = (self.mlp_rank != 1, self.mlp_offset, self.mlp_recompute)
        if self.mlp_type == "plain" and any(stars_own):
            raise ValueError(
                f"{owner}: mlp_type='plain' has no second branch for mlp_rank={self.mlp_rank}, "
                f"mlp_offset={self.mlp_offset}, mlp_recompute={self.mlp_recompute}"
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(
                f"{type(self).__name__}: unknown {name} {getattr(self, name)!r}, choose one of "
                f"{', '.join(choices)}"
            )

    def _checked_layers(self, name: str, number: str, *, causal: bool) -> list[str]:
        owner, types, count = type(self).__name__, getattr(self, name), getattr(self, number)
        if types is None:
            return ["full_attention"] * count
        unknown = [t for t in types if t not in LAYER_TYPES]
        if unknown:
            raise ValueError(
                f"{owner}: unknown {name} {unknown}, choose from 'attention' and 'star_conv'"
            )
        if len(types) != count:
            raise ValueError(f"{owner}: {len(types)} {name} for {number}={count}")
        known = [LAYER_TYPES[t] for t in types]
        if causal and count and "full_attention" not in known:
            raise ValueError(
                f"{owner}: {name} needs one 'attention' layer at least: a decoder's cache counts "
                "its tokens there"
            )
        if "conv" in known and not causal and self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"{owner}: a star_conv encoder layer looks to both sides alike and needs an odd "
                f"conv_kernel_size, got {self.conv_kernel_size}"
            )
        return known


@strict
class StarformerEncoderConfig(StarformerConfig):
    """Configuration of a star-MLP encoder: every token sees every other.

    Args:
        classifier_pooling: what `StarformerEncoderForSequenceClassification` classifies: the
            "mean" of all tokens, or the first, "bos".
        All others: as `StarformerConfig`.

    Raises:
        ValueError: as `StarformerConfig`, and for an even `conv_kernel_size` where used.

    Example:
        >>> StarformerEncoderConfig(num_hidden_layers=2).classifier_pooling
        'mean'
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
        num_hidden_layers, layer_types: of the decoder.
        encoder_layers, encoder_layer_types: of the encoder; as many as the decoder has, all
            attention, by default.
        decoder_start_token_id: what generation starts from; default `bos_token_id`.
        All others: as `StarformerConfig`, for both sides.

    Raises:
        ValueError: as `StarformerConfig`.

    Example:
        >>> config = StarformerSeq2SeqConfig(num_hidden_layers=2, encoder_layers=4)
        >>> len(config.encoder_layer_types), config.decoder_start_token_id
        (4, 1)
    """

    model_type: ClassVar[str] = "starformer_seq2seq"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        **{f"encoder.{name}": style for name, style in {**_TP_ATTENTION, **_TP_MLP}.items()},
        **{f"decoder.{name}": style for name, style in {**_TP_ATTENTION, **_TP_MLP}.items()},
        **{
            f"decoder.{name.replace('self_attn', 'cross_attn')}": style
            for name, style in _TP_ATTENTION.items()
        },
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
        self.encoder_layer_types = self._checked_layers(
            "encoder_layer_types", "encoder_layers", causal=False
        )
        super().__post_init__(**kwargs)
