# SPDX-License-Identifier: Apache-2.0
"""A folder of tiny videos, good and bad, and a tiny GEODE with a reconstructor that can read them."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from geode.data.synthetic_rooms.build import write_video
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneGeometry
from tests.common_tiny import make_config, make_processor
from tests.modeling_geode.common_geode import tiny_vggt


NUM_ROOMS = 5


def make_video(path: Path, seed: int, num_frames: int = 6) -> None:
    """Noise that a codec can hold: large squares of random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    squares = np.random.default_rng(seed).integers(0, 256, (num_frames, 4, 6, 3), dtype=np.uint8)
    write_video(path, squares.repeat(8, axis=1).repeat(8, axis=2))


def make_geometry(seed: int, *, num_points: int = 300, num_cameras: int = 6) -> SceneGeometry:
    """Points of a box of 4 x 3 x 2 metres, and cameras in it, in a frame of its own."""
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4).repeat(num_cameras, 1, 1)
    poses[:, :3, :3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # looks along +y
    poses[:, 0, 3] = 0.2 * torch.arange(num_cameras)
    poses[:, 2, 3] = 1.5
    return SceneGeometry.from_point_cloud(
        torch.rand(num_points, 3, generator=generator) * torch.tensor([4.0, 3.0, 2.0]) + seed,
        colors=torch.rand(num_points, 3, generator=generator),
        world_from_cam=poses,
        intrinsics=torch.tensor([[40.0, 0.0, 23.0], [0.0, 42.0, 15.0], [0.0, 0.0, 1.0]]).repeat(num_cameras, 1, 1),
        image_size=(32, 48),
        up=(0.0, 0.0, 1.0),
    )


def make_rooms(root: Path) -> list[tuple[str, str | None]]:
    """
    Write videos below a folder and return paths with geometries: good ones, and every kind of bad one.

    Rooms 1 and 3 have geometry; the others need the reconstructor. Room 4 has two frames, fewer than are asked for.
    """
    items = []
    for number in range(NUM_ROOMS):
        make_video(root / f"rooms/{number}.mp4", number, 2 if number == 4 else 6)
        if number % 2:
            make_geometry(number).save(root / f"geometry/{number}")
        items.append((f"rooms/{number}.mp4", f"geometry/{number}" if number % 2 else None))
    shutil.copy(root / "rooms/0.mp4", root / "rooms/a_copy_of_0.mp4")
    whole = (root / "rooms/0.mp4").read_bytes()
    (root / "rooms/truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "rooms/empty.mp4").touch()
    shutil.copytree(root / "geometry/1", root / "geometry/damaged")
    damaged = root / "geometry/damaged/geometry.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    shutil.copy(root / "rooms/2.mp4", root / "rooms/bad_geometry.mp4")
    shutil.copy(root / "rooms/3.mp4", root / "rooms/no_geometry.mp4")
    return [
        *items,
        ("rooms/a_copy_of_0.mp4", None),
        ("rooms/truncated.mp4", None),
        ("rooms/empty.mp4", None),
        ("rooms/missing.mp4", None),
        ("rooms/no_geometry.mp4", "geometry/nowhere"),
        ("rooms/bad_geometry.mp4", "geometry/damaged"),
    ]


def load_model() -> tuple[GeodeForConditionalGeneration, GeodeProcessor]:
    """A small random model, with a random reconstructor of frames 28 pixels wide."""
    set_seed(0)
    processor = make_processor()
    model = GeodeForConditionalGeneration(make_config(processor)).eval()
    model.attach_reconstructor(tiny_vggt())
    processor.geometry_frame_size = model.config.reconstructor_config.image_size
    return model, processor


def content_of(folder: Path) -> dict[str, str]:
    """Digest of every file, hidden ones included."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
