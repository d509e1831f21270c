# SPDX-License-Identifier: Apache-2.0
"""
The small model of the embedded world before it is trained: tokenizer, processor and configuration.

Boilerplate is most of the benchmark's wording, so the tokenizer has a token for each phrase that many questions or rationales
repeat around the names and numbers in them. Any other text is spelled as by a byte-level BPE.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from transformers import AddedToken, PreTrainedTokenizerBase

from geode.configuration.configuration_geode import GeodeConfig
from geode.data.schemas import CHOICE_POST_PROMPT, NUMBER_POST_PROMPT, Record
from geode.data.tokenizer import train_tokenizer
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor


IMAGE_SIZE, PATCH_SIZE, NUM_FRAMES, NUM_RATIONALE_TOKENS = 112, 14, 8, 16
GRID_SIZE_M, MAX_POINTS, MAX_CONTEXT_TOKENS = 0.125, 4096, 1024
HIDDEN_SIZE, NUM_LAYERS = 128, 6  # two to look things up, then their boxes, the turn, the right option, the answer
VISION_SIZE, DRM_SIZE = 128, 96
VOCAB_SIZE, NUM_PHRASES, MIN_PHRASE_COUNT = 2048, 80, 40
TURNS = ("left", "right", "back", "front", "Left", "Right", "Back", "Turn")
# About HIDDEN_SIZE ** -0.5. At the usual 0.02 attention starts flat at this width, and reads nothing for hundreds of steps.
INITIALIZER_RANGE = 0.09
_WORDS = re.compile(r"[^\d\n()\[\].:;+=^]+(?:\([a-z, ]+\))?[^\d\n()\[\]:;+=^]*")


def frequent_phrases(
    texts: Iterable[str], names: Sequence[str], *, limit: int = NUM_PHRASES, min_count: int = MIN_PHRASE_COUNT
) -> list[str]:
    """
    Find what is repeated between the names and numbers of many texts.

    Args:
        texts (`Iterable[str]`): Texts.
        names (`Sequence[str]`): What varies, such as categories; a phrase never holds one.
        limit (`int`, defaults to 80): Largest number of phrases.
        min_count (`int`, defaults to 40): How often a phrase is repeated at least.

    Returns:
        `list[str]`: Phrases of several words, those first that save most tokens. Ties are in alphabetical order.

    Example:
    ```python
    >>> texts = ["How far is the bed from the lamp?", "How far is the lamp from the sofa?"]
    >>> frequent_phrases(texts, ["bed", "lamp", "sofa"], min_count=2)
    ['How far is the', ' from the']

    ```
    """
    longest_first = sorted(map(re.escape, names), key=lambda name: (-len(name), name))
    varying = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")
    counts: Counter[str] = Counter()
    for text in texts:
        for part in varying.split(text):
            # The space before a name belongs to the name's own token.
            counts.update(match.group().rstrip() for match in _WORDS.finditer(part))
    saved = {
        phrase: count * (len(phrase.split()) - 1)
        for phrase, count in counts.items()
        if count >= min_count and len(phrase.split()) > 1
    }
    return sorted(saved, key=lambda phrase: (-saved[phrase], phrase))[:limit]


def make_tokenizer(records: Sequence[Record], names: Sequence[str]) -> PreTrainedTokenizerBase:
    """
    Train the tokenizer of the world.

    Args:
        records (`Sequence[Record]`): Questions of the training split.
        names (`Sequence[str]`): The categories.

    Returns:
        [`Qwen2Tokenizer`]: The tokenizer, with phrases as tokens that are not special.
    """
    texts = [f"user\n{record.prompt}\nassistant\n{record.answer_text}" for record in records]
    texts += [record.rationale for record in records if record.rationale]
    texts += [f"Frame{number + 1}: " for number in range(NUM_FRAMES)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    # Options and what decides between them keep tokens of their own, the same in question, rationale and answer.
    asked = frequent_phrases((record.prompt.partition("\nOptions:")[0] for record in records), names)
    explained = frequent_phrases((record.rationale or "" for record in records), [*names, *TURNS])
    phrases = {*asked, *explained, NUMBER_POST_PROMPT, CHOICE_POST_PROMPT}
    # Longest first: the first that matches is taken.
    tokenizer.add_tokens(
        [
            AddedToken(phrase, special=False, normalized=False)
            for phrase in sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
        ]
    )
    return tokenizer


def make_control_tokens(
    values_si: Sequence[float], boxes: Sequence[Sequence[float]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict]:
    """
    Make the codecs, with the statistics of training targets.

    Args:
        values_si (`Sequence[float]`): Numbers of the training split.
        boxes (`Sequence[Sequence[float]]`): Its boxes, of seven numbers each.
        tokenizer (`PreTrainedTokenizerBase`): Has the tokens.

    Returns:
        `dict[str, dict]`: See `GeodeConfig.control_tokens`.
    """
    values = torch.tensor(values_si).log1p()
    centers, sizes = torch.tensor(boxes)[:, :6].split(3, dim=1)
    encoded = torch.cat([centers, sizes.log()], dim=1)
    return {
        "<REG>": {
            "token_id": tokenizer.convert_tokens_to_ids("<REG>"),
            "dim": 1,
            "kind": "scalar",
            "codec": {"transform": "log1p", "mean": [values.mean().item()], "std": [values.std().item()]},
        },
        "<3DBBOX>": {
            "token_id": tokenizer.convert_tokens_to_ids("<3DBBOX>"),
            "dim": 7,
            "kind": "box3d",
            "codec": {"mean": encoded.mean(dim=0).tolist(), "std": encoded.std(dim=0).tolist()},
        },
    }


def make_processor(records: Sequence[Record], names: Sequence[str]) -> GeodeProcessor:
    """
    Make the processor.

    Args:
        records (`Sequence[Record]`): Questions of the training split.
        names (`Sequence[str]`): The categories.

    Returns:
        [`GeodeProcessor`]: The processor.
    """
    tokenizer = make_tokenizer(records, names)
    side = IMAGE_SIZE // PATCH_SIZE // 2
    return GeodeProcessor(
        GeodeImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        num_frames=NUM_FRAMES,
        num_geometry_frames=NUM_FRAMES,
        num_rationale_tokens=NUM_RATIONALE_TOKENS,
        image_seq_length=side * side,
        grid_size=GRID_SIZE_M,
        max_points=MAX_POINTS,
        control_tokens=make_control_tokens(
            [record.value_si for record in records if record.value_si is not None],
            [record.box for record in records if record.box is not None],
            tokenizer,
        ),
    )


def make_config(processor: GeodeProcessor) -> GeodeConfig:
    """Return the configuration: every part of GEODE, small, with fused features injected into the visual tokens."""
    tokenizer = processor.tokenizer
    return GeodeConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": VISION_SIZE,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 2 * VISION_SIZE,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 3 * HIDDEN_SIZE,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
            "initializer_range": INITIALIZER_RANGE,
        },
        point_config={
            "enc_depths": [1, 1, 1],
            "enc_channels": [32, 48, 64],
            "enc_num_head": [2, 2, 4],
            "enc_patch_size": [256, 256, 256],
            "stride": [2, 2],
            "drop_path": 0.0,
            "grid_size": GRID_SIZE_M,
        },
        drm_config={
            "hidden_size": DRM_SIZE,
            "num_cross_attention_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "num_rationale_tokens": NUM_RATIONALE_TOKENS,
            "max_context_tokens": MAX_CONTEXT_TOKENS,
            "inject_features": True,
            "camera_queries": True,
            "point_queries": True,
        },
        drh_config={"uncertainty": True},
        reconstructor_config=None,
        image_token_id=processor.image_token_id,
        rationale_token_id=processor.rationale_token_id,
        control_tokens=processor.control_tokens,
        initializer_range=INITIALIZER_RANGE,
    )


__all__ = [
    "frequent_phrases",
    "make_config",
    "make_control_tokens",
    "make_processor",
    "make_tokenizer",
]
