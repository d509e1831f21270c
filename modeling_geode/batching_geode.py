# SPDX-License-Identifier: Apache-2.0
"""What the processor does with lists: checks of numbers, and padding to one tensor."""

from collections.abc import Sequence

import torch


def check_count(name: str, value) -> None:
    """Raise unless an option is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def or_tensors(return_tensors: str | None) -> str:
    """What kind of tensors a chat's inputs are: PyTorch's, unless another kind is asked for."""
    return "pt" if return_tensors in (None, "auto") else return_tensors


def flatten(images) -> list:
    """Return the images of nested lists in order."""
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten(entry)]
    return [images]


def check_same_number(placeholder: str, texts: Sequence[str], name: str, number: int) -> None:
    """Raise unless texts have a placeholder for each medium."""
    found = sum(text.count(placeholder) for text in texts)
    if found != number:
        raise ValueError(
            f"`text` must have one `{placeholder}` for each of the {number} `{name}`, and it has {found}."
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Stack rows of integers to `(batch_size, longest)`."""
    longest = max(len(row) for row in rows)
    fill = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True) if side == "left" else zip(rows, fill, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs], dtype=torch.long)


def pad_scenes(stacks: Sequence[torch.Tensor], scene_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the frames of scenes, in order, into `(batch_size, num_scenes, longest, ...)`, and say which are valid."""
    longest = max(len(stack) for stack in stacks)
    padded = stacks[0].new_zeros(*scene_mask.shape, longest, *stacks[0].shape[1:])
    mask = torch.zeros(*scene_mask.shape, longest, dtype=torch.bool)
    for (row, column), stack in zip(scene_mask.nonzero().tolist(), stacks, strict=True):
        padded[row, column, : len(stack)] = stack
        mask[row, column, : len(stack)] = True
    return padded, mask


__all__ = ["check_count", "check_same_number", "flatten", "or_tensors", "pad_rows", "pad_scenes"]
