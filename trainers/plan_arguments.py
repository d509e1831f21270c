# SPDX-License-Identifier: Apache-2.0
"""
What `geode plan` assumes, and its command line, apart from it so that `geode --help` loads neither torch nor transformers.

Everything that is assumed and not counted is a field of [`Assumptions`]: it is printed with each plan and is an option.
"""

import argparse
import re
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple


# Dense bf16 TFLOP/s and memory in GB of 1e9 bytes, as the vendor's data sheets have them for the SXM boards.
KNOWN_DEVICES = {"A100-40GB": (312.0, 40.0), "A100-80GB": (312.0, 80.0), "H100": (989.0, 80.0), "H200": (989.0, 141.0)}
DEFAULT_DEVICES = ("8xA100-80GB", "8xH200", "64xH100")


class Devices(NamedTuple):
    """
    The accelerators of a run.

    Args:
        label (`str`): What was asked for, as `"8xH200"`.
        count (`int`): How many there are.
        peak_flops (`float`): Dense bf16 operations per second of one.
        memory_bytes (`float`): Memory of one.
    """

    label: str
    count: int
    peak_flops: float
    memory_bytes: float


def assumed(default, help_text: str):
    """Declare an assumption with its default and its meaning."""
    return field(default=default, metadata={"help": help_text})


@dataclass(kw_only=True)
class Assumptions:
    """What a plan cannot count. Each field is printed with it, and is an option of `geode plan`."""

    mfu: float = assumed(0.35, "share of the peak that training reaches; not measured")
    encoder_mfu: float = assumed(0.35, "the same for frozen encoders; not measured")
    text_tokens: int = assumed(96, "tokens of a question with its answer")
    layer_bytes: float = assumed(34.0, "activations of a decoder layer, for each token and unit of width")
    kept_bytes: float = assumed(2.0, "what a layer keeps of that with activation checkpointing")
    logit_bytes: float = assumed(10.0, "logits, for each token and word: half precision, float32 and its gradient")
    optimizer_states: float = assumed(2.0, "Adam's moments for each trained parameter, each as the parameter")
    ddp_buckets: float = assumed(1.0, "further copies of the gradients under DDP")
    autocast_bytes: float = assumed(2.0, "half-precision copy of each trained parameter, where they are float32")
    fsdp_units: float = assumed(2.0, "decoder layers that FSDP2 holds whole at a time, beside everything else")
    zero_master_bytes: float = assumed(12.0, "float32 copy and two moments of each trained parameter under ZeRO")
    zero3_live: float = assumed(1.0e9, "parameters that ZeRO-3 holds whole at a time, at most (DeepSpeed's default)")
    overhead_gb: float = assumed(3.0, "of each device: context, communication, fragments, encoders' activations")
    frame_height: int = assumed(392, "of a frame for the reconstructor, in pixels: a video of 4:3")
    frame_width: int = assumed(518, "the same")
    points: int = assumed(65_536, "points of a scene at the point encoder's finest stage")
    point_tokens: int = assumed(1_024, "points at its coarsest stage; the stages between are spaced evenly")
    store_bytes: int = assumed(2, "of a stored feature, as `geode precompute --store-dtype bfloat16`")
    videos: int = assumed(1_000_000, "videos that are encoded once")
    video_seconds: float = assumed(60.0, "length of a video")
    video_fps: float = assumed(30.0, "its frames per second, all of which are decoded")
    video_mb: float = assumed(12.0, "its size")

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf") or (value == 0 and name in _DIVISORS):
                raise ValueError(f"`{name}` must be a positive number, got {value}.")


_DIVISORS = ("mfu", "encoder_mfu", "frame_height", "frame_width", "points", "point_tokens")


def parse_devices(text: str) -> Devices:
    """
    Read a number and a kind of accelerators.

    Args:
        text (`str`): `COUNTxNAME` of a known kind, or `COUNTxNAME:TFLOPS:GB` of another one.

    Returns:
        [`Devices`]: What it says.

    Raises:
        ValueError: If the kind is not known, or a number is none.

    Example:
        >>> parse_devices("8xH200").memory_bytes
        141000000000.0
        >>> parse_devices("16xMI300X:1307:192").peak_flops
        1307000000000000.0
    """
    match = re.fullmatch(r"([1-9]\d*)x([\w.-]+)(?::(\d+\.?\d*):(\d+\.?\d*))?", text)
    if match is None or (match[3] is None and match[2] not in KNOWN_DEVICES):
        raise ValueError(
            f"`devices` must be as 8xH200, of {sorted(KNOWN_DEVICES)}, or as 16xNAME:TFLOPS:GB (dense bf16), got {text!r}."
        )
    tflops, gigabytes = KNOWN_DEVICES[match[2]] if match[3] is None else (float(match[3]), float(match[4]))
    if tflops <= 0 or gigabytes <= 0:
        raise ValueError(f"`devices` must have positive TFLOPS and GB, got {text!r}.")
    return Devices(f"{match[1]}x{match[2]}", int(match[1]), tflops * 1e12, gigabytes * 1e9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `geode.trainers.plan.run` reads."""
    parser.add_argument(
        "recipes", metavar="RECIPE", nargs="+", help="YAML files in folders that are called as their stages"
    )
    parser.add_argument(
        "--devices",
        metavar="COUNTxNAME",
        nargs="+",
        default=list(DEFAULT_DEVICES),
        help=f"accelerators: {', '.join(sorted(KNOWN_DEVICES))}, or 16xNAME:TFLOPS:GB (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, help="records of one epoch (default: `expected_rows` of the recipe)"
    )
    group = parser.add_argument_group("assumptions")
    for entry in fields(Assumptions):
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            metavar="X",
            type=entry.type,
            default=entry.default,
            help=f"{entry.metadata['help']} (default: %(default)s)",
        )


__all__ = ["DEFAULT_DEVICES", "KNOWN_DEVICES", "Assumptions", "Devices", "add_arguments", "parse_devices"]
