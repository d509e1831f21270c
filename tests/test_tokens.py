# SPDX-License-Identifier: Apache-2.0
"""
The Hub's access token is neither printed nor written by commands that have it in their environment.

Those that send it (`push`, `check`) are tested in `tests/hub_cards/test_push.py`, training in `tests/trainers/test_launching.py`.
"""

import logging
from pathlib import Path

import pytest

from geode.cli import main
from geode.trainers.stage2_config import GeodeStage2Config
from tests.evaluation.common_benchmark import make_benchmark


TOKEN = f"hf_{'a1B2' * 9}"


def files_with(folder: Path, token: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_export_evaluation_and_cards_keep_the_token_to_themselves(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    benchmark = make_benchmark(tmp_path / "rooms")
    assert main(["eval", "--benchmark", str(benchmark), "--max-scenes", "1", "--out", str(tmp_path / "results")]) == 0
    assert main(["export", str(tmp_path / "model")]) == 0
    assert main(["card", "space", str(tmp_path / "space")]) == 0
    video = str(benchmark / "rooms" / "room_0.mp4")
    assert main(["ask", video, "How many?", "--model", "org/no-such-model"]) == 2
    printed = "".join(capfd.readouterr())
    assert "geode: error: " in printed
    assert TOKEN not in printed + caplog.text
    assert len(list(tmp_path.rglob("*.json"))) > 5
    assert files_with(tmp_path, TOKEN) == []


def test_a_token_is_no_option_of_training(tmp_path):
    """transformers would write it into `training_args.bin`."""
    with pytest.raises(ValueError, match="`hub_token` must not be given") as caught:
        GeodeStage2Config(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, bf16=False)
    assert TOKEN not in str(caught.value)
