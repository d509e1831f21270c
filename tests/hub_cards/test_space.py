# SPDX-License-Identifier: Apache-2.0
"""
Tests of the Space: what it does with uploads, what it draws, what it says, and the real app over HTTP.

The browser that uses it is in `test_space_in_a_browser.py`.
"""

import json
import math
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard

import geode
from geode.cli import main
from geode.data.plans import PREDICTION
from geode.hub_cards.space import room as rooms
from geode.hub_cards.space import uploads
from geode.hub_cards.space.room import Reply, ask_room, describe_reply, describe_room, open_embedded_room, open_room
from geode.hub_cards.space.uploads import check_question, check_video, unpack_geometry
from geode.hub_cards.space.view import as_html, figure_in_space, picture_from_above
from geode.modeling_geode.answers_geode import Answer, Box3D, Measurement
from geode.modeling_geode.geometry_geode import invert_rigid, project_points, transform_points
from geode.modeling_geode.scene_geode import SceneGeometry
from tests.hub_cards.common_space import ROOM, Visitor, write_archive


ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["Locate the sofa.", "How many picture(s) are in this room?"]
BOX = Box3D((0.4, -0.3, 0.5), (1.6, 0.8, 1.0), 0.0)


@pytest.fixture(scope="module")
def checkpoint():
    from geode.commands import load_checkpoint

    return load_checkpoint()


@pytest.fixture(scope="module")
def room(checkpoint):
    return open_embedded_room(*checkpoint)


@pytest.fixture
def archive(tmp_path) -> Path:
    return write_archive(tmp_path / "geometry.zip")


@pytest.fixture
def wide_room() -> SceneGeometry:
    """Points on a floor of 6 x 4 m, and two cameras whose pixels are not square."""
    x, y = torch.meshgrid(torch.linspace(-3, 3, 61), torch.linspace(-2, 2, 41), indexing="ij")
    points = torch.stack([x.flatten(), y.flatten(), torch.zeros(x.numel())], dim=1)
    world_from_cam = torch.eye(4).repeat(2, 1, 1)
    # The first looks along +y, the second along +x; both are upright.
    world_from_cam[0, :3, :3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    world_from_cam[1, :3, :3] = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    world_from_cam[:, :3, 3] = torch.tensor([[0.0, 0.0, 1.5], [1.0, 0.5, 1.2]])
    return SceneGeometry(
        points=points,
        colors=torch.full_like(points, 0.4),
        normals=torch.tensor([0.0, 0.0, 1.0]).expand(len(points), 3),
        world_from_cam=world_from_cam,
        intrinsics=torch.tensor([[90.0, 0.0, 61.0], [0.0, 110.0, 50.0], [0.0, 0.0, 1.0]]).repeat(2, 1, 1),
        image_size=(96, 128),
    )


# ---- uploads ----


def test_archive_gives_two_files_whatever_its_names_say(archive, tmp_path):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("../../outside.txt", "no")
        opened.writestr("/tmp/geode-space-outside.txt", "no")
        opened.writestr("scene/points.ply", "ply")
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    unpack_geometry(archive, target)
    assert sorted(path.name for path in target.iterdir()) == ["geometry.json", "geometry.safetensors"]
    for name in uploads.GEOMETRY_FILES:
        assert (target / name).read_bytes() == (ROOM / "geometry" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "geometry.zip"]
    assert not Path("/tmp/geode-space-outside.txt").exists()


def test_archive_may_name_its_files_as_paths_to_elsewhere(tmp_path):
    path = write_archive(tmp_path / "geometry.zip", folder="../../..")
    (tmp_path / "target").mkdir()
    unpack_geometry(path, tmp_path / "target")
    assert len(list((tmp_path / "target").iterdir())) == 2


def test_archive_that_unpacks_to_too_much_is_refused_while_it_is_read(tmp_path):
    path = tmp_path / "geometry.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("geometry.json", bytes(2**20 + 1))
        opened.writestr("geometry.safetensors", b"")
    with pytest.raises(ValueError, match=r"geometry.json may have at most 1,048,576 bytes"):
        unpack_geometry(path, tmp_path)


def spoil_checksum(path: Path) -> None:
    data = path.read_bytes()
    # In the content of the first member, behind its header of 30 bytes and its name.
    start = 30 + struct.unpack("<H", data[26:28])[0] + 40
    path.write_bytes(data[:start] + bytes(8) + data[start + 8 :])


def say_encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        data[at + offset] |= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [spoil_checksum, say_encrypted, lambda path: path.write_bytes(b"no archive")])
def test_archive_that_cannot_be_read_is_refused(archive, tmp_path, spoil):
    spoil(archive)
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match=r"The archive geometry.zip cannot be read.*SceneGeometry.save"):
        unpack_geometry(archive, tmp_path / "target")


def test_archive_must_hold_each_file_once(archive, tmp_path):
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(ValueError, match=r"empty.zip must hold one geometry.json, and it holds 0"):
        unpack_geometry(empty, tmp_path)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("other/geometry.safetensors", "")
    with pytest.raises(ValueError, match=r"must hold one geometry.safetensors, and it holds 2"):
        unpack_geometry(archive, tmp_path)


def test_limits_of_a_video_name_what_it_has(monkeypatch, tmp_path):
    video = ROOM / "room.mp4"
    check_video(video)
    monkeypatch.setattr(uploads, "MAX_FRAME_PIXELS", 320 * 240 - 1)
    with pytest.raises(ValueError, match=r"76,799 pixels here, and room.mp4 is 320 x 240"):
        check_video(video)
    monkeypatch.setattr(uploads, "MAX_VIDEO_FRAMES", 31)
    with pytest.raises(ValueError, match=r"at most 31 frames here, and room.mp4 has 32"):
        check_video(video)
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 1000)
    with pytest.raises(ValueError, match=rf"at most 1,000 bytes here, and room.mp4 has {video.stat().st_size:,}"):
        check_video(video)
    with pytest.raises(FileNotFoundError, match=r"none.mp4 is no longer here. Upload it again"):
        check_video(tmp_path / "none.mp4")


@pytest.mark.parametrize(("text", "message"), [("  ", "no question"), ("x" * 501, "at most 500 characters, got 501")])
def test_questions_have_a_length(text, message):
    with pytest.raises(ValueError, match=message):
        check_question(text)


# ---- rooms ----


def test_upload_of_the_embedded_room_is_the_embedded_room(checkpoint, room, archive):
    uploaded = open_room(*checkpoint, ROOM / "room.mp4", archive)
    assert torch.equal(uploaded.encoding.visual_tokens, room.encoding.visual_tokens)
    assert torch.equal(uploaded.encoding.rationale_tokens, room.encoding.rationale_tokens)
    assert torch.equal(uploaded.geometry.points, room.geometry.points)
    assert uploaded.name == "room.mp4"
    assert len(uploaded.frames) == rooms.NUM_FRAMES_KEPT


def test_answers_are_those_of_geode_ask_and_the_scene_is_encoded_once(checkpoint, monkeypatch):
    from geode.commands import answer_questions
    from geode.modeling_geode.media_geode import GeodeMediaMixin

    expected = answer_questions(checkpoint, ROOM / "room.mp4", QUESTIONS, geometry=ROOM / "geometry")
    encoded, encode = [], GeodeMediaMixin.get_video_features
    monkeypatch.setattr(
        GeodeMediaMixin,
        "get_video_features",
        lambda self, frames, *rest, **options: encoded.append(len(frames)) or encode(self, frames, *rest, **options),
    )
    room = open_embedded_room(*checkpoint)
    for question, answer in zip(QUESTIONS, expected, strict=True):
        reply = ask_room(*checkpoint, room, question)
        assert len(reply.answer.values) == len(answer.values)
        for found, wanted in zip(reply.answer.values, answer.values, strict=True):
            assert found.si_value == pytest.approx(wanted.si_value, rel=1e-3)
        for found, wanted in zip(reply.answer.boxes, answer.boxes, strict=True):
            assert found.center == pytest.approx(wanted.center, abs=1e-3)
        assert reply.seconds > 0
    assert encoded == [1]


def test_video_without_geometry_says_what_to_upload(checkpoint, archive):
    with pytest.raises(ValueError, match=r"no reconstructor.*Upload a \.zip.*geometry.json and geometry.safetensors"):
        open_room(*checkpoint, ROOM / "room.mp4")
    with pytest.raises(ValueError, match=r"There is no video"):
        open_room(*checkpoint, None, archive)
    with pytest.raises(ValueError, match=r"geometry.zip is geometry, and the frames alone are asked for"):
        open_room(*checkpoint, ROOM / "room.mp4", archive, use_geometry=False)
    with pytest.raises(ValueError, match=r"There is no room"):
        ask_room(*checkpoint, None, "Locate the sofa.")


def test_frames_alone_have_no_rationale_and_nothing_to_draw(checkpoint):
    room = open_room(*checkpoint, ROOM / "room.mp4", use_geometry=False)
    assert room.geometry is None
    assert len(room.encoding.rationale_tokens) == 0
    assert "frames alone" in describe_room(room, None)
    assert isinstance(ask_room(*checkpoint, room, "Locate the sofa.").answer, Answer)


def test_reconstructor_makes_the_geometry_and_the_height_of_the_camera_its_scale():
    from geode.commands import load_checkpoint
    from tests.modeling_geode.common_geode import tiny_vggt

    model, processor = load_checkpoint()
    model.attach_reconstructor(tiny_vggt(image_size=42))
    plain = open_room(model, processor, ROOM / "room.mp4")
    assert not plain.geometry.is_metric
    assert plain.geometry.num_cameras == processor.num_geometry_frames
    assert "The scale is not known" in describe_room(plain, None)
    scaled = open_room(model, processor, ROOM / "room.mp4", camera_height_m=1.5)
    assert scaled.geometry.is_metric
    assert scaled.geometry.scale_source == "camera_height"


# ---- words ----


def test_reply_has_units_intervals_numbered_boxes_and_its_time():
    value = Measurement("<REG>", 180.0, "cm", 1.8, interval=(150.0, 210.0))
    text = describe_reply(Reply(Answer("about 180.00", [value], []), 1.25), 1)
    assert text.splitlines() == [
        "about 180\\.00",
        "",
        "**180.00 cm**, between 150.00 and 210.00 cm",
        "",
        "<sub>1.25 s</sub>",
    ]
    count = Measurement("<REG>", 3.0, "count", 3.2, interval=(2.0, 4.0))
    assert "**3**, between 2 and 4\n" in describe_reply(Reply(Answer("3", [count], []), 0.1), 1)
    bare = Measurement("<REG>", 3.5, None, 3.5)
    assert "**3.50** (SI: the question names no unit)" in describe_reply(Reply(Answer("3.50", [bare], []), 0.1), 1)
    boxes = [BOX, Box3D((0.0, 0.0, 1.0), (1.0, 1.0, 1.0), math.pi / 4)]
    text = describe_reply(Reply(Answer(f"{boxes[0].text}{boxes[1].text}", [], boxes), 0.1), 3)
    assert "**Box 3**: centre (0.40, -0.30, 0.50) m, size (1.60, 0.80, 1.00) m" in text
    assert "**Box 4**" in text
    assert "yaw 0.79 rad (45 degrees)" in text
    assert "(no answer)" in describe_reply(Reply(Answer("", [], []), 0.1), 1)


def test_room_is_described_with_its_facts(room):
    text = describe_room(room, 0.9)
    facts = room.geometry.summary()
    assert f"{facts['num_points']:,} points, {facts['num_cameras']} cameras" in text
    assert "scale: metric, gravity: given" in text
    assert "90 % of the time" in text
    assert "no intervals" in describe_room(room, None)


# ---- drawings ----


def lines_of(trace: dict) -> list[np.ndarray]:
    """The pieces of a line, `(num_points, 3)` each, which null separates."""
    points = np.array([[np.nan if value is None else value for value in trace[axis]] for axis in "xyz"], dtype=float).T
    cuts = np.flatnonzero(np.isnan(points).any(axis=1))
    return [piece[~np.isnan(piece).any(axis=1)] for piece in np.split(points, cuts) if len(piece) > 1]


def test_figure_draws_each_box_by_its_twelve_edges(wide_room):
    turned = Box3D((0.4, -0.3, 0.5), (1.6, 0.8, 1.0), 0.3)
    figure = figure_in_space(wide_room, [BOX, turned])
    json.dumps(figure, allow_nan=False)
    traces = {trace["name"]: trace for trace in figure["data"]}
    for name in ("box 1", "box 2"):
        edges = [np.diff(piece, axis=0) for piece in lines_of(traces[name])]
        lengths = np.sort(np.linalg.norm(np.concatenate(edges), axis=1))
        np.testing.assert_allclose(lengths, np.sort([1.6, 0.8, 1.0] * 4), atol=2e-3)
        points = np.concatenate(lines_of(traces[name]))
        np.testing.assert_allclose(0.5 * (points.min(axis=0) + points.max(axis=0)), [0.4, -0.3, 0.5], atol=2e-3)
    # The longest edge of the second box points along its yaw.
    ring = lines_of(traces["box 2"])[0]
    longest = max(np.diff(ring, axis=0), key=np.linalg.norm)
    assert math.atan2(longest[1], longest[0]) % math.pi == pytest.approx(0.3, abs=2e-3)


def test_figure_draws_pyramids_whose_corners_are_those_of_the_image(wide_room):
    traces = {trace["name"]: trace for trace in figure_in_space(wide_room, [])["data"]}
    frames = [piece for piece in lines_of(traces["cameras"]) if len(piece) == 5]
    assert len(frames) == 2
    for index, frame in enumerate(frames):
        points = torch.tensor(frame[:4], dtype=torch.float64)
        points_cam = transform_points(invert_rigid(wide_room.world_from_cam[index].double()), points)
        assert points_cam[:, 2].numpy() == pytest.approx(0.25, abs=2e-3)
        pixels = project_points(points_cam, wide_room.intrinsics[index].double())
        # A millimetre at 0.25 m is less than half a pixel here.
        np.testing.assert_allclose(pixels, [[-0.5, -0.5], [127.5, -0.5], [127.5, 95.5], [-0.5, 95.5]], atol=0.5)
    path = np.concatenate(lines_of(traces["path of the camera"]))
    np.testing.assert_allclose(path, wide_room.world_from_cam[:, :3, 3], atol=1e-3)


def extent_of_prediction(geometry: SceneGeometry, box: Box3D) -> np.ndarray:
    """Width and height in pixels of what is drawn in the colour of predictions, and its centre."""
    picture = np.asarray(picture_from_above(geometry, [box]), dtype=int)
    v, u = np.nonzero(np.abs(picture - PREDICTION).max(axis=-1) < 60)
    return np.array([u.max() - u.min(), v.max() - v.min(), 0.5 * (u.max() + u.min()), 0.5 * (v.max() + v.min())])


def test_picture_draws_boxes_where_they_are(wide_room):
    width, height, u, v = extent_of_prediction(wide_room, BOX)
    assert width / height == pytest.approx(1.6 / 0.8, rel=0.05)
    turned = extent_of_prediction(wide_room, Box3D(BOX.center, BOX.size, math.pi / 2))
    assert turned[1] / turned[0] == pytest.approx(1.6 / 0.8, rel=0.05)
    # One metre to the right and half a metre up the page: +x and +y.
    moved = extent_of_prediction(wide_room, Box3D((1.4, 0.2, 0.5), BOX.size, 0.0))
    pixels_per_m = width / 1.6
    assert (moved[2] - u) / pixels_per_m == pytest.approx(1.0, abs=0.03)
    assert (v - moved[3]) / pixels_per_m == pytest.approx(0.5, abs=0.03)


def test_scene_without_cameras_is_drawn(wide_room):
    import dataclasses

    bare = dataclasses.replace(
        wide_room, world_from_cam=torch.zeros(0, 4, 4), intrinsics=torch.zeros(0, 3, 3), image_size=None
    )
    assert [trace["name"] for trace in figure_in_space(bare, [BOX])["data"]] == ["points", "box 1"]
    assert extent_of_prediction(bare, BOX)[0] > 100


def test_scene_of_unknown_scale_is_drawn_as_the_model_sees_it(wide_room):
    import dataclasses

    unknown = dataclasses.replace(
        wide_room,
        points=wide_room.points * 10,
        world_from_cam=torch.cat(
            [
                wide_room.world_from_cam[..., :3],
                wide_room.world_from_cam[..., 3:] * torch.tensor([[10.0], [10.0], [10.0], [1.0]]),
            ],
            dim=-1,
        ),
        is_metric=False,
        scale_source="unknown",
    )
    figure = figure_in_space(unknown, [])
    cloud = np.stack([figure["data"][0][axis] for axis in "xyz"], axis=1)
    cameras = np.concatenate(lines_of(figure["data"][1]))
    distances = np.linalg.norm(cloud[:, None] - cameras[None], axis=-1).min(axis=1)
    assert 1.0 < np.median(distances) < 2.6
    assert figure["layout"]["scene"]["xaxis"]["title"]["text"] == "x (of no known unit)"


# ---- the command and the folder of the Space ----


def test_page_without_gradio_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--ui"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert 'pip install "geode-vlm[ui]"' in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--port", "1"], "`--port` is for the page, got 1"), (["--ui", "--out", "x"], "`--out` is for the picture")],
)
def test_options_of_the_other_demo_are_refused(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_card_space_writes_a_folder_whose_card_tells_the_limits(tmp_path, capsys):
    assert main(["card", "space", str(tmp_path / "space")]) == 0
    assert sorted(path.name for path in (tmp_path / "space").iterdir()) == [
        "LICENSE",
        "README.md",
        "app.py",
        "requirements.txt",
    ]
    card = SpaceCard.load(tmp_path / "space" / "README.md")
    pins = (ROOT / "requirements" / "ui.txt").read_text().splitlines()
    assert f"gradio=={card.data.sdk_version}" in pins
    assert (card.data.sdk, card.data.app_file, card.data.license) == ("gradio", "app.py", "apache-2.0")
    assert len(card.data.short_description) <= 60  # the Hub's limit
    assert f"{uploads.MAX_UPLOAD_BYTES // 2**20} MiB and {uploads.MAX_VIDEO_FRAMES:,} frames" in card.text
    for suffix in uploads.VIDEO_SUFFIXES:
        assert suffix.removeprefix(".") in card.text
    requirements = (tmp_path / "space" / "requirements.txt").read_text()
    assert f"geode-vlm[ui]>={geode.__version__}" in requirements
    assert main(["card", "space", str(tmp_path / "space"), "--facts", "x.yaml"]) == 2


def test_requirements_of_the_page_leave_those_of_the_tests_alone():
    names = [
        {
            re.split(r"[=;]", line)[0].lower().replace("-", "_")
            for line in path.read_text().splitlines()
            if line[0] != "#"
        }
        for path in (ROOT / "requirements" / "dev.txt", ROOT / "requirements" / "ui.txt")
    ]
    assert names[0] & names[1] == set()


def test_upload_is_deleted_when_it_is_encoded_and_stays_when_it_is_not(checkpoint, archive, tmp_path):
    import gradio

    from geode.hub_cards.space.interface import on_upload

    video = Path(shutil.copy(ROOM / "room.mp4", tmp_path / "secret <b>.mp4"))
    video.write_bytes(video.read_bytes()[:1000])
    with pytest.raises(gradio.Error) as caught:
        on_upload(*checkpoint, str(video), str(archive), False, None)
    message = caught.value.message
    assert "secret &lt;b&gt;.mp4 (1000 bytes) cannot be read" in message
    assert str(tmp_path) not in message
    assert "<code>ffmpeg -i in out.mp4</code>" in message
    assert video.is_file()
    assert archive.is_file()
    shutil.copy(ROOM / "room.mp4", video)
    session, *_ = on_upload(*checkpoint, str(video), str(archive), False, None)
    assert session.room.name == "secret <b>.mp4"
    assert not video.exists()
    assert not archive.exists()


def test_clearing_the_chat_forgets_the_boxes_and_keeps_the_room(checkpoint, room):
    from geode.hub_cards.space.interface import Session, on_clear, on_question

    session, chat, *_ = on_question(*checkpoint, Session(room, (BOX,)), "![Locate](http://x) the sofa.")
    assert chat[0]["content"] == "\\!\\[Locate\\]\\(http\\:\\/\\/x\\) the sofa\\."
    assert session.boxes[0] == BOX
    cleared, again, figure = on_clear(session)
    assert (cleared.room, cleared.boxes, cleared.chat) == (room, (), ())
    assert again == as_html(picture_from_above(room.geometry, []), "The room from above")
    assert "box" not in figure.plot


# ---- the app over HTTP ----


def test_app_answers_about_an_upload_which_nobody_else_sees(page, uploads_folder, archive, tmp_path):
    import httpx

    video = Path(shutil.copy(ROOM / "room.mp4", tmp_path / "kitchen.mp4"))
    with httpx.Client(base_url=page, timeout=300) as client:
        owner, other = Visitor(client), Visitor(client)
        assert "There is no room to ask about" in owner.call("ask", None, "Locate the sofa.")
        uploaded = owner.upload(video)
        error = owner.call("encode", uploaded, None, False, None)
        assert "no reconstructor" in error
        assert "geometry.json and geometry.safetensors" in error
        # The video stays, so that it can be tried again with its geometry.
        geometry = owner.upload(archive)
        _, chat, facts, strip, above, space, *emptied = owner.call("encode", uploaded, geometry, False, None)
        assert "kitchen\\.mp4" in facts
        assert (chat, emptied) == ([], [None, None])
        assert "data:image/jpeg;base64," in strip
        assert json.loads(space["plot"])["data"][-1]["name"] == "cameras"
        _, chat, line, drawn, space = owner.call("ask", None, "Locate the sofa.")
        assert [message["role"] for message in chat] == ["user", "assistant"]
        assert line == ""
        assert "Box 1" in json.dumps(chat[1]["content"])
        assert json.loads(space["plot"])["data"][-1]["name"] == "box 1"
        assert drawn != above
        assert "There is no room to ask about" in other.call("ask", None, "Locate the sofa.")
        assert "at most 500 characters, got 501" in owner.call("ask", None, "x" * 501)
        for path in (uploaded["path"], geometry["path"], video, ROOT / "README.md", "/etc/passwd"):
            assert client.get(f"gradio_api/file={path}").status_code in (403, 404)
    # Neither the uploads nor copies of them are left.
    assert [path for path in uploads_folder.rglob("*") if path.is_file() and path.stat().st_size] == []
