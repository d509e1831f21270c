# SPDX-License-Identifier: Apache-2.0
"""
VGGT as its published behaviour reads, with nothing rearranged: an oracle for `VggtModel` and the baseline of its benchmark.

Source: Wang et al., *VGGT: Visual Geometry Grounded Transformer* (2025), and a description of what the public program
computes. The public program itself was not at hand where this was written, so this is our own literal reading, not that
program; it agrees with outputs stored from it (`tests/benchmarks/test_vggt_plain.py`).

Plain functions over the public checkpoint's own tensors. Nothing is shared with `geode.modeling_geode`. As described, all
layers are kept, the rotary table is made in each block, the dense heads take eight frames at a time, `out_conv` follows the
resize, and every head runs.

A `state` is a dictionary of tensors under the checkpoint's names. A `config` holds the names of the public constructor:
`img_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `num_register_tokens`, `rope_freq`, `vit_depth`,
`vit_num_heads`, `camera_trunk_depth`, `camera_num_heads`, `dpt_features`, `dpt_out_channels`, `intermediate_layer_idx`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F


State = dict[str, torch.Tensor]
Config = dict[str, Any]

CAMERA_ROUNDS = 4
DENSE_FRAMES = 8
DENSE_LAST_HIDDEN = 32


# ------------------------------------------------------------------------------------------- transformer blocks


def layer_norm(state: State, prefix: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension, with the gain and offset at `prefix`."""
    return F.layer_norm(x, x.shape[-1:], state[f"{prefix}.weight"], state[f"{prefix}.bias"], eps)


def linear(state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Apply the linear map at `prefix` to the last dimension."""
    return F.linear(x, state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def mlp(state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Two linear maps with the exact GELU between them."""
    return linear(state, f"{prefix}.fc2", F.gelu(linear(state, f"{prefix}.fc1", x)))


def rotary_table(
    position: torch.Tensor, width: int, *, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `(tokens, width)` of the integer `position` `(tokens,)`, for one half of a head."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position.device) / width
    # `base ** -exponent` rounds otherwise; the public program's float64 outputs tell the two apart.
    angle = position[:, None] * (1.0 / base**exponent)
    angle = torch.cat((angle, angle), dim=-1).to(dtype)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, tables: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Rotate the first half of each head, `(batch, heads, tokens, width)`, by the row, the second by the column."""
    rotated = []
    for half, (cos, sin) in zip(x.chunk(2, dim=-1), tables, strict=True):
        first, second = half.chunk(2, dim=-1)
        rotated.append(half * cos + torch.cat((-second, first), dim=-1) * sin)
    return torch.cat(rotated, dim=-1)


def attention(
    state: State, prefix: str, x: torch.Tensor, *, num_heads: int, positions: torch.Tensor | None, base: float
) -> torch.Tensor:
    """Full self-attention over `(batch, tokens, width)`; with `positions`, normed and rotated queries and keys."""
    batch, tokens, width = x.shape
    head_dim = width // num_heads
    qkv = linear(state, f"{prefix}.qkv", x).reshape(batch, tokens, 3, num_heads, head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if positions is not None:
        tables = [rotary_table(positions[:, axis], head_dim // 2, base=base, dtype=x.dtype) for axis in (0, 1)]
        query = rotate(layer_norm(state, f"{prefix}.q_norm", query, 1e-5), tables)
        key = rotate(layer_norm(state, f"{prefix}.k_norm", key, 1e-5), tables)
    x = F.scaled_dot_product_attention(query, key, value)
    return linear(state, f"{prefix}.proj", x.transpose(1, 2).reshape(batch, tokens, width))


def block(
    state: State,
    prefix: str,
    x: torch.Tensor,
    *,
    num_heads: int,
    eps: float = 1e-5,
    positions: torch.Tensor | None = None,
    base: float = 100.0,
) -> torch.Tensor:
    """A pre-norm transformer block with a gain on each branch, over `(batch, tokens, width)`."""
    normed = layer_norm(state, f"{prefix}.norm1", x, eps)
    attended = attention(state, f"{prefix}.attn", normed, num_heads=num_heads, positions=positions, base=base)
    x = x + state[f"{prefix}.ls1.gamma"] * attended
    return x + state[f"{prefix}.ls2.gamma"] * mlp(state, f"{prefix}.mlp", layer_norm(state, f"{prefix}.norm2", x, eps))


# --------------------------------------------------------------------------------------------- trunk and layers


def resize_positions(table: torch.Tensor, native: int, height: int, width: int) -> torch.Tensor:
    """The position table `(1, 1 + native^2, width)` for a grid of `height` rows and `width` columns of patches."""
    if height * width == native * native and height == width:
        return table
    grid = table[:, 1:].float().reshape(1, native, native, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def vit(state: State, config: Config, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens `(num_images, patches, width)` of normalised images `(num_images, 3, height, width)`."""
    prefix, patch = "aggregator.patch_embed", config["patch_size"]
    weight, bias = state[f"{prefix}.patch_embed.proj.weight"], state[f"{prefix}.patch_embed.proj.bias"]
    maps = F.conv2d(images, weight, bias, stride=patch)
    count, _, height, width = maps.shape
    x = torch.cat((state[f"{prefix}.cls_token"].expand(count, -1, -1), maps.flatten(2).transpose(1, 2)), dim=1)
    x = x + resize_positions(state[f"{prefix}.pos_embed"], config["img_size"] // patch, height, width)
    registers = state[f"{prefix}.register_tokens"]
    x = torch.cat((x[:, :1], registers.expand(count, -1, -1), x[:, 1:]), dim=1)
    for index in range(config["vit_depth"]):
        x = block(state, f"{prefix}.blocks.{index}", x, num_heads=config["vit_num_heads"], eps=1e-6)
    return layer_norm(state, f"{prefix}.norm", x, 1e-6)[:, 1 + registers.shape[1] :]


def first_and_rest(token: torch.Tensor, batch: int, frames: int) -> torch.Tensor:
    """Give slot 0 of `(1, 2, tokens, width)` to the first frame of each scene and slot 1 to every other frame."""
    rows = [token[:, 0] if frame == 0 else token[:, 1] for frame in range(frames)]
    return torch.stack(rows, dim=1).expand(batch, -1, -1, -1)


def patch_positions(height: int, width: int, special: int, device: torch.device) -> torch.Tensor:
    """(row + 1, column + 1) of each patch, after `special` tokens at (0, 0): `(special + patches, 2)`."""
    row, column = torch.meshgrid(
        torch.arange(1, height + 1, device=device), torch.arange(1, width + 1, device=device), indexing="ij"
    )
    patches = torch.stack((row.reshape(-1), column.reshape(-1)), dim=-1)
    return torch.cat((torch.zeros(special, 2, dtype=patches.dtype, device=device), patches))


def aggregate(state: State, config: Config, images: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's tokens `(batch, frames, tokens, 2 * width)`: the frame block's output, then the global block's."""
    batch, frames, _, height, width = images.shape
    mean = images.new_tensor((0.485, 0.456, 0.406), dtype=torch.float32)[:, None, None]
    std = images.new_tensor((0.229, 0.224, 0.225), dtype=torch.float32)[:, None, None]
    patches = vit(state, config, ((images - mean) / std).flatten(0, 1)).unflatten(0, (batch, frames))
    camera = first_and_rest(state["aggregator.camera_token"], batch, frames)
    registers = first_and_rest(state["aggregator.register_token"], batch, frames)
    x = torch.cat((camera, registers, patches), dim=2)
    tokens, patch = x.shape[2], config["patch_size"]
    positions = patch_positions(height // patch, width // patch, tokens - patches.shape[2], images.device)
    shared = {"num_heads": config["num_heads"], "base": float(config["rope_freq"])}
    kept = []
    for index in range(config["depth"]):
        x = x.reshape(batch * frames, tokens, -1)
        frame = block(state, f"aggregator.frame_blocks.{index}", x, positions=positions, **shared)
        x = frame.reshape(batch, frames * tokens, -1)
        x = block(state, f"aggregator.global_blocks.{index}", x, positions=positions.repeat(frames, 1), **shared)
        pair = (frame.reshape(batch, frames, tokens, -1), x.reshape(batch, frames, tokens, -1))
        kept.append(torch.cat(pair, dim=-1))
    return kept


# -------------------------------------------------------------------------------------------------- camera head


def camera_head(state: State, config: Config, tokens: torch.Tensor) -> list[torch.Tensor]:
    """One pose encoding `(batch, frames, 9)` per round, from the last layer's camera tokens."""
    prefix = "camera_head"
    t = layer_norm(state, f"{prefix}.token_norm", tokens, 1e-5)
    accumulated, emitted = None, []
    for _ in range(CAMERA_ROUNDS):
        if accumulated is None:
            pose = state[f"{prefix}.empty_pose_tokens"].expand(t.shape[0], t.shape[1], -1)
        else:
            pose = accumulated.detach()
        embedded = linear(state, f"{prefix}.embed_pose", pose)
        shift, scale, gate = linear(state, f"{prefix}.poseLN_modulation.1", F.silu(embedded)).chunk(3, dim=-1)
        z = t + gate * (F.layer_norm(t, t.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        for index in range(config["camera_trunk_depth"]):
            z = block(state, f"{prefix}.trunk.{index}", z, num_heads=config["camera_num_heads"])
        delta = mlp(state, f"{prefix}.pose_branch", layer_norm(state, f"{prefix}.trunk_norm", z, 1e-5))
        accumulated = delta if accumulated is None else pose + delta
        emitted.append(torch.cat((accumulated[..., :7], F.relu(accumulated[..., 7:])), dim=-1))
    return emitted


def decode_cameras(pose: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Extrinsics `(..., 3, 4)`, camera from world, and intrinsics `(..., 3, 3)` in pixels, of encodings `(..., 9)`."""
    i, j, k, r = (pose[..., 3:7] / pose[..., 3:7].norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (j * j + k * k), 2 * (i * j - k * r), 2 * (i * k + j * r)),
        (2 * (i * j + k * r), 1 - 2 * (i * i + k * k), 2 * (j * k - i * r)),
        (2 * (i * k - j * r), 2 * (j * k + i * r), 1 - 2 * (i * i + j * j)),
    )
    rotation = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    intrinsics = torch.zeros(*pose.shape[:-1], 3, 3, device=pose.device)
    intrinsics[..., 0, 0] = (width / 2) / (pose[..., 8] / 2).tan()
    intrinsics[..., 1, 1] = (height / 2) / (pose[..., 7] / 2).tan()
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return torch.cat((rotation, pose[..., :3, None]), dim=-1), intrinsics


# -------------------------------------------------------------------------------------------------- dense heads


def conv(state: State, prefix: str, x: torch.Tensor, *, stride: int = 1, padding: int = 0) -> torch.Tensor:
    """Apply the convolution at `prefix`, which may have no bias."""
    return F.conv2d(x, state[f"{prefix}.weight"], state.get(f"{prefix}.bias"), stride=stride, padding=padding)


def upscale(state: State, prefix: str, x: torch.Tensor, factor: int) -> torch.Tensor:
    """Apply the transposed convolution at `prefix`, whose kernel is as large as its stride."""
    return F.conv_transpose2d(x, state[f"{prefix}.weight"], state[f"{prefix}.bias"], stride=factor)


def resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, corner pixels onto corner pixels."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


def encode_position(t: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines, then cosines, of `t` at `channels / 2` frequencies: `(*t.shape, channels)`."""
    k = torch.arange(channels // 2, dtype=torch.float64, device=t.device)
    angle = t[..., None] * 100.0 ** (-k / (channels // 2))
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def add_position_map(x: torch.Tensor, image_height: int, image_width: int) -> torch.Tensor:
    """Add a tenth of the encoded column and row of each position to `(batch, channels, height, width)`."""
    channels, height, width = x.shape[1:]
    aspect = image_width / image_height
    diagonal = math.sqrt(aspect * aspect + 1)
    u_limit, v_limit = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    u = torch.linspace(-u_limit, u_limit, width, dtype=x.dtype, device=x.device)
    v = torch.linspace(-v_limit, v_limit, height, dtype=x.dtype, device=x.device)
    columns = encode_position(u, channels // 2).T[:, None, :].expand(-1, height, -1)
    rows = encode_position(v, channels // 2).T[:, :, None].expand(-1, -1, width)
    return x + 0.1 * torch.cat((columns, rows))


def residual_unit(state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Two convolutions around a skip of ReLU(x). Both ReLUs overwrite their input, as in the public program."""
    skip = F.relu_(x)
    y = F.relu_(conv(state, f"{prefix}.conv1", skip, padding=1))
    return skip + conv(state, f"{prefix}.conv2", y, padding=1)


def fuse(
    state: State, prefix: str, x: torch.Tensor, lateral: torch.Tensor | None, size: tuple[int, int]
) -> torch.Tensor:
    """Add the finer `lateral` map, refine the sum and resize it."""
    if lateral is not None:
        x = x + residual_unit(state, f"{prefix}.resConfUnit1", lateral)
    x = resize(residual_unit(state, f"{prefix}.resConfUnit2", x), *size)
    return conv(state, f"{prefix}.out_conv", x)


def project_level(
    state: State, prefix: str, config: Config, tokens: torch.Tensor, *, level: int, size: tuple[int, int]
) -> torch.Tensor:
    """Turn the tokens of one layer into one map of the pyramid; `size` is that of the image."""
    patch = config["patch_size"]
    height, width = size[0] // patch, size[1] // patch
    x = layer_norm(state, f"{prefix}.norm", tokens[:, 1 + config["num_register_tokens"] :], 1e-5)
    x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
    x = add_position_map(conv(state, f"{prefix}.projects.{level}", x), *size)
    if level < 2:
        x = upscale(state, f"{prefix}.resize_layers.{level}", x, 4 if level == 0 else 2)
    elif level == 3:
        x = conv(state, f"{prefix}.resize_layers.3", x, stride=2, padding=1)
    return conv(state, f"{prefix}.scratch.layer{level + 1}_rn", x, padding=1)


def dense_head_maps(
    state: State, prefix: str, config: Config, layers: list[torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """Raw maps `(frames, channels, height, width)` of some frames, from their four layers of tokens."""
    f1, f2, f3, f4 = (
        project_level(state, prefix, config, tokens, level=level, size=size) for level, tokens in enumerate(layers)
    )
    y = fuse(state, f"{prefix}.scratch.refinenet4", f4, None, f3.shape[2:])
    y = fuse(state, f"{prefix}.scratch.refinenet3", y, f3, f2.shape[2:])
    y = fuse(state, f"{prefix}.scratch.refinenet2", y, f2, f1.shape[2:])
    y = fuse(state, f"{prefix}.scratch.refinenet1", y, f1, (2 * f1.shape[2], 2 * f1.shape[3]))
    # Not a saving of ours to claim: whatever the public program holds here is unknown to us.
    del f1, f2, f3, f4
    y = conv(state, f"{prefix}.scratch.output_conv1", y, padding=1)
    y = add_position_map(resize(y, *size), *size)
    y = F.relu_(conv(state, f"{prefix}.scratch.output_conv2.0", y, padding=1))
    return conv(state, f"{prefix}.scratch.output_conv2.2", y)


def dense_head(
    state: State, prefix: str, config: Config, kept: list[torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """Raw maps `(batch, frames, height, width, channels)`, eight frames at a time."""
    batch, frames = kept[0].shape[:2]
    parts = []
    for start in range(0, frames, DENSE_FRAMES):
        stop = min(start + DENSE_FRAMES, frames)
        layers = [kept[layer][:, start:stop].flatten(0, 1) for layer in config["intermediate_layer_idx"]]
        maps = dense_head_maps(state, prefix, config, layers, size).permute(0, 2, 3, 1)
        parts.append(maps.unflatten(0, (batch, stop - start)))
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------------------ whole forward


def plain_forward(state: State, config: Config, images: torch.Tensor) -> dict[str, Any]:
    """
    Run the whole model.

    Args:
        state (`dict[str, torch.Tensor]`): The checkpoint.
        config (`dict`): Its sizes, under the names of the public constructor.
        images (`torch.Tensor` of shape `(batch_size, num_frames, 3, height, width)`):
            RGB in [0, 1], sides multiples of the patch size.

    Returns:
        `dict`: Under the public program's names: `pose_enc`, `pose_enc_list`, `depth`, `depth_conf`, `world_points` and
        `world_points_conf`; the decoded `extrinsics` and `intrinsics`; and `aggregated`, the tokens of all layers.
    """
    size = tuple(images.shape[-2:])
    kept = aggregate(state, config, images)
    poses = camera_head(state, config, kept[-1][:, :, 0])
    extrinsics, intrinsics = decode_cameras(poses[-1], *size)
    depth = dense_head(state, "depth_head", config, kept, size)
    points = dense_head(state, "point_head", config, kept, size)
    return {
        "pose_enc": poses[-1],
        "pose_enc_list": poses,
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "depth": depth[..., :1].exp(),
        "depth_conf": 1 + depth[..., 1].exp(),
        "world_points": points[..., :3].sign() * (points[..., :3].abs().exp() - 1),
        "world_points_conf": 1 + points[..., 3].exp(),
        "aggregated": kept,
    }


# ----------------------------------------------------------------------------------------------- random weights


def block_shapes(width: int, hidden: int, *, head_dim: int | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one transformer block, with norms of queries and keys if `head_dim` is given."""
    shapes: dict[str, tuple[int, ...]] = {}
    norms = {"norm1": width, "norm2": width}
    norms |= {} if head_dim is None else {"attn.q_norm": head_dim, "attn.k_norm": head_dim}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    maps = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    maps |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"ls1.gamma": (width,), "ls2.gamma": (width,)}


def dense_head_shapes(config: Config, num_channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense head."""
    width, features, sizes = 2 * config["embed_dim"], config["dpt_features"], config["dpt_out_channels"]
    maps: dict[str, tuple[int, ...]] = {f"projects.{i}": (size, width, 1, 1) for i, size in enumerate(sizes)}
    maps |= {f"resize_layers.{i}": (sizes[i], sizes[i], k, k) for i, k in ((0, 4), (1, 2), (3, 3))}
    for level in (1, 2, 3, 4):
        for unit in (1, 2) if level < 4 else (2,):
            for number in (1, 2):
                name = f"scratch.refinenet{level}.resConfUnit{unit}.conv{number}"
                maps[name] = (features, features, 3, 3)
        maps[f"scratch.refinenet{level}.out_conv"] = (features, features, 1, 1)
    maps["scratch.output_conv1"] = (features // 2, features, 3, 3)
    maps["scratch.output_conv2.0"] = (DENSE_LAST_HIDDEN, features // 2, 3, 3)
    maps["scratch.output_conv2.2"] = (num_channels, DENSE_LAST_HIDDEN, 1, 1)
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (width,), "norm.bias": (width,)}
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {f"scratch.layer{i + 1}_rn.weight": (features, size, 3, 3) for i, size in enumerate(sizes)}


def camera_head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the camera head."""
    width = 2 * config["embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {"empty_pose_tokens": (1, 1, 9)}
    for name in ("token_norm", "trunk_norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    maps = {"embed_pose": (width, 9), "poseLN_modulation.1": (3 * width, width)}
    maps |= {"pose_branch.fc1": (width // 2, width), "pose_branch.fc2": (9, width // 2)}
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for index in range(config["camera_trunk_depth"]):
        inner = block_shapes(width, int(config["mlp_ratio"] * width))
        shapes |= {f"trunk.{index}.{name}": shape for name, shape in inner.items()}
    return shapes


def checkpoint_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole checkpoint, without the point tracker."""
    width, patch, registers = config["embed_dim"], config["patch_size"], config["num_register_tokens"]
    hidden, native = int(config["mlp_ratio"] * width), config["img_size"] // patch
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "aggregator": {"camera_token": (1, 2, 1, width), "register_token": (1, 2, registers, width)},
        "aggregator.patch_embed": {
            "cls_token": (1, 1, width),
            "mask_token": (1, width),
            "register_tokens": (1, registers, width),
            "pos_embed": (1, 1 + native * native, width),
            "patch_embed.proj.weight": (width, 3, patch, patch),
            "patch_embed.proj.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        },
        "camera_head": camera_head_shapes(config),
        "depth_head": dense_head_shapes(config, 2),
        "point_head": dense_head_shapes(config, 4),
    }
    for index in range(config["vit_depth"]):
        parts[f"aggregator.patch_embed.blocks.{index}"] = block_shapes(width, hidden)
    for index in range(config["depth"]):
        inner = block_shapes(width, hidden, head_dim=width // config["num_heads"])
        parts |= {f"aggregator.{kind}_blocks.{index}": inner for kind in ("frame", "global")}
    return {f"{prefix}.{name}": shape for prefix, inner in parts.items() for name, shape in inner.items()}


def random_state(config: Config, seed: int) -> State:
    """
    Random weights that keep activations near 1, so that every part shows in the outputs and nothing overflows.

    Matrices have a standard deviation of 1 / sqrt(fan in), gains of norms and branches are spread around 1 and 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in checkpoint_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(".gamma"):
            values = 0.3 + 0.1 * values
        elif "norm" in name and name.endswith(".weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".weight"):
            # A transposed convolution whose stride is its kernel adds up one value per input channel.
            is_transposed = name.endswith(("resize_layers.0.weight", "resize_layers.1.weight"))
            values /= math.sqrt(shape[0] if is_transposed else math.prod(shape[1:]))
        elif name.endswith(".bias"):
            values *= 0.2
        state[name] = values
    return state
