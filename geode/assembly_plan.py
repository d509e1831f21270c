# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of a GEODE checkpoint comes from, checked against files and model before anything is read or written."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from geode.part_files import DTYPES, PartFiles, TensorReader, TensorRef
from geode.part_layouts import EMBEDDING, HEAD, Layout


NEW = "new"
ROWS_AT_A_TIME = 8192
_SHOWN_PROBLEMS = 10


class Vocabulary(NamedTuple):
    """
    Which rows of an embedding are trained, and which are made.

    `num_rows` are in the file, the first `num_known` of them are tokens; those of `new_ids`, and from `num_rows` to `size`, are made.
    """

    num_rows: int
    num_known: int
    new_ids: tuple[int, ...]
    size: int

    @property
    def made_ids(self) -> list[int]:
        """All rows that are made."""
        return sorted({*self.new_ids, *range(self.num_rows, self.size)})


class Step(NamedTuple):
    """
    How one tensor of the result is made.

    `action` is `"mapped"`, `"split"` (a third of the rows), `"rows"` (an embedding, which gets rows), `"zeros"` or `"new"`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    part: str
    source: TensorRef | None = None
    third: int | None = None
    note: str = ""


class Skipped(NamedTuple):
    """A tensor of a file that is left out, and why."""

    part: str
    source: TensorRef
    reason: str


class Plan(NamedTuple):
    """All tensors of the result, in the order in which they are written, and all that are left out of it."""

    steps: tuple[Step, ...]
    skipped: tuple[Skipped, ...]
    vocabulary: Vocabulary

    def table(self) -> str:
        """Account for every tensor: one line for those that differ in their layer alone, with their number."""
        rows = Counter(_grouped(step) for step in self._rows())
        header = ("part", "public tensor", "tensor of GEODE", "shape", "type", "number", "what")
        lines = [header, *((*row[:5], str(number), row[5]) for row, number in rows.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
        text = ["  ".join([*(map(str.ljust, line, widths)), line[-1]]).rstrip() for line in lines]
        return "\n".join([*text, "", *self._totals()])

    def _rows(self) -> Iterable[Step | Skipped]:
        seen = set()
        for step in self.steps:
            # The three thirds of a matrix are one line, of the matrix.
            if step.source is None or step.action != "split" or step.source not in seen:
                seen.add(step.source)
                yield step
        yield from self.skipped

    def _totals(self) -> list[str]:
        lines = []
        for part in dict.fromkeys([step.part for step in self.steps]):
            steps = [step for step in self.steps if step.part == part]
            skipped = sum(found.part == part for found in self.skipped)
            read = len({step.source for step in steps if step.source is not None})
            size = sum(num_bytes(step) for step in steps)
            counts = f"{read} tensors read and {skipped} skipped of {read + skipped}" if read else "new"
            lines.append(f"{part}: {counts}, {len(steps)} written, {size / 1e6:,.1f} MB")
        made = self.vocabulary.made_ids
        lines.append(
            f"vocabulary: {self.vocabulary.size} rows, {len(made)} of them set to the mean of the {self.vocabulary.num_known} known ones"
        )
        total = sum(num_bytes(step) for step in self.steps)
        return [*lines, f"in all: {len(self.steps)} tensors, {total / 1e9:,.3f} GB"]


def make_plan(
    model: nn.Module,
    parts: Mapping[str, tuple[PartFiles, Layout]],
    vocabulary: Vocabulary,
    *,
    is_tied: bool,
    dtype: torch.dtype | None,
) -> Plan:
    """
    Decide where each tensor of a model comes from.

    Args:
        model (`nn.Module`):
            [`GeodeForConditionalGeneration`] on the meta device: its names and shapes are what is needed.
        parts (`Mapping[str, tuple[PartFiles, Layout]]`):
            The public checkpoints.
        vocabulary ([`Vocabulary`]):
            See [`Vocabulary`].
        is_tied (`bool`):
            The output layer is the embedding.
        dtype (`torch.dtype`, *optional*):
            Of the result; None keeps each part's, with new tensors in float32. What the model wants in float32 is so always.

    Returns:
        [`Plan`]: One step for each tensor.

    Raises:
        ValueError: If a tensor is missing, unexpected, of a wrong shape or of a wrong type.
    """
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not (is_tied and name == HEAD)}
    exact = re.compile("|".join(model._keep_in_fp32_modules_strict) or "(?!)")

    def dtype_of(name: str, found: torch.dtype) -> torch.dtype:
        return found if dtype is None else torch.float32 if exact.search(name) else dtype

    steps, skipped, problems = [], [], []
    for part, (files, layout) in parts.items():
        names = [name for name in wanted if name.startswith(layout.modules)]
        found = _plan_part(part, files, layout, {name: wanted.pop(name) for name in names}, vocabulary)
        steps += [step._replace(dtype=dtype_of(step.name, step.dtype)) for step in found[0]]
        skipped += found[1]
        problems += found[2]
    if problems:
        problems = list(dict.fromkeys(problems))  # the thirds of a matrix say the same
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        rest = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ValueError(
            f"The parts do not fit together (problems: {len(problems)}): {shown}{rest}. Nothing was written. Check that config.json "
            "and weights of each part are of the same model."
        )
    steps += [
        Step(name, tuple(tensor.shape), dtype_of(name, torch.float32), NEW, name.removeprefix("model.").split(".")[0])
        for name, tensor in wanted.items()
    ]
    return Plan(tuple(steps), tuple(skipped), vocabulary)


def _plan_part(
    part: str, files: PartFiles, layout: Layout, wanted: Mapping[str, torch.Tensor], vocabulary: Vocabulary
) -> tuple[list[Step], list[Skipped], list[str]]:
    steps, problems, used = [], [], set()
    for name, tensor in wanted.items():
        key, third = layout.published(name)
        shape, ref = tuple(tensor.shape), files.tensors.get(key)
        used.add(key)
        if ref is None:
            reason = _reason(key, layout.may_lack)
            if reason is None:
                problems.append(f"{files.name} lacks `{key}`")
            else:
                steps.append(
                    Step(name, shape, torch.float32, "zeros", part, note=f"zeros: {reason}, and not in the file")
                )
            continue
        action = "mapped" if third is None else "split"
        expected = shape if third is None else (3 * shape[0], *shape[1:])
        note = "mapped" if third is None else "split into q, k and v"
        if name in (EMBEDDING, HEAD):
            action, note = "rows", "mapped, new rows"
            expected = (vocabulary.num_rows, *shape[1:])
        if ref.shape != expected:
            problems.append(f"{files.name} has `{key}` of shape {ref.shape}, and {expected} is expected")
        if ref.dtype not in DTYPES.values():
            problems.append(f"{files.name} has `{key}` of type {ref.dtype}, and {', '.join(DTYPES)} are read")
        steps.append(Step(name, shape, ref.dtype, action, part, ref, third, note))
    skipped = []
    for key, ref in files.tensors.items():
        reason = _reason(key, layout.skipped)
        if reason is not None:
            skipped.append(Skipped(part, ref, reason))
        elif key not in used:
            problems.append(f"{files.name} has `{key}`, which is not expected")
    # In the order of the files, so that each is read from its beginning to its end.
    position = {ref: index for index, ref in enumerate(files.tensors.values())}
    return sorted(steps, key=lambda step: position.get(step.source, -1)), skipped, problems


def make_tensor(
    step: Step, reader: TensorReader, vocabulary: Vocabulary, new: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """
    Make one tensor of the result.

    Args:
        step ([`Step`]):
            How.
        reader ([`TensorReader`]):
            Reads its source.
        vocabulary ([`Vocabulary`]):
            Which rows of an embedding are made: they are the mean of the known ones.
        new (`Mapping[str, torch.Tensor]`):
            Initial values of the tensors that no part has.

    Returns:
        `torch.Tensor`: It shares no memory with a file.
    """
    if step.source is None:
        tensor = new[step.name] if step.action == NEW else torch.zeros(step.shape)
        return tensor.to(step.dtype)
    tensor = reader.read(step.source)
    if step.action == "split":
        tensor = tensor.chunk(3)[step.third]
    if step.action != "rows":
        return tensor.to(step.dtype, copy=True).contiguous()
    result = torch.empty(step.shape, dtype=step.dtype)
    result[: vocabulary.num_rows] = tensor
    result[vocabulary.made_ids] = mean_row(tensor[: vocabulary.num_known]).to(step.dtype)
    return result


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    """Mean of the rows of `(num_rows, width)`, in float64, a few rows at a time."""
    total = sum(chunk.double().sum(dim=0) for chunk in rows.split(ROWS_AT_A_TIME))
    return total / len(rows)


def num_bytes(step: Step) -> int:
    """Size of a step's tensor."""
    return torch.Size(step.shape).numel() * step.dtype.itemsize


def _reason(key: str, rules: Sequence[tuple[str, str]]) -> str | None:
    return next((reason for pattern, reason in rules if re.search(pattern, key)), None)


def _grouped(found: Step | Skipped) -> tuple[str, ...]:
    """The cells of a line, its number aside. Numbers of layers become stars."""
    if isinstance(found, Skipped):
        # What one reason leaves out is one line, whatever its names and shapes.
        prefix = found.source.key.split(".")[0]
        return found.part, f"{prefix}.*", "-", "", _type_name(found.source.dtype), f"skipped: {found.reason}"
    key = "-" if found.source is None else _starred(found.source.key)
    shape = found.shape if found.source is None else found.source.shape
    types = _type_name(found.dtype)
    if found.source is not None and found.source.dtype != found.dtype:
        types = f"{_type_name(found.source.dtype)} to {types}"
    name = re.sub(r"\.[qkv]_proj\.", ".{q,k,v}_proj.", found.name) if found.action == "split" else found.name
    return found.part, key, _starred(name), "x".join(map(str, shape)) or "1", types, found.note or found.action


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)(enc|block|refinenet)?\d+(?=\.)", r"\1*", name)


def _type_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["Plan", "Skipped", "Step", "Vocabulary", "make_plan", "make_tensor", "mean_row", "num_bytes"]
