# SPDX-License-Identifier: Apache-2.0
"""`geode eval`: what is asked and scored, and that neither interruptions nor processes change a prediction."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from geode import tiny_checkpoint
from geode.commands import load_checkpoint
from geode.evaluating import evaluate_model, model_revision
from geode.evaluation.asking import geometry_path
from geode.evaluation.benchmark import load_benchmark
from geode.evaluation.results import chance_scores, score_lines, score_table, write_card, write_results
from geode.evaluation.runner import EvalOptions, Evaluator, predict, read_lines, scored_prediction
from geode.modeling_geode.answers_geode import Answer, Measurement
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.shared_prefix_geode import CACHE_NAME
from tests.evaluation.common_benchmark import NUM_SCENES, QUESTIONS, make_benchmark, make_rows
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache
from tests.trainers.common_launch import run_processes, start_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def benchmark(folder):
    return load_benchmark(folder)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A whole run, and its lines."""
    out = tmp_path_factory.mktemp("finished")
    evaluate_model(folder, out, batch_size=3)
    return out


def without_time(path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_lines(path)]


# ---- the benchmark ----


def test_benchmark_is_read_in_its_order_with_official_prompts(folder, benchmark):
    rows = make_rows()
    assert [item.record.uid for item in benchmark.questions] == [f"VSI-Bench:{row['id']}" for row in rows]
    assert [item.ground_truth for item in benchmark.questions] == [row["ground_truth"] for row in rows]
    assert benchmark.questions[1].record.prompt == (
        f"These are frames of a video.\n{QUESTIONS[0][1]}\nPlease answer the question using a single word or phrase."
    )
    assert benchmark.questions[-1].record.prompt.endswith(
        "Options:\nA. lamp\nB. chair\nC. sofa\nD. table\nAnswer with the option's letter from the given choices directly."
    )
    assert [len(group) for group in benchmark.scenes().values()] == [len(QUESTIONS)] * NUM_SCENES
    assert benchmark.media_root == folder
    assert not benchmark.is_on_hub


def test_subsets_are_split_by_what_is_pruned(folder):
    sizes = {name: len(load_benchmark(folder, subset=name).questions) for name in ("full", "debiased", "pruned")}
    assert sizes == {"full": 15, "debiased": 12, "pruned": 3}
    first = load_benchmark(folder / "test.jsonl", max_scenes=2)
    assert list(first.scenes()) == ["rooms/room_0.mp4", "rooms/room_1.mp4"]


def test_bad_benchmarks_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no 'nowhere'"):
        load_benchmark("nowhere")
    with pytest.raises(ValueError, match="unpack them"):
        load_benchmark("nyu-visionx/VSI-Bench")
    with pytest.raises(FileNotFoundError, match=r"benchmark/validation.parquet.*\[\]"):
        load_benchmark(folder, split="validation")
    with pytest.raises(ValueError, match="got 'half'"):
        load_benchmark(folder, subset="half")
    with pytest.raises(ValueError, match="`max_scenes` must be at least 1, got 0"):
        load_benchmark(folder, max_scenes=0)
    row = {**make_rows()[0], "question_type": "object_colour"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Row 0 of .*object_colour"):
        load_benchmark(tmp_path)


def test_two_questions_of_one_id_are_refused(tmp_path):
    """One of them would have got the answer of the other."""
    rows = [make_rows()[0], {**make_rows()[1], "id": 0}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="'VSI-Bench:0' more than once"):
        load_benchmark(tmp_path)


def test_release_without_the_column_pruned_is_read(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "pruned"} for row in make_rows()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(load_benchmark(tmp_path).questions) == len(rows)
    with pytest.raises(ValueError, match="needs a column `pruned`"):
        load_benchmark(tmp_path, subset="debiased")


# ---- what is scored ----


def answer_of(si_value: float, unit: str, text: str = "about that") -> Answer:
    return Answer(text=text, values=[Measurement.from_si("<REG>", [si_value], kind="scalar", unit=unit)], boxes=[])


def test_scored_prediction_is_the_first_value_in_the_asked_unit(benchmark):
    by_type = {item.record.question_type: item for item in benchmark.questions}
    assert scored_prediction(answer_of(2.305, "m"), by_type["object_abs_distance"]) == "2.31"
    assert scored_prediction(answer_of(2.305, "m"), by_type["object_size_estimation"]) == "230.50"
    assert scored_prediction(answer_of(3.4, "count"), by_type["object_counting"]) == "3"
    assert scored_prediction(answer_of(-0.4, "count"), by_type["object_counting"]) == "0"
    # A choice is its text, and a number without a value is as well.
    assert scored_prediction(answer_of(3.4, "m", text=" B. "), by_type["route_planning"]) == "B."
    assert scored_prediction(Answer(text=" 2.5 \n", values=[], boxes=[]), by_type["object_abs_distance"]) == "2.5"


def test_batches_of_an_encoded_scene_answer_like_single_questions_about_the_video(checkpoint, benchmark):
    scene = next(iter(benchmark.scenes().values()))
    lines = Evaluator(*checkpoint, benchmark, EvalOptions(batch_size=4)).answer_scene(scene)
    for question, line in zip(scene, lines, strict=True):
        video = str(benchmark.media_root / question.record.media)
        geometry = SceneGeometry.load(benchmark.media_root / "geometry" / "room_0")
        part = {"type": "video", "video": video, "geometry": geometry}
        chat = [{"role": "user", "content": [part, {"type": "text", "text": question.record.prompt}]}]
        inputs = checkpoint.processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        output = checkpoint.model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
        (answer,) = checkpoint.processor.post_process_answers(output, input_ids=inputs["input_ids"])
        assert line["prediction"] == scored_prediction(answer, question)
        assert line["id"] == question.record.uid


@pytest.mark.parametrize("control", ["none", "no_geometry"])
def test_all_batches_of_a_scene_begin_with_one_prefix(checkpoint, benchmark, control):
    scene = next(iter(benchmark.scenes().values()))
    without_cache = []
    handle = checkpoint.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: without_cache.append(kwargs.get(CACHE_NAME) is None), with_kwargs=True
    )
    Evaluator(*checkpoint, benchmark, EvalOptions(batch_size=2, control=control)).answer_scene(scene)
    handle.remove()
    assert len(scene) > 4
    assert without_cache[0]
    assert len(without_cache) > 3
    assert not any(without_cache[1:])


def test_controls_show_what_they_say(checkpoint, benchmark, monkeypatch):
    scene = list(benchmark.scenes().values())[-1]
    loaded, encoded = [], []
    load, encode = SceneGeometry.load, type(checkpoint.model).encode_scene
    monkeypatch.setattr(SceneGeometry, "load", lambda path: loaded.append(path.name) or load(path))
    monkeypatch.setattr(
        type(checkpoint.model),
        "encode_scene",
        lambda self, **inputs: encoded.append(encode(self, **inputs)) or encoded[-1],
    )
    for control in ("none", "no_geometry", "shuffled_geometry", "blind"):
        Evaluator(*checkpoint, benchmark, EvalOptions(control=control)).answer_scene(scene)
    # The next scene after the last is the first; each scene is encoded once.
    assert loaded == ["room_2", "room_0"]
    assert [len(found.rationale_tokens) > 0 for found in encoded] == [True, False, True]
    assert not torch.equal(encoded[0].rationale_tokens, encoded[2].rationale_tokens)


def test_missing_geometry_and_videos_are_named(checkpoint, benchmark, tmp_path):
    scene = next(iter(benchmark.scenes().values()))
    with pytest.raises(FileNotFoundError, match=r"no geometry .*clouds/room_0.*geode reconstruct"):
        Evaluator(*checkpoint, benchmark, EvalOptions(geometry="clouds/{scene}")).answer_scene(scene)
    moved = dataclasses.replace(benchmark, media_root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no video .*room_0.mp4"):
        Evaluator(*checkpoint, moved).answer_scene(scene)
    with pytest.raises(ValueError, match=r"no other names in braces .*'geometry/\{room\}'"):
        Evaluator(*checkpoint, benchmark, EvalOptions(geometry="geometry/{room}")).answer_scene(scene)
    with pytest.raises(ValueError, match="must stay below its root"):
        geometry_path(Path("root"), "{scene}/geometry", Path("rooms/...mp4"))
    with pytest.raises(ValueError, match="needs two scenes or more"):
        Evaluator(*checkpoint, load_benchmark(benchmark.name, max_scenes=1), EvalOptions(control="shuffled_geometry"))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        EvalOptions(batch_size=0)
    with pytest.raises(ValueError, match="got 'deaf'"):
        EvalOptions(control="deaf")


# ---- runs ----


def test_run_leaves_predictions_scores_and_a_card(finished, benchmark):
    lines = read_lines(finished / "predictions.jsonl")
    assert any(line["values"] for line in lines)  # the model regresses
    assert [line["id"] for line in lines] == [item.record.uid for item in benchmark.questions]
    assert sorted(path.name for path in finished.iterdir()) == [
        "README.md",
        "predictions.jsonl",
        "run.json",
        "scores.json",
    ]
    scores = json.loads((finished / "scores.json").read_text("utf-8"))
    assert scores["tasks"] == score_lines(lines)["tasks"]
    card = (finished / "README.md").read_text("utf-8")
    assert score_table(scores) in card
    for fact in ("| scorer", "official", "| benchmark revision |", "| frames |", "| torch |", "bootstrap over scenes"):
        assert fact in card.replace("Scorer", "| scorer")


@pytest.mark.parametrize("num_lines", [0, 5, 7, 14])
def test_interrupted_run_goes_on_to_the_same_predictions(finished, folder, tmp_path, num_lines):
    """A stop in the middle of a line: it, and the rest of its scene, are answered again."""
    whole = sorted(read_lines(finished / "predictions.jsonl"), key=lambda line: line["scene"])
    text = "".join(json.dumps(line) + "\n" for line in whole[:num_lines]) + json.dumps(whole[num_lines])[:40]
    (tmp_path / "run.json").write_text((finished / "run.json").read_text("utf-8"), encoding="utf-8")
    (tmp_path / "predictions-0.jsonl").write_text(text, encoding="utf-8")
    evaluate_model(folder, tmp_path, batch_size=3)
    assert without_time(tmp_path / "predictions.jsonl") == without_time(finished / "predictions.jsonl")


def test_finished_run_asks_nothing_again(finished, folder, checkpoint, benchmark, monkeypatch):
    monkeypatch.setattr(Evaluator, "answer_scene", lambda *_: pytest.fail("a question was asked again"))
    before = (finished / "predictions.jsonl").read_bytes()
    evaluate_model(folder, finished, batch_size=3)
    assert (finished / "predictions.jsonl").read_bytes() == before
    run = {**json.loads((finished / "run.json").read_text("utf-8")), "control": "blind"}
    with pytest.raises(ValueError, match="control: 'none' there, 'blind' now"):
        predict(Evaluator(*checkpoint, benchmark), finished, run=run)


def test_scores_are_of_all_questions_or_none(tmp_path, finished):
    """A file that was cut short between two lines is one of fewer questions."""
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"predictions.jsonl must have one line for each of 15 questions, got 14"):
        write_results(tmp_path / "out")
    path.write_bytes(b"".join([*lines, lines[3]]))
    with pytest.raises(ValueError, match=r"got 16: it has 'VSI-Bench:3' more than once"):
        write_results(tmp_path / "out")


def test_run_of_which_nobody_knows_what_it_is_is_not_gone_on_with(tmp_path, finished, checkpoint, benchmark):
    shutil.copytree(finished, tmp_path / "out")
    run = json.loads((finished / "run.json").read_text("utf-8"))
    (tmp_path / "out" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run.json is damaged, .* Remove the folder"):
        predict(Evaluator(*checkpoint, benchmark), tmp_path / "out", run=run)
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds predictions.jsonl and no run.json"):
        predict(Evaluator(*checkpoint, benchmark), tmp_path / "out", run=run)


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "predictions-0.jsonl"
    path.write_text('{"id": "a"}\n{"id": \n{"id": "c"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Line 2 of .*predictions-0.jsonl is no JSON"):
        read_lines(path)


def test_revision_tells_models_apart_that_have_the_same_weights():
    model = load_checkpoint().model
    before = model_revision(model)
    assert model_revision(load_checkpoint().model) == before
    model.config.drh_config.hidden_position = "previous"
    assert model_revision(model) != before


def test_revision_of_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    put_in_hub_cache(tiny_checkpoint(), "org/model", tmp_path / "hf")
    assert model_revision(load_checkpoint("org/model").model) == COMMIT


def test_two_processes_that_are_killed_give_what_one_gives(finished, folder, tmp_path):
    out, arguments = tmp_path / "out", ("eval", "--benchmark", folder, "--batch-size", 3, "--out", tmp_path / "out")
    started = start_processes("geode.cli", *arguments, folder=tmp_path)
    deadline = time.monotonic() + 240
    # A file for each, opened before a question is answered: otherwise there is one process, and nothing to compare.
    parts = [out / f"predictions-{rank}.jsonl" for rank in range(2)]
    try:
        while not (all(path.exists() for path in parts) and any(path.stat().st_size for path in parts)):
            assert [process.poll() for process in started] == [None, None]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not (out / "predictions.jsonl").exists()
    run_processes("geode.cli", *arguments, folder=tmp_path)
    printed = "".join((tmp_path / f"rank_{rank}.log").read_text("utf-8") for rank in range(2))
    assert printed.count("| **overall** |") == 1
    assert without_time(out / "predictions.jsonl") == without_time(finished / "predictions.jsonl")
    scores = [json.loads((path / "scores.json").read_text("utf-8")) for path in (out, finished)]
    assert scores[0]["tasks"] == scores[1]["tasks"]
    assert scores[0]["intervals"] == scores[1]["intervals"]


# ---- results ----


def line_of(question_type: str, prediction: str, truth: str, scene: str = "a", num_options: int | None = None) -> dict:
    return {
        "id": f"{question_type}:{scene}:{truth}",
        "scene": scene,
        "question_type": question_type,
        "prediction": prediction,
        "ground_truth": truth,
        "num_options": num_options,
        "text": prediction,
        "values": [],
        "boxes": [],
        "seconds": 0.5,
    }


def test_chance_is_the_most_frequent_answer_and_one_of_the_options():
    lines = [
        *(line_of("route_planning", "A", truth, num_options=3) for truth in "BBAC"),
        *(line_of("object_counting", "9", truth) for truth in ("2", "2", "4")),
    ]
    chance = chance_scores(lines)
    assert chance["frequency"]["route_planning"] == pytest.approx(50.0)
    # "2" is right twice; for 4 its error is 50 percent, which one of ten tolerances keeps.
    assert chance["frequency"]["object_counting"] == pytest.approx(100 * 2.1 / 3)
    assert chance["random"] == {"route_planning": pytest.approx(100 / 3)}


def test_questions_without_all_directions_are_scored_and_the_card_says_so(tmp_path, finished):
    """The official scorer raises there, after the hours in which the questions were answered."""
    lines = [line_of("object_rel_direction_easy", "A", truth, scene, num_options=2) for truth, scene in ("Aa", "Bb")]
    scores = score_lines(lines)
    assert scores["tasks"] == {"object_rel_direction_easy": 50.0, "overall": 50.0}
    assert scores["is_official"] is False
    run = json.loads((finished / "run.json").read_text("utf-8"))
    assert "gives no score for such a set" in write_card(run, scores, {})
    whole = json.loads((finished / "scores.json").read_text("utf-8"))
    assert whole["is_official"] is True
    assert "gives no score for such a set" not in write_card(run, whole, {})


def test_control_is_no_result_for_the_hub(tmp_path, finished):
    run = json.loads((finished / "run.json").read_text("utf-8"))
    run |= {"is_on_hub": True, "benchmark": "nyu-visionx/VSI-Bench", "control": "shuffled_geometry"}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "predictions.jsonl").write_bytes((finished / "predictions.jsonl").read_bytes())
    write_results(tmp_path)
    assert not (tmp_path / ".eval_results").exists()
    assert "with the geometry of the next scene" in (tmp_path / "README.md").read_text("utf-8")


def test_task_is_above_guessing_where_its_whole_interval_is():
    scores = {
        "tasks": {"object_counting": 50.0, "route_planning": 50.0, "overall": 50.0},
        "intervals": {"object_counting": (41.0, 60.0), "route_planning": (39.0, 60.0), "overall": (45.0, 55.0)},
        "chance": {
            "frequency": {"object_counting": 40.0, "route_planning": 30.0, "overall": 35.0},
            "random": {"route_planning": 40.0},
        },
        "n": {"object_counting": 7, "route_planning": 5},
        "num_scenes": 10,
    }
    _, _, *rows = score_table(scores).splitlines()
    assert rows == [
        "| object_counting | 7 | 50.0 | 41.0 to 60.0 | 40.0 |  | yes |",
        "| route_planning | 5 | 50.0 | 39.0 to 60.0 | 30.0 | 40.0 | no |",
        "| **overall** | 12 | 50.0 | 45.0 to 55.0 | 35.0 |  | yes |",
    ]


def test_nothing_is_said_of_a_few_scenes():
    """Two scenes that agree have an interval of no width."""
    rows = score_table(score_lines([line_of("object_counting", "3", "3", scene) for scene in "ab"])).splitlines()
    assert rows[2] == "| object_counting | 2 | 100.0 | 100.0 to 100.0 | 100.0 |  | too few scenes |"


def test_prediction_is_scored_and_not_the_text_around_it():
    line = {**line_of("object_counting", "3", "3"), "text": "I count 3 of them."}
    assert score_lines([line])["tasks"]["overall"] == 100.0


def test_truth_that_is_no_measure_scores_nothing_and_stops_nothing():
    lines = [line_of("object_counting", "3", truth) for truth in ("0", "3")]
    assert score_lines(lines)["tasks"]["object_counting"] == 50.0


def test_scoring_again_needs_predictions_alone_and_names_the_scorer(tmp_path, finished):
    with pytest.raises(FileNotFoundError, match=r"must hold predictions.jsonl"):
        write_results(tmp_path)
    run = {
        **json.loads((finished / "run.json").read_text("utf-8")),
        "is_on_hub": True,
        "benchmark": "nyu-visionx/VSI-Bench",
        "questions": 2,
    }
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    lines = [line_of("object_counting", "There are 3.", "3", scene) for scene in "ab"]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert write_results(tmp_path)["tasks"]["overall"] == 0.0
    scores = write_results(tmp_path, scorer="lmms_eval")
    assert scores["tasks"]["overall"] == 100.0
    assert scores["num_without_value"] == 2
    assert "Scorer: `lmms_eval`" in (tmp_path / "README.md").read_text("utf-8")
    entry = (tmp_path / ".eval_results" / "VSI-Bench.yaml").read_text("utf-8")
    assert "id: nyu-visionx/VSI-Bench" in entry
    assert "lmms_eval scorer" in entry
    assert "value: 100.0" in entry
    with pytest.raises(ValueError, match="got 'vlmevalkit'"):
        write_results(tmp_path, scorer="vlmevalkit")
