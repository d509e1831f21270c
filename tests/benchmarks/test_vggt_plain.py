# SPDX-License-Identifier: Apache-2.0
"""
Two independent programs of VGGT against each other, and the plain one against the stored outputs of the public program.

The stored outputs cover three frames, grids of 4 x 8 patches and the chunk size that fits them. Where they end, the plain
reading in `benchmarks/vggt_plain.py` is the oracle. It shares no code with `VggtModel`; both rest on one description.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import vggt_plain
from geode.modeling_geode.vggt_geode import convert_vggt_checkpoint


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
SPEC = json.loads((FIXTURES / "config.json").read_text())
# max|a - b| / max|b|, as in tests/modeling_geode/test_vggt_geode.py.
TOLERANCE = 1e-5
# In float64 the two differ by the order of their sums only.
EXACT = 1e-11
FIELDS = {
    "pose_enc": "pose_encoding",
    "depth": "depth",
    "depth_conf": "depth_confidence",
    "world_points": "world_points",
    "world_points_conf": "world_points_confidence",
    "extrinsics": "extrinsics",
    "intrinsics": "intrinsics",
}
# Every width, depth and number of heads differs from every other where it may; native grid 3 x 3.
SMALL = {
    "img_size": 42,
    "patch_size": 14,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "mlp_ratio": 2,
    "num_register_tokens": 4,
    "rope_freq": 100,
    "vit_depth": 2,
    "vit_num_heads": 2,
    "camera_trunk_depth": 3,
    "camera_num_heads": 4,
    "dpt_features": 16,
    "dpt_out_channels": [8, 12, 16, 20],
    "intermediate_layer_idx": [0, 1, 2, 3],
}
NARROW = SMALL | {
    "embed_dim": 8,
    "num_heads": 1,
    "camera_num_heads": 2,
    "camera_trunk_depth": 1,
    "vit_depth": 1,
    "dpt_features": 8,
    "dpt_out_channels": [4, 4, 8, 8],
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert want.isfinite().all()
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def finite(intrinsics: torch.Tensor) -> torch.Tensor:
    """Reciprocal focal lengths: a field of view of 0, which random weights predict as well, has an infinite one."""
    intrinsics = intrinsics.clone()
    intrinsics[..., :2, :2].diagonal(dim1=-2, dim2=-1).reciprocal_()
    return intrinsics


def random_frames(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_model_matches_plain(config, frames, *, dtype=torch.float64, tolerance=EXACT, **options):
    state = {name: values.to(dtype) for name, values in vggt_plain.random_state(config, seed=5).items()}
    want = vggt_plain.plain_forward(state, config, frames.to(dtype))
    got = convert_vggt_checkpoint(state, config)(frames.to(dtype), output_tapped_layers=True, **options)
    for stored, field in FIELDS.items():
        if field != "intrinsics":
            assert relative_error(got[field], want[stored]) <= tolerance, field
    # One decodes in float32, the other in float64.
    assert relative_error(finite(got.intrinsics), finite(want["intrinsics"])) <= max(tolerance, 1e-6)
    for mine, theirs in zip(got.pose_encodings, want["pose_enc_list"], strict=True):
        assert relative_error(mine, theirs) <= tolerance
    for layer in config["intermediate_layer_idx"]:
        assert relative_error(got.tapped_layers[layer], want["aggregated"][layer]) <= tolerance, layer


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_plain_forward_matches_the_public_implementation(name):
    case = load_file(FIXTURES / f"case_{name}.safetensors")
    with torch.no_grad():
        state = load_file(FIXTURES / "model.safetensors")
        output = vggt_plain.plain_forward(state, SPEC["model"], case["images_u8"].float() / 255)
    for stored in FIELDS:
        assert relative_error(output[stored], case[stored]) <= TOLERANCE, stored
    assert relative_error(torch.stack(output["pose_enc_list"]), case["pose_enc_list"]) <= TOLERANCE
    assert len(output["aggregated"]) == SPEC["model"]["depth"]
    for layer in SPEC["model"]["intermediate_layer_idx"]:
        assert relative_error(output["aggregated"][layer], case[f"aggregated_{layer}"]) <= TOLERANCE, layer


def test_plain_forward_in_float64_matches_the_public_implementation_to_rounding():
    """In float64 even the epsilon of a norm shows: 1e-6 for 1e-5 in one place moves the outputs by far more."""
    want = load_file(FIXTURES / "case_a_float64.safetensors")
    frames = load_file(FIXTURES / "case_a.safetensors")["images_u8"].double() / 255
    state = {name: values.double() for name, values in load_file(FIXTURES / "model.safetensors").items()}
    with torch.no_grad():
        output = vggt_plain.plain_forward(state, SPEC["model"], frames)
    for stored in FIELDS:
        got = output[stored][:, :, ::5, ::5] if stored.startswith(("depth", "world")) else output[stored]
        assert relative_error(got, want[stored]) < (1e-6 if stored == "intrinsics" else 1e-13), stored


def test_random_checkpoints_have_the_names_and_shapes_of_the_public_one():
    published = json.loads((FIXTURES / "keys_vggt_1b.json").read_text())["shapes"]
    full = SMALL | {"img_size": 518, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4, "vit_depth": 24}
    full |= {"camera_trunk_depth": 4, "dpt_features": 256, "dpt_out_channels": [256, 512, 1024, 1024]}
    want = {name: tuple(shape) for name, shape in published.items() if not name.startswith("track_head.")}
    assert vggt_plain.checkpoint_shapes(full) == want


@pytest.mark.parametrize("frames_chunk_size", [5, 1, 12])
def test_model_matches_plain_on_more_frames_than_are_stored(frames_chunk_size):
    """Twelve frames: the plain heads take 8 and then 4, the model 5, 5 and 2."""
    assert_model_matches_plain(SMALL, random_frames(1, 12, 3, 28, 56), frames_chunk_size=frames_chunk_size)


def test_model_matches_plain_on_two_scenes_whose_frames_share_chunks():
    """Seven frames of two scenes in chunks of 4: the second chunk holds frames of both."""
    assert_model_matches_plain(SMALL, random_frames(2, 7, 3, 28, 42), frames_chunk_size=4)


@pytest.mark.parametrize("grid", [(3, 3), (1, 9), (5, 5), (2, 1)], ids=str)
def test_model_matches_plain_on_native_and_resized_position_tables(grid):
    """The native grid; as many patches in one row; a larger square; fewer patches than the native grid has columns."""
    height, width = (14 * side for side in grid)
    assert_model_matches_plain(SMALL, random_frames(1, 3, 3, height, width))


@pytest.mark.parametrize("grid", [(20, 37), (37, 20)], ids=str)
def test_model_matches_plain_on_a_grid_of_the_public_size(grid):
    height, width = (14 * side for side in grid)
    assert_model_matches_plain(NARROW, random_frames(1, 2, 3, height, width), frames_chunk_size=1)


def test_model_matches_plain_on_the_native_grid_of_the_public_size():
    frames = random_frames(1, 1, 3, 518, 518)
    assert_model_matches_plain(NARROW | {"img_size": 518}, frames)


def test_model_matches_plain_in_float32():
    frames = random_frames(2, 5, 3, 56, 70)
    assert_model_matches_plain(SMALL, frames, dtype=torch.float32, tolerance=5 * TOLERANCE, frames_chunk_size=3)


def test_random_weights_let_every_tensor_show():
    """A tensor that the outputs did not depend on would be checked by nothing."""
    state = {name: values.double().requires_grad_() for name, values in vggt_plain.random_state(SMALL, seed=5).items()}
    output = vggt_plain.plain_forward(state, SMALL, random_frames(1, 3, 3, 28, 56).double())
    loss = sum((output[name] ** 2).mean() for name in FIELDS if name != "intrinsics")
    loss = loss + sum((pose**2).mean() for pose in output["pose_enc_list"])
    loss.backward()
    unused = {name for name, values in state.items() if values.grad is None or values.grad.abs().max() < 1e-6}
    assert unused == {"aggregator.patch_embed.mask_token"}
