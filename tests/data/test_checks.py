# SPDX-License-Identifier: Apache-2.0
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from geode.cli import main
from geode.data.checks import PROBLEMS, benchmark_scenes, check_mixture, scene_ids
from geode.data.mixtures import Mixture, MixtureSource
from geode.data.schemas import Record
from tests.data.common_mixtures import CHOICE, conversation, make_data, touch, vsi_row, write_lines


def write_benchmark(path, *scenes):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": list(range(len(scenes))), "dataset": ["scannet"] * len(scenes), "scene_name": list(scenes)}
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def mixture_of(reader="vsi_590k", path="VSI-590K", **options):
    return Mixture(name="own", sources=[MixtureSource(reader=reader, path=path, **options)])


def check_rows(tmp_path, rows, **options):
    write_lines(tmp_path / "VSI-590K" / "vsi_590k.jsonl", rows)
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("video"), str):
            touch(tmp_path / "VSI-590K" / row["video"])
    (source,) = check_mixture(mixture_of(), tmp_path, **options).sources
    return source


def found(source):
    return {name: count for name, count in source.problems.items() if count}


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def test_check_passes_on_sound_data(data, tmp_path):
    benchmark = write_benchmark(tmp_path / "test.parquet", "scene9999_00", "41069025")
    mixture = Mixture(
        name="own",
        sources=[
            MixtureSource(reader="vsi_590k", path="VSI-590K"),
            MixtureSource(reader="vlm_3r", path="VLM-3R-DATA"),
        ],
    )
    report = check_mixture(mixture, data, benchmark=benchmark)
    assert report.has_passed
    assert [source.rows for source in report.sources] == [300, 120]
    assert report.sources[0].kinds == {"number": 150, "choice": 150}
    assert report.sources[1].suspect == 60
    assert report.num_benchmark_scenes == 2


@pytest.mark.parametrize(
    ("scene", "problem"), [("scene0003_00", "leaks"), ("SCENE0003_00", "leaks"), ("scene0003_07", "rescans")]
)
def test_check_refuses_a_scene_of_the_benchmark(data, tmp_path, scene, problem):
    benchmark = write_benchmark(tmp_path / "test.parquet", scene)
    report = check_mixture(mixture_of(), data, benchmark=benchmark)
    assert not report.has_passed
    # Of 300 rows about 7 scenes, 43 are about the fourth.
    assert found(report.sources[0]) == {problem: 43}
    assert f"43 {PROBLEMS[problem]}" in report.table()
    assert "scene0003_00.mp4" in report.table()


@pytest.mark.parametrize(
    ("media", "scene"),
    [
        ("scannet/videos/scene0191_00.mp4", "scene0191_00"),
        ("scannet/scene0191_00/color/12.jpg", "scene0191_00"),
        ("arkitscenes/Training/42445173/42445173.mp4", "42445173"),
        ("arkitscenes/42445173_frames.mp4", "42445173"),
        ("scannetpp/0A5C013435.mp4", "0a5c013435"),
        ("rooms/room_000017.mp4", "room_000017"),
        ("s3dis/area_1/Area_1_office_1.mp4", "area_1_office_1"),
        ("x/scene0191-00.mp4", "scene0191_00"),
        ("arkit/v41069025.mp4", "41069025"),
        ("rooms/room_000001_frames/1.jpg", "room_000001"),
        ("rooms/room_000001-clip.mp4", "room_000001"),
    ],
)
def test_scene_ids_are_found_wherever_they_stand_in_a_path(media, scene):
    record = Record(uid="0", source="s", media_type="video", media=media, prompt="", kind="text", answer_text="")
    assert scene in scene_ids(record, num_words=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"geometry": "geometry/scene0191_00"},
        {"scene": "scannet/Scene0191_00"},
        {"scene": "scene0191_00_v2"},
    ],
)
def test_scene_ids_are_found_in_geometry_and_scene(fields):
    record = Record(
        uid="0", source="s", media_type="video", media="clips/1.mp4", prompt="", kind="text", answer_text="", **fields
    )
    assert "scene0191_00" in scene_ids(record)


def test_scene_ids_take_no_part_of_a_longer_number():
    media = "coco/train2017/000000123456.jpg"
    record = Record(uid="0", source="s", media_type="image", media=media, prompt="", kind="text", answer_text="")
    assert scene_ids(record, num_words=1) == {"coco", "train2017", "000000123456", "jpg"}


def test_scene_ids_include_the_one_that_a_row_names():
    record = Record(
        uid="0",
        source="s",
        media_type="video",
        media="a.mp4",
        prompt="",
        kind="text",
        answer_text="",
        scene="Scene0001_00",
    )
    assert "scene0001_00" in scene_ids(record)


def test_benchmark_of_digits_in_csv_keeps_its_zeros(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("scene_name\n0123456789\n0123456780\n")
    assert benchmark_scenes(path) == {"0123456789", "0123456780"}


def test_check_refuses_the_benchmark_itself_whatever_it_is_compared_with(tmp_path):
    row = {"id": 1, "dataset": "scannet", "scene_name": "scene0001_00", "question_type": "object_counting"}
    row |= {"question": "How many chairs?", "ground_truth": "4", "options": None, "pruned": False}
    write_lines(tmp_path / "VSI-Bench" / "test.jsonl", [row])
    (source,) = check_mixture(mixture_of("vsi_bench", "VSI-Bench"), tmp_path, checks_media=False).sources
    assert found(source) == {"leaks": 1}


def test_check_reports_a_broken_file_and_goes_on_with_the_next_dataset(data):
    (data / "ViCA-322K" / "scannet" / "base" / "object_count.json").write_text('[{"video": "a.mp4", ')
    sources = [MixtureSource(reader="vica", path="ViCA-322K"), MixtureSource(reader="vsi_590k", path="VSI-590K")]
    report = check_mixture(Mixture(name="own", sources=sources), data)
    assert report.sources[0].problems["bad_rows"] == 1
    assert "object_count.json" in report.sources[0].examples["bad_rows"][0]
    assert (report.sources[1].rows, found(report.sources[1])) == (300, {})


def test_check_looks_for_geometry(tmp_path):
    row = {"video": "a.mp4", "question": "How far (in meters)?", "answer": "2.0", "geometry": "geometry/a"}
    write_lines(tmp_path / "own" / "rows.jsonl", [row])
    touch(tmp_path / "own" / "a.mp4")
    (source,) = check_mixture(mixture_of("jsonl", "own"), tmp_path).sources
    assert found(source) == {"missing_media": 1}
    (tmp_path / "own" / "geometry" / "a").mkdir(parents=True)
    assert check_mixture(mixture_of("jsonl", "own"), tmp_path).has_passed


def test_check_lists_rows_that_are_not_understood_and_reads_on(tmp_path):
    rows = [vsi_row(0), {"conversations": [], "question_type": "absolute_count", "video": "a.mp4"}, vsi_row(2)]
    source = check_rows(tmp_path, rows)
    assert source.rows == 2
    assert found(source) == {"bad_rows": 1}
    assert "vsi_590k.jsonl" in source.examples["bad_rows"][0]


def test_check_finds_missing_media_and_counts_each_once(data):
    (data / "VSI-590K" / "scannet" / "scene0002_00.mp4").unlink()
    report = check_mixture(mixture_of(), data)
    assert found(report.sources[0]) == {"missing_media": 1}
    assert check_mixture(mixture_of(), data, checks_media=False).has_passed


@pytest.mark.parametrize(
    ("question", "answer", "problem"),
    [
        ("How far (in meters)?", "250.0", "out_of_range"),
        ("How far (in meters)?", "0", "out_of_range"),
        ("How far (in centimeters)?", "-3", "out_of_range"),
        ("How big is the room (in square feet)?", "90000", "out_of_range"),
        ("How many chairs are there?", "2.5", "out_of_range"),
        ("How many chairs are there?", "600", "out_of_range"),
        ("How much?", "3.5", "no_unit"),
        (CHOICE, "C", "bad_letters"),
        (CHOICE, "A. sofa", "bad_letters"),
        ("<image>\nWhich?\n(A) lamp\n  B) sofa", "C", "bad_letters"),
    ],
)
def test_check_finds_answers_that_cannot_be(tmp_path, question, answer, problem):
    row = {"conversations": conversation(question, answer), "question_type": "unheard_of", "video": "a.mp4"}
    assert found(check_rows(tmp_path, [row])) == {problem: 1}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How far (in meters)?", "0.2"),
        ("How far (in feet)?", "600.0"),
        ("How big is the room (in square feet)?", "215.3"),
        ("How many chairs are there?", "0"),
        (CHOICE, "B"),
        (CHOICE, "B. Sofa"),
        ("Which one?", "C"),
    ],
)
def test_check_accepts_answers_that_can_be(tmp_path, question, answer):
    row = {"conversations": conversation(question, answer), "question_type": "unheard_of", "video": "a.mp4"}
    assert found(check_rows(tmp_path, [row])) == {}


def test_check_refuses_an_empty_dataset(tmp_path):
    assert found(check_rows(tmp_path, [])) == {"no_rows": 1}


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "folder", "vsi-bench"])
def test_benchmark_scenes_are_read_from_every_form(tmp_path, form):
    scenes = ["scene0001_00", "41069025", "scene0001_00"]
    path = tmp_path / f"test.{form}"
    if form == "jsonl":
        write_lines(path, [{"scene_name": scene} for scene in scenes])
    elif form == "csv":
        path.write_text("id,scene_name\n" + "".join(f'0,"{scene}"\n' for scene in scenes))
    elif form == "parquet":
        write_benchmark(path, *scenes)
    else:
        folder = tmp_path / ("VSI-Bench" if form == "vsi-bench" else "somewhere")
        write_benchmark(folder / "test.parquet", *scenes)
        path = "vsi-bench" if form == "vsi-bench" else folder
    assert benchmark_scenes(path, tmp_path) == {"scene0001_00", "41069025"}


def test_benchmark_scenes_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one of .*'vsi-bench'.* no such file"):
        benchmark_scenes("vsi-bunch", tmp_path)
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pa.table({"scene": ["a"]}), path)
    with pytest.raises(ValueError, match=r"needs a column `scene_name`; .* has \['scene'\]"):
        benchmark_scenes(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read"):
        benchmark_scenes(path)
    with pytest.raises(ValueError, match="names no scene"):
        benchmark_scenes(write_benchmark(path))


def run_check(capsys, *arguments):
    code = main(["data", "check", *map(str, arguments)])
    return code, capsys.readouterr()


def test_data_check_writes_a_report_and_its_exit_code_tells(data, tmp_path, capsys):
    mixture = tmp_path / "own.yaml"
    mixture.write_text("sources:\n  - {reader: vsi_590k, path: VSI-590K}\n")
    clean = write_benchmark(tmp_path / "clean.parquet", "scene0999_00")
    leaky = write_benchmark(tmp_path / "leaky.parquet", "scene0001_00")
    report = tmp_path / "reports" / "own.json"
    arguments = (mixture, "--data-root", data, "--report", report, "--benchmark")
    code, output = run_check(capsys, *arguments, clean)
    assert (code, output.out.splitlines()[-2:]) == (
        0,
        [f"own: passed: no scene of {clean} (1 scenes)", f"report: {report}"],
    )
    assert json.loads(report.read_text())["has_passed"] is True
    code, output = run_check(capsys, *arguments, leaky)
    assert code == 1
    assert "own: FAILED" in output.out
    saved = json.loads(report.read_text())
    assert saved["has_passed"] is False
    assert saved["sources"][0]["problems"] == {**dict.fromkeys(PROBLEMS, 0), "leaks": 43}
    assert saved["sources"][0]["benchmark_scenes"] == ["scene0001_00"]
    code, output = run_check(capsys, tmp_path / "none.yaml")
    assert code == 2
    assert "geode: error: There is no mixture at" in output.err
