# SPDX-License-Identifier: Apache-2.0
"""
`kill -9` at random moments, and the same command again: the end is that of a run which nobody disturbed.

The moments are new in each run; `FAULTS_SEED` repeats those of a failure, whose output names it.
"""

import shutil
import signal

import pytest

from tests.faults.common_faults import Kills


# Of each command. The second number is for the slow run.
NUM_KILLS = [2, pytest.param(10, marks=pytest.mark.slow)]


def test_command_can_be_killed_before_it_has_begun(zygote, tmp_path):
    """Such a kill once met a process without a session of its own, and the answers of all later commands were shifted."""
    codes = [zygote.run(["--help"], tmp_path, after=0.0).code for _ in range(20)]
    assert set(codes) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in codes
    assert zygote.run(["--help"], tmp_path).code == 0


# ---- precompute, rooms, export: the same bytes, and no file more ----


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_precompute(precompute_kills, tmp_path, num_kills):
    precompute_kills.loop(tmp_path / "store", num_kills)


@pytest.mark.slow  # in the default run tests/data/test_dataset.py kills it
@pytest.mark.parametrize("num_kills", [10])
def test_rooms(rooms_kills, tmp_path, num_kills):
    rooms_kills.loop(tmp_path / "rooms", num_kills)


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_export(exported, tmp_path, num_kills):
    exported.loop(tmp_path / "geode-tiny", num_kills)


# ---- evaluation: the same answers ----


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_eval(eval_kills, tmp_path, num_kills):
    eval_kills.loop(tmp_path / "eval", num_kills)


# ---- push: one commit, whole and tagged ----


@pytest.fixture(scope="module")
def push_kills(zygote, hub, exported, places):
    folder = places / "geode-tiny"
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def compare(out):
        repository = hub.repositories["model", f"org/{out.name}"]
        files = repository.commits[repository.tags["v1"]]
        assert {name: blob.data for name, blob in files.items() if name != ".gitattributes"} == content
        assert repository.tags["v1"] == repository.branches["main"]
        assert len(repository.commits) == 2  # the empty repository, and this

    def remove(out):
        del hub.repositories["model", f"org/{out.name}"]

    found = Kills(zygote, lambda out: ["push", folder, f"org/{out.name}", "--tag", "v1"], compare, remove=remove)
    found.reference(places / "whole")
    compare(places / "whole")
    return found


@pytest.mark.parametrize("num_kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_push(push_kills, tmp_path, num_kills):
    push_kills.loop(tmp_path / f"killed-{num_kills}", num_kills)


def test_push_that_was_killed_after_its_tag_may_be_repeated_and_no_other(push_kills, zygote, hub, exported, places):
    """Its caller has not heard that it was done; that this content has the tag is no reason to refuse it."""
    out = places / "again"
    push_kills.reference(out)
    push_kills.reference(out)
    push_kills.compare(out)
    changed = shutil.copytree(places / "geode-tiny", places / "changed")
    card = (changed / "README.md").read_text("utf-8")
    (changed / "README.md").write_text(card.replace("## Use", "More.\n\n## Use"), encoding="utf-8")
    ended = zygote.run(["push", changed, "org/again", "--tag", "v1"], changed)
    assert ended.code == 2
    assert "`tag` must be new, and org/again has 'v1' already" in ended.printed
    push_kills.compare(out)


# ---- training: the same losses and weights ----


@pytest.mark.slow  # in the default run tests/trainers/test_resume.py kills it
def test_training(training_kills, tmp_path):
    training_kills.loop(tmp_path / "out", 10)
