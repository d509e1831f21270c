# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import preprocessing


SMALL = ["--seconds", "2", "--height", "96", "--width", "160"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_ratios_are_printed_and_the_last_line_is_json(capsys):
    preprocessing.main([*SMALL, "--num-frames", "3", "--rounds", "3", "--json"])
    first, *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert first.startswith("60 frames of 160 x 96, ")
    assert [line.split(":")[0] for line in lines] == ["cpu", "wall"]
    for clock in ("cpu", "wall"):
        ratio = report[clock]["ratio"]
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]


def test_the_video_moves_and_its_pixels_are_those_of_the_processor(tmp_path):
    path = tmp_path / "walk.mp4"
    preprocessing.make_video(path, seconds=2, height=96, width=160)
    assert preprocessing.decode_bare(path) == 60
    pixels = preprocessing.preprocess(path, 4)
    assert pixels.shape == (4, 3, 448, 448)
    assert all((one - other).abs().mean() > 0.05 for one, other in zip(pixels[1:], pixels[:-1], strict=True))
