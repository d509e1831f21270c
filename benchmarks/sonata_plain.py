# SPDX-License-Identifier: Apache-2.0
"""
Sonata as its published behaviour reads, with nothing rearranged: an oracle for `SonataModel` and the baseline of its benchmark.

Source: Wu et al., *Sonata* (CVPR 2025) and *Point Transformer V3* (CVPR 2024), and a description of what the public program
computes. The public program needs spconv and was not at hand where this was written, so this is our own literal reading, not
that program; it agrees with outputs stored from it (`tests/benchmarks/test_sonata_plain.py`).

Plain functions over the public checkpoint's own tensors, for one cloud. Nothing is shared with `geode.modeling_geode`. As
described, a table lists the 27 neighbours of each voxel, the convolution gathers, multiplies and adds for each of them,
curves are walked bit by bit, the last window is completed with the voxels before it, and softmax stands between two products.

A `state` is a dictionary of tensors under the checkpoint's names, a `config` the public constructor's arguments.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F


State = dict[str, torch.Tensor]
Config = dict[str, Any]


def linear(state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Apply the linear map at `prefix`, whose offset may be left out."""
    return F.linear(x, state[f"{prefix}.weight"], state.get(f"{prefix}.bias"))


def layer_norm(state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Normalise each row, with the gain and offset at `prefix`."""
    return F.layer_norm(x, x.shape[-1:], state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def z_code(axes: list[torch.Tensor], depth: int) -> torch.Tensor:
    """The bits of three indices in turn, the first index above the second above the third."""
    code = torch.zeros_like(axes[0])
    for bit in range(depth):
        for place, axis in enumerate(axes):
            code |= ((axis >> bit) & 1) << (3 * bit + 2 - place)
    return code


def hilbert_code(axes: list[torch.Tensor], depth: int) -> torch.Tensor:
    """Skilling's transform of three indices to a Gray number, and its binary value."""
    axes = [axis.clone() for axis in axes]
    for bit in reversed(range(depth)):
        low = (1 << bit) - 1
        for axis in axes:
            is_set = ((axis >> bit) & 1).bool()
            swapped = torch.where(is_set, 0, (axes[0] ^ axis) & low)
            first = torch.where(is_set, axes[0] ^ low, axes[0] ^ swapped)
            if axis is not axes[0]:
                axis ^= swapped
            axes[0].copy_(first)
    gray, code = z_code(axes, depth), torch.zeros_like(axes[0])
    for shift in range(3 * depth):
        code ^= gray >> shift
    return code


def along_curve(grid: torch.Tensor, order: str) -> torch.Tensor:
    """The rows of voxels `(num_voxels, 3)` in the order of a curve."""
    depth = (int(grid.max()) + 1).bit_length()
    x, y, z = grid.unbind(1)
    axes = [y, x, z] if order.endswith("-trans") else [x, y, z]
    return (hilbert_code if order.startswith("hilbert") else z_code)(axes, depth).argsort()


def neighbor_table(grid: torch.Tensor) -> torch.Tensor:
    """The rows of the 27 neighbours of each voxel, `(num_voxels, 27)`; the number of voxels where there is none."""
    side = int(grid.max()) + 3
    place_values = torch.tensor([side * side, side, 1])
    keys, rows = ((grid + 1) * place_values).sum(1).sort()
    columns = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        wanted = ((grid + 1 + torch.tensor(offset)) * place_values).sum(1)
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        columns.append(torch.where(keys[place] == wanted, rows[place], len(keys)))
    return torch.stack(columns, dim=1)


def convolution(state: State, prefix: str, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The offset at `prefix`, and for each of 27 neighbours that exist its row times the matrix of its place."""
    weight, total = state[f"{prefix}.weight"].flatten(1, 3), state[f"{prefix}.bias"].repeat(len(x), 1)
    for place in range(27):
        rows = (table[:, place] < len(x)).nonzero()[:, 0]
        total.index_add_(0, rows, x[table[rows, place]] @ weight[:, place].t())
    return total


def attention(state: State, prefix: str, x: torch.Tensor, curve: torch.Tensor, config: Config, stage: int):
    """Softmax attention within windows along a curve."""
    size, heads = min(config["enc_patch_size"][stage], len(x)), config["enc_num_head"][stage]
    slots = torch.arange(-(-len(x) // size) * size)
    slots[len(x) :] -= size
    qkv = linear(state, f"{prefix}.qkv", x)[curve[slots]]
    query, key, value = qkv.view(-1, size, 3, heads, x.shape[1] // heads).permute(2, 0, 3, 1, 4)
    scale = config["qk_scale"] or query.shape[-1] ** -0.5
    scores = (query * scale) @ key.transpose(-2, -1)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(len(slots), -1)
    out = torch.empty_like(x)
    out[curve] = mixed[: len(x)]
    return linear(state, f"{prefix}.proj", out)


def block(state: State, prefix: str, x: torch.Tensor, table, curve, config: Config, stage: int) -> torch.Tensor:
    """Position encoding, attention and MLP, each added to `x`."""
    encoded = linear(state, f"{prefix}.cpe.1", convolution(state, f"{prefix}.cpe.0", x, table))
    x = x + layer_norm(state, f"{prefix}.cpe.2", encoded)
    normed = layer_norm(state, f"{prefix}.norm1.0", x)
    x = x + attention(state, f"{prefix}.attn", normed, curve, config, stage)
    hidden = F.gelu(linear(state, f"{prefix}.mlp.0.fc1", layer_norm(state, f"{prefix}.norm2.0", x)))
    return x + linear(state, f"{prefix}.mlp.0.fc2", hidden)


def pool(state: State, prefix: str, x: torch.Tensor, grid: torch.Tensor, stride: int):
    """Merge voxels: the maximum of projected members, layer norm, GELU; in the order of (x, y, z)."""
    coarse, inverse = torch.unique(grid // stride, dim=0, return_inverse=True)
    projected = linear(state, f"{prefix}.proj", x)
    pooled = projected.new_full((len(coarse), projected.shape[1]), -torch.inf)
    pooled = pooled.scatter_reduce(0, inverse[:, None].expand_as(projected), projected, "amax")
    return F.gelu(layer_norm(state, f"{prefix}.norm.0", pooled)), coarse


def plain_forward(state: State, config: Config, feat: torch.Tensor, grid_coord: torch.Tensor) -> torch.Tensor:
    """
    Encode one cloud; the released settings alone (`pre_norm`, no layer scale, curves not shuffled).

    Args:
        state (`dict[str, torch.Tensor]`): Weights.
        config (`dict`): The public constructor's arguments.
        feat (`torch.Tensor` of shape `(num_voxels, in_channels)`): Input features.
        grid_coord (`torch.Tensor` of shape `(num_voxels, 3)`): Unique voxel indices, `int64`.

    Returns:
        `torch.Tensor` of shape `(num_coarsest_voxels, channels)`: Features of the coarsest stage, in the order of (x, y, z).
    """
    x, grid = linear(state, "embedding.stem.linear", feat), grid_coord
    x = F.gelu(layer_norm(state, "embedding.stem.norm", x))
    for stage, depth in enumerate(config["enc_depths"]):
        if stage:
            x, grid = pool(state, f"enc.enc{stage}.down", x, grid, config["stride"][stage - 1])
        table, curves = neighbor_table(grid), [along_curve(grid, order) for order in config["order"]]
        for number in range(depth):
            prefix, curve = f"enc.enc{stage}.block{number}", curves[number % len(curves)]
            x = block(state, prefix, x, table, curve, config, stage)
    return x
