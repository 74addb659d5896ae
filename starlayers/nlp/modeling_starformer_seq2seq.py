"""Starformer encoder-decoder: the decoder has cross-attention to the encoder."""

from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_starformer import CACHE, takes_cache
from .configuration_starformer import ResolvedConfig, StarformerSeq2SeqConfig
from .layers_starformer import StarformerAttention, StarformerLayer
from .modeling_starformer import LMHead, StarformerPreTrainedModel, causal_masks, resolve_positions
from .modeling_starformer_encoder import StarformerEncoderModel


class StarformerSeq2SeqPreTrainedModel(StarformerPreTrainedModel):
    """Base class of the encoder-decoder models."""

    config: StarformerSeq2SeqConfig
    config_class = StarformerSeq2SeqConfig


class NoParallelPlans:
    """Mixin for the encoder and the decoder: no parallel plans of their own."""

    def init_parallel_plans(self) -> None:
        """Set empty plans: those of the shared configuration cover both sides."""
        self._tp_plan: dict[str, Any] = {}
        self._pp_plan: dict[str, Any] = {}
        self._ep_plan: dict[str, Any] = {}
        self._fsdp_plan: dict[str, Any] = {}


class StarformerSeq2SeqEncoder(NoParallelPlans, StarformerEncoderModel):
    """Encoder with the layers that `config.encoder_layer_types` names."""

    config: StarformerSeq2SeqConfig
    config_class = StarformerSeq2SeqConfig


class StarformerSeq2SeqDecoder(NoParallelPlans, StarformerSeq2SeqPreTrainedModel):
    """Decoder whose layers also attend to the encoder's states."""

    _can_record_outputs = {
        "hidden_states": StarformerLayer,
        "attentions": OutputRecorder(StarformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(StarformerAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        self._build(config, config.layer_types, causal=True, cross_attention=True)
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden_states = self._embed(input_ids, inputs_embeds)
        if encoder_hidden_states is None:
            raise ValueError(f"{type(self).__name__} needs encoder_hidden_states")
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache())
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise ValueError(
                f"{type(self).__name__} needs an EncoderDecoderCache, got a "
                f"{type(past_key_values).__name__}; use EncoderDecoderCache(it, DynamicCache())"
            )
        self_cache = None
        if past_key_values is not None:
            self_cache = past_key_values.self_attention_cache
            use_attention_layers(
                past_key_values.cross_attention_cache, encoder_hidden_states.shape[1]
            )
        position_ids = resolve_positions(hidden_states, position_ids, self_cache)
        masks = causal_masks(self.config, hidden_states, attention_mask, position_ids, self_cache)
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        hidden_states = self._run_layers(
            hidden_states,
            masks,
            position_ids,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, past_key_values)


def use_attention_layers(cache: Cache, length: int) -> None:
    """Replace convolution layers in a cross-attention cache by attention layers.

    Transformers builds the cross-attention cache from the layer types of the self-attention, but
    the cross-attention of a star_conv layer caches keys and values like that of any other layer.
    `length` is the number of encoder states, the size of a static layer.
    """
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayerMixin):
            static = isinstance(cache, StaticCache)
            cache.layers[i] = StaticLayer(length) if static else DynamicLayer()


class StarformerSeq2SeqModel(StarformerSeq2SeqPreTrainedModel):
    """Encoder-decoder without a head: token ids to hidden states of the decoder.

    Shapes: ids (batch, length), decoder ids (batch, target length) -> `last_hidden_state`
    (batch, target length, hidden_size).

    Raises:
        ValueError: both or neither of ids and embeddings, on either side.

    Example:
        >>> config = StarformerSeq2SeqConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> StarformerSeq2SeqModel(config)(ids, decoder_input_ids=ids).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = StarformerSeq2SeqEncoder(config)
        self.decoder = StarformerSeq2SeqDecoder(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tie the embeddings of both sides, also if `tie_word_embeddings` is False."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE: getattr(decoder_outputs, CACHE)},
        )


class StarformerForConditionalGeneration(StarformerSeq2SeqPreTrainedModel, LMHead, GenerationMixin):
    """Encoder-decoder with a language-model head, for translation and summaries.

    With `labels` and without decoder ids, the decoder reads the labels shifted by one; labels of
    -100 are ignored in the loss.

    Shapes: ids (batch, length), labels (batch, target length) -> `logits` (batch, target length,
    vocab_size).

    Raises:
        ValueError: as `StarformerSeq2SeqModel`, and labels without a `decoder_start_token_id`.

    Example:
        >>> config = StarformerSeq2SeqConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4, pad_token_id=0)
        >>> ids = torch.tensor([[5, 6, 2]])
        >>> model = StarformerForConditionalGeneration(config)
        >>> model(ids, labels=ids).logits.shape
        torch.Size([1, 3, 99])
        >>> model.generate(ids, min_new_tokens=4, max_new_tokens=4).shape  # and the start token
        torch.Size([1, 5])
    """

    base_class = StarformerSeq2SeqModel
    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _pp_plan = {}

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        # a loss that does not shift the labels: the decoder's input is shifted already
        self.loss_type = "ForMaskedLM"

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels to the right, behind the start token; -100 becomes padding.

        Raises:
            ValueError: the configuration has no `decoder_start_token_id`.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError("labels need decoder_start_token_id or bos_token_id in the config")
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = start
        ignored = shifted == -100
        # the outputs there have no loss, so without a padding token any token will do
        return shifted.masked_fill(ignored, start if pad is None else pad)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return self._lm_output(Seq2SeqLMOutput, outputs, labels, logits_to_keep, **kwargs)
