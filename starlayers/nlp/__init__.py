"""Starformer: transformers with star MLPs, as Hugging Face transformers models.

Install with `pip install 'starlayers[nlp]'`. Importing this package registers the models with
transformers' Auto classes (`AutoModelForCausalLM` and the others).
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("starlayers.nlp needs transformers: pip install 'starlayers[nlp]'") from error

from starlayers.nlp.auto import register_auto_classes
from starlayers.nlp.configuration_starformer import (
    StarformerConfig,
    StarformerEncoderConfig,
    StarformerSeq2SeqConfig,
)
from starlayers.nlp.convert import from_llama, to_llama
from starlayers.nlp.layers_starformer import StarConv
from starlayers.nlp.modeling_starformer import (
    StarformerForCausalLM,
    StarformerForQuestionAnswering,
    StarformerForSequenceClassification,
    StarformerForTokenClassification,
    StarformerModel,
)
from starlayers.nlp.modeling_starformer_encoder import (
    StarformerEncoderForQuestionAnswering,
    StarformerEncoderForSequenceClassification,
    StarformerEncoderForTokenClassification,
    StarformerEncoderModel,
    StarformerForMaskedLM,
)
from starlayers.nlp.modeling_starformer_seq2seq import (
    StarformerForConditionalGeneration,
    StarformerSeq2SeqModel,
)
from starlayers.nlp.sharing import save_with_code
from starlayers.nlp.trainer import StarifyCallback

__all__ = [
    "StarConv",
    "StarformerConfig",
    "StarformerEncoderConfig",
    "StarformerEncoderForQuestionAnswering",
    "StarformerEncoderForSequenceClassification",
    "StarformerEncoderForTokenClassification",
    "StarformerEncoderModel",
    "StarformerForCausalLM",
    "StarformerForConditionalGeneration",
    "StarformerForMaskedLM",
    "StarformerForQuestionAnswering",
    "StarformerForSequenceClassification",
    "StarformerForTokenClassification",
    "StarformerModel",
    "StarformerSeq2SeqConfig",
    "StarformerSeq2SeqModel",
    "StarifyCallback",
    "from_llama",
    "save_with_code",
    "to_llama",
]

register_auto_classes()
