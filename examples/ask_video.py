# SPDX-License-Identifier: Apache-2.0
"""
Ask a video: it is encoded once, and any number of questions are answered in text, numbers and boxes.

    python examples/ask_video.py
    python examples/ask_video.py my_room.mp4 --model ORG/NAME --question "How far is the bed from the door, in feet?"

Without arguments it asks the shipped checkpoint about the shipped room, in the benchmark's words, which so small a model needs. A model without a reconstructor needs the scene's geometry to
measure: own_rgbd.py makes it from depth images, `geode reconstruct` from frames alone.
"""

import argparse
from pathlib import Path

import geode
from geode import GeodeForConditionalGeneration, GeodeProcessor


ROOM = geode.embedded_scene()
QUESTIONS = [
    "How many chair(s) are in this room?",
    "Locate the sofa.",
    "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the combined space.",
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "video", nargs="?", type=Path, default=ROOM / "room.mp4", help="a video file, or a folder of images"
)
parser.add_argument("--question", action="append", help="may be repeated")
parser.add_argument("--geometry", type=Path, help="saved geometry; by default a folder `geometry` beside the video")
parser.add_argument("--model", default=geode.tiny_checkpoint(), help="a checkpoint's folder or its name on the Hub")
options = parser.parse_args()

model = GeodeForConditionalGeneration.from_pretrained(options.model).eval()
processor = GeodeProcessor.from_pretrained(options.model)
geometry = options.geometry or options.video.parent / "geometry"
if not geometry.is_dir():
    geometry = None
can_see = geometry is not None or model.config.reconstructor_config is not None
if not can_see:
    print(f"note: no geometry for {options.video.name}: what follows is guessed from the frames")

inputs = processor.prepare_scene(video=options.video, geometry=geometry, use_geometry=can_see)
scene = model.encode_scene(**inputs)
questions = options.question or QUESTIONS
for question, answer in zip(questions, model.ask(processor, scene, questions, use_geometry=can_see), strict=True):
    print(f"{question} {answer.text}")
    for value in answer.values:  # regressed numbers, in the unit that the question asks for
        print(f"  {value.value} {value.unit}")
    for box in answer.boxes:  # metres and radians: +z up, origin on the floor below the first camera
        print(f"  center {box.center}, size {box.size}, yaw {box.yaw}")
print(f"answered: {len(questions)} questions about {options.video.name}")
