# SPDX-License-Identifier: Apache-2.0
"""From the tensors of single scenes to the padded tensors of a batch."""

import torch


# What names a scene's points, and in which form: a cloud for the point encoder, or what it made of one.
CLOUD_INPUTS = ("point_features", "point_coords", "point_grid_coords")
TOKEN_INPUTS = ("point_tokens", "point_token_positions")
# Inputs that are padded along their first dimension, and the mask that says which entries are valid.
_MASKS = {
    **dict.fromkeys(CLOUD_INPUTS, "point_mask"),
    **dict.fromkeys(TOKEN_INPUTS, "point_token_mask"),
    "camera_poses": "camera_mask",
    "video_features": "video_frame_mask",
}
_SCALARS = ("log_scale", "scale_known")


def collate_scenes(samples: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """
    Pad the scenes of a batch to common sizes.

    Args:
        samples (`list[list[dict]]`):
            For each sample the tensors of its scenes, possibly none: outputs of [`SceneGeometry.to_model_inputs`], or
            tensors of a feature store, which have `point_tokens` and `point_token_positions` instead of a cloud, and
            may have `video_features`. All scenes have the same tensors.

    Returns:
        `dict[str, torch.Tensor]`: `scene_mask` `(batch_size, num_scenes)`; `point_features`
        `(batch_size, num_scenes, num_points, 9)`, `point_coords` and `point_grid_coords` `(..., num_points, 3)` with
        `point_mask` `(..., num_points)`, or `point_tokens` `(..., num_tokens, point_hidden_size)` and
        `point_token_positions` `(..., num_tokens, 3)` with `point_token_mask` `(..., num_tokens)`; `video_features`
        `(..., num_frames, num_patches, vision_hidden_size)` with `video_frame_mask` `(..., num_frames)` if given;
        `camera_poses` `(..., num_cameras, 11)` with `camera_mask` `(..., num_cameras)`; `log_scale` and `scale_known`
        `(batch_size, num_scenes)`. Padding is 0 and False. There is room for at least one camera, even if no scene has
        any.

    Raises:
        ValueError: If no sample has a scene, or scenes have different tensors.
    """
    num_scenes = max((len(scenes) for scenes in samples), default=0)
    if num_scenes == 0:
        raise ValueError(
            f"At least one of the {len(samples)} samples must have a scene. Leave geometry out otherwise."
        )
    every = [scene for scenes in samples for scene in scenes]
    names = _common_names(every)
    lead = (len(samples), num_scenes)
    batch = {"scene_mask": torch.zeros(lead, dtype=torch.bool)}
    for name in names:
        # Where nothing is to be padded, one row is kept: attention needs a key, if only a masked one.
        longest = max(1, *(len(scene[name]) for scene in every))
        batch[name] = every[0][name].new_zeros(*lead, longest, *every[0][name].shape[1:])
        batch[_MASKS[name]] = torch.zeros(*lead, longest, dtype=torch.bool)
    batch |= {"log_scale": torch.zeros(lead), "scale_known": torch.zeros(lead, dtype=torch.bool)}
    for row, scenes in enumerate(samples):
        for column, scene in enumerate(scenes):
            batch["scene_mask"][row, column] = True
            for name in names:
                batch[name][row, column, : len(scene[name])] = scene[name]
                batch[_MASKS[name]][row, column, : len(scene[name])] = True
            for name in _SCALARS:
                batch[name][row, column] = scene[name]
    return batch


def _common_names(every: list[dict[str, torch.Tensor]]) -> list[str]:
    """The padded inputs that all scenes have."""
    kinds = sorted({tuple(name for name in _MASKS if name in scene) for scene in every})
    if len(kinds) > 1:
        raise ValueError(
            "All scenes of a batch must have the same tensors, clouds or the point encoder's tokens, with or without "
            f"features of frames; got scenes with {' and with '.join(str(list(names)) for names in kinds)}. Take all of "
            "them from one feature store, or none."
        )
    return list(kinds[0])


__all__ = ["CLOUD_INPUTS", "TOKEN_INPUTS", "collate_scenes"]
