"""Turn text into tokens: a byte-level tokenizer, and windows for causal language models."""

from collections.abc import Iterable
from typing import Any

from starlayers.datasets.optional import require

datasets: Any = require("datasets")
tokenizers: Any = require("tokenizers", "datasets,nlp")
transformers: Any = require("transformers", "datasets,nlp")

__all__ = ["SPECIAL_TOKENS", "byte_level_bpe", "windows"]

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}
"""Tokens with the ids 0 to 3 in every tokenizer made by `byte_level_bpe`.

Example:
    >>> from starlayers.datasets.tokens import SPECIAL_TOKENS, byte_level_bpe
    >>> tokenizer = byte_level_bpe(["the star op"], vocab_size=262)
    >>> tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values()))
    [0, 1, 2, 3]
"""


def byte_level_bpe(texts: Iterable[str], vocab_size: int = 4000) -> Any:
    """Train a byte-level BPE tokenizer, which has no unknown characters.

    Args:
        texts: texts to train on.
        vocab_size: tokens, of which 256 are the bytes and 4 are `SPECIAL_TOKENS`.

    Returns:
        A `transformers.PreTrainedTokenizerFast`. Ids 0 to 3 are `<pad>`, `<s>`, `</s>` and
        `<mask>`; encoding adds none of them by itself.

    Raises:
        ValueError: `vocab_size` below 260.

    Example:
        >>> tokenizer = byte_level_bpe(["the star op", "the sum op"], vocab_size=270)
        >>> tokenizer.decode(tokenizer("the stärs").input_ids)
        'the stärs'
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"byte_level_bpe needs vocab_size of at least {smallest}, got {vocab_size}"
        )
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS.values()),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def windows(tokenizer: Any, texts: Iterable[str], length: int) -> Any:
    """Cut texts into rows of tokens for a causal language model.

    The texts are joined with `</s>` between them. A row has `length + 1` tokens and begins with the
    last token of the row before, so that every token but the first is predicted exactly once.
    Tokens that do not fill a last row are left out.

    Returns:
        A `datasets.Dataset` with equal columns `input_ids` and `labels`.

    Raises:
        ValueError: the texts together are shorter than one row.

    Example:
        >>> tokenizer = byte_level_bpe(["the star op"], vocab_size=260)
        >>> windows(tokenizer, ["abcd", "ef"], length=3)["input_ids"][:]
        [[68, 69, 70, 71], [71, 2, 72, 73]]
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts)).input_ids:
        stream += [*ids, tokenizer.eos_token_id]
    rows = [stream[i : i + length + 1] for i in range(0, len(stream) - length, length)]
    if not rows:
        raise ValueError(f"windows of {length} tokens: the texts have {len(stream)} together")
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
