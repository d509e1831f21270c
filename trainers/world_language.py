# SPDX-License-Identifier: Apache-2.0
"""
Pre-train the small language model on the world's text alone. It stands for Qwen's pre-training.

A frozen language model that knows no language would make alignment and stage 1 meaningless. So it reads questions, rationales and
answers of the training split, without any scene; three of four after a list of things in the room and where they are, from which the
rationale follows. So it learns the words, to look things up in what it was shown, and some arithmetic. Only the answers are learned: a
list is mostly digits that follow from nothing.

The list has what the rationale names and a few things more: with all of a room it would be longer than a row, and what is looked up would
never be seen together with what is listed.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from geode.data.schemas import Record
from geode.modeling_geode.chat_geode import TURN_END_TOKEN, TURN_START_TOKEN
from geode.trainers.packing import IGNORED_LABEL
from geode.trainers.world_encoders import fit


DIGITS = 2
LISTED_FRACTION = 0.75  # of the chats
NUM_OTHERS = 3  # things listed beside those that are named


def inventory(objects: Sequence[dict]) -> str:
    """
    Say what is where.

    Args:
        objects (`Sequence[dict]`): Objects of a scene's record.

    Returns:
        `str`: The list.

    Example:
    ```python
    >>> inventory([{"category": "bed", "box": [0.5, -2.0, 0.25, 2.1, 1.4, 0.5, 0.0]}])
    'The bed is at (0.50, -2.00, 0.25) and measures 2.10 x 1.40 x 0.50 m.'

    ```
    """
    lines = []
    for entry in objects:
        numbers = [f"{value:.{DIGITS}f}" for value in entry["box"][:6]]
        where, sides = ", ".join(numbers[:3]), " x ".join(numbers[3:])
        lines.append(f"The {entry['category']} is at ({where}) and measures {sides} m.")
    return " ".join(lines)


def draw_objects(record: Record, scene: dict, generator: torch.Generator) -> list[dict]:
    """
    Draw what is listed before a question: the objects that question and rationale name, and some others, in any order.

    Args:
        record (`Record`): The question.
        scene (`dict`): The record of its scene.
        generator (`torch.Generator`): Decides others and order.

    Returns:
        `list[dict]`: Objects of the scene's record.
    """
    text = f"{record.prompt} {record.rationale}"
    named = [entry for entry in scene["objects"] if re.search(rf"\b{re.escape(entry['category'])}\b", text)]
    others = [entry for entry in scene["objects"] if entry not in named]
    drawn = [others[index] for index in torch.randperm(len(others), generator=generator)[:NUM_OTHERS].tolist()]
    listed = [*named, *drawn]
    return [listed[index] for index in torch.randperm(len(listed), generator=generator).tolist()]


def text_of(record: Record, objects: Sequence[dict] = ()) -> str:
    """
    Write a question and its answer as a chat.

    Args:
        record (`Record`): The question.
        objects (`Sequence[dict]`): What is listed before the question.

    Returns:
        `str`: The chat, with the marks of its turns.
    """
    shown = f"{inventory(objects)}\n" if objects else ""
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
            ids, labels = torch.stack([next(rows) for _ in range(batch_size)]).unbind(dim=1)
            yield model(input_ids=ids, labels=labels, return_regression_values=False).ce_loss

    return fit([language_model], losses(), num_steps=num_steps, learning_rate=learning_rate)


@torch.no_grad()
def language_gate(
    model,
    tokenizer,
    records: Sequence[Record],
    *,
    scenes: Mapping[str, dict],
    num_records: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """
    Measure whether the language model looks things up: the shuffled-scene gate in words.

    What it cannot look up in a list it cannot look up in rationale tokens, so without this gate stage 1 has nothing to learn.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        records (`Sequence[Record]`): Questions that it was not trained on, with rationales, about two scenes or more.
        scenes (`Mapping[str, dict]`): Records of their scenes, by name.
        num_records (`int`, defaults to 100): Questions that are drawn.
        seed (`int`, defaults to 0): Decides questions and lists.

    Returns:
        `dict[str, float]`: Nats per token of the rationales, a mean over them: `listed` after things of their own scene,
        `other_listed` after those of another one, `unlisted` after none.
    """
    generator = torch.Generator().manual_seed(seed)
    names = sorted(scenes)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    explained = [record for record in records if record.rationale]
    drawn = torch.randperm(len(explained), generator=generator)[:num_records].tolist()
    sums = dict.fromkeys(("listed", "other_listed", "unlisted"), 0.0)
    for record in (explained[index] for index in drawn):
        shown = {
            "listed": draw_objects(record, scenes[record.scene], generator),
            "other_listed": draw_objects(record, scenes[following[record.scene]], generator),
            "unlisted": (),
        }
        for name, objects in shown.items():
            sums[name] += _rationale_loss(model, tokenizer, text_of(record, objects)) / len(drawn)
    return sums


def _rationale_loss(model, tokenizer, text: str) -> float:
    ids, labels = _labelled(tokenizer, text)
    options = {"labels": torch.tensor([labels]), "return_regression_values": False}
    return float(model(input_ids=torch.tensor([ids]), **options).ce_loss)


def _labelled(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and those that are learned: its answer. Most of a list is digits that nobody can guess."""
    head, turn, answer = text.rpartition(f"{TURN_START_TOKEN}assistant\n")
    asked, answered = tokenizer([head + turn, answer])["input_ids"]
    return asked + answered, [IGNORED_LABEL] * len(asked) + answered


def _rows(tokenizer, records, scenes, length: int, generator: torch.Generator):
    buffer: tuple[list[int], list[int]] = ([], [])
    while True:
        for number in torch.randperm(len(records), generator=generator).tolist():
            record = records[number]
            is_listed = bool(torch.rand((), generator=generator) < LISTED_FRACTION)
            text = text_of(record, draw_objects(record, scenes[record.scene], generator) if is_listed else ())
            for held, added in zip(buffer, _labelled(tokenizer, text), strict=True):
                held += added
            while len(buffer[0]) >= length:
                yield torch.tensor([held[:length] for held in buffer])
                buffer = tuple(held[length:] for held in buffer)


__all__ = ["draw_objects", "inventory", "language_gate", "pretrain_language_model", "text_of"]
