# SPDX-License-Identifier: Apache-2.0
"""
What checksums cost: beside reading a stored scene, and beside writing and reading a checkpoint.

    python -m benchmarks.checksums --json

Each round times both programs in turn, and the median of the rounds' ratios counts. The files are in the page cache, so that a
disk would only make the ratios smaller. With `--json` the last line is a JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from geode.modeling_geode.scene_files_geode import sha256_of, tensor_checksum
from geode.trainers.checkpoints import write_checksums


def seconds(program: Callable[[], object]) -> float:
    """How long a program takes."""
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def ratio(extra: Callable[[], object], plain: Callable[[], object], rounds: int) -> float:
    """Median of the time of `extra` over that of `plain`."""
    return statistics.median(seconds(extra) / seconds(plain) for _ in range(rounds))


def measure(folder: Path, *, megabytes: int, rounds: int) -> dict[str, float]:
    """
    Measure in a folder.

    Args:
        folder (`Path`): Where files go.
        megabytes (`int`): Size of the tensor.
        rounds (`int`): How often each program runs.

    Returns:
        `dict[str, float]`: `read`, the checksum of a tensor beside reading it; `sha256`, what a digest would take instead;
        `save`, the checksums of a checkpoint beside writing its weights and moments.
    """
    tensor = torch.randn(megabytes << 18)
    save_file({"tensor": tensor}, folder / "model.safetensors")

    def read() -> torch.Tensor:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return file.get_tensor("tensor").clone()

    def save() -> None:
        save_file({"tensor": tensor}, folder / "model.safetensors")
        torch.save({"first": tensor, "second": tensor.clone()}, folder / "optimizer.pt")

    read(), save()
    return {
        "read": ratio(lambda: tensor_checksum(tensor), read, rounds),
        "sha256": ratio(lambda: sha256_of(folder / "model.safetensors"), read, rounds),
        "save": ratio(lambda: write_checksums(folder), save, rounds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of a tensor (default: 256)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each program runs (default: 9)")
    parser.add_argument("--json", dest="is_json", action="store_true", help="print a JSON object last")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), megabytes=arguments.megabytes, rounds=arguments.rounds)
    print(f"checksum beside reading a tensor: {found['read']:.2f}; a SHA-256 instead: {found['sha256']:.2f}")  # noqa: T201
    print(f"checksums beside saving a checkpoint: {found['save']:.2f}")  # noqa: T201
    if arguments.is_json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
