"""transformers' own model tests on the encoders: the default one, and one of all star parts."""

import unittest
from typing import ClassVar

from starlayers import nlp
from tests.nlp.hf import harness
from tests.nlp.hf.testers import EncoderFamily, HybridFamily

MIXINS = harness.mixins("model", "training", "tensor_parallel")


class StarformerEncoderTest(EncoderFamily, *MIXINS, unittest.TestCase):
    config_class = nlp.StarformerEncoderConfig
    classes: ClassVar = {
        "base": nlp.StarformerEncoderModel,
        "masked_lm": nlp.StarformerForMaskedLM,
        "sequence_classification": nlp.StarformerEncoderForSequenceClassification,
        "token_classification": nlp.StarformerEncoderForTokenClassification,
        "question_answering": nlp.StarformerEncoderForQuestionAnswering,
    }


class HybridStarformerEncoderTest(HybridFamily, StarformerEncoderTest):
    fields: ClassVar = {
        "layer_types": ["star_conv", "attention"],
        "attention_gate": "head",
        "hidden_act": "relu6",
        "mlp_offset": 1.0,
        "classifier_pooling": "bos",
    }
