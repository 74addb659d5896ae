"""Starformer encoder with heads for masked LM, classification, answer spans."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_starformer import ResolvedConfig, StarformerEncoderConfig
from .modeling_starformer import (
    Head,
    LMHead,
    SpanHead,
    StarformerPreTrainedModel,
    TokenHead,
    resolve_positions,
)


class StarformerEncoderPreTrainedModel(StarformerPreTrainedModel):
    """Base class of the encoder models."""

    config: StarformerEncoderConfig
    config_class = StarformerEncoderConfig


class StarformerEncoderModel(StarformerEncoderPreTrainedModel):
    """Encoder without a head: token ids to hidden states, without a causal mask.

    Shapes: ids (batch, length) -> `last_hidden_state` (batch, length, hidden_size).

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`.

    Example:
        >>> config = StarformerEncoderConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4)
        >>> StarformerEncoderModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        types = getattr(config, "encoder_layer_types", config.layer_types)
        self._build(config, types, causal=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        hidden_states = self._embed(input_ids, inputs_embeds)
        is_padding = attention_mask is not None and attention_mask.ndim == 2
        padding = attention_mask if is_padding else None
        masks: dict[Any, Any] = {layer.layer_type: padding for layer in self.layers}
        masks["full_attention"] = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        position_ids = resolve_positions(hidden_states, position_ids, None)
        return BaseModelOutput(self._run_layers(hidden_states, masks, position_ids, **kwargs))


class StarformerForMaskedLM(StarformerEncoderPreTrainedModel, LMHead):
    """Encoder with a masked-language-model head; labels of -100 are ignored.

    Shapes: ids (batch, length) -> `logits` (batch, length, vocab_size).

    Raises:
        ValueError: as `StarformerEncoderModel`.

    Example:
        >>> config = StarformerEncoderConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4)
        >>> ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, 5, -100]])
        >>> outputs = StarformerForMaskedLM(config)(ids, labels=labels)
        >>> loss = nn.functional.cross_entropy(outputs.logits[0, 1], labels[0, 1])
        >>> outputs.logits.shape, torch.allclose(outputs.loss, loss)
        (torch.Size([1, 3, 99]), True)
    """

    base_class = StarformerEncoderModel

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        return self._lm_output(MaskedLMOutput, outputs, labels, **kwargs)


class StarformerEncoderForSequenceClassification(Head, StarformerEncoderPreTrainedModel):
    """Encoder with a classifier of whole texts; a regression if `num_labels=1`.

    The head reads the mean over the tokens that are not padding or, with
    `classifier_pooling="bos"`, the first token that is not padding.

    Shapes: ids and mask (batch, length) -> `logits` (batch, num_labels).

    Raises:
        ValueError: as `StarformerEncoderModel`.

    Example:
        >>> config = StarformerEncoderConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4, num_labels=3)
        >>> model = StarformerEncoderForSequenceClassification(config)
        >>> outputs = model(torch.tensor([[1, 2]]), labels=torch.tensor([2]))
        >>> outputs.logits.shape, bool(outputs.loss > 0)
        (torch.Size([1, 3]), True)
    """

    base_class = StarformerEncoderModel
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        pooled = self._pool(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or mask.ndim != 2:
            return x[:, 0] if self.config.classifier_pooling == "bos" else x.mean(1)
        if self.config.classifier_pooling == "bos":  # padding may be on the left
            return x[torch.arange(len(x), device=x.device), mask.int().argmax(-1)]
        weights = mask[..., None].float()  # sums and counts overflow float16 and round in bfloat16
        return ((x.float() * weights).sum(1) / weights.sum(1).clamp_min(1)).to(x.dtype)


class StarformerEncoderForTokenClassification(TokenHead, StarformerEncoderPreTrainedModel):
    """Encoder with a linear classifier on each token, for tags and named entities.

    Shapes: ids (batch, length) -> `logits` (batch, length, num_labels).

    Raises:
        ValueError: as `StarformerEncoderModel`.

    Example:
        >>> config = StarformerEncoderConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4, num_labels=3)
        >>> model = StarformerEncoderForTokenClassification(config)
        >>> outputs = model(torch.tensor([[1, 2]]), labels=torch.tensor([[0, 2]]))
        >>> outputs.logits.shape, bool(outputs.loss > 0)
        (torch.Size([1, 2, 3]), True)
    """

    base_class = StarformerEncoderModel


class StarformerEncoderForQuestionAnswering(SpanHead, StarformerEncoderPreTrainedModel):
    """Encoder with a start and an end score for each token (answer spans).

    Shapes: ids (batch, length) -> `start_logits`, `end_logits` (batch, length).

    Raises:
        ValueError: as `StarformerEncoderModel`.

    Example:
        >>> config = StarformerEncoderConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
        ...                                  num_attention_heads=4)
        >>> outputs = StarformerEncoderForQuestionAnswering(config)(torch.tensor([[1, 2]]))
        >>> outputs.start_logits.shape, outputs.end_logits.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    base_class = StarformerEncoderModel
