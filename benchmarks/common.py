# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: programs run in turn, the spread of their ratios, memory, the machine's rates, and JSON."""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


STDOUT = "-"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: alone it ends the output with the report on one line, with a path it writes the report there."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="PATH",
        help="write every measurement as JSON: to PATH, or without it as the last line of the output",
    )


def write_json(report: Any, path: str | None) -> None:
    """Write a report where the option of [`add_json_option`] says; nowhere if that was not given."""
    text = json.dumps(report) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    elif path is not None:
        Path(path).write_text(text, encoding="utf-8")


def run_in_turn(programs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], ...]:
    """
    Time programs in turn, so that a change of the machine's load meets them alike.

    Args:
        programs (`dict[str, Callable]`): By name.
        rounds (`int`): Rounds that are counted; one more comes before them.

    Returns:
        `tuple[dict[str, list[float]], dict[str, list[float]]]`: The seconds of each round, by the clock and of the CPU.
    """
    wall: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    for number in tqdm(range(rounds + 1), desc="rounds", file=sys.stderr):
        for name, program in programs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            program()
            if number:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return wall, cpu


def spread_of_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Median and range of the ratios of rounds."""
    ratios = [one / other for one, other in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


@contextmanager
def sum_within(parts: dict[str, nn.Module], read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """
    Sum how much a reading grows within the forward passes of some modules: of a clock, or of a counter of operations.

    Args:
        parts (`dict[str, nn.Module]`): By name; none within another.
        read (`Callable`): Gives the reading.

    Yields:
        `dict[str, float]`: The sums so far.
    """
    sums, started, handles = dict.fromkeys(parts, 0.0), {}, []
    for name, part in parts.items():

        def begin(module, arguments, name=name):
            started[name] = read()

        def end(module, arguments, output, name=name):
            sums[name] += read() - started[name]

        handles += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def waiting_clock(device: torch.device) -> Callable[[], float]:
    """A clock that first waits until the device has finished what it was given."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return read


def resident_bytes(field: str) -> int:
    """`VmRSS`, resident memory now, or `VmHWM`, its highest value since [`reset_peak`]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"`/proc/self/status` has no field `{field}`. Run the benchmark on an ordinary Linux kernel.")


def trim_memory() -> None:
    """Give back what the allocator holds free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Give back what the allocator holds free, and start a new `VmHWM`."""
    trim_memory()
    Path("/proc/self/clear_refs").write_text("5")


def machine_rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    matrix_size: int,
    clock: Callable[[], float] | None = None,
    repeats: int = 5,
) -> dict[str, float]:
    """
    What the machine reaches where it should be fastest: a square matrix product, and a copy.

    Args:
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of the matrices.
        matrix_size (`int`): Their sides. The copy is of 64 such matrices, more than a cache holds.
        clock (`Callable`, *optional*): Gives seconds; the default is [`waiting_clock`].
        repeats (`int`, defaults to 5): Runs of each, of which the fastest counts; one more comes before them.

    Returns:
        `dict[str, float]`: `flops`, operations a second, a multiply-add being two, and `bytes_per_s`, read and written.
    """
    clock = waiting_clock(device) if clock is None else clock
    left, right = (torch.rand(matrix_size, matrix_size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(64 * matrix_size * matrix_size, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def seconds(program: Callable[[], Any]) -> float:
        taken = []
        for _ in range(repeats + 1):
            start = clock()
            program()
            taken.append(clock() - start)
        return min(taken[1:])

    product_s = seconds(lambda: torch.mm(left, right, out=product))
    copy_s = seconds(lambda: target.copy_(source))
    moved = 2 * source.numel() * source.element_size()
    return {"flops": 2 * matrix_size**3 / product_s, "bytes_per_s": moved / copy_s}


__all__ = [
    "add_json_option",
    "machine_rates",
    "reset_peak",
    "resident_bytes",
    "run_in_turn",
    "spread_of_ratios",
    "sum_within",
    "trim_memory",
    "waiting_clock",
    "write_json",
]
