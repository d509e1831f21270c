# SPDX-License-Identifier: Apache-2.0
"""
Evaluate: ask a model a benchmark's questions, once as it is and once blind, and compare the scores.

    python examples/evaluate_model.py
    python examples/evaluate_model.py nyu-visionx/VSI-Bench --media-root VIDEOS --model ORG/NAME

What a blind model scores was not seen in the video. Each run leaves predictions, scores with intervals over scenes, chance and a card in its
folder, and goes on where it stopped if it is started again. Without a benchmark, the questions about the shipped room are taken: one room,
so the score shows that things work and no more.
"""

import argparse
from pathlib import Path

from sample_data import write_benchmark

import geode
from geode.evaluating import evaluate_model


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("benchmark", nargs="?", help="a folder in VSI-Bench's columns, or a name on the Hub")
parser.add_argument("--media-root", type=Path, help="folder of the videos, DATASET/SCENE.mp4")
parser.add_argument("--model", default=geode.tiny_checkpoint())
parser.add_argument("--out", type=Path, default=Path("example-results"), help="folder of the results")
options = parser.parse_args()

benchmark = options.benchmark or write_benchmark(options.out / "questions")
totals = {}
for name, control in (("seeing", "none"), ("blind", "blind")):
    print(f"## {name}")
    scores = evaluate_model(
        benchmark, options.out / name, model=options.model, media_root=options.media_root, control=control
    )
    totals[name] = scores["tasks"]["overall"]
print(f"overall: {totals['seeing']:.1f} with the scene, {totals['blind']:.1f} blind, in percent")
