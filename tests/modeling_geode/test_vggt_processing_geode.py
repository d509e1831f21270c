# SPDX-License-Identifier: Apache-2.0
"""Tests of what VGGT's processor takes besides lists of frames; `test_vggt_geode.py` compares it with the public loader."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import geode
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor, preprocess_images
from geode.modeling_geode.video_processing_geode import load_video_frames


@pytest.fixture(scope="module")
def processor() -> VggtImageProcessor:
    return VggtImageProcessor(image_size=56)


def picture(height: int, width: int, *, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# ------------------------------------------------------------------------------------------------- videos


def test_video_gives_evenly_spaced_frames_and_their_times(processor):
    video = geode.embedded_scene() / "room.mp4"
    frames, times = load_video_frames(video, num_frames=5)
    batch = processor(str(video), num_frames=5)
    want = processor(frames)
    assert want.keys() == batch.keys() - {"timestamps_s"}
    for name in want:
        assert torch.equal(batch[name], want[name]), name
    assert batch["timestamps_s"].dtype == torch.float64
    assert batch["timestamps_s"].tolist() == times.tolist()
    assert (batch["timestamps_s"].diff() > 0).all()


def test_video_gives_sixteen_frames_unless_told(processor):
    video = geode.embedded_scene() / "room.mp4"
    assert len(processor(video)["pixel_values"]) == 16
    assert len(preprocess_images(video, image_size=56)) == 16


def test_folder_gives_its_images_in_order_without_times(processor, tmp_path):
    pictures = [picture(30, 40, seed=seed) for seed in range(3)]
    for number, image in zip((9, 10, 11), pictures, strict=True):
        image.save(tmp_path / f"frame{number}.png")
    batch = processor(tmp_path, num_frames=3)
    assert torch.equal(batch["pixel_values"], processor(pictures)["pixel_values"])
    assert torch.isnan(batch["timestamps_s"]).tolist() == [True] * 3
    # A folder may be named as an image is.
    other = tmp_path / "room.png"
    other.mkdir()
    pictures[1].save(other / "a.png")
    assert torch.equal(processor(other, num_frames=1)["pixel_values"], processor(pictures[1])["pixel_values"])


@pytest.mark.parametrize("suffix", [".png", ".BMP", ".tiff"])
def test_path_that_ends_as_an_image_stays_an_image(processor, tmp_path, suffix):
    path = tmp_path / f"frame{suffix}"
    picture(30, 40).save(path)
    batch = processor(path)
    assert torch.equal(batch["pixel_values"], processor(picture(30, 40))["pixel_values"])
    assert "timestamps_s" not in batch
    with pytest.raises(ValueError, match=r"`num_frames` is for a video file or a folder of images, got 2 .*PosixPath"):
        processor(path, num_frames=2)


def test_image_of_another_suffix_is_read_in_a_list(processor, tmp_path):
    picture(30, 40).save(tmp_path / "frame.ppm")
    batch = processor([tmp_path / "frame.ppm"])
    assert torch.equal(batch["pixel_values"], processor(picture(30, 40))["pixel_values"])
    with pytest.raises(ValueError, match=r"A video file was expected, but .*frame\.ppm"):
        processor(tmp_path / "frame.ppm")


def test_what_is_no_video_is_refused(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video at .*none\.mp4"):
        processor(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        processor(tmp_path / "none.png")
    with pytest.raises(ValueError, match="holds no images"):
        processor(tmp_path)
    with pytest.raises(ValueError, match=r"`num_frames` must be .* at least 1, got 0"):
        processor(geode.embedded_scene() / "room.mp4", num_frames=0)
    with pytest.raises(ValueError, match=r"got 2 with frames that are chosen already \(list\)\. Leave it out"):
        processor([picture(30, 40)] * 3, num_frames=2)


# ------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_of_eight_bits_are_read_as_pillow_reads_them(processor, mode):
    image = picture(31, 45)
    image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    batch = processor([image])
    assert torch.equal(batch["pixel_values"], processor([image.convert("RGB")])["pixel_values"])


def test_transparency_is_laid_over_white_for_rgba_alone_as_by_the_public_loader(processor):
    solid = np.full((28, 56, 4), 255, np.uint8)
    solid[..., :3] = 60
    solid[:, :28, 3] = 0
    shown = processor([Image.fromarray(solid)])["pixel_values"][0, :, 14]
    assert torch.equal(shown[:, 10], torch.ones(3))
    assert torch.equal(shown[:, 40], torch.full((3,), 60 / 255))
    grey = Image.fromarray(np.ascontiguousarray(solid[..., 2:]))
    assert grey.mode == "LA"
    assert (processor([grey])["pixel_values"] == 60 / 255).all()


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_modes_of_more_than_eight_bits_are_refused(processor, tmp_path, mode, dtype):
    image = Image.fromarray(np.full((20, 30), 1000, dtype))
    assert image.mode == mode
    with pytest.raises(
        ValueError, match=rf"frames of 8 bits, got a PIL image of mode '{mode}'.* convert it to mode 'L'"
    ):
        processor([image])
    image.save(tmp_path / "frame.tiff")
    with pytest.raises(ValueError, match="frames of 8 bits"):
        processor(tmp_path / "frame.tiff")


def test_exif_orientation_is_applied_in_folders_only(processor, tmp_path):
    """The public loader does not apply it, so neither do lists; `load_video_frames` turns its frames upright."""
    path = tmp_path / "frame.png"
    image = picture(28, 56)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(path, exif=exif)
    assert torch.equal(processor([path])["pixel_values"], processor([image])["pixel_values"])
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert upright.size == (28, 56)
    assert torch.equal(processor(tmp_path, num_frames=1)["pixel_values"], processor([upright])["pixel_values"])


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_portrait_and_landscape_share_a_size_and_keep_their_maps(mode):
    processor = VggtImageProcessor(mode, image_size=56)
    frames = [picture(97, 51, seed=1), picture(33, 89, seed=2)]
    batch = processor(frames)
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    assert batch["original_sizes"].tolist() == [[97, 51], [33, 89]]
    for index, frame in enumerate(frames):
        alone = processor([frame])
        left, top, right, bottom = batch["content_boxes"][index].tolist()
        columns = slice(*alone["content_boxes"][0, [0, 2]].tolist())
        rows = slice(*alone["content_boxes"][0, [1, 3]].tolist())
        content = batch["pixel_values"][index, :, top:bottom, left:right]
        assert torch.equal(content, alone["pixel_values"][0, :, rows, columns])
        # The same pixel of the frame, where it is in the batch and where it is alone.
        corner = batch["original_from_processed"][index] @ torch.tensor([left, top, 1.0]).double()
        want = alone["original_from_processed"][0] @ torch.tensor([columns.start, rows.start, 1.0]).double()
        torch.testing.assert_close(corner, want)


@pytest.mark.convention
def test_intrinsics_in_original_pixels_see_the_same_ray():
    """By hand: a frame of 84 x 56 is halved and loses 7 rows at the top, so u = 2 u' + 0.5 and v = 2 (v' + 7) + 0.5."""
    batch = VggtImageProcessor(image_size=28)(np.zeros((84, 56, 3), np.uint8))
    original_from_processed = batch["original_from_processed"][0]
    want = torch.tensor([[2.0, 0.0, 0.5], [0.0, 2.0, 14.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(original_from_processed, want)
    intrinsics = torch.tensor([[20.0, 0.0, 13.0], [0.0, 30.0, 15.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    point_cam = torch.tensor([0.3, -0.2, 1.7], dtype=torch.float64)
    processed = intrinsics @ point_cam / point_cam[2]
    original = original_from_processed @ intrinsics @ point_cam / point_cam[2]
    torch.testing.assert_close(original[:2], torch.stack((2 * processed[0] + 0.5, 2 * processed[1] + 14.5)))


def test_single_frames_need_no_list(processor):
    image = picture(30, 40)
    want = processor([image])
    for frame in (image, np.asarray(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        assert torch.equal(processor(frame)["pixel_values"], want["pixel_values"])
    assert torch.equal(processor.preprocess(image)["pixel_values"], want["pixel_values"])
    with pytest.raises(ValueError, match="at least one frame, got none"):
        processor(np.zeros((0, 30, 40, 3), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_pixels_outside_of_their_range_are_refused(processor, value):
    frame = np.full((20, 30, 3), 0.5)
    frame[3, 4, 1] = value
    for image in (frame, torch.from_numpy(frame).permute(2, 0, 1)):
        with pytest.raises(ValueError, match=r"uint8 frames or floating point ones in \[0, 1\], got float"):
            processor([image])


def test_options_are_checked_and_may_be_changed_on_loading(processor, tmp_path):
    with pytest.raises(ValueError, match=r"`return_tensors` must be 'pt', got 'np'"):
        processor(picture(30, 40), return_tensors="np")
    processor.save_pretrained(tmp_path)
    loaded = VggtImageProcessor.from_pretrained(tmp_path, mode="pad", image_size=28)
    assert (loaded.mode, loaded.image_size, loaded.patch_size) == ("pad", 28, 14)
    with pytest.raises(ValueError, match="multiple of `patch_size`, got 30 and 14"):
        VggtImageProcessor.from_pretrained(tmp_path, image_size=30)
