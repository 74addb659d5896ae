"""transformers' own model tests on the decoders: the default one, and one of all star parts."""

import unittest
from typing import ClassVar

from starlayers import nlp
from tests.nlp.hf import harness
from tests.nlp.hf.testers import Family, HybridFamily

MIXINS = harness.mixins("model", "generation", "training", "tensor_parallel", "fsdp")


class StarformerTest(Family, *MIXINS, unittest.TestCase):
    config_class = nlp.StarformerConfig
    classes: ClassVar = {
        "base": nlp.StarformerModel,
        "causal_lm": nlp.StarformerForCausalLM,
        "sequence_classification": nlp.StarformerForSequenceClassification,
        "token_classification": nlp.StarformerForTokenClassification,
        "question_answering": nlp.StarformerForQuestionAnswering,
    }


class HybridStarformerTest(HybridFamily, StarformerTest):
    fields: ClassVar = {
        "layer_types": ["star_conv", "attention"],
        "attention_gate": "channel",
        "hidden_act": None,
        "mlp_rank": 2,
    }
