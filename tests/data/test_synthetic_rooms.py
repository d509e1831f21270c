# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import geode
from geode.data import plans
from geode.data.synthetic_rooms import build, draw
from geode.data.synthetic_rooms.boxes import box_distance, canonical_box, footprint, points_in_box, transform_box
from geode.data.synthetic_rooms.build import X264_OPTIONS, build_scene, write_video
from geode.data.synthetic_rooms.furniture import CATEGORIES, WHITE
from geode.data.synthetic_rooms.questions import QUESTION_TYPES, scene_questions, select_questions
from geode.data.synthetic_rooms.render import Raycaster, render_walk, smooth_light
from geode.data.synthetic_rooms.rooms import ROOM_TYPES, WALK_GAP_M, _keeps_clear, make_room
from geode.data.synthetic_rooms.scene import describe_scene
from geode.data.synthetic_rooms.shapes import Part, PartList, part_mesh
from geode.data.synthetic_rooms.walks import pinhole_intrinsics, plan_walk, resize_intrinsics, scene_from_room
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.video_processing_geode import load_video_frames


SCENE_FOLDER = Path(geode.__file__).parent / "assets" / "embedded_scene"
ON_WALLS = ("door", "window", "picture", "clock")
VSI_COLUMNS = ["id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options", "pruned"]


@pytest.fixture(scope="module")
def embree():
    return pytest.importorskip("embreex", reason="rendering needs embreex, the extra `world`")


@pytest.fixture(scope="module")
def film(embree):
    """A room and a short, small film of it."""
    room = make_room(5, room_type="living room")
    return room, render_walk(room, image_size=(60, 80), num_frames=8, supersampling=1)


@pytest.fixture(scope="module")
def shipped():
    return json.loads((SCENE_FOLDER / "scene.json").read_text())


def read_rows(name):
    return [json.loads(line) for line in (SCENE_FOLDER / name).read_text().splitlines()]


# Independent geometry: everything below works with corner coordinates and projections, never with package functions.


def axes_of(box):
    return np.array([[math.cos(box[6]), math.sin(box[6]), 0], [-math.sin(box[6]), math.cos(box[6]), 0], [0, 0, 1.0]])


def project_into(point, box):
    axes, half = axes_of(box), np.asarray(box[3:6]) / 2
    return np.asarray(box[:3]) + np.clip(axes @ (point - box[:3]), -half, half) @ axes


def distance_by_projections(first, second):
    """Project to and fro between two convex bodies; the pair of points converges to the closest one."""
    point = np.asarray(first[:3], dtype=float)
    for _ in range(4000):
        other = project_into(point, second)
        nearer = project_into(other, first)
        if np.abs(nearer - point).max() < 1e-12:
            break
        point = nearer
    return float(np.linalg.norm(point - other))


def distance_by_sampling(first, second, count):
    """Return the least distance among sampled surface points: an upper bound."""
    steps = np.linspace(-0.5, 0.5, count)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[np.abs(grid).max(axis=1) == 0.5]
    clouds = [np.asarray(box[:3]) + (grid * box[3:6]) @ axes_of(box) for box in (first, second)]
    return min(float(np.linalg.norm(clouds[1] - point, axis=1).min()) for point in clouds[0])


def corners_of(box):
    signs = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    return np.asarray(box[:3]) + (signs * box[3:6]) @ axes_of(box)


def first_hit_by_slabs(origin, direction, boxes):
    """Intersect one ray with every box by the slab method; return distance and index of the first."""
    best, index = math.inf, -1
    for number, box in enumerate(boxes):
        axes, half = axes_of(box), np.asarray(box[3:6]) / 2
        start, along = axes @ (origin - box[:3]), axes @ direction
        near, far = -math.inf, math.inf
        for axis in range(3):
            if along[axis] == 0:
                near = math.inf if abs(start[axis]) > half[axis] else near
                continue
            ends = sorted(((-half[axis] - start[axis]) / along[axis], (half[axis] - start[axis]) / along[axis]))
            near, far = max(near, ends[0]), min(far, ends[1])
        if 0 < near <= far and near < best:
            best, index = near, number
    return best, index


def random_box(rng):
    return np.array([*rng.uniform(-2, 2, 2), rng.uniform(0.2, 2.5), *rng.uniform(0.1, 1.8, 3), rng.uniform(-4, 4)])


def test_box_distance_agrees_with_projections_onto_convex_sets():
    rng = np.random.default_rng(0)
    pairs = [(random_box(rng), random_box(rng)) for _ in range(120)]
    measured = np.array([box_distance(*pair) for pair in pairs])
    expected = np.array([distance_by_projections(*pair) for pair in pairs])
    assert 10 < (measured == 0).sum() < 110  # both kinds of pairs occur
    np.testing.assert_allclose(measured, expected, atol=2e-5)


def test_box_distance_is_just_below_dense_sampling():
    rng = np.random.default_rng(1)
    for _ in range(6):
        first, second = random_box(rng), random_box(rng)
        second[0] += 4.0
        sampled = distance_by_sampling(first, second, 19)
        # Samples are at most 0.1 m apart, so a surface point is within 0.071 m of one, on either body.
        assert sampled - 0.142 < box_distance(first, second) <= sampled + 1e-12


def test_clear_floor_is_farther_than_the_gap_from_every_box():
    """Bounds decide most cases, and must decide them as the exact distance does."""
    rng, decisions = np.random.default_rng(0), []
    for _ in range(400):
        center, size = rng.uniform((-3, -3, 0), (3, 3, 5), size=(5, 3)), np.exp(rng.uniform(-2.5, 0.7, size=(5, 3)))
        boxes = np.concatenate([center, size, rng.uniform(-1.6, 1.6, size=(5, 1))], axis=1)
        area = np.array([*rng.uniform(-2, 2, size=2), 1.0, *rng.uniform(0.2, 2.0, size=2), 2.0, 0.0])
        decisions.append((_keeps_clear(area, boxes), min(box_distance(area, box) for box in boxes) > WALK_GAP_M))
    assert {(True, True), (False, False)} == set(decisions)
    assert _keeps_clear(area, np.zeros((0, 7)))


def test_box_distance_is_the_diagonal_between_two_corners():
    first = np.array([0.0, 0.0, 1.0, 2.0, 4.0, 2.0, 0.0])  # corner (1, 2, 2)
    second = np.array([5.0, 5.5, 9.0, 2.0, 1.0, 2.0, 0.0])  # corner (4, 5, 8)
    assert box_distance(first, second) == pytest.approx(math.sqrt(9 + 9 + 36), abs=1e-12)


def test_canonical_box_describes_the_same_solid_in_one_way():
    rng = np.random.default_rng(2)
    for number in range(60):
        box = random_box(rng)
        if number % 3 == 0:
            box[4] = box[3]  # a square
        canonical = canonical_box(box)
        distances = np.linalg.norm(corners_of(box)[:, None] - corners_of(canonical)[None], axis=-1)
        np.testing.assert_allclose(distances.min(axis=1), 0.0, atol=1e-9)
        limit = math.pi / 4 if number % 3 == 0 else math.pi / 2
        assert canonical[3] >= canonical[4]
        assert -limit < canonical[6] <= limit
        turned = box.copy()
        turned[6] += math.pi
        np.testing.assert_allclose(canonical_box(turned), canonical, atol=1e-9)


@pytest.mark.parametrize(
    ("yaw", "expected"), [(-math.pi / 2, math.pi / 2), (math.pi / 2, math.pi / 2), (math.pi, 0.0)]
)
def test_canonical_box_puts_yaw_into_the_half_open_range(yaw, expected):
    assert canonical_box(np.array([0, 0, 0, 2.0, 1.0, 1.0, yaw]))[6] == pytest.approx(expected)


def test_transform_box_moves_its_corners():
    rng = np.random.default_rng(3)
    box, turn = random_box(rng), 1.1
    transform = np.eye(4)
    transform[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    transform[:3, 3] = [0.4, -2.0, 0.3]
    expected = corners_of(box) @ transform[:3, :3].T + transform[:3, 3]
    moved = corners_of(transform_box(transform, box))
    np.testing.assert_allclose(np.linalg.norm(expected[:, None] - moved[None], axis=-1).min(axis=1), 0.0, atol=1e-9)


@pytest.mark.parametrize("kind", ["box", "tube", "ball"])
def test_part_mesh_fills_its_extent_and_has_outward_unit_normals(kind):
    part = Part(kind, (0.1, -0.4, 0.2), (0.5, 0.9, 1.0), WHITE)
    triangles, normals = part_mesh(part)
    np.testing.assert_allclose(triangles.reshape(-1, 3).min(axis=0), part.low, atol=1e-12)
    np.testing.assert_allclose(triangles.reshape(-1, 3).max(axis=0), part.high, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=1e-12)
    center = 0.5 * (np.asarray(part.low) + np.asarray(part.high))
    assert ((triangles - center) * normals).sum(-1).min() > 0  # the solids are convex


def shared_face_spots(first, second, axis, side):
    """Return points just outside the area in which two boxes have a face in one plane, if they have one."""
    if abs(getattr(first, side)[axis] - getattr(second, side)[axis]) > 5e-4:
        return []
    low, high = np.maximum(first.low, second.low), np.minimum(first.high, second.high)
    if (np.delete(high - low, axis) < 1e-3).any():
        return []
    spots = low + (high - low) * np.array(list(itertools.product((0.1, 0.5, 0.9), repeat=3)))
    spots[:, axis] = getattr(first, side)[axis] + (1e-3 if side == "high" else -1e-3)
    return spots


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_furniture_shows_no_two_parts_in_one_plane(category):
    """Two boxes of different looks whose faces share a plane and an area would flicker, unless a third covers them."""
    for seed in range(6):
        boxes = [part for part in CATEGORIES[category](np.random.default_rng(seed)) if part.kind == "box"]
        low, high = np.array([part.low for part in boxes]), np.array([part.high for part in boxes])
        for first, second in itertools.combinations(boxes, 2):
            if first.material == second.material:
                continue
            for axis, side in itertools.product(range(3), ("low", "high")):
                if side == "low" and (axis == 2 or (axis == 1 and category in ON_WALLS)):
                    continue  # the underside, and what touches the wall
                for spot in shared_face_spots(first, second, axis, side):
                    is_covered = ((spot >= low) & (spot <= high)).all(axis=1).any()
                    assert is_covered, (seed, axis, side, first, second)


@pytest.mark.parametrize("room_type", sorted(ROOM_TYPES))
def test_make_room_leaves_furniture_apart_and_the_walk_free(room_type):
    for seed in range(2):
        room = make_room(seed, room_type=room_type)
        x, y, half_x, half_y = room.walk_area
        lane = np.array([x, y, 1.0, 2 * half_x, 2 * half_y, 2.0, 0.0])
        supports = {"tv": "tv stand", "monitor": "desk"}
        for first, second in itertools.combinations(room.objects, 2):
            if supports.get(second.category) != first.category:
                assert box_distance(first.box, second.box) >= 0.05, (first.category, second.category)
        for item in room.objects:
            assert (np.abs(footprint(item.box)) <= np.array(room.size[:2]) / 2).all(), item.category
            assert item.box[2] + item.box[5] / 2 <= room.size[2]
            assert item.category in ON_WALLS or box_distance(lane, item.box) >= 0.2


def test_make_room_repeats_and_differs_between_seeds():
    first, again, other = make_room(11), make_room(11), make_room(12)
    assert [item.box.tolist() for item in first.objects] == [item.box.tolist() for item in again.objects]
    assert first.size != other.size


def test_make_room_refuses_an_unknown_type():
    with pytest.raises(ValueError, match=r"`room_type` must be one of .*got 'attic'"):
        make_room(0, room_type="attic")


def test_boxes_are_tight_around_the_triangles_of_their_objects():
    room = make_room(7)
    corners, _, labels, _ = room.triangles
    for item in room.objects:
        local = points_in_box(corners[labels[:, 0] == item.instance_id].reshape(-1, 3), item.box)
        np.testing.assert_allclose(local.max(axis=0), item.box[3:6] / 2, atol=1e-9)
        np.testing.assert_allclose(local.min(axis=0), -item.box[3:6] / 2, atol=1e-9)


@pytest.mark.convention
def test_plan_walk_gives_upright_cameras_and_a_scene_frame_below_the_first():
    room = make_room(3)
    cameras = plan_walk(room, np.random.default_rng(0), num_frames=9)
    scene = scene_from_room(cameras[0]) @ cameras
    np.testing.assert_allclose(scene[0, :2, 3], 0.0, atol=1e-12)
    np.testing.assert_allclose(scene[:, 2, 3], cameras[:, 2, 3])  # the floor stays at z = 0
    assert scene[0, 0, 2] == pytest.approx(0.0, abs=1e-12)  # +z of the camera: no component along x ...
    assert scene[0, 1, 2] > 0.9  # ... but along +y
    np.testing.assert_allclose(scene[:, 2, 0], 0.0, atol=1e-12)  # +x of the camera is level
    assert (scene[:, 2, 1] < -0.9).all()  # +y of the camera points down
    assert (scene[:, 2, 2] < -0.1).all()  # the view is pitched down
    np.testing.assert_allclose(np.linalg.det(scene[:, :3, :3]), 1.0)
    x, y, half_x, half_y = room.walk_area
    assert (np.abs(cameras[:, 0, 3] - x) <= half_x + 1e-9).all()
    assert (np.abs(cameras[:, 1, 3] - y) <= half_y + 1e-9).all()


@pytest.mark.convention
def test_resize_intrinsics_keeps_the_ray_of_a_point():
    intrinsics = np.array([[300.0, 0, 155.2], [0, 280.0, 101.7], [0, 0, 1]])
    small = resize_intrinsics(intrinsics, (240, 320), new_size=(96, 80))
    point = np.array([0.3, -0.2, 1.7])
    u, v, _ = intrinsics @ point / point[2]
    small_u, small_v, _ = small @ point / point[2]
    assert (small_u + 0.5) / 80 == pytest.approx((u + 0.5) / 320)  # the same share of the image, edge to edge
    assert (small_v + 0.5) / 96 == pytest.approx((v + 0.5) / 240)


@pytest.mark.convention
def test_depth_and_ids_equal_analytic_ray_and_box_intersections(embree):
    """A room of boxes alone, an asymmetric camera, and an oracle that knows neither triangles nor float32."""
    room = make_room(5, room_type="study")

    def boxes_only(parts):
        return PartList(part for part in parts if part.kind == "box")

    objects = [
        dataclasses.replace(item, parts=boxes_only(item.parts)) for item in room.objects if boxes_only(item.parts)
    ]
    objects = [dataclasses.replace(item, instance_id=number) for number, item in enumerate(objects, start=1)]
    room = dataclasses.replace(room, objects=objects, structure=boxes_only(room.structure))
    boxes, owners = [], []
    bodies = [(0, room.structure, np.zeros(3), 0.0)]
    bodies += [(item.instance_id, item.parts, np.array(item.position), item.yaw) for item in objects]
    for owner, parts, position, yaw in bodies:
        turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        for part in parts:
            low, high = np.array(part.low), np.array(part.high)
            boxes.append([*(position + turn @ (low + high) / 2), *(high - low), yaw])
            owners.append(owner)
    intrinsics = np.array([[13.0, 0, 9.4], [0, 11.0, 6.1], [0, 0, 1]])
    caster, seen = Raycaster(room), set()
    for camera in plan_walk(room, np.random.default_rng(1), num_frames=4)[:2]:
        depth, ids = caster.depth_and_ids(camera, intrinsics, image_size=(15, 22))
        expected_depth, expected_ids = np.zeros((15, 22)), np.zeros((15, 22), dtype=int)
        for v, u in np.ndindex(15, 22):
            ray_cam = np.array([(u - 9.4) / 13.0, (v - 6.1) / 11.0, 1.0])
            expected_depth[v, u], index = first_hit_by_slabs(camera[:3, 3], camera[:3, :3] @ ray_cam, boxes)
            expected_ids[v, u] = owners[index]
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(depth, expected_depth, atol=1e-9)
        seen |= set(ids.ravel().tolist())
    assert len(seen) > 4


def unprojected(depth, intrinsics, world_from_cam):
    points = np.zeros((*depth.shape, 3))
    for v, u in np.ndindex(*depth.shape):
        ray = np.array([(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], 1.0])
        points[v, u] = world_from_cam[:3, :3] @ (depth[v, u] * ray) + world_from_cam[:3, 3]
    return points


def test_unprojected_depth_lies_in_the_boxes_of_the_record(film):
    room, walk = film
    scene = describe_scene(room, walk)
    checked = 0
    for frame in (0, 3, 6):
        points = unprojected(walk.depth[frame], walk.intrinsics, walk.world_from_cam[frame])
        for item in scene["objects"]:
            chosen = points[walk.instance_ids[frame] == item["id"]]
            local = (chosen - item["box"][:3]) @ axes_of(item["box"]).T
            assert (np.abs(local) <= np.array(item["box"][3:6]) / 2 + 2e-6).all(), item["category"]
            checked += len(chosen)
    assert checked > 800


def test_unprojected_depth_lies_on_a_sphere(film):
    room, walk = film
    item = next(item for item in room.objects if item.category == "ball")
    box = transform_box(walk.scene_from_room, item.box)
    radius, deepest = box[5] / 2, box[5] / 2 * math.cos(math.pi / 32) ** 2  # a facet's middle lies below the sphere
    frames = [frame for frame in range(len(walk.depth)) if (walk.instance_ids[frame] == item.instance_id).any()]
    for frame in frames:
        points = unprojected(walk.depth[frame], walk.intrinsics, walk.world_from_cam[frame])
        reach = np.linalg.norm(points[walk.instance_ids[frame] == item.instance_id] - box[:3], axis=1)
        assert (reach <= radius + 1e-9).all()
        assert (reach >= deepest - 1e-9).all()
    assert frames


def test_unprojected_structure_lies_on_walls_floor_ceiling_or_trim(film):
    room, walk = film
    half = np.array(room.size[:2]) / 2
    points = unprojected(walk.depth[2], walk.intrinsics, walk.world_from_cam[2])[walk.instance_ids[2] == 0]
    points = (points - walk.scene_from_room[:3, 3]) @ walk.scene_from_room[:3, :3]
    gaps = np.stack([points[:, 2], room.size[2] - points[:, 2], *(half - np.abs(points[:, :2])).T])
    assert (gaps > -1e-9).all()
    assert (gaps.min(axis=0) < 0.0145).all()  # rug 13 mm, skirting board 14 mm; the lamp above is out of view


def test_frames_show_the_colours_of_the_objects(film):
    room, walk = film
    item = max(room.objects, key=lambda item: (walk.instance_ids == item.instance_id).sum())
    hue = walk.frames[walk.instance_ids == item.instance_id].mean(axis=0)
    structure = walk.frames[walk.instance_ids == 0].mean(axis=0)
    assert np.corrcoef(hue - hue.mean(), np.array(item.color) - np.mean(item.color))[0, 1] > 0.5
    assert 60 < structure.mean() < 220  # neither dark nor blown out


def test_smooth_light_removes_a_lattice_from_a_slope_and_keeps_edges():
    """A slope and what alternates: (1, 2, 1) / 4 keeps the one and zeroes the other. Across an edge nothing mixes."""
    v, u = np.mgrid[:9, :14].astype(float)
    slope = 2.0 + 0.1 * u + 0.03 * v
    lattice = 0.3 * (-1.0) ** u + 0.2 * (-1.0) ** v + 0.1 * (-1.0) ** (u + v)
    surface = (u >= 7).astype(float)
    light = np.where(surface, 100.0, slope + lattice)[..., None].repeat(3, axis=2)
    smooth = smooth_light(light, surface[..., None])
    np.testing.assert_allclose(smooth[1:-1, 1:6], slope[1:-1, 1:6, None].repeat(3, axis=2), atol=1e-12)
    np.testing.assert_allclose(smooth[:, 7:], 100.0)
    assert smooth[:, :7].max() < 5.0


def test_raycaster_without_embreex_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    with pytest.raises(ImportError, match=r"pip install geode-vlm\[world\]"):
        Raycaster(make_room(0))


def test_build_scene_repeats_to_the_byte(embree, tmp_path):
    size = dict(num_frames=6, image_size=(48, 64), depth_size=(24, 32), supersampling=1)
    for name in ("first", "second"):
        build_scene(tmp_path / name, seed=9, **size)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        "frames.safetensors",
        "geometry/geometry.json",
        "geometry/geometry.safetensors",
        "questions.jsonl",
        "room.mp4",
        "scene.json",
        "train_questions.jsonl",
    ]
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


ENCODE = """
import hashlib, pathlib, sys
import numpy as np
import geode
from geode.data.synthetic_rooms.build import write_video
from geode.modeling_geode.video_processing_geode import load_video_frames

frames, _ = load_video_frames(geode.embedded_scene() / "room.mp4", num_frames=16)
path = pathlib.Path(sys.argv[1])
write_video(path, np.stack([np.asarray(frame) for frame in frames]))
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_video_bytes_do_not_depend_on_the_processor(tmp_path, monkeypatch):
    """x264's macroblock tree chooses otherwise with AVX-512, and not always alike."""
    frames, _ = load_video_frames(SCENE_FOLDER / "room.mp4", num_frames=16)
    frames = np.stack([np.asarray(Image.fromarray(frame).resize((80, 60))) for frame in frames])
    write_video(tmp_path / "native.mp4", frames)
    plain = X264_OPTIONS | {"x264-params": X264_OPTIONS["x264-params"] + ":asm=0"}
    monkeypatch.setattr(build, "X264_OPTIONS", plain)
    write_video(tmp_path / "plain.mp4", frames)
    assert (tmp_path / "native.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_video_bytes_do_not_depend_on_what_memory_held(tmp_path):
    """x264 with B frames reads memory that it never wrote; glibc fills what it hands out with a byte of our choice."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", ENCODE, str(tmp_path / "room.mp4")],
            env={**os.environ, "MALLOC_PERTURB_": perturb},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for perturb in ("0", "165")
    ]
    assert digests[0] == digests[1]


# The shipped scene.


def test_shipped_scene_is_small_and_varied(shipped):
    size = sum(path.stat().st_size for path in SCENE_FOLDER.rglob("*") if path.is_file())
    assert size < 4_000_000
    counts = Counter(item["category"] for item in shipped["objects"])
    assert 12 <= len(shipped["objects"]) <= 18
    assert len(counts) >= 12
    assert max(counts.values()) >= 3
    assert shipped["camera"]["num_frames"] == 32
    assert all(item["visible_frames"] for item in shipped["objects"])


def test_shipped_scene_comes_from_its_seed(shipped):
    room = make_room(shipped["seed"], room_type=shipped["room"]["type"])
    assert room.area == pytest.approx(shipped["room"]["area_m2"], abs=1e-5)
    for item, stored in zip(room.objects, shipped["objects"], strict=True):
        assert item.category == stored["category"]
        np.testing.assert_allclose(item.box[3:6], stored["box"][3:6], atol=1e-5)


def test_shipped_floor_polygon_encloses_the_stated_area(shipped):
    x, y = np.array(shipped["room"]["floor_polygon"]).T
    area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))  # the shoelace formula
    assert area == pytest.approx(shipped["room"]["area_m2"], abs=1e-4)


def test_shipped_depth_lies_in_the_shipped_boxes(shipped):
    stored = load_file(SCENE_FOLDER / "frames.safetensors")
    depth = stored["depth_mm"].astype(np.float64) / 1000
    intrinsics, (height, width) = stored["depth_intrinsics"], depth.shape[1:]
    assert (depth > 0).all()
    v, u = np.mgrid[:height, :width]
    rays = np.stack(
        [(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], u * 0 + 1], -1
    )
    seen = {item["id"]: [] for item in shipped["objects"]}
    for frame, pose in enumerate(stored["world_from_cam"]):
        points = (rays * depth[frame][..., None]) @ pose[:3, :3].T + pose[:3, 3]
        for number, parts in seen.items():
            parts.append(points[stored["instance_ids"][frame] == number])
    for item in shipped["objects"]:
        local = (np.concatenate(seen[item["id"]]) - item["box"][:3]) @ axes_of(item["box"]).T
        half = np.array(item["box"][3:6]) / 2
        assert (np.abs(local) <= half + 1e-3).all(), item["category"]  # depth is stored in whole millimetres
        extent = local.max(axis=0) - local.min(axis=0)
        assert extent[2] > 0.6 * item["box"][5], item["category"]  # and the box is no larger than what one sees


def test_shipped_pixel_shares_agree_with_the_stored_ids(shipped):
    ids = load_file(SCENE_FOLDER / "frames.safetensors")["instance_ids"]
    for item in shipped["objects"]:
        shares = (ids == item["id"]).mean(axis=(1, 2))
        np.testing.assert_allclose(shares, item["pixel_shares"], atol=4e-3)  # two resolutions
        assert [frame for frame, share in enumerate(item["pixel_shares"]) if share >= 0.004] == pytest.approx(
            item["visible_frames"]
        )


def test_shipped_geometry_is_the_scene(shipped):
    geometry = SceneGeometry.load(SCENE_FOLDER / "geometry")
    assert geometry.is_metric
    assert geometry.num_cameras == 32
    poses = load_file(SCENE_FOLDER / "frames.safetensors")["world_from_cam"]
    np.testing.assert_allclose(geometry.world_from_cam.numpy(), poses, atol=0.02)
    points = geometry.points.numpy().astype(np.float64)
    assert points[:, 2].min() > -0.03
    assert points[:, 2].max() < shipped["room"]["size_m"][2] + 0.02
    corners = np.array(shipped["room"]["floor_polygon"])
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inward = np.array([-(end - start)[1], (end - start)[0]]) / np.linalg.norm(end - start)
        assert ((points[:, :2] - start) @ inward).min() > -0.01
    sofa = next(item for item in shipped["objects"] if item["category"] == "sofa")
    local = (points - sofa["box"][:3]) @ axes_of(sofa["box"]).T
    inside = (np.abs(local) < np.array(sofa["box"][3:6]) / 2).all(axis=1)
    assert inside.sum() > 200


def test_shipped_video_shows_the_frames(shipped):
    pytest.importorskip("av", reason="reading a video needs PyAV")
    frames = draw.read_video(SCENE_FOLDER / "room.mp4")
    assert frames.shape == (32, *shipped["camera"]["image_size"], 3)
    ids = load_file(SCENE_FOLDER / "frames.safetensors")["instance_ids"]
    for item in shipped["objects"]:
        if item["category"] == "window":  # daylight is the brightest thing in the room
            frame = int(np.argmax(item["pixel_shares"]))
            size = ids.shape[:0:-1]
            small = np.asarray(Image.fromarray(frames[frame]).resize(size, Image.Resampling.BOX)).mean(-1)
            assert small[ids[frame] == item["id"]].mean() > small[ids[frame] == 0].mean() + 15


class Oracle:
    """Answers a row from the record by other means than the generator: text in, answer out."""

    def __init__(self, scene):
        self.scene = scene
        self.groups = {}
        for item in scene["objects"]:
            self.groups.setdefault(item["category"], []).append(item)

    def box(self, name):
        (item,) = self.groups[name]  # a category that occurs twice would be ambiguous
        return np.array(item["box"])

    def center(self, name):
        return complex(*self.box(name)[:2])

    def turn_deg(self, stand, face, look):
        """Return the turn to the left as the argument of a complex ratio."""
        return math.degrees(np.angle((look - stand) / (face - stand)))

    def answer(self, row):
        return getattr(self, row["question_type"])(row["question"], [option[3:] for option in row["options"] or []])

    def object_counting(self, text, options):
        return len(self.groups[re.fullmatch(r"How many (.+)\(s\) are in this room\?", text)[1]])

    def object_abs_distance(self, text, options):
        first, second = re.search(r"distance between the (.+) and the (.+) \(in meters\)\?$", text).groups()
        return distance_by_projections(self.box(first), self.box(second))

    def object_size_estimation(self, text, options):
        name = re.search(r"\(length, width, or height\) of the (.+), measured in centimeters\?$", text)[1]
        corners = corners_of(self.box(name))
        return 100 * max(np.linalg.norm(corners[0] - corners[index]) for index in (1, 2, 4))  # three edges at a corner

    def room_size_estimation(self, text, options):
        return self.scene["room"]["size_m"][0] * self.scene["room"]["size_m"][1]

    def object_rel_distance(self, text, options):
        listed, target = re.search(r"which of these objects \((.+)\) is the closest to the (.+)\?$", text).groups()
        assert listed.split(", ") == options
        distances = sorted((distance_by_projections(self.box(name), self.box(target)), name) for name in options)
        assert distances[1][0] - distances[0][0] > 0.2
        return distances[0][1]

    def _standing(self, text):
        pattern = r"If I am standing by the (.+) and facing the (.+?), is the (.+?) to (?:the left|my)"
        stand, face, look = (self.center(name) for name in re.match(pattern, text).groups())
        return self.turn_deg(stand, face, look)

    def object_rel_direction_easy(self, text, options):
        angle = self._standing(text)
        assert 10 < abs(angle) < 170
        return "left" if angle > 0 else "right"

    def object_rel_direction_medium(self, text, options):
        angle = self._standing(text)
        assert abs(abs(angle) - 135) > 10
        return "back" if abs(angle) >= 135 else "left" if angle > 0 else "right"

    def object_rel_direction_hard(self, text, options):
        angle = self._standing(text)
        assert all(abs(abs(angle) - boundary) > 10 for boundary in (0, 90, 180))
        return ("front" if abs(angle) < 90 else "back") + ("-left" if angle > 0 else "-right")

    def route_planning(self, text, options):
        start, face, goal = re.search(
            r"beginning at the (.+) and facing the (.+)\. You want to navigate to the (.+?)\.", text
        ).groups()
        stops = re.findall(r"Go forward until the (.+?)(?: \d\.|\. You)", text)
        assert stops[0] == face
        assert stops[-1] == goal
        places, turns = [self.center(name) for name in (start, *stops)], []
        for before, here, after in zip(places, places[1:], places[2:], strict=False):
            angle = math.degrees(np.angle((after - here) / (here - before)))
            turns.append("Turn Back" if abs(angle) > 135 else "Turn Left" if angle > 0 else "Turn Right")
            assert abs(angle) > 40
        assert text.count("[please fill in]") == len(turns) + 1  # one more in the note
        return ", ".join(turns)

    def obj_appearance_order(self, text, options):
        names = re.search(r"categories in the video: (.+)\?$", text)[1].split(", ")
        seen = {name: min(frame for item in self.groups[name] for frame in item["visible_frames"]) for name in names}
        assert len(set(seen.values())) == 4
        return ", ".join(sorted(names, key=seen.get))

    def object_localization(self, text, options):
        return self.box(re.fullmatch(r"Locate the (.+)\.", text)[1])


def check_answer(row, expected):
    if row["question_type"] == "object_localization":
        np.testing.assert_allclose(row["box"], expected, atol=1e-9)
        np.testing.assert_allclose(json.loads(row["ground_truth"]), expected, atol=6e-4)
        assert row["answer"] == [{"type": "value", "token": "<3DBBOX>", "value": row["box"]}]
    elif row["options"]:
        letter = "ABCD"[[option[3:] for option in row["options"]].index(expected)]
        assert row["ground_truth"] == letter, row["question"]
        assert row["answer"] == [{"type": "text", "text": letter}]
    else:
        assert row["value"] == pytest.approx(expected, abs=2e-3), row["question"]
        assert float(row["ground_truth"]) == pytest.approx(expected, abs=0.51 if row["unit"] == "cm" else 0.051)
        factor, unit = {"cm": (0.01, "m"), "m": (1, "m"), "m2": (1, "m2"), "count": (1, "count")}[row["unit"]]
        assert row["value_si"] == pytest.approx(factor * row["value"], abs=1e-7)
        assert row["answer"] == [{"type": "value", "token": "<REG>", "value": row["value_si"], "unit": unit}]


@pytest.mark.parametrize("name", ["questions.jsonl", "train_questions.jsonl"])
def test_shipped_questions_agree_with_an_independent_reading_of_the_record(shipped, name):
    oracle, rows = Oracle(shipped), read_rows(name)
    assert [row["id"] for row in rows] == list(range(len(rows)))
    for row in rows:
        check_answer(row, oracle.answer(row))


def test_scene_questions_agree_with_an_independent_reading_of_the_record(shipped):
    """The generator as it is now, with other lots than the shipped files."""
    questions = select_questions(scene_questions(shipped, seed=5), dict.fromkeys(QUESTION_TYPES, 12), seed=5)
    assert {question.question_type for question in questions} == set(QUESTION_TYPES)
    oracle = Oracle(shipped)
    for number, question in enumerate(questions):
        row = question.row(number, shipped)
        check_answer(row, oracle.answer(row))


def test_shipped_questions_cover_every_type_in_the_columns_of_the_benchmark(shipped):
    rows = read_rows("questions.jsonl")
    assert Counter(row["question_type"] for row in rows).keys() == set(QUESTION_TYPES)
    assert len(rows) >= 12
    assert len(read_rows("train_questions.jsonl")) >= 200
    for row in rows:
        assert list(row)[:8] == VSI_COLUMNS
        assert row["dataset"] == "synthetic_rooms"
        assert row["scene_name"] == shipped["scene_name"]
        assert row["pruned"] is False
        if row["options"]:
            assert [option[:3] for option in row["options"]] == ["A. ", "B. ", "C. ", "D. "][: len(row["options"])]
            assert len(set(row["options"])) == len(row["options"])
    assert len({row["question"] for row in rows}) == len(rows)


def test_select_questions_spreads_letters_and_contents(shipped):
    questions = scene_questions(shipped, seed=4)
    chosen = select_questions(questions, {"object_rel_direction_hard": 40, "object_counting": 2}, seed=0)
    letters = Counter(question.ground_truth for question in chosen[:40])
    assert max(letters.values()) - min(letters[letter] for letter in "ABCD") <= 4
    assert [question.question_type for question in chosen[40:]] == ["object_counting"] * 2
    assert chosen == select_questions(questions, {"object_rel_direction_hard": 40, "object_counting": 2}, seed=0)


def test_draw_scene_needs_no_ray_caster():
    code = "import sys; sys.modules['embreex'] = None; import geode.data.synthetic_rooms.draw"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draw_scene_outlines_predictions_only_where_given(shipped, tmp_path, monkeypatch):
    for module in (draw, plans):
        monkeypatch.setattr(module, "SCALE", 1)  # faster, with rougher edges
    pytest.importorskip("av", reason="reading a video needs PyAV")
    box = next(item["box"] for item in shipped["objects"] if item["category"] == "coffee table")
    draw.draw_scene(SCENE_FOLDER, tmp_path / "plain.png")
    draw.draw_scene(SCENE_FOLDER, tmp_path / "answered.png", answers=[("table", [box[0] + 0.2, *box[1:]])])
    counts = []
    for name in ("plain", "answered"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        assert picture.shape == (plans.SIZE[1], plans.SIZE[0], 3)
        counts.append((np.abs(picture - draw.PREDICTION).max(axis=-1) < 40).sum())
    assert counts[1] > counts[0] + 300  # an outline of 2 x (1.0 + 0.6) m, and a line of the legend


def test_draw_scene_refuses_a_box_of_six_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"boxes of 7 numbers .*got 6 numbers"):
        draw.draw_scene(SCENE_FOLDER, tmp_path / "x.png", answers=[("door", [0.0] * 6)])


def test_pinhole_intrinsics_span_the_field_of_view():
    intrinsics = pinhole_intrinsics((90, 160), 85.0)
    edges = [(u - intrinsics[0, 2]) / intrinsics[0, 0] for u in (-0.5, 159.5)]  # the outer edges of the outer pixels
    assert math.degrees(math.atan(edges[1]) - math.atan(edges[0])) == pytest.approx(85.0, abs=1e-6)
