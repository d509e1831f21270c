# SPDX-License-Identifier: Apache-2.0
"""
VGGT: frames of one scene in; cameras, depth and world points out, in one pass.

Source: Wang et al., *VGGT: Visual Geometry Grounded Transformer* (2025). An independent implementation: it reads the
public checkpoint through [`convert_vggt_checkpoint`] and reproduces the public model to float32 rounding.

Notable choices:

- Only the four layers that the heads read are kept, and only the heads that are asked for run.
- In half precision the residual stream, the norms and the heads stay in float32, as under the autocast that the public
  model recommends. `from_pretrained(dtype=torch.bfloat16)` arranges this; `model.to(torch.bfloat16)` does not.
- Everything that treats frames separately runs on `frames_chunk_size` frames at a time.
- Predictions are not metric: each call has its own scale, and the world frame is approximately the first camera.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging

from geode.configuration.configuration_geode import VggtConfig

from .hub_geode import GeodeHubModel
from .vggt_conversion_geode import convert_state_dict, resolve_checkpoint
from .vggt_processing_geode import (
    VggtImageProcessor,
    check_pixel_values,
    decode_pose,
    encode_pose,
    preprocess_images,
)


logger = logging.get_logger(__name__)

HEADS = ("camera", "depth", "points")
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
HALF_DTYPES = (torch.float16, torch.bfloat16)
LAYER_SCALE = 0.01
DENSE_OUTPUT_CHANNELS = 32
POSITION_MAP_BASE = 100.0
POSITION_MAP_WEIGHT = 0.1


@dataclass
class VggtModelOutput(ModelOutput):
    """
    What VGGT predicts. Fields of heads that were not asked for are `None`.

    Convention:
        - Cameras are OpenCV (+x right, +y down, +z forward). Pixel `(0, 0)` is the centre of the top-left pixel.
        - The world frame is approximately the first camera's. Lengths share one unknown scale per call and scene.

    Args:
        pose_encoding (`torch.FloatTensor` of shape `(batch_size, num_frames, 9)`):
            Cameras of the last refinement round, in the form of [`encode_pose`]: translation of `cam_from_world` (scene
            units), unnormalised quaternion (x, y, z, w), vertical and horizontal field of view (radians).
        pose_encodings (`tuple[torch.FloatTensor]`):
            The same after each refinement round, last one included.
        extrinsics (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, 4)`):
            `cam_from_world` rotation and translation, in scene units: `points_cam = R @ points_world + t`.
        intrinsics (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, 3)`):
            Pinhole matrices in pixels of `pixel_values`; the principal point is `(width / 2, height / 2)`. A predicted
            field of view of 0 gives an infinite focal length.
        depth (`torch.FloatTensor` of shape `(batch_size, num_frames, height, width, 1)`):
            Z-depth in scene units, positive.
        depth_confidence (`torch.FloatTensor` of shape `(batch_size, num_frames, height, width)`):
            Confidence of `depth`, at least 1, unbounded, without unit.
        world_points (`torch.FloatTensor` of shape `(batch_size, num_frames, height, width, 3)`):
            Points in the world frame, in scene units, one per pixel.
        world_points_confidence (`torch.FloatTensor` of shape `(batch_size, num_frames, height, width)`):
            Confidence of `world_points`, at least 1, unbounded, without unit.
        tapped_layers (`dict[int, torch.FloatTensor]`):
            Layer index to tokens `(batch_size, num_frames, num_tokens, 2 * hidden_size)` that the heads read: the frame
            block's output, then the global block's. A frame's tokens are camera, registers, patches row by row.
    """

    pose_encoding: torch.FloatTensor | None = None
    pose_encodings: tuple[torch.FloatTensor, ...] | None = None
    extrinsics: torch.FloatTensor | None = None
    intrinsics: torch.FloatTensor | None = None
    depth: torch.FloatTensor | None = None
    depth_confidence: torch.FloatTensor | None = None
    world_points: torch.FloatTensor | None = None
    world_points_confidence: torch.FloatTensor | None = None
    tapped_layers: dict[int, torch.FloatTensor] | None = None


def _in_chunks(function: Callable, tensors: tuple[torch.Tensor, ...], size: int | None) -> Any:
    """Apply `function` to at most `size` rows of `tensors` at a time and join its results."""
    if size is None or tensors[0].shape[0] <= size:
        return function(*tensors)
    results = [function(*parts) for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    return torch.cat(results)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    """Autocast to `dtype`, or not at all for `None`, on devices that have autocast (the meta device has not)."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _eager_attention(module, query, key, value, attention_mask, *, scaling, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _rotary_table(grid: tuple[int, int], num_special: int, *, head_dim: int, config: VggtConfig, like: torch.Tensor):
    """
    Cosines and signed sines of the 2-D rotary embedding, each `(num_tokens, 1, head_dim)`: row half, then column half.

    Patches count from 1; the special tokens that precede them have position 0, so they are not rotated.
    """
    height, width = grid
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=like.device) / half
    rows = torch.arange(1, height + 1, device=like.device).repeat_interleave(width)
    columns = torch.arange(1, width + 1, device=like.device).repeat(height)
    positions = F.pad(torch.stack((rows, columns), dim=-1), (0, 0, num_special, 0))
    angles = positions[:, None, :, None] * (1.0 / config.rope_theta**exponents)
    angles = angles.to(_at_least_float32(like.dtype))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).flatten(-2), torch.cat((-sin, sin), dim=-1).flatten(-2)


def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `(..., num_tokens, num_heads, head_dim)`: row half, then column half, each as pairs (k, k + half / 2)."""
    cos, sin = rotary
    first, second = states.unflatten(-1, (2, 2, -1)).unbind(-2)
    # Whole heads are multiplied, because products of quarters of a head take several times as long on a CPU.
    partners = torch.stack((second, first), dim=-2).flatten(-3)
    return states * cos + partners * sin


class VggtAttention(nn.Module):
    """Full self-attention within each frame, or over all frames of a scene (`spans_frames`)."""

    is_causal = False

    def __init__(self, config: VggtConfig, hidden_size: int, *, num_heads: int, spans_frames: bool, use_qk_norm: bool):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.spans_frames = spans_frames
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-5) if use_qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-5) if use_qk_norm else None
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Map `(batch_size, num_frames, num_tokens, hidden_size)` to the same shape."""
        qkv = self.qkv(hidden_states.to(self.qkv.weight.dtype))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.to(self.q_norm.weight.dtype))
            key = self.k_norm(key.to(self.k_norm.weight.dtype))
        if rotary is not None:
            query, key = _rotate(query, rotary), _rotate(key, rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)

        joined = (1, 2) if self.spans_frames else (0, 1)
        query, key, value = (states.flatten(*joined).transpose(1, 2) for states in (query, key, value))
        name = self.config._attn_implementation
        # The float32 camera head cannot use the flash kernels, which take half precision only.
        if name is not None and "flash" in name and value.dtype not in HALF_DTYPES:
            name = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager_attention)
        output, _ = attend(self, query, key, value, None, scaling=self.head_dim**-0.5)
        return self.projection(output.reshape(hidden_states.shape))


class VggtMlp(nn.Module):
    """Two linear maps with the exact GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, output_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map the last dimension from `hidden_size` to `output_size`."""
        return self.fc2(F.gelu(self.fc1(hidden_states.to(self.fc1.weight.dtype))))


class VggtBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block with a learned gain on each branch."""

    def __init__(self, config: VggtConfig, hidden_size: int, *, num_heads: int, spans_frames: bool, use_qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.attention = VggtAttention(
            config, hidden_size, num_heads=num_heads, spans_frames=spans_frames, use_qk_norm=use_qk_norm
        )
        self.layer_scale1 = nn.Parameter(torch.full((hidden_size,), LAYER_SCALE))
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = VggtMlp(hidden_size, int(hidden_size * config.mlp_ratio), hidden_size)
        self.layer_scale2 = nn.Parameter(torch.full((hidden_size,), LAYER_SCALE))

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layer_scale2 * self.mlp(self.norm2(hidden_states))

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        frames_chunk_size: int | None = None,
    ) -> torch.Tensor:
        """Map `(batch_size, num_frames, num_tokens, hidden_size)` to the same shape."""
        hidden_states = hidden_states + self.layer_scale1 * self.attention(self.norm1(hidden_states), rotary)
        # The MLP's inner width is the largest activation of a global block, so it takes a few frames at a time.
        frames = _in_chunks(self._feed_forward, (hidden_states.flatten(0, 1),), frames_chunk_size)
        return frames.view_as(hidden_states)


class VggtLayer(nn.Module):
    """One alternation: attention within each frame, then over all frames."""

    def __init__(self, config: VggtConfig):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.frame_block = VggtBlock(config, size, num_heads=heads, spans_frames=False, use_qk_norm=True)
        self.global_block = VggtBlock(config, size, num_heads=heads, spans_frames=True, use_qk_norm=True)

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], frames_chunk_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the frame block and of the global block, `(batch_size, num_frames, tokens, size)`."""

        def attend_within(frames: torch.Tensor) -> torch.Tensor:
            return self.frame_block(frames[:, None], rotary=rotary)[:, 0]

        frame_states = _in_chunks(attend_within, (hidden_states.flatten(0, 1),), frames_chunk_size)
        frame_states = frame_states.view_as(hidden_states)
        return frame_states, self.global_block(frame_states, rotary=rotary, frames_chunk_size=frames_chunk_size)


class VggtCameraHead(nn.Module):
    """Refine the cameras of a scene from its camera tokens, in a few rounds of adaptive normalisation and attention."""

    def __init__(self, config: VggtConfig):
        super().__init__()
        size = 2 * config.hidden_size
        self.num_iterations = config.camera_num_iterations
        self.token_norm = nn.LayerNorm(size, eps=1e-5)
        self.initial_pose = nn.Parameter(torch.zeros(1, 1, 9))
        self.pose_embedding = nn.Linear(9, size)
        self.modulation = nn.Linear(size, 3 * size)
        self.blocks = nn.ModuleList(
            VggtBlock(config, size, num_heads=config.camera_num_attention_heads, spans_frames=True, use_qk_norm=False)
            for _ in range(config.camera_num_hidden_layers)
        )
        self.output_norm = nn.LayerNorm(size, eps=1e-5)
        self.pose_mlp = VggtMlp(size, size // 2, 9)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map camera tokens `(batch_size, num_frames, 2 * hidden_size)` to one pose encoding per round."""
        tokens = self.token_norm(tokens.to(self.token_norm.weight.dtype))
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        pose, pose_encodings = None, []
        for _ in range(self.num_iterations):
            # Each round learns its own correction: the pose that is fed back carries no gradient. It is also the value
            # before the ReLU below, so a negative field of view is fed back as it is.
            pose = None if pose is None else pose.detach()
            embedded = self.pose_embedding(self.initial_pose.expand(*tokens.shape[:2], -1) if pose is None else pose)
            shift, scale, gate = self.modulation(F.silu(embedded)).chunk(3, dim=-1)
            hidden_states = (tokens + gate * (normed * (1 + scale) + shift))[:, :, None]
            for block in self.blocks:
                hidden_states = block(hidden_states)
            delta = self.pose_mlp(self.output_norm(hidden_states[:, :, 0]))
            pose = delta if pose is None else pose + delta
            pose_encodings.append(torch.cat((pose[..., :7], pose[..., 7:].relu()), dim=-1))
        return tuple(pose_encodings)


def _add_position_map(features: torch.Tensor, aspect: float) -> torch.Tensor:
    """
    Add a sine-cosine map of the position on the image plane to `(batch, channels, height, width)`, in place.

    The first half of the channels depends on the column only, the second on the row only; both are scaled so that the
    image's half diagonal is 1. In place, because `features` is a fresh activation and the map as large as it is.
    """
    _, channels, height, width = features.shape
    diagonal = math.hypot(aspect, 1.0)
    # Float64 frequencies, as the public model; Metal has none.
    precise = torch.float32 if features.device.type == "mps" else torch.float64
    exponents = torch.arange(channels // 4, dtype=precise, device=features.device) / (channels // 4)

    def encode(extent: float, count: int) -> torch.Tensor:
        limit = extent / diagonal * (count - 1) / count
        position_dtype = _at_least_float32(features.dtype)
        positions = torch.linspace(-limit, limit, count, dtype=position_dtype, device=features.device)
        angles = POSITION_MAP_BASE ** -exponents[:, None] * positions  # (C / 4, count)
        return POSITION_MAP_WEIGHT * torch.cat((angles.sin(), angles.cos())).to(torch.float32)

    features[:, : channels // 2] += encode(aspect, width)[:, None, :].to(features.dtype)
    features[:, channels // 2 :] += encode(1.0, height)[:, :, None].to(features.dtype)
    return features


class VggtResidualUnit(nn.Module):
    """Two 3x3 convolutions around a skip. The skip carries `relu(x)`, not `x`: the checkpoint was trained so."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` to the same shape. Overwrites its input, which is a fresh activation."""
        features = features.relu_()
        return features + self.conv2(self.conv1(features).relu_())


class VggtFusion(nn.Module):
    """Add a finer level to a coarser one and resize the sum."""

    def __init__(self, channels: int, *, has_lateral: bool):
        super().__init__()
        self.lateral_unit = VggtResidualUnit(channels) if has_lateral else None
        self.output_unit = VggtResidualUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, lateral: torch.Tensor, coarser: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        """Return features of `size`; the coarsest level has no `coarser` and is taken as it is."""
        features = lateral
        if coarser is not None and self.lateral_unit is not None:
            features = coarser + self.lateral_unit(lateral)
        # A 1x1 convolution commutes with interpolation; on the smaller map it costs a quarter.
        features = self.projection(self.output_unit(features))
        return F.interpolate(features, size=size, mode="bilinear", align_corners=True)


class VggtDenseHead(nn.Module):
    """
    One value and one confidence per pixel, from four layers of tokens, frame by frame.

    Source: Ranftl et al., *Vision Transformers for Dense Prediction* (2021), with position maps on the features.
    """

    def __init__(self, config: VggtConfig, *, num_values: int):
        super().__init__()
        size, channels, widths = 2 * config.hidden_size, config.dense_hidden_size, config.dense_projection_sizes
        self.patch_size = config.patch_size
        self.first_patch = 1 + config.num_register_tokens
        self.is_positive = num_values == 1
        self.norm = nn.LayerNorm(size, eps=1e-5)
        self.projections = nn.ModuleList(nn.Conv2d(size, width, 1) for width in widths)
        self.resizers = nn.ModuleList(
            (
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            )
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths)
        self.fusions = nn.ModuleList(VggtFusion(channels, has_lateral=level < 3) for level in range(4))
        self.feature_conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.output_layers = nn.Sequential(
            nn.Conv2d(channels // 2, DENSE_OUTPUT_CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(DENSE_OUTPUT_CHANNELS, num_values + 1, 1),
        )

    def _lateral(self, level: int, frame_states: torch.Tensor, global_states: torch.Tensor, grid: tuple[int, int]):
        tokens = torch.cat((frame_states[:, self.first_patch :], global_states[:, self.first_patch :]), dim=-1)
        features = self.norm(tokens.to(self.norm.weight.dtype)).transpose(1, 2).unflatten(2, grid)
        features = _add_position_map(self.projections[level](features), grid[1] / grid[0])
        return self.laterals[level](self.resizers[level](features))

    def forward(self, *states: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode the tokens of some frames.

        Args:
            states (`torch.Tensor` of shape `(num_frames, num_tokens, hidden_size)`):
                Eight of them: the outputs of the frame block and of the global block of each tapped layer.
            grid (`tuple[int, int]`): Rows and columns of patches.

        Returns:
            `tuple`: Values `(num_frames, height, width, num_values)` and confidence `(num_frames, height, width)`.
        """
        features = None
        for level in (3, 2, 1, 0):
            lateral = self._lateral(level, states[2 * level], states[2 * level + 1], grid)
            features = self.fusions[level](lateral, features, tuple((8 >> level) * side for side in grid))
        size = tuple(self.patch_size * side for side in grid)
        # Two steps, so that the widest map of the head is gone before the map at full resolution exists.
        features = self.feature_conv(features)
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=True)
        raw = self.output_layers(_add_position_map(features, grid[1] / grid[0])).permute(0, 2, 3, 1).contiguous()
        values, confidence = raw[..., :-1], 1 + raw[..., -1].exp()
        return values.exp() if self.is_positive else values.sign() * values.abs().expm1(), confidence


class VggtModel(GeodeHubModel):
    """
    The VGGT reconstructor.

    Source: Wang et al., *VGGT: Visual Geometry Grounded Transformer* (2025). Checked against outputs of the public
    implementation in `tests/modeling_geode/test_vggt_geode.py`. Without the point tracker.

    Example:
        ```python
        >>> import torch
        >>> from geode.configuration.configuration_geode import VggtConfig
        >>> from geode.modeling_geode.vggt_geode import VggtModel

        >>> small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "trunk_num_hidden_layers": 1}
        >>> heads = {"dense_hidden_size": 8, "dense_projection_sizes": [8, 8, 8, 8], "tapped_layers": [0, 1, 2, 3]}
        >>> model = VggtModel(VggtConfig(image_size=28, trunk_num_attention_heads=2, **small, **heads)).eval()
        >>> with torch.no_grad():
        ...     output = model(torch.rand(1, 2, 3, 28, 42), heads=("camera", "depth"))
        >>> output.depth.shape, output.extrinsics.shape, output.world_points
        (torch.Size([1, 2, 28, 42, 1]), torch.Size([1, 2, 3, 4]), None)

        ```
    """

    config: VggtConfig
    published_remedy = "Convert them with `convert_vggt_checkpoint`."
    base_model_prefix = "vggt"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VggtLayer", "VggtCameraHead", "VggtDenseHead"]  # noqa: RUF012
    # Regular expressions (checked on transformers 5.23), specific enough to leave a surrounding model alone. The trunk's
    # norms, tokens and gains are float32 so that the residual stream is, which bfloat16 would round at each layer.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        r"(?:^|\.)(?:camera|depth|point)_head\.",
        r"(?:^|\.)(?:camera|register)_token$",
        r"(?:frame|global)_block\.(?:norm|layer_scale|attention\.[qk]_norm)",
        r"trunk\.layernorm",
        r"trunk\.embeddings\.(?:cls_token|mask_token|register_tokens|position_embeddings)",
        r"trunk\.encoder\.layer\.\d+\.(?:norm|layer_scale)",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: VggtConfig):
        super().__init__(config)
        trunk_config = Dinov2WithRegistersConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.trunk_num_hidden_layers,
            num_attention_heads=config.trunk_num_attention_heads,
            mlp_ratio=int(config.mlp_ratio),
            num_register_tokens=config.num_register_tokens,
            layer_norm_eps=1e-6,
            layerscale_value=1.0,
            initializer_range=config.initializer_range,
        )
        trunk_config._attn_implementation = config._attn_implementation
        self.trunk = Dinov2WithRegistersModel(trunk_config)
        # Part of the checkpoint's format, read by its pre-training only.
        self.trunk.embeddings.mask_token.requires_grad_(False)
        # One row for the first frame of a scene, one for every other frame.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, config.hidden_size))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_register_tokens, config.hidden_size))
        self.layers = nn.ModuleList(VggtLayer(config) for _ in range(config.num_hidden_layers))
        self.camera_head = VggtCameraHead(config)
        self.depth_head = VggtDenseHead(config, num_values=1)
        self.point_head = VggtDenseHead(config, num_values=3)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, VggtBlock):
            init.constant_(module.layer_scale1, LAYER_SCALE)
            init.constant_(module.layer_scale2, LAYER_SCALE)
        elif isinstance(module, VggtCameraHead):
            init.zeros_(module.initial_pose)
            # Ours: an untrained model sees through an unrotated camera of 1 rad, where a field of view of 0 would give
            # an infinite focal length. The rounds add up to it.
            camera = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) / module.num_iterations
            init.copy_(module.pose_mlp.fc2.bias, camera)
        elif isinstance(module, VggtModel):
            init.normal_(module.camera_token, std=1e-6)
            init.normal_(module.register_token, std=1e-6)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        heads: tuple[str, ...] = HEADS,
        output_tapped_layers: bool = False,
        frames_chunk_size: int | None = None,
    ) -> VggtModelOutput:
        """
        Reconstruct one scene per row of the batch.

        The first frame is the reference; the order of the others does not matter.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, height, width)`):
                RGB in [0, 1], not normalised, sides multiples of `config.patch_size`; [`preprocess_images`] makes them.
                Values are checked except under `torch.compile`.
            heads (`tuple[str]`, defaults to `("camera", "depth", "points")`):
                What to predict. The other heads do not run.
            output_tapped_layers (`bool`, defaults to `False`):
                Also return the tokens that the dense heads read.
            frames_chunk_size (`int`, *optional*):
                Frames that the trunk, the frame blocks, the MLPs and the dense heads handle at a time; `None` is
                `config.frames_chunk_size`. Bounds memory; results change by rounding at most.

        Returns:
            [`VggtModelOutput`]: In float32 whatever the dtype of the trunk.

        Raises:
            ValueError: If `pixel_values` has a wrong rank, dtype, size or range of values, if a head is unknown, or if
                `frames_chunk_size` is not positive.
        """
        _check_heads(heads, output_tapped_layers)
        check_pixel_values(pixel_values, self.config.patch_size)
        chunk_size = self.config.frames_chunk_size if frames_chunk_size is None else frames_chunk_size
        if chunk_size < 1:
            raise ValueError(f"`frames_chunk_size` must be at least 1, got {chunk_size}. Use `None` for the default.")
        height, width = pixel_values.shape[-2:]
        grid = height // self.config.patch_size, width // self.config.patch_size

        keeps_layers = output_tapped_layers or "depth" in heads or "points" in heads
        # Nested, so that no name keeps the first tokens alive while the layers run.
        tapped, last = self._aggregate(
            self._embed_frames(pixel_values, chunk_size), grid, chunk_size, keeps_layers=keeps_layers
        )

        fields: dict[str, Any] = {}
        # The heads always run in float32: bfloat16 resolves a depth to three digits.
        with _autocast(pixel_values.device, None):
            if "camera" in heads:
                rounds = self.camera_head(torch.cat([states[:, :, 0] for states in last], dim=-1))
                extrinsics, intrinsics = decode_pose(rounds[-1], (height, width))
                fields.update(pose_encoding=rounds[-1], pose_encodings=rounds)
                fields.update(extrinsics=extrinsics, intrinsics=intrinsics)
            if "depth" in heads:
                depth, confidence = self._decode(self.depth_head, tapped, grid, chunk_size)
                fields.update(depth=depth, depth_confidence=confidence)
            if "points" in heads:
                points, confidence = self._decode(self.point_head, tapped, grid, chunk_size)
                fields.update(world_points=points, world_points_confidence=confidence)
        if output_tapped_layers:
            fields["tapped_layers"] = {layer: torch.cat(pair, dim=-1) for layer, pair in tapped.items()}
        return VggtModelOutput(**fields)

    def _encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Map frames `(num_frames, 3, height, width)` to the trunk's patch tokens `(num_frames, patches, size)`."""
        dtype = self.camera_token.dtype
        # Rounded to float32, as the public model's.
        mean, std = (frames.new_tensor(values, dtype=torch.float32).to(dtype) for values in (IMAGE_MEAN, IMAGE_STD))
        frames = (frames.to(dtype) - mean[:, None, None]) / std[:, None, None]
        weight_dtype = self.trunk.embeddings.patch_embeddings.projection.weight.dtype
        # With half weights and float32 norms, autocast joins the two; otherwise the caller's autocast rules.
        is_half = weight_dtype in HALF_DTYPES
        with _autocast(frames.device, weight_dtype) if is_half else contextlib.nullcontext():
            tokens = self.trunk(frames).last_hidden_state
        return tokens[:, 1 + self.config.num_register_tokens :]

    def _embed_frames(self, pixel_values: torch.Tensor, frames_chunk_size: int) -> torch.Tensor:
        """Return each frame's camera token, register tokens and patch tokens, `(batch, frames, tokens, size)`."""
        batch_size, num_frames = pixel_values.shape[:2]
        patches = _in_chunks(self._encode_frames, (pixel_values.flatten(0, 1),), frames_chunk_size)
        special = torch.cat((self.camera_token, self.register_token), dim=2).expand(batch_size, -1, -1, -1)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, num_frames - 1, -1, -1)), dim=1)
        return torch.cat((special, patches.unflatten(0, (batch_size, num_frames)).to(special.dtype)), dim=2)

    def _aggregate(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], frames_chunk_size: int, *, keeps_layers: bool
    ) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
        """Return the (frame, global) states of the tapped layers, if they are to be kept, and of the last layer."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        num_special = hidden_states.shape[2] - grid[0] * grid[1]
        rotary = _rotary_table(grid, num_special, head_dim=head_dim, config=self.config, like=hidden_states)
        tapped = {}
        for index, layer in enumerate(self.layers):
            pair = layer(hidden_states, rotary, frames_chunk_size)
            hidden_states = pair[1]
            if keeps_layers and index in self.config.tapped_layers:
                tapped[index] = pair
        return tapped, pair

    def _decode(
        self,
        head: VggtDenseHead,
        tapped: dict[int, tuple[torch.Tensor, torch.Tensor]],
        grid: tuple[int, int],
        frames_chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a dense head over all frames, a few at a time."""
        if head.norm.weight.dtype in HALF_DTYPES:
            logger.warning_once(
                "The VGGT heads are in half precision and lose accuracy. `from_pretrained(..., dtype=torch.bfloat16)` "
                "keeps them in float32; casting the whole model afterwards does not."
            )
        pairs = [tapped[layer] for layer in self.config.tapped_layers]
        shape = pairs[0][0].shape[:2]
        states = tuple(states.flatten(0, 1) for pair in pairs for states in pair)
        values, confidence = _in_chunks(lambda *parts: head(*parts, grid=grid), states, frames_chunk_size)
        return values.unflatten(0, shape), confidence.unflatten(0, shape)


def _check_heads(heads: tuple[str, ...], output_tapped_layers: bool) -> None:
    if isinstance(heads, str):
        raise ValueError(f"`heads` must be a tuple of names, got the string {heads!r}. Pass `heads=({heads!r},)`.")
    unknown = [head for head in heads if head not in HEADS]
    if unknown:
        raise ValueError(f"`heads` takes any of {HEADS}, got {unknown}.")
    if not heads and not output_tapped_layers:
        raise ValueError(f"`heads` is empty, so there is nothing to compute. Name at least one of {HEADS}.")


def convert_vggt_checkpoint(
    checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike,
    config: VggtConfig | dict | None = None,
    *,
    revision: str | None = None,
) -> VggtModel:
    """
    Build a model from a public VGGT checkpoint.

    The tensors of the point tracker (`track_head.*`) are dropped, with a warning; the trunk's mask token may be absent.
    Our own form, which `save_pretrained` writes, loads with [`~VggtModel.from_pretrained`] instead.

    Args:
        checkpoint (`dict[str, torch.Tensor]`, `str` or `os.PathLike`):
            The state dict as published; a `.safetensors`, `.pt` or `.pth` file with it; a folder with
            `model.safetensors` (or its shards) or `model.pt`; or a name on the Hub such as `"facebook/VGGT-1B"`, from
            which these files are downloaded. Pickled code is refused.
        config (`VggtConfig` or `dict`, *optional*):
            Sizes of the model, also under the names of the public constructor (`embed_dim`, `img_size`, ...). `None` is
            the `config.json` of the folder or repository; what it does not say is as in VGGT-1B.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Returns:
        [`VggtModel`]: In evaluation mode, on the device and in the dtype of the tensors, which are copied.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or no weights in it.
        ValueError: If the checkpoint is in another form, or a tensor is missing, unexpected or of a wrong shape.
    """
    state, config = resolve_checkpoint(checkpoint, config, revision=revision)
    with torch.device("meta"):
        model = VggtModel(config)
    model.load_state_dict(convert_state_dict(state, model.state_dict()), assign=True)
    return model.eval()


__all__ = [
    "VggtImageProcessor",
    "VggtModel",
    "VggtModelOutput",
    "convert_vggt_checkpoint",
    "decode_pose",
    "encode_pose",
    "preprocess_images",
]
