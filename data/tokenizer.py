# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of GEODE: a small one trained from scratch, and GEODE's tokens for an existing one."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerBase, Qwen2Tokenizer

from geode.modeling_geode.chat_geode import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    RATIONALE_TOKEN,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
)


END_OF_TEXT_TOKEN = "<|endoftext|>"
# The attribute of the tokenizer that names each token; its identifier is the attribute with `_id` appended.
TOKEN_ATTRIBUTES = {
    "start_image_token": IMAGE_START_TOKEN,
    "end_image_token": IMAGE_END_TOKEN,
    "image_token": IMAGE_TOKEN,
    "rationale_token": RATIONALE_TOKEN,
    "regression_token": "<REG>",
    "box_token": "<3DBBOX>",
}
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """
    Train a byte-level BPE tokenizer of Qwen2's kind, with GEODE's tokens.

    Text is normalised (NFC) and split as by Qwen2, digits one by one, so any text can be encoded. Special tokens come
    after the learned ones. The result depends on the texts and their order alone.

    Args:
        texts (`Iterable[str]`):
            Texts to learn from.
        vocab_size (`int`):
            Largest number of tokens, the 256 bytes and the special tokens included. Fewer come out where the texts
            have no more pairs to merge.

    Returns:
        [`Qwen2Tokenizer`]: Padding is `<|endoftext|>` and on the left; `<|im_end|>` ends a sequence.

    Raises:
        ValueError: If `vocab_size` has no room for bytes and special tokens.
    """
    specials = [END_OF_TEXT_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN, *TOKEN_ATTRIBUTES.values()]
    smallest = NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest}, for {NUM_BYTES} bytes and {len(specials)} special tokens, got "
            f"{vocab_size}."
        )
    learner = Tokenizer(models.BPE())
    untrained = Qwen2Tokenizer().backend_tokenizer
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = untrained.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer=trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=END_OF_TEXT_TOKEN,
        pad_token=END_OF_TEXT_TOKEN,
        eos_token=TURN_END_TOKEN,
        extra_special_tokens=[TURN_START_TOKEN],
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return add_geode_tokens(tokenizer)


def add_geode_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Add GEODE's tokens to a tokenizer of Qwen2's kind, in place, where they are absent.

    Its other special tokens stay special. Each of GEODE's tokens becomes an attribute: `tokenizer.rationale_token` is
    `<spatio>`, and `tokenizer.rationale_token_id` its identifier; see `TOKEN_ATTRIBUTES`. Twice is the same as once.
    The embedding of the model may have to grow: compare its rows with `len(tokenizer)`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer that has `<|im_start|>` and `<|im_end|>`.

    Returns:
        `PreTrainedTokenizerBase`: The same tokenizer.

    Raises:
        ValueError: If it has no `<|im_start|>` or `<|im_end|>`, or is a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}.")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    absent = [token for token in (TURN_START_TOKEN, TURN_END_TOKEN) if token not in special]
    if absent:
        raise ValueError(
            f"`tokenizer` must have the special tokens {TURN_START_TOKEN} and {TURN_END_TOKEN} of Qwen2's chat form, "
            f"and it lacks {absent}. Take one of Qwen2, Qwen2.5 or InternVL3."
        )
    # A token that is there but not special, as in some tokenizers, becomes special and keeps its identifier.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKEN_ATTRIBUTES.values()])
    # The public way to name special tokens is to load a tokenizer with them. Checked on transformers 5.23.
    tokenizer._set_model_specific_special_tokens(special_tokens=TOKEN_ATTRIBUTES)
    return tokenizer


__all__ = ["TOKEN_ATTRIBUTES", "add_geode_tokens", "train_tokenizer"]
