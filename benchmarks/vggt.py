# SPDX-License-Identifier: Apache-2.0
"""
Measure `VggtModel` against the plain reading of its published behaviour in `benchmarks/vggt_plain.py`.

    python -m benchmarks.vggt

Each variant runs in a process of its own, on the same random weights and frames. The baseline is our own literal reading of
the published behaviour, not the public program, so the ratios say what our arrangement saves over that reading. Three
quantities, each over one forward without gradients:

- CPU seconds: user plus system time of the process, the least of `--repeats` runs.
- Peak growth: the highest resident memory during the forward over that before it, the median of the runs. Linux only.
- Kept: bytes of layer outputs that are alive when the heads start.

Ratios depend on the sizes. The dense heads have the public widths by default beside a narrower trunk, so they take a larger
share of the time than in VGGT-1B; `--dense-hidden-size` of a quarter of `--hidden-size` has the public proportions.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import vggt_plain
from benchmarks.common import add_json_option, reset_peak, resident_bytes, write_json
from geode.modeling_geode.vggt_geode import HEADS, VggtModel, convert_vggt_checkpoint


ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# Two programs that compute the same differ by rounding only.
SAME_OUTPUT = 1e-3
# Our field to the plain function's.
OUTPUTS = {
    "pose_encoding": "pose_enc",
    "depth": "depth",
    "depth_confidence": "depth_conf",
    "world_points": "world_points",
    "world_points_confidence": "world_points_conf",
}


class Variant(NamedTuple):
    """One program: heads, and frames at a time (`None` is all), unless it `is_plain`."""

    heads: tuple[str, ...] = HEADS
    frames_chunk_size: int | None = 8
    is_plain: bool = False


VARIANTS = {
    "plain, all heads": Variant(is_plain=True),
    "ours, all heads, 1 frame at a time": Variant(frames_chunk_size=1),
    "ours, all heads, 8 frames at a time": Variant(),
    "ours, all heads, all frames at once": Variant(frames_chunk_size=None),
    "ours, camera": Variant(heads=("camera",)),
    "ours, camera + depth": Variant(heads=("camera", "depth")),
}
BASELINE = "plain, all heads"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vggt", description=__doc__.strip().split("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--num-heads", type=int, help="of every block; default: one per 64 channels, at least one")
    parser.add_argument(
        "--depth", type=int, default=24, help="blocks of the trunk, and alternating layers; at least 4"
    )
    parser.add_argument("--dense-hidden-size", type=int, default=256, help="projections scale with it; default: 256")
    parser.add_argument("--num-frames", type=int, default=12)
    parser.add_argument("--height", type=int, default=154, help="in pixels, a multiple of 14")
    parser.add_argument("--width", type=int, default=196, help="in pixels, a multiple of 14")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="processes per variant")
    add_json_option(parser)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error(f"resident memory is read from /proc, which Linux has, got the platform {sys.platform!r}.")
    if options.depth < 4 or options.repeats < 1:
        parser.error(
            f"`--depth` must be at least 4 and `--repeats` at least 1, got {options.depth} and {options.repeats}."
        )
    if options.num_heads is None:
        options.num_heads = max(1, options.hidden_size // 64)
    return options


def public_config(options: argparse.Namespace) -> dict[str, Any]:
    """The sizes under the names of the public constructor; the four tapped layers are spread as in VGGT-1B."""
    widths = [factor * options.dense_hidden_size for factor in (1, 2, 4, 4)]
    return {
        "img_size": 518,
        "patch_size": 14,
        "embed_dim": options.hidden_size,
        "depth": options.depth,
        "num_heads": options.num_heads,
        "mlp_ratio": 4,
        "num_register_tokens": 4,
        "rope_freq": 100,
        "vit_depth": options.depth,
        "vit_num_heads": options.num_heads,
        "camera_trunk_depth": 4,
        "camera_num_heads": options.num_heads,
        "dpt_features": options.dense_hidden_size,
        "dpt_out_channels": widths,
        "intermediate_layer_idx": [layer * options.depth // 24 for layer in (4, 11, 17)] + [options.depth - 1],
    }


# ---------------------------------------------------------------------------------------------- in each process


def cpu_seconds() -> float:
    """User plus system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def record_kept(model: VggtModel, kept: list[int]) -> None:
    """Append to `kept`, at each forward, the bytes of layer outputs that the model hands to its heads."""
    aggregate = model._aggregate

    def record(*args: Any, **kwargs: Any):
        tapped, last = aggregate(*args, **kwargs)
        kept.append(storage_bytes([*last, *(states for pair in tapped.values() for states in pair)]))
        return tapped, last

    # Past `nn.Module.__setattr__`: an attribute of this object, not a part of the model.
    object.__setattr__(model, "_aggregate", record)


def build(variant: Variant, options: argparse.Namespace) -> tuple[Callable[[torch.Tensor], dict[str, Any]], list[int]]:
    """Return the forward to measure, and a list to which it appends the bytes that it keeps."""
    config, kept = public_config(options), []
    state = vggt_plain.random_state(config, seed=0)
    if variant.is_plain:

        def run_plain(frames: torch.Tensor) -> dict[str, Any]:
            output = vggt_plain.plain_forward(state, config, frames)
            kept.append(storage_bytes(output["aggregated"]))
            return output

        return run_plain, kept

    model = convert_vggt_checkpoint(state, config)
    record_kept(model, kept)
    chunk_size = variant.frames_chunk_size or options.num_frames

    def run_ours(frames: torch.Tensor) -> dict[str, Any]:
        output = model(frames, heads=variant.heads, frames_chunk_size=chunk_size)
        return {OUTPUTS[name]: value for name, value in output.items() if name in OUTPUTS}

    return run_ours, kept


@torch.no_grad()
def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one forward of one variant in this process."""
    torch.set_num_threads(options.threads)
    forward, kept = build(variant, options)
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(1, options.num_frames, 3, options.height, options.width, generator=generator)
    # Libraries load and start their threads at the first call.
    forward(torch.zeros(1, 1, 3, 28, 42))
    reset_peak()
    resident, started = resident_bytes("VmRSS"), cpu_seconds()
    output = forward(frames)
    seconds, peak = cpu_seconds() - started, resident_bytes("VmHWM")
    return {
        "cpu_seconds": seconds,
        "peak_growth_bytes": peak - resident,
        "kept_bytes": kept[-1],
        "means": {name: output[name].abs().mean().item() for name in OUTPUTS.values() if name in output},
    }


# ----------------------------------------------------------------------------------------- in the calling process


def run_variant(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a fresh process."""
    sizes = ("hidden_size", "num_heads", "depth", "dense_hidden_size", "num_frames", "height", "width", "threads")
    command = [sys.executable, "-m", "benchmarks.vggt", "--variant", name]
    for size in sizes:
        command += [f"--{size.replace('_', '-')}", str(getattr(options, size))]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def check_same_outputs(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise if a variant did not compute what the baseline computed."""
    want = runs[BASELINE][0]["means"]
    for name, results in runs.items():
        for field, got in results[0]["means"].items():
            if not abs(got - want[field]) <= SAME_OUTPUT * want[field]:
                raise RuntimeError(f"The mean of |`{field}`| must be {want[field]} as the baseline's, {name}: {got}.")


def summarise(results: list[dict[str, Any]]) -> dict[str, float]:
    """One value per quantity over the repeats."""
    return {
        "cpu_seconds": min(result["cpu_seconds"] for result in results),
        "peak_growth_bytes": statistics.median(result["peak_growth_bytes"] for result in results),
        "kept_bytes": results[0]["kept_bytes"],
    }


def format_table(summaries: dict[str, dict[str, float]]) -> str:
    """A table of the quantities and of their ratios to the baseline's."""
    base = summaries[BASELINE]
    lines = [f"{'variant':<38}{'CPU s':>8}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}{'kept MiB':>10}{'ratio':>7}"]
    for name, row in summaries.items():
        line = f"{name:<38}"
        for key, width, unit in (("cpu_seconds", 8, 1), ("peak_growth_bytes", 10, MIB), ("kept_bytes", 10, MIB)):
            line += f"{row[key] / unit:>{width}.1f}{row[key] / base[key]:>7.2f}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    if options.variant is not None:
        sys.stdout.write(json.dumps(measure(VARIANTS[options.variant], options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tqdm(total=options.repeats * len(VARIANTS), file=sys.stderr) as progress:
        # Rounds over all variants, so that a change of the machine's load meets them alike.
        for _ in range(options.repeats):
            for name in VARIANTS:
                progress.set_description(name)
                runs[name].append(run_variant(name, options))
                progress.update()
    check_same_outputs(runs)
    summaries = {name: summarise(results) for name, results in runs.items()}
    sizes = {name: value for name, value in vars(options).items() if name not in ("json", "variant")}
    sys.stdout.write(" ".join(f"{name}={value}" for name, value in sizes.items()) + f" torch={torch.__version__}\n")
    sys.stdout.write(format_table(summaries) + "\n")
    report = {"sizes": sizes, "torch": torch.__version__, "summaries": summaries, "runs": runs}
    write_json(report, options.json)


if __name__ == "__main__":
    main()
