# SPDX-License-Identifier: Apache-2.0
"""Tests of the pure geometry functions. Oracles: slow loops, invariants and values derived by hand."""

import doctest
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from geode.modeling_geode import geometry_geode
from geode.modeling_geode.geometry_geode import (
    box_corners,
    crop_intrinsics,
    encode_camera_poses,
    estimate_normals,
    evenly_spaced_indices,
    farthest_point_indices,
    fov_from_intrinsics,
    invert_rigid,
    median_camera_distance,
    normals_from_depth,
    project_points,
    resize_intrinsics,
    rotation_about_z,
    rotation_aligning_to_z,
    transform_boxes,
    transform_points,
    unproject_depth,
    voxel_representatives,
    wrap_yaw,
)


HEIGHT, WIDTH = 5, 7
INTRINSICS = torch.tensor([[300.0, 0.0, 3.2], [0.0, 280.0, 1.9], [0.0, 0.0, 1.0]], dtype=torch.float64)
angles = st.floats(-20.0, 20.0)
coordinates = st.floats(-50.0, 50.0)
few_examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_rigid(*shape, seed=0):
    """Rigid maps from a QR decomposition, a route that shares nothing with the code under test."""
    rotation = torch.linalg.qr(random_tensor(*shape, 3, 3, seed=seed)).Q
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    matrix = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = random_tensor(*shape, 3, seed=seed + 1)
    return matrix


def upright_rigid(yaw, translation):
    cos, sin = math.cos(yaw), math.sin(yaw)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    matrix[:3, 3] = torch.tensor(translation, dtype=torch.float64)
    return matrix


# ---- rigid maps ----


def test_transform_points_equals_a_loop_over_homogeneous_coordinates():
    maps, points = random_rigid(2, seed=3), random_tensor(2, 4, 3)
    mapped = transform_points(maps, points)
    for batch, row in itertools.product(range(2), range(4)):
        expected = maps[batch].numpy() @ np.append(points[batch, row].numpy(), 1.0)
        np.testing.assert_allclose(mapped[batch, row].numpy(), expected[:3], atol=1e-12)


def test_invert_rigid_equals_the_general_matrix_inverse():
    maps = random_rigid(3, 2, seed=5)
    torch.testing.assert_close(invert_rigid(maps), torch.linalg.inv(maps), atol=1e-12, rtol=0)


@few_examples
@given(yaw=angles, offset=st.tuples(coordinates, coordinates, coordinates), seed=st.integers(0, 1000))
def test_invert_rigid_undoes_a_map(yaw, offset, seed):
    target_from_source = upright_rigid(yaw, offset) @ random_rigid(seed=seed)
    points = random_tensor(6, 3, seed=seed)
    back = transform_points(invert_rigid(target_from_source), transform_points(target_from_source, points))
    torch.testing.assert_close(back, points, atol=1e-10, rtol=0)


def test_rigid_functions_name_the_wrong_shape():
    with pytest.raises(ValueError, match=r"`target_from_source` must have shape \(\.\.\., 4, 4\), got \(3, 4\)"):
        invert_rigid(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"`points` must have shape \(\.\.\., num_points, 3\), got \(5, 2\)"):
        transform_points(torch.eye(4), torch.zeros(5, 2))


# ---- cameras ----


@pytest.mark.convention
def test_pixel_zero_zero_is_the_centre_of_the_top_left_pixel():
    # docs/conventions.md, "Pixels": fx 300, fy 280, cx 3.2, cy 1.9; pixel (u, v) = (2, 4) at depth 1.5.
    # x = (2 - 3.2) / 300 * 1.5 = -0.006; y = (4 - 1.9) / 280 * 1.5 = 0.01125.
    depth = torch.full((HEIGHT, WIDTH), 1.5, dtype=torch.float64)
    point = unproject_depth(depth, INTRINSICS)[4, 2]
    torch.testing.assert_close(point, torch.tensor([-0.006, 0.01125, 1.5], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.convention
def test_camera_looks_along_plus_z_with_x_right_and_y_down():
    # A point to the right, below and in front of the camera lands right of and below the principal point.
    pixel = project_points(torch.tensor([[0.1, 0.2, 2.0]], dtype=torch.float64), INTRINSICS)[0]
    torch.testing.assert_close(pixel, torch.tensor([18.2, 29.9], dtype=torch.float64))


def test_unproject_depth_is_inverse_of_projection_by_loop():
    depth = 0.5 + 9.5 * torch.rand(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = unproject_depth(depth, INTRINSICS.expand(2, 3, 3))
    for frame, v, u in itertools.product(range(2), range(HEIGHT), range(WIDTH)):
        x, y, z = points[frame, v, u].tolist()
        assert z == depth[frame, v, u].item()
        assert 300.0 * x / z + 3.2 == pytest.approx(u, abs=1e-9)
        assert 280.0 * y / z + 1.9 == pytest.approx(v, abs=1e-9)


def test_unproject_depth_maps_invalid_depth_to_the_origin():
    depth = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 0.0]])
    points = unproject_depth(depth, INTRINSICS.float())
    assert points[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert (points[..., 2] > 0).tolist() == [[False, True], [True, False], [True, False]]


def test_unproject_depth_refuses_one_camera_for_many_frames():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3\) to match `depth` of shape \(2, 5, 7\), got \(3, 3\)"):
        unproject_depth(torch.ones(2, HEIGHT, WIDTH), torch.eye(3))


@few_examples
@given(x=coordinates, y=coordinates, z=st.floats(0.1, 80.0))
def test_projection_equals_the_homogeneous_product(x, y, z):
    point = torch.tensor([x, y, z], dtype=torch.float64)
    homogeneous = INTRINSICS @ point
    torch.testing.assert_close(project_points(point[None], INTRINSICS)[0], homogeneous[:2] / homogeneous[2])


def test_project_points_gives_nan_behind_the_camera_and_no_gradient():
    points = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, -4.0], [1.0, 2.0, 0.0]], requires_grad=True)
    pixels = project_points(points, INTRINSICS.float())
    assert torch.isnan(pixels).tolist() == [[False, False], [True, True], [True, True]]
    pixels[0].sum().backward()
    assert points.grad[1:].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.convention
def test_resize_intrinsics_worked_example():
    # docs/conventions.md, "Pixels": a 12 x 20 image resized to 6 x 40.
    # cx: (10 + 0.5) * 2 - 0.5 = 20.5; cy: (6 + 0.5) / 2 - 0.5 = 2.75.
    intrinsics = torch.tensor([[300.0, 0.0, 10.0], [0.0, 280.0, 6.0], [0.0, 0.0, 1.0]])
    resized = resize_intrinsics(intrinsics, image_size=(12, 20), new_size=(6, 40))
    assert resized.tolist() == [[600.0, 0.0, 20.5], [0.0, 140.0, 2.75], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("new_size", [(10, 21), (15, 14), (5, 28)])
def test_resize_intrinsics_agrees_with_resizing_the_rays_of_an_image(new_size):
    # Rays are linear in the pixel, so bilinear resizing of the ray map is exact away from the border.
    rays = unproject_depth(torch.ones(HEIGHT, WIDTH, dtype=torch.float64), INTRINSICS)
    resized_rays = torch.nn.functional.interpolate(rays.permute(2, 0, 1)[None], new_size, mode="bilinear")[0]
    intrinsics = resize_intrinsics(INTRINSICS, image_size=(HEIGHT, WIDTH), new_size=new_size)
    expected = unproject_depth(torch.ones(new_size, dtype=torch.float64), intrinsics).permute(2, 0, 1)
    inner = (slice(None), slice(4, -4) if new_size[0] > 9 else slice(1, -1), slice(4, -4))
    torch.testing.assert_close(resized_rays[inner], expected[inner], atol=1e-12, rtol=0)


@few_examples
@given(new_height=st.integers(1, 900), new_width=st.integers(1, 900))
def test_resize_intrinsics_back_and_forth_is_the_identity_and_keeps_the_field_of_view(new_height, new_width):
    size, new_size = (480, 640), (new_height, new_width)
    resized = resize_intrinsics(INTRINSICS, image_size=size, new_size=new_size)
    torch.testing.assert_close(fov_from_intrinsics(resized, new_size), fov_from_intrinsics(INTRINSICS, size))
    torch.testing.assert_close(resize_intrinsics(resized, image_size=new_size, new_size=size), INTRINSICS)


def test_crop_intrinsics_agrees_with_cropping_the_rays_of_an_image():
    rays = unproject_depth(torch.ones(HEIGHT, WIDTH, dtype=torch.float64), INTRINSICS)
    cropped = unproject_depth(
        torch.ones(HEIGHT - 2, WIDTH - 3, dtype=torch.float64), crop_intrinsics(INTRINSICS, top=2, left=3)
    )
    torch.testing.assert_close(cropped, rays[2:, 3:], atol=1e-12, rtol=0)


@pytest.mark.convention
def test_field_of_view_spans_the_outer_edges_of_the_border_pixels():
    # docs/conventions.md, "Cameras": 30 rows, 40 columns, fx 20, fy 25, cx 9.5, cy 14.5.
    # Horizontal: atan(10 / 20) + atan(30 / 20) = 26.565 + 56.310 = 82.875 degrees; vertical: 2 atan(15 / 25) = 61.928.
    intrinsics = torch.tensor([[20.0, 0.0, 9.5], [0.0, 25.0, 14.5], [0.0, 0.0, 1.0]])
    fov_deg = torch.rad2deg(fov_from_intrinsics(intrinsics, (30, 40)))
    torch.testing.assert_close(fov_deg, torch.tensor([82.875, 61.928]), atol=1e-3, rtol=0)


@pytest.mark.convention
def test_camera_pose_encoding_worked_example():
    # docs/conventions.md, "Cameras": a camera at (5, 6, 7) that looks along world +y; its right is +x, its down is -z.
    world_from_cam = torch.tensor([[1.0, 0, 0, 5], [0, 0, 1, 6], [0, -1, 0, 7], [0, 0, 0, 1]])
    intrinsics = torch.tensor([[20.0, 0.0, 9.5], [0.0, 25.0, 14.5], [0.0, 0.0, 1.0]])
    encoded = encode_camera_poses(world_from_cam.expand(3, 4, 4), intrinsics.expand(3, 3, 3), (30, 40))
    expected = [5, 6, 7, 1, 0, 0, 0, 0, -1, math.atan(0.5) + math.atan(1.5), 2 * math.atan(0.6)]
    torch.testing.assert_close(encoded, torch.tensor(expected).expand(3, 11))


def test_camera_pose_encoding_determines_the_pose():
    world_from_cam = random_rigid(4, seed=9)
    encoded = encode_camera_poses(world_from_cam, INTRINSICS.expand(4, 3, 3), (HEIGHT, WIDTH))
    right, down = encoded[:, 3:6], encoded[:, 6:9]
    rotation = torch.stack([right, down, torch.linalg.cross(right, down)], dim=-1)
    torch.testing.assert_close(rotation, world_from_cam[:, :3, :3])
    torch.testing.assert_close(encoded[:, :3], world_from_cam[:, :3, 3])


def test_camera_pose_encoding_refuses_a_different_number_of_cameras():
    with pytest.raises(ValueError, match=r"`intrinsics` must have shape \(2, 3, 3\) .* got \(3, 3, 3\)"):
        encode_camera_poses(torch.eye(4).expand(2, 4, 4), torch.eye(3).expand(3, 3, 3), (4, 5))


# ---- rotations and boxes ----


@few_examples
@given(yaw=angles)
def test_rotation_about_z_equals_complex_multiplication(yaw):
    rotated = rotation_about_z(torch.tensor(yaw, dtype=torch.float64)) @ torch.tensor([2.0, 1.0, 5.0]).double()
    expected = complex(2.0, 1.0) * complex(math.cos(yaw), math.sin(yaw))
    torch.testing.assert_close(rotated, torch.tensor([expected.real, expected.imag, 5.0], dtype=torch.float64))


def test_rotation_aligning_to_z_is_a_rotation_about_an_axis_orthogonal_to_both():
    up = random_tensor(50, 3, seed=1) * 7
    rotation = rotation_aligning_to_z(up)
    identity = torch.eye(3, dtype=torch.float64).expand(50, 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50, dtype=torch.float64))
    mapped = (rotation @ up[..., None])[..., 0]
    torch.testing.assert_close(mapped, torch.linalg.vector_norm(up, dim=1)[:, None] * identity[:, 2])
    # The smallest rotation leaves the common normal of both directions where it is.
    axis = torch.linalg.cross(up, identity[:, 2])
    torch.testing.assert_close((rotation @ axis[..., None])[..., 0], axis)


def test_rotation_aligning_to_z_leaves_an_upright_frame_untouched_to_the_bit():
    rotation = rotation_aligning_to_z(torch.tensor([0.0, 0.0, 9.81]))
    assert torch.equal(rotation, torch.eye(3))
    assert not torch.signbit(rotation).any()


@pytest.mark.parametrize("up", [(0.0, 0.0, -3.0), (1e-9, -1e-9, -1.0)])
def test_rotation_aligning_to_z_of_the_opposite_direction_is_half_a_turn_about_x(up):
    assert rotation_aligning_to_z(torch.tensor(up)).tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, -1]]


@pytest.mark.parametrize("up", [(0.0, 0.0, 0.0), (0.0, math.nan, 1.0)])
def test_rotation_aligning_to_z_refuses_no_direction(up):
    with pytest.raises(ValueError, match=r"`up` must be a finite direction of positive length, got \[0.0, (0.0|nan)"):
        rotation_aligning_to_z(torch.tensor(up))


@pytest.mark.convention
def test_wrap_yaw_includes_plus_and_excludes_minus_a_quarter_turn():
    # docs/conventions.md, "Boxes".
    degrees = torch.tensor([90.0, -90.0, 91.0, -91.0, 180.0, 270.0, 370.0], dtype=torch.float64)
    wrapped = torch.rad2deg(wrap_yaw(torch.deg2rad(degrees)))
    expected = torch.tensor([90.0, 90.0, -89.0, 89.0, 0.0, 90.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(wrapped, expected, atol=1e-9, rtol=0)


@few_examples
@given(yaw=angles)
def test_wrap_yaw_changes_by_whole_half_turns_and_is_idempotent(yaw):
    wrapped = wrap_yaw(torch.tensor(yaw, dtype=torch.float64))
    turns = (yaw - wrapped.item()) / math.pi
    assert turns == pytest.approx(round(turns), abs=1e-9)
    assert -math.pi / 2 < wrapped.item() <= math.pi / 2 + 1e-12
    assert wrap_yaw(wrapped).item() == pytest.approx(wrapped.item(), abs=1e-12)


@pytest.mark.convention
def test_box_corners_worked_example():
    # docs/conventions.md, "Boxes": a 4 x 2 x 6 box at (1, 2, 3) turned by a quarter turn: its x axis points along +y.
    corners = box_corners(torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 6.0, math.pi / 2], dtype=torch.float64))
    expected = [[2, 0, 0], [2, 0, 6], [0, 0, 0], [0, 0, 6], [2, 4, 0], [2, 4, 6], [0, 4, 0], [0, 4, 6]]
    torch.testing.assert_close(corners, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_box_corners_equal_a_loop_in_batches():
    boxes = random_tensor(2, 3, 7, seed=4).abs() + 0.1
    corners = box_corners(boxes)
    for row, column in itertools.product(range(2), range(3)):
        cx, cy, cz, dx, dy, dz, yaw = boxes[row, column].tolist()
        signs = itertools.product((-1, 1), repeat=3)
        for index, (i, j, k) in enumerate(signs):
            x, y = i * dx / 2, j * dy / 2
            expected = [
                cx + x * math.cos(yaw) - y * math.sin(yaw),
                cy + x * math.sin(yaw) + y * math.cos(yaw),
                cz + k * dz / 2,
            ]
            assert corners[row, column, index].tolist() == pytest.approx(expected, abs=1e-12)


@few_examples
@given(map_yaw=angles, box_yaw=angles, offset=st.tuples(coordinates, coordinates, coordinates))
def test_transform_boxes_moves_the_corners_like_points(map_yaw, box_yaw, offset):
    scene_from_dataset = upright_rigid(map_yaw, offset)
    box = torch.tensor([[1.0, -2.0, 0.5, 3.0, 1.5, 0.7, box_yaw]], dtype=torch.float64)
    mapped = transform_boxes(box, scene_from_dataset)
    assert -math.pi / 2 <= mapped[0, 6].item() <= math.pi / 2 + 1e-12
    expected = transform_points(scene_from_dataset, box_corners(box))[0]
    # Half a turn swaps corner (i, j, k) with (1 - i, 1 - j, k).
    corners = box_corners(mapped)[0]
    error = min((corners[list(order)] - expected).abs().max().item() for order in (range(8), (6, 7, 4, 5, 2, 3, 0, 1)))
    assert error < 1e-9


def test_transform_boxes_names_the_tilt():
    tilted = torch.eye(4)
    tilted[1:3, 1:3] = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    with pytest.raises(ValueError, match=r"within 0.5 degrees.*tilts it by 28.6 degrees.*`up`"):
        transform_boxes(torch.zeros(2, 7), tilted)
    with pytest.raises(ValueError, match=r"tilts it by 180.0 degrees"):
        transform_boxes(torch.zeros(2, 7), torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])))
    with pytest.raises(ValueError, match=r"`scene_from_dataset` must have shape \(4, 4\), got \(2, 4, 4\)"):
        transform_boxes(torch.zeros(2, 7), torch.eye(4).expand(2, 4, 4))


# ---- normals and choices of points ----


def tilted_plane_depth(normal, distance):
    """Z-depth of the plane `normal . p = distance`, by a loop over pixels."""
    depth = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for v, u in itertools.product(range(HEIGHT), range(WIDTH)):
        ray = ((u - 3.2) / 300.0, (v - 1.9) / 280.0, 1.0)
        depth[v, u] = distance / sum(n * r for n, r in zip(normal, ray, strict=True))
    return depth


@pytest.mark.parametrize("step", [1, 2])
def test_normals_from_depth_are_exact_on_a_tilted_plane(step):
    normal = torch.tensor([0.48, -0.6, -0.64], dtype=torch.float64)
    depth = tilted_plane_depth(normal.tolist(), -2.0)
    depth[0, 0] = 0.0
    normals = normals_from_depth(depth, INTRINSICS, step=step)
    assert normals[0, 0].tolist() == [0.0, 0.0, 0.0]
    normals[0, 0] = normal
    torch.testing.assert_close(normals, normal.expand(HEIGHT, WIDTH, 3), atol=1e-9, rtol=0)


def test_normals_from_depth_do_not_mix_the_sides_of_an_edge():
    depth = torch.full((HEIGHT, WIDTH), 3.0, dtype=torch.float64)
    depth[:, 4:] = 1.0
    normals = normals_from_depth(depth, INTRINSICS)
    assert normals.tolist() == torch.tensor([0.0, 0.0, -1.0]).expand(HEIGHT, WIDTH, 3).tolist()


def test_normals_from_depth_face_the_camera_whatever_the_depth():
    depth = 0.1 + 9.9 * torch.rand(40, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    normals = normals_from_depth(depth, INTRINSICS)
    torch.testing.assert_close(torch.linalg.vector_norm(normals, dim=-1), torch.ones(40, 50, dtype=torch.float64))
    assert (normals * unproject_depth(depth, INTRINSICS)).sum(dim=-1).max() < 0


def test_normals_from_depth_are_zero_without_neighbours():
    depth = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    depth[2, 3] = 1.0
    depth[4] = 1.0
    assert normals_from_depth(depth, INTRINSICS).abs().max() == 0
    assert normals_from_depth(torch.ones(1, 1), torch.eye(3)).tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.fixture(params=["k-d tree", "all pairs"])
def neighbor_search(request, monkeypatch):
    if request.param == "all pairs":
        monkeypatch.setattr(geometry_geode, "cKDTree", None)
    return request.param


@pytest.mark.usefixtures("neighbor_search")
def test_estimate_normals_of_a_sphere_are_its_radii():
    points = torch.nn.functional.normalize(random_tensor(2000, 3, seed=2), dim=1) * 3.0
    inside = estimate_normals(points, camera_centers=torch.tensor([[0.2, -0.1, 0.3]], dtype=torch.float64))
    cosine = (inside * -points / 3.0).sum(dim=1)
    # 16 neighbours of 2,000 points span about 0.1 of the radius; the fit is off by a few degrees at most.
    assert cosine.min() > math.cos(math.radians(12))
    assert cosine.mean() > math.cos(math.radians(3))
    upward = estimate_normals(points)
    assert upward[:, 2].min() >= 0
    torch.testing.assert_close((upward * inside).sum(dim=1).abs(), torch.ones(2000, dtype=torch.float64))


@pytest.mark.usefixtures("neighbor_search")
def test_estimate_normals_face_the_nearest_camera():
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(4.0), torch.zeros(1))
    centers = torch.tensor([[0.0, 1.5, -2.0], [9.0, 1.5, 2.0]])
    normals = estimate_normals(grid, camera_centers=centers, num_neighbors=7)
    expected = torch.where((grid[:, :1] < 4.5), -1.0, 1.0)
    torch.testing.assert_close(normals, torch.cat([torch.zeros(24, 2), expected], dim=1))


def test_estimate_normals_refuses_two_points():
    with pytest.raises(ValueError, match=r"at least 3 points and 3 neighbours, got 2 points and `num_neighbors`=2"):
        estimate_normals(torch.zeros(2, 3))


def farthest_by_loop(points, count):
    chosen = [0]
    while len(chosen) < count:
        best, best_distance = None, -1.0
        for index in range(len(points)):
            distance = min(sum((a - b) ** 2 for a, b in zip(points[index], points[c], strict=True)) for c in chosen)
            if index not in chosen and distance > best_distance:
                best, best_distance = index, distance
        chosen.append(best)
    return chosen


def test_farthest_point_indices_equal_a_loop_in_batches():
    points = random_tensor(2, 30, 3, seed=6)
    chosen = farthest_point_indices(points, 11)
    assert chosen.tolist() == [farthest_by_loop(cloud.tolist(), 11) for cloud in points]


def test_farthest_point_indices_are_distinct_even_if_points_coincide():
    assert farthest_point_indices(torch.ones(4, 3), 4).tolist() == [0, 1, 2, 3]


def test_farthest_point_indices_refuse_more_points_than_there_are():
    with pytest.raises(ValueError, match=r"at most the 4 points of `points`, got 5"):
        farthest_point_indices(torch.ones(4, 3), 5)


def test_median_camera_distance_equals_a_loop():
    points, centers = random_tensor(40, 3, seed=7), random_tensor(3, 3, seed=8)
    distances = sorted(math.dist(p, c) for p in points.tolist() for c in centers.tolist())
    assert median_camera_distance(points, centers).item() == pytest.approx(distances[59], abs=1e-12)


def test_median_camera_distance_bounds_its_work_by_even_spacing():
    # Distances 0, 1, ..., 32767: of 16,384 evenly spaced ones the lower middle is index 8191 * 32767 // 16383.
    points = torch.zeros(32768, 3, dtype=torch.float64)
    points[:, 1] = torch.arange(32768)
    assert median_camera_distance(points, torch.zeros(1, 3, dtype=torch.float64)).item() == 8191 * 32767 // 16383


@few_examples
@given(count=st.integers(0, 300), num_indices=st.integers(1, 40))
def test_evenly_spaced_indices_increase_and_hold_both_ends(count, num_indices):
    indices = evenly_spaced_indices(count, num_indices)
    assert len(indices) == min(count, num_indices)
    gaps = [b - a for a, b in itertools.pairwise(indices)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert not indices or indices[0] == 0
    assert len(indices) < 2 or indices[-1] == count - 1


def voxels_by_loop(points, size, origin):
    best = {}
    for index, point in enumerate(points):
        scaled = [(p - o) / size for p, o in zip(point, origin, strict=True)]
        cell = tuple(math.floor(value) for value in scaled)
        off_center = sum((value - c - 0.5) ** 2 for value, c in zip(scaled, cell, strict=True))
        if cell not in best or off_center < best[cell][0]:
            best[cell] = (off_center, index)
    return sorted(index for _, index in best.values())


def test_voxel_representatives_equal_a_loop():
    points, origin = random_tensor(400, 3, seed=10), torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    rows, voxel_of_point = voxel_representatives(points, 0.7, origin=origin)
    assert len(rows) < 300
    assert rows.tolist() == voxels_by_loop(points.tolist(), 0.7, origin.tolist())
    cells = torch.floor((points - origin) / 0.7)
    assert torch.equal(cells[rows][voxel_of_point], cells)


def test_voxel_representatives_of_parts_are_those_of_the_whole():
    points, origin = random_tensor(300, 3, seed=11), torch.zeros(3, dtype=torch.float64)
    whole = points[voxel_representatives(points, 0.9, origin=origin)[0]]
    parts = torch.cat(
        [part[voxel_representatives(part, 0.9, origin=origin)[0]] for part in points.split([70, 200, 30])]
    )
    again = parts[voxel_representatives(parts, 0.9, origin=origin)[0]]
    assert {tuple(p) for p in again.tolist()} == {tuple(p) for p in whole.tolist()}


def test_voxel_representatives_keep_the_first_of_equals_and_nothing_of_nothing():
    points = torch.tensor([[0.25, 0.5, 0.5], [0.75, 0.5, 0.5]])
    rows, voxel_of_point = voxel_representatives(points, 1.0, origin=torch.zeros(3))
    assert (rows.tolist(), voxel_of_point.tolist()) == ([0], [0, 0])
    assert [len(part) for part in voxel_representatives(torch.zeros(0, 3), 1.0, origin=torch.zeros(3))] == [0, 0]


def test_voxel_representatives_refuse_a_cloud_of_too_many_voxels():
    points = torch.tensor([[0.0, 0.0, 0.0], [2.0**21, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"2097153 voxels of edge 1 wide; at most 2097152 fit"):
        voxel_representatives(points, 1.0, origin=points[0])


# ---- gradients ----


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (invert_rigid, (random_rigid(2, seed=1),)),
        (transform_points, (random_rigid(2, seed=1), random_tensor(2, 4, 3))),
        (unproject_depth, (random_tensor(2, 3, 4).abs() + 1, INTRINSICS.repeat(2, 1, 1))),
        (project_points, (random_tensor(2, 4, 3).abs() + 1, INTRINSICS.repeat(2, 1, 1))),
        (lambda k: resize_intrinsics(k, image_size=(5, 7), new_size=(8, 3)), (INTRINSICS.clone(),)),
        (lambda k: crop_intrinsics(k, top=1, left=2), (INTRINSICS.clone(),)),
        (lambda k: fov_from_intrinsics(k, (5, 7)), (INTRINSICS.repeat(2, 1, 1),)),
        (lambda p, k: encode_camera_poses(p, k, (5, 7)), (random_rigid(2, seed=1), INTRINSICS.repeat(2, 1, 1))),
        (rotation_about_z, (random_tensor(3),)),
        (rotation_aligning_to_z, (random_tensor(3, 3, seed=2),)),
        (box_corners, (random_tensor(2, 7),)),
        (transform_boxes, (random_tensor(2, 7), upright_rigid(0.4, (1.0, 2.0, 3.0)))),
        (normals_from_depth, (tilted_plane_depth((0.48, -0.6, -0.64), -2.0) * 1000, INTRINSICS.clone())),
    ],
    ids=lambda value: getattr(value, "__name__", "inputs"),
)
def test_gradients_equal_finite_differences(function, inputs):
    assert gradcheck(function, tuple(value.clone().requires_grad_() for value in inputs))


@pytest.mark.convention
def test_examples_of_the_conventions_page_hold():
    page = Path(__file__).resolve().parents[2] / "docs" / "conventions.md"
    results = doctest.testfile(str(page), module_relative=False)
    assert (results.failed, results.attempted) == (0, 19)
