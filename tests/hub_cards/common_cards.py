# SPDX-License-Identifier: Apache-2.0
"""Facts and results that tests of cards and of publishing share."""

import copy
import json
from pathlib import Path

import yaml


FACTS = {
    "name": "A model of rooms",
    "summary": "Trained on some rooms.",
    "license": "apache-2.0",
    "parts": {
        "vision_tower": {"source": "OpenGVLab/InternViT-300M-448px-V2_5", "license": "mit", "revision": "abc"},
        "language_model": {"source": "Qwen/Qwen2.5-1.5B-Instruct", "license": "apache-2.0"},
        "point_encoder": {"source": "random weights", "license": "apache-2.0"},
    },
    "data": {"rooms": {"source": "org/rooms", "license": "cc-by-4.0", "revision": "def"}},
    "intended_use": "Questions about rooms.",
    "limitations": ["It has seen few rooms."],
}
SONATA = {"source": "facebook/sonata", "license": "cc-by-nc-4.0"}


def write_facts(folder: Path, *without: str, **changes) -> Path:
    """Write the facts above as YAML, some of them left out or changed."""
    facts = {name: value for name, value in {**copy.deepcopy(FACTS), **changes}.items() if name not in without}
    path = folder / "facts.yaml"
    path.write_text(yaml.safe_dump(facts, sort_keys=False), encoding="utf-8")
    return path


def write_run(folder: Path, revision: str, **changes) -> Path:
    """Write what `geode eval` leaves of a model: three questions about two scenes, two of them right."""
    from geode.evaluation.results import write_results  # slow to import

    folder.mkdir()
    run = {
        "model": "path/of/it",
        "model_revision": revision,
        "benchmark": "nyu-visionx/VSI-Bench",
        "benchmark_revision": "0123abc",
        "is_on_hub": True,
        "split": "test",
        "subset": "full",
        "questions": 3,
        "scenes": 2,
        "control": "none",
        "frames": 4,
        "interval_coverage": None,
        **changes,
    }
    rows = [("object_counting", "2", "2", 0), ("route_planning", "A", "A", 3), ("route_planning", "B", "C", 3)]
    lines = [
        {
            "id": f"q{number}",
            "scene": f"room_{number // 2}",
            "question_type": kind,
            "prediction": prediction,
            "ground_truth": truth,
            "num_options": options,
            "values": [],
            "interval": None,
            "seconds": 0.5,
        }
        for number, (kind, prediction, truth, options) in enumerate(rows)
    ]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_results(folder)
    return folder


__all__ = ["FACTS", "SONATA", "write_facts", "write_run"]
