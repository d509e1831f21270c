# SPDX-License-Identifier: Apache-2.0
"""
GEODE at real size on one GPU, beside InternVL3-2B and Qwen2.5-VL-3B, all with random weights.

    python -m benchmarks.gpu --json gpu.json                     # a CUDA device of 80 GB
    python -m benchmarks.gpu --size tiny --device cpu --json     # the same steps at a tiny size, to see that they run

In this order; with a path, the JSON file is written anew after each step, so that an interrupted run leaves what it has:

1. `machine`: what the device reaches in a large matrix product and in a copy, in the dtype of the weights.
2. `inference`: for each model the seconds of its parts for one scene and one question, up to the first token; tokens a second of
   decoding, from the difference of a long and a short answer; and what `--questions` questions cost beside one, from frames on the
   device to `--new-tokens` tokens each. GEODE encodes the scene once and asks in a batch, the others ask one by one, as their users
   do. Models run in turn; ratios are of rounds, with median and range. Frames are decoded and resized before the clock starts.
3. `reconstructor`: VGGT on the same number of frames.
4. `training`: stage 2 of GEODE (language model, projector, regression head), and the same parts of the others: float32 weights, autocast to
   bfloat16, AdamW, no checkpointing. Tokens a second of rows, peak memory, and the share of the peak rate that the counted operations
   reach (MFU): of the maker's figure where the device is known, else of the measured product. One row is a scene and its questions.

Peak memory is PyTorch's, and absent on a CPU. It was sized for less than eight minutes on one H200, which is an estimate.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    add_json_option,
    machine_rates,
    run_in_turn,
    spread_of_ratios,
    sum_within,
    waiting_clock,
    write_json,
)
from benchmarks.gpu_models import NUM_FRAMES, RECONSTRUCTED_SIZE, SUBJECTS, Setting, Subject, make_geode
from geode.trainers.plan_arguments import KNOWN_DEVICES


REAL_BYTES = 75e9  # float32 training of Qwen2.5-VL-3B with AdamW is the most; counted, not measured
GIB = 2**30


def peak_gib(device: torch.device) -> float | None:
    """The most memory that PyTorch has held since the statistics were reset."""
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None


def forget(device: torch.device) -> None:
    """Free what no name holds any more, and start new statistics."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_inference(subjects: dict[str, Subject], options: argparse.Namespace, device: torch.device) -> dict:
    """Parts, decoding, and many questions beside one, of all models in turn."""
    clock, lengths = waiting_clock(device), (1, options.new_tokens, options.long_tokens)
    kinds = {"first": (1, 1), "one": (1, lengths[1]), "long": (1, lengths[2]), "many": (options.questions, lengths[1])}

    def program(name: str, kind: str) -> Callable[[], None]:
        def run() -> None:
            subjects[name].ask(*kinds[kind])
            clock()

        return run

    programs = {f"{name}/{kind}": program(name, kind) for name in subjects for kind in kinds}
    seconds, _ = run_in_turn(programs, options.rounds)
    found = {}
    for name, subject in subjects.items():
        parts = []
        for _ in range(options.rounds):
            with sum_within(subject.parts, clock) as within:
                subject.ask(1, 1)
            parts.append(dict(within))
        taken = {kind: seconds[f"{name}/{kind}"] for kind in kinds}
        more = lengths[2] - 1
        rates = [more / (long - first) for long, first in zip(taken["long"], taken["first"], strict=True)]
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
            "part_seconds": {part: statistics.median(run[part] for run in parts) for part in subject.parts},
            "seconds": {kind: statistics.median(values) for kind, values in taken.items()},
            "decode_tokens_per_s": statistics.median(rates),
            "many_to_one": spread_of_ratios(taken["many"], taken["one"]),
            "many_to_ours": spread_of_ratios(taken["many"], seconds["GEODE/many"]),
            "one_to_ours": spread_of_ratios(taken["one"], seconds["GEODE/one"]),
        }
    return found


@torch.no_grad()
def measure_reconstructor(subject: Subject, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """VGGT's camera and depth heads on random frames."""
    shape = (1, NUM_FRAMES[options.size], 3, *RECONSTRUCTED_SIZE[options.size])
    frames = torch.rand(shape, device=device)
    clock, reconstructor = waiting_clock(device), subject.model.model.reconstructor

    def run() -> None:
        reconstructor(frames, heads=("camera", "depth"))
        clock()

    seconds, _ = run_in_turn({"VGGT": run}, options.rounds)
    with FlopCounterMode(display=False) as counter:
        run()
    median = statistics.median(seconds["VGGT"])
    return {"seconds": median, "tflop": counter.get_total_flops() / 1e12, "shape": shape}


def train_step(subject: Subject, batch: dict, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """One step; the loss."""
    cast = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
    optimizer.zero_grad(set_to_none=True)
    with cast:
        loss = subject.model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def measure_training(
    make: Callable[..., Subject], setting: Setting, options: argparse.Namespace, peak_flops: float
) -> dict[str, Any]:
    """Steps of one model, which is built for it and forgotten."""
    device = setting.device
    forget(device)
    subject = make(setting, **({"reconstructs": False} if make is make_geode else {}))
    for name, parameter in subject.model.named_parameters():
        parameter.requires_grad_(name.startswith(subject.trained))
    subject.model.train()
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    batch, clock = subject.batch(), waiting_clock(device)
    with FlopCounterMode(display=False) as counter:
        train_step(subject, batch, optimizer, device)

    losses = []

    def run() -> None:
        losses.append(train_step(subject, batch, optimizer, device))
        clock()

    seconds, _ = run_in_turn({"step": run}, options.steps)
    median, tokens, flops = statistics.median(seconds["step"]), batch["input_ids"].numel(), counter.get_total_flops()
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "tokens": tokens,
        "step_seconds": median,
        "tokens_per_s": tokens / median,
        "tflop": flops / 1e12,
        "mfu": flops / median / peak_flops,
        "peak_gib": peak_gib(device),
        "losses": losses,
    }


def peak_rate(device: torch.device, measured: float) -> tuple[float, str]:
    """Operations a second that a share is of, and where the figure comes from."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = {label: tflops for label, (tflops, _) in KNOWN_DEVICES.items() if label.split("-")[0] in name}
    if known:
        return max(known.values()) * 1e12, f"dense bf16, by the maker: {name}"
    return measured, "measured matrix product"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="GEODE at real size on one GPU.")
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--questions", type=int, default=16, help="about one scene (default: 16)")
    parser.add_argument("--new-tokens", type=int, default=8, help="of each of them (default: 8)")
    parser.add_argument("--long-tokens", type=int, default=64, help="of the long answer (default: 64)")
    parser.add_argument("--questions-per-pack", type=int, default=8, help="in a row of training (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of inference that are counted (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="of training that are counted (default: 5)")
    parser.add_argument(
        "--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="GEODE always runs"
    )
    add_json_option(parser)
    options = parser.parse_args(arguments)
    is_cuda = torch.device(options.device).type == "cuda"
    if is_cuda and not torch.cuda.is_available():
        parser.error(
            f"`--device {options.device}` needs a CUDA device, and torch {torch.__version__} sees none. The real size needs about "
            f"{REAL_BYTES / 1e9:.0f} GB on it. To see the steps run here: --size tiny --device cpu."
        )
    if options.size == "real" and not is_cuda:
        parser.error(f"`--size real` needs a CUDA device, got `--device {options.device}`. Here use --size tiny.")
    if options.size == "real" and torch.cuda.mem_get_info()[0] < REAL_BYTES:
        parser.error(
            f"`--size real` needs about {REAL_BYTES / 1e9:.0f} GB free, got {torch.cuda.mem_get_info()[0] / 1e9:.0f} GB. Use a device "
            "of 80 GB that does nothing else, or --size tiny."
        )
    options.models = ["GEODE", *(name for name in options.models if name != "GEODE")]
    return options


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for name, row in report["inference"].items():
        parts = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in row["part_seconds"].items())
        many, others = row["many_to_one"], row["many_to_ours"]
        lines += [
            f"{name}: {row['parameters'] / 1e9:.2f} G parameters; to the first token {1e3 * row['seconds']['first']:.0f} ms, of which {parts}",
            f"  decoding {row['decode_tokens_per_s']:.1f} tokens/s; many questions {row['seconds']['many']:.2f} s, {many['median']:.2f} "
            f"times one ({many['least']:.2f} to {many['most']:.2f}), {others['median']:.2f} times ours ({others['least']:.2f} to "
            f"{others['most']:.2f})",
        ]
    for name, row in report["training"].items():
        memory = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB"
        lines.append(
            f"{name}, training: {row['tokens_per_s']:.0f} tokens/s in rows of {row['tokens']}, {row['tflop']:.3g} TFLOP a step, "
            f"MFU {100 * row['mfu']:.1f} % of {report['peak']['from']}{memory}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    report: dict[str, Any] = {**vars(options), "torch": torch.__version__, "inference": {}, "training": {}}

    def keep(**fields: Any) -> None:
        report.update(fields, total_seconds=time.perf_counter() - started)
        if options.json not in (None, "-"):
            write_json(report, options.json)

    rates = machine_rates(device, dtype, matrix_size=8192 if device.type == "cuda" else 512)
    peak_flops, source = peak_rate(device, rates["flops"])
    keep(machine=rates, peak={"flops": peak_flops, "from": source})
    setting = Setting(options.size, device, dtype, options.questions, options.questions_per_pack)
    forget(device)
    subjects = {name: SUBJECTS[name](setting) for name in options.models}
    keep(inference=measure_inference(subjects, options, device), inference_peak_gib=peak_gib(device))
    keep(reconstructor=measure_reconstructor(subjects["GEODE"], options, device))
    subjects.clear()
    training = setting._replace(dtype=torch.float32)
    for name in options.models:
        report["training"][name] = measure_training(SUBJECTS[name], training, options, peak_flops)
        keep()
    sys.stdout.write(table(report) + "\n")
    if options.json == "-":
        write_json(report, options.json)


if __name__ == "__main__":
    main()
