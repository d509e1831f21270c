# SPDX-License-Identifier: Apache-2.0
"""The Decoupled Rationale Module (DRM): 2D features query a 3D context, and M rationale tokens come out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from geode.configuration.configuration_geode import GeodeConfig, GeodeDrmConfig

from .geometry_geode import farthest_point_indices
from .mamba_geode import GeodeMambaLayer


SEEN_VOXELS = 0.6  # a ray meets the points within so many voxels
CAMERA_POSE_DIM = 11  # centre 3, two rotation columns 6, horizontal and vertical field of view 2


@dataclass
class RationaleOutput(ModelOutput):
    """
    What the DRM makes of a scene.

    Args:
        rationale_features (`torch.Tensor` of shape `(num_scenes, num_rationale_tokens, text_hidden_size)`):
            The rationale tokens E_spatio, in the language model's embedding space.
        fused_features (`torch.Tensor` of shape `(num_scenes, num_frames, num_tokens, hidden_size)`):
            The spatio-temporal features F_ST, `num_tokens` per frame in row-major order. Padded frames are zero.
    """

    rationale_features: torch.Tensor | None = None
    fused_features: torch.Tensor | None = None


def fourier_features(values: torch.Tensor, num_frequencies: int, longest: float) -> torch.Tensor:
    """
    Sines and cosines of `values` at octaves of wavelength `longest`, and the values themselves over `longest`.

    Args:
        values (`torch.Tensor` of shape `(..., dim)`): Positions, in the unit of `longest`.
        num_frequencies (`int`): Number of octaves.
        longest (`float`): Wavelength of the lowest frequency.

    Returns:
        `torch.Tensor` of shape `(..., dim * (2 * num_frequencies + 1))`: The features, in float32.
    """
    values = values.float() / longest
    octaves = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
    angles = (2 * math.pi * values.unsqueeze(-1) * octaves).flatten(-2)
    return torch.cat([values, angles.sin(), angles.cos()], dim=-1)


@torch.no_grad()
def positions_seen(
    camera_poses: torch.Tensor,
    patch_grid: tuple[int, int],
    positions: torch.Tensor,
    point_mask: torch.Tensor,
    *,
    radius: float,
) -> torch.Tensor:
    """
    Find what each patch of a frame shows, in a sparse cloud: how far along the ray of its centre the nearest surface is.

    The nearest of the points within `radius` of a ray says where the surface begins. Points count by their distances from the ray and
    behind that point, and their mean depth is that of the surface. Where no point is within `radius`, those nearest to the ray decide;
    where none is before the camera, the camera's centre is given.

    Args:
        camera_poses (`torch.Tensor` of shape `(num_scenes, num_frames, 11)`): One camera for each frame; see `encode_camera_poses`.
        patch_grid (`tuple[int, int]`): Rows and columns of patches, which cover a frame.
        positions (`torch.Tensor` of shape `(num_scenes, num_points, 3)`): Scene frame, metres.
        point_mask (`torch.BoolTensor` of shape `(num_scenes, num_points)`): Valid points.
        radius (`float`): In metres; a little more than half of what lies between points.

    Returns:
        `torch.Tensor` of shape `(num_scenes, num_frames, rows * columns, 3)`: Positions in the scene frame, in float32.
    """
    centers, right, down, fov = camera_poses.float().split([3, 3, 3, 2], dim=-1)
    axes = torch.stack([right, down, torch.linalg.cross(right, down)], dim=-2)  # (N, F, axis, 3)
    sides = [(torch.arange(count, device=fov.device) + 0.5) / count * 2 - 1 for count in reversed(patch_grid)]
    slopes = [half[:, None] * side for half, side in zip((fov / 2).tan().flatten(0, 1).unbind(-1), sides, strict=True)]
    slopes = [side.unflatten(0, fov.shape[:2]) for side in slopes]  # (N, F, columns) and (N, F, rows)
    depths = []
    for frame in range(camera_poses.shape[1]):  # one at a time: patches times points are many
        # Sums instead of matrix products, which autocast would round to some centimetres.
        seen = ((positions.float() - centers[:, frame, None])[:, :, None] * axes[:, frame, None]).sum(dim=-1)
        x, y, depth = (side[:, None] for side in seen.unbind(-1))  # (N, 1, P)
        across, along = ((side[:, frame, :, None] * depth) for side in slopes)
        gaps = (y - along).square()[:, :, None] + (x - across).square()[:, None]  # (N, rows, columns, P)
        depth, valid = depth[:, None], ((depth > 0) & point_mask[:, None])[:, None]
        nearest = depth.masked_fill(~(valid & (gaps < radius**2)), torch.inf).amin(dim=-1, keepdim=True)
        closeness = -2 * gaps / radius**2 - (depth - nearest).clamp(min=0) / radius
        weights = closeness.masked_fill(~valid, torch.finfo(closeness.dtype).min).softmax(dim=-1)
        depths.append((weights * valid * depth).sum(dim=-1))
    depths = torch.stack(depths, dim=1)
    rays = torch.stack(
        [slopes[0][:, :, None].expand_as(depths), slopes[1][..., None].expand_as(depths), torch.ones_like(depths)],
        dim=-1,
    )
    rays = (depths[..., None] * rays).flatten(2, 3)  # in the camera's frame
    return (rays[..., None] * axes[:, :, None]).sum(dim=-2) + centers[:, :, None]


class GeodeCrossAttentionLayer(GradientCheckpointingLayer):
    """Pre-norm cross-attention from 2D features to the 3D context, then an MLP."""

    def __init__(self, config: GeodeDrmConfig):
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor) -> torch.Tensor:
        """
        Enrich each 2D feature with what it attends to.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_scenes, length, hidden_size)`): 2D features, the queries.
            context (`torch.Tensor` of shape `(num_scenes, context_length, hidden_size)`): Keys and values.
            context_mask (`torch.BoolTensor` of shape `(num_scenes, context_length)`): Valid context tokens.

        Returns:
            `torch.Tensor` of shape `(num_scenes, length, hidden_size)`.
        """

        def split(states):
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split(self.q_proj(self.attention_norm(hidden_states))),
            split(self.k_proj(context)),
            split(self.v_proj(context)),
            attn_mask=context_mask[:, None, None, :],
        )
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.mlp_norm(hidden_states))))


class GeodeContextEncoder(nn.Module):
    """
    The keys and values of the DRM: one token per voxel, one per camera, and one for the scale.

    Source: paper, Eq. 2; positions, camera tokens and scale are our decisions (docs/architecture.md).
    """

    def __init__(self, config: GeodeConfig):
        super().__init__()
        drm = config.drm_config
        self.num_frequencies, self.max_position_m = drm.num_position_frequencies, float(drm.max_position_m)
        position_dim = 3 * (2 * self.num_frequencies + 1)
        self.point_projection = nn.Linear(config.point_config.hidden_size, drm.hidden_size)
        self.position_projection = nn.Linear(position_dim, drm.hidden_size, bias=False)
        self.camera_projection = nn.Linear(CAMERA_POSE_DIM, drm.hidden_size)
        self.no_camera_token = nn.Parameter(torch.empty(drm.hidden_size))
        self.scale_projection = nn.Linear(1, drm.hidden_size)
        self.unknown_scale_token = nn.Parameter(torch.empty(drm.hidden_size))
        self.norm = nn.LayerNorm(drm.hidden_size, eps=drm.layer_norm_eps)

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Embed `(..., 3)` scene-frame positions in metres as `(..., hidden_size)`."""
        features = fourier_features(positions, self.num_frequencies, self.max_position_m)
        return self.position_projection(features.to(self.position_projection.weight.dtype))

    def embed_cameras(self, camera_poses: torch.Tensor) -> torch.Tensor:
        """Embed `(..., 11)` encoded poses as `(..., hidden_size)`."""
        poses = camera_poses.to(self.camera_projection.weight.dtype)
        return self.camera_projection(poses) + self.embed_positions(camera_poses[..., :3])

    def forward(
        self,
        point_features: torch.Tensor,
        point_positions: torch.Tensor,
        point_mask: torch.Tensor,
        camera_poses: torch.Tensor,
        camera_mask: torch.Tensor,
        camera_times: torch.Tensor,
        log_scale: torch.Tensor,
        scale_known: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Build the context of each scene.

        Args:
            point_features (`torch.Tensor` of shape `(num_scenes, num_points, point_hidden_size)`): F_3D.
            point_positions (`torch.Tensor` of shape `(num_scenes, num_points, 3)`): Scene frame, metres.
            point_mask (`torch.BoolTensor` of shape `(num_scenes, num_points)`): Valid points.
            camera_poses (`torch.Tensor` of shape `(num_scenes, num_cameras, 11)`): See `encode_camera_poses`.
            camera_mask (`torch.BoolTensor` of shape `(num_scenes, num_cameras)`): Valid cameras.
            camera_times (`torch.Tensor` of shape `(num_scenes, num_cameras, hidden_size)`): Embedded times.
            log_scale (`torch.Tensor` of shape `(num_scenes,)`): Logarithm of metres per unit.
            scale_known (`torch.BoolTensor` of shape `(num_scenes,)`): Where `log_scale` means something.

        Returns:
            Context of shape `(num_scenes, context_length, hidden_size)` and its mask.
        """
        dtype = self.point_projection.weight.dtype
        points = self.point_projection(point_features.to(dtype)) + self.embed_positions(point_positions)
        cameras = self.embed_cameras(camera_poses)
        has_camera = camera_mask.any(dim=1)
        absent = self.no_camera_token.to(dtype).expand(len(points), 1, -1)
        scale = self.scale_projection(log_scale.to(dtype)[:, None, None])
        scale = torch.where(scale_known[:, None, None], scale, self.unknown_scale_token.to(dtype))
        context = torch.cat([points, cameras + camera_times, absent, scale], dim=1)
        mask = torch.cat([point_mask, camera_mask, ~has_camera[:, None], torch.ones_like(has_camera)[:, None]], dim=1)
        return self.norm(context), mask


class GeodeRationaleModule(nn.Module):
    """
    The Decoupled Rationale Module.

    Source: paper, section 2.1: cross-attention with 2D queries and 3D keys and values, a Mamba model for temporal
    alignment, and M rationale tokens. The tokens are the output states of M learned queries at the end of the Mamba
    sequence, projected to the language model's width; the first m of them do not depend on the rest.
    """

    def __init__(self, config: GeodeConfig):
        super().__init__()
        drm = config.drm_config
        self.config = drm
        self.patch_grid = config.patch_grid
        # Points of the coarsest stage lie one voxel apart.
        self.seen_radius = SEEN_VOXELS * config.point_config.grid_size * math.prod(config.point_config.stride)
        self.query_projection = nn.Linear(config.vision_config.hidden_size, drm.hidden_size)
        self.time_projection = nn.Linear(2 * drm.num_position_frequencies + 1, drm.hidden_size, bias=False)
        self.context_encoder = GeodeContextEncoder(config)
        self.cross_attention_layers = nn.ModuleList(
            GeodeCrossAttentionLayer(drm) for _ in range(drm.num_cross_attention_layers)
        )
        self.queries = nn.Parameter(torch.empty(drm.num_rationale_tokens, drm.hidden_size))
        if drm.question_conditioned:
            self.question_projection = nn.Linear(config.text_config.hidden_size, drm.hidden_size)
        self.mamba_layers = nn.ModuleList(GeodeMambaLayer(drm) for _ in range(drm.num_mamba_layers))
        self.norm = nn.LayerNorm(drm.hidden_size, eps=drm.layer_norm_eps)
        self.output_projection = nn.Linear(drm.hidden_size, config.text_config.hidden_size)

    def embed_times(self, mask: torch.Tensor) -> torch.Tensor:
        """
        Embed where in the clip each valid entry lies.

        Frames for the language model and cameras of the geometry are both sampled uniformly, so the middle of entry
        `i` of `n` is at `(i + 1/2) / n` of the clip whatever their numbers are.

        Args:
            mask (`torch.BoolTensor` of shape `(num_scenes, length)`): Valid entries, which precede the padding.

        Returns:
            `torch.Tensor` of shape `(num_scenes, length, hidden_size)`.
        """
        index = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
        times = (index + 0.5) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        features = fourier_features(times[..., None], self.config.num_position_frequencies, longest=2.0)
        return self.time_projection(features.to(self.time_projection.weight.dtype))

    @force_accelerate_hooks(["context_encoder"])  # its token is read: offloaded, it would stay away
    def embed_frame_cameras(
        self,
        frame_mask: torch.Tensor,
        camera_poses: torch.Tensor,
        camera_mask: torch.Tensor,
        positions: torch.Tensor,
        point_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Embed for each frame the camera that is nearest in time, and with `point_queries` what each of its patches shows.

        Args:
            frame_mask (`torch.BoolTensor` of shape `(num_scenes, num_frames)`): See `forward`, also for the two that follow.
            camera_poses (`torch.Tensor` of shape `(num_scenes, num_cameras, 11)`): Cameras.
            camera_mask (`torch.BoolTensor` of shape `(num_scenes, num_cameras)`): Valid cameras.
            positions (`torch.Tensor` of shape `(num_scenes, num_points, 3)`): Of the points of the context.
            point_mask (`torch.BoolTensor` of shape `(num_scenes, num_points)`): Valid points.

        Returns:
            `torch.Tensor` of shape `(num_scenes, num_frames, 1 or num_patches, hidden_size)`; the learned no-camera token where a
            scene has none.
        """
        num_frames, num_cameras = (mask.sum(dim=1, keepdim=True) for mask in (frame_mask, camera_mask))
        frames = torch.arange(frame_mask.shape[1], device=frame_mask.device)
        # Whole numbers: floor((i + 1/2) / num_frames * num_cameras)
        nearest = (2 * frames + 1) * num_cameras // (2 * num_frames.clamp(min=1))
        nearest = nearest.minimum((num_cameras - 1).clamp(min=0))
        poses = camera_poses.take_along_dim(nearest[..., None], dim=1)
        embedded = self.context_encoder.embed_cameras(poses)[:, :, None]
        if self.config.point_queries:
            seen = positions_seen(poses, self.patch_grid, positions, point_mask, radius=self.seen_radius)
            embedded = embedded + self.context_encoder.embed_positions(seen)
        absent = self.context_encoder.no_camera_token.to(embedded)
        return torch.where(num_cameras[..., None, None] > 0, embedded, absent)

    def thin_context(
        self, features: torch.Tensor, positions: torch.Tensor, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Pad packed clouds to one tensor, after thinning those above `max_context_tokens` by farthest-point sampling.

        Args:
            features (`torch.Tensor` of shape `(num_rows, point_hidden_size)`): Clouds one after another.
            positions (`torch.Tensor` of shape `(num_rows, 3)`): Their positions.
            offset (`torch.LongTensor` of shape `(num_scenes,)`): Where each cloud ends.

        Returns:
            Features, positions and mask, each of leading shape `(num_scenes, num_points)`.
        """
        limit = self.config.max_context_tokens
        clouds = []
        for start, stop in zip([0, *offset.tolist()[:-1]], offset.tolist(), strict=True):
            rows = torch.arange(start, stop, device=features.device)
            if stop - start > limit:
                rows = rows[farthest_point_indices(positions[start:stop], limit).to(rows.device)]
            clouds.append(rows)
        padded = nn.utils.rnn.pad_sequence(clouds, batch_first=True, padding_value=-1)
        mask = padded >= 0
        padded = padded.clamp(min=0)
        return features[padded] * mask[..., None], positions[padded] * mask[..., None], mask

    def pool_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Average blocks of patches: `(num_scenes, num_frames, rows * columns, d)` to fewer tokens per frame."""
        side, (rows, columns) = self.config.spatial_pooling, self.patch_grid
        blocks = hidden_states.unflatten(2, (rows // side, side, columns // side, side))
        return blocks.mean(dim=(3, 5)).flatten(2, 3)

    def forward(
        self,
        visual_features: torch.Tensor,
        frame_mask: torch.Tensor,
        point_features: torch.Tensor,
        point_positions: torch.Tensor,
        point_offset: torch.Tensor,
        camera_poses: torch.Tensor,
        camera_mask: torch.Tensor,
        log_scale: torch.Tensor,
        scale_known: torch.Tensor,
        question_embeds: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
    ) -> RationaleOutput:
        """
        Distil scenes into rationale tokens.

        Args:
            visual_features (`torch.Tensor` of shape `(num_scenes, num_frames, num_patches, vision_hidden_size)`):
                F_2D, the vision tower's patch features before the projector, without the class token.
            frame_mask (`torch.BoolTensor` of shape `(num_scenes, num_frames)`): Valid frames, which come first.
            point_features (`torch.Tensor` of shape `(num_points, point_hidden_size)`):
                F_3D, the point encoder's coarsest stage, clouds one after another.
            point_positions (`torch.Tensor` of shape `(num_points, 3)`): Their positions, scene frame, metres.
            point_offset (`torch.LongTensor` of shape `(num_scenes,)`): Where each cloud ends.
            camera_poses (`torch.Tensor` of shape `(num_scenes, num_cameras, 11)`): See `encode_camera_poses`.
            camera_mask (`torch.BoolTensor` of shape `(num_scenes, num_cameras)`): Valid cameras; a scene may have none.
            log_scale (`torch.Tensor` of shape `(num_scenes,)`): Logarithm of metres per unit of the cloud.
            scale_known (`torch.BoolTensor` of shape `(num_scenes,)`): Where the scale is known.
            question_embeds (`torch.Tensor` of shape `(num_scenes, question_length, text_hidden_size)`, *optional*):
                Embedded questions, for `question_conditioned` only.
            question_mask (`torch.BoolTensor` of shape `(num_scenes, question_length)`, *optional*): Valid tokens.

        Returns:
            [`RationaleOutput`]
        """
        dtype = self.query_projection.weight.dtype
        points, positions, point_mask = self.thin_context(point_features, point_positions, point_offset)
        context, context_mask = self.context_encoder(
            points,
            positions,
            point_mask,
            camera_poses,
            camera_mask,
            self.embed_times(camera_mask),
            log_scale,
            scale_known,
        )
        queries = self.query_projection(visual_features.to(dtype)) + self.embed_times(frame_mask)[:, :, None]
        if self.config.camera_queries:
            queries = queries + self.embed_frame_cameras(frame_mask, camera_poses, camera_mask, positions, point_mask)
        num_frames = queries.shape[1]
        fused = queries.flatten(1, 2)  # (N, F * patches, d)
        for layer in self.cross_attention_layers:
            fused = layer(fused, context, context_mask)
        fused = self.pool_patches(fused.unflatten(1, (num_frames, -1))).flatten(1, 2)
        fused_mask = frame_mask.repeat_interleave(fused.shape[1] // num_frames, dim=1)

        parts, masks = [fused], [fused_mask]
        if self.config.question_conditioned:
            if question_embeds is None:
                raise ValueError(
                    "`drm_config.question_conditioned` is true, so the rationale needs `question_input_ids`; got none. "
                    "Build the inputs with a processor whose `question_conditioned` is true."
                )
            parts.append(self.question_projection(question_embeds.to(dtype)))
            masks.append(question_mask)
        parts.append(self.queries.to(dtype).expand(len(fused), -1, -1))
        masks.append(torch.ones_like(parts[-1][..., 0], dtype=torch.bool))
        states = self.align(torch.cat(parts, dim=1), torch.cat(masks, dim=1))
        return RationaleOutput(
            rationale_features=self.output_projection(self.norm(states[:, -self.config.num_rationale_tokens :])),
            fused_features=(states[:, : fused.shape[1]] * fused_mask[..., None]).unflatten(1, (num_frames, -1)),
        )

    def align(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Run the Mamba layers over the valid entries as if the padding were not there.

        The recurrence and its convolution see their neighbours in memory, so padding moves to the left, where it has
        no effect, and back afterwards.
        """
        order = mask.int().argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        hidden_states = hidden_states.take_along_dim(order[..., None], dim=1)
        packed_mask = mask.take_along_dim(order, dim=1)
        for layer in self.mamba_layers:
            hidden_states = layer(hidden_states, packed_mask)
        return hidden_states.take_along_dim(back[..., None], dim=1)


class GeodeFeatureInjection(nn.Module):
    """
    Adds fused features to the visual tokens through a gate that starts at zero, so that training starts from the VLM.

    It lies outside the DRM, because it trains in stage 2 while the DRM is frozen.
    """

    def __init__(self, config: GeodeConfig):
        super().__init__()
        self.patch_grid = tuple(side // config.drm_config.spatial_pooling for side in config.patch_grid)
        self.pooling = round(1 / config.downsample_ratio) // config.drm_config.spatial_pooling
        self.projection = nn.Linear(config.drm_config.hidden_size, config.text_config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def forward(self, fused_features: torch.Tensor) -> torch.Tensor:
        """
        Project F_ST to what is added to the visual tokens.

        Args:
            fused_features (`torch.Tensor` of shape `(num_frames, num_tokens, hidden_size)`): F_ST of valid frames.

        Returns:
            `torch.Tensor` of shape `(num_frames, image_seq_length, text_hidden_size)`.
        """
        (rows, columns), side = self.patch_grid, self.pooling
        blocks = fused_features.unflatten(1, (rows // side, side, columns // side, side))
        return self.gate * self.projection(blocks.mean(dim=(2, 4)).flatten(1, 2))


__all__ = ["GeodeFeatureInjection", "GeodeRationaleModule", "RationaleOutput"]
