# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import geode
from geode.evaluation.prediction_files import read_lines
from tests.common_hub_server import HubServer, serve
from tests.evaluation.common_benchmark import make_benchmark
from tests.faults.common_faults import Kills, Zygote
from tests.trainers.common_precompute import content_of
from tests.trainers.common_training import arguments_of, assert_same_run, make_world


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A Hub on this machine, the only one that the commands know."""
    with serve("hf_faults") as found:
        yield found
    assert found.unknown == []


@pytest.fixture(scope="session")
def zygote(hub, tmp_path_factory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("zygote")
    found = Zygote(folder, hub.environment(folder / "home", token="hf_faults"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory) -> Path:
    """Three videos with geometry and questions."""
    return make_benchmark(tmp_path_factory.mktemp("faults") / "rooms")


@pytest.fixture(scope="session")
def precompute_arguments(benchmark):
    """Make the arguments of `geode precompute` from a folder: a shard for each of three videos."""
    fixed = ["--model", geode.tiny_checkpoint(), "--videos", benchmark / "rooms", "--media-root", benchmark]
    fixed += ["--geometry", "geometry/{stem}", "--shard-size", "1"]
    return lambda out: ["precompute", *fixed, "--out", out]


@pytest.fixture(scope="session")
def rooms_arguments():
    """Make the arguments of `geode data rooms` from a folder."""
    fixed = ["--scenes", "3", "--workers", "1", "--image-size", "32", "48", "--frames", "8"]
    return lambda out: ["data", "rooms", *fixed, "--out", out]


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("places")


def kept_kills(zygote, arguments, out, compare=None) -> Kills:
    """The undisturbed run, and kills that compare each file with it."""

    def same_content(other):
        assert content_of(other) == content_of(out)

    found = Kills(zygote, arguments, compare or same_content)
    found.reference(out)
    return found


@pytest.fixture(scope="session")
def precompute_kills(zygote, places, precompute_arguments):
    return kept_kills(zygote, precompute_arguments, places / "store")


@pytest.fixture(scope="session")
def rooms_kills(zygote, places, rooms_arguments):
    pytest.importorskip("embreex", reason="rendering needs embreex, the extra `world`")
    return kept_kills(zygote, rooms_arguments, places / "rooms")


@pytest.fixture(scope="session")
def exported(zygote, places):
    return kept_kills(zygote, lambda out: ["export", out], places / "geode-tiny")


@pytest.fixture(scope="session")
def eval_kills(zygote, places, benchmark):
    whole = places / "eval"

    def facts(folder):
        scores = json.loads((folder / "scores.json").read_text("utf-8"))
        lines = [line | {"seconds": 0.0} for line in read_lines(folder / "predictions.jsonl")]
        return sorted(content_of(folder)), lines, scores["tasks"], scores["intervals"], scores["run"]

    def compare(folder):
        assert facts(folder) == facts(whole)

    return kept_kills(zygote, lambda out: ["eval", "--benchmark", benchmark, "--out", out], whole, compare)


@pytest.fixture(scope="session")
def training_kills(zygote, places):
    """It trains in a world, and its undisturbed run is `trained` beside it."""
    world = make_world(places / "world")
    whole = places / "trained"

    def compare(out):
        assert_same_run(out, whole)
        # The writer of safetensors has such names for what is under way, and that may be large.
        assert [path for path in content_of(out) if re.search(r"(^|/)\.tmp\w{6}$", path)] == []

    return kept_kills(zygote, lambda out: arguments_of(world, out, "--resume_from_checkpoint", "true"), whole, compare)
