# SPDX-License-Identifier: Apache-2.0
"""
Sonata, the point encoder: a Point Transformer V3 encoder in plain PyTorch.

Source: Wu et al., *Sonata: Self-Supervised Learning of Reliable Point Representations* (CVPR 2025), and Wu et al.,
*Point Transformer V3: Simpler, Faster, Stronger* (CVPR 2024).

Rows are voxels. A batch is packed: the clouds are concatenated along the first dimension and `offset` holds the
cumulative counts. Inside the model, rows are sorted by (cloud, x, y, z), so results do not depend on the order in which
the rows of a cloud arrive; stage 0 is returned in the order of the input.

Deviations from the reference: curves are not permuted outside of training; attention runs in the dtype of the model and
not always in half precision; the max of a pooling gives equal shares of the gradient to members that tie exactly.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import load_state_dict_from_file
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from geode.configuration.configuration_geode import SonataConfig

from .hub_geode import GeodeHubModel
from .serialization_geode import (
    CENTER_OFFSET,
    MAX_DEPTH,
    MAX_VOXELS_PER_AXIS,
    NUM_OFFSETS,
    AttentionWindows,
    VoxelGrid,
    attention_layout,
    attention_windows,
    check_code_bits,
    coarsen,
    neighbor_pairs,
    prepare_point_cloud,
    serialization_depth,
    serialize,
    voxel_keys,
)


# Rows that the convolution and the MLP handle at a time: large enough to hide the cost of a call, small enough that the
# temporaries of a large cloud stay in the cache. It bounds memory, not results.
ROWS_CHUNK_SIZE = 4096


@dataclass
class SonataModelOutput(ModelOutput):
    """
    Output of [`SonataModel`]. Tuples have one entry per stage, finest first.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(num_voxels[-1], enc_channels[-1])`):
            Features of the coarsest stage.
        hidden_states (`tuple[torch.Tensor]`): Features of each stage, `(num_voxels[stage], enc_channels[stage])`.
        coords (`tuple[torch.Tensor]`): Means of the coordinates of each voxel's members, `(num_voxels[stage], 3)`.
        grid_coords (`tuple[torch.Tensor]`): Voxel indices, `(num_voxels[stage], 3)`.
        offsets (`tuple[torch.Tensor]`): Cumulative voxel counts of the clouds, `(num_clouds,)`.
        pooling_inverses (`tuple[torch.Tensor | None]`): For each voxel of the stage before, its row in this stage;
            `None` for stage 0. Rows of stage 0 are in the order of the input, of later stages in ascending order of
            (cloud, x, y, z).
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    coords: tuple[torch.Tensor, ...] | None = None
    grid_coords: tuple[torch.Tensor, ...] | None = None
    offsets: tuple[torch.Tensor, ...] | None = None
    pooling_inverses: tuple[torch.Tensor | None, ...] | None = None


class SonataStageContext(NamedTuple):
    """What all blocks of a stage share: number of voxels, pairs of neighbours, attention windows along each curve."""

    num_voxels: int
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    windows: list[AttentionWindows]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _add_convolution(
    total: torch.Tensor,
    hidden_states: torch.Tensor,
    matrices: list[torch.Tensor],
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Add to each row of `total` its neighbours' rows times the matrix of their offset."""
    if total.dtype == hidden_states.dtype:
        total.addmm_(hidden_states, matrices[CENTER_OFFSET])
    else:
        total += hidden_states @ matrices[CENTER_OFFSET]
    for offset, (rows, neighbors) in enumerate(pairs):
        # The opposite offset has the same pairs, swapped.
        for matrix, targets, sources in (
            (matrices[offset], rows, neighbors),
            (matrices[NUM_OFFSETS - 1 - offset], neighbors, rows),
        ):
            chunks = zip(targets.split(ROWS_CHUNK_SIZE), sources.split(ROWS_CHUNK_SIZE), strict=True)
            for chunk_targets, chunk_sources in chunks:
                products = hidden_states.index_select(0, chunk_sources) @ matrix
                total.index_add_(0, chunk_targets, products.to(total.dtype))
    return total


class _SubmanifoldConvolution(torch.autograd.Function):
    """
    Gather, multiply and scatter for each offset, over the pairs that exist.

    Autograd would keep the gathered rows of all offsets; this keeps the input alone and gathers again.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, pairs):
        ctx.save_for_backward(hidden_states, weight)
        ctx.pairs = pairs
        dtype = _accumulation_dtype(hidden_states.dtype)
        total = bias.to(dtype).repeat(hidden_states.shape[0], 1)
        matrices = [matrix.t() for matrix in weight.flatten(1, 3).unbind(1)]
        return _add_convolution(total, hidden_states, matrices, pairs).to(hidden_states.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        hidden_states, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dtype = _accumulation_dtype(grad_output.dtype)
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            # The transposed convolution: opposite offsets, transposed matrices.
            matrices = list(weight.flatten(1, 3).unbind(1))[::-1]
            total = torch.zeros_like(hidden_states, dtype=dtype)
            grad_input = _add_convolution(total, grad_output, matrices, ctx.pairs).to(hidden_states.dtype)
        if needs_weight:
            grad_weight = weight.new_empty(weight.shape)  # contiguous, so that its slices are views
            slices = grad_weight.flatten(1, 3).unbind(1)
            slices[CENTER_OFFSET].copy_(grad_output.t() @ hidden_states)
            for offset, (rows, neighbors) in enumerate(ctx.pairs):
                for index, targets, sources in (
                    (offset, rows, neighbors),
                    (NUM_OFFSETS - 1 - offset, neighbors, rows),
                ):
                    gathered = grad_output.index_select(0, targets).t() @ hidden_states.index_select(0, sources)
                    slices[index].copy_(gathered)
        if needs_bias:
            grad_bias = grad_output.sum(dim=0, dtype=dtype).to(grad_output.dtype)
        return grad_input, grad_weight, grad_bias, None


class SonataSubmanifoldConv(nn.Module):
    """
    A 3 x 3 x 3 convolution over occupied voxels: `out[p] = bias + sum of weight[:, a, b, c] @ x[p + (a, b, c) - 1]`.

    The kernel's axes follow the columns of `grid_coord`, without a flip. Absent neighbours count as zero.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 3, 3, 3, channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, hidden_states: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Convolve features of shape `(num_voxels, channels)`; `pairs` come from `neighbor_pairs`."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            # A custom function is opaque to autocast.
            dtype = torch.get_autocast_dtype(device_type)
            hidden_states, weight, bias = hidden_states.to(dtype), weight.to(dtype), bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return _SubmanifoldConvolution.apply(hidden_states, weight, bias, pairs)


class SonataPositionEncoding(nn.Module):
    """The conditional position encoding: a submanifold convolution, a linear layer and a layer norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = SonataSubmanifoldConv(channels)
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, hidden_states: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Encode the surroundings of each voxel, `(num_voxels, channels)`."""
        return self.norm(self.linear(self.conv(hidden_states, pairs)))


class SonataAttention(nn.Module):
    """Self-attention inside windows of voxels that follow each other along a space-filling curve."""

    def __init__(self, config: SonataConfig, stage: int):
        super().__init__()
        channels = config.enc_channels[stage]
        self.num_heads = config.enc_num_head[stage]
        self.scale = config.qk_scale
        self.dropout = float(config.attn_drop)
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(config.proj_drop)

    def forward(self, hidden_states: torch.Tensor, windows: AttentionWindows) -> torch.Tensor:
        """Mix features of shape `(num_voxels, channels)` inside each window."""
        layout = windows.layout
        qkv = self.qkv(hidden_states.index_select(0, windows.rows)).unflatten(1, (3, self.num_heads, -1))
        outputs = []
        if layout.num_windows:
            full = qkv[: layout.num_windows * layout.window_size]
            outputs.append(self._attend(*full.unflatten(0, (layout.num_windows, -1)).unbind(2)))
        for tail in layout.tails:
            own = qkv[tail.start : tail.stop]
            keys_values = torch.cat([qkv[tail.borrowed_start : tail.borrowed_stop, 1:], own[:, 1:]])
            outputs.append(self._attend(own[None, :, 0], *keys_values[None].unbind(2)))
        mixed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return self.proj_drop(self.proj(mixed).index_select(0, windows.slots))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend within each window; arguments are `(num_windows, length, num_heads, head_dim)`."""
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return output.transpose(1, 2).flatten(2).flatten(0, 1)


class SonataMLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, config: SonataConfig, stage: int):
        super().__init__()
        channels = config.enc_channels[stage]
        self.fc1 = nn.Linear(channels, int(channels * config.mlp_ratio))
        self.fc2 = nn.Linear(int(channels * config.mlp_ratio), channels)
        self.drop = nn.Dropout(config.proj_drop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform each row of `(num_voxels, channels)`."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(hidden_states)))))


class SonataBlock(GradientCheckpointingLayer):
    """Position encoding, attention and MLP, each added to the residual stream."""

    def __init__(self, config: SonataConfig, stage: int, drop_path: float):
        super().__init__()
        channels = config.enc_channels[stage]
        self.pre_norm = config.pre_norm
        self.drop_path = drop_path
        self.position = SonataPositionEncoding(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SonataAttention(config, stage)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = SonataMLP(config, stage)
        self.gamma1 = self.gamma2 = None
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), float(config.layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((channels,), float(config.layer_scale)))

    def forward(self, hidden_states: torch.Tensor, context: SonataStageContext, index: int) -> torch.Tensor:
        """
        Transform features of shape `(num_voxels, channels)`.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_voxels, channels)`): Features.
            context (`SonataStageContext`): Neighbours and windows of the stage.
            index (`int`): Number of the block in its stage, which selects the curve.
        """
        hidden_states = hidden_states + self.position(hidden_states, context.pairs)
        windows = context.windows[index % len(context.windows)]
        if self.pre_norm:
            hidden_states = hidden_states + self._branch(self.attn(self.norm1(hidden_states), windows), self.gamma1)
            # The hidden width of the MLP makes the largest temporary of the model.
            updates = [self.mlp(self.norm2(rows)) for rows in hidden_states.split(ROWS_CHUNK_SIZE)]
            return hidden_states + self._branch(_concatenate(updates), self.gamma2)
        hidden_states = self.norm1(hidden_states + self._branch(self.attn(hidden_states, windows), self.gamma1))
        updates = [self.mlp(rows) for rows in hidden_states.split(ROWS_CHUNK_SIZE)]
        return self.norm2(hidden_states + self._branch(_concatenate(updates), self.gamma2))

    def _branch(self, update: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        """Apply layer scale and stochastic depth; the latter drops rows (voxels), not clouds."""
        if gamma is not None:
            update = update * gamma
        if self.training and self.drop_path > 0:
            keep = 1.0 - self.drop_path
            update = update * (update.new_empty(update.shape[0], 1).bernoulli_(keep) / keep)
        return update


def _concatenate(chunks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


class SonataPooling(nn.Module):
    """Merge voxels: projection, maximum over the members, layer norm, GELU."""

    def __init__(self, config: SonataConfig, stage: int):
        super().__init__()
        self.proj = nn.Linear(config.enc_channels[stage - 1], config.enc_channels[stage])
        self.norm = nn.LayerNorm(config.enc_channels[stage])

    def forward(self, hidden_states: torch.Tensor, inverse: torch.Tensor, num_voxels: int) -> torch.Tensor:
        """
        Pool features.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_members, channels)`): Features of the members.
            inverse (`torch.Tensor` of shape `(num_members,)`): Coarser voxel of each member.
            num_voxels (`int`): Number of coarser voxels.

        Returns:
            `torch.Tensor` of shape `(num_voxels, out_channels)`: Features of the coarser voxels.
        """
        projected = self.proj(hidden_states)
        pooled = projected.new_full((num_voxels, projected.shape[1]), -torch.inf)
        pooled = pooled.scatter_reduce(0, inverse[:, None].expand_as(projected), projected, "amax")
        return F.gelu(self.norm(pooled))


class SonataStage(nn.Module):
    """The blocks of one resolution, and for all but the finest the pooling before them."""

    def __init__(self, config: SonataConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        self.pooling = SonataPooling(config, stage) if stage else None
        self.blocks = nn.ModuleList([SonataBlock(config, stage, rate) for rate in drop_paths])

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: SonataStageContext,
        inverse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Encode one resolution.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_members, channels)`):
                Features of the stage before, or for the finest stage the embedding.
            context (`SonataStageContext`):
                Neighbours and windows of the stage.
            inverse (`torch.Tensor` of shape `(num_members,)`, *optional*):
                Voxel of each member; not for the finest stage.

        Returns:
            `torch.Tensor` of shape `(num_voxels, out_channels)`: Features of the stage.
        """
        if self.pooling is not None:
            hidden_states = self.pooling(hidden_states, inverse, context.num_voxels)
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, context, index)
        return hidden_states


class SonataEmbedding(nn.Module):
    """Linear layer, layer norm and GELU on the input features, and the token of masked points."""

    def __init__(self, config: SonataConfig):
        super().__init__()
        channels = config.enc_channels[0]
        self.linear = nn.Linear(config.in_channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.mask_token = nn.Parameter(torch.zeros(1, channels)) if config.mask_token else None

    @force_accelerate_hooks(["linear"])  # read, not called: offloaded weights would stay away
    def forward(self, feat: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Embed `(num_points, in_channels)` features; rows where `mask` is `True` become the mask token."""
        weight, bias = self.linear.weight, self.linear.bias
        # Metric coordinates do not survive bfloat16: at 5 m it resolves 3 cm.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        embedded = F.linear(feat.to(dtype), weight.to(dtype), bias.to(dtype)).to(weight.dtype)
        embedded = F.gelu(self.norm(embedded))
        if mask is not None:
            assert self.mask_token is not None  # checked with the other inputs
            embedded = torch.where(mask[:, None], self.mask_token, embedded)
        return embedded


class SonataPreTrainedModel(GeodeHubModel):
    """Weight initialisation and loading of [`SonataModel`]."""

    config_class = SonataConfig
    published_remedy = "Convert them with `convert_sonata_checkpoint`."
    base_model_prefix = "sonata"
    main_input_name = "feat"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SonataBlock"]  # noqa: RUF012 - the library's type

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the reference does: truncated normal weights, zero biases and mask token."""
        if isinstance(module, nn.Linear | SonataSubmanifoldConv):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SonataEmbedding) and module.mask_token is not None:
            init.zeros_(module.mask_token)
        elif isinstance(module, SonataBlock):
            for gamma in (module.gamma1, module.gamma2):
                if gamma is not None:
                    init.constant_(gamma, self.config.layer_scale)


class SonataModel(SonataPreTrainedModel):
    """
    The Sonata point encoder.

    With `window_rule="cloud"` clouds of a batch meet only in the depth of their codes, which is that of the largest
    cloud: along Hilbert curves a much larger batch mate can therefore move the windows of a cloud.

    Args:
        config ([`SonataConfig`]):
            Architecture, and how clouds are windowed.
    """

    def __init__(self, config: SonataConfig):
        super().__init__(config)
        num_blocks = sum(config.enc_depths)
        # A torch.linspace would have no values on the meta device.
        rates = [config.drop_path * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        self.embedding = SonataEmbedding(config)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.enc_depths):
            first = sum(config.enc_depths[:stage])
            self.stages.append(SonataStage(config, stage, rates[first : first + depth]))
        self.post_init()

    def forward(
        self,
        feat: torch.Tensor,
        coord: torch.Tensor,
        grid_coord: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor | None = None,
        order_permutation: torch.Tensor | None = None,
    ) -> SonataModelOutput:
        """
        Encode a packed batch of voxelised clouds.

        Args:
            feat (`torch.Tensor` of shape `(num_voxels, in_channels)`):
                Input features. They are read in float32 whatever the dtype of the model, so leave them in float32.
            coord (`torch.Tensor` of shape `(num_voxels, 3)`):
                Coordinates in any frame, in metres. They are averaged for the coarser stages and not otherwise read.
            grid_coord (`torch.Tensor` of shape `(num_voxels, 3)`):
                Integer voxel indices, at least 0 and unique within a cloud.
            offset (`torch.Tensor` of shape `(num_clouds,)`):
                Cumulative number of rows of the clouds.
            mask (`torch.Tensor` of shape `(num_voxels,)`, *optional*):
                `True` for rows whose embedding is replaced by the mask token.
            order_permutation (`torch.Tensor` of shape `(num_stages, num_orders)`, *optional*):
                For each stage, the curve in each place of `config.order`. Default: the order of the config, and in
                training with `config.shuffle_orders` a random permutation for each stage.

        Returns:
            [`SonataModelOutput`]: Features, coordinates and voxels of every stage.

        Raises:
            ValueError: If shapes disagree, a cloud is empty, or voxels are negative, repeated, or too many per axis.
        """
        sizes = _check_inputs(self.config, feat, coord, grid_coord, offset, mask)
        grid, arrival = _sort_voxels(grid_coord, sizes)
        departure = torch.empty_like(arrival).index_copy_(
            0, arrival, torch.arange(len(arrival), device=arrival.device)
        )
        orders = self._stage_orders(order_permutation)
        coord = coord.to(torch.promote_types(coord.dtype, torch.float32))
        levels: list[tuple[torch.Tensor, ...]] = [(coord, grid_coord, offset)]
        inverses: list[torch.Tensor | None] = [None]
        features = []
        hidden_states = self.embedding(feat, mask).index_select(0, arrival)
        coord = coord.index_select(0, arrival)
        for index, stage in enumerate(self.stages):
            inverse = None
            if index:
                grid, inverse, counts = coarsen(grid, self.config.stride[index - 1])
                coord = _segment_mean(coord, inverse, counts)
                offset = torch.tensor(grid.sizes, device=offset.device, dtype=offset.dtype).cumsum(0)
                levels.append((coord, grid.grid_coord, offset))
                inverses.append(inverse.index_select(0, departure) if index == 1 else inverse)
            hidden_states = stage(hidden_states, self._stage_context(index, grid, orders[index]), inverse)
            features.append(hidden_states if index else hidden_states.index_select(0, departure))
        coords, grid_coords, offsets = zip(*levels, strict=True)
        return SonataModelOutput(features[-1], tuple(features), coords, grid_coords, offsets, tuple(inverses))

    def upcast(self, output: SonataModelOutput, levels: int) -> torch.Tensor:
        """
        Carry the coarsest features to a finer stage, each time after the features of the stage that is reached.

        Source: the reference's downstream heads; 4 levels of the released model give 48 + 96 + 192 + 384 + 512 channels.

        Args:
            output ([`SonataModelOutput`]):
                Output of the model.
            levels (`int`):
                Number of poolings to undo, at least 0 and less than the number of stages.

        Returns:
            `torch.Tensor` of shape `(num_voxels[-1 - levels], sum(enc_channels[-1 - levels :]))`: Features.

        Raises:
            ValueError: If there are not so many poolings.
        """
        hidden_states, inverses = output.hidden_states, output.pooling_inverses
        assert hidden_states is not None  # the model fills all fields
        assert inverses is not None
        last = len(hidden_states) - 1
        if not 0 <= levels <= last:
            raise ValueError(f"`levels` must lie in [0, {last}], the number of poolings, got {levels}.")
        features = hidden_states[last]
        for finer in reversed(range(last - levels, last)):
            inverse = inverses[finer + 1]
            assert inverse is not None  # only stage 0 has none
            features = torch.cat([hidden_states[finer], features.index_select(0, inverse)], dim=1)
        return features

    def _stage_orders(self, order_permutation: torch.Tensor | None) -> list[list[str]]:
        """Return the curves of each stage, in the order in which its blocks use them."""
        orders, num_stages = list(self.config.order), len(self.stages)
        if order_permutation is not None:
            rows = order_permutation.tolist()
            if len(rows) != num_stages or any(sorted(row) != list(range(len(orders))) for row in rows):
                raise ValueError(
                    f"`order_permutation` must hold, for each of {num_stages} stages, a permutation of "
                    f"0 to {len(orders) - 1}, got {rows}."
                )
        elif self.training and self.config.shuffle_orders:
            rows = [torch.randperm(len(orders)).tolist() for _ in range(num_stages)]
        else:
            rows = [range(len(orders))] * num_stages
        return [[orders[index] for index in row] for row in rows]

    def _stage_context(self, stage: int, grid: VoxelGrid, orders: list[str]) -> SonataStageContext:
        """Compute once what the blocks of a stage share; curves that no block uses are left out."""
        window_size = self.config.enc_patch_size[stage]
        if self.config.window_rule == "batch":
            window_size = min(window_size, *grid.sizes)
        layout = attention_layout(grid.sizes, window_size, grid.keys.device)
        used = orders[: self.config.enc_depths[stage]]
        windows = [attention_windows(grid, order, layout) for order in used]
        return SonataStageContext(sum(grid.sizes), neighbor_pairs(grid), windows)


def _check_inputs(
    config: SonataConfig,
    feat: torch.Tensor,
    coord: torch.Tensor,
    grid_coord: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
) -> list[int]:
    """Check shapes and dtypes, and return the number of rows of each cloud."""
    num_rows = feat.shape[0]
    for name, value, width in (("feat", feat, config.in_channels), ("coord", coord, 3), ("grid_coord", grid_coord, 3)):
        if value.shape != (num_rows, width):
            raise ValueError(
                f"`{name}` must have shape ({num_rows}, {width}), with the rows of `feat`, got {tuple(value.shape)}."
            )
    for name, value in (("grid_coord", grid_coord), ("offset", offset)):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"`{name}` must hold integers, got {value.dtype}. `prepare_point_cloud` makes voxel indices."
            )
    if mask is not None and (mask.shape != (num_rows,) or mask.dtype != torch.bool):
        raise ValueError(f"`mask` must be boolean of shape ({num_rows},), got {mask.dtype} of {tuple(mask.shape)}.")
    if mask is not None and not config.mask_token:
        raise ValueError("`mask` needs a model with a mask token, and `config.mask_token` is False. Leave it out.")
    if offset.ndim != 1 or not offset.numel():
        raise ValueError(f"`offset` must have one entry per cloud and at least one, got shape {tuple(offset.shape)}.")
    ends = offset.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(sizes) < 1:
        cloud = next(index for index, size in enumerate(sizes) if size < 1)
        raise ValueError(
            f"`offset` must increase, as a cloud holds at least one point; cloud {cloud} has {sizes[cloud]} in {ends}. "
            "Leave empty clouds out of the batch."
        )
    if ends[-1] != num_rows:
        raise ValueError(f"`offset` must end with the number of rows of `feat`, {num_rows}, got {ends[-1]}.")
    return sizes


def _sort_voxels(grid_coord: torch.Tensor, sizes: list[int]) -> tuple[VoxelGrid, torch.Tensor]:
    """Sort rows by (cloud, x, y, z); return the voxels, and the input row of each sorted row."""
    device, num_rows = grid_coord.device, grid_coord.shape[0]
    grid_coord = grid_coord.long()
    min_index, max_index = (int(value) for value in torch.stack(torch.aminmax(grid_coord)).tolist())
    if min_index < 0:
        raise ValueError(
            f"`grid_coord` must not be negative, got {min_index}. Shift each cloud's voxels to start at 0."
        )
    if max_index >= MAX_VOXELS_PER_AXIS:
        raise ValueError(
            f"`grid_coord` must be below {MAX_VOXELS_PER_AXIS}, so that codes have at most {MAX_DEPTH} bits per axis, "
            f"got {max_index}. Split the cloud, or use larger voxels."
        )
    check_code_bits(len(sizes), serialization_depth(max_index))
    clouds = torch.arange(len(sizes), device=device)
    batch = clouds.repeat_interleave(torch.tensor(sizes, device=device), output_size=num_rows)
    keys, arrival = torch.sort(voxel_keys(grid_coord, batch, max_index))
    repeated = keys[1:] == keys[:-1]
    if repeated.any():
        row = int(arrival[int(repeated.int().argmax())])
        raise ValueError(
            f"`grid_coord` must be unique within a cloud, but cloud {int(batch[row])} holds voxel "
            f"{tuple(grid_coord[row].tolist())} more than once. Keep one point per voxel, as `prepare_point_cloud` does."
        )
    # Rows of a cloud stay together, so `batch` is the same before and after sorting.
    return VoxelGrid(grid_coord.index_select(0, arrival), batch, keys, max_index, sizes), arrival


def _segment_mean(values: torch.Tensor, inverse: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    total = values.new_zeros(counts.shape[0], values.shape[1]).index_add(0, inverse, values)
    return total / counts[:, None]


# Constructor defaults of the reference, for configurations that leave them out. They differ from ours.
_REFERENCE_DEFAULTS = {
    "in_channels": 6,
    "order": ("z", "z-trans"),
    "stride": (2, 2, 2, 2),
    "enc_depths": (3, 3, 3, 12, 3),
    "enc_channels": (48, 96, 192, 384, 512),
    "enc_num_head": (3, 6, 12, 24, 32),
    "enc_patch_size": (1024, 1024, 1024, 1024, 1024),
    "mlp_ratio": 4,
    "qkv_bias": True,
    "qk_scale": None,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "drop_path": 0.3,
    "layer_scale": None,
    "pre_norm": True,
    "shuffle_orders": True,
}
# Switches of the reference that must have one value, and what another value would mean.
_REFERENCE_SWITCHES = {
    "enable_rpe": (False, False, "relative position bias"),
    "enc_mode": (False, True, "a decoder"),
}
# Without effect on an encoder's features: what is frozen is the trainer's choice, fused attention takes its softmax in
# float32 anyway, a decoder is not built.
_REFERENCE_IGNORED = {
    "traceable",
    "mask_token",
    "freeze_encoder",
    "upcast_attention",
    "upcast_softmax",
    "dec_depths",
    "dec_channels",
    "dec_num_head",
    "dec_patch_size",
}
# From our names to the published ones.
_PUBLISHED_NAMES = (
    (r"^embedding\.(linear|norm)\.", r"embedding.stem.\1."),
    (r"^stages\.(\d+)\.pooling\.proj\.", r"enc.enc\1.down.proj."),
    (r"^stages\.(\d+)\.pooling\.norm\.", r"enc.enc\1.down.norm.0."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"enc.enc\1.block\2."),
    (r"\.position\.conv\.", ".cpe.0."),
    (r"\.position\.linear\.", ".cpe.1."),
    (r"\.position\.norm\.", ".cpe.2."),
    (r"\.norm([12])\.", r".norm\1.0."),
    (r"\.mlp\.", ".mlp.0."),
    (r"\.gamma([12])$", r".ls\1.0.gamma"),
)


def convert_sonata_checkpoint(checkpoint: Mapping[str, Any] | str | os.PathLike) -> SonataModel:
    """
    Load published weights of Sonata, or of Concerto, which has the same network.

    Published parameter names become ours: `embedding.stem.*` -> `embedding.*`, `enc.enc{s}.down.*` ->
    `stages.{s}.pooling.*`, `enc.enc{s}.block{i}.*` -> `stages.{s}.blocks.{i}.*`, `cpe.{0,1,2}` ->
    `position.{conv,linear,norm}`, and the index 0 of wrapped modules (`norm1.0`, `mlp.0`) goes away. Names in errors are
    the published ones.

    Args:
        checkpoint (`Mapping`, `str` or `os.PathLike`):
            `{"config": constructor arguments, "state_dict": tensors}`, a `.pth` file that holds it, or a folder with
            `config.json` (constructor arguments) and `model.safetensors`.

    Returns:
        [`SonataModel`]: The model in eval mode, in float32. It shares no memory with `checkpoint`.

    Raises:
        ValueError: If the configuration asks for what this network does not have, or a tensor is missing, unexpected or of
            the wrong shape.
    """
    arguments, tensors = _read_checkpoint(checkpoint)
    config = config_from_published(arguments)
    # Published files exist with and without it; it is only used in pre-training.
    config.mask_token = "embedding.mask_token" in tensors
    with torch.device("meta"):
        model = SonataModel(config)
    model = model.to_empty(device="cpu").eval()
    ours = {published_name(name): value for name, value in model.state_dict().items()}
    problems = [f"missing `{name}`" for name in ours if name not in tensors]
    problems += [f"unexpected `{name}`" for name in tensors if name not in ours]
    problems += [
        f"`{name}` of shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in ours.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"The checkpoint must hold the {len(ours)} tensors that its configuration describes. {len(problems)} problems: "
            f"{'; '.join(problems[:8])}{'; ...' if len(problems) > 8 else '.'}"
        )
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(tensors[name])
    return model


def published_name(name: str) -> str:
    """Our parameter name to the published one."""
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _read_checkpoint(checkpoint: Mapping[str, Any] | str | os.PathLike) -> tuple[Mapping, Mapping]:
    """Return the constructor arguments and the tensors of a published checkpoint."""
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        if path.is_dir():
            arguments = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if "model_type" in arguments:
                raise ValueError(
                    f"`checkpoint` must be a folder as Sonata publishes it, and {str(path)!r} holds a model of type "
                    f"{arguments['model_type']!r}. Load it with `from_pretrained`."
                )
            return arguments, load_state_dict_from_file(path / "model.safetensors")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping) or not {"config", "state_dict"} <= checkpoint.keys():
        found = sorted(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"`checkpoint` must hold 'config' and 'state_dict', got {found}.")
    return checkpoint["config"], checkpoint["state_dict"]


def config_from_published(arguments: Mapping[str, Any]) -> SonataConfig:
    """Translate the reference's constructor arguments; refuse what would change the features."""
    known = _REFERENCE_DEFAULTS.keys() | _REFERENCE_SWITCHES.keys() | _REFERENCE_IGNORED | {"enable_flash"}
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise ValueError(
            f"The checkpoint's configuration has unknown entries {unknown}, so it may be of another network. Remove them if "
            "they do not change the features."
        )
    for name, (default, required, meaning) in _REFERENCE_SWITCHES.items():
        value = arguments.get(name, default)
        if bool(value) is not required:
            raise ValueError(
                f"The checkpoint's configuration must have `{name}` {required}, got {value}: {meaning} is not built."
            )
    values = {name: arguments.get(name, default) for name, default in _REFERENCE_DEFAULTS.items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    window_rule = "cloud" if arguments.get("enable_flash", True) else "batch"
    return SonataConfig(**values, window_rule=window_rule)


__all__ = [
    "SonataModel",
    "SonataModelOutput",
    "SonataPreTrainedModel",
    "config_from_published",
    "convert_sonata_checkpoint",
    "prepare_point_cloud",
    "published_name",
    "serialize",
]
