# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from geode.data.boxes import box_from_axes, box_from_euler, rotation_from_euler_zxy, upright_box
from geode.modeling_geode.geometry_geode import box_corners


def corners_of(center, size, rotation):
    signs = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    return np.asarray(center) + (signs * np.asarray(size)) @ np.asarray(rotation).T


def smallest_rectangle(points, num_angles=200_000):
    """Brute force over a quarter turn: area, and the extents at the best angle."""
    angles = np.linspace(0.0, math.pi / 2, num_angles, endpoint=False)
    u = np.outer(np.cos(angles), points[:, 0]) + np.outer(np.sin(angles), points[:, 1])
    v = np.outer(-np.sin(angles), points[:, 0]) + np.outer(np.cos(angles), points[:, 1])
    areas = np.ptp(u, axis=1) * np.ptp(v, axis=1)
    return areas.min()


@pytest.mark.parametrize("seed", range(12))
def test_upright_box_of_a_tilted_one_is_the_smallest_around_it(seed):
    generator = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=seed).as_matrix()
    center, size = generator.normal(size=3) * 3, 0.1 + 2 * generator.random(3)
    points = corners_of(center, size, rotation)
    box = upright_box(center, size, rotation)
    # The area is that of a brute-force search over angles 8e-6 apart, which can only be a little too large.
    area = smallest_rectangle(points)
    assert box[3] * box[4] <= area * (1 + 1e-9)
    assert box[3] * box[4] == pytest.approx(area, rel=1e-4)
    assert box[2] == pytest.approx(center[2])
    assert box[5] == pytest.approx(np.ptp(points[:, 2]))
    # Every corner lies inside, and each of the four sides is touched.
    cosine, sine = math.cos(box[6]), math.sin(box[6])
    inside = (points[:, :2] - box[:2]) @ np.array([[cosine, -sine], [sine, cosine]])
    np.testing.assert_allclose(inside.max(axis=0), [box[3] / 2, box[4] / 2], atol=1e-9)
    np.testing.assert_allclose(inside.min(axis=0), [-box[3] / 2, -box[4] / 2], atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_upright_box_of_an_upright_one_is_the_same_solid(seed):
    generator = np.random.default_rng(seed)
    center, size, yaw = generator.normal(size=3), 0.1 + 2 * generator.random(3), generator.uniform(-4, 4)
    rotation = Rotation.from_euler("z", yaw).as_matrix()
    # Any of the 24 ways to name the axes of the same box.
    for order in itertools.permutations(range(3)):
        named = rotation[:, order] * np.array([1.0, -1.0, 1.0])
        box = upright_box(center, size[list(order)], named)
        assert box[3] >= box[4]
        assert -math.pi / 2 < box[6] <= math.pi / 2
        expected = corners_of(center, size, rotation)
        got = box_corners(torch.tensor(box, dtype=torch.float64)).numpy()
        distances = np.linalg.norm(got[:, None] - expected[None], axis=-1)
        np.testing.assert_allclose(distances.min(axis=1), 0.0, atol=1e-9)
        np.testing.assert_allclose(distances.min(axis=0), 0.0, atol=1e-9)


def test_upright_box_of_a_square_footprint_has_a_yaw_within_an_eighth_turn():
    rotation = Rotation.from_euler("z", 80, degrees=True).as_matrix()
    assert math.degrees(upright_box([0, 0, 0], [1, 1, 2], rotation)[6]) == pytest.approx(-10)


@pytest.mark.parametrize("seed", range(6))
def test_euler_angles_turn_about_z_then_x_then_y(seed):
    a, b, c = np.random.default_rng(seed).uniform(-3, 3, size=3)
    # Capital letters are intrinsic in SciPy: each turn about the axes that the ones before have moved.
    expected = Rotation.from_euler("ZXY", [a, b, c]).as_matrix()
    np.testing.assert_allclose(rotation_from_euler_zxy(a, b, c), expected, atol=1e-12)
    values = [1.0, 2.0, 3.0, 0.5, 1.5, 0.7, a, b, c]
    np.testing.assert_allclose(box_from_euler(values), upright_box(values[:3], values[3:6], expected), atol=1e-9)


def test_box_from_euler_pads_shorter_boxes():
    assert box_from_euler([1, 2, 3, 4, 2, 1]) == [1, 2, 3, 4, 2, 1, 0]
    assert box_from_euler([1, 2, 3, 4, 2, 1, 0.25]) == pytest.approx([1, 2, 3, 4, 2, 1, 0.25])


def test_box_from_axes_takes_rows_for_axes():
    # The first axis points along (cos 30, sin 30): row one of the nine numbers, not column one.
    cosine, sine = math.cos(math.pi / 6), math.sin(math.pi / 6)
    axes = [cosine, sine, 0.0, -sine, cosine, 0.0, 0.0, 0.0, 1.0]
    assert box_from_axes([1, 2, 3], [4, 2, 1], axes) == pytest.approx([1, 2, 3, 4, 2, 1, math.pi / 6])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: upright_box([0, 0], [1, 1, 1], np.eye(3)), r"shapes \(2,\)"),
        (lambda: upright_box([0, 0, 0], [1, 0, 1], np.eye(3)), "lengths above 0"),
        (lambda: upright_box([0, math.nan, 0], [1, 1, 1], np.eye(3)), "finite centre"),
        (lambda: upright_box([0, 0, 0], [1, 1, 1], 2 * np.eye(3)), "off by 3"),
        (lambda: upright_box([0, 0, 0], [1, 1, 1], math.nan * np.eye(3)), "off by nan"),
        (lambda: upright_box([0, 0, None], [1, 1, "x"], np.eye(3)), "made of numbers"),
        (lambda: box_from_euler([1, 2, 3, 4]), "6, 7 or 9 numbers, got 4"),
        (lambda: box_from_euler(None), "6, 7 or 9 numbers|made of numbers"),
        (lambda: box_from_axes([0, 0, 0], [1, 1, 1], [1, 0, 0]), "9 numbers, got 3"),
    ],
)
def test_malformed_boxes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
