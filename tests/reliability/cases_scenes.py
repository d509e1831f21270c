# SPDX-License-Identifier: Apache-2.0
"""Bad geometry: arrays, cameras, saved scenes, PLY files and encoded scenes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from geode.modeling_geode.scene_files_geode import read_ply
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry
from tests.reliability.common_reliability import (
    DEEP,
    GARBAGE,
    ONE_CAMERA,
    PLY_HEADER,
    POINTS,
    Case,
    World,
    safetensors_bytes,
)


DEPTH = np.full((1, 5, 7), 2.0)


def cloud(**changes):
    return lambda world: SceneGeometry.from_point_cloud(**{"points": POINTS, **changes})


def camera(**changes):
    return cloud(**{**ONE_CAMERA, **changes})


def frames(**changes):
    given = {name: ONE_CAMERA[name] for name in ("world_from_cam", "intrinsics")}
    return lambda world: SceneGeometry.from_rgbd(**{"depth": DEPTH, **given, **changes})


def scene(**changes):
    points, normals = torch.tensor(POINTS).float(), torch.tensor([[0.0, 0.0, 1.0]]).repeat(50, 1)
    fields = {"points": points, "colors": torch.zeros(50, 3), "normals": normals, **changes}
    return lambda world: SceneGeometry(**fields)


def inputs(**options):
    return lambda world: scene()(world).to_model_inputs(**{"grid_size": 0.02, **options})


def copied(world: World) -> Path:
    folder = world.folder / "scene"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(world.geometry, folder))


def header(change):
    """Load a saved scene whose header has other values."""

    def call(world: World):
        path = copied(world) / "geometry.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), encoding="utf-8")
        return SceneGeometry.load(path.parent)

    return call


def header_bytes(content: bytes):
    def call(world: World):
        folder = copied(world)
        (folder / "geometry.json").write_bytes(content)
        return SceneGeometry.load(folder)

    return call


def tensors_bytes(content: bytes):
    """Load a saved scene with other tensors, whose digest its header has."""

    def call(world: World):
        folder = copied(world)
        (folder / "geometry.safetensors").write_bytes(content)
        digest = {"tensors_sha256": hashlib.sha256(content).hexdigest()}
        path = folder / "geometry.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **digest}), encoding="utf-8")
        return SceneGeometry.load(folder)

    return call


def ply(content: str | bytes):
    return lambda world: read_ply(world.write("cloud.ply", content))


def encoding(content: bytes):
    return lambda world: SceneEncoding.load(world.write("scene.safetensors", content))


def encoding_of(**changes):
    fields = {"visual_tokens": torch.zeros(2, 3, 4), "rationale_tokens": torch.zeros(1, 4), "summary": {}}
    return lambda world: SceneEncoding(**{**fields, "encoder_digest": "a", **changes})


F32 = {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}
HUGE = {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 12 * 10**12]}
FORGED = {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 12]}

_CLOUD, _RGBD = "`SceneGeometry.from_point_cloud`", "`SceneGeometry.from_rgbd`"
_SCENE, _LOAD, _PLY = "`SceneGeometry`", "`SceneGeometry.load`", "`SceneGeometry.from_ply`, `read_ply`"
_ENCODING, _ENCODED = "`SceneEncoding.load`", "`SceneEncoding`"

CASES = (
    Case(_CLOUD, "None", cloud(points=None), TypeError, "got NoneType", "must be an array or a tensor"),
    Case(_CLOUD, "text", cloud(points="abc"), TypeError, "got str", "must be an array or a tensor"),
    Case(_CLOUD, "lists of text", cloud(points=[["a", "b", "c"]]), TypeError, "got <U1", "must hold real numbers"),
    Case(_CLOUD, "rows of several lengths", cloud(points=[[1, 2, 3], [1]]), ValueError, "got [[1, 2, 3], [1]]", "rows of one length"),
    Case(_CLOUD, "objects", cloud(points=np.array([[None, 1, 2]])), TypeError, "got object", "must hold real numbers"),
    Case(_CLOUD, "complex numbers", cloud(points=POINTS.astype(complex)), TypeError, "got complex128", "must hold real numbers"),
    Case(_CLOUD, "no points", cloud(points=np.zeros((0, 3))), ValueError, "got (0, 3)", "with at least one point"),
    Case(_CLOUD, "wrong shape", cloud(points=np.zeros((5, 2))), ValueError, "got (5, 2)", "(num_points, 3)"),
    Case(_CLOUD, "NaN", cloud(points=np.full((5, 3), np.nan)), ValueError, "got 15 NaN", "Drop them first"),
    Case(_CLOUD, "infinity", cloud(points=np.full((5, 3), np.inf)), ValueError, "got 15 NaN or infinite", "Drop them first"),
    Case(_CLOUD, "metric, 100 km wide", cloud(points=POINTS * 1e5), ValueError, "e+05 m", "Check the unit"),
    Case(_CLOUD, "coordinates of 1e30", cloud(points=POINTS * 1e30, is_metric=False), ValueError, "e+30", "Drop outliers"),
    Case(_CLOUD, "points all in one place", cloud(points=np.zeros((5, 3)), is_metric=False), ValueError, "the median distance between them is 0", "needs points away from its cameras"),
    Case(_CLOUD, "two points", cloud(points=[[0, 0, 0], [1, 1, 1]]), ValueError, "got 2 points", "Pass `normals`"),
    Case(_CLOUD, "more points than `max_input_points`", cloud(max_input_points=3), ValueError, "got 50", "thin the cloud"),
    Case(_CLOUD, "an array of 240 GB that is not there", frames(depth=np.broadcast_to(np.float32(1), (60000, 1000, 1000))), ValueError, "240000000000 bytes", "Use fewer frames"),
    Case(_CLOUD, "colours beyond 1", cloud(colors=np.full((50, 3), 255.0)), ValueError, "got 255 to 255", "Give 0..255 as uint8"),
    Case(_CLOUD, "colours of other length", cloud(colors=np.zeros((5, 3))), ValueError, "got (5, 3)", "must have shape (50, 3)"),
    Case(_CLOUD, "normals of length 0", cloud(normals=np.zeros((50, 3))), ValueError, "got 50 zeros of 50", "Leave `normals` out"),
    Case(_CLOUD, "`up` of length 0", cloud(up=(0, 0, 0)), ValueError, "got [0.0, 0.0, 0.0]", "direction of positive length"),
    Case(_CLOUD, "`up` in words", cloud(up="z"), ValueError, "got 'z'", "a direction of 3 numbers or 'floor'"),
    Case(_CLOUD, "`is_metric` in words", cloud(is_metric="no"), TypeError, "got 'no'", "must be True or False"),
    Case(_CLOUD, "`max_points` of 0", cloud(max_points=0), ValueError, "got 0", "must be at least 1"),
    Case(_CLOUD, "`max_points` of 2.5", cloud(max_points=2.5), TypeError, "got 2.5", "must be a whole number"),
    Case(_CLOUD, "`voxel_size_m` of 0", cloud(voxel_size_m=0), ValueError, "got 0", "must be positive"),
    Case(_CLOUD, "`voxel_size_m` in words", cloud(voxel_size_m="a"), TypeError, "got 'a'", "must be a finite number"),
    Case(_CLOUD, "voxels too small to be counted", cloud(voxel_size_m=1e-12), ValueError, "e+12 voxels", "enlarge the voxels"),
    Case(_CLOUD, "poses without intrinsics", cloud(world_from_cam=np.eye(4)[None]), ValueError, "got no `intrinsics`", "Cameras need both"),
    Case(_CLOUD, "poses of wrong shape", camera(world_from_cam=np.eye(3)[None]), ValueError, "got (1, 3, 3)", "(num_cameras, 4, 4)"),
    Case(_CLOUD, "a pose that scales", camera(world_from_cam=2 * np.eye(4)[None]), ValueError, "got an error of 3", "must hold rotations"),
    Case(_CLOUD, "a pose of NaN", camera(world_from_cam=np.full((1, 4, 4), np.nan)), ValueError, "is not at indices [0]", "Leave out frames that lost tracking"),
    Case(_CLOUD, "a negative focal length", camera(intrinsics=-ONE_CAMERA["intrinsics"]), ValueError, "got -8", "must have positive focal lengths"),
    Case(_CLOUD, "no image size", camera(image_size=None), ValueError, "got None", "(height, width) in whole pixels"),
    Case(_CLOUD, "times of other length", camera(timestamps_s=[1, 2]), ValueError, "got (2,)", "must have shape (1,)"),
    Case(_RGBD, "depth in whole numbers", frames(depth=DEPTH.astype(int)), TypeError, "got torch.int64", "divide by 1000"),
    Case(_RGBD, "one depth map", frames(depth=DEPTH[0]), ValueError, "got (5, 7)", "(num_frames, height, width)"),
    Case(_RGBD, "negative depth", frames(depth=-DEPTH), ValueError, "got a minimum of -2", "Mark invalid pixels with 0"),
    Case(_RGBD, "no valid depth", frames(depth=DEPTH * np.nan), ValueError, "got none above 0 in 35 pixels", "must have valid values"),
    Case(_RGBD, "depth of 1e300", frames(depth=DEPTH * 1e300, is_metric=False), ValueError, "e+300", "Drop outliers"),
    Case(_RGBD, "images in floating point", frames(images=np.zeros((1, 5, 7, 3))), TypeError, "got torch.float64", "must be uint8 in 0..255"),
    Case(_RGBD, "images of another size", frames(images=np.zeros((1, 4, 7, 3), np.uint8)), ValueError, "got (1, 4, 7, 3)", "Resize them"),
    Case(_RGBD, "confidence of NaN", frames(depth_confidence=DEPTH * np.nan), ValueError, "got 35 NaN", "Drop them first"),
    Case(_SCENE, "a tensor in float64", scene(points=torch.zeros(50, 3).double()), TypeError, "got torch.float64", "convert arrays"),
    Case(_SCENE, "unknown `scale_source`", scene(scale_source="x"), ValueError, "got 'x'", "must be one of ('metric'"),
    Case(_SCENE, "unknown `gravity`", scene(gravity=[]), ValueError, "got []", "must be one of ('given'"),
    Case(_SCENE, "`metres_per_unit` of 0", scene(metres_per_unit=0), ValueError, "got 0", "must be positive"),
    Case(_SCENE, "boxes of NaN", lambda world: scene()(world).boxes_in_scene(np.full((2, 7), np.nan)), ValueError, "got 14 NaN", "Drop them first"),
    Case(_SCENE, "boxes of 6 numbers", lambda world: scene()(world).boxes_in_scene(np.zeros((2, 6))), ValueError, "got (2, 6)", "(..., 7)"),
    Case(_SCENE, "`grid_size` of NaN", inputs(grid_size=float("nan")), ValueError, "got nan", "a positive length in metres"),
    Case(_SCENE, "`grid_size` of a nanometre", inputs(grid_size=1e-9), ValueError, "`grid_size` 1e-09", "use a larger `grid_size`"),
    Case(_SCENE, "`with_scale` of a metric scene", lambda world: scene()(world).with_scale(2.0, "factor"), ValueError, "this one is metric", "needs a scene of unknown scale"),
    Case(_LOAD, "None", lambda world: SceneGeometry.load(None), TypeError, "got None", "must be a path"),
    Case(_LOAD, "no such folder", lambda world: SceneGeometry.load(world.folder / "no"), FileNotFoundError, "has no geometry.json", "A saved scene has geometry.json"),
    Case(_LOAD, "a file", lambda world: SceneGeometry.load(world.video), ValueError, "got the file", "must be a folder written by `SceneGeometry.save`"),
    Case(_LOAD, "header: empty", header_bytes(b""), ValueError, "got b''", "Write it again"),
    Case(_LOAD, "header: garbage", header_bytes(GARBAGE), ValueError, "UnicodeDecodeError", "must be JSON in UTF-8"),
    Case(_LOAD, "header: 100,000 brackets", header_bytes(DEEP), ValueError, "got b'[[[[", "must be JSON"),
    Case(_LOAD, "header: another version", header({"format_version": 9}), ValueError, "got 9", "update geode"),
    Case(_LOAD, "header: another digest", header({"tensors_sha256": "0"}), ValueError, "expects 0", "save the scene again"),
    Case(_LOAD, "header: `image_size` a number", header({"image_size": 3}), ValueError, "got 3", "(height, width) in whole pixels"),
    Case(_LOAD, "header: a scale of 400 digits", header({"metres_per_unit": 10**400}), ValueError, "got 1000", "must be a finite number"),
    Case(_LOAD, "tensors: empty", tensors_bytes(b""), ValueError, "the file has 0", "Write it again"),
    Case(_LOAD, "tensors: garbage", tensors_bytes(GARBAGE), ValueError, "its header claims 506097522914230528 bytes", "Write it again"),
    Case(_LOAD, "tensors: a shape of 12 TB", tensors_bytes(safetensors_bytes({"points": HUGE}, bytes(12))), ValueError, "is damaged: its header says that it has 12000000000", "Write the file again"),
    Case(_LOAD, "tensors: a shape of 12 TB in 12 bytes", tensors_bytes(safetensors_bytes({"points": FORGED}, bytes(12))), ValueError, "is damaged", "Write it again"),
    Case(_LOAD, "tensors: others than a scene's", tensors_bytes(safetensors_bytes({"points": F32}, bytes(12))), ValueError, "lacks ['colors', 'normals', 'scene_from_dataset']", "Save it again"),
    Case(_PLY, "None", lambda world: read_ply(None), TypeError, "got None", "must be a path"),
    Case(_PLY, "no such file", lambda world: read_ply(world.folder / "no.ply"), FileNotFoundError, "no.ply", "There is no point cloud"),
    Case(_PLY, "empty", ply(b""), ValueError, "got b''", "must be a PLY file"),
    Case(_PLY, "garbage", ply(GARBAGE), ValueError, "got b'\\x00", "must be a PLY file"),
    Case(_PLY, "no vertices", ply(PLY_HEADER.format("ascii", 0)), ValueError, "promises 0", "must have 1 to 50000000 vertices"),
    Case(_PLY, "10^9 vertices, text", ply(PLY_HEADER.format("ascii", 10**9) + "1 2 3\n"), ValueError, "promises 1000000000", "Thin the cloud first"),
    Case(_PLY, "10^9 vertices, binary", ply(PLY_HEADER.format("binary_little_endian", 10**9)), ValueError, "promises 1000000000 vertices and holds 0", "is truncated"),
    Case(_PLY, "a count of 5,000 digits", ply(PLY_HEADER.format("ascii", "9" * 5000)), ValueError, "'element vertex 9999", "has a line in its header that PLY does not know"),
    Case(_PLY, "a property twice", ply(PLY_HEADER.format("ascii", 1).replace("float y", "float x")), ValueError, "have ['x', 'x', 'z']", "each property once"),
    Case(_PLY, "words for numbers", ply(PLY_HEADER.format("ascii", 1) + "a b c\n"), ValueError, "'a'", "do not fit their header, 3 numbers"),
    Case(_PLY, "numbers missing", ply(PLY_HEADER.format("ascii", 1) + "1 2\n"), ValueError, "tuple of length 2", "do not fit their header, 3 numbers"),
    Case(_ENCODING, "another ending", lambda world: SceneEncoding.load("a.pt"), ValueError, "got a.pt", "must end in .safetensors"),
    Case(_ENCODING, "no such file", lambda world: SceneEncoding.load(world.folder / "no.safetensors"), FileNotFoundError, "no.safetensors", "There is no scene encoding"),
    Case(_ENCODING, "garbage", encoding(GARBAGE), ValueError, "its header claims", "Write it again"),
    Case(_ENCODING, "a header that is a list", encoding(safetensors_bytes([])), ValueError, "got []", "must be a JSON object"),
    Case(_ENCODING, "a header of 100,000 brackets", encoding(safetensors_bytes(DEEP)), ValueError, "got b'[[[[", "must be JSON"),
    Case(_ENCODING, "a tensor without a place", encoding(safetensors_bytes({"a": 1})), ValueError, "got 1", "must give the place of 'a'"),
    Case(_ENCODING, "a shape of 12 TB", encoding(safetensors_bytes({"a": HUGE}, bytes(12))), ValueError, "says that it has 12000000000", "Write the file again"),
    Case(_ENCODED, "whole numbers", encoding_of(visual_tokens=torch.zeros(2, 3, 4).long()), TypeError, "got torch.int64", "must be a floating-point tensor"),
    Case(_ENCODED, "NaN", encoding_of(visual_tokens=torch.full((2, 3, 4), torch.nan)), ValueError, "got 24 values that are not", "must be finite"),
    Case(_ENCODED, "no frames", encoding_of(visual_tokens=torch.zeros(0, 3, 4)), ValueError, "got shape (0, 3, 4)", "at least one frame"),
    Case(_ENCODED, "two widths", encoding_of(rationale_tokens=torch.zeros(1, 5)), ValueError, "got 4 and 5", "must have the same width"),
    Case(_ENCODED, "a summary in words", encoding_of(summary="a"), TypeError, "got 'a'", "must be a dict that JSON can hold"),
)  # fmt: skip

__all__ = ["CASES"]
