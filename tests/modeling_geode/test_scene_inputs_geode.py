# SPDX-License-Identifier: Apache-2.0
"""What the constructors of scene geometry refuse, and what they say about it."""

import math

import numpy as np
import pytest
import torch

from geode.modeling_geode.scene_geode import SceneGeometry
from tests.modeling_geode.common_scene_geode import Room


@pytest.fixture(scope="module")
def room():
    return Room()


def with_value(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: {"depth": r.depth[:2]}, r"`depth` has 2 frames and `world_from_cam` has 3"),
        (lambda r: {"intrinsics": r.intrinsics[0]}, r"shape \(3, 3, 3\) .*3 poses.*got \(3, 3\).*expand it first"),
        (lambda r: {"world_from_cam": r.world_from_cam[0]}, r"shape \(num_cameras, 4, 4\), got \(4, 4\)"),
        (lambda r: {"depth": r.depth * 0}, r"got none above 0 in 1404 pixels"),
        (lambda r: {"depth": -r.depth}, r"`depth` must not be negative, got a minimum of -"),
        (lambda r: {"depth": r.depth[0]}, r"\(num_frames, height, width\), none of them 0, got \(18, 26\)"),
        (lambda r: {"depth": r.depth * 1000}, r"at most 1000 m wide, got .* \(millimetres\?\)"),
        (lambda r: {"max_input_points": 1403}, r"At most `max_input_points`=1,403 points are taken, got 1,404"),
        (lambda r: {"images": r.images[:, :-1]}, r"`images` must have shape \(3, 18, 26, 3\).*got \(3, 17, 26, 3\)"),
        (lambda r: {"voxel_size_m": 0.0}, r"`voxel_size_m` must be positive, got 0.0"),
        (lambda r: {"max_points": 0}, r"`max_points` must be at least 1, got 0"),
        (lambda r: {"up": (0, 1)}, r"`up` must be one direction of 3 numbers, got shape \(2,\)"),
        (lambda r: {"up": (0, 0, 0)}, r"`up` must be a finite direction of positive length"),
        (
            lambda r: {"depth_confidence": r.depth[:, 1:]},
            r"`depth_confidence` must have shape \(3, 18, 26\), got \(3, 17",
        ),
        (lambda r: {"depth_confidence": r.depth * math.nan}, r"`depth_confidence` must be finite, got 1404"),
        (lambda r: {"timestamps_s": [0.0, 1.0]}, r"`timestamps_s` must have shape \(3,\), got \(2,\)"),
        (
            lambda r: {"world_from_cam": with_value(r.world_from_cam, (1, 0, 3), -math.inf)},
            r"`world_from_cam` must be finite, but is not at indices \[1\].*lost tracking",
        ),
        (
            lambda r: {"world_from_cam": with_value(r.world_from_cam, (slice(None), slice(0, 3), 0), 0.0)},
            r"orthonormal, determinant 1\), got an error of 0.933 .*indices \[0, 1, 2\]",
        ),
        (
            lambda r: {"world_from_cam": r.world_from_cam * np.array([-1.0, 1.0, 1.0, 1.0])},
            r"least determinant of -1 at indices \[0, 1, 2\]",
        ),
        (
            lambda r: {"world_from_cam": with_value(r.world_from_cam, (2, 3, 0), 0.5)},
            r"last row \(0, 0, 0, 1\), but has not at indices \[2\]",
        ),
        (
            lambda r: {"intrinsics": with_value(r.intrinsics, (1, 0, 0), -15.0)},
            r"positive focal lengths, got -15",
        ),
        (
            lambda r: {"intrinsics": with_value(r.intrinsics, (1, 0, 1), 0.2)},
            r"without skew, got \[\[15.0, 0.2.* at indices \[1\]",
        ),
        (lambda r: {"intrinsics": r.intrinsics * math.nan}, r"`intrinsics` must be finite, got 27"),
    ],
)
def test_from_rgbd_names_what_is_wrong(room, make, message):
    with pytest.raises(ValueError, match=message):
        room.build(**make(room))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: {"depth": (r.depth * 1000).astype(np.uint16)}, r"floating point, got torch.uint16.*divide by 1000"),
        (lambda r: {"images": r.images / 255}, r"`images` must be uint8 in 0..255, got torch.float64"),
        (lambda r: {"depth": "depth.png"}, r"`depth` must be an array or a tensor, got str"),
    ],
)
def test_from_rgbd_names_the_wrong_type(room, make, message):
    with pytest.raises(TypeError, match=message):
        room.build(**make(room))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": np.zeros((0, 3))}, r"at least one point, got \(0, 3\)"),
        ({"points": np.zeros((3, 4))}, r"\(num_points, 3\) with at least one point, got \(3, 4\)"),
        (
            {"points": np.array([[0.0, math.nan, math.inf]])},
            r"`points` must be finite, got 2 NaN or infinite values of 3",
        ),
        ({"points": np.eye(3) * 5000}, r"at most 1000 m wide, got 5000 m"),
        ({"max_input_points": 19}, r"`max_input_points`=19 points are taken, got 20"),
        ({"colors": np.full((20, 3), 255.0)}, r"`colors` must lie in \[0, 1\], got 255 to 255"),
        ({"colors": np.zeros((19, 3))}, r"`colors` must have shape \(20, 3\), got \(19, 3\)"),
        ({"normals": np.zeros((20, 3))}, r"`normals` must have positive length, got 20 zeros of 20"),
        ({"world_from_cam": np.eye(4)[None]}, r"Cameras need both .* got no `intrinsics`"),
        (
            {"world_from_cam": np.eye(4)[None], "intrinsics": np.eye(3)[None]},
            r"`image_size` must be \(height, width\) in whole pixels with cameras, got None",
        ),
        (
            {"world_from_cam": np.eye(4)[None], "intrinsics": np.eye(3)[None].repeat(2, 0), "image_size": (4, 5)},
            r"`intrinsics` must have shape \(1, 3, 3\) to match the 1 poses .* got \(2, 3, 3\)",
        ),
    ],
)
def test_from_point_cloud_names_what_is_wrong(arguments, message):
    points = np.random.default_rng(0).random((20, 3))
    with pytest.raises(ValueError, match=message):
        SceneGeometry.from_point_cloud(**{"points": points, **arguments})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"points": torch.zeros(4, 3).double()},
            TypeError,
            r"`points` must be a torch.float32 tensor .* got torch.float64",
        ),
        ({"normals": torch.full((4, 3), 2.0)}, ValueError, r"unit length, got one that is 2.464 off"),
        ({"scale_source": "unknown"}, ValueError, r"got 'unknown' with `is_metric`=True"),
        ({"is_metric": "yes"}, TypeError, r"`is_metric` must be True or False, got 'yes'"),
        ({"is_metric": False}, ValueError, r"got 'metric' with `is_metric`=False"),
        ({"gravity": "measured"}, ValueError, r"`gravity` must be one of .* got 'measured'"),
        ({"metres_per_unit": 0.0}, ValueError, r"`metres_per_unit` must be positive, got 0.0"),
        ({"scene_from_dataset": torch.eye(4).double() * 2}, ValueError, r"`scene_from_dataset` must hold rotations"),
        ({"scene_from_dataset": torch.eye(3).double()}, ValueError, r"made of 4x4 matrices, got shape \(3, 3\)"),
    ],
)
def test_scene_geometry_checks_its_fields(change, error, message):
    fields = {"points": torch.rand(4, 3), "colors": torch.rand(4, 3), "normals": torch.eye(3)[[0, 1, 2, 0]]}
    with pytest.raises(error, match=message):
        SceneGeometry(**{**fields, **change})
