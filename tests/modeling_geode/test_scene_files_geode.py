# SPDX-License-Identifier: Apache-2.0
"""PLY files: the oracles are bytes written by hand, and a cloud that comes back."""

import struct

import numpy as np
import pytest
import torch

from geode.modeling_geode.scene_files_geode import PlyCloud, read_ply, write_ply
from geode.modeling_geode.scene_geode import SceneGeometry
from tests.modeling_geode.common_scene_geode import Room


POINTS = [(0.5, -1.25, 2.0), (3.0, 4.0, -5.5)]
COLORS = [(255, 128, 0), (1, 2, 3)]
NORMALS = [(0.0, 0.0, 1.0), (0.6, 0.0, -0.8)]
TEXT = """ply
format ascii 1.0
comment made by hand
element camera 1
property float focal
element vertex 2
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
property float nx
property float ny
property float nz
property float quality
element face 1
property list uchar int vertex_indices
end_header
77.5
0.5 -1.25 2 255 128 0 0 0 1 0.25
3 4 -5.5 1 2 3 0.6 0 -0.8 0.75
3 0 1 1
"""


def binary(order: str) -> bytes:
    """The same vertices with the properties in another order, doubles for coordinates, and an element before them."""
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    header = (
        f"ply\nformat {name} 1.0\nelement camera 1\nproperty double focal\nproperty int id\nelement vertex 2\n"
        "property uint8 blue\nproperty uint8 green\nproperty uint8 red\nproperty float64 z\nproperty float64 y\n"
        "property float64 x\nproperty short label\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = struct.pack(f"{order}di", 77.5, 9)
    for (x, y, z), (red, green, blue) in zip(POINTS, COLORS, strict=True):
        body += struct.pack(f"{order}BBBdddh", blue, green, red, z, y, x, -7)
    return header.encode() + body + struct.pack(f"{order}Biii", 3, 0, 1, 1)


@pytest.mark.parametrize("content", [TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), binary("<"), binary(">")])
def test_read_ply_takes_every_format_and_order(tmp_path, content):
    (tmp_path / "cloud.ply").write_bytes(content)
    cloud = read_ply(tmp_path / "cloud.ply")
    assert cloud.points.tolist() == [list(point) for point in POINTS]
    assert cloud.points.dtype == np.float64
    assert cloud.colors.tolist() == [list(color) for color in COLORS]
    assert cloud.colors.dtype == np.uint8
    if b"nx" in content:
        np.testing.assert_allclose(cloud.normals, NORMALS, atol=1e-7)
    else:
        assert cloud.normals is None


def test_write_ply_writes_the_bytes_of_the_format(tmp_path):
    cloud = PlyCloud(np.array(POINTS), np.array(COLORS, dtype=np.uint8), np.array(NORMALS))
    write_ply(tmp_path / "new" / "cloud.ply", cloud, comments=("in metres",))
    header = (
        "ply\nformat binary_little_endian 1.0\ncomment in metres\nelement vertex 2\nproperty float x\nproperty float y\n"
        "property float z\nproperty float nx\nproperty float ny\nproperty float nz\nproperty uchar red\n"
        "property uchar green\nproperty uchar blue\nend_header\n"
    )
    rows = zip(POINTS, NORMALS, COLORS, strict=True)
    body = b"".join(struct.pack("<6f3B", *point, *normal, *color) for point, normal, color in rows)
    assert (tmp_path / "new" / "cloud.ply").read_bytes() == header.encode() + body
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cloud.ply"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"must be a PLY file, .* got b''"),
        (b"PK\x03\x04 not a cloud end_header\n", "must be a PLY file"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\n", "must be a PLY file"),
        (TEXT.replace("ascii", "brotli").encode(), "does not know: 'format brotli 1.0'"),
        (TEXT.replace("format ascii 1.0\n", "").encode(), "must state one of the formats"),
        (TEXT.replace("float quality", "quad quality").encode(), "does not know: 'property quad quality'"),
        (TEXT.replace("vertex 2", "vertex -2").encode(), "does not know: 'element vertex -2'"),
        (TEXT.replace("element vertex", "element corner").encode(), r"must have an element `vertex`, and has \['camera', 'corner'"),
        (TEXT.replace("float z", "float depth").encode(), "must have x, y and z and no lists"),
        (TEXT.replace("float quality", "list uchar int quality").encode(), "must have x, y and z and no lists"),
        (TEXT.replace("vertex 2", "vertex 5").encode(), "promises 5 vertices and holds 3"),
        (TEXT.replace("4 -5.5 1", "four -5.5 1").encode(), "do not fit their header, 10 numbers: .*'four'"),
        (TEXT.replace("4 -5.5 1 2", "4 -5.5 1").encode(), "do not fit their header, 10 numbers"),
        (TEXT.replace("property uchar", "property short").encode(), "colours .* must be uchar or floating point, and are int16"),
        (binary("<")[:-30], "promises 2 vertices and holds 1"),
        (binary("<").replace(b"vertex 2", b"vertex 9999999999"), "promises 9999999999 vertices and holds 2"),
        (binary("<").replace(b"property int id", b"property list uchar int id"), "lists before its vertices"),
    ],
)  # fmt: skip
def test_read_ply_refuses_other_and_broken_files(tmp_path, content, message):
    (tmp_path / "cloud.ply").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_ply(tmp_path / "cloud.ply")


def test_ply_names_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no point cloud at .*none\.ply"):
        read_ply(tmp_path / "none.ply")
    with pytest.raises(ValueError, match=r"must end in \.ply, got cloud\.obj"):
        write_ply("cloud.obj", PlyCloud(np.zeros((1, 3))))


def test_scene_comes_back_from_its_ply(tmp_path):
    scene = Room().build()
    scene.save_ply(tmp_path / "scene.ply")
    again = SceneGeometry.from_ply(tmp_path / "scene.ply", up=(0, 0, 1), voxel_size_m=None)
    assert b"lengths in metres, +z up" in (tmp_path / "scene.ply").read_bytes()[:200]
    # Without cameras the origin is the middle of the cloud, so the frame is moved, and said to be.
    torch.testing.assert_close(
        again.points.double() - again.scene_from_dataset[:3, 3], scene.points.double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(again.normals, scene.normals, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.colors, scene.colors, atol=0.5 / 255 + 1e-6, rtol=0)


def test_ply_without_colours_and_normals_gets_estimates(tmp_path):
    u, v = np.meshgrid(np.arange(12.0), np.arange(9.0), indexing="ij")
    plane = np.stack([0.1 * u, 0.1 * v, np.full_like(u, 0.4)], axis=-1).reshape(-1, 3)
    write_ply(tmp_path / "plane.ply", PlyCloud(plane))
    scene = SceneGeometry.from_ply(tmp_path / "plane.ply")
    assert not scene.colors.any()
    torch.testing.assert_close(scene.normals, torch.tensor([[0.0, 0, 1]]).expand(108, 3), atol=1e-5, rtol=0)
