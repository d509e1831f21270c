# SPDX-License-Identifier: Apache-2.0
"""
Bring your own RGB-D: images, depth and poses on disk become the geometry of a scene, which answers questions.

    python examples/own_rgbd.py
    python examples/own_rgbd.py SCAN --question "How wide is the desk, in centimeters?"

SCAN holds `color/*.png` (or .jpg), `depth/*.png` (16 bits, millimetres, 0 where there is none), `pose/*.txt` (4 x 4, `world_from_cam` in metres,
cameras with +x right, +y down, +z forward) and `intrinsics.txt` (3 x 3, in pixels of the depth images), one file of each kind for a frame.
Colour and depth must show the same view; they may differ in resolution. Without SCAN, the shipped room is written in this form first.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sample_data import write_scan

import geode
from geode import GeodeForConditionalGeneration, GeodeProcessor, SceneGeometry


def read_scan(folder: Path) -> SceneGeometry:
    """Read a scan and fuse it into one cloud; `up="floor"` turns the scene by its floor, whatever its axes were."""
    depth = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "depth").iterdir())]) / 1000.0
    poses = np.stack([np.loadtxt(path) for path in sorted((folder / "pose").iterdir())])
    size = depth.shape[2], depth.shape[1]
    images = [Image.open(path).convert("RGB").resize(size) for path in sorted((folder / "color").iterdir())]
    intrinsics = np.broadcast_to(np.loadtxt(folder / "intrinsics.txt"), (len(depth), 3, 3))
    return SceneGeometry.from_rgbd(depth, intrinsics, poses, images=np.stack(images), up="floor", voxel_size_m=0.05)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scan", nargs="?", type=Path)
parser.add_argument("--question", default="Locate the sofa.")
parser.add_argument("--model", default=geode.tiny_checkpoint())
parser.add_argument("--out", type=Path, default=Path("example-rgbd"), help="new folder for the geometry")
options = parser.parse_args()

scan = options.scan or write_scan(options.out / "scan")
geometry = read_scan(scan)
geometry.save(options.out / "geometry")
model = GeodeForConditionalGeneration.from_pretrained(options.model).eval()
processor = GeodeProcessor.from_pretrained(options.model)
scene = model.encode_scene(**processor.prepare_scene(video=scan / "color", geometry=geometry))
(answer,) = model.ask(processor, scene, [options.question])
print(f"{options.question} {answer.text}")
print(f"geometry: {options.out / 'geometry'}")
