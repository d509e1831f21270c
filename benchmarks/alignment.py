# SPDX-License-Identifier: Apache-2.0
"""
How well gravity and scale are recovered from a reconstruction, over rendered rooms of known truth.

A perfect VGGT is imitated: exact depth and cameras of a walk through a room, in the first camera's frame and an arbitrary unit.
Noise is then added to depth (relative, independent per pixel) and every camera is rolled and tilted about its own axes.

    python -m benchmarks.alignment --num-rooms 20
"""

import argparse
import logging
import math
import statistics
import sys
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import add_json_option, write_json
from geode.data.synthetic_rooms.render import Raycaster, Walk, render_walk
from geode.data.synthetic_rooms.rooms import make_room
from geode.data.synthetic_rooms.walks import resize_intrinsics
from geode.modeling_geode.geometry_geode import invert_rigid
from geode.modeling_geode.scene_geode import KnownLength, SceneGeometry
from geode.modeling_geode.vggt_geode import VggtModelOutput


UNITS_PER_M = 0.37
SIZE = (72, 96)
CASES = [  # frames that are seen, noise of depth, largest roll and tilt in degrees
    (8, 0.0, 0.0),
    (8, 0.02, 0.0),
    (8, 0.05, 0.0),
    (8, 0.02, 20.0),
    (1, 0.02, 0.0),
    (1, 0.02, 20.0),
]
SOURCES = ("poses", "camera_height", "depth", "length")


def film(seed: int, num_frames: int, max_turn_deg: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth in metres `(num_frames, height, width)`, intrinsics `(3, 3)` and `world_from_cam` of a walk, float64."""
    room, generator = make_room(seed), np.random.default_rng(seed)
    walk: Walk = render_walk(room, image_size=SIZE, num_frames=max(CASES)[0], supersampling=1)
    poses = walk.world_from_cam[:: len(walk.world_from_cam) // num_frames][:num_frames].copy()
    for pose in poses:
        pose[:3, :3] = pose[:3, :3] @ turn(*np.deg2rad(generator.uniform(-max_turn_deg, max_turn_deg, 2)))
    caster, intrinsics = Raycaster(room), resize_intrinsics(walk.intrinsics, SIZE, new_size=SIZE)
    room_from_scene = np.linalg.inv(walk.scene_from_room)
    depth = [caster.depth_and_ids(room_from_scene @ pose, intrinsics, image_size=SIZE)[0] for pose in poses]
    return torch.from_numpy(np.stack(depth)), torch.from_numpy(intrinsics), torch.from_numpy(poses)


def turn(roll: float, tilt: float) -> np.ndarray:
    """A camera's roll about its viewing axis, then its tilt about its x axis."""
    about_z = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1.0]])
    about_x = np.array([[1.0, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    return about_z @ about_x


def measure(seed: int, case: tuple[int, float, float]) -> dict[str, float | None]:
    """
    Errors of one room: degrees for gravity (None where it was only assumed), per cent for each source of scale.

    Args:
        seed (`int`): Of the room.
        case (`tuple[int, float, float]`): An entry of `CASES`.

    Returns:
        `dict[str, float | None]`: By `"gravity_deg"` and the names of `SOURCES`; `"poses"` needs more than one frame.
    """
    num_frames, noise, max_turn_deg = case
    depth_m, intrinsics, world_from_cam = film(seed, num_frames, max_turn_deg)
    generator = torch.Generator().manual_seed(seed)
    noisy = depth_m * (1 + noise * torch.randn(depth_m.shape, generator=generator, dtype=torch.float64))
    poses = invert_rigid(world_from_cam[0]) @ world_from_cam
    poses[:, :3, 3] *= UNITS_PER_M
    output = VggtModelOutput(
        extrinsics=invert_rigid(poses)[None, :, :3].float(),
        intrinsics=intrinsics.expand(1, num_frames, 3, 3).float(),
        depth=(noisy * UNITS_PER_M)[None, ..., None].float(),
        depth_confidence=torch.full_like(noisy, 2.0)[None].float(),
    )
    pixel_values = torch.zeros(1, num_frames, 3, *SIZE)
    scene = SceneGeometry.from_vggt(output, pixel_values)
    up = world_from_cam[0, :3, :3].T @ torch.tensor([0.0, 0, 1], dtype=torch.float64)
    cosine = float(scene.scene_from_dataset[2, :3] @ up)
    errors = {"gravity_deg": math.degrees(math.acos(min(1.0, cosine))) if scene.gravity == "estimated" else None}
    (height, width), rays = SIZE, torch.linalg.inv(intrinsics)
    ends = [(0, width // 5, height // 2), (num_frames - 1, 4 * width // 5, height // 2)]
    surfaces = [
        (
            world_from_cam[i]
            @ torch.cat([depth_m[i, v, u] * (rays @ torch.tensor([u, v, 1.0]).double()), torch.ones(1)])
        )[:3]
        for i, u, v in ends
    ]
    known = {
        "poses": {"camera_positions_m": world_from_cam[:, :3, 3]},
        "camera_height": {"camera_height_m": float(world_from_cam[0, 2, 3])},
        "depth": {"depth_m": depth_m},
        "length": {"known_length": KnownLength(*ends, float(torch.linalg.vector_norm(surfaces[0] - surfaces[1])))},
    }
    for source in SOURCES[num_frames == 1 :]:
        scaled = SceneGeometry.from_vggt(output, pixel_values, **known[source])
        errors[source] = 100 * abs(scaled.metres_per_unit * UNITS_PER_M - 1)
    return errors


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Errors of estimated gravity and scale over rendered rooms.")
    parser.add_argument("--num-rooms", type=int, default=20, help="rooms, of seeds from 1000 on (default: 20)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = defaultdict(list)
    jobs = [(case, seed) for case in CASES for seed in range(1000, 1000 + options.num_rooms)]
    for case, seed in tqdm(jobs, desc="rooms", unit="room"):
        results[case].append(measure(seed, case))
    lines = [
        "| frames | depth noise | roll, tilt | floor found | gravity, deg | "
        + " | ".join(f"{s}, %" for s in SOURCES)
        + " |"
    ]
    lines.append("|" + " --- |" * (5 + len(SOURCES)))
    for (num_frames, noise, max_turn_deg), rows in results.items():
        found = [row["gravity_deg"] for row in rows if row["gravity_deg"] is not None]
        cells = [
            f"{num_frames}",
            f"{100 * noise:g} %",
            f"up to {max_turn_deg:g} deg",
            f"{len(found)} of {len(rows)}",
            spread(found),
        ]
        cells += [spread([row[source] for row in rows if source in row]) for source in SOURCES]
        lines.append("| " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join([*lines, ""]))
    write_json([{"case": case, "errors": rows} for case, rows in results.items()], options.json)


def spread(values: list[float]) -> str:
    """Median and largest value."""
    return f"{statistics.median(values):.2g} ({max(values):.2g})" if values else "-"


if __name__ == "__main__":
    logging.getLogger("geode").setLevel(logging.ERROR)  # rooms without a floor are counted, not announced
    main()
