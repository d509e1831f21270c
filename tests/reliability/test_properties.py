# SPDX-License-Identifier: Apache-2.0
"""What holds for every valid input: files and transforms give back what went in, codes tell voxels apart, text stays text."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from geode.modeling_geode.answers_geode import METRES_PER_UNIT, convert_from_si, convert_to_si
from geode.modeling_geode.geometry_geode import invert_rigid, transform_boxes, transform_points, voxel_representatives
from geode.modeling_geode.scene_files_geode import PlyCloud, read_ply, write_ply
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry
from geode.modeling_geode.serialization_geode import serialization_depth, serialize
from tests.common_tiny import make_processor


FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
COORDINATES = st.floats(-400.0, 400.0, width=32)
POINTS = np_st.arrays(np.float32, st.tuples(st.integers(3, 12), st.just(3)), elements=COORDINATES)
QUATERNIONS = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: math.hypot(*q) > 0.1)


def rigid(quat_wxyz, translation) -> torch.Tensor:
    """The map of a quaternion and a translation, by the textbook's formula."""
    w, x, y, z = (value / math.hypot(*quat_wxyz) for value in quat_wxyz)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), translation[0]],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), translation[1]],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), translation[2]],
        [0.0, 0.0, 0.0, 1.0],
    ]
    return torch.tensor(rows, dtype=torch.float64)


@FEW
@given(quat=QUATERNIONS, translation=st.tuples(*[COORDINATES] * 3), points=POINTS)
def test_points_come_back_from_any_frame(quat, translation, points):
    matrix, points = rigid(quat, translation), torch.from_numpy(points).double()
    there = transform_points(matrix, points)
    torch.testing.assert_close(transform_points(invert_rigid(matrix), there), points, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cdist(there, there), torch.cdist(points, points), rtol=1e-6, atol=1e-4)


@FEW
@given(yaw=st.floats(-4, 4), offset=st.tuples(*[COORDINATES] * 3), box_yaw=st.floats(-1.57, 1.57))
def test_boxes_come_back_from_any_upright_frame(yaw, offset, box_yaw):
    matrix = rigid((math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)), offset)
    box = torch.tensor([[1.0, -2.0, 0.5, 0.4, 1.1, 2.0, box_yaw]], dtype=torch.float64)
    back = transform_boxes(transform_boxes(box, matrix), invert_rigid(matrix))
    torch.testing.assert_close(back[:, :6], box[:, :6], rtol=0, atol=1e-9)
    # A box turned by half a turn is the same box.
    assert abs(math.remainder(float(back[0, 6]) - box_yaw, math.pi)) < 1e-9


@FEW
@given(points=POINTS, voxel_size=st.floats(0.01, 500.0))
def test_each_occupied_voxel_keeps_one_of_its_points(points, voxel_size):
    points = torch.from_numpy(points).double()
    rows, voxel_of_point = voxel_representatives(points, voxel_size, origin=torch.zeros(3, dtype=torch.float64))
    cells = [tuple(row) for row in torch.floor(points / voxel_size).long().tolist()]
    assert len(rows) == len(set(cells))
    assert all(cells[rows[voxel]] == cell for voxel, cell in zip(voxel_of_point.tolist(), cells, strict=True))


@FEW
@given(
    voxels=st.sets(st.tuples(*[st.integers(0, 65_534)] * 3), min_size=1, max_size=40),
    order=st.sampled_from(["z", "z-trans", "hilbert", "hilbert-trans"]),
)
def test_codes_tell_voxels_and_clouds_apart(voxels, order):
    grid = torch.tensor(sorted(voxels)).repeat(2, 1)
    batch = torch.arange(2).repeat_interleave(len(voxels))
    codes = serialize(grid, batch, serialization_depth(int(grid.max())), order)
    assert len(set(codes.tolist())) == len(grid)
    assert int(codes[: len(voxels)].max()) < int(codes[len(voxels) :].min())
    assert int(codes.min()) >= 0


@FEW
@given(
    value=st.floats(-1e6, 1e6), base=st.sampled_from(sorted(METRES_PER_UNIT)), power=st.sampled_from(["", "2", "3"])
)
def test_numbers_come_back_from_si(value, base, power):
    assert convert_from_si(convert_to_si(value, base + power), base + power) == pytest.approx(
        value, rel=1e-12, abs=1e-300
    )


@FEW
@given(points=POINTS, seed=st.integers(0, 100), has_colors=st.booleans())
def test_clouds_come_back_from_ply(tmp_path_factory, points, seed, has_colors):
    generator = np.random.default_rng(seed)
    colors = generator.integers(0, 256, points.shape, dtype=np.uint8) if has_colors else None
    path = tmp_path_factory.mktemp("ply") / "cloud.ply"
    write_ply(path, PlyCloud(points, colors))
    found = read_ply(path)
    np.testing.assert_array_equal(found.points, points.astype(np.float64))
    assert (found.colors is None) == (colors is None)
    if has_colors:
        np.testing.assert_array_equal(found.colors, colors)


@FEW
@given(points=POINTS, quat=QUATERNIONS, factor=st.floats(1e-3, 1e3), is_metric=st.booleans())
def test_scenes_come_back_from_their_folder(tmp_path_factory, points, quat, factor, is_metric):
    count = len(points)
    scene = SceneGeometry(
        torch.from_numpy(points),
        torch.rand(count, 3, generator=torch.Generator().manual_seed(count)),
        torch.nn.functional.normalize(torch.ones(count, 3), dim=1),
        scene_from_dataset=rigid(quat, (1.0, 2.0, 3.0)),
        metres_per_unit=factor,
        is_metric=is_metric,
        scale_source="factor" if is_metric else "unknown",
    )
    folder = tmp_path_factory.mktemp("scene")
    scene.save(folder)
    found = SceneGeometry.load(folder)
    for name in ("points", "colors", "normals", "world_from_cam", "intrinsics", "scene_from_dataset"):
        assert torch.equal(getattr(found, name), getattr(scene, name)), name
    assert found.summary() == scene.summary()


@FEW
@given(
    tokens=np_st.arrays(np.float32, np_st.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=COORDINATES),
    digest=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_encodings_come_back_from_their_file(tmp_path_factory, tokens, digest):
    tokens = torch.from_numpy(tokens)
    path = tmp_path_factory.mktemp("encoding") / "scene.safetensors"
    SceneEncoding(tokens, tokens[0, :1], {"a": digest}, digest).save(path)
    found = SceneEncoding.load(path)
    assert torch.equal(found.visual_tokens, tokens)
    assert torch.equal(found.rationale_tokens, tokens[0, :1])
    assert (found.summary, found.encoder_digest) == ({"a": digest}, digest)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@FEW
@given(
    pieces=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=8)
        | st.sampled_from(
            [
                "<REG>",
                "<3DBBOX>",
                "<spatio>",
                "<IMG_CONTEXT>",
                "<|im_start|>",
                "<|im_end|>",
                "<video>",
                "\ue0000\ue001",
            ]
        ),
        max_size=5,
    )
)
def test_text_of_a_user_stays_text(processor, pieces):
    text = "".join(pieces)
    ids = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0].tolist()
    frame = processor.apply_chat_template([{"role": "user", "content": ""}], tokenize=True)[0].tolist()
    special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    assert [token for token in ids if token in special] == [token for token in frame if token in special]
    assert "regression_targets" not in processor.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=True, return_dict=True
    )
