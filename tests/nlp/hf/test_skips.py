"""The list of skips names tests that exist, as the table has them all."""

import pytest
import transformers
from packaging.version import Version

from tests.nlp.hf import harness, skips

harness.mixins("model")

from tests.nlp.hf import test_decoder, test_encoder, test_seq2seq  # noqa: E402

FAMILIES = [
    test_decoder.StarformerTest,
    test_decoder.HybridStarformerTest,
    test_encoder.StarformerEncoderTest,
    test_encoder.HybridStarformerEncoderTest,
    test_seq2seq.StarformerSeq2SeqTest,
    test_seq2seq.HybridStarformerSeq2SeqTest,
]


@pytest.mark.parametrize("skip", skips.MODEL + skips.MACHINE, ids=lambda skip: skip.tests)
def test_listed_tests_exist(skip):
    if Version(transformers.__version__) < Version(skip.since):
        pytest.skip(f"not before transformers {skip.since}")
    named = [(f.__name__, name) for f in FAMILIES for name in dir(f) if name.startswith("test_")]
    assert any(skip is skips.entry(*test) for test in named)


def test_table():
    assert skips.table().count("\n") == 1 + len(skips.MODEL + skips.MACHINE) + len(skips.LEFT_OUT)
