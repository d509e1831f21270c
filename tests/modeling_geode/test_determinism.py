# SPDX-License-Identifier: Apache-2.0
"""
The same seed gives the same result on one machine, to the bit.

Rooms and feature stores that are written twice are compared byte by byte in `tests/data/test_dataset.py` and
`tests/trainers/test_precompute.py`, a resumed training with one that was not interrupted in `tests/trainers/test_resume.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import set_seed

import geode
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from tests.modeling_geode.common_geode import BOX_TOKEN, REG_TOKEN, prepare_inputs, tiny_config


QUESTIONS = [
    "How many window(s) are in this room?",
    "Measuring from the closest point of each object, what is the direct distance between the stool and the ball (in meters)?",
]
SCRIPT = "import json; from tests.modeling_geode.test_determinism import answers; print(json.dumps(answers()))"
SAMPLED = {"do_sample": True, "temperature": 2.0, "top_k": 0}


def likely_control_tokens(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Random weights would hardly emit any."""
    scores = scores.clone()
    scores[:, [REG_TOKEN, BOX_TOKEN]] += 8.0
    return scores


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_the_same_seed_samples_the_same_tokens_and_values(options):
    set_seed(0)
    model = GeodeForConditionalGeneration(tiny_config()).eval()
    model.generation_config.pad_token_id = 0
    inputs = prepare_inputs(model.config)

    def sampled(seed: int):
        set_seed(seed)
        return model.generate(
            **inputs,
            **SAMPLED,
            **options,
            max_new_tokens=8,
            logits_processor=[likely_control_tokens],
            return_dict_in_generate=True,
        )

    first, other, again = sampled(5), sampled(6), sampled(5)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    assert sum(map(len, first.values)) > 6
    for values, expected in zip(again.values, first.values, strict=True):
        assert len(values) == len(expected)
        assert all(torch.equal(value, want) for value, want in zip(values, expected, strict=True))


def answers() -> list[list[str]]:
    """What the shipped checkpoint says of the embedded room: asked twice, and sampled after one seed, another and the first."""
    processor = geode.GeodeProcessor.from_pretrained(geode.tiny_checkpoint())
    model = geode.GeodeForConditionalGeneration.from_pretrained(geode.tiny_checkpoint()).eval()
    room = geode.embedded_scene()
    scene = model.encode_scene(**processor.prepare_scene(room / "room.mp4", geometry=room / "geometry", num_frames=1))
    found = []
    for options, seed in (({}, 1), ({}, 2), (SAMPLED, 5), (SAMPLED, 6), (SAMPLED, 5)):
        set_seed(seed)
        given = model.ask(processor, scene, QUESTIONS, max_new_tokens=12, **options)
        # Python writes a float so that reading it gives the same one.
        found.append([repr(answer) for answer in given])
    return found


def test_asking_twice_gives_the_same_answers():
    greedy, greedy_again, sampled, other, sampled_again = answers()
    assert greedy == greedy_again
    assert sampled == sampled_again
    assert sampled != other
    assert all("Measurement(" in answer for answer in greedy)


@pytest.mark.slow
def test_another_process_gives_the_same_answers():
    """Strings have other hashes there, and sets another order."""
    elsewhere = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "11", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(elsewhere.stdout.splitlines()[-1]) == answers()
