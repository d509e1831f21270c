# SPDX-License-Identifier: Apache-2.0
"""
Several questions about one scene behind one shared prefix: its frames and `<spatio>` tokens are embedded and attended to once.

A packed row is the prefix, then what is left of each question with its answer. Every question sees the prefix and itself,
never another question, and its positions go on from the prefix. So its loss, values and gradients are those that it has
alone, and only the work on the prefix is saved: that of the encoders, and that of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from geode.data.schemas import Record


IGNORED_LABEL = -100
# Values of `question_index`: the shared prefix and padding; questions count from 1.
PREFIX, PADDING = 0, -1


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """
    One row of a batch before it is padded.

    Args:
        input_ids (`torch.LongTensor` of shape `(sequence_length,)`): Tokens.
        labels (`torch.LongTensor` of shape `(sequence_length,)`): -100 where nothing is learned.
        mm_token_type_ids (`torch.LongTensor` of shape `(sequence_length,)`): 1 at placeholders of images, 2 at those of scenes.
        regression_targets (`torch.Tensor` of shape `(sequence_length, max_dim)`): SI units; NaN where there is none.
        position_ids (`torch.LongTensor` of shape `(sequence_length,)`, *optional*): Positions of a packed row.
        question_index (`torch.LongTensor` of shape `(sequence_length,)`, *optional*):
            Of a packed row: 0 in the shared prefix, then 1 in the first question, and so on.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    mm_token_type_ids: torch.Tensor
    regression_targets: torch.Tensor
    position_ids: torch.Tensor | None = None
    question_index: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, end: int) -> "TokenRow":
        """Return the tokens from `start` to `end`."""
        return replace(self, **{name: getattr(self, name)[start:end] for name in _ALIGNED})

    def without_targets(self) -> "TokenRow":
        """Return the same tokens with nothing to learn."""
        return replace(
            self,
            labels=torch.full_like(self.labels, IGNORED_LABEL),
            regression_targets=torch.full_like(self.regression_targets, torch.nan),
        )


_ALIGNED = ("input_ids", "labels", "mm_token_type_ids", "regression_targets")


def pack_questions(rows: Sequence[TokenRow], *, num_media_tokens: int) -> TokenRow:
    """
    Put several questions about one scene behind their common prefix.

    The prefix is the longest that all rows share, and leaves each row at least one token before the first that it learns:
    no learned token is then predicted from another question's last.

    Args:
        rows (`Sequence[TokenRow]`): The questions, each with the whole scene before it.
        num_media_tokens (`int`): Length of the part with the scene, up to its last placeholder.

    Returns:
        [`TokenRow`]: The packed row, with `position_ids` and `question_index`.

    Raises:
        ValueError: If the rows do not begin with the same scene.
    """
    length = _prefix_length(rows)
    if length < num_media_tokens:
        raise ValueError(
            f"The questions of a pack must share a prefix that holds their scene, {num_media_tokens} tokens, and "
            f"{len(rows)} rows share only {length}. Pack records of one medium with the same number of frames."
        )
    prefix, suffixes = rows[0].part(0, length), [row.part(length, len(row)) for row in rows]
    parts = [prefix, *suffixes]
    position_ids = [torch.arange(length), *(torch.arange(length, length + len(suffix)) for suffix in suffixes)]
    index = [torch.full((len(part),), number) for number, part in enumerate(parts)]
    return TokenRow(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _ALIGNED},
        position_ids=torch.cat(position_ids),
        question_index=torch.cat(index),
    )


def _prefix_length(rows: Sequence[TokenRow]) -> int:
    """The number of tokens that all rows begin with and none of them learns from."""
    length = min(int((row.labels != IGNORED_LABEL).nonzero()[0]) for row in rows) - 1
    first = rows[0].input_ids[:length]
    for row in rows[1:]:
        different = (row.input_ids[:length] != first).nonzero()
        length = min(length, int(different[0])) if len(different) else length
        first = first[:length]
    return length


def block_mask(question_index: torch.Tensor) -> torch.Tensor:
    """
    Say which tokens see which: each question the shared prefix and, causally, itself.

    Args:
        question_index (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            0 in a row's shared prefix, from 1 on in its questions, -1 in padding.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, 1, sequence_length, sequence_length)`: True where the query of the third
        dimension sees the key of the last. Padding sees itself alone, because a softmax over nothing is not a number.

    Example:
        ```python
        >>> block_mask(torch.tensor([[0, 1, 2, 2, -1]]))[0, 0].int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 0, 1, 0, 0],
                [1, 0, 1, 1, 0],
                [0, 0, 0, 0, 1]], dtype=torch.int32)

        ```
    """
    query, key = question_index[:, :, None], question_index[:, None, :]
    order = torch.arange(question_index.shape[1], device=question_index.device)
    is_seen = ((key == query) | (key == PREFIX)) & (query != PADDING) & (order <= order[:, None])
    return (is_seen | (order == order[:, None]))[:, None]


def pad_rows(
    rows: Sequence[TokenRow], *, pad_token_id: int, padding_side: str = "right", pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Pad rows to one length.

    Args:
        rows (`Sequence[TokenRow]`): Rows of a batch, packed or not.
        pad_token_id (`int`): Fills `input_ids`.
        padding_side (`str`, defaults to `"right"`): `"left"` or `"right"`.
        pad_to_multiple_of (`int`, *optional*): The length becomes a multiple of it.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model. With a packed row among them, `attention_mask` is [`block_mask`]
        and there are `position_ids`.
    """
    longest = max(len(row) for row in rows)
    if pad_to_multiple_of is not None:
        longest += -longest % pad_to_multiple_of
    fill = {
        "input_ids": pad_token_id,
        "labels": IGNORED_LABEL,
        "mm_token_type_ids": 0,
        "regression_targets": torch.nan,
    }
    batch = {
        name: _stack([getattr(row, name) for row in rows], longest, value=value, side=padding_side)
        for name, value in fill.items()
    }
    if all(row.question_index is None for row in rows):
        ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return {**batch, "attention_mask": _stack(ones, longest, value=0, side=padding_side)}
    # A row of one question is its own prefix.
    index = [torch.full((len(row),), PREFIX) if row.question_index is None else row.question_index for row in rows]
    positions = [torch.arange(len(row)) if row.position_ids is None else row.position_ids for row in rows]
    batch["attention_mask"] = block_mask(_stack(index, longest, value=PADDING, side=padding_side))
    batch["position_ids"] = _stack(positions, longest, value=0, side=padding_side)
    return batch


def _stack(tensors: Sequence[torch.Tensor], length: int, *, value: float, side: str) -> torch.Tensor:
    stacked = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for row, tensor in zip(stacked, tensors, strict=True):
        start = length - len(tensor) if side == "left" else 0
        row[start : start + len(tensor)] = tensor
    return stacked


class ScenePacks(Dataset):
    """
    Packs of questions: each item is a list of records about one scene, for [`GeodeDataCollator`].

    The questions of a scene are shuffled and dealt into packs whose sizes differ by at most one, and the packs of all
    scenes are shuffled: the same packs for the same seed and epoch. The number of packs does not depend on either.

    Args:
        records (`Sequence[Record]`, `Sequence[dict]` or `datasets.Dataset`):
            Records with random access.
        questions_per_pack (`int`):
            Largest number of questions of a pack.
        seed (`int`, defaults to 0):
            Decides the packs, with the epoch.
        shuffle (`bool`, defaults to `True`):
            False keeps the order of the records, as for evaluation.

    Example:
        ```python
        >>> records = [
        ...     Record(uid=str(i), source="demo", media_type="video", media=f"{i % 2}.mp4", prompt="?", kind="text", answer_text="")
        ...     for i in range(6)
        ... ]
        >>> packs = ScenePacks(records, questions_per_pack=2, shuffle=False)
        >>> [[record.uid for record in pack] for pack in packs]
        [['0', '2'], ['4'], ['1', '3'], ['5']]

        ```
    """

    def __init__(self, records, *, questions_per_pack: int, seed: int = 0, shuffle: bool = True):
        if isinstance(questions_per_pack, bool) or not isinstance(questions_per_pack, int) or questions_per_pack < 1:
            raise ValueError(f"`questions_per_pack` must be a whole number of at least 1, got {questions_per_pack!r}.")
        if not hasattr(records, "__len__") or not hasattr(records, "__getitem__"):
            raise TypeError(
                f"`records` must have a length and random access, got {type(records).__name__}. Load a streamed mixture "
                "with `Mixture.load`."
            )
        self.records = records
        self.questions_per_pack = questions_per_pack
        self.seed = seed
        self.shuffle = shuffle
        self.scenes = list(_group_by_scene(records).values())
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal the packs of an epoch. `Trainer` calls it; workers that outlive an epoch keep its packs."""
        self.epoch = epoch
        generator = np.random.default_rng((self.seed, epoch))
        self.packs = []
        for scene in self.scenes:
            questions = generator.permutation(scene) if self.shuffle else np.asarray(scene)
            num_packs = -(-len(scene) // self.questions_per_pack)
            self.packs += [part.tolist() for part in np.array_split(questions, num_packs)]
        if self.shuffle:
            self.packs = [self.packs[number] for number in generator.permutation(len(self.packs))]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list:
        return [self.records[number] for number in self.packs[index]]


def scene_key(record: Record | dict) -> tuple:
    """What records share that can stand behind one prefix: source, medium, geometry and number of frames."""
    get = record.get if isinstance(record, dict) else lambda name: getattr(record, name)
    return tuple(get(name) for name in _SCENE_FIELDS)


_SCENE_FIELDS = ("source", "media_type", "media", "geometry", "num_frames")


def _group_by_scene(records) -> dict[tuple, list[int]]:
    """The indices of each scene's records; of a `datasets.Dataset` only the columns that are needed are read."""
    if hasattr(records, "column_names"):
        absent = [None] * len(records)
        columns = [list(records[name]) if name in records.column_names else absent for name in _SCENE_FIELDS]
        keys = zip(*columns, strict=True)
    else:
        keys = (scene_key(records[number]) for number in range(len(records)))
    scenes: dict[tuple, list[int]] = {}
    for number, key in enumerate(keys):
        scenes.setdefault(key, []).append(number)
    return scenes


__all__ = ["ScenePacks", "TokenRow", "block_mask", "pack_questions", "pad_rows", "scene_key"]
