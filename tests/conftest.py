# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole suite. The environment is set first: the libraries read it when they are imported."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import NamedTuple

import pytest
import torch


# More threads than cores make workers of pytest-xdist wait for each other.
torch.set_num_threads(1)


class BoxRoom(NamedTuple):
    """An empty room seen from inside by two cameras, with every quantity in closed form. See `box_room`."""

    depth: torch.Tensor
    intrinsics: torch.Tensor
    world_from_cam: torch.Tensor
    image_size: tuple[int, int]
    size_m: tuple[float, float, float]
    camera_height_m: float


def _ray_depths(rays_world: torch.Tensor, center: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Distance along each ray (of any length) to the first wall, in units of the ray's length, from inside the box."""
    wall = torch.where(rays_world > 0, high, low)
    steps = torch.where(rays_world == 0, torch.inf, (wall - center) / rays_world)
    return steps.amin(dim=-1)


@pytest.fixture(scope="session")
def box_room() -> BoxRoom:
    """
    An empty room of 5 x 4 x 2.5 metres, its floor at z = 0, and exact z-depth from two cameras 1.5 m above the floor.

    The first camera stands over the origin and looks along world +y, the second stands 1 m to its right and is turned
    by 90 degrees to look along world +x. Rays are scaled so that their z in the camera is 1, so a step is a z-depth.
    Nothing is symmetric: height != width, fx != fy, the principal point is off centre, the origin is off centre.
    """
    height, width = 12, 17
    low = torch.tensor([-2.0, -1.0, 0.0], dtype=torch.float64)
    high = torch.tensor([3.0, 3.0, 2.5], dtype=torch.float64)
    intrinsics = torch.tensor([[11.0, 0.0, 7.5], [0.0, 9.0, 6.25], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # Columns are the camera's x (right), y (down) and z (forward) axes in the world.
    look_along_y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    look_along_x = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    centers = torch.tensor([[0.0, 0.0, 1.5], [1.0, 0.0, 1.5]], dtype=torch.float64)
    world_from_cam = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    world_from_cam[:, :3, :3] = torch.stack([look_along_y, look_along_x])
    world_from_cam[:, :3, 3] = centers
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).to(torch.float64)
    rays_cam = pixels @ torch.linalg.inv(intrinsics).T
    depths = [
        _ray_depths(rays_cam @ pose[:3, :3].T, center, low, high)
        for pose, center in zip(world_from_cam, centers, strict=True)
    ]
    return BoxRoom(
        depth=torch.stack(depths),
        intrinsics=intrinsics.repeat(2, 1, 1),
        world_from_cam=world_from_cam,
        image_size=(height, width),
        size_m=tuple((high - low).tolist()),
        camera_height_m=1.5,
    )
