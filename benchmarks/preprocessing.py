# SPDX-License-Identifier: Apache-2.0
"""
What reading a video for the model costs over decoding it: decode, sample and resize beside PyAV's bare decoding of the file.

    python -m benchmarks.preprocessing --json

The video, 60 s of 1280 x 720 at 30 frames a second in H.264 by default, is made here: a camera moves over a textured picture. Both
programs decode it on the same number of threads. Ours counts its frames first, keeps those that are sampled, and turns them into
normalised pixels for the vision tower. The two are run in turn, so that a change of the machine's load meets them alike; each round
gives one ratio, and the median counts. Ratios of CPU time, which other programs disturb less, stand beside those by the clock.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from benchmarks.scene_reuse import run_in_turn, spread_of_ratios
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor, load_video_frames


FPS = 30


def make_video(path: Path, *, seconds: int, height: int, width: int) -> None:
    """Encode a walk of the camera over a texture that has detail at all scales."""
    generator = np.random.default_rng(0)
    shape = (2 * height, 2 * width)
    texture = np.zeros((*shape, 3))
    for cell in (4, 16, 64, 256):
        coarse = generator.integers(0, 256, (shape[0] // cell + 1, shape[1] // cell + 1, 3), dtype=np.uint8)
        texture += np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    texture = (texture / 4).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            angle = 2 * np.pi * number / (20 * FPS)
            top, left = round((1 + np.sin(2 * angle)) * height / 2), round((1 + np.cos(angle)) * width / 2)
            picture = np.ascontiguousarray(texture[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def decode_bare(path: Path) -> int:
    """Decode every frame and look at none; return how many there were."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return sum(1 for _ in container.decode(stream))


def preprocess(path: Path, num_frames: int) -> torch.Tensor:
    """The pixels that the vision tower takes, `(num_frames, 3, 448, 448)`."""
    frames, _ = load_video_frames(path, num_frames=num_frames)
    return GeodeImageProcessor()(frames, input_data_format="channels_last", return_tensors="pt")["pixel_values"]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Decode, sample and resize, beside PyAV's bare decoding.")
    parser.add_argument("--seconds", type=int, default=60, help="length of the video (default: 60)")
    parser.add_argument("--height", type=int, default=720, help="in pixels, even (default: 720)")
    parser.add_argument("--width", type=int, default=1280, help="in pixels, even (default: 1280)")
    parser.add_argument("--num-frames", type=int, default=32, help="that are sampled (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="that are counted (default: 7)")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on one line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walk.mp4"
        make_video(path, seconds=options.seconds, height=options.height, width=options.width)
        megabytes, decoded = path.stat().st_size / 1e6, decode_bare(path)
        programs = {"bare": lambda: decode_bare(path), "ours": lambda: preprocess(path, options.num_frames)}
        wall, cpu = run_in_turn(programs, options.rounds)
    report = {**vars(options), "av": av.__version__, "num_decoded": decoded, "megabytes": megabytes}
    sys.stdout.write(f"{decoded} frames of {options.width} x {options.height}, {megabytes:.1f} MB\n")
    for clock, seconds in (("cpu", cpu), ("wall", wall)):
        found = report[clock] = {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": spread_of_ratios(seconds["ours"], seconds["bare"]),
        }
        ratio = found["ratio"]
        sys.stdout.write(
            f"{clock}: {found['seconds']['ours']:.2f} s for {options.num_frames} frames beside {found['seconds']['bare']:.2f} s "
            f"of bare decoding, ratio {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})\n"
        )
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
