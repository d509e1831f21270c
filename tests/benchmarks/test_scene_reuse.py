# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import scene_reuse


def test_both_ways_are_compared_and_the_last_line_is_json(capsys):
    scene_reuse.main(["--questions", "2", "--num-frames", "2", "--new-tokens", "3", "--rounds", "1", "--json"])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["ratio_2_to_1"] == report["tiny"]["together_to_one"]["median"]
    assert set(report["tiny"]["seconds"]) == {"one", "together", "one by one"}
    assert lines[0].startswith("tiny, 2 frames: one question ")
    assert f"ratio {report['ratio_2_to_1']:.2f} (" in lines[0]
    for name in ("together_to_one", "one_by_one_to_together", "together_to_one_cpu"):
        found = report["tiny"][name]
        assert 0 < found["least"] <= found["median"] <= found["most"]


def test_other_answers_are_an_error(monkeypatch):
    monkeypatch.setattr(scene_reuse, "ask_alone", lambda model, processor, questions, **sizes: ["other"])
    with pytest.raises(RuntimeError, match=r"each question alone, \['other'\]; got"):
        scene_reuse.main(["--questions", "1", "--num-frames", "2", "--new-tokens", "1", "--rounds", "1"])


def test_programs_run_in_turn_and_the_first_round_is_not_counted():
    order = []
    wall, cpu = scene_reuse.run_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in wall.items()} == {"a": 2, "b": 2}
    assert cpu.keys() == wall.keys()
    # By hand: ratios 2, 1, 4.
    assert scene_reuse.spread_of_ratios([2.0, 3.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 2.0, "least": 1.0, "most": 4.0}


def test_models_of_real_widths_have_the_same_sizes_and_few_layers(monkeypatch):
    # On the meta device: the sizes are there, the weights are not.
    with torch.device("meta"):
        processor = scene_reuse.real_width_processor()
        ours, other = scene_reuse.real_width_models(processor)
    for part in ("vision_tower", "language_model"):
        sizes = [
            {name: tuple(tensor.shape) for name, tensor in getattr(model.model, part).named_parameters()}
            for model in (ours, other)
        ]
        assert sizes[0] == sizes[1]
    assert len(ours.model.language_model.layers) == len(ours.model.vision_tower.encoder.layer) == 2
    assert ours.config.text_config.hidden_size == 1536
    # 24 blocks and 28 layers at full depth, 24 in five stages; two of each here.
    assert scene_reuse.depth_factors() == {"vision_tower": 12.0, "language_model": 14.0, "point_encoder": 2.4}


def test_seconds_within_parts_are_summed():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.vision_tower = torch.nn.Linear(200, 200)

    holder = Model()
    with scene_reuse.timed_parts(holder) as seconds:
        for _ in range(3):
            holder.model.vision_tower(torch.zeros(50, 200))
    known = dict(seconds)
    assert known["vision_tower"] > 0
    assert known["language_model"] == known["point_encoder"] == 0
    holder.model.vision_tower(torch.zeros(50, 200))
    assert seconds == known
