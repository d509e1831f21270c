# SPDX-License-Identifier: Apache-2.0
"""
Numbers of the shipped checkpoint, written down: `make golden` measures them again, after the checkpoint or the embedded room has changed.

They prove nothing; they ring when an upgrade of a dependency moves something. What they were made with stands beside them.
"""

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path

import torch

import geode
from geode.commands import load_checkpoint


PATH = Path(__file__).parent / "fixtures" / "golden_tiny.json"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "av")
NUM_LOGITS = 16
KINDS = (
    "object_abs_distance",
    "object_localization",
    "object_counting",
    "room_size_estimation",
    "object_rel_distance",
)


def digest_of(*paths: Path) -> str:
    """SHA-256 over files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def digests() -> dict[str, str]:
    """What the numbers are of."""
    room, checkpoint = geode.embedded_scene(), geode.tiny_checkpoint()
    return {
        "checkpoint": digest_of(
            *(checkpoint / name for name in ("config.json", "model.safetensors", "tokenizer.json"))
        ),
        "room": digest_of(room / "room.mp4", *sorted((room / "geometry").iterdir()), room / "questions.jsonl"),
    }


def moments(tensor: torch.Tensor) -> list[float]:
    """Mean and standard deviation."""
    return [round(float(value), 6) for value in (tensor.double().mean(), tensor.double().std())]


@torch.no_grad()
def measure() -> dict:
    """Inputs, an encoded scene, logits, values and answers of the embedded room, in float32 on the CPU."""
    model, processor = load_checkpoint()
    room = geode.embedded_scene()
    inputs = processor.prepare_scene(video=str(room / "room.mp4"), geometry=str(room / "geometry"))
    scene = model.encode_scene(**inputs)
    rows = [json.loads(line) for line in (room / "questions.jsonl").read_text("utf-8").splitlines()]
    questions = [next(row["question"] for row in rows if row["question_type"] == kind) for kind in KINDS]
    chat = [{"role": "user", "content": [{"type": "scene", "scene": scene}, {"type": "text", "text": questions[0]}]}]
    prompt = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    last = model(**prompt, **scene.to_model_inputs()).logits[0, -1]
    answers = model.ask(processor, scene, questions)
    return {
        "pixels": moments(inputs["pixel_values_videos"]),
        "point_features": moments(inputs["point_features"]),
        "visual_tokens": moments(scene.visual_tokens),
        "rationale_tokens": moments(scene.rationale_tokens),
        "prompt_ids": digest_of_ids(prompt["input_ids"]),
        "logits": [round(float(value), 5) for value in last[:: len(last) // NUM_LOGITS][:NUM_LOGITS]],
        # Without digits, one of which a harmless difference may turn.
        "answers": [re.sub(r"\d+", "0", answer.text) for answer in answers],
        "values_si": [[round(float(value.si_value), 6) for value in answer.values] for answer in answers],
        "boxes": [[[*box.center, *box.size, box.yaw] for box in answer.boxes] for answer in answers],
    }


def digest_of_ids(ids: torch.Tensor) -> str:
    """A short name for the tokens of a prompt."""
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:16]


def main() -> None:
    """Write the file."""
    made_with = {name: metadata.version(name) for name in PACKAGES}
    content = {"of": digests(), "made_with": made_with, "numbers": measure()}
    PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
