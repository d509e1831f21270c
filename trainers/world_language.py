# SPDX-License-Identifier: Apache-2.0
"""
Pre-train the small language model on the world's text alone. It stands for Qwen's pre-training.

A frozen language model that knows no language would make alignment and stage 1 meaningless. So it reads questions, rationales and
answers of the training split, without any scene; half of them after a list of what is in the room and where, from which the
rationale follows. So it learns the words, to look things up in what it was shown, and some arithmetic.
"""

from collections.abc import Mapping, Sequence

import torch

from geode.data.schemas import Record
from geode.modeling_geode.chat_geode import TURN_END_TOKEN, TURN_START_TOKEN
from geode.trainers.world_encoders import fit


DIGITS = 2


def inventory(scene: dict) -> str:
    """
    Say what is in a room and where.

    Args:
        scene (`dict`): The scene's record.

    Returns:
        `str`: The list.

    Example:
    ```python
    >>> inventory({"objects": [{"category": "bed", "box": [0.5, -2.0, 0.25, 2.1, 1.4, 0.5, 0.0]}]})
    'The bed is at (0.50, -2.00, 0.25) and measures 2.10 x 1.40 x 0.50 m.'

    ```
    """
    lines = []
    for entry in scene["objects"]:
        numbers = [f"{value:.{DIGITS}f}" for value in entry["box"][:6]]
        where, sides = ", ".join(numbers[:3]), " x ".join(numbers[3:])
        lines.append(f"The {entry['category']} is at ({where}) and measures {sides} m.")
    return " ".join(lines)


def text_of(record: Record, scene: dict | None = None) -> str:
    """
    Write a question and its answer as a chat.

    Args:
        record (`Record`): The question.
        scene (`dict`, *optional*): The record of its scene, to be listed before the question.

    Returns:
        `str`: The chat, with the marks of its turns.
    """
    shown = "" if scene is None else f"{inventory(scene)}\n"
    answer = record.rationale or record.answer_text
    return (
        f"{TURN_START_TOKEN}user\n{shown}{record.prompt}{TURN_END_TOKEN}\n"
        f"{TURN_START_TOKEN}assistant\n{answer}{TURN_END_TOKEN}\n"
    )


def pretrain_language_model(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    scenes: Mapping[str, dict],
    num_steps: int,
    batch_size: int = 8,
    length: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """
    Teach the language model to write the world's text.

    Args:
        model ([`GeodeForConditionalGeneration`]): Its language model is changed in place.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        records (`Sequence[Record]`): Questions of the training split.
        scenes (`Mapping[str, dict]`): Records of their scenes, by name.
        num_steps (`int`): Steps.
        batch_size (`int`, defaults to 8): Rows of a step.
        length (`int`, defaults to 512): Tokens of a row, which is filled with one chat after another.
        learning_rate (`float`, defaults to 2e-3): Highest one; it falls along a cosine.
        seed (`int`, defaults to 0): Decides the order, and which chats begin with a list.

    Returns:
        `float`: Mean cross-entropy per token over the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    language_model = model.model.language_model.requires_grad_(True)
    rows = _rows(tokenizer, records, scenes, length, generator)

    def losses():
        for _ in range(num_steps):
            ids = torch.stack([next(rows) for _ in range(batch_size)])
            yield model(input_ids=ids, labels=ids, return_regression_values=False).ce_loss

    return fit([language_model], losses(), num_steps=num_steps, learning_rate=learning_rate)


def _rows(tokenizer, records, scenes, length: int, generator: torch.Generator):
    buffer: list[int] = []
    while True:
        for number in torch.randperm(len(records), generator=generator).tolist():
            record = records[number]
            is_listed = bool(torch.rand((), generator=generator) < 0.5)
            text = text_of(record, scenes.get(record.scene) if is_listed else None)
            buffer += tokenizer(text)["input_ids"]
            while len(buffer) >= length:
                yield torch.tensor(buffer[:length])
                buffer = buffer[length:]


__all__ = ["inventory", "pretrain_language_model", "text_of"]
