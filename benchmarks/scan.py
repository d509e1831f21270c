# SPDX-License-Identifier: Apache-2.0
"""
The selective scan on a CPU, beside transformers' Mamba mixer and beside a plain loop over time.

    python -m benchmarks.scan --json
    python -m benchmarks.scan --library-backward --json

- mixer: `GeodeMambaMixer` and transformers' `MambaMixer` with the same weights, without gradients. Both have the same
  projections, so the ratio says less than that of the scans alone. The library's fallback has a backward pass that is
  quadratic in length; `--library-backward` times it once, at the shortest length and least width: minutes.
- scan: `selective_scan` and a plain loop over unbound slices of time, forward and backward.

Programs are run in turn, so that a change of the machine's load meets them alike; each round gives one ratio, and the median
counts. Times are of the CPU, of this process. Memory is the highest resident memory during one run over that before it, in a
process of its own for each program; Linux only. That both programs of a pair compute the same is checked.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MambaConfig, set_seed
from transformers.models.mamba.modeling_mamba import MambaMixer

from benchmarks.scene_reuse import run_in_turn, spread_of_ratios
from benchmarks.sonata import in_fresh_process
from benchmarks.vggt import MIB, cpu_seconds, reset_peak, resident_bytes
from geode.configuration.configuration_geode import GeodeDrmConfig
from geode.modeling_geode.mamba_geode import GeodeMambaMixer, selective_scan


# Of the largest value; the programs order their float32 sums differently.
SAME_OUTPUT = 1e-4
# Pairs of programs: ours, and what it stands beside.
PAIRS = {
    "mixer, forward": ("our mixer", "library's mixer"),
    "scan, forward": ("our scan", "plain loop"),
    "scan, forward and backward": ("our scan, backward", "plain loop, backward"),
}


def plain_scan(x, dt, A, B, C, D, z) -> torch.Tensor:
    """The recurrence of [`selective_scan`] as one would write it: one step of time after another, in autograd's hands."""
    decays = torch.exp(dt[..., None] * A)
    inputs = (dt * x)[..., None] * B[:, :, None]
    state, outputs = torch.zeros_like(decays[:, 0]), []
    for decay, step, readout in zip(decays.unbind(1), inputs.unbind(1), C.unbind(1), strict=True):
        state = decay * state + step
        outputs.append((state @ readout[..., None]).squeeze(-1))
    return (torch.stack(outputs, dim=1) + D * x) * F.silu(z)


def make_mixers(hidden_size: int) -> tuple[GeodeMambaMixer, MambaMixer]:
    """Ours and the library's, with the same random weights."""
    set_seed(0)
    ours = GeodeMambaMixer(GeodeDrmConfig(hidden_size=hidden_size))
    library = MambaMixer(MambaConfig(hidden_size=hidden_size, num_hidden_layers=1), layer_idx=0)
    library.load_state_dict(ours.state_dict())
    return ours.eval(), library.eval()


def make_scan_inputs(length: int, hidden_size: int) -> list[torch.Tensor]:
    """`x, dt, A, B, C, D, z` with the sizes and ranges that they have in a mixer of this width."""
    config = GeodeDrmConfig(hidden_size=hidden_size)
    channels, states = config.mamba_expand * hidden_size, config.mamba_state_size
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, 1, length, channels, generator=generator)
    B, C = torch.randn(2, 1, length, states, generator=generator)
    dt = 1e-3 + 0.099 * torch.rand(1, length, channels, generator=generator)
    A = -torch.arange(1.0, states + 1).expand(channels, -1).contiguous()
    return [x, dt, A, B, C, torch.ones(channels), z]


def make_programs(length: int, hidden_size: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """By name, programs that return what they computed: outputs, and gradients of all inputs."""
    ours, library = make_mixers(hidden_size)
    states = torch.randn(1, length, hidden_size, generator=torch.Generator().manual_seed(2))
    inputs = make_scan_inputs(length, hidden_size)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def forward(function: Callable, *arguments: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(*arguments)]

    def backward(function: Callable, arguments: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[torch.Tensor]:
        y = function(*arguments)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    def mixer_backward(mixer: torch.nn.Module) -> list[torch.Tensor]:
        leaf = states.clone().requires_grad_()
        return backward(mixer, [leaf], [leaf, *(parameter for _, parameter in sorted(mixer.named_parameters()))])

    return {
        "our mixer": lambda: forward(ours, states),
        "library's mixer": lambda: forward(library, states),
        "our scan": lambda: forward(selective_scan, *inputs),
        "plain loop": lambda: forward(plain_scan, *inputs),
        "our scan, backward": lambda: backward(selective_scan, leaves, leaves),
        "plain loop, backward": lambda: backward(plain_scan, leaves, leaves),
        "our mixer, backward": lambda: mixer_backward(ours),
        "library's mixer, backward": lambda: mixer_backward(library),
    }


def check_same(name: str, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Raise if two programs compute something else."""
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        error, largest = (one - other).abs().max().item(), other.abs().max().item()
        if not error <= SAME_OUTPUT * largest:
            raise RuntimeError(
                f"{name}: both programs must compute the same, but result {number} differs by {error:.2g} beside values "
                f"of up to {largest:.2g}."
            )


def measure_times(length: int, hidden_size: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of the programs at one size, and the ratios of the pairs, each the other's time over ours."""
    programs = make_programs(length, hidden_size)
    found = {}
    for pair, (ours, other) in PAIRS.items():
        check_same(f"{pair}, {length} steps of width {hidden_size}", programs[ours](), programs[other]())
        _, cpu = run_in_turn({name: programs[name] for name in (ours, other)}, rounds)
        found[pair] = {
            "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
            "speedup": spread_of_ratios(cpu[other], cpu[ours]),
        }
    return found


def measure_library_backward(length: int, hidden_size: int, rounds: int) -> dict[str, Any]:
    """The library's backward pass, once, beside the median of ours."""
    programs = make_programs(length, hidden_size)
    _, cpu = run_in_turn({"ours": programs["our mixer, backward"]}, rounds)
    started = cpu_seconds()
    want = programs["library's mixer, backward"]()
    seconds = cpu_seconds() - started
    check_same("mixer, forward and backward", programs["our mixer, backward"](), want)
    ours = statistics.median(cpu["ours"])
    return {"length": length, "hidden_size": hidden_size, "library": seconds, "ours": ours, "speedup": seconds / ours}


def measure_peak(program: str, length: int, hidden_size: int) -> int:
    """Bytes by which the resident memory of this process grows at most, over one run of a program."""
    run = make_programs(length, hidden_size)[program]
    # Libraries load at the first call.
    make_programs(2, hidden_size)[program]()
    reset_peak()
    resident = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - resident


def measure_memory(length: int, hidden_size: int) -> dict[str, Any]:
    """Peaks of the programs at one size, and the ratios of the pairs, each ours over the other's."""
    found = {}
    for pair, names in PAIRS.items():
        peaks = {name: in_fresh_process(measure_peak, name, length, hidden_size) for name in names}
        found[pair] = {"peak_bytes": peaks, "ratio": peaks[names[0]] / peaks[names[1]]}
    return found


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The selective scan beside transformers' and a plain loop, on a CPU.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="steps (default: 2048 8192)")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[512, 1024], help="widths (default: 512 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="that are counted (default: 7)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="only times")
    parser.add_argument("--library-backward", action="store_true", help="also the library's backward pass: minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with a JSON object on one line")
    options = parser.parse_args(arguments)
    if sys.platform != "linux" and options.memory:
        parser.error(f"resident memory is read from /proc, which Linux has, got {sys.platform!r}. Pass `--no-memory`.")
    return options


def report_line(pair: str, found: dict[str, Any]) -> str:
    """One line for a pair at one size."""
    ours, other = PAIRS[pair]
    seconds, speedup = found["cpu_seconds"], found["speedup"]
    line = (
        f"  {pair}: {seconds[ours]:.3f} s beside {seconds[other]:.3f} s of {other}, {speedup['median']:.2f} times as fast "
        f"({speedup['least']:.2f} to {speedup['most']:.2f})"
    )
    if "ratio" in found:
        peaks = found["peak_bytes"]
        line += f"; peak {peaks[ours] / MIB:.0f} MiB beside {peaks[other] / MIB:.0f} MiB, ratio {found['ratio']:.2f}"
    return line + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    sizes = [(length, width) for length in options.lengths for width in options.hidden_sizes]
    report = {**vars(options), "torch": torch.__version__, "results": []}
    # First, as its processes must come from one that has not computed yet.
    memory = {size: measure_memory(*size) for size in sizes} if options.memory else {}
    for length, width in sizes:
        sys.stdout.write(f"{length} steps, width {width}\n")
        found = measure_times(length, width, options.rounds)
        if memory:
            found = {pair: found[pair] | memory[length, width][pair] for pair in PAIRS}
        for pair, values in found.items():
            sys.stdout.write(report_line(pair, values))
        report["results"].append({"length": length, "hidden_size": width, **found})
    if options.library_backward:
        once = report["library_backward"] = measure_library_backward(*min(sizes), options.rounds)
        sys.stdout.write(
            f"mixer, forward and backward, {once['length']} steps, width {once['hidden_size']}: {once['ours']:.2f} s "
            f"beside {once['library']:.0f} s of the library, {once['speedup']:.0f} times as fast\n"
        )
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
