# SPDX-License-Identifier: Apache-2.0
"""Voxels against slow codes and dictionaries; fixtures are outputs of the public reference with random weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geode.modeling_geode.serialization_geode import (
    VoxelGrid,
    attention_layout,
    attention_windows,
    coarsen,
    neighbor_pairs,
    prepare_point_cloud,
    serialization_depth,
    serialize,
    voxel_keys,
)


FIXTURES = Path(__file__).parent.parent / "fixtures" / "sonata"
ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")


def all_voxels(depth: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(1 << depth)] * 3)


def slow_z_code(x: int, y: int, z: int, depth: int) -> int:
    """Write the bits of x, y, z in turn, most significant first."""
    return int("".join(f"{a}{b}{c}" for a, b, c in zip(*(f"{v:0{depth}b}" for v in (x, y, z)), strict=True)), 2)


def slow_hilbert_point(code: int, depth: int) -> list[int]:
    """Walk the other way: from a code to its voxel (Skilling 2004, TransposetoAxes)."""
    bits = f"{code:0{3 * depth}b}"
    point = [int(bits[axis::3], 2) for axis in range(3)]
    carried = point[2] >> 1
    for axis in (2, 1):
        point[axis] ^= point[axis - 1]
    point[0] ^= carried
    for level in range(1, depth):
        flag, low = 1 << level, (1 << level) - 1
        for axis in (2, 1, 0):
            if point[axis] & flag:
                point[0] ^= low
            else:
                exchanged = (point[0] ^ point[axis]) & low
                point[0] ^= exchanged
                point[axis] ^= exchanged
    return point


def random_grid(sizes: list[int], side: int, seed: int = 0) -> VoxelGrid:
    """Unique random voxels per cloud, sorted as the model sorts them."""
    generator = torch.Generator().manual_seed(seed)
    clouds = []
    for size in sizes:
        flat = torch.randperm(side**3, generator=generator)[:size].sort().values
        clouds.append(torch.stack([flat // side**2, flat // side % side, flat % side], dim=1))
    grid_coord = torch.cat(clouds)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    max_index = int(grid_coord.max())
    return VoxelGrid(grid_coord, batch, voxel_keys(grid_coord, batch, max_index), max_index, list(sizes))


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7, 8, 9, 11, 12, 15, 16])
def test_serialize_matches_reference(depth):
    golden = load_file(FIXTURES / "serialization.safetensors")
    grid_coord, batch = golden[f"d{depth}.grid_coord"].long(), golden[f"d{depth}.batch"].long()
    for order in ORDERS:
        got = serialize(grid_coord, batch, depth=depth, order=order)
        assert got.dtype == torch.int64
        assert got.tolist() == golden[f"d{depth}.code.{order}"].tolist()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_hilbert_code_inverts_slow_walk_and_takes_unit_steps(depth):
    codes = serialize(all_voxels(depth), torch.zeros(1 << 3 * depth, dtype=torch.long), depth=depth, order="hilbert")
    walk = all_voxels(depth)[codes.argsort()]
    assert codes.sort().values.tolist() == list(range(1 << 3 * depth))
    assert walk[0].tolist() == [0, 0, 0]
    assert (walk[1:] - walk[:-1]).abs().sum(dim=1).unique().tolist() == [1]
    assert walk.tolist() == [slow_hilbert_point(code, depth) for code in range(1 << 3 * depth)]


@pytest.mark.parametrize("depth", [11, 16])
def test_hilbert_code_inverts_slow_walk_at_large_depths(depth):
    voxels = torch.randint(0, 1 << depth, (50, 3), generator=torch.Generator().manual_seed(1))
    voxels = torch.cat([voxels, torch.tensor([[(1 << depth) - 1] * 3])])
    codes = serialize(voxels, torch.zeros(51, dtype=torch.long), depth=depth, order="hilbert")
    assert [slow_hilbert_point(code, depth) for code in codes.tolist()] == voxels.tolist()


@pytest.mark.parametrize("depth", [1, 5, 16])
def test_z_code_interleaves_bits_below_the_cloud(depth):
    voxels = torch.randint(0, 1 << depth, (40, 3), generator=torch.Generator().manual_seed(2))
    batch = torch.arange(40) % 3
    want = [(b << 3 * depth) + slow_z_code(*v, depth) for v, b in zip(voxels.tolist(), batch.tolist(), strict=True)]
    assert serialize(voxels, batch, depth=depth, order="z").tolist() == want


@pytest.mark.parametrize("curve", ["z", "hilbert"])
def test_trans_swaps_x_and_y(curve):
    voxels, batch = all_voxels(3), torch.arange(512) % 2
    swapped = serialize(voxels[:, [1, 0, 2]], batch, depth=3, order=curve)
    assert torch.equal(serialize(voxels, batch, depth=3, order=f"{curve}-trans"), swapped)
    assert not torch.equal(serialize(voxels, batch, depth=3, order=curve), swapped)


def test_serialization_depth_is_that_of_the_reference():
    manifest_depths = {0: 1, 1: 2, 2: 2, 3: 3, 6: 3, 7: 4, 65534: 16, 65535: 17}
    assert {index: serialization_depth(index) for index in manifest_depths} == manifest_depths


def test_serialize_refuses_what_does_not_fit():
    zero = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`grid_coord` must lie in \[0, 3\] for `depth` 2, got values from 0 to 4"):
        serialize(torch.tensor([[0, 4, 1]]), zero, depth=2, order="z")
    with pytest.raises(ValueError, match="got values from -1 to 2"):
        serialize(torch.tensor([[0, -1, 2]]), zero, depth=2, order="z")
    with pytest.raises(ValueError, match=r"`depth` must lie in \[1, 16\], got 17"):
        serialize(torch.tensor([[0, 0, 0]]), zero, depth=17, order="z")
    with pytest.raises(ValueError, match=r"`order` must be .* got 'hilbert-tras'"):
        serialize(torch.tensor([[0, 0, 0]]), zero, depth=2, order="hilbert-tras")
    with pytest.raises(ValueError, match="A batch of 32768 clouds needs 16 bits, and voxels 48"):
        serialize(torch.tensor([[0, 0, 0]]), zero + 32767, depth=16, order="z")


@pytest.mark.parametrize(("sizes", "side"), [([1], 1), ([27], 3), ([40, 1, 60], 5), ([30, 25], 17)])
def test_neighbor_pairs_match_dictionary(sizes, side):
    grid = random_grid(sizes, side)
    places = {
        (b, *v): row for row, (b, v) in enumerate(zip(grid.batch.tolist(), grid.grid_coord.tolist(), strict=True))
    }
    offsets = list(itertools.product((-1, 0, 1), repeat=3))
    pairs = neighbor_pairs(grid)
    assert len(pairs) == 13
    for (rows, neighbors), (a, b, c) in zip(pairs, offsets[:13], strict=True):
        want = [
            (row, places[cloud, x + a, y + b, z + c])
            for (cloud, x, y, z), row in places.items()
            if (cloud, x + a, y + b, z + c) in places
        ]
        assert list(zip(rows.tolist(), neighbors.tolist(), strict=True)) == want


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_coarsen_matches_dictionary(stride):
    grid = random_grid([50, 7, 90], 9)
    keys = [(b, *(i // stride for i in v)) for b, v in zip(grid.batch.tolist(), grid.grid_coord.tolist(), strict=True)]
    want = sorted(set(keys))
    coarse, inverse, counts = coarsen(grid, stride)
    rows = [(b, *v) for b, v in zip(coarse.batch.tolist(), coarse.grid_coord.tolist(), strict=True)]
    assert rows == want
    assert inverse.tolist() == [want.index(key) for key in keys]
    assert counts.tolist() == [keys.count(key) for key in want]
    assert coarse.sizes == [sum(cloud == key[0] for key in want) for cloud in range(3)]
    assert coarse.max_index == max(max(key[1:]) for key in want)
    assert torch.equal(coarse.keys, coarse.keys.unique(sorted=True))


@pytest.mark.parametrize("sizes", [[5], [8], [16], [19], [3, 20, 8, 1, 17], [24, 9, 16]])
def test_attention_windows_follow_the_curve(sizes):
    window = 8
    grid = random_grid(sizes, 6, seed=3)
    windows = attention_windows(grid, "hilbert", attention_layout(sizes, window, torch.device("cpu")))
    got = {}
    full = windows.rows[: windows.layout.num_windows * window].view(-1, window).tolist()
    got.update({row: set(rows) for rows in full for row in rows})
    for tail in windows.layout.tails:
        own = windows.rows[tail.start : tail.stop].tolist()
        keys = own + windows.rows[tail.borrowed_start : tail.borrowed_stop].tolist()
        assert len(keys) == len(set(keys))
        got.update({row: set(keys) for row in own})
    # The rule in words: window w of a cloud asks at positions wK to (w + 1)K; a last incomplete one reads the last K.
    curve = serialize(grid.grid_coord, grid.batch, depth=grid.depth, order="hilbert").argsort().tolist()
    want, start = {}, 0
    for size in sizes:
        cloud = curve[start : start + size]
        start += size
        for first in range(0, size, window):
            queries = cloud[first : first + window]
            keys = queries if len(queries) == window else cloud[-window:]
            want.update({row: set(keys) for row in queries})
    assert got == want
    assert torch.equal(windows.rows[windows.slots], torch.arange(sum(sizes)))


@pytest.mark.parametrize("cloud", ["A", "B", "S"])
def test_prepare_point_cloud_matches_reference(cloud):
    golden = load_file(FIXTURES / "transform.safetensors")
    raw = {name: golden[f"{cloud}.raw.{name}"] for name in ("coord", "color", "normal")}
    want = {name: golden[f"{cloud}.out.{name}"] for name in ("coord", "feat", "grid_coord", "inverse", "offset")}
    before = raw["coord"].clone()
    got = prepare_point_cloud(raw["coord"], raw["color"], raw["normal"], grid_size=0.02)
    assert torch.equal(raw["coord"], before)
    assert torch.equal(got["grid_coord"][got["inverse"]], want["grid_coord"].long()[want["inverse"].long()])
    assert got["offset"].tolist() == want["offset"].tolist() == [len(want["coord"])]
    # Where the reference kept the same member of a voxel, coordinates and features are equal to the bit.
    reference_row = {tuple(voxel): row for row, voxel in enumerate(want["grid_coord"].tolist())}
    rows = torch.tensor([reference_row[tuple(voxel)] for voxel in got["grid_coord"].tolist()])
    same = (got["coord"] == want["coord"][rows]).all(dim=1)
    assert same.float().mean() > 0.5
    torch.testing.assert_close(got["feat"][same], want["feat"][rows][same], atol=0, rtol=0)


def test_prepare_point_cloud_keeps_the_first_point_of_each_voxel_in_ascending_order():
    # Bounding box 0 .. 0.75 in x and 0 .. 0.25 in y, lowest z 1: the shift is (0.375, 0.125, 1).
    coord = torch.tensor([[0.75, 0.0, 1.5], [0.0, 0.25, 1.0], [0.75, 0.0, 1.4375], [0.0, 0.25, 1.125]])
    color = torch.tensor([[255, 0, 51], [1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)
    normal = torch.tensor([[0.0, 0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    cloud = prepare_point_cloud(coord, color, normal, grid_size=0.25)
    # x: -1.5 -> -2 and 1.5 -> 1; y: -0.5 -> -1 and 0.5 -> 0; z: 2, 0, 1.75 -> 1 and 0.5 -> 0. Then each axis from 0.
    assert cloud["grid_coord"].tolist() == [[0, 1, 0], [3, 0, 1], [3, 0, 2]]
    assert cloud["inverse"].tolist() == [2, 0, 1, 0]
    assert cloud["coord"].tolist() == [[-0.375, 0.125, 0.0], [0.375, -0.125, 0.4375], [0.375, -0.125, 0.5]]
    torch.testing.assert_close(
        cloud["feat"][2], torch.tensor([0.375, -0.125, 0.5, 1.0, 0.0, 0.2, 0.0, 0.6, 0.8]), atol=1e-7, rtol=0
    )
    assert cloud["feat"].dtype == torch.float32


def test_prepare_point_cloud_divides_in_float32():
    # 0.58 / 0.02 is 28.999999... in float64 and rounds to 29 in float32.
    edge = np.float32(0.58)
    assert np.floor(edge / np.float32(0.02)) != np.floor(np.float64(edge) / 0.02)
    coord = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, edge]], dtype=np.float32)
    assert prepare_point_cloud(coord, None, None, grid_size=0.02)["grid_coord"][1, 2] == 29


def test_prepare_point_cloud_fills_missing_color_and_normal_with_zeros_and_takes_read_only_arrays():
    coord = np.random.default_rng(0).uniform(size=(30, 3)).astype(np.float32)
    coord.setflags(write=False)
    cloud = prepare_point_cloud(coord, None, None, grid_size=0.1)
    assert torch.equal(cloud["feat"], torch.nn.functional.pad(cloud["coord"], (0, 6)))
    zeros = prepare_point_cloud(torch.tensor(coord), torch.zeros(30, 3), torch.zeros(30, 3), grid_size=0.1)
    assert all(torch.equal(cloud[name], zeros[name]) for name in cloud)


def test_prepare_point_cloud_is_exact_far_from_the_origin_in_float64():
    near = torch.rand(200, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    far = prepare_point_cloud(near + torch.tensor([5e5, 4e6, 300.0], dtype=torch.float64), None, None, grid_size=0.05)
    want = prepare_point_cloud(near, None, None, grid_size=0.05)
    assert torch.equal(far["grid_coord"], want["grid_coord"])
    torch.testing.assert_close(far["coord"], want["coord"], atol=1e-6, rtol=0)


def test_prepare_point_cloud_refuses_bad_clouds():
    good = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    bad = good.clone()
    bad[1, 2] = torch.nan
    cases = [
        ((torch.zeros(0, 3), None, None), "got an empty cloud"),
        ((torch.zeros(2, 4), None, None), r"`coord` must have shape \(num_points, 3\), got \(2, 4\)"),
        ((bad, None, None), r"`coord` must be finite, but 1 rows are not; the first is row 1, \[1.0, 2.0, nan\]"),
        ((good, torch.zeros(3, 3), None), r"`color` must have shape \(2, 3\), got \(3, 3\)"),
        ((good, good * 100, None), r"`color` must lie in \[0, 255\], got values from 0 to 300"),
        ((good, good - 2, None), "got values from -2 to 1"),
        ((good, good / 4, None), r"`color` must lie in \[0, 255\], got fractions up to 0.75. Multiply by 255"),
        ((good, None, good * torch.inf), "`normal` must be finite"),
        ((good, None, good), "`normal` must hold unit vectors or zeros, got a length of 3.74166"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare_point_cloud(*arguments, grid_size=0.02)
    with pytest.raises(ValueError, match="`grid_size` must be a positive length in metres, got 0"):
        prepare_point_cloud(good, None, None, grid_size=0.0)


def test_prepare_point_cloud_is_at_most_65535_voxels_wide():
    widest = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 65534.5]])
    assert prepare_point_cloud(widest, None, None, grid_size=1.0)["grid_coord"][1].tolist() == [0, 0, 65534]
    with pytest.raises(ValueError, match=r"must be at most 65535 voxels wide, got 65536 with `grid_size` 1\.0"):
        prepare_point_cloud(widest + torch.tensor([[0.0, 0, 0], [0.0, 0, 1]]), None, None, grid_size=1.0)
