# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import generate


def test_both_programs_are_compared_and_the_last_line_is_json(capsys):
    generate.main(["--sizes", "tiny", "--prompt-tokens", "20", "--new-tokens", "9", "--pairs", "3", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert list(report["results"]) == ["tiny"]
    for clock in ("cpu", "wall"):
        found = report["results"]["tiny"][clock]
        assert len(found["ratios"]) == 3
        assert min(found["ratios"]) <= found["ratio"] <= found["upper"] <= max(found["ratios"])
    assert lines[0].startswith("tiny: ")
    # Digits of a number take more steps than the one of its value.
    assert report["steps"]["regressed"] == 1
    assert report["steps"]["digits"] > 1


def test_the_programs_generate_values_and_the_same_tokens():
    ours, plain = generate.make_models("tiny")
    programs = generate.make_programs(ours, plain, prompt_tokens=12, new_tokens=17)
    sequences = programs["ours"]()
    assert torch.equal(sequences, programs["plain"]())
    control = [entry["token_id"] for entry in ours.config.control_tokens.values()]
    assert torch.isin(sequences[0, 12:], torch.tensor(control)).nonzero()[:, 0].tolist() == [4, 12]
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight.mul_(-3)
    with pytest.raises(RuntimeError, match="must generate the same tokens"):
        generate.measure(programs, 1)


def test_a_step_makes_few_more_calls_than_the_library_own():
    calls = generate.calls_per_step(*generate.make_models("tiny"), prompt_tokens=12, new_tokens=8)
    # The model is so small that its own calls are few: recording each layer's states, and outputs that list their fields for
    # each of them, made it 1.41.
    assert 1 < calls["ours"] / calls["plain"] < 1.03


def test_upper_bound_of_a_median():
    assert generate.upper_bound([1.0] * 9) == 1.0
    # By the binomial order statistics of 31 pairs, the upper end is about the 21st of them.
    assert generate.upper_bound([1.0 + number / 1000 for number in range(31)]) == pytest.approx(1.0205, abs=0.001)
