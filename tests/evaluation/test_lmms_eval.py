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
from tests.evaluation.common_benchmark import make_benchmark, make_rows


ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.slow
def test_lmms_eval_gives_the_scores_of_its_scorer(python, benchmark, tmp_path):
    command = [
        str(python),
        "-m",
        "lmms_eval",
        "--model",
        "geode",
        "--model_args",
        f"pretrained={geode.tiny_checkpoint()}",
    ]
    command += ["--tasks", "geode_rooms", "--include_path", str(ROOT / "evaluation" / "lmms_eval_tasks")]
    command += ["--batch_size", "16", "--output_path", str(tmp_path / "lmms"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=benchmark, env=environment, capture_output=True, text=True, check=False)
    found = list((tmp_path / "lmms").rglob("*_results.json"))
    assert found, run.stdout[-3000:] + run.stderr[-6000:]  # after an error it ends with 0 as well
    (results,) = found
    found = json.loads(results.read_text("utf-8"))["results"]["geode_rooms"]
    ours = evaluate_model(benchmark, tmp_path / "ours", scorer="lmms_eval")["tasks"]
    scores = {
        name.partition(",")[0]
        .replace("vsibench_overall", "overall")
        .replace("_mra", "")
        .replace("_accuracy", ""): value
        for name, value in found.items()
        if name.partition(",")[0].endswith(("_overall", "_mra", "_accuracy")) and isinstance(value, float)
    }
    # It rounds fractions to a few digits, and gives 0 for tasks that are not there.
    assert {name: 100 * scores[name] for name in ours} == pytest.approx(ours, abs=0.01)
    (samples,) = (tmp_path / "lmms").rglob("*samples*.jsonl")
    answers = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "ours" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(answers) == len(lines)
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
