"""Tokenizers trained on text, and windows for language models."""

import random

import pytest

from starlayers.datasets.tokens import SPECIAL_TOKENS, byte_level_bpe, windows


def test_a_tokenizer_knows_every_byte():
    tokenizer = byte_level_bpe(["the star op", "the star op", "the sum"], vocab_size=264)
    assert len(tokenizer) == 264
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<mask>"]
    assert list(SPECIAL_TOKENS.values()) == ["<pad>", "<s>", "</s>", "<mask>"]
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    assert [getattr(tokenizer, name) for name in names] == [0, 1, 2, 3]
    text = "Ünïcode 星 , with spaces ."
    encoded = tokenizer(text)
    assert sorted(encoded) == ["attention_mask", "input_ids"]
    assert tokenizer.decode(encoded.input_ids) == text
    assert len(tokenizer("the").input_ids) == 1
    assert len(tokenizer("xyz").input_ids) == 3  # no token is added


def test_the_size_of_a_vocabulary():
    assert len(byte_level_bpe(["ab"], vocab_size=260)) == 260
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=60_000)
    words = ["".join(letters[i : i + 3]) for i in range(0, len(letters), 3)]
    assert len(byte_level_bpe(words)) == 4000
    with pytest.raises(ValueError, match="vocab_size of at least 260, got 259"):
        byte_level_bpe(["ab"], vocab_size=259)


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (1, [[68, 69], [69, 70], [70, 2], [2, 71], [71, 2]]),
        (2, [[68, 69, 70], [70, 2, 71]]),
        (3, [[68, 69, 70, 2]]),
        (5, [[68, 69, 70, 2, 71, 2]]),
    ],
)
def test_windows_overlap_by_a_token(length, rows):
    tokenizer = byte_level_bpe(["x"], vocab_size=260)
    data = windows(tokenizer, iter(["abc", "d"]), length)
    assert data["input_ids"][:] == rows
    assert data["labels"][:] == rows


def test_texts_shorter_than_a_window():
    tokenizer = byte_level_bpe(["x"], vocab_size=260)
    with pytest.raises(ValueError, match="windows of 6 tokens: the texts have 6 together"):
        windows(tokenizer, ["abc", "d"], 6)
