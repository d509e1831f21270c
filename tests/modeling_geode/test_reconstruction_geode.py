# SPDX-License-Identifier: Apache-2.0
"""
From VGGT's output to a scene: scale, gravity, padding and broken predictions.

The oracle is the embedded scene: its exact depth and cameras are put into the first camera's frame and an arbitrary unit, which
is what a perfect VGGT would predict.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import geode
from geode.modeling_geode import scene_inputs_geode
from geode.modeling_geode.geometry_geode import invert_rigid, project_points, transform_points
from geode.modeling_geode.reconstruction_geode import reconstruct_with_vggt, resample_depth
from geode.modeling_geode.scene_geode import KnownLength, SceneGeometry
from geode.modeling_geode.vggt_geode import VggtImageProcessor, VggtModel, VggtModelOutput
from tests.modeling_geode.common_geode import tiny_vggt
from tests.modeling_geode.common_scene_geode import rigid
from tests.modeling_geode.test_alignment_geode import angle_deg


UNITS_PER_M = 0.37
FRAMES = [1, 6, 13, 19, 27, 30]


class Exact:
    """What a perfect VGGT would say about some frames of the embedded scene, and the truth."""

    def __init__(self, frames=FRAMES):
        stored = load_file(geode.embedded_scene() / "frames.safetensors")
        self.depth_m = stored["depth_mm"][frames].double() / 1000
        self.world_from_cam = stored["world_from_cam"][frames]
        count, height, width = self.depth_m.shape
        self.intrinsics = stored["depth_intrinsics"].expand(count, 3, 3)
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.rand(1, count, 3, height, width, generator=generator)
        self.up = self.world_from_cam[0, :3, :3].T @ torch.tensor([0.0, 0, 1], dtype=torch.float64)
        self.camera_height_m = float(self.world_from_cam[0, 2, 3])

    def output(self, *, depth_noise=0.0, turn=None) -> VggtModelOutput:
        """VGGT's output in a world frame that is `turn` times the first camera's."""
        poses = invert_rigid(self.world_from_cam[0]) @ self.world_from_cam
        if turn is not None:
            poses = turn @ poses
        poses[:, :3, 3] *= UNITS_PER_M
        noise = torch.randn(self.depth_m.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        depth = self.depth_m * UNITS_PER_M * (1 + depth_noise * noise)
        return VggtModelOutput(
            extrinsics=invert_rigid(poses)[None, :, :3].float(),
            intrinsics=self.intrinsics[None].float(),
            depth=depth[None, ..., None].float(),
            depth_confidence=torch.full_like(depth, 2.0)[None].float(),
        )

    def surface_m(self, frame, u, v):
        """The point that a pixel shows, in the truth's frame."""
        ray = torch.linalg.solve(self.intrinsics[0], torch.tensor([u, v, 1.0], dtype=torch.float64))
        return transform_points(self.world_from_cam[frame], (self.depth_m[frame, v, u] * ray)[None])[0]

    def sources(self) -> dict:
        ends = (0, 20, 70), (3, 101, 55)
        length_m = float(torch.linalg.vector_norm(self.surface_m(*ends[0]) - self.surface_m(*ends[1])))
        assert length_m > 1
        motion = torch.from_numpy(rigid(0.4, -0.7, 2.1, (3.0, -2.0, 5.0)))
        return {
            "factor": {"metres_per_unit": 1 / UNITS_PER_M},
            "poses": {"camera_positions_m": transform_points(motion, self.world_from_cam[:, :3, 3]).numpy()},
            "camera_height": {"camera_height_m": self.camera_height_m},
            "depth": {"depth_m": self.depth_m},
            "length": {"known_length": KnownLength(*ends, length_m)},
        }


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact()


@pytest.mark.parametrize("source", ["factor", "poses", "camera_height", "depth", "length"])
def test_each_source_of_scale_recovers_the_embedded_scene_in_metres(exact, source):
    scene = SceneGeometry.from_vggt(exact.output(), exact.pixel_values, **exact.sources()[source])
    assert scene.is_metric
    assert scene.scale_source == source
    # One per cent is asked for. A rug lifts the plane of the floor by millimetres; else it is float32 and stored millimetres.
    accuracy = 3e-3 if source == "camera_height" else 1e-4
    assert scene.metres_per_unit * UNITS_PER_M == pytest.approx(1, rel=accuracy)
    assert scene.gravity == "estimated"
    # The frame is the truth's but for a turn about the vertical: heights and distances are the same.
    truth = exact.world_from_cam[:, :3, 3]
    centers = scene.world_from_cam[:, :3, 3].double()
    torch.testing.assert_close(centers[:, 2], truth[:, 2], atol=5e-3, rtol=0)
    torch.testing.assert_close(torch.cdist(centers, centers), torch.cdist(truth, truth), atol=5e-3, rtol=0)
    torch.testing.assert_close(centers[0, :2], torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_gravity_and_height_of_many_pixels_are_read_from_a_part_of_them():
    """All 32 frames have more pixels than are looked at for gravity and height; leaving some out moves no camera."""
    exact = Exact(list(range(32)))
    assert exact.depth_m.numel() > scene_inputs_geode.ROUGH_PIXELS
    scene = SceneGeometry.from_vggt(exact.output(), exact.pixel_values, camera_height_m=exact.camera_height_m)
    assert angle_deg(scene.scene_from_dataset[2, :3], exact.up) < 0.2
    assert scene.metres_per_unit * UNITS_PER_M == pytest.approx(1, rel=5e-3)


def test_scene_in_metres_is_the_one_from_metric_depth(exact):
    """The same depth and cameras in metres, given by hand, make the same cloud: voxels are cut in metres."""
    scene = SceneGeometry.from_vggt(exact.output(), exact.pixel_values, up=exact.up, metres_per_unit=1 / UNITS_PER_M)
    images = (exact.pixel_values[0] * 255).round().byte().permute(0, 2, 3, 1)
    poses = invert_rigid(exact.world_from_cam[0]) @ exact.world_from_cam
    by_hand = SceneGeometry.from_rgbd(exact.depth_m, exact.intrinsics, poses, images=images, up=exact.up)
    assert scene.gravity == "given"
    torch.testing.assert_close(scene.world_from_cam, by_hand.world_from_cam, atol=1e-5, rtol=0)
    # A pixel on the edge of a voxel may fall to either side.
    assert scene.num_points == pytest.approx(by_hand.num_points, rel=1e-3)
    nearest = torch.cdist(scene.points[::20], by_hand.points).amin(dim=1)
    assert float(nearest.max()) < 0.03
    assert float(nearest.median()) < 1e-4


def test_dataset_frame_of_the_scene_is_that_of_the_output(exact):
    """`points = metres_per_unit * (scene_from_dataset @ points_dataset)`, for cameras as well."""
    output = exact.output()
    for options in ({}, {"metres_per_unit": 2.9}):
        scene = SceneGeometry.from_vggt(output, exact.pixel_values, **options)
        homogeneous = torch.eye(4, dtype=torch.float64).repeat(len(FRAMES), 1, 1)
        homogeneous[:, :3] = output.extrinsics[0].double()
        centers = invert_rigid(homogeneous)[:, :3, 3]
        moved = scene.metres_per_unit * transform_points(scene.scene_from_dataset, centers)
        torch.testing.assert_close(moved.float(), scene.world_from_cam[:, :3, 3], atol=1e-5, rtol=0)


def test_scale_stays_unknown_where_nothing_is_known(exact):
    scene = SceneGeometry.from_vggt(exact.output(), exact.pixel_values)
    assert (scene.is_metric, scene.scale_source, scene.metres_per_unit) == (False, "unknown", 1.0)
    centers, truth = scene.world_from_cam[:, :3, 3], exact.world_from_cam[:, :3, 3].float()
    torch.testing.assert_close(
        torch.cdist(centers, centers), UNITS_PER_M * torch.cdist(truth, truth), atol=1e-3, rtol=0
    )
    later = scene.with_scale(1 / UNITS_PER_M, "factor")
    assert later.scale_source == "factor"
    assert float(later.world_from_cam[0, 2, 3]) == pytest.approx(exact.camera_height_m, rel=2e-3)


@pytest.mark.parametrize("source", ["poses", "camera_height", "depth", "length"])
def test_scale_and_gravity_bear_noise_and_a_tilted_first_camera(exact, source):
    turn = torch.from_numpy(rigid(0.5, 0.3, -0.4, (0, 0, 0)))
    output = exact.output(depth_noise=0.02, turn=turn)
    scene = SceneGeometry.from_vggt(output, exact.pixel_values, **exact.sources()[source])
    assert scene.gravity == "estimated"
    assert angle_deg(scene.scene_from_dataset[2, :3], turn[:3, :3] @ exact.up) < 0.5
    # A single length has the noise of its two ends.
    assert scene.metres_per_unit * UNITS_PER_M == pytest.approx(1, rel=0.05 if source == "length" else 0.02)


def test_estimated_gravity_is_closer_than_the_assumed_one(exact):
    output = exact.output()
    estimated = SceneGeometry.from_vggt(output, exact.pixel_values)
    assumed = SceneGeometry.from_vggt(output, exact.pixel_values, up=None)
    assert (estimated.gravity, assumed.gravity) == ("estimated", "assumed")
    assert angle_deg(estimated.scene_from_dataset[2, :3], exact.up) < 0.1
    assert angle_deg(assumed.scene_from_dataset[2, :3], exact.up) > 3


def test_gravity_is_assumed_aloud_where_no_floor_is_seen(monkeypatch):
    messages = []
    monkeypatch.setattr(scene_inputs_geode.logger, "warning", messages.append)
    intrinsics = torch.tensor([[30.0, 0, 14.2], [0, 31, 10.7], [0, 0, 1]])[None]
    wall = torch.full((1, 22, 29), 2.0)
    scene = SceneGeometry.from_rgbd(wall, intrinsics, torch.eye(4)[None], up="floor")
    assert scene.gravity == "assumed"
    assert len(messages) == 1
    assert "No floor was found" in messages[0]
    with pytest.raises(ValueError, match=r"3 numbers or 'floor', got 'ceiling'"):
        SceneGeometry.from_rgbd(wall, intrinsics, torch.eye(4)[None], up="ceiling")


def test_camera_height_counts_from_the_lowest_things_aloud_where_no_floor_is_seen(monkeypatch):
    """A wall 2 away, seen 1.5 down by a camera whose height is said to be 3: 2 metres per unit."""
    messages = []
    monkeypatch.setattr(scene_inputs_geode.logger, "warning", messages.append)
    intrinsics = torch.tensor([[20.0, 0, 14.0], [0, 20, 7.0], [0, 0, 1]])[None, None]
    depth = torch.full((1, 1, 23, 29, 1), 2.0)
    output = VggtModelOutput(
        extrinsics=torch.eye(4)[None, None, :3], intrinsics=intrinsics, depth=depth, depth_confidence=depth[..., 0]
    )
    scene = SceneGeometry.from_vggt(output, torch.zeros(1, 1, 3, 23, 29), up=(0, -1, 0), camera_height_m=3.0)
    assert scene.metres_per_unit == pytest.approx(2, rel=1e-5)
    assert len(messages) == 1
    assert "No floor was found" in messages[0]


def test_gravity_of_a_point_cloud_comes_from_its_floor():
    scene = SceneGeometry.load(geode.embedded_scene() / "geometry")
    turn = torch.from_numpy(rigid(0.9, 0.3, -0.2, (4.0, 1.0, -2.0)))
    points = transform_points(turn, scene.points.double())
    for normals in (scene.normals.double() @ turn[:3, :3].T, None):
        again = SceneGeometry.from_point_cloud(points, normals=normals, up="floor")
        assert again.gravity == "estimated"
        assert angle_deg(again.scene_from_dataset[2, :3], turn[:3, 2]) < 0.3


def test_padding_is_no_part_of_the_scene(exact):
    """Each frame's right third is padding of one colour, at a depth of its own; nothing of it may stay."""
    output, pixel_values = exact.output(), exact.pixel_values.clone() * 0.5
    width = pixel_values.shape[-1]
    boxes = torch.tensor([[0, 4, width - 40 - index, 90] for index in range(len(FRAMES))])
    for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
        outside = torch.ones(pixel_values.shape[-2:], dtype=torch.bool)
        outside[top:bottom, left:right] = False
        pixel_values[0, index, :, outside] = 1.0
        output.depth[0, index, outside] = 0.05
    scene = SceneGeometry.from_vggt(output, pixel_values, content_boxes=boxes, metres_per_unit=1 / UNITS_PER_M)
    assert float(scene.colors.max()) <= 0.51
    cam_from_world = invert_rigid(scene.world_from_cam)
    assert (
        min(
            float(torch.linalg.vector_norm(transform_points(pose, scene.points), dim=1).min())
            for pose in cam_from_world
        )
        > 0.3
    )
    with pytest.raises(ValueError, match=r"`content_boxes` must have shape \(6, 4\), got \(5, 4\)"):
        SceneGeometry.from_vggt(output, pixel_values, content_boxes=boxes[:5])


def test_confidence_decides_which_pixels_stay(exact):
    output = exact.output()
    confidence = 1 + torch.rand(output.depth_confidence.shape, generator=torch.Generator().manual_seed(2))
    output.depth_confidence = confidence
    pixel_values = torch.zeros_like(exact.pixel_values)
    # The colour of a point tells the confidence of its pixel.
    pixel_values[:] = ((confidence - 1) / 2)[:, :, None]
    options = {"voxel_size_m": 1e-4}
    chosen = SceneGeometry.from_vggt(output, pixel_values, min_confidence=1.7, **options)
    assert float(chosen.colors.min()) >= 0.35 - 1 / 255
    assert chosen.num_points == pytest.approx(0.3 * confidence.numel(), rel=0.03)
    default = SceneGeometry.from_vggt(output, pixel_values, **options)
    assert default.num_points == pytest.approx(0.8 * confidence.numel(), rel=0.03)
    with pytest.raises(ValueError, match=r"`min_confidence` 2.5 drops every pixel: confidence lies between 1 and 2"):
        SceneGeometry.from_vggt(output, pixel_values, min_confidence=2.5)


def broken(output: VggtModelOutput, name: str) -> VggtModelOutput:
    if name == "field of view":
        output.intrinsics[0, 2, 0, 0] = math.inf
    elif name == "rotation":
        output.extrinsics[0, 4] = math.nan
    elif name == "no depth":
        output.depth = None
    elif name == "no camera":
        output.extrinsics = None
    elif name == "depth overflow":
        output.depth[:] = math.inf
    return output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("field of view", r"no camera for frames \[2\] of 6 \(a field of view of 0"),
        ("rotation", r"no camera for frames \[4\] of 6"),
        ("no depth", r"got no \['depth'\].*heads=\('camera', 'depth'\)"),
        ("no camera", r"got no \['extrinsics'\]"),
        ("depth overflow", "must have valid values, got none above 0"),
    ],
)
def test_from_vggt_refuses_broken_predictions(exact, name, message):
    with pytest.raises(ValueError, match=message):
        SceneGeometry.from_vggt(broken(exact.output(), name), exact.pixel_values)


def test_from_vggt_drops_depth_that_overflowed(exact):
    output = exact.output()
    output.depth[0, 1] = math.inf
    output.depth[0, 2, :40] = math.nan
    scene = SceneGeometry.from_vggt(output, exact.pixel_values, metres_per_unit=1 / UNITS_PER_M)
    assert scene.num_cameras == 6
    assert max(scene.summary()["extent"]) < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metres_per_unit": 2.0, "camera_height_m": 1.5}, r"at most, got \['factor', 'camera_height'\]"),
        ({"metres_per_unit": -2.0}, "`metres_per_unit` must be positive, got -2.0"),
        ({"camera_height_m": 0.0}, "`camera_height_m` must be a positive number"),
        ({"camera_positions_m": np.zeros((6, 3))}, "the known positions of 6 cameras coincide"),
        ({"camera_positions_m": np.zeros((5, 3))}, r"shape \(6, 3\), got \(5, 3\)"),
        ({"depth_m": np.zeros((6, 9, 9))}, r"shape of the reconstructed depth, \(6, 96, 128\), got \(6, 9, 9\)"),
        ({"known_length": KnownLength((0, 5, 5), (6, 5, 5), 1.0)}, r"within 6 frames of 96 x 128 pixels, got \(6, 5, 5\)"),
        ({"known_length": KnownLength((0, 5, 5), (0, 128, 5), 1.0)}, r"got \(0, 128, 5\)"),
        ({"known_length": KnownLength((0, 5, 5), (0, 5, 5), 1.0)}, "must be apart"),
        ({"up": "down"}, "3 numbers or 'floor', got 'down'"),
    ],
)  # fmt: skip
def test_from_vggt_refuses_wrong_options(exact, options, message):
    with pytest.raises(ValueError, match=message):
        SceneGeometry.from_vggt(exact.output(), exact.pixel_values, **options)


def test_from_vggt_refuses_frames_of_another_call(exact):
    with pytest.raises(ValueError, match=r"of shape \(1, 6, 3, 96, 128\), got \(1, 6, 3, 96, 127\)"):
        SceneGeometry.from_vggt(exact.output(), exact.pixel_values[..., :-1])


# ---- the reconstructor ----


@pytest.fixture(scope="module")
def vggt() -> VggtModel:
    return tiny_vggt(image_size=56)


def pictures(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


@pytest.mark.parametrize(
    "frames",
    [
        pictures((60, 90)),
        pictures((61, 87), (61, 87), (61, 87)),
        pictures((60, 90), (90, 60)),
        pictures((60, 90)) * 3,
        [Image.fromarray(picture).convert("L") for picture in pictures((33, 47), (33, 47))],
        torch.from_numpy(np.stack(pictures((40, 50), (40, 50)))).permute(0, 3, 1, 2).float() / 255,
    ],
    ids=["one frame", "odd sizes", "portrait and landscape", "identical frames", "gray", "tensor"],
)
def test_reconstruct_with_vggt_takes_any_frames(vggt, frames):
    scene = reconstruct_with_vggt(frames, vggt, up=None)
    assert scene.num_cameras == len(frames)
    assert not scene.is_metric
    # Every point is seen by a camera: it projects into a frame.
    seen = torch.zeros(scene.num_points, dtype=torch.bool)
    height, width = scene.image_size
    for pose, intrinsics in zip(invert_rigid(scene.world_from_cam), scene.intrinsics, strict=True):
        u, v = project_points(transform_points(pose, scene.points), intrinsics).unbind(dim=1)
        seen |= (u > -0.6) & (u < width - 0.4) & (v > -0.6) & (v < height - 0.4)
    assert bool(seen.all())


def test_reconstruct_with_vggt_leaves_the_white_around_mixed_frames_out(vggt):
    """Black frames of two shapes are padded with white; no white point may come out."""
    frames = [np.zeros((60, 90, 3), dtype=np.uint8), np.zeros((90, 60, 3), dtype=np.uint8)]
    for mode in ("crop", "pad"):
        assert not reconstruct_with_vggt(frames, vggt, mode=mode, up=None).colors.any()


def test_reconstruct_with_vggt_is_its_parts(vggt):
    frames = pictures((60, 90), (60, 90), (60, 90))
    batch = VggtImageProcessor(image_size=42)(frames)
    with torch.no_grad():
        output = vggt(batch["pixel_values"][None], heads=("camera", "depth"))
    want = SceneGeometry.from_vggt(output, batch["pixel_values"][None], camera_height_m=1.4, up=(0, -1, 0))
    got = reconstruct_with_vggt(frames, vggt, image_size=42, camera_height_m=1.4, up=(0, -1, 0), frames_chunk_size=2)
    assert got.scale_source == "camera_height"
    assert got.image_size == (28, 42)
    torch.testing.assert_close(got.points, want.points, atol=1e-4, rtol=0)


def test_known_length_counts_pixels_of_the_frames_that_were_given(vggt):
    """A frame of 112 x 168 is halved to 56 x 84: its pixel u is at (u + 1/2) / 2 - 1/2, by hand."""
    frames = pictures((112, 168), (112, 168))
    batch = VggtImageProcessor(image_size=84)(frames)
    with torch.no_grad():
        output = vggt(batch["pixel_values"][None], heads=("camera", "depth"))
    by_hand = KnownLength((0, 9.75, 19.75), (1, 69.25, 40.25), 2.0)
    want = SceneGeometry.from_vggt(output, batch["pixel_values"][None], up=None, known_length=by_hand)
    given = KnownLength((0, 20, 40), (1, 139, 81), 2.0)
    got = reconstruct_with_vggt(frames, vggt, image_size=84, up=None, known_length=given)
    assert got.metres_per_unit == pytest.approx(want.metres_per_unit, rel=1e-5)
    with pytest.raises(ValueError, match="names frame 2, and there are 2"):
        reconstruct_with_vggt(frames, vggt, known_length=KnownLength((0, 1, 1), (2, 1, 1), 1.0))


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_resample_depth_takes_the_nearest_measured_pixel(mode):
    """The measured map holds its own coordinates, at another resolution than the frames; checked pixel by pixel."""
    frames = pictures((120, 60), (40, 80))
    batch = VggtImageProcessor(mode, image_size=28)(frames)
    maps = [1 + torch.arange(h * w, dtype=torch.float64).view(h, w) for h, w in ((73, 37), (23, 47))]
    resampled = resample_depth(maps, batch)
    height, width = batch["pixel_values"].shape[-2:]
    assert resampled.shape == (2, height, width)
    for frame in range(2):
        (left, top, right, bottom) = batch["content_boxes"][frame].tolist()
        for v in range(height):
            for u in range(width):
                x, y, _ = (batch["original_from_processed"][frame] @ torch.tensor([u, v, 1.0]).double()).tolist()
                inside = left <= u < right and top <= v < bottom
                (rows, columns), (tall, wide) = maps[frame].shape, frames[frame].shape[:2]
                column, row = round((x + 0.5) * columns / wide - 0.5), round((y + 0.5) * rows / tall - 0.5)
                assert float(resampled[frame, v, u]) == (float(maps[frame][row, column]) if inside else 0.0)
    with pytest.raises(ValueError, match=r"each of the 2 frames, got 1"):
        resample_depth(maps[:1], batch)


def test_measured_depth_of_another_resolution_gives_the_scale(vggt):
    """Depth that is 3 times VGGT's, given at the frames' own resolution, gives 3."""
    frames = pictures((56, 56), (56, 56))
    batch = VggtImageProcessor(image_size=28)(frames)
    with torch.no_grad():
        depth = vggt(batch["pixel_values"][None], heads=("camera", "depth")).depth[0, ..., 0]
    measured = 3 * depth.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    scene = reconstruct_with_vggt(frames, vggt, image_size=28, up=None, depth_m=measured)
    assert scene.metres_per_unit == pytest.approx(3, rel=1e-5)
    assert scene.scale_source == "depth"


def test_reconstruct_with_vggt_refuses_frames_with_holes(vggt):
    with pytest.raises(ValueError, match="remove NaN"):
        reconstruct_with_vggt([np.full((30, 40, 3), np.nan, dtype=np.float32)], vggt)
    with pytest.raises(ValueError, match="at least one frame, got none"):
        reconstruct_with_vggt([], vggt)
