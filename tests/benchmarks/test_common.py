# SPDX-License-Identifier: Apache-2.0
import argparse
import json

import pytest
import torch
from torch import nn

from benchmarks import common


def test_json_goes_to_the_last_line_or_to_a_file(capsys, tmp_path):
    parser = argparse.ArgumentParser()
    common.add_json_option(parser)
    for arguments in ([], ["--json"], ["--json", str(tmp_path / "report.json")]):
        common.write_json({"ratio": 0.5}, parser.parse_args(arguments).json)
    assert capsys.readouterr().out == '{"ratio": 0.5}\n'
    assert json.loads((tmp_path / "report.json").read_text()) == {"ratio": 0.5}


def test_readings_grow_within_the_parts_only():
    first, second, ticks = nn.Linear(2, 3), nn.Linear(3, 2), iter(range(100))
    parts = {"first": first, "second": second}
    with common.sum_within(parts, lambda: float(next(ticks))) as sums:
        for _ in range(3):
            next(ticks)  # between the parts
            second(first(torch.zeros(1, 2)))
        first(torch.zeros(1, 2))
    second(torch.zeros(1, 3))
    assert sums == {"first": 4.0, "second": 3.0}


def test_rates_are_of_the_operations_and_bytes_that_were_asked_for(monkeypatch):
    # A clock that advances by a second at each reading: a product of side 10 takes a second, and so does the copy.
    monkeypatch.setattr(common.time, "perf_counter", iter(map(float, range(1000))).__next__)
    rates = common.machine_rates(torch.device("cpu"), torch.float32, matrix_size=10, repeats=2)
    assert rates == {"flops": 2 * 10**3, "bytes_per_s": 2 * 4 * 64 * 10 * 10}


def test_memory_that_is_held_is_seen():
    if not common.Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    common.reset_peak()
    before = common.resident_bytes("VmRSS")
    held = bytearray(32 * 2**20)
    assert common.resident_bytes("VmRSS") - before >= 30 * 2**20
    del held
    common.trim_memory()
    assert common.resident_bytes("VmRSS") - before < 8 * 2**20
    assert common.resident_bytes("VmHWM") - before >= 30 * 2**20
