# SPDX-License-Identifier: Apache-2.0
"""`geode reconstruct`: the folder that it writes, read back without its own code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import geode
from geode import reconstruct
from geode.cli import main
from geode.data import plans
from geode.modeling_geode.geometry_geode import invert_rigid, project_points, transform_points
from geode.modeling_geode.reconstruction_geode import reconstruct_with_vggt
from geode.modeling_geode.scene_files_geode import read_ply
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.vggt_geode import VggtImageProcessor
from geode.modeling_geode.video_processing_geode import load_video_frames
from geode.reconstruct import load_reconstructor, read_positions, show_progress
from tests.modeling_geode.common_geode import tiny_vggt
from tests.modeling_geode.common_hub import put_in_hub_cache


VIDEO = geode.embedded_scene() / "room.mp4"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
NUM_FRAMES = 5


@pytest.fixture(scope="module")
def vggt_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vggt")
    tiny_vggt(image_size=56).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene_folder(vggt_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "scene"
    arguments = ["reconstruct", str(VIDEO), "-o", str(folder), "--model", str(vggt_folder)]
    assert main([*arguments, "--num-frames", str(NUM_FRAMES), "--camera-height-m", "1.5", "--up", "0", "-1", "0"]) == 0
    return folder


def test_reconstruct_writes_the_scene_of_the_plain_function(scene_folder, vggt_folder):
    frames, timestamps_s = load_video_frames(VIDEO, num_frames=NUM_FRAMES)
    options = {"camera_height_m": 1.5, "up": (0, -1, 0), "timestamps_s": timestamps_s}
    want = reconstruct_with_vggt(frames, load_reconstructor(vggt_folder), **options)
    got = SceneGeometry.load(scene_folder)
    assert got.summary() == want.summary()
    assert (got.scale_source, got.gravity, got.num_cameras) == ("camera_height", "given", NUM_FRAMES)
    assert torch.equal(got.points, want.points)
    assert got.timestamps_s.tolist() == timestamps_s.tolist()
    cloud = read_ply(scene_folder / "points.ply")
    np.testing.assert_array_equal(cloud.points.astype(np.float32), got.points.numpy())
    assert sorted(path.name for path in scene_folder.iterdir()) == [
        "colmap", "geometry.json", "geometry.safetensors", "points.ply", "scene.png",
    ]  # fmt: skip


def rotation_by_hand(w, x, y, z):
    """The matrix of a unit quaternion, written out from q v q*."""
    vector, skew = np.array([x, y, z]), np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (w * w - vector @ vector) * np.eye(3) + 2 * np.outer(vector, vector) + 2 * w * skew


def test_colmap_model_projects_points_to_the_pixels_that_vggt_means(scene_folder):
    """COLMAP's files, read by hand, against the scene's cameras and the processor's map to the video's pixels."""
    scene = SceneGeometry.load(scene_folder)
    frames, _ = load_video_frames(VIDEO, num_frames=NUM_FRAMES)
    original_from_processed = VggtImageProcessor(image_size=56)(frames)["original_from_processed"]
    lines = {
        name: [line.split() for line in (scene_folder / "colmap" / name).read_text().splitlines() if line[:1] != "#"]
        for name in ("cameras.txt", "images.txt", "points3D.txt")
    }
    assert len(lines["points3D.txt"]) == scene.num_points
    assert len(lines["images.txt"]) == 2 * NUM_FRAMES
    assert all(line == [] for line in lines["images.txt"][1::2])
    points = np.array([[float(value) for value in line[1:4]] for line in lines["points3D.txt"]])
    colors = np.array([[int(value) for value in line[4:7]] for line in lines["points3D.txt"]])
    np.testing.assert_allclose(points, scene.points.numpy(), atol=1e-5)
    np.testing.assert_allclose(colors / 255, scene.colors.numpy(), atol=1e-6)
    for index in range(NUM_FRAMES):
        number, model, width, height, fx, fy, cx, cy = lines["cameras.txt"][index]
        assert (number, model, width, height) == (str(index + 1), "PINHOLE", "320", "240")
        image_id, *pose, camera_id, name = lines["images.txt"][2 * index]
        assert (image_id, camera_id) == (number, number)
        assert np.array_equal(np.asarray(Image.open(scene_folder / "colmap" / "images" / name)), frames[index])
        quaternion, translation = [float(value) for value in pose[:4]], np.array([float(value) for value in pose[4:]])
        x, y, z = (points @ rotation_by_hand(*quaternion).T + translation).T
        front = z > 0.1
        corner = np.stack([float(fx) * x / z + float(cx), float(fy) * y / z + float(cy)], axis=1)[front]
        cam = transform_points(invert_rigid(scene.world_from_cam[index].double()), scene.points.double())[front]
        processed = project_points(cam, scene.intrinsics[index].double())
        homogeneous = torch.cat([processed, torch.ones_like(processed[:, :1])], dim=1)
        original = (homogeneous @ original_from_processed[index].T)[:, :2].numpy()
        # COLMAP counts from the corner of the top-left pixel, we from its centre.
        np.testing.assert_allclose(corner - 0.5, original, atol=0.02)


def test_reconstructed_folder_is_geometry_for_ask(scene_folder, capsys):
    assert main(["ask", str(VIDEO), "Locate the sofa.", "--geometry", str(scene_folder)]) == 0
    assert capsys.readouterr().out.startswith("answer: ")


def test_reconstruct_prints_facts_and_a_bar(vggt_folder, tmp_path, capsys):
    arguments = [
        "reconstruct",
        str(VIDEO),
        "-o",
        str(tmp_path / "s"),
        "--model",
        str(vggt_folder),
        "--num-frames",
        "5",
    ]
    assert main([*arguments, "--frames-chunk-size", "2", "--image-size", "28", "--metres-per-unit", "2.5"]) == 0
    captured = capsys.readouterr()
    assert "is_metric: True\nscale_source: factor\nmetres_per_unit: 2.5\n" in captured.out
    # Trunk and depth head in 3 chunks each, 2 layers, 1 camera head.
    assert "9/9" in captured.err
    assert main(arguments) == 2
    assert "`out` must be new or empty" in capsys.readouterr().err


def test_show_progress_leaves_no_hooks_behind():
    model = tiny_vggt()
    with pytest.raises(ValueError, match="must have shape"), show_progress(model, 2):
        model(torch.zeros(1))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["none.mp4"], "There is no video at none.mp4"),
        ([str(VIDEO), "--camera-positions", "none.txt"], "`camera_positions` must be a text file"),
        (
            [str(VIDEO), "--known-length", "0.5", "1", "1", "1", "2", "2", "1"],
            "`known_length` must be FRAME U V FRAME",
        ),
        ([str(VIDEO), "--known-length", "0", "1", "1", "9", "2", "2", "1"], "names frame 9, and there are 5"),
        ([str(VIDEO), "--camera-height-m", "-1"], "`camera_height_m` must be a positive number"),
        ([str(VIDEO), "--num-frames", "0"], "`num_frames`"),
        ([str(VIDEO), "--image-size", "100"], "multiple of `patch_size`, got 100 and 14"),
        ([str(VIDEO), "--frames-chunk-size", "0"], "`frames_chunk_size` must be at least 1, got 0"),
        ([str(VIDEO), "--min-confidence", "1e9"], "drops every pixel"),
    ],
)
def test_reconstruct_names_what_is_wrong(vggt_folder, tmp_path, capsys, arguments, fragment):
    video, *options = arguments
    out = tmp_path / "scene"
    command = ["reconstruct", video, "-o", str(out), "--model", str(vggt_folder), "--num-frames", "5", *options]
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("geode: error: ")
    assert fragment in last
    assert not out.exists()


def test_sources_of_scale_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["reconstruct", "v.mp4", "-o", "s", "--metres-per-unit", "1", "--camera-height-m", "1.5"])
    assert "not allowed with" in capsys.readouterr().err


def test_camera_positions_come_from_a_text_file(vggt_folder, tmp_path):
    """The reconstructed positions times 3, moved, give a scale of 3."""
    frames, _ = load_video_frames(VIDEO, num_frames=NUM_FRAMES)
    centers = reconstruct_with_vggt(frames, load_reconstructor(vggt_folder), up=None).world_from_cam[:, :3, 3]
    lines = [" ".join(map(str, row)) for row in (3 * centers + torch.tensor([1.0, 2, 3])).tolist()]
    (tmp_path / "poses.txt").write_text("\n".join(["# x y z", *lines]))
    command = ["reconstruct", str(VIDEO), "-o", str(tmp_path / "scene"), "--model", str(vggt_folder)]
    assert main([*command, "--num-frames", "5", "--camera-positions", str(tmp_path / "poses.txt")]) == 0
    scene = SceneGeometry.load(tmp_path / "scene")
    assert scene.scale_source == "poses"
    assert scene.metres_per_unit == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"), [("1 2\n3 4\n", "3 numbers in each line, got 2"), ("1 2 three\n", "must hold `x y z`")]
)
def test_read_positions_refuses_other_files(tmp_path, text, message):
    (tmp_path / "poses.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_positions(tmp_path / "poses.txt")


def test_load_reconstructor_takes_public_weights_and_geode_models(vggt_folder, tmp_path):
    shutil.copy(FIXTURES / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((FIXTURES / "config.json").read_text())["model"]))
    assert load_reconstructor(tmp_path).config.hidden_size == 32
    model = geode.GeodeForConditionalGeneration.from_pretrained(geode.tiny_checkpoint())
    model.attach_reconstructor(vggt_folder)
    model.save_pretrained(tmp_path / "geode")
    taken = load_reconstructor(tmp_path / "geode")
    assert not taken.training
    for name, tensor in tiny_vggt(image_size=56).state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="must hold a reconstructor"):
        load_reconstructor(geode.tiny_checkpoint())


def test_weights_that_are_not_for_commercial_use_say_so(tmp_path, monkeypatch):
    """The public name, laid out as a download; the same folder on its own has no known terms."""
    folder = tmp_path / "public"
    folder.mkdir()
    shutil.copy(FIXTURES / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((FIXTURES / "config.json").read_text())["model"]))
    put_in_hub_cache(folder, "facebook/VGGT-1B", tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    messages = []
    monkeypatch.setattr(reconstruct.logger, "warning", messages.append)
    load_reconstructor(folder)
    assert messages == []
    load_reconstructor("facebook/VGGT-1B")
    assert messages == ["The weights of facebook/VGGT-1B are under cc-by-nc-4.0: they are not for commercial use."]


def test_picture_shows_the_walls_along_the_page(tmp_path, monkeypatch):
    """The embedded room stands askew in its frame; drawn, its walls are straight: few columns hold most of the edge."""
    monkeypatch.setattr(plans, "SCALE", 1)
    scene = SceneGeometry.load(geode.embedded_scene() / "geometry")
    outline = plans.outline_of(scene.points[:, :2].double().numpy())
    side = outline[1] - outline[0]
    floor_plan = json.loads((geode.embedded_scene() / "scene.json").read_text())["room"]["floor_polygon"]
    wall = np.subtract(floor_plan[1], floor_plan[0])
    turn = np.degrees(np.arctan2(side[1], side[0]) - np.arctan2(wall[1], wall[0])) % 90
    assert min(turn, 90 - turn) < 1.5
    frames, _ = load_video_frames(VIDEO, num_frames=32)
    plans.draw_geometry(scene, frames, tmp_path / "metric.png", title="room")
    unknown = SceneGeometry.from_point_cloud(
        0.1 * scene.points, colors=scene.colors, normals=scene.normals, is_metric=False, up=(0, 0, 1),
        world_from_cam=scaled(scene.world_from_cam, 0.1), intrinsics=scene.intrinsics, image_size=scene.image_size,
    )  # fmt: skip
    plans.draw_geometry(unknown, frames, tmp_path / "unknown.png", title="room")
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("metric", "unknown"))
    # The same room in another unit makes about the same picture: the plan fills the page either way.
    assert first.shape == (plans.SIZE[1], plans.SIZE[0], 3)
    assert np.abs(first - second).mean() < 12
    assert np.abs(first - np.array(plans.PAPER)).mean() > 20


def scaled(world_from_cam, factor):
    poses = world_from_cam.clone()
    poses[:, :3, 3] *= factor
    return poses


def test_picture_of_one_downward_portrait_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "SCALE", 1)
    down = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1.5], [0, 0, 0, 1]])[None]
    depth = torch.full((1, 40, 30), 1.5)
    intrinsics = torch.tensor([[30.0, 0, 14.5], [0, 30, 19.5], [0, 0, 1]])[None]
    scene = SceneGeometry.from_rgbd(depth, intrinsics, down, up=(0, 0, 1))
    frame = np.full((400, 300, 3), 120, dtype=np.uint8)
    plans.draw_geometry(scene, [frame], tmp_path / "picture.png", title="down")
    picture = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    # The strip is no higher than 300 pixels, and keeps the frame's shape.
    rows, columns = (np.abs(picture - 120).max(axis=2) == 0).nonzero()
    assert rows.max() - rows.min() + 1 == plans.MAX_STRIP_HEIGHT
    assert columns.max() - columns.min() + 1 == 225
