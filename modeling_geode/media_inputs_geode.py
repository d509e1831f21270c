# SPDX-License-Identifier: Apache-2.0
"""Checks of the media that a batch brings, and where in its padded tensors they are."""

from typing import NamedTuple

import torch
from transformers.utils import torch_compilable_check

from geode.configuration.configuration_geode import GeodeConfig, SonataConfig

from .collation_geode import CLOUD_INPUTS, TOKEN_INPUTS
from .input_checks_geode import check_finite, check_tensors
from .serialization_geode import serialization_depth


class PackedPoints(NamedTuple):
    """The point encoder's coarsest stage, clouds one after another: features, positions, and where each cloud ends."""

    features: torch.Tensor
    positions: torch.Tensor
    offset: torch.Tensor


def clouds_to_pack(grid_coords: torch.Tensor, sizes: list[int], config: SonataConfig) -> list[list[int]]:
    """
    Which clouds the point encoder may encode in one call, so that none depends on the others.

    Clouds of a call share the depth of their codes, and with it the path of their curves. A cloud beside one of more bits
    would fall into other windows than alone, and its features would change with the batch. With `window_rule="batch"` the
    smallest cloud decides the windows of all, so each is encoded alone.

    Args:
        grid_coords (`torch.Tensor` of shape `(num_points, 3)`): Voxel indices, clouds one after another.
        sizes (`list[int]`): Points of each cloud.
        config ([`SonataConfig`]): Of the point encoder.

    Returns:
        `list[list[int]]`: Groups of clouds, each in order.
    """
    groups: dict[tuple, list[int]] = {}
    largest = torch.stack([cloud.max() for cloud in grid_coords.split(sizes)]).tolist()
    for number, max_index in enumerate(largest):
        depths = [serialization_depth(max_index)]
        for stride in config.stride:
            max_index //= stride
            depths.append(serialization_depth(max_index))
        key = (number,) if config.window_rule == "batch" else tuple(depths)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def join_clouds(parts: list[PackedPoints], groups: list[list[int]]) -> PackedPoints:
    """Put clouds that were encoded in groups back in order."""
    if len(parts) == 1:
        return parts[0]
    clouds: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for part, group in zip(parts, groups, strict=True):
        lengths = part.offset.diff(prepend=part.offset.new_zeros(1)).tolist()
        pairs = zip(part.features.split(lengths), part.positions.split(lengths), strict=True)
        clouds |= dict(zip(group, pairs, strict=True))
    features, positions = zip(*(clouds[number] for number in sorted(clouds)), strict=True)
    sizes = torch.tensor([len(rows) for rows in positions], device=parts[0].offset.device)
    return PackedPoints(torch.cat(features), torch.cat(positions), sizes.cumsum(dim=0))


def pack_tokens(point_tokens, point_token_positions, point_token_mask, scenes) -> PackedPoints:
    """What the point encoder made before, without its padding."""
    tokens = dict(zip(TOKEN_INPUTS, (point_tokens, point_token_positions), strict=True))
    keep = valid_points(tokens, point_token_mask, scenes)
    return PackedPoints(point_tokens[keep], point_token_positions[keep], keep.sum(dim=2)[scenes].cumsum(dim=0))


def check_counts(name: str, scenes: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise unless every scene has frames, or points."""
    empty = (scenes & (mask.sum(dim=2) == 0)).nonzero().tolist()
    if empty:
        raise ValueError(
            f"Every scene needs {name}; sample {empty[0][0]}, scene {empty[0][1]} has none. "
            "Give its geometry, or build the inputs with `use_geometry=False`."
        )


def check_form(cloud: tuple, tokens: tuple) -> None:
    """Raise unless the geometry of scenes is complete in one of its two forms."""
    forms = (dict(zip(CLOUD_INPUTS, cloud, strict=True)), dict(zip(TOKEN_INPUTS, tokens, strict=True)))
    given = [name for form in forms for name, tensor in form.items() if tensor is not None]
    if given not in [list(form) for form in forms]:
        raise ValueError(
            f"The geometry of scenes must be {list(forms[0])}, or {list(forms[1])} in their place, got {given}. "
            "Give all of one form and none of the other."
        )


def check_layer(layer: int | None, num_layers: int) -> None:
    """Raise unless the vision tower has states of this layer: those of its embeddings, then of each of its layers."""
    if layer is not None and (not isinstance(layer, int) or not -num_layers - 1 <= layer <= num_layers):
        raise ValueError(
            f"`vision_feature_layer` must lie in {-num_layers - 1} to {num_layers} for a vision tower of {num_layers} layers, got "
            f"{layer!r}. Leave it out for that of the configuration."
        )


def check_media(pixel_values_videos, video_features, vision_feature_layer, vision_feature_select_strategy) -> None:
    """Raise if frames are given in both of their forms, or features with a choice that they cannot follow."""
    if video_features is None:
        return
    if pixel_values_videos is not None:
        raise ValueError(
            "`video_features` stand in place of `pixel_values_videos`, got both, of shapes "
            f"{tuple(video_features.shape)} and {tuple(pixel_values_videos.shape)}. Give one of them."
        )
    chosen = (vision_feature_layer, vision_feature_select_strategy)
    if chosen != (None, None):
        raise ValueError(
            "`video_features` are of the layer and strategy that made them, so `vision_feature_layer` and "
            f"`vision_feature_select_strategy` cannot be chosen, got {chosen}. Leave them out."
        )


_SCENE_INPUTS = frozenset(
    (
        *("pixel_values_videos", "video_features", "video_frame_mask", "scene_mask"),
        *(*CLOUD_INPUTS, "point_mask", *TOKEN_INPUTS, "point_token_mask"),
        *("camera_poses", "camera_mask", "log_scale", "scale_known"),
        *("geometry_frames", "geometry_frame_mask", "geometry_content_boxes"),
    )
)


def check_scene_inputs(inputs: dict, config: GeodeConfig) -> None:
    """Raise unless these are tensors that the processor's `prepare_scene` returns, of one scene."""
    unknown = sorted(inputs.keys() - _SCENE_INPUTS)
    if unknown:
        raise TypeError(
            f"`encode_scene` takes {sorted(_SCENE_INPUTS)}, got also {unknown}. `prepare_scene` makes them."
        )
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor of `prepare_scene`, got {type(tensor).__name__}.")
    frames = inputs.get("pixel_values_videos", inputs.get("video_features"))
    if frames is None or frames.ndim < 3:
        raise ValueError(
            "A scene needs frames: `pixel_values_videos` of shape (1, 1, num_frames, 3, height, width), got "
            f"{None if frames is None else tuple(frames.shape)}. `prepare_scene` makes them."
        )
    if tuple(frames.shape[:2]) != (1, 1):
        raise ValueError(f"`encode_scene` takes one scene, got {frames.shape[0]} samples of {frames.shape[1]} scenes.")
    check_tensors(inputs, config)


def check_pixels(pixel_values: torch.Tensor, image_size) -> None:
    """Raise unless images have the size of the vision tower, and numbers."""
    expected = (3, *image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"Images must have shape (num_images, {', '.join(map(str, expected))}) for this model, got "
            f"{tuple(pixel_values.shape)}. `GeodeProcessor` resizes them."
        )
    check_finite("Pixels of images", pixel_values, "Decode them again, and check what normalises them.")


def scatter(inputs_embeds: torch.Tensor, positions: torch.Tensor, features: torch.Tensor, kind: str) -> torch.Tensor:
    """Put features, `(num_tokens, hidden_size)`, in the places of their placeholders; raise unless there are as many."""
    torch_compilable_check(
        positions.sum() == features.shape[0],
        lambda: (
            f"{kind} features and {kind.lower()} placeholders do not match: {features.shape[0]} features, "
            f"{int(positions.sum())} placeholders. Give tokens and media of the same chats, as `GeodeProcessor` returns both."
        ),
    )
    return inputs_embeds.masked_scatter(positions[..., None], features.to(inputs_embeds))


def valid_frames(frames: torch.Tensor, video_frame_mask, scene_mask) -> torch.Tensor:
    """Where there are frames, `(batch_size, num_scenes, num_frames)`."""
    mask = torch.ones(frames.shape[:3], dtype=torch.bool, device=frames.device)
    if video_frame_mask is not None:
        mask = mask & video_frame_mask
    if scene_mask is not None:
        mask = mask & scene_mask[..., None]
    return mask


def valid_points(tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, scenes: torch.Tensor) -> torch.Tensor:
    """Where there are points, `(batch_size, num_scenes, num_points)`, once every scene has some and all are finite."""
    first = next(iter(tensors.values()))
    if mask is None:
        mask = torch.ones(first.shape[:3], dtype=torch.bool, device=first.device)
    mask = mask.to(first.device)
    check_counts("points", scenes, mask)
    keep = scenes[..., None] & mask
    for name, tensor in tensors.items():
        check_finite(f"`{name}`", tensor[keep], "Drop those points, or mask them.")
    return keep


def summary_of(inputs: dict[str, torch.Tensor]) -> dict:
    """Facts about a scene whose geometry came as tensors, as far as they hold them; empty without geometry."""
    if "point_token_positions" in inputs:
        facts = {}  # means of many points say neither how many there were nor how far they reached
    elif "point_coords" in inputs:
        points = inputs["point_coords"][0, 0]
        if "point_mask" in inputs:
            points = points[inputs["point_mask"][0, 0]]
        extent = points.max(dim=0).values - points.min(dim=0).values
        facts = {"num_points": len(points), "extent": extent.tolist()}
    else:
        return {}
    if "camera_mask" in inputs:
        facts["num_cameras"] = int(inputs["camera_mask"].sum())
    if "scale_known" in inputs:
        facts["is_metric"] = bool(inputs["scale_known"].all())
    return facts


__all__ = [
    "PackedPoints",
    "check_counts",
    "check_form",
    "check_layer",
    "check_media",
    "check_pixels",
    "check_scene_inputs",
    "clouds_to_pack",
    "join_clouds",
    "pack_tokens",
    "scatter",
    "summary_of",
    "valid_frames",
    "valid_points",
]
