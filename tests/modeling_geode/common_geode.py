# SPDX-License-Identifier: Apache-2.0
"""A tiny GEODE and inputs for it, so that any test suite can be pointed at the model."""

import torch
from transformers import set_seed

from geode.configuration.configuration_geode import GeodeConfig, VggtConfig
from geode.modeling_geode.vggt_geode import VggtModel


# Low ids survive tests that shrink the vocabulary.
IMAGE_TOKEN, RATIONALE_TOKEN, REG_TOKEN, BOX_TOKEN = 3, 4, 5, 6


def tiny_config(**overrides) -> GeodeConfig:
    """
    A GEODE of two layers each. Its weights are wide: at 0.02, defects hide below absolute tolerances.

    Patches are 4 x 4 with different sides of the pooled grid kept out of reach: 6 x 6 patches, 9 visual tokens a frame.
    """
    settings = {
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": [24, 24],
            "patch_size": [4, 4],
            "attention_bias": True,
            "initializer_range": 0.2,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        "point_config": {
            "enc_depths": [1, 1],
            "enc_channels": [8, 12],
            "enc_num_head": [2, 3],
            "enc_patch_size": [8, 8],
            "stride": [2],
            "drop_path": 0.0,
            "initializer_range": 0.2,
        },
        "drm_config": {
            "hidden_size": 24,
            "num_cross_attention_layers": 1,
            "num_attention_heads": 3,
            "mlp_ratio": 2,
            "mamba_state_size": 4,
            "num_rationale_tokens": 4,
            "max_context_tokens": 12,
            "num_position_frequencies": 3,
        },
        "drh_config": {},
        "reconstructor_config": None,
        "image_token_id": IMAGE_TOKEN,
        "rationale_token_id": RATIONALE_TOKEN,
        "control_tokens": {
            "<REG>": {
                "token_id": REG_TOKEN,
                "dim": 1,
                "kind": "scalar",
                "codec": {"transform": "log1p", "mean": [0.7], "std": [0.6]},
            },
            "<3DBBOX>": {
                "token_id": BOX_TOKEN,
                "dim": 7,
                "kind": "box3d",
                "codec": {"mean": [0.1, -0.2, 0.8, -0.4, -0.3, -0.5], "std": [1.5, 1.2, 0.6, 0.5, 0.7, 0.9]},
            },
        },
        "initializer_range": 0.2,
    }
    for name, value in overrides.items():
        settings[name] = {**(settings[name] or {}), **value} if isinstance(value, dict) else value
    return GeodeConfig(**settings)


TINY_RECONSTRUCTOR = {
    "image_size": 28,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "trunk_num_hidden_layers": 1,
    "trunk_num_attention_heads": 2,
    "camera_num_hidden_layers": 1,
    "camera_num_attention_heads": 2,
    "dense_hidden_size": 8,
    "dense_projection_sizes": [4, 4, 8, 8],
    "tapped_layers": [0, 0, 1, 1],
}


def steady_cameras(model: VggtModel) -> VggtModel:
    """Damp the refinements of a random camera head: large ones may close a field of view, small ones stay near 1 rad."""
    with torch.no_grad():
        for parameter in model.camera_head.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.1)
    return model


def tiny_vggt(**changes) -> VggtModel:
    """A random reconstructor of two layers, whose depth is about 1."""
    set_seed(0)
    return steady_cameras(VggtModel(VggtConfig(**{**TINY_RECONSTRUCTOR, **changes})).eval())


def tiny_geometry(generator: torch.Generator, batch_size: int, num_scenes: int = 1) -> dict[str, torch.Tensor]:
    """Random clouds and cameras, with padded points and a padded camera in every scene but the first."""
    num_points, num_cameras = 40, 3
    grid = torch.stack(
        [torch.randperm(8 * 9 * 5, generator=generator)[:num_points] for _ in range(batch_size * num_scenes)]
    ).view(batch_size, num_scenes, num_points)
    grid = torch.stack([grid // 45, grid // 5 % 9, grid % 5], dim=-1)
    coords = 0.02 * (grid + torch.rand(grid.shape, generator=generator)) + torch.tensor([0.5, -1.0, 0.1])
    colors_normals = torch.rand(*grid.shape[:3], 6, generator=generator)
    point_mask = torch.ones(grid.shape[:3], dtype=torch.bool)
    camera_mask = torch.ones(batch_size, num_scenes, num_cameras, dtype=torch.bool)
    point_mask.view(-1, num_points)[1:, -7:] = False
    camera_mask.view(-1, num_cameras)[1:, -1] = False
    return {
        "point_features": torch.cat([coords - coords.mean(dim=2, keepdim=True), colors_normals], dim=-1),
        "point_coords": coords,
        "point_grid_coords": grid,
        "point_mask": point_mask,
        "camera_poses": torch.randn(batch_size, num_scenes, num_cameras, 11, generator=generator),
        "camera_mask": camera_mask,
        "log_scale": 0.5 * torch.randn(batch_size, num_scenes, generator=generator),
        "scale_known": torch.ones(batch_size, num_scenes, dtype=torch.bool),
    }


def prepare_inputs(
    config: GeodeConfig,
    batch_size: int = 3,
    device: str | torch.device = "cpu",
    *,
    has_control_tokens: bool = False,
) -> dict:
    """
    An image, a scene of two frames with geometry, and text in every sample.

    Args:
        config ([`GeodeConfig`]): As [`tiny_config`] makes it.
        batch_size (`int`): Samples.
        device (`str` or `torch.device`): Where the tensors live.
        has_control_tokens (`bool`): The text holds one `<REG>` and one `<3DBBOX>`, so that `regression_values`, which are
            NaN at every other position, are part of the output.

    Returns:
        `dict`: Keyword arguments of the model; no sample is padded, so `attention_mask` is all ones.
    """
    generator = torch.Generator().manual_seed(0)
    num_frames, num_rationale = 2, config.drm_config.num_rationale_tokens
    parts = [
        (config.image_token_id, 1, config.image_seq_length),
        (config.image_token_id, 2, num_frames * config.image_seq_length),
        (config.rationale_token_id, 0, num_rationale),
    ]
    text = torch.randint(7, 80, (batch_size, 11), generator=generator)
    if has_control_tokens:
        text[:, 4], text[:, 8] = REG_TOKEN, BOX_TOKEN
    media_ids = torch.tensor([token for token, _, count in parts for _ in range(count)])
    media_types = torch.tensor([kind for _, kind, count in parts for _ in range(count)])
    input_ids = torch.cat([media_ids.expand(batch_size, -1), text], dim=1)
    size = tuple(config.vision_config.image_size)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": torch.cat([media_types.expand(batch_size, -1), torch.zeros_like(text)], dim=1),
        "pixel_values": torch.randn(batch_size, 3, *size, generator=generator),
        "pixel_values_videos": torch.randn(batch_size, 1, num_frames, 3, *size, generator=generator),
        **tiny_geometry(generator, batch_size),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
