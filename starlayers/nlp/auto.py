"""The family's places in transformers' Auto classes."""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from starlayers.nlp import configuration_starformer as configuration
from starlayers.nlp import modeling_starformer as decoder
from starlayers.nlp import modeling_starformer_encoder as encoder
from starlayers.nlp import modeling_starformer_seq2seq as seq2seq

__all__ = ["AUTO_CLASSES", "register_auto_classes"]

#: Auto class -> the models it can make; each model knows its configuration
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
    """Make `AutoConfig`, `AutoModel` and its kin know the family; calling it again is harmless.

    Example:
        >>> register_auto_classes()
        >>> transformers.AutoConfig.for_model("starformer").model_type
        'starformer'
    """
    for config in (
        configuration.StarformerConfig,
        configuration.StarformerEncoderConfig,
        configuration.StarformerSeq2SeqConfig,
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name, models in AUTO_CLASSES.items():
        for model in models:
            getattr(transformers, name).register(model.config_class, model, exist_ok=True)
    # by this table of names Trainer's label smoothing knows whose labels it has to shift
    name = decoder.StarformerForCausalLM.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("starformer", name)
