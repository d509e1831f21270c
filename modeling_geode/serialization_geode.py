# SPDX-License-Identifier: Apache-2.0
"""
Voxels: clouds to voxels, space-filling curves, neighbours, coarser grids and attention windows.

Curves and neighbours are computed on the fly from `int64` voxel indices. There are no lookup tables: a table in a
non-persistent buffer would hold garbage after `from_pretrained`, which builds models on the meta device.
"""

from typing import Any, NamedTuple

import numpy as np
import torch


MAX_DEPTH = 16  # bits per axis of a code
MAX_VOXELS_PER_AXIS = (1 << MAX_DEPTH) - 1
CODE_BITS = 63  # of an int64 without its sign
NUM_OFFSETS = 27  # of a 3 x 3 x 3 neighbourhood; offset 9a + 3b + c is (a - 1, b - 1, c - 1)
CENTER_OFFSET = 13


class VoxelGrid(NamedTuple):
    """
    The occupied voxels of a batch at one resolution, in ascending order of (cloud, x, y, z).

    Args:
        grid_coord (`torch.Tensor` of shape `(num_voxels, 3)`): Voxel indices, `int64`.
        batch (`torch.Tensor` of shape `(num_voxels,)`): Cloud of each voxel, `int64`.
        keys (`torch.Tensor` of shape `(num_voxels,)`): One ascending `int64` per voxel, see [`voxel_keys`].
        max_index (`int`): Largest index over all clouds and axes.
        sizes (`list[int]`): Number of voxels of each cloud.
    """

    grid_coord: torch.Tensor
    batch: torch.Tensor
    keys: torch.Tensor
    max_index: int
    sizes: list[int]

    @property
    def depth(self) -> int:
        """Bits per axis of the codes of this resolution."""
        return serialization_depth(self.max_index)


class AttentionTail(NamedTuple):
    """
    The last, incomplete window of a cloud: slots `start` to `stop` attend to themselves and to the slots before.

    Args:
        start, stop (`int`): Slots of the queries.
        borrowed_start, borrowed_stop (`int`): Slots that complete the keys; an empty range for a cloud that is smaller
            than a window.
    """

    start: int
    stop: int
    borrowed_start: int
    borrowed_stop: int


class AttentionLayout(NamedTuple):
    """
    How the voxels along a curve are cut into windows. It is the same for every curve of a resolution.

    Slots hold the full windows of all clouds first, so that they are one view of shape `(num_windows, window_size)`,
    and then each cloud's incomplete window.

    Args:
        positions (`torch.Tensor` of shape `(num_voxels,)`, *optional*): Place along the curve of each slot; `None` when
            they are equal.
        window_size (`int`): Voxels per full window.
        num_windows (`int`): Full windows over all clouds.
        tails (`list[AttentionTail]`): The incomplete windows.
    """

    positions: torch.Tensor | None
    window_size: int
    num_windows: int
    tails: list[AttentionTail]


class AttentionWindows(NamedTuple):
    """
    An [`AttentionLayout`] along one curve.

    Args:
        rows (`torch.Tensor` of shape `(num_voxels,)`): Voxel in each slot.
        slots (`torch.Tensor` of shape `(num_voxels,)`): Slot of each voxel, the inverse of `rows`.
        layout (`AttentionLayout`): The windows.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    layout: AttentionLayout


def serialization_depth(max_index: int) -> int:
    """
    Return the bits per axis of a code when the largest voxel index is `max_index`.

    It is the bit length of `max_index + 1`, which is one more than needed when that is a power of two. The path of a
    Hilbert curve depends on the depth, so this must be what pretrained weights have seen.

    Example:
        >>> from geode.modeling_geode.serialization_geode import serialization_depth
        >>> [serialization_depth(max_index) for max_index in (0, 1, 2, 3, 7)]
        [1, 2, 2, 3, 4]
    """
    return (max_index + 1).bit_length()


def serialize(grid_coord: torch.Tensor, batch: torch.Tensor, depth: int, order: str) -> torch.Tensor:
    """
    Number voxels along a space-filling curve, one cloud after another.

    Source: Skilling, *Programming the Hilbert curve* (AIP Conference Proceedings 707, 2004) for the Hilbert curve, and
    Wu et al., *Point Transformer V3* (2024), section 4.1, for the orders. Checked against the slow codes in
    `tests/modeling_geode/test_serialization_geode.py`.

    Convention:
        - The first axis is the most significant of each triple of bits. `"-trans"` swaps x and y first.
        - The cloud's index stands above the `3 * depth` bits of the curve.

    Args:
        grid_coord (`torch.Tensor` of shape `(num_voxels, 3)`):
            Voxel indices, each in `[0, 2 ** depth)`.
        batch (`torch.Tensor` of shape `(num_voxels,)`):
            Cloud of each voxel.
        depth (`int`):
            Bits per axis, 1 to 16; see [`serialization_depth`].
        order (`str`):
            `"z"`, `"z-trans"`, `"hilbert"` or `"hilbert-trans"`.

    Returns:
        `torch.Tensor` of shape `(num_voxels,)`: `int64` codes.

    Raises:
        ValueError: If an index does not fit `depth` bits, the cloud indices do not fit the rest of an `int64`, or
            `order` is unknown.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.serialization_geode import serialize
        >>> serialize(torch.tensor([[1, 0, 0], [0, 1, 1]]), torch.tensor([0, 2]), depth=1, order="z").tolist()
        [4, 19]
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"`depth` must lie in [1, {MAX_DEPTH}], got {depth}. Use larger voxels.")
    if grid_coord.numel():
        low, high = (int(value) for value in torch.aminmax(grid_coord))
        if low < 0 or high >= 1 << depth:
            raise ValueError(
                f"`grid_coord` must lie in [0, {(1 << depth) - 1}] for `depth` {depth}, got values from {low} to {high}. "
                "Shift each cloud to start at 0, or use `serialization_depth` of the largest index."
            )
        check_code_bits(int(batch.max()) + 1, depth)
    return (batch.long() << 3 * depth) | _curve_code(grid_coord, depth, order)


def check_code_bits(num_clouds: int, depth: int) -> None:
    """Raise unless the indices of `num_clouds` clouds fit above `3 * depth` bits."""
    if num_clouds.bit_length() + 3 * depth > CODE_BITS:
        raise ValueError(
            f"A batch of {num_clouds} clouds needs {num_clouds.bit_length()} bits, and voxels {3 * depth}; together they "
            f"must not exceed {CODE_BITS}. Use smaller batches."
        )


def _curve_code(grid_coord: torch.Tensor, depth: int, order: str) -> torch.Tensor:
    """Return the codes of one cloud, without range checks."""
    curve, _, suffix = order.partition("-")
    axes = (1, 0, 2) if suffix == "trans" else (0, 1, 2)
    if curve == "z" and suffix in ("", "trans"):
        return _interleave([grid_coord[:, axis].long() for axis in axes])
    if curve == "hilbert" and suffix in ("", "trans"):
        return _hilbert_code(grid_coord, axes, depth)
    raise ValueError(f"`order` must be 'z', 'z-trans', 'hilbert' or 'hilbert-trans', got {order!r}.")


def _interleave(axes: list[torch.Tensor]) -> torch.Tensor:
    """Merge the bits of three `int64` axes, the first one most significant."""
    code = torch.zeros_like(axes[0])
    for axis in axes:
        # Spread 16 bits to every third place, halving the size of the groups that move together.
        for shift, mask in ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249)):
            axis = (axis | (axis << shift)) & mask
        code = (code << 1) | axis
    return code


def _hilbert_code(grid_coord: torch.Tensor, axes: tuple[int, int, int], depth: int) -> torch.Tensor:
    """Return Hilbert codes: Skilling's transform to a Gray number, then its binary value."""
    # 16 bits fit an int32, which halves the memory traffic of the bit loop.
    points = [grid_coord[:, axis].int() for axis in axes]
    first = points[0].clone()
    points[0] = first
    for bit in range(depth - 1, -1, -1):
        low = (1 << bit) - 1
        # For the first axis exchanging with itself changes nothing, so only the inversion remains.
        first ^= -((first >> bit) & 1) & low
        for index in (1, 2):
            inverted = -((points[index] >> bit) & 1)
            exchanged = (first ^ points[index]) & ~inverted & low
            first ^= exchanged | (inverted & low)
            points[index] = points[index] ^ exchanged
    code = _interleave([point.long() for point in points])
    for shift in (1, 2, 4, 8, 16, 32):
        code ^= code >> shift
    return code


def voxel_keys(grid_coord: torch.Tensor, batch: torch.Tensor, max_index: int) -> torch.Tensor:
    """
    Map voxels to single `int64` keys that sort by (cloud, x, y, z).

    Each axis has a free index on either side, so the key of a neighbour is the voxel's key plus a constant, and never
    the key of another voxel.
    """
    step = max_index + 3
    keys = batch
    for axis in range(3):
        keys = keys * step + (grid_coord[:, axis] + 1)
    return keys


def neighbor_pairs(grid: VoxelGrid) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    List the pairs of occupied voxels that touch, for the first half of the 27 offsets.

    Surfaces fill few of the 27 neighbours, so lists of what exists are smaller than a table and save the arithmetic on
    what does not. Offset `26 - k` is the opposite of offset `k` and has the same pairs, swapped.

    Args:
        grid (`VoxelGrid`):
            The voxels. They must be unique.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: For each offset `k = 9a + 3b + c` below 13, the rows of the voxels and
        the rows of their neighbours at `(a - 1, b - 1, c - 1)`. Both ascend.
    """
    step = grid.max_index + 3
    keys, last = grid.keys, grid.keys.shape[0] - 1
    pairs = []
    for column in range(5):  # (a, b) = (0, 0) ... (1, 1); in the last, which is the centre's, only c = 0 is new
        delta = (column // 3 - 1) * step * step + (column % 3 - 1) * step
        target = keys + (delta - 1)
        # The three neighbours of a column are consecutive keys: one search finds the first, and if it is not there,
        # the place where the next one would be.
        place = torch.searchsorted(keys, target)
        for _ in range(3 if column < 4 else 1):
            found = keys[place.clamp(max=last)] == target
            rows = found.nonzero().flatten()
            pairs.append((rows, place.index_select(0, rows)))
            place = place + found
            target = target + 1
    return pairs


def coarsen(grid: VoxelGrid, stride: int) -> tuple[VoxelGrid, torch.Tensor, torch.Tensor]:
    """
    Merge voxels into voxels of `stride` times their edge.

    Args:
        grid (`VoxelGrid`):
            The voxels to merge.
        stride (`int`):
            Edge ratio.

    Returns:
        `tuple[VoxelGrid, torch.Tensor, torch.Tensor]`: The coarser voxels, the coarser voxel of each voxel
        (`(num_voxels,)`), and the number of members of each coarser voxel.
    """
    coarse_coord = torch.div(grid.grid_coord, stride, rounding_mode="floor")
    max_index = grid.max_index // stride
    keys, members = torch.sort(voxel_keys(coarse_coord, grid.batch, max_index))
    keys, parents, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    inverse = torch.empty_like(parents).index_copy_(0, members, parents)
    # Members of a voxel share cloud and index, so any of them stands for all.
    representatives = members.index_select(0, counts.cumsum(0) - counts)
    batch = grid.batch.index_select(0, representatives)
    sizes = torch.bincount(batch, minlength=len(grid.sizes)).tolist()
    return VoxelGrid(coarse_coord.index_select(0, representatives), batch, keys, max_index, sizes), inverse, counts


def attention_layout(sizes: list[int], window_size: int, device: torch.device) -> AttentionLayout:
    """
    Cut clouds into windows along a curve.

    A cloud of at most `window_size` voxels is one window. A larger one has windows of `window_size` queries, and the
    keys of a last incomplete window are the cloud's last `window_size` voxels: it borrows from the window before.

    Args:
        sizes (`list[int]`):
            Voxels of each cloud.
        window_size (`int`):
            Voxels per window.
        device (`torch.device`):
            Where the indices are needed.

    Returns:
        `AttentionLayout`: The windows.
    """
    num_full = sum(size // window_size * window_size for size in sizes)
    full_ranges, tail_ranges, tails = [], [], []
    stop, full_slot, tail_slot = 0, 0, num_full
    for size in sizes:
        rest = size % window_size
        start, stop = stop, stop + size
        full_slot += size - rest
        full_ranges.append((start, stop - rest))
        if rest:
            borrowed = window_size - rest if size > window_size else 0
            tails.append(AttentionTail(tail_slot, tail_slot + rest, full_slot - borrowed, full_slot))
            tail_ranges.append((stop - rest, stop))
            tail_slot += rest
    positions = None
    if len(sizes) > 1:
        positions = torch.cat([torch.arange(*ends, device=device) for ends in full_ranges + tail_ranges])
    return AttentionLayout(positions, window_size, num_full // window_size, tails)


def attention_windows(grid: VoxelGrid, order: str, layout: AttentionLayout) -> AttentionWindows:
    """Put the voxels into the windows of `layout` along the curve `order`."""
    code = (grid.batch << 3 * grid.depth) | _curve_code(grid.grid_coord, grid.depth, order)
    rows = torch.argsort(code)
    if layout.positions is not None:
        rows = rows.index_select(0, layout.positions)
    slots = torch.empty_like(rows)
    slots.index_copy_(0, rows, torch.arange(rows.shape[0], device=rows.device))
    return AttentionWindows(rows, slots, layout)


def prepare_point_cloud(
    coord: torch.Tensor | np.ndarray,
    color: torch.Tensor | np.ndarray | None,
    normal: torch.Tensor | np.ndarray | None,
    grid_size: float = 0.02,
) -> dict[str, torch.Tensor]:
    """
    Voxelise one cloud and build the input features of the point encoder.

    The cloud is centred (its bounding box in x and y, its lowest point in z) and one point of each voxel is kept.

    Convention:
        - A voxel is `floor(coord / grid_size)`, computed in float32 as the released weights were trained; in float64 some
          points on voxel borders fall to the other side.
        - The point that is kept is the first of its voxel, where the reference draws one. Voxels are in ascending order
          of (x, y, z), where the reference has the order of a hash; the model does not depend on it.

    Args:
        coord (`torch.Tensor` or `np.ndarray` of shape `(num_points, 3)`):
            Coordinates in metres, +z up. Far from the origin use float64: it is reduced to float32 after centring.
        color (`torch.Tensor` or `np.ndarray` of shape `(num_points, 3)`, *optional*):
            Red, green and blue in [0, 255]. `None` gives zeros.
        normal (`torch.Tensor` or `np.ndarray` of shape `(num_points, 3)`, *optional*):
            Unit normals, or zeros where unknown. `None` gives zeros.
        grid_size (`float`, defaults to 0.02):
            Voxel edge in metres.

    Returns:
        `dict[str, torch.Tensor]`: `coord` (`(num_voxels, 3)`, centred), `grid_coord` (`(num_voxels, 3)`, `int64`, each
        axis from 0), `feat` (`(num_voxels, 9)`: x y z, r g b in [0, 1], normal), `inverse` (`(num_points,)`, the voxel
        of each point) and `offset` (`(1,)`), on the device of `coord`.

    Raises:
        ValueError: If the cloud is empty, shapes disagree, a value is not finite, colours or normals are out of range, or
            the cloud is wider than 65535 voxels.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.serialization_geode import prepare_point_cloud
        >>> points = torch.tensor([[0.0, 0.0, 1.0], [0.9, 0.0, 1.0], [0.8, 0.0, 1.1]])
        >>> cloud = prepare_point_cloud(points, color=None, normal=None, grid_size=0.25)
        >>> cloud["grid_coord"].tolist(), cloud["inverse"].tolist()
        ([[0, 0, 0], [3, 0, 0]], [0, 1, 1])
    """
    is_number = isinstance(grid_size, (int, float)) and not isinstance(grid_size, bool)
    # In float32, where the quotient is taken, smaller ones are 0.
    if not is_number or not torch.finfo(torch.float32).tiny <= grid_size < float("inf"):
        raise ValueError(f"`grid_size` must be a positive length in metres, got {grid_size!r}.")
    points = _as_finite_rows("coord", coord, None)
    if not points.shape[0]:
        raise ValueError("`coord` must hold at least one point, got an empty cloud.")
    color = _as_finite_rows("color", color, points).float()
    normal = _as_finite_rows("normal", normal, points).float()
    _check_colors_and_normals(color, normal)
    low, high = points.amin(dim=0), points.amax(dim=0)
    middle = (low + high) / 2
    points = (points - torch.stack([middle[0], middle[1], low[2]])).float()
    # A scalar divisor would become a multiplication by its inverse on GPUs.
    scaled = torch.floor(points / points.new_tensor(grid_size))
    scaled = scaled - scaled.amin(dim=0)
    width = scaled.amax().item() + 1
    if width > MAX_VOXELS_PER_AXIS:
        raise ValueError(
            f"The cloud must be at most {MAX_VOXELS_PER_AXIS} voxels wide, got {width:.0f} with `grid_size` {grid_size}. "
            "Remove stray points, split the cloud, or use a larger `grid_size`."
        )
    grid_coord = scaled.long()
    keys = voxel_keys(grid_coord, grid_coord.new_zeros(1), int(width) - 1)
    keys, members = torch.sort(keys, stable=True)
    _, voxels, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    first = members.index_select(0, counts.cumsum(0) - counts)
    features = torch.cat([points, color / 255, normal], dim=1)
    return {
        "coord": points.index_select(0, first),
        "grid_coord": grid_coord.index_select(0, first),
        "feat": features.index_select(0, first),
        "inverse": torch.empty_like(voxels).index_copy_(0, members, voxels),
        "offset": counts.new_tensor([counts.shape[0]]),
    }


def _as_finite_rows(name: str, values: Any, points: torch.Tensor | None) -> torch.Tensor:
    """Return `values` as float rows of three, with as many rows as `points` and on its device; zeros for `None`."""
    if values is None and points is not None:
        return torch.zeros_like(points)
    # `torch.tensor` copies, because PyTorch warns about arrays that are not writable.
    values = values if isinstance(values, torch.Tensor) else torch.tensor(np.asarray(values))
    num_rows = "num_points" if points is None else points.shape[0]
    if values.ndim != 2 or values.shape[1] != 3 or (points is not None and values.shape[0] != num_rows):
        raise ValueError(f"`{name}` must have shape ({num_rows}, 3), got {tuple(values.shape)}.")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).int().argmax())
        raise ValueError(
            f"`{name}` must be finite, but {int((~finite).sum())} rows are not; the first is row {row}, "
            f"{values[row].tolist()}. Remove these points first."
        )
    return values if points is None else values.to(points.device)


def _check_colors_and_normals(color: torch.Tensor, normal: torch.Tensor) -> None:
    low, high = color.aminmax()
    if low < 0 or high > 255:
        raise ValueError(f"`color` must lie in [0, 255], got values from {low.item():g} to {high.item():g}.")
    # A whole cloud between two shades of black does not exist; one in [0, 1] is a common mistake.
    if high <= 1 and ((color > 0) & (color < 1)).any():
        raise ValueError(f"`color` must lie in [0, 255], got fractions up to {high.item():g}. Multiply by 255.")
    length = normal.norm(dim=1).amax().item()
    if length > 1.01:
        raise ValueError(
            f"`normal` must hold unit vectors or zeros, got a length of {length:g}. Normalise them first."
        )
