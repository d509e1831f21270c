# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import packing


def test_one_pair_of_the_tiny_model_is_measured(capsys):
    packing.main(["--sizes", "tiny", "--questions", "3", "--pairs", "2", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    tokens = report["tokens"]
    assert lines[0] == (
        f"3 questions: {tokens['alone']} tokens alone ({tokens['alone_padded']} with padding), {tokens['packed']} packed"
    )
    assert tokens["packed"] < tokens["alone"] <= tokens["alone_padded"]
    assert list(report["results"]) == ["tiny, end to end", "tiny, from features"]
    for found in report["results"].values():
        assert len(found["ratios"]) == 2
        assert found["ratio"] == pytest.approx(sum(found["ratios"]) / 2)


def test_different_losses_are_an_error(monkeypatch):
    losses = iter([1.0, 1.1])
    monkeypatch.setattr(packing, "step", lambda model, batch: next(losses))
    with pytest.raises(RuntimeError, match=r"must be 1\.0, .* got 1\.1"):
        packing.measure(None, {}, {}, 1)
