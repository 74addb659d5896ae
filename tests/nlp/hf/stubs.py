"""Stand-ins for files that transformers' tests import and its source archive lacks."""

# tests/utils/test_configuration_utils.py: arguments that every config takes
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "is_encoder_decoder": True,
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "problem_type": "regression",
}


class ExportTesterMixin:
    """tests/exporters/test_export.py"""


class GenerationTesterMixin:
    """tests/generation/test_utils.py"""
