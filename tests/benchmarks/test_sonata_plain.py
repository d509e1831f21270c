# SPDX-License-Identifier: Apache-2.0
"""Two independent programs of Sonata against each other, and the plain one against the public program's stored outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import sonata_plain
from geode.modeling_geode.serialization_geode import serialize
from geode.modeling_geode.sonata_geode import convert_sonata_checkpoint


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "sonata"
CONFIG = json.loads((FIXTURES / "config.json").read_text())
STATE = load_file(FIXTURES / "weights.safetensors")


@pytest.mark.parametrize("name", ["single_A", "small_S"])
def test_plain_program_matches_the_public_one(name):
    case = load_file(FIXTURES / f"case_{name}.safetensors")
    with torch.no_grad():
        got = sonata_plain.plain_forward(STATE, CONFIG, case["in.feat"], case["in.grid_coord"].long())
    # As in tests/modeling_geode/test_sonata_geode.py.
    torch.testing.assert_close(got, case["final.feat"], atol=1e-4, rtol=1e-4)


def test_both_programs_agree_in_float64_where_windows_are_incomplete():
    generator = torch.Generator().manual_seed(3)
    flat = torch.randperm(37 * 23 * 11, generator=generator)[:1801]
    grid = torch.stack([flat // 253, flat // 11 % 23, flat % 11], dim=1)
    feat = torch.randn(len(grid), 9, generator=generator, dtype=torch.float64)
    state = {name: value.double() for name, value in STATE.items()}
    model = convert_sonata_checkpoint({"config": CONFIG, "state_dict": STATE}).double()
    with torch.no_grad():
        want = sonata_plain.plain_forward(state, CONFIG, feat, grid)
        got = model(feat=feat, coord=feat[:, :3], grid_coord=grid, offset=torch.tensor([len(grid)]))
    torch.testing.assert_close(got.last_hidden_state, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", ["z", "z-trans", "hilbert", "hilbert-trans"])
def test_curves_are_the_same(order):
    grid = torch.randint(29, (500, 3), generator=torch.Generator().manual_seed(4)).unique(dim=0)
    codes = serialize(grid, torch.zeros(len(grid), dtype=torch.long), depth=5, order=order)
    assert torch.equal(sonata_plain.along_curve(grid, order), codes.argsort())
