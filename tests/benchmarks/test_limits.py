# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import AutoModel, AutoProcessor

from benchmarks import limits
from geode import tiny_checkpoint


def test_parts_are_timed_counted_and_put_beside_their_limits(capsys):
    limits.main(["--rounds", "1", "--new-tokens", "3", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    parts, model = report["parts"], AutoModel.from_pretrained(tiny_checkpoint())
    assert set(parts) == {*limits.PARTS, "lm_head", "language_model, decoding", "lm_head, decoding"}
    assert sum(row["seconds"] for row in parts.values()) < 1.2 * report["seconds"]
    # By hand: two more tokens, each a row through the output layer, in two calls.
    weight = model.lm_head.weight
    assert parts["lm_head, decoding"]["flops"] == 2 * 2 * weight.numel()
    assert parts["lm_head, decoding"]["bytes"] >= 2 * weight.element_size() * weight.numel()
    projector = model.model.multi_modal_projector
    matrices = sum(parameter.numel() for parameter in projector.parameters() if parameter.ndim == 2)
    tokens = model.config.image_seq_length * AutoProcessor.from_pretrained(tiny_checkpoint()).num_frames
    assert parts["multi_modal_projector"]["flops"] == 2 * tokens * matrices
    for name, row in parts.items():
        by_operations, by_bytes = (
            row["flops"] / report["machine"]["flops"],
            row["bytes"] / report["machine"]["bytes_per_s"],
        )
        assert row["limit_seconds"] == pytest.approx(max(by_operations, by_bytes))
        assert row["times_limit"] == pytest.approx(row["seconds"] / row["limit_seconds"])
        assert any(line.startswith(f"| {name} | ") for line in lines)
