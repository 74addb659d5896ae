"""Registration of the Starformer models with transformers' Auto classes."""

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from starlayers.nlp import modeling_starformer as decoder
from starlayers.nlp import modeling_starformer_encoder as encoder
from starlayers.nlp import modeling_starformer_seq2seq as seq2seq

#: Auto class -> models it can create; `model.config_class` tells which configuration selects one
AUTO_CLASSES: dict[str, tuple[type[transformers.PreTrainedModel], ...]] = {
    "AutoModel": (
        decoder.StarformerModel,
        encoder.StarformerEncoderModel,
        seq2seq.StarformerSeq2SeqModel,
    ),
    "AutoModelForCausalLM": (decoder.StarformerForCausalLM,),
    "AutoModelForMaskedLM": (encoder.StarformerForMaskedLM,),
    "AutoModelForSeq2SeqLM": (seq2seq.StarformerForConditionalGeneration,),
    "AutoModelForSequenceClassification": (
        decoder.StarformerForSequenceClassification,
        encoder.StarformerEncoderForSequenceClassification,
    ),
    "AutoModelForTokenClassification": (
        decoder.StarformerForTokenClassification,
        encoder.StarformerEncoderForTokenClassification,
    ),
    "AutoModelForQuestionAnswering": (
        decoder.StarformerForQuestionAnswering,
        encoder.StarformerEncoderForQuestionAnswering,
    ),
}


def register_auto_classes() -> None:
    """Register the Starformer classes with transformers' Auto classes.

    Importing `starlayers.nlp` calls this once; further calls change nothing.

    Example:
        >>> register_auto_classes()
        >>> config = transformers.AutoConfig.for_model("starformer", num_hidden_layers=2)
        >>> type(config).__name__, config.layer_types
        ('StarformerConfig', ['full_attention', 'full_attention'])
    """
    for auto_class, models in AUTO_CLASSES.items():
        for model in models:
            config_class: Any = model.config_class
            transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            getattr(transformers, auto_class).register(config_class, model, exist_ok=True)
    # Trainer's label smoothing shifts the labels of the models in this table only
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("starformer", "StarformerForCausalLM")
