# SPDX-License-Identifier: Apache-2.0
"""An unmodified lmms-eval, in an environment of its own, runs the plug-in and gives the scores that our scorer of its kind gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

import geode
from geode.data.readers import READERS
from geode.evaluating import evaluate_model
from geode.evaluation.lmms_eval_tasks import vsti_bench_utils
from tests.evaluation.common_benchmark import make_benchmark, make_rows


ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "evaluation" / "lmms_eval_tasks"
VERSION = "0.7.3"
# What its evaluator imports. It pins an older PyAV and names torchvision, which is not needed here: so it comes without its own.
NEEDED = "pandas loguru sqlitedict jinja2 tenacity pytablewriter sacrebleu scikit-learn sentencepiece pyyaml httpx openai python-dotenv filelock<3.20"
DIRECTIONS = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment; `GEODE_LMMS_EVAL_PYTHON` names one that is there already."""
    found = os.environ.get("GEODE_LMMS_EVAL_PYTHON")
    if found:
        return Path(found)
    folder = tmp_path_factory.mktemp("lmms") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = (ROOT / "requirements" / "dev.txt").read_text("ascii").splitlines()
    ours = [line for line in pins if line and not line.startswith("#")]
    subprocess.run([*pip, ours[0]], check=True)  # torch alone, so that nothing else chooses another one
    subprocess.run([*pip, *ours, *NEEDED.split()], check=True)
    subprocess.run([*pip, "--no-deps", f"lmms-eval=={VERSION}"], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
    return python


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """The small benchmark, with directions of all three types, without which lmms-eval gives no score."""
    folder = make_benchmark(tmp_path_factory.mktemp("benchmark"))
    rows = make_rows()
    for number, question_type in enumerate(DIRECTIONS * 2):
        changes = {"id": len(rows), "question_type": question_type, "scene_name": f"room_{number % 3}"}
        rows.append({**rows[9], **changes, "options": ["A. left", "B. right"], "ground_truth": "AB"[number % 2]})
    (folder / "test.jsonl").unlink()
    (folder / "benchmark").mkdir()
    table = Dataset.from_list(rows, features=READERS["vsi_bench"].FEATURES)
    table.to_parquet(folder / "benchmark" / "test.parquet")
    return folder


def run_task(python: Path, task: str, *, tasks: Path, cwd: Path, out: Path) -> tuple[dict, list[dict]]:
    """Run lmms-eval with the tiny checkpoint; return the figures of the task, and the samples with their answers."""
    command = [str(python), "-m", "lmms_eval", "--model", "geode"]
    command += ["--model_args", f"pretrained={geode.tiny_checkpoint()}", "--tasks", task, "--include_path", str(tasks)]
    command += ["--batch_size", "16", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    found = list(out.rglob("*_results.json"))
    assert found, run.stdout[-3000:] + run.stderr[-6000:]  # after an error it ends with 0 as well
    (results,) = found
    (samples,) = out.rglob("*samples*.jsonl")
    shutil.rmtree(out / "hf", ignore_errors=True)
    answers = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    figures = json.loads(results.read_text("utf-8"))["results"][task]
    return {name.partition(",")[0]: value for name, value in figures.items()}, answers


@pytest.mark.slow
def test_lmms_eval_gives_the_scores_of_its_scorer(python, benchmark, tmp_path):
    options = {"tasks": TASKS, "cwd": benchmark, "out": tmp_path / "lmms"}
    found, answers = run_task(python, "geode_rooms", **options)
    ours = evaluate_model(benchmark, tmp_path / "ours", scorer="lmms_eval")["tasks"]
    scores = {
        name.replace("vsibench_overall", "overall").replace("_mra", "").replace("_accuracy", ""): value
        for name, value in found.items()
        if name.endswith(("_overall", "_mra", "_accuracy")) and isinstance(value, float)
    }
    # It rounds fractions to a few digits, and gives 0 for tasks that are not there.
    assert {name: 100 * scores[name] for name in ours} == pytest.approx(ours, abs=0.01)
    lines = [json.loads(line) for line in (tmp_path / "ours" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(answers) == len(lines)


@pytest.mark.slow
def test_vsti_bench_runs_on_rows_of_its_form(python, benchmark, tmp_path):
    """Made-up rows about the small benchmark's videos: each type of question once, with answers that the model is free to miss."""
    rows = []
    for number, (kind, task) in enumerate(vsti_bench_utils.TASK_OF.items()):
        is_number = task in vsti_bench_utils.NUMBER_TYPES
        rows.append(
            {
                "video_path": f"rooms/room_{number % 3}.mp4",
                "question": "What is the distance between the camera and the bed in frame 3 of 32 (in meters)?",
                "options": None if is_number else ["A. near", "B. far"],
                "question_type": kind,
                "ground_truth": "2.5" if is_number else "near",
                "mc_answer": None if is_number else "A",
            }
        )
    table = Dataset.from_list(rows)
    table.to_parquet(benchmark / "vsti.parquet")
    local = ["include: " + str(TASKS / "vsti_bench.yaml"), "task: vsti_bench_local", "dataset_path: parquet"]
    local += ["dataset_kwargs: {data_files: {test: vsti.parquet}}"]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "vsti_bench_local.yaml").write_text("\n".join(local) + "\n", encoding="ascii")
    options = {"tasks": tmp_path / "tasks", "cwd": benchmark, "out": tmp_path / "lmms"}
    found, answers = run_task(python, "vsti_bench_local", **options)
    assert len(answers) == len(rows)
    entries = [
        vsti_bench_utils.process_results(rows[answer["doc_id"]], [answer["filtered_resps"]])["vsti_bench_overall"]
        for answer in answers
    ]
    assert found["vsti_bench_overall"] == pytest.approx(vsti_bench_utils.mean_of_tasks(entries), abs=1e-4)
    assert found["vsti_bench_mean_of_types"] == pytest.approx(vsti_bench_utils.mean_of_types(entries), abs=1e-4)
    assert all(
        f"{task}_{'mra' if task in vsti_bench_utils.NUMBER_TYPES else 'accuracy'}" in found
        for task in vsti_bench_utils.TASKS
    )
