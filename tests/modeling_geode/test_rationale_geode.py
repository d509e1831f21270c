# SPDX-License-Identifier: Apache-2.0
"""The rationale module: what each part of the context does, and that padding does nothing."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import set_seed

from geode.modeling_geode.rationale_geode import (
    GeodeFeatureInjection,
    GeodeRationaleModule,
    fourier_features,
    positions_seen,
)
from tests.modeling_geode.common_geode import tiny_config


PATCHES, VISION, POINT = 36, 16, 12


def make_module(**drm) -> GeodeRationaleModule:
    set_seed(0)
    module = GeodeRationaleModule(tiny_config(drm_config=drm)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def make_inputs(num_points=(5, 7), num_frames: int = 3, num_cameras: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scenes, total = len(num_points), sum(num_points)
    return {
        "visual_features": torch.randn(scenes, num_frames, PATCHES, VISION, generator=generator),
        "frame_mask": torch.ones(scenes, num_frames, dtype=torch.bool),
        "point_features": torch.randn(total, POINT, generator=generator),
        "point_positions": torch.randn(total, 3, generator=generator),
        "point_offset": torch.tensor(num_points).cumsum(0),
        "camera_poses": torch.randn(scenes, num_cameras, 11, generator=generator),
        "camera_mask": torch.ones(scenes, num_cameras, dtype=torch.bool),
        "log_scale": torch.tensor([0.3, -0.2])[:scenes],
        "scale_known": torch.tensor([True, True])[:scenes],
    }


def scene_of(inputs: dict, scene: int) -> dict:
    start = 0 if scene == 0 else int(inputs["point_offset"][scene - 1])
    stop = int(inputs["point_offset"][scene])
    single = {name: tensor[scene : scene + 1] for name, tensor in inputs.items()}
    single["point_features"] = inputs["point_features"][start:stop]
    single["point_positions"] = inputs["point_positions"][start:stop]
    single["point_offset"] = torch.tensor([stop - start])
    return single


def test_fourier_features_are_sines_of_octaves():
    features = fourier_features(torch.tensor([[0.5, 2.0]]), num_frequencies=2, longest=4.0)
    # Hand-derived: phases 2 pi x / 4 are pi/4 and pi, and twice that in the second octave.
    phases = [math.pi / 4, math.pi / 2, math.pi, 2 * math.pi]
    expected = [0.125, 0.5, *(math.sin(p) for p in phases), *(math.cos(p) for p in phases)]
    torch.testing.assert_close(features, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_scenes_of_a_batch_do_not_meet():
    module, inputs = make_module(), make_inputs()
    together = module(**inputs)
    for scene in range(2):
        alone = module(**scene_of(inputs, scene))
        torch.testing.assert_close(
            together.rationale_features[scene], alone.rationale_features[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(together.fused_features[scene], alone.fused_features[0], atol=1e-5, rtol=1e-5)


def test_padded_frames_equal_a_shorter_clip_and_give_zero_features():
    module, inputs = make_module(), make_inputs()
    short = {**inputs, "visual_features": inputs["visual_features"][:, :2], "frame_mask": inputs["frame_mask"][:, :2]}
    padded = {**inputs, "frame_mask": torch.tensor([[True, True, False]] * 2)}
    expected, got = module(**short), module(**padded)
    torch.testing.assert_close(got.rationale_features, expected.rationale_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.fused_features[:, :2], expected.fused_features, atol=1e-5, rtol=1e-5)
    assert not got.fused_features[:, 2].any()


def test_order_of_points_does_not_matter():
    module, inputs = make_module(), make_inputs(num_points=(9,))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = {name: inputs[name][order] for name in ("point_features", "point_positions")}
    inputs = {**inputs, "log_scale": torch.tensor([0.3]), "scale_known": torch.tensor([True])}
    torch.testing.assert_close(
        module(**{**inputs, **shuffled}).rationale_features, module(**inputs).rationale_features, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["visual_features", "point_features", "point_positions", "camera_poses", "log_scale"])
def test_every_input_reaches_every_rationale_token(name):
    module, inputs = make_module(), make_inputs()
    inputs[name].requires_grad_(True)
    for token in module(**inputs).rationale_features.unbind(1):
        (gradient,) = torch.autograd.grad(token.square().sum(), inputs[name], retain_graph=True)
        assert gradient.flatten(1).any(dim=1).all() if gradient.ndim > 1 else gradient.all()


def test_no_camera_and_unknown_scale_use_their_learned_tokens():
    module, inputs = make_module(), make_inputs()
    no_camera = {**inputs, "camera_mask": torch.zeros_like(inputs["camera_mask"])}
    before = module(**no_camera).rationale_features
    # What is masked cannot matter; the learned token does.
    torch.testing.assert_close(
        module(**{**no_camera, "camera_poses": inputs["camera_poses"] + 1}).rationale_features, before
    )
    with torch.no_grad():
        module.context_encoder.no_camera_token.add_(torch.randn(24))
    assert (module(**no_camera).rationale_features - before).abs().max() > 2e-5
    with_camera = module(**inputs).rationale_features
    with torch.no_grad():
        module.context_encoder.no_camera_token.add_(torch.randn(24))
    torch.testing.assert_close(module(**inputs).rationale_features, with_camera)
    unknown = {**inputs, "scale_known": torch.zeros_like(inputs["scale_known"])}
    hidden = module(**unknown).rationale_features
    torch.testing.assert_close(module(**{**unknown, "log_scale": inputs["log_scale"] + 5}).rationale_features, hidden)
    assert (hidden - with_camera).abs().max() > 2e-5


def test_first_rationale_tokens_do_not_depend_on_later_queries():
    module, inputs = make_module(), make_inputs()
    before = module(**inputs).rationale_features
    with torch.no_grad():
        module.queries[2:].add_(torch.randn(2, 24))
    after = module(**inputs).rationale_features
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-3


def test_large_clouds_are_thinned_to_the_limit_by_farthest_points():
    module = make_module(max_context_tokens=3)
    line = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0], [5.1, 0, 0], [10.0, 0, 0]])
    features, positions, mask = module.thin_context(
        torch.randn(7, POINT), torch.cat([line, line[:2]]), torch.tensor([5, 7])
    )
    assert features.shape == (2, 3, POINT)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    chosen = sorted(positions[0, :, 0].tolist())
    # Any three far-apart points of the line: both ends and one of the two in the middle.
    assert chosen[0] <= 0.1 + 1e-6
    assert chosen[2] == 10.0
    assert 5.0 <= chosen[1] <= 5.1 + 1e-6


def test_pooling_averages_blocks_of_patches():
    module = make_module()
    grid = torch.arange(PATCHES, dtype=torch.float32).view(1, 1, PATCHES, 1)
    pooled = module.pool_patches(grid)[0, 0, :, 0]
    # Patches 2, 3, 8 and 9 of the 6 x 6 grid are the second block of the first row.
    assert pooled.shape == (9,)
    assert pooled[1] == (2 + 3 + 8 + 9) / 4
    assert pooled[3] == (12 + 13 + 18 + 19) / 4


def test_injection_keeps_tokens_in_the_visual_order():
    set_seed(0)
    config = tiny_config(drm_config={"inject_features": True, "spatial_pooling": 1})
    injection = GeodeFeatureInjection(config)
    with torch.no_grad():
        injection.gate.fill_(2.0)
    features = torch.randn(2, PATCHES, 24)
    got = injection(features)
    assert got.shape == (2, config.image_seq_length, 32)
    expected = 2.0 * injection.projection(features[:, [2, 3, 8, 9]].mean(dim=1))
    torch.testing.assert_close(got[:, 1], expected)


def test_times_are_the_middles_of_equal_segments_of_the_clip():
    module = make_module()
    embedded = module.embed_times(torch.tensor([[True, True, False], [True, True, True]]))
    # Two valid entries lie at 1/4 and 3/4 of the clip, three at 1/6, 1/2 and 5/6.
    times = torch.tensor([[1 / 4, 3 / 4], [1 / 6, 1 / 2]])
    expected = module.time_projection(fourier_features(times[..., None], num_frequencies=3, longest=2.0))
    torch.testing.assert_close(embedded[:, :2], expected)


@pytest.mark.parametrize("length", [3, 2])
def test_frames_and_cameras_each_carry_their_time(length, monkeypatch):
    """There are three frames and two cameras, so the length of a mask says whose times are asked for."""
    module, inputs = make_module(), make_inputs()
    before = module(**inputs).rationale_features
    embed_times = module.embed_times
    shift = torch.randn(24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        module,
        "embed_times",
        lambda mask: (
            embed_times(mask) + shift * (mask.shape[1] == length) * (1 + torch.arange(mask.shape[1]))[:, None]
        ),
    )
    assert (module(**inputs).rationale_features - before).abs().max() > 2e-5


def embed_cameras(module: GeodeRationaleModule, inputs: dict) -> torch.Tensor:
    _, positions, mask = module.thin_context(
        *(inputs[f"point_{name}"] for name in ("features", "positions", "offset"))
    )
    cameras = (inputs[name] for name in ("frame_mask", "camera_poses", "camera_mask"))
    return module.embed_frame_cameras(*cameras, positions, mask)


def test_camera_queries_are_the_cameras_nearest_in_time():
    module, inputs = make_module(camera_queries=True), make_inputs(num_frames=3, num_cameras=5)
    inputs["frame_mask"] = torch.tensor([[True, True, True], [True, True, False]])
    inputs["camera_mask"] = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    embedded = embed_cameras(module, inputs)
    # Three frames at 1/6, 1/2 and 5/6 fall into fifths 0, 2 and 4 of the clip; two at 1/4 and 3/4 into thirds 0 and 2.
    cameras = module.context_encoder.embed_cameras(inputs["camera_poses"])
    torch.testing.assert_close(embedded[0, :, 0], cameras[0, [0, 2, 4]])
    torch.testing.assert_close(embedded[1, :2, 0], cameras[1, [0, 2]])
    plain = make_module()
    plain.load_state_dict(module.state_dict())
    assert (module(**inputs).fused_features - plain(**inputs).fused_features).abs().max() > 2e-5


def test_camera_queries_without_cameras_are_the_learned_token():
    module, inputs = make_module(camera_queries=True), make_inputs()
    inputs["camera_mask"] = torch.tensor([[True, True], [False, False]])
    embedded = embed_cameras(module, inputs)
    assert torch.equal(embedded[1, :, 0], module.context_encoder.no_camera_token.expand(3, -1))
    hidden = module(**inputs).fused_features
    moved = module(**{**inputs, "camera_poses": inputs["camera_poses"] + 1}).fused_features
    torch.testing.assert_close(moved[1], hidden[1])
    assert (moved[0] - hidden[0]).abs().max() > 2e-5


def test_camera_queries_of_a_padded_scene_equal_those_alone():
    module, inputs = make_module(camera_queries=True), make_inputs()
    short = {**inputs, "visual_features": inputs["visual_features"][:, :2], "frame_mask": inputs["frame_mask"][:, :2]}
    padded = {**inputs, "frame_mask": torch.tensor([[True, True, False]] * 2)}
    torch.testing.assert_close(
        module(**padded).rationale_features, module(**short).rationale_features, atol=1e-5, rtol=1e-5
    )


# One camera at (5, 6, 7) that looks along +y with 90 degrees each way; its patches are 2 x 2.
POSE = torch.tensor([5.0, 6, 7, 1, 0, 0, 0, 0, -1, math.pi / 2, math.pi / 2])


def seen(points: list[list[float]], mask: list[bool] | None = None, radius: float = 0.4) -> torch.Tensor:
    mask = torch.tensor(mask or [True] * len(points))
    return positions_seen(POSE[None, None], (2, 2), torch.tensor([points]), mask[None], radius=radius)[0, 0]


def test_a_patch_shows_the_nearest_surface_on_its_ray():
    # Hand-derived: the rays of the four centres go through (+-1/2, 1, +-1/2), upper left first.
    wall = [[5 + x, 10.0, 7 + z] for x in (-2.0, 2.0) for z in (2.0, -2.0)]
    expected = torch.tensor([[3.0, 10, 9], [7, 10, 9], [3, 10, 5], [7, 10, 5]])
    torch.testing.assert_close(seen(wall), expected)
    # A thing half way before the lower right of it; what is behind the camera shows nothing, nor what is masked.
    thing = [6.0, 8, 6]
    found = seen([*wall, thing, [5.0, 2, 7], [4.0, 8, 8]], [True] * 6 + [False])
    torch.testing.assert_close(found[3], torch.tensor(thing), atol=0.03, rtol=0)
    torch.testing.assert_close(found[:3], expected[:3])


def test_rows_and_columns_are_told_apart():
    # Hand-derived: one row of three columns, whose rays go through -2/3, 0 and 2/3.
    points = torch.tensor([[[3.0, 9, 7], [5, 9, 7], [7, 9, 7]]])
    found = positions_seen(POSE[None, None], (1, 3), points, torch.ones(1, 3, dtype=torch.bool), radius=0.4)
    torch.testing.assert_close(found[:, 0], points)


def test_autocast_does_not_round_what_a_patch_shows():
    points = [[3.11, 10.07, 9.02], [7.03, 9.93, 8.98], [3.01, 10.05, 5.03], [6.93, 9.97, 5.01]]
    expected = seen(points)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(seen(points), expected, atol=1e-6, rtol=0)


def test_where_no_point_is_near_a_ray_the_nearest_to_it_decide():
    # Depth 4, far to the side: the patch's point is on its ray, at that depth.
    torch.testing.assert_close(seen([[7.0, 10, 9]])[2], torch.tensor([3.0, 10, 5]))
    behind, masked = seen([[5.0, 2, 7]]), seen([[5.0, 9, 7]], [False])
    assert torch.equal(behind, POSE[:3].expand(4, 3))
    assert torch.equal(masked, behind)


def test_point_queries_hold_what_each_patch_shows():
    module, inputs = make_module(camera_queries=True, point_queries=True), make_inputs()
    plain = make_module(camera_queries=True)
    plain.load_state_dict(module.state_dict())
    assert (module(**inputs).fused_features - plain(**inputs).fused_features).abs().max() > 2e-5
    extra = embed_cameras(module, inputs) - embed_cameras(plain, inputs)
    _, positions, mask = module.thin_context(
        *(inputs[f"point_{name}"] for name in ("features", "positions", "offset"))
    )
    poses = inputs["camera_poses"][:, [0, 1, 1]]
    expected = positions_seen(poses, module.patch_grid, positions, mask, radius=module.seen_radius)
    torch.testing.assert_close(extra, module.context_encoder.embed_positions(expected), atol=1e-5, rtol=1e-5)
    for scene in range(2):
        alone = module(**scene_of(inputs, scene)).fused_features
        torch.testing.assert_close(module(**inputs).fused_features[scene], alone[0], atol=1e-5, rtol=1e-5)


def test_point_queries_without_cameras_are_the_learned_token():
    module, inputs = make_module(camera_queries=True, point_queries=True), make_inputs()
    inputs["camera_mask"] = torch.tensor([[True, True], [False, False]])
    embedded = embed_cameras(module, inputs)
    assert torch.equal(embedded[1], module.context_encoder.no_camera_token.expand(3, PATCHES, -1))


def test_a_ray_meets_points_within_a_little_more_than_half_a_voxel_of_the_coarsest_stage():
    config = tiny_config(drm_config={})
    config.point_config.grid_size, stages = 0.1, len(config.point_config.stride)
    config.point_config.stride = [2] * stages
    # Each stage doubles the voxels.
    assert GeodeRationaleModule(config).seen_radius == pytest.approx(0.06 * 2**stages)


def test_point_queries_need_camera_queries():
    with pytest.raises(StrictDataclassClassValidationError, match=r"`point_queries` needs `camera_queries`"):
        tiny_config(drm_config={"point_queries": True})
