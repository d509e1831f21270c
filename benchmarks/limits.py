# SPDX-License-Identifier: Apache-2.0
"""
Where the time of one question goes, and how far each part is from what the machine could do.

    python -m benchmarks.limits --json                  # the tiny checkpoint
    python -m benchmarks.limits --size real --json      # the widths of geode-1.5b, two layers of each part, 4 frames; needs 6 GB

For each part: seconds within it, operations as PyTorch counts them (matrix products, convolutions and attention, a multiply-add being two),
and the bytes that it must move at least: its weights once for each call, and what goes in and comes out. The limit is the larger of
operations over the rate of a large matrix product and bytes over that of a copy, both measured in the same run. It is a lower bound:
elementwise work, keys and values, and everything that is written and read again within a part are left out. `preparing` is decoding,
resizing and voxels, which have no operations to count. The regression head's products, one row for a number, are not shown. On a
CPU seconds are of its time in this process, which other programs disturb less than those of the clock. Medians over the rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoProcessor

from benchmarks.common import add_json_option, machine_rates, sum_within, waiting_clock, write_json
from benchmarks.scene_reuse import questions_of_scene, real_width_models, real_width_processor
from geode import embedded_scene, tiny_checkpoint


PARTS = ("vision_tower", "multi_modal_projector", "point_encoder", "drm", "language_model")
MIB = 2**20


def load(size: str, device: torch.device):
    """The model and its processor, and how many frames it gets."""
    if size == "tiny":
        processor = AutoProcessor.from_pretrained(tiny_checkpoint())
        return AutoModel.from_pretrained(tiny_checkpoint()).to(device).eval(), processor, processor.num_frames
    processor = real_width_processor()
    return real_width_models(processor)[0].to(device), processor, 4


def tensors_in(value: Any) -> int:
    """Bytes of the tensors in arguments or outputs."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensors_in, value.values()))
    return sum(map(tensors_in, value)) if isinstance(value, list | tuple) else 0


def weight_bytes(part: nn.Module) -> int:
    """Bytes of the weights, those of embeddings left out: a call reads few of their rows."""
    tables = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() * weight.element_size() for weight in part.parameters() if id(weight) not in tables)


def count(parts: dict[str, nn.Module], ask: Callable[[], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and bytes of each part, over one question."""
    moved, handles = dict.fromkeys(parts, 0.0), []
    for name, part in parts.items():

        def add(module, arguments, keywords, output, name=name):
            moved[name] += weight_bytes(module) + tensors_in(arguments) + tensors_in(keywords) + tensors_in(output)

        handles.append(part.register_forward_hook(add, with_kwargs=True))
    with FlopCounterMode(display=False) as counter, sum_within(parts, counter.get_total_flops) as operations:
        ask()
    for handle in handles:
        handle.remove()
    return operations, moved


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """
    Measure all parts.

    Args:
        options (`argparse.Namespace`): Of the command line.

    Returns:
        `dict`: `machine`, `seconds` of one question and of preparing its scene, and `parts`: for each, and for decoding, `seconds`, `flops`,
        `bytes`, `limit_seconds`, and `times_limit`.
    """
    device = torch.device(options.device)
    model, processor, num_frames = load(options.size, device)
    clock = time.process_time if device.type == "cpu" else waiting_clock(device)
    room, question = embedded_scene(), questions_of_scene(1)
    parts = {name: getattr(model.model, name) for name in PARTS} | {"lm_head": model.lm_head}

    def prepare() -> dict:
        scene = processor.prepare_scene(video=room / "room.mp4", geometry=room / "geometry", num_frames=num_frames)
        return {name: tensor.to(device) for name, tensor in scene.items()}

    scene = prepare()

    def ask(new_tokens: int) -> None:
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.ask(processor, model.encode_scene(**scene), question, **lengths)

    runs: dict[str, list[dict[str, float]]] = {"first": [], "all": []}
    totals, preparing = [], []
    for number in range(options.rounds + 1):
        start = clock()
        prepare()
        preparing.append(clock() - start)
        for name, new_tokens in (("first", 1), ("all", options.new_tokens)):
            with sum_within(parts, clock) as within:
                start = clock()
                ask(new_tokens)
                taken = clock() - start
            runs[name] += [dict(within)] * (number > 0)
        totals += [taken] * (number > 0)
    counts = {name: count(parts, lambda n=n: ask(n)) for name, n in (("first", 1), ("all", options.new_tokens))}
    rates = machine_rates(device, model.dtype, matrix_size=1024, clock=clock)
    found = {}
    for name in parts:
        for kind, label in (("first", name), ("rest", f"{name}, decoding")):
            row = reading(name, kind, runs, counts)
            if row["seconds"] > 0 and row["flops"] > 0:  # the encoders do nothing while decoding
                found[label] = with_limit(row, rates)
    return {
        "machine": rates,
        "seconds": statistics.median(totals),
        "preparing_seconds": statistics.median(preparing[1:]),
        "parts": found,
    }


def reading(name: str, kind: str, runs: dict, counts: dict) -> dict[str, float]:
    """Seconds, operations and bytes of a part up to the first token, or of all the tokens after it."""
    medians = {key: statistics.median(run[name] for run in rounds) for key, rounds in runs.items()}
    read = {key: (medians[key], counts[key][0][name], counts[key][1][name]) for key in runs}
    values = (
        read["first"]
        if kind == "first"
        else [more - less for more, less in zip(read["all"], read["first"], strict=True)]
    )
    return dict(zip(("seconds", "flops", "bytes"), values, strict=True))


def with_limit(row: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Add the limit, and how many times as long the part takes."""
    limit = max(row["flops"] / rates["flops"], row["bytes"] / rates["bytes_per_s"])
    return {**row, "limit_seconds": limit, "times_limit": row["seconds"] / limit}


def table(found: dict[str, Any]) -> str:
    """The report as a table of Markdown."""
    lines = [
        f"{found['machine']['flops'] / 1e9:.0f} GFLOP/s, {found['machine']['bytes_per_s'] / 1e9:.1f} GB/s; preparing "
        f"{1e3 * found['preparing_seconds']:.0f} ms, one question {1e3 * found['seconds']:.0f} ms, of which",
        "",
        "| part | ms | share | GFLOP | MiB | limit, ms | times the limit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["parts"].items():
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.2f} | {100 * row['seconds'] / found['seconds']:.0f} % | {row['flops'] / 1e9:.3f} | "
            f"{row['bytes'] / MIB:.1f} | {1e3 * row['limit_seconds']:.2f} | {row['times_limit']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Where the time of one question goes, and how far that is from the limit."
    )
    parser.add_argument("--size", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--new-tokens", type=int, default=8, help="of the answer (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = measure(options)
    sys.stdout.write(table(found) + "\n")
    write_json({**vars(options), "torch": torch.__version__, **found}, options.json)


if __name__ == "__main__":
    main()
