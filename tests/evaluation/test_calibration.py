# SPDX-License-Identifier: Apache-2.0
"""Conformal calibration: quantiles by hand, coverage of made-up answers, and the commands on a model with spreads."""

import json
import math
import random
from statistics import NormalDist

import pytest
import torch
from transformers import set_seed

from geode.cli import main
from geode.commands import load_checkpoint
from geode.evaluating import calibrate_model, evaluate_model
from geode.evaluation.benchmark import load_benchmark
from geode.evaluation.calibration import conformal_quantile, interval_report, interval_table, measure_scales
from geode.evaluation.results import write_results
from geode.evaluation.runner import read_lines, scored_interval
from geode.modeling_geode.answers_geode import Answer, Measurement
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from tests.evaluation.common_benchmark import NUM_SCENES, make_benchmark
from tests.modeling_geode.common_geode import tiny_config


Z90 = NormalDist().inv_cdf(0.95)


# ---- the quantile ----


@pytest.mark.parametrize(
    ("number", "coverage", "expected"),
    # The rank is ceil((n + 1) coverage): 9 of 9 (0.9 of 10), 18 of 19 (0.9 of 20), 10 of 19 (0.5 of 20).
    [(9, 0.9, 9), (19, 0.9, 18), (19, 0.5, 10), (1, 0.5, 1), (100, 0.9, 91)],
)
def test_quantile_is_the_rank_of_split_conformal(number, coverage, expected):
    errors = [float(value) for value in range(1, number + 1)]
    random.Random(0).shuffle(errors)
    assert conformal_quantile(errors, coverage) == expected


def test_too_few_values_say_how_many_are_needed():
    with pytest.raises(ValueError, match=r"coverage 0\.9 need 9 values or more, got 8"):
        conformal_quantile([1.0] * 8, 0.9)


# ---- made-up answers ----


def config_of(transform: str = "log1p", **drh):
    config = tiny_config(drh_config={"uncertainty": True, **drh})
    config.control_tokens["<REG>"]["codec"] = {"transform": transform, "mean": [4.0], "std": [0.4]}
    return config


def line_of(truth: float, value: float, low: float, high: float, *, scene: str = "a", unit: str = "m") -> dict:
    """A line as `geode eval` writes it; all numbers are SI."""
    found = Measurement.from_si("<REG>", [value], kind="scalar", unit=unit, interval=[(low, high)])
    factor = {"m": 1.0, "cm": 100.0}[unit]
    return {
        "scene": scene,
        "question_type": "object_abs_distance",
        "prediction": str(value * factor),
        "interval": found.interval,
        "unit": unit,
        "ground_truth": repr(truth * factor),
        **Answer(text="", values=[found], boxes=[]).to_dict(),
    }


def made_up_lines(number: int, *, error: float, scale: float, seed: int, unit: str = "m") -> list[dict]:
    """Values of a wrong spread: true errors are `error` times what the intervals say, and spreads vary fourfold."""
    generator, lines = random.Random(seed), []
    for index in range(number):
        mean, spread = generator.gauss(0.0, 1.0), generator.choice((0.1, 0.4))
        truth = mean + error * spread * generator.gauss(0.0, 1.0)
        half = Z90 * scale * spread
        # The codec by hand: log(1 + v) = 4 + 0.4 e.
        true, value, low, high = (math.expm1(4.0 + 0.4 * e) for e in (truth, mean, mean - half, mean + half))
        lines.append(line_of(true, value, low, high, scene=f"room_{index // 10}", unit=unit))
    return lines


@pytest.mark.parametrize("unit", ["m", "cm"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scale_is_how_wrong_the_spread_is(scale, unit):
    lines = made_up_lines(4000, error=3.0, scale=scale, seed=0, unit=unit)
    found = measure_scales(lines, config_of(interval_scales={"<REG>": scale}))
    assert found == {"<REG>": {"scale": pytest.approx(3.0, rel=0.05), "num_values": 4000, "num_scenes": 400}}


def test_calibrated_intervals_hold_what_they_promise_on_new_answers():
    config = config_of()
    scale = measure_scales(made_up_lines(2000, error=0.4, scale=1.0, seed=0), config)["<REG>"]["scale"]
    before = interval_report(made_up_lines(2000, error=0.4, scale=1.0, seed=1))["types"]["overall"]
    after = interval_report(made_up_lines(2000, error=0.4, scale=scale, seed=1))["types"]["overall"]
    assert before["coverage"] > 0.99
    assert after["coverage"] == pytest.approx(0.9, abs=0.02)
    assert after["half_width"] < before["half_width"]


def test_answers_without_intervals_cannot_calibrate():
    lines = made_up_lines(20, error=1.0, scale=1.0, seed=0)
    for line in lines:
        line["interval"] = None
    assert interval_report(lines) is None
    with pytest.raises(ValueError, match="No answer has an interval"):
        measure_scales(lines, config_of())


@pytest.mark.parametrize("truth", ["0", "-1.5", "many", None])
def test_truth_that_is_no_measure_is_left_out(truth):
    lines = made_up_lines(20, error=1.0, scale=1.0, seed=0)
    expected = interval_report(lines), measure_scales(lines, config_of())
    broken = {**line_of(2.0, 2.0, 1.0, 3.0), "ground_truth": truth}
    assert (interval_report([broken, *lines]), measure_scales([*lines, broken], config_of())) == expected


def test_interval_without_width_calibrates():
    lines = [line_of(2.0, 2.1, 2.1, 2.1), *made_up_lines(20, error=1.0, scale=1.0, seed=0)]
    assert math.isfinite(measure_scales(lines, config_of())["<REG>"]["scale"])


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_another_coverage_is_met_by_the_new_scale(coverage):
    scale = measure_scales(made_up_lines(4000, error=2.0, scale=1.0, seed=0), config_of(), coverage=coverage)
    # The Gaussian's interval of the new coverage, in units of that of 90 percent, in which the lines are made.
    scale = scale["<REG>"]["scale"] * NormalDist().inv_cdf((1 + coverage) / 2) / Z90
    report = interval_report(made_up_lines(4000, error=2.0, scale=scale, seed=1))
    assert report["types"]["overall"]["coverage"] == pytest.approx(coverage, abs=0.02)


def test_report_counts_what_lies_within_and_answers_the_certain_first():
    lines = [
        line_of(2.0, 2.0, 1.9, 2.1),  # +-5 percent, right
        line_of(2.0, 2.12, 1.908, 2.332),  # +-10 percent, an error of 6: 9 of 10 tolerances
        line_of(2.0, 4.0, 3.0, 5.0),  # +-25 percent, not within
        line_of(2.0, 4.0, 1.0, 7.0),  # +-75 percent
    ]
    report = interval_report(lines)
    overall = report["types"]["overall"]
    assert (overall["n"], overall["coverage"]) == (4, 0.75)
    assert overall["half_width"] == pytest.approx((0.1 + 0.25) / 2)
    assert report["answered"] == {
        "100%": pytest.approx(47.5),
        "75%": pytest.approx(190 / 3),
        "50%": pytest.approx(95.0),
        "25%": pytest.approx(100.0),
    }
    table = interval_table(report, 0.9)
    assert (
        "| object_abs_distance | 4 | 75.0% | +-18% |" in table
        or "| object_abs_distance | 4 | 75.0% | +-17% |" in table
    )
    assert "Within the 90% interval" in table


def test_value_of_zero_is_the_least_certain():
    lines = [line_of(1.0, 0.0, -0.5, 0.5), line_of(2.0, 2.0, 1.0, 3.0)]
    assert interval_report(lines)["answered"]["50%"] == 100.0


# ---- the commands ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The tiny checkpoint with spreads, and made to answer every question with a value."""
    out = tmp_path_factory.mktemp("model")
    checkpoint = load_checkpoint()
    config = checkpoint.model.config
    config.drh_config.uncertainty, config.drh_config.interval_coverage = True, 0.5
    set_seed(0)
    model = GeodeForConditionalGeneration(config)
    model.load_state_dict(checkpoint.model.state_dict(), strict=False)
    # An output layer of its own, in which the token's row is that of the largest logits.
    token_id = config.control_tokens["<REG>"]["token_id"]
    model.get_input_embeddings().weight.data[token_id] *= 30.0
    model.save_pretrained(out)
    checkpoint.processor.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def predictions(folder, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("predictions")
    evaluate_model(folder, out, model=model_folder)
    return out


def test_run_writes_intervals_in_the_asked_unit(folder, predictions):
    questions = {question.record.uid: question for question in load_benchmark(folder).questions}
    lines = read_lines(predictions / "predictions.jsonl")
    with_interval = [line for line in lines if line["interval"] is not None]
    assert len(with_interval) == 3 * NUM_SCENES  # distances, counts, sizes
    for line in with_interval:
        unit, value = questions[line["id"]].record.unit, line["values"][0]
        low, high = line["interval"]
        assert line["unit"] == unit
        if unit == "cm":
            assert (low, high) == pytest.approx([100.0 * end for end in value["si_interval"]])
        assert low <= float(line["prediction"]) + 0.005
        assert float(line["prediction"]) - 0.005 <= high
    scores = json.loads((predictions / "scores.json").read_text())
    assert scores["value_intervals"]["types"]["overall"]["n"] == 3 * NUM_SCENES
    assert "Within the 50% interval" in (predictions / "README.md").read_text()
    assert write_results(predictions)["value_intervals"] == scores["value_intervals"]


def test_choices_have_no_interval(folder):
    by_type = {item.record.question_type: item for item in load_benchmark(folder).questions}
    found = Measurement.from_si("<REG>", [2.0], kind="scalar", unit="m", interval=[(1.0, 3.0)])
    answer = Answer(text="A", values=[found], boxes=[])
    assert scored_interval(answer, by_type["route_planning"]) is None
    assert scored_interval(answer, by_type["object_size_estimation"]) == (100.0, 300.0)
    assert scored_interval(answer, by_type["object_counting"]) == (1.0, 3.0)


def test_calibrated_model_differs_by_its_scale_alone(folder, model_folder, predictions, tmp_path, capsys):
    out = tmp_path / "calibrated"
    arguments = ["calibrate", str(predictions), "--model", str(model_folder), "--out", str(out)]
    assert main(arguments) in (None, 0)
    facts = json.loads((out / "calibration.json").read_text())
    scale = facts["tokens"]["<REG>"]["scale"]
    assert facts["tokens"]["<REG>"]["num_values"] == 3 * NUM_SCENES
    assert (facts["coverage"], facts["model"], facts["split"]) == (0.5, str(model_folder), "test")
    assert f"<REG>: {scale:.3f} times a Gaussian's 50% interval (9 values in 3 scenes)" in capsys.readouterr().out
    networks = [load_checkpoint(path, None).model for path in (model_folder, out)]
    assert networks[1].config.drh_config.interval_scales == {"<REG>": scale}
    assert all(
        torch.equal(weight, networks[1].state_dict()[name]) for name, weight in networks[0].state_dict().items()
    )
    # Five of nine, rank ceil(10 / 2), lie within on the scenes that it was calibrated on; counts are rounded outwards.
    report = evaluate_model(folder, tmp_path / "again", model=out)["value_intervals"]["types"]
    assert report["object_abs_distance"]["n"] == NUM_SCENES
    assert report["overall"]["coverage"] >= 5 / 9


def test_coverage_of_the_command_is_the_models_afterwards(model_folder, predictions, tmp_path):
    out = tmp_path / "narrow"
    arguments = ["calibrate", str(predictions), "--model", str(model_folder), "--out", str(out)]
    main([*arguments, "--coverage", "0.25"])
    assert load_checkpoint(out, None).model.config.drh_config.interval_coverage == 0.25
    assert json.loads((out / "calibration.json").read_text())["coverage"] == 0.25
    with pytest.raises(ValueError, match=r"`coverage` must lie between 0 and 1, got 90\.0"):
        calibrate_model(predictions, tmp_path / "wrong", model=model_folder, coverage=90.0)


def test_predictions_of_another_model_or_a_control_cannot_calibrate(folder, model_folder, predictions, tmp_path):
    other = tmp_path / "other"
    checkpoint = load_checkpoint(model_folder, None)
    checkpoint.model.config.drh_config.interval_coverage = 0.8
    checkpoint.model.save_pretrained(other)
    checkpoint.processor.save_pretrained(other)
    with pytest.raises(ValueError, match=r"must be of .*other"):
        calibrate_model(predictions, tmp_path / "out", model=other)
    evaluate_model(folder, tmp_path / "blind", model=model_folder, control="blind")
    with pytest.raises(ValueError, match="and 'blind'"):
        calibrate_model(tmp_path / "blind", tmp_path / "out", model=model_folder)
    with pytest.raises(FileNotFoundError, match=r"must hold predictions\.jsonl"):
        calibrate_model(tmp_path, tmp_path / "out", model=model_folder)
    assert not (tmp_path / "out").exists()


def test_ask_withholds_what_is_not_known_well(folder, model_folder, capsys):
    arguments = ["ask", str(folder / "rooms/room_0.mp4"), "How many chair(s) are in this room?"]
    arguments += ["--model", str(model_folder), "--geometry", str(folder / "geometry/room_0"), "--json"]
    main(arguments)
    (value,) = json.loads(capsys.readouterr().out.splitlines()[-1])["values"][:1]
    low, high = value["si_interval"]
    share = (high - low) / 2 / value["si_value"]
    for limit, is_withheld in ((share * 1.01, False), (share * 0.99, True)):
        main([*arguments, "--abstain-above", str(limit)])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["values"][0]["is_withheld"] is is_withheld
        assert record["text"].startswith("unknown") is is_withheld
