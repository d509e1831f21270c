# SPDX-License-Identifier: Apache-2.0
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from geode.modeling_geode import video_processing_geode
from geode.modeling_geode.video_processing_geode import (
    GeodeImageProcessor,
    load_frame_sets,
    load_image,
    load_video_frames,
    local_path,
    probe_video,
    sample_frame_indices,
)


HEIGHT, WIDTH, STRIPE = 48, 96, 16


def numbered_frame(index: int) -> np.ndarray:
    """A picture that spells its number in binary: six white or black stripes, the lowest bit on the left."""
    bits = [(index >> bit) & 1 for bit in range(WIDTH // STRIPE)]
    frame = np.repeat(np.array(bits, dtype=np.uint8) * 255, STRIPE)
    frame = np.broadcast_to(frame[None, :, None], (HEIGHT, WIDTH, 3)).copy()
    frame[: HEIGHT // 4] = (255, 0, 0)  # a red band on top shows flips and swapped channels
    return frame


def number_of(frame: np.ndarray) -> int:
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert frame.dtype == np.uint8
    red, green, blue = frame[: HEIGHT // 4 - 2].reshape(-1, 3).mean(axis=0)
    assert red > 200
    assert max(green, blue) < 60
    stripes = frame[HEIGHT // 2 :, STRIPE // 2 :: STRIPE, 1].mean(axis=0)
    return sum(1 << bit for bit, value in enumerate(stripes) if value > 127)


def write_video(path, num_frames: int, *, fps: int = 10, options: dict | None = None, codec: str = "libx264"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(num_frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "room.mp4", 20)


# ---- sampling ----


@pytest.mark.parametrize(
    ("num_available", "num_frames", "expected"),
    [
        # The centres of 4 segments of 2.5 frames are 1.25, 3.75, 6.25, 8.75.
        (10, 4, [1, 3, 6, 8]),
        (10, 1, [5]),
        (10, 10, list(range(10))),
        (3, 10_000, [0, 1, 2]),
        (7, 2, [1, 5]),
        (1, 1, [0]),
    ],
)
def test_sample_frame_indices_takes_centres_of_equal_segments(num_available, num_frames, expected):
    assert sample_frame_indices(num_available, num_frames) == expected


def test_sample_frame_indices_never_repeats_and_is_symmetric():
    for num_available in range(1, 40):
        for num_frames in range(1, 45):
            indices = sample_frame_indices(num_available, num_frames)
            assert len(indices) == min(num_available, num_frames) == len(set(indices))
            assert indices == sorted(indices)
            # Seen backwards a centre at c is at num_available - c, up to the rounding down of a whole c.
            mirrored = [num_available - 1 - index for index in reversed(indices)]
            assert max(abs(a - b) for a, b in zip(indices, mirrored, strict=True)) <= 1


def test_sample_frame_indices_refuses_no_frames():
    with pytest.raises(ValueError, match="`num_available` must be at least 1, got 0"):
        sample_frame_indices(0, 4)
    with pytest.raises(ValueError, match="`num_frames` must be at least 1, got -1"):
        sample_frame_indices(4, -1)


# ---- video files ----


def test_load_video_frames_decodes_exactly_the_sampled_frames(video):
    frames, timestamps_s = load_video_frames(video, num_frames=6)
    # Centres of 6 segments of 20/6 frames: 1.67, 5, 8.33, 11.67, 15, 18.33; at 10 frames a second.
    assert [number_of(frame) for frame in frames] == [1, 5, 8, 11, 15, 18]
    np.testing.assert_allclose(timestamps_s, [0.1, 0.5, 0.8, 1.1, 1.5, 1.8], atol=1e-6)


def test_load_video_frames_reads_a_video_whose_title_is_not_utf8(video, tmp_path):
    path = tmp_path / "title.mp4"
    assert b"Lavf" in video.read_bytes()  # the writer's name, a text like a title
    path.write_bytes(video.read_bytes().replace(b"Lavf", b"\x80avf"))
    frames, _ = load_video_frames(path, num_frames=2)
    expected, _ = load_video_frames(video, num_frames=2)
    assert np.array_equal(np.stack(frames), np.stack(expected))


def test_probe_video_counts_frames_and_says_their_size(video, tmp_path):
    (frames, _), *_ = load_frame_sets(str(video), num_frames=[10_000])
    assert probe_video(video) == (len(frames), *frames[0].shape[:2])
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty.mp4 \(0 bytes\) cannot be read"):
        probe_video(tmp_path / "empty.mp4")


def test_load_frame_sets_gives_each_sampling_of_one_decode(video, monkeypatch):
    decodes = []
    decode = video_processing_geode._decode
    monkeypatch.setattr(video_processing_geode, "_decode", lambda *args: decodes.append(1) or decode(*args))
    (first, _), (second, times) = load_frame_sets(str(video), num_frames=[2, 5])
    assert [number_of(frame) for frame in first] == [5, 15]
    assert [number_of(frame) for frame in second] == [2, 6, 10, 14, 18]
    np.testing.assert_allclose(times, [0.2, 0.6, 1.0, 1.4, 1.8], atol=1e-6)
    assert decodes == [1]


def test_load_video_frames_clamps_to_the_frames_there_are(tmp_path):
    path = write_video(tmp_path / "short.mp4", 5)
    frames, _ = load_video_frames(path, num_frames=10_000)
    assert [number_of(frame) for frame in frames] == [0, 1, 2, 3, 4]


def test_load_video_frames_warns_when_the_video_is_short(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(video_processing_geode.logger, "warning_once", messages.append)
    path = write_video(tmp_path / "short.mp4", 5)
    load_video_frames(path, num_frames=6)
    assert [message.startswith(f"6 frames were asked of {path}, which has 5") for message in messages] == [True]
    load_video_frames(path, num_frames=5)
    assert len(messages) == 1


def test_load_video_frames_counts_frames_itself(video, tmp_path):
    av = pytest.importorskip("av")
    # The table of sample times (stts) has one entry: 20 samples of equal duration. Here it claims a billion.
    data = bytearray(video.read_bytes())
    table = data.index(b"stts")
    assert struct.unpack(">2I", data[table + 8 : table + 16]) == (1, 20)
    struct.pack_into(">I", data, table + 12, 1_000_000_000)
    path = tmp_path / "claims.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 1_000_000_000
    frames, _ = load_video_frames(path, num_frames=4)
    assert [number_of(frame) for frame in frames] == [2, 7, 12, 17]


def test_load_video_frames_samples_again_when_packets_and_frames_differ(video, monkeypatch):
    # As if the file held five packets that show no picture.
    monkeypatch.setattr(video_processing_geode, "_count_packets", lambda path: 25)
    frames, _ = load_video_frames(video, num_frames=4)
    assert [number_of(frame) for frame in frames] == [2, 7, 12, 17]


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_load_video_frames_reads_other_containers(tmp_path, suffix):
    path = write_video(tmp_path / f"room{suffix}", 9, codec="mpeg4")
    frames, _ = load_video_frames(path, num_frames=3)
    assert [number_of(frame) for frame in frames] == [1, 4, 7]


# Matrices of a track header (tkhd), row by row without the third column, for pictures to be turned clockwise, and the
# corner of a shown picture to which its upper left corner goes: (row, column), 0 or -1.
ROTATIONS = {
    90: ((0, 1, -1, 0), (0, -1)),
    180: ((-1, 0, 0, -1), (-1, -1)),
    270: ((0, -1, 1, 0), (-1, 0)),
}


@pytest.mark.parametrize("degrees", ROTATIONS)
def test_load_video_frames_applies_stored_rotation(tmp_path, degrees):
    av = pytest.importorskip("av")
    path = tmp_path / "phone.mp4"
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[:STRIPE, :STRIPE] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")) + stream.encode()
        for packet in packets:
            container.mux(packet)
    (a, b, c, d), (row, column) = ROTATIONS[degrees]
    data = bytearray(path.read_bytes())
    # Version 0 of tkhd has 40 bytes between its name and its matrix.
    start = data.index(b"tkhd") + 44
    one = 1 << 16
    assert struct.unpack(">9i", data[start : start + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, start, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (frame,), _ = load_video_frames(path, num_frames=1)
    assert frame.shape == ((WIDTH, HEIGHT, 3) if degrees != 180 else (HEIGHT, WIDTH, 3))
    rows = slice(0, STRIPE - 2) if row == 0 else slice(2 - STRIPE, None)
    columns = slice(0, STRIPE - 2) if column == 0 else slice(2 - STRIPE, None)
    assert frame[rows, columns].mean() > 240
    assert frame.sum() < 1.3 * 255 * 3 * STRIPE**2


def damaged(kind: str, video, tmp_path):
    path = tmp_path / f"{kind}.mp4"
    whole = video.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) * 4 // 5])
    elif kind == "truncated_after_header":
        early = write_video(tmp_path / "early.mp4", 20, options={"movflags": "faststart"}).read_bytes()
        path.write_bytes(early[: len(early) * 9 // 10])
    elif kind == "scrambled":
        data = bytearray(whole)
        start = data.index(b"mdat") + 4
        data[start : start + 2000] = np.random.default_rng(0).bytes(2000)
        path.write_bytes(data)
    elif kind == "playlist":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n")
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "truncated_after_header", "scrambled", "playlist"])
def test_load_video_frames_names_a_file_it_cannot_read(kind, video, tmp_path):
    path = damaged(kind, video, tmp_path)
    with pytest.raises(ValueError, match="A video file was expected, but") as caught:
        load_video_frames(path, num_frames=4)
    assert str(path) in str(caught.value)
    assert "re-encode it with `ffmpeg" in str(caught.value)


def test_load_video_frames_refuses_a_file_without_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in stream.encode(frame) + stream.encode():
            container.mux(packet)
    with pytest.raises(ValueError, match="it has no video stream"):
        load_video_frames(path, num_frames=4)


def test_load_video_frames_bounds_frames_and_bytes(video, monkeypatch):
    monkeypatch.setattr(video_processing_geode, "MAX_SAMPLED_BYTES", 3 * HEIGHT * WIDTH * 4 - 1)
    with pytest.raises(ValueError, match="is 48 x 96, and 4 are asked for"):
        load_video_frames(video, num_frames=4)
    monkeypatch.setattr(video_processing_geode, "MAX_VIDEO_FRAMES", 19)
    with pytest.raises(ValueError, match="may have at most 19 frames"):
        load_video_frames(video, num_frames=1)


def test_load_video_frames_names_the_remedy_without_pyav(video, monkeypatch):
    monkeypatch.setattr(video_processing_geode, "av", None)
    with pytest.raises(ImportError, match=r"pip install geode-vlm\[video\]"):
        load_video_frames(video, num_frames=4)


@pytest.mark.parametrize("count", [0, -3, 2.0, True, "4"])
def test_load_video_frames_refuses_a_wrong_number(video, count):
    with pytest.raises(ValueError, match="`num_frames` must be a whole number of at least 1, got"):
        load_video_frames(video, num_frames=count)


@pytest.mark.parametrize(
    "address", ["https://example.com/room.mp4", "rtsp://10.0.0.1/1", "data:video/mp4;base64,AAAA"]
)
def test_load_video_frames_downloads_nothing(address):
    with pytest.raises(ValueError, match="Nothing is downloaded here"):
        load_video_frames(address, num_frames=4)


def test_local_path_takes_file_addresses_and_names_what_is_missing(video):
    assert local_path(f"file://{video}", what="video") == video
    with pytest.raises(FileNotFoundError, match=r"There is no video at nowhere\.mp4"):
        load_video_frames("nowhere.mp4", num_frames=4)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_load_video_frames_does_not_wait_for_a_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="must be a regular file or a folder"):
        load_video_frames(tmp_path / "pipe.mp4", num_frames=4)


# ---- frames in memory ----


def sources(kind: str, tmp_path):
    arrays = np.stack([numbered_frame(index) for index in range(12)])
    if kind == "array":
        return arrays
    if kind == "tensor":
        return torch.from_numpy(arrays)
    if kind == "channels_first":
        return torch.from_numpy(arrays).permute(0, 3, 1, 2)
    if kind == "list_of_arrays":
        return list(arrays)
    if kind == "list_of_tensors":
        return [frame.permute(2, 0, 1) for frame in torch.from_numpy(arrays)]
    if kind == "list_of_pil":
        return [Image.fromarray(frame) for frame in arrays]
    for index, frame in enumerate(arrays):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    return tmp_path if kind == "folder" else [tmp_path / f"frame{index}.png" for index in range(12)]


@pytest.mark.parametrize(
    "kind",
    [
        "array",
        "tensor",
        "channels_first",
        "list_of_arrays",
        "list_of_tensors",
        "list_of_pil",
        "folder",
        "list_of_paths",
    ],
)
def test_load_video_frames_takes_frames_in_any_form(kind, tmp_path):
    # In a folder, "frame10" must come after "frame9".
    frames, timestamps_s = load_video_frames(sources(kind, tmp_path), num_frames=4)
    for frame, index in zip(frames, [1, 4, 7, 10], strict=True):
        np.testing.assert_array_equal(frame, numbered_frame(index))
    assert np.isnan(timestamps_s).all()
    assert timestamps_s.shape == (4,)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((2, 4, 6, 3), dtype=np.float32), TypeError, "must be uint8 with values in 0..255, got float32"),
        (torch.zeros(2, 3, 4, 6), TypeError, "must be uint8 with values in 0..255, got torch.float32"),
        (np.zeros((2, 3, 4, 6), dtype=np.uint8), ValueError, r"must have shape \(num_frames, height, width, 3\), got"),
        (torch.zeros(2, 3, 4, 3, dtype=torch.uint8), ValueError, "could be channels first or last"),
        (np.zeros((4, 6, 3), dtype=np.uint8), ValueError, r"got \(4, 6, 3\)"),
        (np.zeros((2, 0, 6, 3), dtype=np.uint8), ValueError, r"got \(2, 0, 6, 3\)"),
        ([], ValueError, "at least one frame, got an empty list"),
        (Image.new("RGB", (6, 4)), TypeError, "got Image. Wrap a single image in a list"),
        (7, TypeError, "got int"),
        ([7], TypeError, "An image must be a path, a PIL image, an array or a tensor, got int"),
    ],
)
def test_load_video_frames_refuses_what_is_not_frames(source, error, message):
    with pytest.raises(error, match=message):
        load_video_frames(source, num_frames=1)


def test_load_video_frames_refuses_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_video_frames(tmp_path, num_frames=1)


# ---- images ----


def test_load_image_lays_transparency_over_white():
    image = Image.new("RGBA", (5, 3), (200, 0, 0, 0))
    image.putpixel((4, 0), (10, 20, 30, 255))
    loaded = load_image(image)
    assert loaded.shape == (3, 5, 3)
    assert loaded[0, 4].tolist() == [10, 20, 30]
    assert loaded[2, 0].tolist() == [255, 255, 255]


def test_load_image_applies_exif_orientation(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.paste((255, 255, 255), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    loaded = load_image(tmp_path / "phone.png")
    assert loaded.shape == (6, 4, 3)
    assert loaded[:2, -2:].min() == 255
    assert loaded.sum() == 4 * 3 * 255


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_load_image_names_a_file_it_cannot_read(content, tmp_path):
    path = tmp_path / "picture.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="An image file was expected, but") as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_load_image_bounds_its_size(monkeypatch):
    monkeypatch.setattr(video_processing_geode, "MAX_IMAGE_PIXELS", 23)
    with pytest.raises(ValueError, match="is 4 x 6"):
        load_image(Image.new("RGB", (6, 4)))


def test_image_processor_equals_pil_and_imagenet_statistics():
    frame = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    processor = GeodeImageProcessor(size={"height": 24, "width": 16})
    pixels = processor([frame], return_tensors="pt")["pixel_values"]
    resized = np.asarray(Image.fromarray(frame).resize((16, 24), Image.Resampling.BICUBIC)).astype(np.float64)
    expected = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(pixels[0].double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-6, rtol=0)


def test_image_processor_is_saved_and_loaded(tmp_path):
    GeodeImageProcessor(size={"height": 24, "width": 16}).save_pretrained(tmp_path)
    loaded = GeodeImageProcessor.from_pretrained(tmp_path)
    assert (loaded.size.height, loaded.size.width) == (24, 16)
    assert loaded.resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_images_of_more_than_eight_bits_are_refused_wherever_they_come_from(tmp_path, mode, dtype):
    """Pillow would turn everything above 255 into white."""
    image = Image.fromarray(np.full((6, 9), 40_000).astype(dtype))
    assert image.mode == mode
    image.save(tmp_path / "frame.tiff")
    for load in (
        lambda: load_image(image),
        lambda: load_image(tmp_path / "frame.tiff"),
        lambda: load_video_frames(tmp_path, num_frames=1),
    ):
        with pytest.raises(ValueError, match=f"8 bits per channel, got one of mode '{mode}'"):
            load()
