# SPDX-License-Identifier: Apache-2.0
"""Tests of scene geometry and scene encodings. The oracle is the room of `common_scene_geode.py`."""

import hashlib
import itertools
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from geode.modeling_geode import scene_geode
from geode.modeling_geode.geometry_geode import box_corners, encode_camera_poses, transform_points
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry, collate_scenes
from tests.modeling_geode.common_scene_geode import (
    CAMERA_HEIGHT,
    CX,
    CY,
    FINE,
    FX,
    FY,
    HEIGHT,
    HIGH,
    LOW,
    WIDTH,
    Room,
    in_order,
    pose_by_hand,
    rigid,
    scaled_room,
)


@pytest.fixture(scope="module")
def room():
    return Room()


# ---- from RGB-D ----


@pytest.mark.convention
def test_from_rgbd_puts_every_pixel_where_its_ray_meets_a_wall(room):
    # docs/conventions.md, "Scene frame": up was +z already, so the map is a pure shift to the floor below the first
    # camera.
    scene = room.build(voxel_size_m=FINE)
    assert scene.num_points == 3 * HEIGHT * WIDTH
    expected = in_order(room.points - np.array([0.4, 0.2, -0.3]), room.images / 255)
    np.testing.assert_allclose(in_order(scene.points, scene.colors), expected, atol=2e-6)
    expected = np.eye(4)
    expected[:3, 3] = (-0.4, -0.2, 0.3)
    np.testing.assert_allclose(scene.scene_from_dataset.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(scene.world_from_cam.numpy(), expected @ room.world_from_cam, atol=1e-6)
    assert (scene.gravity, scene.scale_source, scene.is_metric) == ("given", "metric", True)
    assert scene.image_size == (HEIGHT, WIDTH)


def test_from_rgbd_gives_the_normals_of_the_walls(room):
    scene = room.build(voxel_size_m=FINE)
    got = in_order(scene.points, scene.normals)[:, 3:]
    expected = in_order(room.points - np.array([0.4, 0.2, -0.3]), room.normals)[:, 3:]
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-6)
    exact = np.abs(got - expected).max(axis=1) < 1e-4
    # Pixels at the room's edges may take a neighbour on the other wall.
    assert exact.mean() > 0.85


def test_from_rgbd_keeps_one_pixel_per_voxel_and_its_own_colour(room):
    fine, scene = room.build(voxel_size_m=FINE), room.build(voxel_size_m=0.25)
    known = {tuple(p): tuple(c) for p, c in zip(fine.points.tolist(), fine.colors.tolist(), strict=True)}
    assert 200 < scene.num_points < fine.num_points / 2
    # The floor is a percentile of the thinned cloud; both lie in the floor, so the points agree.
    assert all(known[tuple(p)] == tuple(c) for p, c in zip(scene.points.tolist(), scene.colors.tolist(), strict=True))
    cells = torch.floor((scene.points.double() - torch.tensor([0.0, 0.0, CAMERA_HEIGHT])) / 0.25)
    assert (
        len(torch.unique(cells, dim=0)) >= 0.97 * scene.num_points
    )  # points on the border of a voxel round either way


def test_a_voxel_keeps_the_mean_of_the_normals_on_the_side_of_its_own():
    # Voxel edge 1, so the first point is nearest to the centre (0.5, 0.5, 0.5) of its voxel. Of the other two one
    # faces its way: (0, 0, 1) + (0.6, 0, 0.8) = (0.6, 0, 1.8), of length 0.6 * sqrt(10).
    points = np.array([[0.5, 0.5, 0.4], [0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [3.0, 3.0, 0.4]])
    normals = np.array([[0.0, 0, 1], [0.6, 0, 0.8], [0, 0.6, -0.8], [1, 0, 0]])
    scene = SceneGeometry.from_point_cloud(
        points,
        normals=normals,
        world_from_cam=np.eye(4)[None],
        intrinsics=np.eye(3)[None],
        image_size=(2, 3),
        up=(0, 0, 1),
        voxel_size_m=1.0,
    )
    expected = torch.tensor([[1 / math.sqrt(10), 0, 3 / math.sqrt(10)], [1, 0, 0]])
    torch.testing.assert_close(scene.normals, expected)
    torch.testing.assert_close(scene.points[:, :2], torch.tensor([[0.5, 0.5], [3.0, 3.0]]))


def test_a_pixel_without_neighbours_faces_its_camera():
    depth = np.zeros((1, 3, 4))
    depth[0, 2, 3] = 2.0
    intrinsics = np.array([[[2.0, 0, 1], [0, 4, 0], [0, 0, 1]]])
    scene = SceneGeometry.from_rgbd(depth, intrinsics, np.eye(4)[None], up=(0, 0, 1))
    # The ray is ((3 - 1) / 2, 2 / 4, 1) = (1, 0.5, 1), of length 1.5.
    torch.testing.assert_close(scene.normals, torch.tensor([[-2 / 3, -1 / 3, -2 / 3]]))


def test_from_rgbd_drops_invalid_depth_and_the_least_confident_fifth(room):
    depth = room.depth.copy()
    depth[0, 2, 3], depth[1, 4, 5], depth[2, 6, 7] = 0.0, math.nan, math.inf
    scene = room.build(depth=depth, voxel_size_m=FINE)
    assert scene.num_points == 3 * HEIGHT * WIDTH - 3
    valid = np.isfinite(depth) & (depth > 0)
    confidence = np.arange(depth.size, dtype=np.float32)[::-1].reshape(depth.shape)
    scene = room.build(depth=depth, depth_confidence=confidence, voxel_size_m=FINE)
    # 1,401 valid pixels: the 280 last ones have the lowest confidence.
    kept = np.flatnonzero(valid)[:-280]
    expected = in_order(room.points.reshape(-1, 3)[kept] - np.array([0.4, 0.2, -0.3]))
    np.testing.assert_allclose(in_order(scene.points), expected, atol=2e-6)
    equal = room.build(depth_confidence=np.ones_like(depth), voxel_size_m=FINE)
    assert equal.num_points == depth.size


def test_from_rgbd_takes_a_frame_without_any_valid_depth(room):
    depth = room.depth.copy()
    depth[1] = 0.0
    assert room.build(depth=depth, voxel_size_m=FINE).num_points == 2 * HEIGHT * WIDTH


def test_from_rgbd_without_images_has_black_points(room):
    assert room.build(images=None).colors.abs().max() == 0


@pytest.mark.parametrize("limit", [1, 50, 300])
def test_from_rgbd_thins_to_max_points_deterministically(room, limit):
    scene, again = room.build(max_points=limit), room.build(max_points=limit)
    assert limit / 3 <= scene.num_points <= limit
    assert torch.equal(scene.points, again.points)
    # The frame does not depend on the limit, so the points are points of the whole cloud, to the bit.
    whole = room.build()
    assert torch.equal(scene.scene_from_dataset, whole.scene_from_dataset)
    assert {tuple(p) for p in scene.points.tolist()} <= {tuple(p) for p in whole.points.tolist()}


def test_from_rgbd_does_not_change_its_inputs(room):
    before = room.depth.copy(), room.world_from_cam.copy()
    room.build()
    assert np.array_equal(room.depth, before[0])
    assert np.array_equal(room.world_from_cam, before[1])


def test_normals_of_noisy_depth_stay_near_the_walls(room):
    # 5 mm of noise swamps a difference between neighbouring pixels, which are 4 mm apart on the wall.
    generator = torch.Generator().manual_seed(0)
    depth = 2.0 + 0.005 * torch.randn(1, 96, 128, generator=generator)
    intrinsics = torch.tensor([[[500.0, 0.0, 60.0], [0.0, 510.0, 50.0], [0.0, 0.0, 1.0]]])
    scene = SceneGeometry.from_rgbd(depth, intrinsics, np.eye(4)[None], up=(0, -1, 0), voxel_size_m=0.02)
    # The wall is at z = 2 of the camera and faces it; the map takes camera z to scene y.
    assert (-scene.normals[:, 1]).median() > math.cos(math.radians(20))


# ---- the scene frame ----


@pytest.mark.convention
def test_scene_frame_of_a_y_down_dataset_worked_example():
    # docs/conventions.md, "Scene frame": up is -y; the smallest rotation keeps x and takes (x, y, z) to (x, z, -y).
    # Camera at (1, -1.2, 5), floor at y = 0.4: the point (2, -0.6, 9) goes to (2 - 1, 9 - 5, 0.6 + 0.4).
    floor = [[x, 0.4, z] for x in range(5) for z in range(5)]
    pose = np.eye(4)
    pose[:3, 3] = (1.0, -1.2, 5.0)
    scene = SceneGeometry.from_point_cloud(
        np.array([*floor, [2.0, -0.6, 9.0]]),
        world_from_cam=pose[None],
        intrinsics=np.array([[[FX, 0, CX], [0, FY, CY], [0, 0, 1]]]),
        image_size=(HEIGHT, WIDTH),
        up=(0, -1, 0),
        voxel_size_m=None,
    )
    torch.testing.assert_close(scene.points[-1], torch.tensor([1.0, 4.0, 1.0]))
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    torch.testing.assert_close(scene.world_from_cam[0], expected)


@pytest.mark.convention
def test_without_gravity_up_is_the_first_cameras_minus_y(room):
    # docs/conventions.md, "Gravity".
    scene = room.build(up=None, voxel_size_m=FINE)
    assert scene.gravity == "assumed"
    down = scene.world_from_cam[0, :3, 1]
    torch.testing.assert_close(down, torch.tensor([0.0, 0.0, -1.0]), atol=1e-6, rtol=0)
    assert scene.world_from_cam[0, :2, 3].abs().max() < 1e-6
    mapped = transform_points(scene.scene_from_dataset, torch.tensor(room.points).reshape(-1, 3))
    np.testing.assert_allclose(in_order(scene.points), in_order(mapped), atol=1e-5)


@pytest.mark.convention
def test_without_cameras_the_origin_is_the_middle_of_the_floor(room):
    # docs/conventions.md, "Scene frame": the bounding box of the room is centred at (1.0, 0.2).
    corners = np.array(list(itertools.product(*zip(LOW, HIGH, strict=True))))
    points = np.concatenate([corners, room.points.reshape(-1, 3)])
    scene = SceneGeometry.from_point_cloud(points, voxel_size_m=None)
    assert scene.gravity == "assumed"
    assert scene.num_cameras == 0
    np.testing.assert_allclose(scene.points.numpy(), points - np.array([1.0, 0.2, -0.3]), atol=1e-6)


@pytest.mark.convention
def test_floor_is_the_first_percentile_of_the_heights():
    # 1,000 heights 0, 0.001, ..., 0.999: the 10th lowest, 0.009, becomes 0.
    points = np.stack([np.arange(1000) % 37, np.arange(1000) % 11, np.arange(1000) * 1e-3], axis=1)
    scene = SceneGeometry.from_point_cloud(points, voxel_size_m=None)
    assert scene.points[:, 2].sort().values[9].item() == pytest.approx(0.0, abs=1e-7)
    assert scene.scene_from_dataset[2, 3].item() == pytest.approx(-0.009, abs=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    tilt=st.tuples(st.floats(-3.1, 3.1), st.floats(-1.5, 1.5), st.floats(-3.1, 3.1)),
    translation=st.tuples(*[st.floats(-1e4, 1e4)] * 3),
)
def test_scene_does_not_depend_on_the_frame_of_the_dataset(tilt, translation):
    room = Room()
    moved_from_dataset = rigid(*tilt, translation)
    scene = room.build(voxel_size_m=FINE)
    moved = room.build(
        world_from_cam=moved_from_dataset @ room.world_from_cam, up=moved_from_dataset[:3, 2], voxel_size_m=FINE
    )
    # Yaw is free; heights and the distance to the vertical through the first camera are not.
    for quantity in (lambda p: p[:, 2], lambda p: torch.linalg.vector_norm(p[:, :2], dim=1)):
        torch.testing.assert_close(
            quantity(moved.points).sort().values, quantity(scene.points).sort().values, atol=1e-4, rtol=0
        )
    moved_points = torch.tensor(room.points).reshape(-1, 3) @ torch.tensor(moved_from_dataset[:3, :3]).T
    moved_points = moved_points + torch.tensor(translation, dtype=torch.float64)
    mapped = transform_points(moved.scene_from_dataset, moved_points)
    torch.testing.assert_close(mapped[:, 2].sort().values.float(), scene.points[:, 2].sort().values, atol=1e-4, rtol=0)


def test_both_constructors_agree(room):
    from_depth = room.build(voxel_size_m=FINE)
    from_points = SceneGeometry.from_point_cloud(
        room.points.reshape(-1, 3),
        colors=room.images.reshape(-1, 3),
        normals=room.normals.reshape(-1, 3) * 7.0,
        world_from_cam=room.world_from_cam,
        intrinsics=room.intrinsics,
        image_size=(HEIGHT, WIDTH),
        up=(0, 0, 9.81),
        voxel_size_m=FINE,
    )
    expected = in_order(from_depth.points, from_depth.colors)
    np.testing.assert_allclose(in_order(from_points.points, from_points.colors), expected, atol=2e-6)
    torch.testing.assert_close(from_points.world_from_cam, from_depth.world_from_cam)
    expected = in_order(room.points - np.array([0.4, 0.2, -0.3]), room.normals)
    np.testing.assert_allclose(in_order(from_points.points, from_points.normals), expected, atol=2e-6)


def test_from_point_cloud_estimates_normals_that_face_the_cameras(room):
    # On a dense floor and wall the normals of the planes, towards the camera between them.
    grid = np.stack(np.meshgrid(np.arange(0, 2, 0.05), np.arange(0, 1.5, 0.05), [0.0], indexing="ij"), -1).reshape(
        -1, 3
    )
    wall = grid[:, [2, 1, 0]] + np.array([-0.5, 0.0, 0.5])
    scene = SceneGeometry.from_point_cloud(
        np.concatenate([grid, wall]),
        world_from_cam=pose_by_hand((1.0, 0.7, 1.0), 180.0, 0.0)[None],
        intrinsics=room.intrinsics[:1],
        image_size=(HEIGHT, WIDTH),
        up=(0, 0, 1),
    )
    assert scene.num_points == 2400
    expected = torch.where(scene.points[:, 2:] < 0.2, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(scene.normals, expected, atol=1e-5, rtol=0)
    # The same in a dataset whose up is -y, far away: the smallest rotation back is the one that was undone.
    dataset_from_scene = np.array([[1.0, 0, 0, 30], [0, 0, -1, 200], [0, 1, 0, -70], [0, 0, 0, 1]])
    points = np.concatenate([grid, wall]) @ dataset_from_scene[:3, :3].T + dataset_from_scene[:3, 3]
    poses = dataset_from_scene @ pose_by_hand((1.0, 0.7, 1.0), 180.0, 0.0)[None]
    for normals in (None, expected.numpy() @ dataset_from_scene[:3, :3].T):
        far = SceneGeometry.from_point_cloud(
            points,
            normals=normals,
            world_from_cam=poses,
            intrinsics=room.intrinsics[:1],
            image_size=(HEIGHT, WIDTH),
            up=(0, -1, 0),
        )
        torch.testing.assert_close(far.points, scene.points, atol=1e-5, rtol=0)
        torch.testing.assert_close(far.normals, expected, atol=1e-5, rtol=0)


def test_from_point_cloud_takes_float_colours(room):
    colors = np.random.default_rng(1).random((40, 3))
    points = room.points.reshape(-1, 3)[:40]
    scene = SceneGeometry.from_point_cloud(points, colors=colors, voxel_size_m=None)
    np.testing.assert_allclose(scene.colors.numpy(), colors, atol=1e-7)
    assert SceneGeometry.from_point_cloud(points).colors.abs().max() == 0


@pytest.mark.parametrize("voxel_size_m", [None, 0.1])
def test_from_point_cloud_thins_to_max_points_in_the_frame_of_the_whole(voxel_size_m):
    # Heights are uniform, so a percentile of fewer points would be another height.
    points = np.random.default_rng(2).random((2000, 3)) * np.array([3.0, 2.0, 1.0])
    whole = SceneGeometry.from_point_cloud(points, voxel_size_m=voxel_size_m)
    scene = SceneGeometry.from_point_cloud(points, voxel_size_m=voxel_size_m, max_points=60)
    assert 20 <= scene.num_points <= 60
    assert {tuple(p) for p in scene.points.tolist()} <= {tuple(p) for p in whole.points.tolist()}


# ---- boxes and scale ----


@pytest.mark.convention
def test_boxes_go_the_way_of_the_points(room):
    # docs/conventions.md, "Boxes".
    turn = rigid(0.7, 0.0, 0.0, (3.0, -2.0, 1.0))
    scene = room.build(world_from_cam=turn @ room.world_from_cam, voxel_size_m=FINE)
    boxes = torch.tensor([[3.5, -1.5, 1.2, 1.0, 0.5, 0.4, 1.5], [2.0, -3.0, 0.9, 0.3, 2.0, 1.0, -0.2]])
    corners = box_corners(scene.boxes_in_scene(boxes.numpy()))
    expected = transform_points(scene.scene_from_dataset, box_corners(boxes.double())).float()
    torch.testing.assert_close(corners, expected, atol=1e-5, rtol=0)
    # The smallest rotation of an upright dataset is none, so the yaw stays.
    assert torch.equal(scene.boxes_in_scene(boxes)[:, 6], boxes[:, 6])


def test_boxes_of_a_tilted_scene_are_refused(room):
    scene = room.build(up=None)
    with pytest.raises(ValueError, match=r"tilts it by 12.0 degrees. Give the dataset's up direction as `up`"):
        scene.boxes_in_scene(torch.zeros(1, 7))


@pytest.mark.convention
def test_with_scale_brings_points_cameras_and_boxes_to_metres(room):
    # docs/conventions.md, "Scale": points = metres_per_unit * (scene_from_dataset @ points_dataset).
    unscaled = scaled_room(room, 0.25, voxel_size_m=FINE)
    assert (unscaled.is_metric, unscaled.scale_source, unscaled.metres_per_unit) == (False, "unknown", 1.0)
    scene, metric = unscaled.with_scale(4.0, "length"), room.build(voxel_size_m=FINE)
    assert (scene.is_metric, scene.scale_source, scene.metres_per_unit) == (True, "length", 4.0)
    np.testing.assert_allclose(in_order(scene.points), in_order(metric.points), atol=5e-6)
    torch.testing.assert_close(scene.world_from_cam, metric.world_from_cam, atol=1e-6, rtol=1e-6)
    boxes = torch.tensor([[0.5, -0.2, 0.7, 1.0, 0.5, 0.4, 1.5]])
    small = boxes * torch.tensor([0.25] * 6 + [1.0])
    torch.testing.assert_close(scene.boxes_in_scene(small), metric.boxes_in_scene(boxes), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_voxels_of_a_scene_without_scale_do_not_depend_on_its_unit(room, factor):
    reference, scene = scaled_room(room, 1.0, voxel_size_m=0.2), scaled_room(room, factor, voxel_size_m=0.2)
    assert scene.num_points == pytest.approx(reference.num_points, abs=3)  # a point on a voxel's border may round over


def test_with_scale_refuses_a_second_scale_and_unknown_sources(room):
    scene = scaled_room(room, 0.25)
    with pytest.raises(ValueError, match=r"this one is metric \(`scale_source`='camera_height'\)"):
        scene.with_scale(4.0, "camera_height").with_scale(2.0, "length")
    with pytest.raises(ValueError, match=r"`source` must be one of \('poses', .*\), got 'metric'"):
        scene.with_scale(4.0, "metric")
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"`metres_per_unit` must be positive, got {factor}"):
            scene.with_scale(factor, "length")


# ---- inputs of the model ----


def test_to_model_inputs_points_are_points_of_the_scene_with_their_attributes(room):
    scene = room.build(voxel_size_m=FINE)
    inputs = scene.to_model_inputs(0.05)
    coords, features, grid = (inputs[name] for name in ("point_coords", "point_features", "point_grid_coords"))
    assert len(coords) == len(torch.unique(grid, dim=0))
    distances = torch.cdist(coords.double(), scene.points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    assert nearest.values.max() < 1e-5
    torch.testing.assert_close(features[:, 3:6], scene.colors[nearest.indices], atol=1e-6, rtol=0)
    torch.testing.assert_close(features[:, 6:], scene.normals[nearest.indices], atol=1e-6, rtol=0)
    # Features are centred on the bounding box, with the lowest point at 0.
    low, high = scene.points.min(dim=0).values, scene.points.max(dim=0).values
    shift = torch.tensor([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    torch.testing.assert_close(features[:, :3] + shift, coords)
    # Voxel indices follow the coordinates.
    assert ((coords - low) / 0.05 - grid - 0.5).abs().max() <= 1.0
    assert grid.dtype == torch.int64
    assert grid.min() == 0


def test_to_model_inputs_covers_every_point(room):
    scene = room.build(voxel_size_m=FINE)
    coords = scene.to_model_inputs(0.1)["point_coords"]
    gaps = torch.cdist(scene.points, coords).min(dim=1).values
    assert gaps.max() < 0.1 * math.sqrt(3) + 1e-4


def nearest_to_block_centres(grid, side):
    best = {}
    for cell in grid.tolist():
        block = tuple(math.floor((index + 0.5) / side) for index in cell)
        off_center = sum(((index + 0.5) / side - b - 0.5) ** 2 for index, b in zip(cell, block, strict=True))
        best[block] = min(best.get(block, (math.inf,)), (off_center, cell), key=lambda entry: entry[0])
    return {tuple(cell) for _, cell in best.values()}


def test_to_model_inputs_thins_by_coarser_blocks_of_voxels(room):
    scene = room.build(voxel_size_m=FINE)
    full, few = scene.to_model_inputs(0.05), scene.to_model_inputs(0.05, max_points=300)
    kept = {tuple(row) for row in few["point_grid_coords"].tolist()}
    assert 200 < len(kept) <= 300
    expected, side = full["point_grid_coords"], 1.0
    while len(expected) > 300:
        side *= max(1.05, math.sqrt(len(expected) / 300))
        expected = nearest_to_block_centres(full["point_grid_coords"], side)
    assert kept == expected
    rows = [i for i, row in enumerate(full["point_grid_coords"].tolist()) if tuple(row) in kept]
    for name in ("point_features", "point_coords", "point_grid_coords"):
        assert torch.equal(full[name][rows], few[name])
        assert torch.equal(few[name], scene.to_model_inputs(0.05, max_points=300)[name])
    assert len(scene.to_model_inputs(0.05, max_points=1)["point_coords"]) == 1


def test_to_model_inputs_encodes_evenly_spaced_cameras(room):
    scene = room.build()
    poses = encode_camera_poses(scene.world_from_cam, scene.intrinsics, (HEIGHT, WIDTH))
    assert torch.equal(scene.to_model_inputs(0.05)["camera_poses"], poses)
    assert torch.equal(scene.to_model_inputs(0.05, num_cameras=2)["camera_poses"], poses[[0, 2]])
    assert torch.equal(scene.to_model_inputs(0.05, num_cameras=9)["camera_poses"], poses)
    cloud = SceneGeometry.from_point_cloud(room.points.reshape(-1, 3))
    assert cloud.to_model_inputs(0.05)["camera_poses"].shape == (0, 11)


@pytest.mark.convention
def test_a_scene_without_scale_is_brought_to_a_median_distance_of_two_and_a_half(room):
    # docs/conventions.md, "Scale".
    scene = scaled_room(room, 0.01, voxel_size_m=0.05)
    inputs = scene.to_model_inputs(0.02)
    distances = torch.cdist(scene.points, scene.world_from_cam[:, :3, 3]).flatten().tolist()
    factor = 2.5 / sorted(distances)[(len(distances) - 1) // 2]
    torch.testing.assert_close(inputs["camera_poses"][:, :3], scene.world_from_cam[:, :3, 3] * factor)
    extent = scene.points.max(dim=0).values - scene.points.min(dim=0).values
    got = inputs["point_coords"].max(dim=0).values - inputs["point_coords"].min(dim=0).values
    torch.testing.assert_close(got, extent * factor, atol=0.05, rtol=0)
    assert (inputs["log_scale"].item(), inputs["scale_known"].item()) == (0.0, False)
    assert inputs["scale_known"].dtype == torch.bool
    metric = scene.with_scale(100.0, "poses").to_model_inputs(0.02)
    assert (metric["log_scale"].item(), metric["scale_known"].item()) == (0.0, True)
    torch.testing.assert_close(metric["camera_poses"][:, :3], scene.world_from_cam[:, :3, 3] * 100)


def test_to_model_inputs_refuses_what_the_encoder_cannot_take(room):
    scene = room.build()
    with pytest.raises(ValueError, match=r"at most 65535 voxels wide, got \d{6} with `grid_size` 1e-05"):
        scene.to_model_inputs(1e-5)
    with pytest.raises(ValueError, match=r"`max_points` must be at least 1, got 0"):
        scene.to_model_inputs(0.02, max_points=0)
    with pytest.raises(ValueError, match=r"`num_cameras` must be at least 1, got 0"):
        scene.to_model_inputs(0.02, num_cameras=0)
    alone = SceneGeometry.from_point_cloud(np.ones((5, 3)), is_metric=False, voxel_size_m=None)
    with pytest.raises(ValueError, match=r"the median distance between them is 0"):
        alone.to_model_inputs(0.02)


def model_inputs(num_points, num_cameras, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "point_features": torch.rand(num_points, 9, generator=generator) + 1,
        "point_coords": torch.rand(num_points, 3, generator=generator) + 1,
        "point_grid_coords": torch.randint(1, 50, (num_points, 3), generator=generator),
        "camera_poses": torch.rand(num_cameras, 11, generator=generator) + 1,
        "log_scale": torch.tensor(seed / 7),
        "scale_known": torch.tensor(seed % 2 == 1),
    }


def test_collate_scenes_pads_with_zeros_and_masks():
    a, b, c = model_inputs(5, 2, 1), model_inputs(3, 0, 2), model_inputs(4, 3, 3)
    batch = collate_scenes([[a, b], [], [c]])
    assert batch["scene_mask"].tolist() == [[True, True], [False, False], [True, False]]
    assert batch["point_mask"].sum(dim=2).tolist() == [[5, 3], [0, 0], [4, 0]]
    assert batch["camera_mask"].sum(dim=2).tolist() == [[2, 0], [0, 0], [3, 0]]
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        "scene_mask": (3, 2),
        "point_features": (3, 2, 5, 9),
        "point_coords": (3, 2, 5, 3),
        "point_grid_coords": (3, 2, 5, 3),
        "point_mask": (3, 2, 5),
        "camera_poses": (3, 2, 3, 11),
        "camera_mask": (3, 2, 3),
        "log_scale": (3, 2),
        "scale_known": (3, 2),
    }
    for (row, column), scene in {(0, 0): a, (0, 1): b, (2, 0): c}.items():
        for name, mask in (
            ("point_features", "point_mask"),
            ("point_coords", "point_mask"),
            ("point_grid_coords", "point_mask"),
            ("camera_poses", "camera_mask"),
        ):
            kept = batch[mask][row, column]
            assert torch.equal(batch[name][row, column][kept], scene[name])
            assert batch[name][row, column][~kept].abs().sum() == 0
        assert batch["log_scale"][row, column] == scene["log_scale"]
    assert batch["scale_known"].tolist() == [[True, False], [False, False], [True, False]]
    assert batch["point_grid_coords"].dtype == torch.int64


def test_collate_scenes_has_room_for_a_camera_even_without_any():
    batch = collate_scenes([[model_inputs(2, 0, 1)]])
    assert batch["camera_poses"].shape == (1, 1, 1, 11)
    assert batch["camera_mask"].tolist() == [[[False]]]


@pytest.mark.parametrize("samples", [[], [[], []]])
def test_collate_scenes_refuses_a_batch_without_scenes(samples):
    with pytest.raises(ValueError, match=rf"one of the {len(samples)} samples must have a scene"):
        collate_scenes(samples)


# ---- files ----


TENSOR_FIELDS = ("points", "colors", "normals", "world_from_cam", "intrinsics", "scene_from_dataset")
PLAIN_FIELDS = ("image_size", "is_metric", "scale_source", "gravity", "metres_per_unit")


def assert_same_scene(got, expected):
    for name in TENSOR_FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name))
        assert getattr(got, name).dtype == getattr(expected, name).dtype
    for name in PLAIN_FIELDS:
        assert getattr(got, name) == getattr(expected, name)


def test_save_and_load_are_bitwise(room, tmp_path):
    scene = scaled_room(room, 0.3, timestamps_s=[1.7e9, 1.7e9 + 1 / 30, 1.7e9 + 2 / 30]).with_scale(3.7, "poses")
    scene.save(tmp_path / "new" / "scene")
    loaded = SceneGeometry.load(tmp_path / "new" / "scene")
    assert_same_scene(loaded, scene)
    assert torch.equal(loaded.timestamps_s, scene.timestamps_s)
    cloud = SceneGeometry.from_point_cloud(room.points.reshape(-1, 3))
    cloud.save(tmp_path / "new" / "scene")
    loaded = SceneGeometry.load(tmp_path / "new" / "scene")
    assert_same_scene(loaded, cloud)
    assert loaded.timestamps_s is None
    assert sorted(os.listdir(tmp_path / "new" / "scene")) == ["geometry.json", "geometry.safetensors"]


def test_a_save_that_fails_leaves_the_old_scene(room, tmp_path, monkeypatch):
    old = room.build()
    old.save(tmp_path)

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        room.build(max_points=50).save(tmp_path)
    monkeypatch.undo()
    assert_same_scene(SceneGeometry.load(tmp_path), old)
    assert sorted(os.listdir(tmp_path)) == ["geometry.json", "geometry.safetensors"]


def test_load_refuses_files_and_folders_that_are_no_scene(room, tmp_path):
    path = tmp_path / "scene.pkl"
    path.write_bytes(pickle.dumps({"points": [1]}))
    with pytest.raises(ValueError, match=r"`folder` must be a folder written by .*, got the file .*scene.pkl"):
        SceneGeometry.load(path)
    with pytest.raises(FileNotFoundError, match=r"has no geometry.json"):
        SceneGeometry.load(tmp_path)
    room.build().save(tmp_path)
    (tmp_path / "geometry.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no geometry.safetensors"):
        SceneGeometry.load(tmp_path)


def edit_header(folder, **changes):
    header = json.loads((folder / "geometry.json").read_text())
    (folder / "geometry.json").write_text(json.dumps({**header, **changes}))


def test_load_refuses_another_version_and_files_of_two_scenes(room, tmp_path):
    room.build().save(tmp_path / "a")
    room.build(max_points=50).save(tmp_path / "b")
    (tmp_path / "a" / "geometry.safetensors").replace(tmp_path / "b" / "geometry.safetensors")
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, but geometry.json expects [0-9a-f]{64}"):
        SceneGeometry.load(tmp_path / "b")
    edit_header(tmp_path / "b", format_version=2)
    with pytest.raises(ValueError, match=r"must have `format_version` 1, got 2"):
        SceneGeometry.load(tmp_path / "b")
    (tmp_path / "b" / "geometry.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must have `format_version` 1, got None"):
        SceneGeometry.load(tmp_path / "b")


def test_load_checks_the_content(room, tmp_path):
    room.build().save(tmp_path)
    edit_header(tmp_path, scale_source="guess")
    with pytest.raises(ValueError, match=r"`scale_source` must be one of .*got 'guess'"):
        SceneGeometry.load(tmp_path)
    edit_header(tmp_path, scale_source="metric", image_size=None)
    with pytest.raises(ValueError, match=r"`image_size` must be \(height, width\) .* got None"):
        SceneGeometry.load(tmp_path)
    header = json.loads((tmp_path / "geometry.json").read_text())
    del header["gravity"]
    (tmp_path / "geometry.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"lacks \['gravity'\] and has unknown \[\]"):
        SceneGeometry.load(tmp_path)
    save_file(
        {"points": torch.zeros(1, 3), "labels": torch.zeros(1)}, tmp_path / "geometry.safetensors", {"format": "pt"}
    )
    digest = hashlib.sha256((tmp_path / "geometry.safetensors").read_bytes()).hexdigest()
    edit_header(tmp_path, tensors_sha256=digest, gravity="given")
    with pytest.raises(
        ValueError, match=r"lacks \['colors', 'normals', 'scene_from_dataset'\] and has unknown \['labels'\]"
    ):
        SceneGeometry.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scene_encoding_round_trip_is_bitwise(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    # Views of one storage: a writer that deduplicates storages would lose one of them.
    storage = torch.randn(3 * 5 + 4, 8, generator=generator).to(dtype)
    encoding = SceneEncoding(
        visual_tokens=storage[:15].view(3, 5, 8),
        rationale_tokens=storage[15:],
        summary={"is_metric": False, "extent": [1.5, 2.0, 2.5]},
        encoder_digest="0af3",
    )
    path = tmp_path / "cache" / "scene.safetensors"
    encoding.save(path)
    loaded = SceneEncoding.load(path)
    assert torch.equal(loaded.visual_tokens, encoding.visual_tokens)
    assert torch.equal(loaded.rationale_tokens, encoding.rationale_tokens)
    assert loaded.visual_tokens.dtype == dtype
    assert (loaded.summary, loaded.encoder_digest, loaded.num_frames) == (encoding.summary, "0af3", 3)
    assert os.listdir(path.parent) == ["scene.safetensors"]
    assert torch.equal(loaded.to("cpu").visual_tokens, encoding.visual_tokens)


def test_scene_encoding_without_geometry_has_no_rationale(tmp_path):
    SceneEncoding(torch.rand(2, 3, 4), torch.zeros(0, 4), {}, "x").save(tmp_path / "e.safetensors")
    assert SceneEncoding.load(tmp_path / "e.safetensors").rationale_tokens.shape == (0, 4)


def test_scene_encoding_refuses_wrong_tensors_and_files(tmp_path):
    good = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=r"`visual_tokens` must have 3 dimensions, got shape \(3, 4\)"):
        SceneEncoding(good[0], good[0], {}, "x")
    with pytest.raises(ValueError, match=r"same width, got 4 and 3"):
        SceneEncoding(good, good[0, :, :3], {}, "x")
    with pytest.raises(ValueError, match=r"`rationale_tokens` must be finite, got 12 values"):
        SceneEncoding(good, good[0] * math.nan, {}, "x")
    with pytest.raises(TypeError, match=r"`visual_tokens` must be a floating-point tensor, got torch.int64"):
        SceneEncoding(good.long(), good[0], {}, "x")
    with pytest.raises(ValueError, match=r"`path` must end in .safetensors, got .*e.pt"):
        SceneEncoding(good, good[0], {}, "x").save(tmp_path / "e.pt")
    with pytest.raises(FileNotFoundError, match=r"no scene encoding at .*absent.safetensors"):
        SceneEncoding.load(tmp_path / "absent.safetensors")
    save_file({"visual_tokens": good}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds tensors but no scene encoding"):
        SceneEncoding.load(tmp_path / "other.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"visual_tokens": [1]}))
    with pytest.raises((ValueError, OSError)):
        SceneEncoding.load(tmp_path / "pickle.safetensors")


def test_summary_fits_into_json(room):
    summary = json.loads(json.dumps(scaled_room(room, 2.0).summary()))
    assert summary["extent"] == pytest.approx([10.0, 8.8, 5.2], rel=0.02)
    assert (summary["num_cameras"], summary["is_metric"], summary["gravity"]) == (3, False, "given")


@pytest.mark.parametrize("is_metric", [True, False])
def test_model_inputs_of_a_scene_of_unknown_scale_warn(is_metric, monkeypatch):
    said = []
    monkeypatch.setattr(scene_geode.logger, "warning_once", said.append)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 3.0, 1.0])
    SceneGeometry.from_point_cloud(points, is_metric=is_metric).to_model_inputs(0.02)
    assert ["scale of this scene is unknown" in text for text in said] == [True] * (not is_metric)
