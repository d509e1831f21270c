# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from geode.modeling_geode import alignment_geode
from geode.modeling_geode.alignment_geode import (
    find_floor,
    scale_from_camera_height,
    scale_from_depth,
    scale_from_length,
    scale_from_positions,
)
from tests.modeling_geode.common_scene_geode import rigid


def patch(corner, along, across, normal, spacing=0.1):
    """Points of a rectangle, `spacing` apart, and its normal at each of them."""
    along, across = (torch.tensor(side, dtype=torch.float64) for side in (along, across))
    steps = [torch.arange(0, 1 + 1e-9, spacing / float(torch.linalg.vector_norm(side))) for side in (along, across)]
    u, v = torch.meshgrid(*steps, indexing="ij")
    points = torch.tensor(corner) + u[..., None] * along + v[..., None] * across
    points = points.reshape(-1, 3).double()
    return points, torch.tensor(normal, dtype=torch.float64).expand(len(points), 3)


def room(*, has_floor=True, has_table=True):
    """A 5 x 4 room with three walls, a ceiling, and a table top of 1.5 x 1 at a height of 0.8."""
    parts = [
        patch((0.0, 0, 0), (0, 4, 0), (0, 0, 2.5), (1.0, 0, 0)),
        patch((0.0, 4, 0), (5, 0, 0), (0, 0, 2.5), (0.0, -1, 0)),
        patch((5.0, 0, 0), (0, 4, 0), (0, 0, 2.5), (-1.0, 0, 0)),
        patch((0.0, 0, 2.5), (5, 0, 0), (0, 4, 0), (0.0, 0, -1)),
    ]
    if has_floor:
        parts.append(patch((0.0, 0, 0), (5, 0, 0), (0, 4, 0), (0.0, 0, 1)))
    if has_table:
        parts.append(patch((2.0, 2, 0.8), (1.5, 0, 0), (0, 1, 0), (0.0, 0, 1)))
    return torch.cat([points for points, _ in parts]), torch.cat([normals for _, normals in parts])


def angle_deg(first, second):
    first, second = (torch.nn.functional.normalize(value.double(), dim=0) for value in (first, second))
    return math.degrees(
        math.atan2(float(torch.linalg.vector_norm(torch.linalg.cross(first, second))), float(first @ second))
    )


@pytest.mark.parametrize("tilt_deg", [0.0, 20.0, 40.0])
def test_find_floor_finds_the_floor_of_a_turned_noisy_room(tilt_deg):
    points, normals = room()
    generator = torch.Generator().manual_seed(0)
    points = points + 0.01 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    normals = normals + 0.15 * torch.randn(normals.shape, generator=generator, dtype=torch.float64)
    turn = torch.from_numpy(rigid(0.4, -0.7, 2.1, (3.0, -2.0, 5.0)))
    true_up = turn[:3, 2]
    tilted = torch.from_numpy(rigid(0.3, math.radians(tilt_deg), 0.0, (0, 0, 0)))[:3, :3]
    prior = turn[:3, :3] @ tilted[:, 2]
    assert angle_deg(prior, true_up) == pytest.approx(tilt_deg, abs=1e-5)
    floor = find_floor(
        points @ turn[:3, :3].T + turn[:3, 3],
        torch.nn.functional.normalize(normals, dim=1) @ turn[:3, :3].T,
        prior=prior,
        distance=2.5,
    )
    assert angle_deg(floor.up, true_up) < 0.15
    assert torch.linalg.vector_norm(floor.up) == pytest.approx(1)
    middle = turn @ torch.tensor([2.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    assert float(floor.up @ middle[:3]) == pytest.approx(floor.height, abs=0.005)


def test_find_floor_scales_with_the_cloud():
    points, normals = room()
    prior = torch.tensor([0.2, 0.1, 1.0])
    small = find_floor(0.01 * points, normals, prior=prior, distance=0.025)
    torch.testing.assert_close(small.up, torch.tensor([0.0, 0, 1], dtype=torch.float64), atol=1e-9, rtol=0)
    # Under the tolerance of a room a hundred times as large, everything lies on every plane.
    assert find_floor(0.01 * points, normals, prior=prior, distance=250.0).up[2] < 1 - 1e-9


def test_find_floor_takes_no_table_for_a_floor():
    points, normals = room(has_floor=False)
    assert find_floor(points, normals, prior=torch.tensor([0.0, 0, 1]), distance=2.5) is None


def test_find_floor_takes_no_wall_for_a_floor():
    points, normals = room(has_floor=False, has_table=False)
    assert find_floor(points, normals, prior=torch.tensor([0.6, 0, 1]), distance=2.5) is None


def test_find_floor_needs_more_than_a_few_points_of_floor():
    points, normals = room(has_floor=False, has_table=False)
    some = patch((0.0, 0, 0), (0.5, 0, 0), (0, 0.5, 0), (0.0, 0, 1))
    points, normals = torch.cat([points, some[0]]), torch.cat([normals, some[1]])
    assert find_floor(points, normals, prior=torch.tensor([0.0, 0, 1]), distance=2.5) is None


def test_scale_from_positions_is_that_of_the_best_similarity():
    """Against Umeyama's closed form, which is exact without noise, for any motion of the known frame."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    motion = torch.from_numpy(rigid(0.4, -0.7, 2.1, (3.0, -2.0, 5.0)))
    positions_m = 1.7 * centers @ motion[:3, :3].T + motion[:3, 3]
    assert scale_from_positions(centers, positions_m) == pytest.approx(1.7, rel=1e-12)
    assert scale_from_positions(positions_m, centers) == pytest.approx(1 / 1.7, rel=1e-12)


def test_scale_from_positions_favours_neither_side_under_noise():
    """Least squares of one side on the other would give less than 1 for the product: noise shrinks both."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    noisy = 2 * (centers + 0.1 * torch.randn(50, 3, generator=generator, dtype=torch.float64))
    assert scale_from_positions(centers, noisy) * scale_from_positions(noisy, centers) == pytest.approx(1, rel=1e-12)
    assert scale_from_positions(centers, noisy) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("kind", ["shuffled", "mirrored"])
def test_scale_from_positions_warns_where_the_trajectories_differ(monkeypatch, kind):
    messages = []
    monkeypatch.setattr(alignment_geode.logger, "warning", messages.append)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    scale_from_positions(centers, 2 * centers)
    assert messages == []
    known = centers.flip(0) if kind == "shuffled" else centers * torch.tensor([1.0, 1, -1])
    scale_from_positions(centers, known)
    assert len(messages) == 1
    assert "of their spread" in messages[0]


def test_scale_from_positions_refuses_what_gives_no_scale():
    centers = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3, 3\)"):
        scale_from_positions(centers, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="must be finite"):
        scale_from_positions(centers, torch.tensor([[0.0, 0, math.nan], [1, 0, 0]]))
    with pytest.raises(ValueError, match="the known positions of 2 cameras coincide"):
        scale_from_positions(centers, torch.ones(2, 3))
    with pytest.raises(ValueError, match="the reconstructed positions of 1 cameras coincide"):
        scale_from_positions(centers[:1], torch.ones(1, 3))


def test_scale_from_depth_is_a_median_over_valid_pixels():
    depth = torch.tensor([[[1.0, 2.0, 4.0, 8.0, 0.0, math.inf, 1.0]]])
    depth_m = torch.tensor([[[3.0, 6.0, 12.0, 1000.0, 5.0, 5.0, math.nan]]])
    assert scale_from_depth(depth, depth_m) == 3.0
    with pytest.raises(ValueError, match=r"shape of the reconstructed depth, \(1, 1, 7\), got \(1, 7\)"):
        scale_from_depth(depth, depth_m[0])
    with pytest.raises(ValueError, match="got none of 7"):
        scale_from_depth(depth, torch.zeros(1, 1, 7))


def test_scale_from_length_and_camera_height_divide_by_the_reconstructed_length():
    assert scale_from_length(torch.tensor([[1.0, 2, 2], [1, 5, 6]]), 2.5) == 0.5
    assert scale_from_camera_height(0.4, 1.6) == pytest.approx(4)
    with pytest.raises(ValueError, match="must be apart"):
        scale_from_length(torch.ones(2, 3), 1.0)
    with pytest.raises(ValueError, match="above the floor"):
        scale_from_camera_height(-0.1, 1.6)
    for length_m in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`length_m` must be a positive number of metres"):
            scale_from_length(torch.tensor([[1.0, 2, 2], [1, 5, 6]]), length_m)
        with pytest.raises(ValueError, match="`camera_height_m` must be a positive number of metres"):
            scale_from_camera_height(1.0, length_m)


def test_room_of_these_tests_has_the_floor_it_claims():
    points, normals = room()
    assert np.isclose(float(points[:, 2].min()), 0)
    assert 0.2 < float((normals[:, 2] == 1).double().mean()) < 0.45
