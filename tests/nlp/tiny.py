"""Tiny models of each family, in every variant that has code of its own."""

from typing import Any

import torch

from starlayers.nlp import (
    StarformerConfig,
    StarformerEncoderConfig,
    StarformerForCausalLM,
    StarformerForConditionalGeneration,
    StarformerSeq2SeqConfig,
)

VOCAB = 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
HYBRID = {"layer_types": ["star_conv", "attention"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "relu6": {"hidden_act": "relu6", "mlp_bias": True, "attention_bias": True},
    "bilinear-rank2": {"hidden_act": None, "mlp_rank": 2, "mlp_offset": 1.0},
    "sum": {"mlp_type": "sum"},
    "plain": {"mlp_type": "plain", "hidden_act": "gelu"},
    "gate-head": {"attention_gate": "head"},
    "gate-channel": {"attention_gate": "channel", "attention_gate_act": "silu"},
    "hybrid": HYBRID,
    "hybrid-gated": {
        **HYBRID,
        "attention_gate": "channel",
        "conv_act": "silu",
        "conv_bias": True,
    },
}


def config(**options: Any) -> StarformerConfig:
    return StarformerConfig(**{**SIZES, **options})


def encoder_config(**options: Any) -> StarformerEncoderConfig:
    return StarformerEncoderConfig(**{**SIZES, **options})


def seq2seq_config(**options: Any) -> StarformerSeq2SeqConfig:
    if "layer_types" in options:
        options["encoder_layer_types"] = options["layer_types"]
    return StarformerSeq2SeqConfig(**{**SIZES, **options})


def decoder(variant: str = "silu", **options: Any) -> StarformerForCausalLM:
    torch.manual_seed(0)
    return StarformerForCausalLM(config(**VARIANTS[variant], **options)).eval()


def seq2seq(variant: str = "silu", **options: Any) -> StarformerForConditionalGeneration:
    torch.manual_seed(0)
    return StarformerForConditionalGeneration(seq2seq_config(**VARIANTS[variant], **options)).eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
