"""Starformer decoder: language model, classification and question-answering heads."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_starformer import CACHE, takes_cache
from .configuration_starformer import ResolvedConfig, StarformerConfig
from .layers_starformer import StarformerAttention, StarformerLayer, StarformerRotaryEmbedding


class StarformerPreTrainedModel(PreTrainedModel):
    """Base class of all Starformer models: initialisation, loading, saving."""

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
            # a depthwise convolution sums over few inputs: initializer_range would be far too small
            init.normal_(module.weight, std=module.kernel_size[0] ** -0.5)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; `auto_map` in config.json names only code saved beside it."""
        auto_map = self.config.__dict__.pop("auto_map", None) or {}
        other_code = {k: v for k, v in auto_map.items() if "_starformer" not in str(v)}
        if other_code:
            self.config.auto_map = other_code
        try:
            # adds the entries of the code files that it writes
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.__dict__.pop("auto_map", None)
            if auto_map:
                self.config.auto_map = auto_map

    def _build(
        self,
        config: ResolvedConfig,
        layer_types: list[str],
        *,
        causal: bool,
        cross_attention: bool = False,
    ) -> None:
        """Create embedding, layers, final norm and rotary embedding."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            StarformerLayer(config, i, layer_type, causal=causal, cross_attention=cross_attention)
            for i, layer_type in enumerate(layer_types)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = StarformerRotaryEmbedding(config)
        self.gradient_checkpointing = False

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{type(self).__name__} needs either input_ids or inputs_embeds, got "
                f"{'neither' if input_ids is None else 'both'}"
            )
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _run_layers(
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
            # positional arguments: reentrant checkpointing passes no gradient to keyword arguments
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=masks[layer.layer_type],
                position_embeddings=rotation,
                position_ids=position_ids,
                **kwargs,
            )
        return self.norm(hidden_states)


class Head:
    """Mixin for models with a head: `base_class` makes the base model, `add_head` the head.

    Its constructor replaces that of transformers' generic heads, which makes the base model by
    AutoModel: classes loaded from a folder with code are not registered there.
    """

    base_class: type[PreTrainedModel]

    def __init__(self: Any, config: ResolvedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: ResolvedConfig) -> None:
        """Create a linear classifier and the dropout before it."""
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class LMHead(Head, StarformerPreTrainedModel):
    """Base class of models with a linear layer from hidden states to logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def add_head(self, config: ResolvedConfig) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def _lm_output(
        self,
        output_class: type[ModelOutput],
        outputs: ModelOutput,
        labels: Tensor | None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Return logits, the loss if there are labels, and the states in `outputs`."""
        states = dict(outputs)
        logits = self.lm_head(select_states(states.pop("last_hidden_state"), logits_to_keep))
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return output_class(loss=loss, logits=logits, **states)


class TokenHead(Head, GenericForTokenClassification):
    """Base class of models with a linear classifier on each token."""

    accepts_loss_kwargs = False  # the loss is a mean and ignores num_items_in_batch


class SpanHead(Head, GenericForQuestionAnswering):
    """Base class of models with a start and an end score for each token."""

    def add_head(self, config: ResolvedConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


class StarformerModel(StarformerPreTrainedModel):
    """Decoder without a head: token ids to hidden states.

    Several texts may be packed in one sequence: without a mask and a cache, `position_ids` that
    start again at 0 separate them, in attention and in star_conv layers.

    Shapes: ids (batch, length) -> `last_hidden_state` (batch, length, hidden_size).

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4)
        >>> StarformerModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: ResolvedConfig) -> None:
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
        hidden_states = self._embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        documents = None
        has_star_conv = any(layer.layer_type == "conv" for layer in self.layers)
        may_be_packed = attention_mask is None and past_key_values is None
        if position_ids is not None and may_be_packed and has_star_conv:
            # the condition under which create_causal_mask separates packed texts
            documents = find_packed_sequence_indices(position_ids)
        position_ids = resolve_positions(hidden_states, position_ids, past_key_values)
        masks = causal_masks(
            self.config, hidden_states, attention_mask, position_ids, past_key_values
        )
        hidden_states = self._run_layers(
            hidden_states,
            masks,
            position_ids,
            use_cache=use_cache,
            documents=documents,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return BaseModelOutputWithPast(hidden_states, past_key_values)


def resolve_positions(x: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
    """Return `position_ids` or, if `None`, positions that continue the cache."""
    if position_ids is not None:
        return position_ids
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(x.shape[1], device=x.device) + start)[None]


def causal_masks(
    config: ResolvedConfig,
    hidden_states: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> dict[str, Tensor | None]:
    """Return the mask of each layer type, made here or before by `generate`."""
    if isinstance(attention_mask, dict):
        return attention_mask
    masks = create_masks_for_generate(config, hidden_states, attention_mask, cache, position_ids)
    return cast(dict[str, Tensor | None], masks)


def select_states(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the hidden states whose logits are to be computed.

    `logits_to_keep` is the number of last positions (0 for all), positions (n,) for all samples or
    (batch, n) a sample, or a boolean mask (batch, length), with which the batch dimension vanishes.
    Same as `slice_logits_to_keep` of transformers, which 5.17 does not have.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class StarformerForCausalLM(LMHead, GenerationMixin):
    """Decoder with a language-model head.

    With `labels`, which may equal the ids, `loss` is the cross-entropy of the next token; labels of
    -100 are ignored.

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

    base_class = StarformerModel

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
        return self._lm_output(CausalLMOutputWithPast, outputs, labels, logits_to_keep, **kwargs)


class StarformerForSequenceClassification(
    Head, GenericForSequenceClassification, StarformerPreTrainedModel
):
    """Decoder with a linear classifier on the last token that is not padding.

    Shapes: ids (batch, length) -> `logits` (batch, num_labels).

    Raises:
        ValueError: as `StarformerModel`, and for several texts without a `pad_token_id`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4, num_labels=3)
        >>> model = StarformerForSequenceClassification(config)
        >>> outputs = model(torch.tensor([[1, 2]]), labels=torch.tensor([2]))
        >>> outputs.logits.shape, bool(outputs.loss > 0)
        (torch.Size([1, 3]), True)
    """

    base_class = StarformerModel
    accepts_loss_kwargs = False

    def add_head(self, config: ResolvedConfig) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class StarformerForTokenClassification(TokenHead, StarformerPreTrainedModel):
    """Decoder with a linear classifier on each token.

    Shapes: ids (batch, length) -> `logits` (batch, length, num_labels).

    Raises:
        ValueError: as `StarformerModel`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4, num_labels=3)
        >>> model = StarformerForTokenClassification(config)
        >>> outputs = model(torch.tensor([[1, 2]]), labels=torch.tensor([[0, 2]]))
        >>> outputs.logits.shape, bool(outputs.loss > 0)
        (torch.Size([1, 2, 3]), True)
    """

    base_class = StarformerModel


class StarformerForQuestionAnswering(SpanHead, StarformerPreTrainedModel):
    """Decoder with a start and an end score for each token (answer spans).

    Shapes: ids (batch, length) -> `start_logits`, `end_logits` (batch, length).

    Raises:
        ValueError: as `StarformerModel`.

    Example:
        >>> config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                           num_attention_heads=4)
        >>> outputs = StarformerForQuestionAnswering(config)(torch.tensor([[1, 2]]))
        >>> outputs.start_logits.shape, outputs.end_logits.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    base_class = StarformerModel
