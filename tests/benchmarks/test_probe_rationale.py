# SPDX-License-Identifier: Apache-2.0
"""The probe finds what lies linearly in the tokens, and nothing in noise."""

import pytest
import torch

from benchmarks.probe_rationale import probe, ridge


def make_rooms(num_rooms: int, generator: torch.Generator, *, noise: float) -> tuple[torch.Tensor, dict]:
    """Tokens with two objects' centres in them, or noise alone."""
    mixing = torch.randn(6, 50, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    centers = torch.randn(num_rooms, 6, generator=generator, dtype=torch.float64)
    tokens = (centers @ mixing) * (1.0 - noise) + noise * torch.randn(
        num_rooms, 50, generator=generator, dtype=torch.float64
    )
    tables = {"bed": centers[:, :3].clone(), "lamp": centers[:, 3:].clone(), "rare": centers[:, :3].clone()}
    tables["lamp"][::3] = torch.nan  # a room in three has none
    tables["rare"][5:] = torch.nan
    return tokens, tables


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 0.99, 1.0), (1.0, -0.2, 0.1)])
def test_probe_reads_what_is_there(noise, least, most):
    generator = torch.Generator().manual_seed(0)
    train, test = (make_rooms(count, generator, noise=noise) for count in (400, 90))
    found = probe(*train, *test)
    assert least <= found["r2"] <= most
    assert found["shuffled_r2"] < 0.1
    assert found["num_objects"] == 90 + 60  # the rare category is left out


def test_ridge_is_the_solution_of_its_equations():
    generator = torch.Generator().manual_seed(1)
    features, targets = (torch.randn(30, size, generator=generator, dtype=torch.float64) for size in (8, 2))
    weights, constant = ridge(features, targets, 3.0)
    inputs, centred = features - features.mean(dim=0), targets - targets.mean(dim=0)
    expected = torch.linalg.solve(inputs.T @ inputs + 3.0 * torch.eye(8, dtype=torch.float64), inputs.T @ centred)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(constant, targets.mean(dim=0) - features.mean(dim=0) @ expected)
