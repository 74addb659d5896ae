"""Layers of the Starformer models: token mixers and the block around them."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .cache_starformer import takes_cache
from .configuration_starformer import ResolvedConfig

try:
    from starlayers.activations import get_activation
    from starlayers.coefficients.modules import SumMLP
    from starlayers.functional import star_product
    from starlayers.modules import StarBlock, StarMLP
    from starlayers.recompute import recomputed
except ImportError:  # loaded from a folder that `save_with_code` wrote, without starlayers
    from .portable_starformer import (  # type: ignore[assignment]
        StarBlock,
        StarMLP,
        SumMLP,
        get_activation,
        recomputed,
        star_product,
    )

#: cosines and sines of the rotation angles, each (batch, length, head_dim)
Rotation = tuple[Tensor, Tensor]


class StarformerRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), as in Llama.

    The angle of position p and pair i is `p * theta^(-2i / head_dim)`, changed by the scaling that
    `config.rope_parameters["rope_type"]` names. Without the matrix product of transformers 5.17,
    which TF32 would round.
    """

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class StarformerAttention(nn.Module):
    """Grouped-query attention, optionally gated: `act(gate_proj(x)) * attention(x)`.

    With `encoder_hidden_states` keys and values come from these (cross-attention), without rotary
    positions.

    Shapes: (batch, length, hidden_size) -> the same, and the attention weights (batch, heads,
    length, keys), or `None` where the attention implementation does not return them.

    Source of the gate: "Gated Attention for Large Language Models", NeurIPS 2025.

    Example:
        >>> from starlayers.nlp import StarformerConfig
        >>> config = StarformerConfig(hidden_size=8, num_attention_heads=2, attention_gate="head",
        ...                           attn_implementation="eager")
        >>> attention = StarformerAttention(config, 0)
        >>> rotation = StarformerRotaryEmbedding(config)(torch.ones(1), torch.arange(3)[None])
        >>> output, weights = attention(torch.randn(1, 3, 8), position_embeddings=rotation)
        >>> output.shape, weights.shape, attention.gate_proj.out_features  # one gate per head
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]), 2)
    """

    def __init__(self, config: ResolvedConfig, layer_idx: int, *, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = causal
        self.gate_act = config.attention_gate_act
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=config.attention_bias)

        self.q_proj = linear(config.hidden_size, query_size)
        self.k_proj = linear(config.hidden_size, key_size)
        self.v_proj = linear(config.hidden_size, key_size)
        self.o_proj = linear(query_size, config.hidden_size)
        gate_sizes = {"none": 0, "head": config.num_attention_heads, "channel": query_size}
        gate_size = gate_sizes[config.attention_gate]
        self.gate_proj = linear(config.hidden_size, gate_size) if gate_size else None

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = self._split_heads(self.q_proj(hidden_states))
        if encoder_hidden_states is None:
            key, value = self._key_value(hidden_states)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if past_key_values is not None:
                # the paged cache of continuous batching writes its block indices into kwargs
                key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        else:
            key, value = self._encoder_key_value(encoder_hidden_states, past_key_values)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.flatten(-2)
        if self.gate_proj is not None:
            output = self._apply_gate(self.gate_proj(hidden_states), output)
        return self.o_proj(output), weights

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _key_value(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))

    def _encoder_key_value(
        self, states: Tensor, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        """Compute keys and values of the encoder's states, or read them from the cache."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._key_value(states)
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value

    def _apply_gate(self, gate: Tensor, x: Tensor) -> Tensor:
        if gate.shape == x.shape:
            return star_product(gate, x, self.gate_act)
        x = x.unflatten(-1, (-1, self.head_dim))
        return (get_activation(self.gate_act).fn(gate)[..., None] * x).flatten(-2)


class StarConv(nn.Module):
    """Token mixer: a short depthwise convolution between two star products.

    Computes `o_proj(act(gate_proj(x)) * conv(act(f1(x)) * f2(x)))`, in time linear in the length.
    The convolution of a decoder reads a token and the `conv_kernel_size - 1` tokens before it, that
    of an encoder `conv_kernel_size // 2` tokens on either side. Padding counts as zero.

    Shapes: (batch, length, hidden_size) -> the same. `attention_mask` (batch, length) is 0 for
    padding. `documents` (batch, length) holds the number of the text that a token belongs to,
    where several texts are packed in one sequence: a decoder's convolution does not cross them.

    Source: the mixer of LFM2 (Liquid AI, 2025), which has no activation.

    Example:
        Changing the last of five tokens changes no earlier output of a decoder:

        >>> from starlayers.nlp import StarformerConfig
        >>> mixer = StarConv(StarformerConfig(hidden_size=8, num_attention_heads=2), 0)
        >>> x = torch.randn(1, 5, 8)
        >>> y, changed = mixer(x), mixer(torch.cat([x[:, :4], torch.ones(1, 1, 8)], 1))
        >>> y.shape, torch.equal(y[:, :4], changed[:, :4]), torch.equal(y[:, 4], changed[:, 4])
        (torch.Size([1, 5, 8]), True, False)
    """

    def __init__(self, config: ResolvedConfig, layer_idx: int, *, causal: bool = True) -> None:
        super().__init__()
        size, bias, kernel = config.hidden_size, config.conv_bias, config.conv_kernel_size
        self.layer_idx = layer_idx
        self.act = config.conv_act
        self.causal = causal
        self.kernel_size = kernel
        self.f1 = nn.Linear(size, size, bias=bias)
        self.f2 = nn.Linear(size, size, bias=bias)
        self.conv = nn.Conv1d(size, size, kernel, groups=size, bias=bias)
        self.gate_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        length = hidden_states.shape[1]
        x = star_product(self.f1(hidden_states), self.f2(hidden_states), self.act)
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x.dtype)
        x = x.transpose(1, 2)
        if past_key_values is not None:
            x = past_key_values.update_conv_state(
                x, self.layer_idx, conv_kernel_size=self.kernel_size
            )
        if documents is not None:
            x = self._conv_within_documents(x, documents)
        else:
            before = self.kernel_size - 1 if self.causal else self.kernel_size // 2
            x = self.conv(F.pad(x, (before, self.kernel_size - 1 - before)))[..., -length:]
        x = x.transpose(1, 2)
        return self.o_proj(star_product(self.gate_proj(hidden_states), x, self.act))

    def _conv_within_documents(self, x: Tensor, documents: Tensor) -> Tensor:
        """Apply the causal convolution to tokens of the same document only."""
        length = x.shape[-1]
        y = torch.zeros_like(x) if self.conv.bias is None else self.conv.bias[:, None]
        for shift in range(self.kernel_size):
            earlier = F.pad(x, (shift, 0))[..., :length]
            same = F.pad(documents, (shift, 0), value=-1)[..., :length] == documents
            y = y + self.conv.weight[:, :, self.kernel_size - 1 - shift] * earlier * same[:, None]
        return y


class PlainMLP(nn.Module):
    """MLP with one branch, `g(act(f1(x)))`, for `mlp_type="plain"`."""

    def __init__(self, dim: int, hidden: int, *, act: str | None, bias: bool) -> None:
        super().__init__()
        self.act = act
        self.f1 = nn.Linear(dim, hidden, bias=bias)
        self.g = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(get_activation(self.act).fn(self.f1(x)))


class RankMLP(nn.Module):
    """MLP whose hidden features are sums of several products, for `mlp_rank > 1`.

    `g(sum_r act(f1_r(x)) * (offset + f2_r(x)))`. The outputs of `f1` and `f2` are laid out
    (rank, hidden), as saved models have them: nothing in their files would tell that layout from
    the one of `RankStarMLP`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        rank: int,
        *,
        act: str | None,
        bias: bool,
        offset: float,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.act, self.offset, self.rank, self.recompute = act, offset, rank, recompute
        self.f1 = nn.Linear(dim, rank * hidden, bias=bias)
        self.f2 = nn.Linear(dim, rank * hidden, bias=bias)
        self.g = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._definition, x)
        return self._definition(x)

    def _definition(self, x: Tensor) -> Tensor:
        y = star_product(self.f1(x), self.f2(x) + self.offset, self.act)
        return self.g(y.unflatten(-1, (self.rank, -1)).sum(-2))


def make_mlp(config: ResolvedConfig) -> nn.Module:
    """Make the MLP of a layer: a star, sum or plain MLP, or one of several products."""
    sizes = (config.hidden_size, config.intermediate_size)
    options: dict[str, Any] = {"act": config.hidden_act, "bias": config.mlp_bias}
    if config.mlp_type == "plain":
        return PlainMLP(*sizes, **options)
    options["recompute"] = config.mlp_recompute
    if config.mlp_type == "sum":
        return SumMLP(*sizes, **options)
    options["offset"] = config.mlp_offset
    if config.mlp_rank > 1:
        return RankMLP(*sizes, config.mlp_rank, **options)
    return StarMLP(*sizes, **options)


class StarformerLayer(GradientCheckpointingLayer):
    """Pre-norm layer: a token mixer, optionally cross-attention, then a star MLP.

    Computes `x = x + mixer(norm(x))`, with `cross_attention` then `x = x + attention(norm(x),
    encoder_hidden_states)`, then `x + mlp(norm(x))`. `layer_type` is "full_attention" or "conv".

    Shapes: (batch, length, hidden_size) -> the same.

    Example:
        >>> from starlayers.nlp import StarformerConfig
        >>> config = StarformerConfig(hidden_size=8, num_attention_heads=2)
        >>> layer, x = StarformerLayer(config, 0, "conv"), torch.randn(1, 5, 8)
        >>> mixed = x + layer.conv(layer.input_layernorm(x))
        >>> torch.allclose(layer(x), mixed + layer.ffn.mlp(layer.ffn.pre(mixed)), atol=1e-6)
        True
    """

    def __init__(
        self,
        config: ResolvedConfig,
        layer_idx: int,
        layer_type: str,
        *,
        causal: bool = True,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layer_type = layer_type
        self.input_layernorm = LlamaRMSNorm(size, eps)
        if layer_type == "full_attention":
            self.self_attn = StarformerAttention(config, layer_idx, causal=causal)
        else:
            self.conv = StarConv(config, layer_idx, causal=causal)
        if cross_attention:
            self.cross_attn_layernorm = LlamaRMSNorm(size, eps)
            self.cross_attn = StarformerAttention(config, layer_idx, causal=False)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.ffn = StarBlock(
            size,
            make_mlp(config),
            # Trainer excludes parameters with "norm" in their name from weight decay
            pre=nn.Sequential(OrderedDict(norm=LlamaRMSNorm(size, eps))),
            # without `post` the block passes its residual to the MLP, which adds it in its kernel
            post=nn.Dropout(config.hidden_dropout) if config.hidden_dropout else None,
        )

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
        past_key_values: Cache | None = None,
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mixer_cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            mixer_cache = past_key_values.self_attention_cache
        x = self.input_layernorm(hidden_states)
        if self.layer_type == "full_attention":
            x, _ = self.self_attn(x, attention_mask, position_embeddings, mixer_cache, **kwargs)
        else:
            x = self.conv(x, attention_mask, mixer_cache, documents)
        hidden_states = hidden_states + self.dropout(x)
        if encoder_hidden_states is not None:
            x, _ = self.cross_attn(
                self.cross_attn_layernorm(hidden_states),
                encoder_attention_mask,
                None,
                past_key_values,
                encoder_hidden_states,
                **kwargs,
            )
            hidden_states = hidden_states + self.dropout(x)
        return self.ffn(hidden_states)
