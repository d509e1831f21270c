# SPDX-License-Identifier: Apache-2.0
"""What the processor does with lists: checks of numbers, and padding to one tensor."""

from collections.abc import Sequence

import torch

from .shown_geode import shown


MAX_NESTING = 8


def check_count(name: str, value) -> None:
    """Raise unless an option is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def check_geometry_options(grid_size, max_points, geometry_frame_size) -> None:
    """Raise unless the processor's options of geometry are lengths and counts."""
    is_number = isinstance(grid_size, int | float) and not isinstance(grid_size, bool)
    if not is_number or not 0 < grid_size < float("inf"):
        raise ValueError(f"`grid_size` must be a positive length in metres, got {grid_size!r}.")
    for name, value in (("max_points", max_points), ("geometry_frame_size", geometry_frame_size)):
        if value is not None:
            check_count(name, value)


def check_sequences(sequences, input_ids) -> None:
    """Raise unless these are sequences of tokens and the prompts that they begin with."""
    for name, value in (("output", sequences), ("input_ids", input_ids)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor of tokens{' or what `generate` returned' if name == 'output' else ''}, got "
                f"{type(value).__name__}."
            )
        if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"`{name}` must hold tokens, integers of shape (batch_size, sequence_length), got {value.dtype} of shape "
                f"{tuple(value.shape)}."
            )
        if value.numel() and int(value.min()) < 0:
            raise ValueError(f"`{name}` must hold tokens, which are not negative, got {int(value.min())}.")


def or_tensors(return_tensors: str | None) -> str:
    """What kind of tensors a chat's inputs are: PyTorch's, unless another kind is asked for."""
    return "pt" if return_tensors in (None, "auto") else return_tensors


def check_texts(texts: Sequence[str]) -> None:
    """Raise unless prompts are texts that a tokenizer can take."""
    if not texts:
        raise ValueError("`text` must hold at least one prompt, got an empty list.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"`text` must be a string or a list of strings, got {shown(text)} of type {type(text).__name__}."
            )
        check_unicode("text", text)


def check_unicode(name: str, text: str) -> None:
    """Raise if a text holds half of a character, which no encoding writes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must be Unicode, and {shown(text)} has half of a surrogate pair at {error.start}. Write the whole "
                "character, or leave it out."
            ) from error


def flatten(images, *, depth: int = 0) -> list:
    """Return the images of nested lists in order."""
    if depth > MAX_NESTING:
        raise ValueError(f"`images` may be lists in lists to a depth of {MAX_NESTING}, got more. Flatten them.")
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten(entry, depth=depth + 1)]
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


__all__ = [
    "check_count",
    "check_geometry_options",
    "check_same_number",
    "check_sequences",
    "check_texts",
    "check_unicode",
    "flatten",
    "or_tensors",
    "pad_rows",
    "pad_scenes",
]
