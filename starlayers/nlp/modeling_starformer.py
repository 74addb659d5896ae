"""Starformer, the decoder: a star-MLP language model and its heads."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_starformer import CACHE, takes_cache
from .configuration_starformer import Filled, StarformerConfig
from .layers_starformer import (
    StarformerAttention,
    StarformerLayer,
    StarformerRMSNorm,
    StarformerRotaryEmbedding,
)

__all__ = [
    "StarformerForCausalLM",
    "StarformerForQuestionAnswering",
    "StarformerForSequenceClassification",
    "StarformerForTokenClassification",
    "StarformerModel",
    "StarformerPreTrainedModel",
]


class StarformerPreTrainedModel(PreTrainedModel):
    """What all models of the family share: how they are loaded, initialised and split."""

    config: StarformerConfig
    config_class = StarformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("StarformerLayer",)
    _skip_keys_device_placement = (CACHE,)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": StarformerLayer,
        "attentions": OutputRecorder(StarformerAttention, index=1, layer_name="self_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            # a token has few neighbours: at the range of the wide layers they would come to nothing
            init.normal_(module.weight, std=module.kernel_size[0] ** -0.5)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As every model's; the configuration saved names no code that is not saved with it."""
        named = self.config.__dict__.pop("auto_map", None) or {}
        others = {k: v for k, v in named.items() if "_starformer" not in str(v)}
        if others:
            self.config.auto_map = others
        try:
            return super().save_pretrained(*args, **kwargs)  # adds what code it writes
        finally:
            self.config.__dict__.pop("auto_map", None)
            if named:
                self.config.auto_map = named

    def _build(
        self,
        config: Filled,
        layer_types: list[str],
        *,
        causal: bool,
        cross_attention: bool = False,
    ) -> None:
        """The parts that the decoder and the encoder have in common."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            StarformerLayer(config, i, kind, causal=causal, cross_attention=cross_attention)
            for i, kind in enumerate(layer_types)
        )
        self.norm = StarformerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = StarformerRotaryEmbedding(config)
        self.gradient_checkpointing = False

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{type(self).__name__} needs either input_ids or inputs_embeds, got "
                f"{'neither' if input_ids is None else 'both'}"
            )
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _through_layers(
        self,
        hidden_states: Tensor,
        masks: dict[str, Tensor | None],
        position_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        rotation = self.rotary_emb(hidden_states, position_ids=position_ids)
        layer: Any
        for layer in self.layers:
            # positional where a gradient may have to go through a reentrant checkpoint
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=masks[layer.layer_type],
                position_embeddings=rotation,
                position_ids=position_ids,
                **kwargs,
            )
        return self.norm(hidden_states)

    def _token_loss(self, logits: Tensor, labels: Tensor | None, **kwargs: Any) -> Tensor | None:
        """A language model's loss, or none without labels."""
        if labels is None:
            return None
        vocabulary = self.config.vocab_size
        return self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)


class TokenHead(GenericForTokenClassification):
    """A classifier on each token of what a `base_class` gives."""

    base_class: type[PreTrainedModel]
    accepts_loss_kwargs = False  # its loss is a mean, whatever num_items_in_batch says

    # not the generic one's, which asks AutoModel: a folder of code is not registered there
    def __init__(self, config: Filled) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SpanHead(GenericForQuestionAnswering):
    """A start and an end score for each token of what a `base_class` gives."""

    base_class: type[PreTrainedModel]

    def __init__(self, config: Filled) -> None:  # as in `TokenHead`
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = self.base_class(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


class StarformerModel(StarformerPreTrainedModel):
    """The decoder without a head: token ids to hidden states.

    Shapes: ids (batch, length) -> `last_hidden_state` (batch, length, hidden_size).

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4)
        >>> StarformerModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: Filled) -> None:
        super().__init__(config)
        self._build(config, config.layer_types, causal=True)
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        hidden_states = self._embedded(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        documents = None
        packed = attention_mask is None and past_key_values is None
        if position_ids is not None and packed and has_star_conv(self.config):
            # positions that start anew: texts packed in one row, as the causal mask understands it
            documents = find_packed_sequence_indices(position_ids)
        position_ids = next_positions(hidden_states, position_ids, past_key_values)
        masks = causal_masks(
            self.config, hidden_states, attention_mask, position_ids, past_key_values
        )
        hidden_states = self._through_layers(
            hidden_states,
            masks,
            position_ids,
            use_cache=use_cache,
            documents=documents,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return BaseModelOutputWithPast(hidden_states, past_key_values)


def has_star_conv(config: Filled) -> bool:
    """Whether a decoder's layers mix tokens otherwise than by attention."""
    return any(kind != "full_attention" for kind in config.layer_types)


def next_positions(x: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
    """The positions given, or those that follow what the cache has seen."""
    if position_ids is not None:
        return position_ids
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(x.shape[1], device=x.device) + seen)[None]


def causal_masks(
    config: Filled,
    hidden_states: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> dict[str, Tensor | None]:
    """A mask for each type of layer; `generate` may have made them already."""
    if isinstance(attention_mask, dict):
        return attention_mask
    given = {
        "config": config,
        "inputs_embeds": hidden_states,
        "attention_mask": attention_mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    padding = create_recurrent_attention_mask(**given) if has_star_conv(config) else None
    masks = dict.fromkeys(config.layer_types, padding)
    return {**masks, "full_attention": create_causal_mask(**given)}


def wanted_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states whose logits are asked for: the last few (0: all), or those of a tensor.

    The tensor holds positions, (n,) for all samples or (batch, n) for each, or it is a mask
    (batch, length); behind a mask the states are (chosen, hidden_size). It is what transformers
    calls `slice_logits_to_keep`, which 5.17 has not.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class StarformerForCausalLM(StarformerPreTrainedModel, GenerationMixin):
    """The decoder as a language model: next-token logits, and loss where labels are given.

    Shapes: ids (batch, length) -> `logits` (batch, length, vocab_size).

    Raises:
        ValueError: as `StarformerModel`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4)
        >>> model = StarformerForCausalLM(config)
        >>> model.generate(torch.tensor([[1, 5, 7]]), min_new_tokens=4, max_new_tokens=4).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: Filled) -> None:
        super().__init__(config)
        self.model = StarformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        logits = self.lm_head(wanted_positions(outputs.last_hidden_state, logits_to_keep))
        loss = self._token_loss(logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class StarformerForSequenceClassification(
    GenericForSequenceClassification, StarformerPreTrainedModel
):
    """The decoder with a classifier on the last token that is not padding.

    Shapes: ids (batch, length) -> `logits` (batch, num_labels).

    Raises:
        ValueError: as `StarformerModel`, and for several texts without a `pad_token_id`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4, num_labels=3)
        >>> StarformerForSequenceClassification(config)(torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 3])
    """

    accepts_loss_kwargs = False

    def __init__(self, config: Filled) -> None:  # as in `TokenHead`
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = StarformerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class StarformerForTokenClassification(TokenHead, StarformerPreTrainedModel):
    """The decoder with a classifier on each token.

    Shapes: ids (batch, length) -> `logits` (batch, length, num_labels).

    Raises:
        ValueError: as `StarformerModel`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4, num_labels=3)
        >>> StarformerForTokenClassification(config)(torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 3])
    """

    base_class = StarformerModel


class StarformerForQuestionAnswering(SpanHead, StarformerPreTrainedModel):
    """The decoder with a start and an end score for each token.

    Shapes: ids (batch, length) -> `start_logits`, `end_logits` (batch, length).

    Raises:
        ValueError: as `StarformerModel`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4)
        >>> StarformerForQuestionAnswering(config)(torch.tensor([[1, 2]])).start_logits.shape
        torch.Size([1, 2])
    """

    base_class = StarformerModel
