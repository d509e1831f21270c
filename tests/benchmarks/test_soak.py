# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json
import sys

import pytest

from benchmarks import soak
from benchmarks.common import trim_memory
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def run(capsys, *arguments: str) -> dict:
    soak.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scenes_are_encoded_again_and_memory_stays_flat(capsys):
    found = run(capsys, "--scenes", "3", "--questions", "48", "--batch", "4", "--new-tokens", "2")
    assert found["num_questions"] == 48
    assert found["num_visits"] == len(found["resident_mib"]) == 12
    # The store holds one of the three scenes: some visits find theirs, and most do not.
    assert 3 <= found["num_encoded"] < 12
    assert found["growth_mib"] < 16


def test_growth_is_seen(capsys, monkeypatch):
    held = []
    monkeypatch.setattr(soak, "trim_memory", lambda: held.append(bytearray(8 * 2**20)) or trim_memory())
    found = run(capsys, "--scenes", "2", "--questions", "8", "--batch", "1", "--new-tokens", "1")
    # Between the middles of the second and the last quarter are four visits.
    assert found["growth_mib"] == pytest.approx(32, abs=6)


def test_an_answer_that_changes_is_an_error(monkeypatch):
    numbers, ask = itertools.count(), GeodeForConditionalGeneration.ask

    def changing(*arguments, **options):
        return [dataclasses.replace(answer, text=str(next(numbers))) for answer in ask(*arguments, **options)]

    monkeypatch.setattr(GeodeForConditionalGeneration, "ask", changing)
    with pytest.raises(RuntimeError, match=r"about scene 0 was answered '.*', and now '"):
        soak.main(["--scenes", "1", "--questions", "52", "--batch", "26", "--new-tokens", "1"])


@pytest.mark.slow
def test_two_thousand_questions_about_fifty_scenes(capsys):
    found = run(capsys)
    assert found["num_questions"] == 2000
    assert found["num_encoded"] > 50
    assert found["growth_mib"] < 16
