# SPDX-License-Identifier: Apache-2.0
"""Bad datasets: rows, files of rows, records, mixtures, recipes, and what a metric or a run is given."""

import json

import evaluate

from geode.data.mixtures import Mixture, MixtureSource
from geode.data.readers import read_records, record_from_row
from geode.data.schemas import Record
from geode.evaluation.benchmark import load_benchmark
from geode.evaluation.results import write_results
from geode.evaluation.vsi_bench import vsi_bench
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.stage2 import make_parser
from tests.reliability.common_reliability import DEEP, GARBAGE, Case, World


ROW = {"video": "a.mp4", "question": "How far?", "answer": "2"}
RECORD = {
    **dict.fromkeys(("uid", "source", "prompt", "answer_text"), "a"),
    "media_type": "video",
    "media": "a.mp4",
    "kind": "text",
}
QUESTION = {
    "id": 1,
    "dataset": "arkitscenes",
    "scene_name": "1",
    "question_type": "object_counting",
    "question": "How many?",
    "ground_truth": "3",
    "options": None,
}


def row(**changes):
    return lambda world: record_from_row("jsonl", {**ROW, **changes}, file="a.jsonl")


def rows(name: str, content: bytes | str):
    """Read a file of rows."""

    def call(world: World):
        folder = world.write(f"rows/{name}", content).parent
        return list(read_records("jsonl", folder, data_files=[name]))

    return call


def record(**changes):
    return lambda world: Record.from_dict({**RECORD, **changes})


def mixture(text: bytes | str):
    return lambda world: Mixture.from_yaml(world.write("mixture.yaml", text))


def source(**changes):
    return mixture(json.dumps({"sources": [{"reader": "jsonl", "path": "a", **changes}]}))


def recipe(text: bytes | str):
    def call(world: World):
        path = world.write("recipe.yaml", text)
        return make_parser().parse_args_and_config(["--config", str(path), "--use_cpu", "--dry_run"])

    return call


def collated(examples, **options):
    return lambda world: GeodeDataCollator(processor=world.processor, use_geometry=False, **options)(examples)


def score(*arguments):
    return lambda world: vsi_bench.score(*arguments)


def metric(**columns):
    def call(world: World):
        return evaluate.load(vsi_bench.__file__, cache_dir=str(world.folder)).compute(**columns)

    return call


def benchmark(name: str, content: bytes | str, **options):
    return lambda world: load_benchmark(world.write(name, content), **options)


def results(**files):
    def call(world: World):
        for name, content in files.items():
            path = world.write(f"results/{name.replace('_', '.')}", content)
        return write_results(path.parent)

    return call


ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n"
_ROW, _ROWS, _RECORD = "`record_from_row` of every reader", "`read_records`", "`Record.from_dict`"
_MIXTURE, _RECIPE, _COLLATOR = "`Mixture`, `Mixture.from_yaml`", "A recipe", "`GeodeDataCollator`"
_METRIC, _BENCHMARK, _RUN = "The VSI-Bench metric", "`load_benchmark`", "Results of `geode eval`"

CASES = (
    Case(_ROW, "no such reader", lambda world: record_from_row("foo", {}), ValueError, "got 'foo'", "There are arkitscenes"),
    Case(_ROW, "a list", lambda world: record_from_row("jsonl", [], file="a.jsonl"), ValueError, "got []", "A row must be an object with names"),
    Case(_ROW, "no medium", row(video=None), ValueError, "Row 0 of a.jsonl", "exactly one of"),
    Case(_ROW, "a medium that leaves its root", row(video="../a.mp4"), ValueError, "got '../a.mp4'", "must stay below its root"),
    Case(_ROW, "no answer", row(answer=None), ValueError, "Row 0 of a.jsonl", "answer"),
    Case(_ROW, "an answer of NaN", row(answer=float("nan")), ValueError, "got nan", "text or a finite number"),
    Case(_ROW, "half a character", row(answer="\ud800"), ValueError, "half of a surrogate pair at 0", "Write the whole character"),
    Case(_ROW, "a box of two numbers", row(answer=None, box=[1, 2]), ValueError, "[1, 2]", "Row 0 of a.jsonl"),
    Case(_ROW, "a field misspelt", row(unt="cm"), ValueError, "has a field 'unt'", "Rename it to 'unit'"),
    Case(_ROWS, "no such folder", lambda world: read_records("jsonl", world.folder / "no"), FileNotFoundError, "there are none", "Put them there"),
    Case(_ROWS, "a pattern outside of the folder", lambda world: read_records("jsonl", world.folder, data_files=["/etc/*"]), ValueError, "got ['/etc/*']", "patterns of files below `root`"),
    Case(_ROWS, "unknown `on_error`", lambda world: read_records("jsonl", world.folder, on_error="x"), ValueError, "got 'x'", "must be one of ('raise', 'skip')"),
    Case(_ROWS, ".jsonl: garbage", rows("a.jsonl", GARBAGE), ValueError, "Row 0 of a.jsonl is not JSON", "must be a JSON object"),
    Case(_ROWS, ".jsonl: 100,000 brackets", rows("a.jsonl", DEEP), ValueError, "b'[[[[", "must not be nested as deep"),
    Case(_ROWS, ".jsonl: a number of 5,000 digits", rows("a.jsonl", '{"a": ' + "9" * 5000 + "}"), ValueError, "Exceeds the limit (4300 digits)", "must be a JSON object"),
    Case(_ROWS, ".jsonl: cut in the middle", rows("a.jsonl", json.dumps(ROW)[:20]), ValueError, "Row 0 of a.jsonl is not JSON", "must be a JSON object"),
    Case(_ROWS, ".json: garbage", rows("a.json", b"[" + GARBAGE), ValueError, "a.json", "JSON in UTF-8"),
    Case(_ROWS, ".json: 100,000 brackets", rows("a.json", b'[{"a": ' + DEEP), ValueError, "Row 0 of", "cannot be decoded"),
    Case(_ROWS, ".json: a number", rows("a.json", "[1]"), ValueError, "row 0 starts with '1'", "must be a JSON list of objects"),
    Case(_ROWS, ".json: cut in the middle", rows("a.json", "[" + json.dumps(ROW)), ValueError, "got ''", "must have a comma or its end"),
    Case(_ROWS, ".parquet: garbage", rows("a.parquet", GARBAGE), ValueError, "magic bytes not found", "Fetch it again"),
    Case(_ROWS, "a pickle", rows("a.pkl", b"cos\nsystem\n"), ValueError, "is a pickle", "write JSON Lines"),
    Case(_RECORD, "None", lambda world: Record.from_dict(None), TypeError, "got None", "must be a dict of its fields"),
    Case(_RECORD, "nothing", lambda world: Record.from_dict({}), ValueError, "missing ['answer_text'", "must have the fields"),
    Case(_RECORD, "a prompt that is a number", record(prompt=3), ValueError, "got 3", "`prompt` of a record must be text"),
    Case(_RECORD, "an unknown kind", record(kind="x"), ValueError, "got 'x'", "must be one of ('number'"),
    Case(_RECORD, "a value of NaN", record(value_si=float("nan")), ValueError, "got nan", "must be a finite number"),
    Case(_RECORD, "a box of two numbers", record(box=[1, 2]), ValueError, "got [1, 2]", "seven finite numbers"),
    Case(_COLLATOR, "no examples", collated([]), ValueError, "got none", "at least one example"),
    Case(_COLLATOR, "a record that is none", collated([{"uid": "a"}]), ValueError, "missing", "must have the fields"),
    Case(_COLLATOR, "a video that is not there", collated([RECORD]), FileNotFoundError, "needs the video a.mp4", "`media_root` must be the folder"),
    Case(_COLLATOR, "`max_length` of 0", collated([], max_length=0), ValueError, "got 0", "whole number of at least 1"),
    Case(_MIXTURE, "no such file", lambda world: Mixture.from_yaml("nope"), FileNotFoundError, "nope", "Give a YAML file, or one of"),
    Case(_MIXTURE, "empty", mixture(""), ValueError, "got None", "must have the keys"),
    Case(_MIXTURE, "garbage", mixture(GARBAGE), ValueError, "UnicodeDecodeError", "Correct it"),
    Case(_MIXTURE, "an object's tag", mixture("!!python/object/apply:os.system ['true']"), ValueError, "could not determine a constructor", "Correct it"),
    Case(_MIXTURE, "aliases", mixture(ALIASES), ValueError, "the alias *a is not taken", "Correct it"),
    Case(_MIXTURE, "20,000 brackets", mixture("[" * 20_000), ValueError, "nested deeper than 50", "Correct it"),
    Case(_MIXTURE, "1 MB", mixture("# " + "x" * 1_000_000), ValueError, "got 1000002", "at most 65536 bytes"),
    Case(_MIXTURE, "a date that is none", mixture("name: 2020-13-45"), ValueError, "month must be in 1..12", "needs quotes"),
    Case(_MIXTURE, "an unknown key", mixture("foo: 1\nsources: []"), ValueError, "got also ['foo']", "must have the keys"),
    Case(_MIXTURE, "sources in words", mixture("sources: abc"), ValueError, "got 'abc'", "must be a list"),
    Case(_MIXTURE, "an unknown reader", source(reader="foo"), ValueError, "got 'foo'", "must be one of ['arkitscenes'"),
    Case(_MIXTURE, "a path of digits", source(path=123), ValueError, "got 123", "in quotes if it is digits"),
    Case(_MIXTURE, "a fraction of 2", source(fraction=2), ValueError, "got 2", "must lie in (0, 1]"),
    Case(_MIXTURE, "a weight of 400 digits", source(weight=10**400), ValueError, "got 1000", "must lie in (0, inf]"),
    Case(_MIXTURE, "sources that are none", lambda world: Mixture(name="a", sources=[3]), TypeError, "got [3]", "must be a list of `MixtureSource`"),
    Case(_MIXTURE, "no data", lambda world: Mixture(name="a", sources=[MixtureSource(reader="jsonl", path="no")]).stream(world.folder), FileNotFoundError, "is not a folder", "Put them there"),
    Case(_RECIPE, "no such file", lambda world: make_parser().parse_args_and_config(["--config", "no.yaml"]), FileNotFoundError, "'no.yaml'", "must name a recipe"),
    Case(_RECIPE, "empty", recipe(""), ValueError, "got None", "must be a mapping of options"),
    Case(_RECIPE, "garbage", recipe(GARBAGE), ValueError, "UnicodeDecodeError", "Correct it"),
    Case(_RECIPE, "a list", recipe("[1]"), ValueError, "got [1]", "must be a mapping of options"),
    Case(_RECIPE, "an unknown option", recipe("foo: 1\noutput_dir: x"), ValueError, "'--foo'", "Please remove them"),
    Case(_RECIPE, "`num_frames` of 1.5", recipe("num_frames: 1.5\noutput_dir: x"), ValueError, "got 1.5", "whole number of at least 1"),
    Case(_RECIPE, "`model_overrides` that is a number", recipe("model_overrides: 3\noutput_dir: x"), ValueError, "got 3", "must be a mapping such as"),
    Case(_RECIPE, "`model_overrides` of unknown fields", recipe("model_overrides: {foo: 1}\noutput_dir: x"), ValueError, "got 'foo'", "must name fields of `GeodeConfig`"),
    Case(_METRIC, "an unknown type", score("foo", "a", "b"), ValueError, "got 'foo'", "must be one of VSI-Bench's"),
    Case(_METRIC, "an unknown scorer", score("object_counting", "1", "1", "x"), ValueError, "got 'x'", "must be one of ('official', 'lmms_eval')"),
    Case(_METRIC, "columns of several lengths", metric(predictions=["1", "2"], references=["1"], question_types=["object_counting"]), ValueError, "Mismatch in the number of predictions (2) and references (1)", "Mismatch"),
    Case(_BENCHMARK, "neither file nor id", lambda world: load_benchmark("./no"), FileNotFoundError, "there is no './no'", "must be a file, a folder or an id on the Hub"),
    Case(_BENCHMARK, "an unknown subset", benchmark("b.jsonl", "", subset="x"), ValueError, "got 'x'", "must be one of ('full'"),
    Case(_BENCHMARK, "garbage", benchmark("b.jsonl", GARBAGE), ValueError, "cannot be read", "Fetch it again"),
    Case(_BENCHMARK, "Parquet that is none", benchmark("b.parquet", GARBAGE), ValueError, "cannot be read", "Fetch it again"),
    Case(_BENCHMARK, "a question without truth", benchmark("c.jsonl", json.dumps({**QUESTION, "ground_truth": None})), ValueError, "Row 0 of", "ground_truth"),
    Case(_RUN, "an empty folder", lambda world: write_results(world.folder / "no"), FileNotFoundError, "of a finished run", "Run `geode eval"),
    Case(_RUN, "`run.json`: garbage", results(run_json=GARBAGE, predictions_jsonl="{}\n"), ValueError, "is damaged", "Remove the folder"),
    Case(_RUN, "`run.json`: a list", results(run_json="[]", predictions_jsonl=""), ValueError, "got []", "Run it again"),
)  # fmt: skip

__all__ = ["CASES"]
