# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, and a process that reads data and is killed: training says so, and goes on as if nothing had happened."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.trainers.common_training import arguments_of


RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture
def num_logged(zygote):
    """Count the steps that the command has logged."""
    return lambda: zygote.log.read_bytes().count(b"'loss':")


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [True, False], ids=["one checkpoint", "every step"])
def test_sigterm_saves_and_ends_and_the_rest_is_as_without_it(
    training_kills, zygote, places, tmp_path, num_logged, is_alone
):
    out, world = tmp_path / "out", places / "world"
    step = random.SystemRandom().randrange(1, 7)
    arguments = arguments_of(world, out, *RESUME, *(["--save_steps", "100"] if is_alone else []))
    ended = zygote.run(arguments, out, when=lambda _: num_logged() >= step, number=signal.SIGTERM)
    assert ended.code == 0, ended.printed
    assert "Traceback" not in ended.printed
    assert "Stopped by SIGTERM after step" in ended.printed
    assert "of 8, which is saved" in ended.printed
    assert not (out / "model.safetensors").exists()  # nobody takes it for trained
    saved = sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))
    assert len(saved) == 1 if is_alone else saved == list(range(1, saved[-1] + 1))
    assert step <= saved[-1] < 8
    assert zygote.run(arguments, out).code == 0
    training_kills.compare(out)


@pytest.mark.slow
def test_lost_worker_is_named_and_the_run_goes_on(training_kills, zygote, places, tmp_path, num_logged):
    out = tmp_path / "out"
    arguments = arguments_of(places / "world", out, *RESUME, "--dataloader_num_workers", "1")

    def kill_worker(process: int) -> bool:
        children = Path(f"/proc/{process}/task/{process}/children").read_text("ascii").split()
        if num_logged() < 2 or not children:
            return False
        os.kill(int(children[0]), signal.SIGKILL)
        return True

    ended = zygote.run(arguments, out, when=kill_worker, number=0)
    assert ended.code == 2, ended.printed
    assert "geode: error: DataLoader worker" in ended.printed
    assert "`--resume_from_checkpoint true` goes on from the last checkpoint" in ended.printed
    assert zygote.run(arguments, out).code == 0
    training_kills.compare(out)
