# SPDX-License-Identifier: Apache-2.0
"""
Measure `SonataModel` against the plain reading of its published behaviour in `benchmarks/sonata_plain.py`.

    python -m benchmarks.sonata --json

Both released sizes, with random weights, encode a room of boxes, 5 x 4 x 2.6 m, from which 20,000 or 100,000 points are drawn.
Each measurement runs in a process of its own; both programs take turns, and what they compute is compared. Two quantities,
each over one forward without gradients:

- CPU seconds: user plus system time of the process, the least of `--repeats` runs.
- Peak growth: the highest resident memory during the forward over that before it, the median of the runs. Linux only.

Beside them stands the least time that the multiplications can take: those that the network has on this cloud, neighbours that
do not exist left out, over the rate of a matrix product of the width of its deepest blocks, measured in the same minutes. The
sparse convolution's gathering, softmax and all else come on top.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import set_seed

from benchmarks import sonata_plain
from benchmarks.vggt import MIB, cpu_seconds, reset_peak, resident_bytes
from geode.configuration.configuration_geode import SonataConfig
from geode.modeling_geode.sonata_geode import SonataModel, prepare_point_cloud, published_name


SIZES = {
    "108m": {},
    "small": {
        "enc_depths": [2, 2, 2, 6, 2],
        "enc_channels": [32, 64, 128, 256, 512],
        "enc_num_head": [2, 4, 8, 16, 32],
    },
}
CASES = [("108m", 20_000), ("small", 20_000), ("108m", 100_000), ("small", 100_000)]
PROGRAMS = ("ours", "plain")
# Two programs that compute the same differ by rounding only; of the largest value.
SAME_OUTPUT = 1e-4
ROOM = (5.0, 4.0, 2.6)  # metres
NUM_BOXES = 10


def room_points(num_points: int) -> np.ndarray:
    """Points `(num_points, 3)` in metres, spread evenly over the surfaces of a room and of boxes on its floor."""
    generator = np.random.default_rng(0)
    corners = [(np.zeros(3), np.array(ROOM))]
    for _ in range(NUM_BOXES):
        size = generator.uniform((0.5, 0.5, 0.4), (1.6, 1.0, 1.2))
        low = np.append(generator.uniform((0, 0), ROOM[:2] - size[:2]), 0)
        corners.append((low, low + size))
    faces = []
    for low, high in corners:
        for axis in range(3):
            for end in (low, high):
                flat = np.arange(3) == axis
                faces.append((np.where(flat, end, low), np.where(flat, end, high)))
    lows, highs = (np.array(ends) for ends in zip(*faces, strict=True))
    extents = highs - lows
    areas = np.where(extents > 0, extents, 1).prod(axis=1)
    chosen = generator.choice(len(faces), num_points, p=areas / areas.sum())
    return lows[chosen] + extents[chosen] * generator.random((num_points, 3))


def make_inputs(num_points: int) -> dict[str, torch.Tensor]:
    """The model's inputs for a room."""
    cloud = prepare_point_cloud(room_points(num_points), None, None)
    return {name: cloud[name] for name in ("feat", "coord", "grid_coord", "offset")}


def count_multiplications(config: SonataConfig, grid_coord: torch.Tensor) -> int:
    """Multiplications of the matrix products that the network needs for a cloud."""
    total, grid = grid_coord.shape[0] * config.in_channels * config.enc_channels[0], grid_coord
    for stage, depth in enumerate(config.enc_depths):
        width = config.enc_channels[stage]
        if stage:
            total += len(grid) * config.enc_channels[stage - 1] * width
            grid = torch.unique(grid // config.stride[stage - 1], dim=0)
        neighbors = int((sonata_plain.neighbor_table(grid) < len(grid)).sum())
        # The convolution's own linear layer, attention's four, and the MLP's.
        linear = len(grid) * (5 + 2 * config.mlp_ratio)
        attention = 2 * len(grid) * min(config.enc_patch_size[stage], len(grid))
        total += depth * ((neighbors + linear) * width**2 + attention * width)
    return int(total)


def measure(size: str, num_points: int, program: str) -> dict[str, Any]:
    """Measure one forward of one program in this process."""
    set_seed(0)
    config = SonataConfig(**SIZES[size])
    model, inputs = SonataModel(config).eval(), make_inputs(num_points)
    if program == "plain":
        state, arguments = (
            {published_name(name): value for name, value in model.state_dict().items()},
            config.to_dict(),
        )

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if program == "ours":
            return model(**inputs).last_hidden_state
        return sonata_plain.plain_forward(state, arguments, inputs["feat"], inputs["grid_coord"])

    with torch.no_grad():
        # Libraries load at the first call.
        forward(make_inputs(200))
        reset_peak()
        resident, started = resident_bytes("VmRSS"), cpu_seconds()
        output = forward(inputs)
        seconds, peak = cpu_seconds() - started, resident_bytes("VmHWM")
    return {
        "cpu_seconds": seconds,
        "peak_growth_bytes": peak - resident,
        "num_voxels": len(inputs["feat"]),
        "output": output[:: max(1, len(output) // 16), ::16].tolist(),
    }


def multiplication_rate(width: int) -> float:
    """Multiplications a second, of CPU time, of a product of 4096 rows with a square matrix of `width`; the best of ten."""
    rows, matrix = torch.randn(4096, width), torch.randn(width, width)
    best = float("inf")
    for _ in range(10):
        started = cpu_seconds()
        torch.mm(rows, matrix)
        best = min(best, cpu_seconds() - started)
    return rows.numel() * width / best


def in_fresh_process(function, *arguments):
    """The result of a call in a child of this process, which must not have computed yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_case(size: str, num_points: int, repeats: int, progress: tqdm) -> dict[str, Any]:
    """Measure both programs of a case in turn, and compare them."""
    config = SonataConfig(**SIZES[size])
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in PROGRAMS}
    rates = []
    for _ in range(repeats):
        for program in PROGRAMS:
            runs[program].append(in_fresh_process(measure, size, num_points, program))
            progress.update()
        rates.append(in_fresh_process(multiplication_rate, max(config.enc_channels[:-1])))
    outputs = [torch.tensor(runs[program][0].pop("output")) for program in PROGRAMS]
    check_same(size, num_points, *outputs)
    products = in_fresh_process(count_of_case, size, num_points)
    found = {
        "size": size,
        "num_points": num_points,
        "num_voxels": runs["ours"][0]["num_voxels"],
        "cpu_seconds": {name: min(run["cpu_seconds"] for run in runs[name]) for name in PROGRAMS},
        "peak_growth_bytes": {
            name: statistics.median(run["peak_growth_bytes"] for run in runs[name]) for name in PROGRAMS
        },
        "all_cpu_seconds": {name: [run["cpu_seconds"] for run in runs[name]] for name in PROGRAMS},
        "multiplications": products,
        "least_cpu_seconds": products / max(rates),
    }
    for quantity in ("cpu_seconds", "peak_growth_bytes"):
        found[f"{quantity}_ratio"] = found[quantity]["ours"] / found[quantity]["plain"]
    return found


def count_of_case(size: str, num_points: int) -> int:
    """[`count_multiplications`] of a case."""
    return count_multiplications(SonataConfig(**SIZES[size]), make_inputs(num_points)["grid_coord"])


def check_same(size: str, num_points: int, ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Raise if the programs computed something else."""
    error, largest = (ours - plain).abs().max().item(), plain.abs().max().item()
    if not error <= SAME_OUTPUT * largest:
        raise RuntimeError(
            f"Both programs must compute the same for {num_points} points and the size {size!r}, but they differ by "
            f"{error:.2g} beside features of up to {largest:.2g}."
        )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [f"{size}:{num_points}" for size, num_points in CASES]
    parser = argparse.ArgumentParser(description="Our Sonata beside the plain reading of its published behaviour.")
    parser.add_argument("--cases", nargs="+", default=names, help=f"SIZE:POINTS (default: {' '.join(names)})")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default: 3)")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on one line")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error(f"resident memory is read from /proc, which Linux has, got the platform {sys.platform!r}.")
    for case in options.cases:
        size, _, num_points = case.partition(":")
        if size not in SIZES or not num_points.isdecimal() or int(num_points) < 1:
            parser.error(f"`--cases` must be SIZE:POINTS with a size of {sorted(SIZES)}, got {case!r}.")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    report = {**vars(options), "torch": torch.__version__, "results": []}
    with tqdm(total=len(options.cases) * options.repeats * len(PROGRAMS), desc="runs", file=sys.stderr) as progress:
        for case in options.cases:
            size, _, num_points = case.partition(":")
            found = measure_case(size, int(num_points), options.repeats, progress)
            report["results"].append(found)
            seconds, peaks = found["cpu_seconds"], found["peak_growth_bytes"]
            sys.stdout.write(
                f"{size}, {num_points} points, {found['num_voxels']} voxels: {seconds['ours']:.2f} s of CPU beside "
                f"{seconds['plain']:.2f} s plain, ratio {found['cpu_seconds_ratio']:.2f}, of which the products take at least "
                f"{found['least_cpu_seconds']:.2f} s; peak {peaks['ours'] / MIB:.0f} MiB beside "
                f"{peaks['plain'] / MIB:.0f} MiB, ratio {found['peak_growth_bytes_ratio']:.2f}\n"
            )
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
