# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import geode
from geode.cli import main
from geode.hub_cards.check import check_files
from geode.modeling_geode.answers_geode import Answer, Box3D, Measurement
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache


QUESTION = "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the combined space."


def assert_one_line_of_error(capsys, *fragments):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("geode: error: ")
    assert captured.err.count("\n") == 1
    for fragment in fragments:
        assert str(fragment) in captured.err


def test_parser_loads_neither_torch_nor_transformers():
    script = "import sys, geode.cli; geode.cli.build_parser().format_help(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "numpy"}.isdisjoint(result.stdout.split())


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"geode {geode.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["dream"], ["ask", "room.mp4"], ["ask", "v", "q", "--geometry", "g", "--no-geometry"]]
)
def test_wrong_arguments_end_with_usage_and_code_2(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: geode" in capsys.readouterr().err


def test_ask_names_a_missing_video(capsys, tmp_path):
    assert main(["ask", str(tmp_path / "none.mp4"), "How many?"]) == 2
    assert_one_line_of_error(capsys, "`video`", tmp_path / "none.mp4")


def test_ask_names_a_missing_geometry(capsys, tmp_path):
    (tmp_path / "room.mp4").touch()
    assert main(["ask", str(tmp_path / "room.mp4"), "How many?", "--geometry", str(tmp_path / "none")]) == 2
    assert_one_line_of_error(capsys, "`geometry`", tmp_path / "none")


def test_ask_names_a_folder_without_checkpoint(capsys, tmp_path):
    (tmp_path / "room.mp4").touch()
    assert main(["ask", str(tmp_path / "room.mp4"), "How many?", "--model", str(tmp_path)]) == 2
    assert_one_line_of_error(capsys, "`model`", tmp_path, "config.json")


def test_ask_names_a_file_that_is_no_video(capsys, tmp_path):
    (tmp_path / "room.mp4").write_text("not a video")
    assert main(["ask", str(tmp_path / "room.mp4"), "How many?", "--no-geometry"]) == 2
    assert_one_line_of_error(capsys, "room.mp4")


def test_export_refuses_a_folder_that_holds_something(capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert main(["export", str(tmp_path)]) == 2
    assert_one_line_of_error(capsys, "`save_directory`", tmp_path)


def test_ask_takes_the_geometry_beside_the_video(capsys):
    assert main(["ask", str(geode.embedded_scene() / "room.mp4"), QUESTION]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.fullmatch(r"answer: [^\n]*\d[^\n]*\n", captured.out)


def test_ask_answers_other_words_in_other_units(capsys):
    # The truth is 1.41 m; beyond half of it or half as much again nothing would be right.
    questions = ["How far apart are the stool and the tv in feet?", "Where is the sofa?"]
    assert main(["ask", str(geode.embedded_scene() / "room.mp4"), *questions]) == 0
    distance, box = capsys.readouterr().out.splitlines()[-2:]
    feet = float(distance.removeprefix("answer: ").split(" ft")[0])
    assert 0.5 * 1.41 < feet * 0.3048 < 1.5 * 1.41
    assert box.startswith("answer: [center (")


def test_ask_without_geometry_says_so_and_answers_as_without_it(capsys, tmp_path):
    shutil.copy(geode.embedded_scene() / "room.mp4", tmp_path)
    video = str(tmp_path / "room.mp4")
    assert main(["ask", video, QUESTION]) == 0
    noticed = capsys.readouterr()
    assert noticed.err.startswith("geode: notice: no geometry")
    assert noticed.err.count("\n") == 1
    assert main(["ask", video, QUESTION, "--no-geometry"]) == 0
    silent = capsys.readouterr()
    assert silent.err == ""
    assert noticed.out == silent.out
    # The folder that is named is the one that is used: the answer is that of the video in its own place.
    assert main(["ask", video, QUESTION, "--geometry", str(geode.embedded_scene() / "geometry")]) == 0
    named = capsys.readouterr()
    assert main(["ask", str(geode.embedded_scene() / "room.mp4"), QUESTION]) == 0
    assert named == capsys.readouterr()


def test_ask_prints_json_lines_with_the_values_of_the_model(capsys, monkeypatch):
    from geode.commands import answer_question, answer_questions, load_checkpoint
    from geode.modeling_geode.media_geode import GeodeMediaMixin

    encoded, encode = [], GeodeMediaMixin.get_video_features
    monkeypatch.setattr(
        GeodeMediaMixin,
        "get_video_features",
        lambda self, frames, *rest, **options: encoded.append(len(frames)) or encode(self, frames, *rest, **options),
    )
    scene = geode.embedded_scene()
    questions = [QUESTION, "Locate the table."]
    assert main(["ask", str(scene / "room.mp4"), *questions, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["question"] for record in records] == questions
    assert encoded == [1]  # once for both questions
    checkpoint = load_checkpoint()
    answers = answer_questions(checkpoint, scene / "room.mp4", questions, geometry=scene / "geometry")
    for record, answer in zip(records, answers, strict=True):
        assert record.pop("seconds") > 0
        assert record == {"question": record["question"], **json.loads(json.dumps(answer.to_dict()))}
        timed = answer_question(checkpoint, scene / "room.mp4", record["question"], geometry=scene / "geometry")
        assert timed.answer.text == answer.text


def test_ask_passes_the_number_of_frames(capsys):
    video = str(geode.embedded_scene() / "room.mp4")
    assert main(["ask", video, QUESTION, "--num-frames", "0"]) == 2
    assert_one_line_of_error(capsys, "`num_frames`", "0")


def test_demo_prints_a_line_per_question_a_summary_and_a_picture(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "new" / "folder")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = (geode.embedded_scene() / "questions.jsonl").read_text().splitlines()
    answers, (summary, note, picture) = lines[:-3], lines[-3:]
    assert note == "note: the tiny checkpoint was trained on other rendered rooms, and knows nothing else."
    assert len(answers) == len(rows)
    for line, row in zip(answers, rows, strict=True):
        assert line.startswith(f"answer: {json.loads(row)['question']} -> ")
        assert re.search(r"\(truth .*\), \d+\.\d\d s$", line)
    assert summary.startswith(f"summary: {len(rows)} questions in ")
    assert picture == f"picture: {tmp_path / 'new' / 'folder' / 'scene.png'}"
    with Image.open(tmp_path / "new" / "folder" / "scene.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 1000


def test_demo_refuses_a_file_as_folder(capsys, tmp_path):
    (tmp_path / "out").touch()
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert_one_line_of_error(capsys, tmp_path / "out")


def test_export_writes_a_folder_that_holds_the_same_model(capsys, tmp_path):
    from geode.commands import load_checkpoint

    assert main(["export", str(tmp_path / "hub")]) == 0
    assert capsys.readouterr().out == f"exported: {tmp_path / 'hub'}\n"
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"modeling_geode.py", "processing_geode.py", "model.safetensors", "tokenizer.json"} <= names
    exported, original = load_checkpoint(tmp_path / "hub").model.state_dict(), load_checkpoint().model.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


VGGT = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"


@pytest.fixture
def public_vggt(tmp_path) -> Path:
    """A tiny VGGT model as its authors publish theirs: weights, and sizes without a `model_type`."""
    folder = tmp_path / "public"
    folder.mkdir()
    shutil.copy(VGGT / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(json.loads((VGGT / "config.json").read_text())["model"]))
    return folder


def card_of(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_export_converts_public_vggt_and_takes_it_again(capsys, public_vggt, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["export", str(first), "--model", str(public_vggt)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"exported: {first}\n"
    assert captured.err.startswith("geode: notice: the licence of the weights is not known")
    assert "license" not in card_of(first)
    want = geode.convert_vggt_checkpoint(public_vggt).state_dict()
    got = geode.VggtModel.from_pretrained(first).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    processor = geode.VggtImageProcessor.from_pretrained(first)
    assert (processor.mode, processor.image_size, processor.patch_size) == ("crop", 56, 14)

    # What the folder says of its frames is kept, and so is all else but what states the licence.
    geode.VggtImageProcessor("pad", image_size=28).save_pretrained(first)
    assert main(["export", str(second), "--model", str(first), "--license", "apache-2.0"]) == 0
    assert "notice" not in capsys.readouterr().err
    assert card_of(second)["license"] == "apache-2.0"
    for path in first.iterdir():
        if path.name not in ("README.md", "LICENSE", "geode_export.json"):
            assert (second / path.name).read_bytes() == path.read_bytes(), path.name
    assert {"README.md", "LICENSE", "vggt_geode.py"} <= {path.name for path in second.iterdir()}
    assert [problem.what for problem in check_files(first) if problem.where == "README.md"] == [
        "its header has no `license`"
    ]
    assert check_files(second) == []


def test_export_gives_our_vggt_without_a_processor_one(capsys, public_vggt, tmp_path):
    geode.convert_vggt_checkpoint(public_vggt).save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "hub"), "--model", str(tmp_path / "ours")]) == 0
    assert geode.VggtImageProcessor.from_pretrained(tmp_path / "hub").image_size == 56


def test_export_of_vggt_on_the_hub_states_commit_and_licence(capsys, public_vggt, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    put_in_hub_cache(public_vggt, "facebook/VGGT-1B", tmp_path / "hf")
    arguments = ["--model", "facebook/VGGT-1B", "--revision", "main"]
    assert main(["export", str(tmp_path / "hub"), *arguments]) == 0
    assert capsys.readouterr().err == ""
    card = card_of(tmp_path / "hub")
    assert (card["license"], card["base_model"]) == ("cc-by-nc-4.0", "facebook/VGGT-1B")
    assert f"at commit `{COMMIT}`" in (tmp_path / "hub" / "README.md").read_text()
    assert main(["export", str(tmp_path / "other"), *arguments, "--license", "mit"]) == 2
    assert_one_line_of_error(capsys, "`license_id`", "'mit'", "facebook/VGGT-1B states 'cc-by-nc-4.0'")
    assert not (tmp_path / "other").exists()


def test_export_of_our_vggt_on_the_hub(capsys, public_vggt, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    geode.convert_vggt_checkpoint(public_vggt).save_pretrained(tmp_path / "ours")
    geode.VggtImageProcessor("pad", image_size=28).save_pretrained(tmp_path / "ours")
    put_in_hub_cache(tmp_path / "ours", "org/vggt", tmp_path / "hf")
    assert main(["export", str(tmp_path / "hub"), "--model", "org/vggt", "--license", "mit"]) == 0
    assert geode.VggtImageProcessor.from_pretrained(tmp_path / "hub").mode == "pad"
    assert card_of(tmp_path / "hub")["base_model"] == "org/vggt"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "ours", tmp_path / "hub")]
    assert weights[0] == weights[1]


def test_export_takes_one_file_for_public_vggt(capsys, public_vggt, tmp_path):
    # The fixture's sizes are not VGGT-1B's, which a file alone is taken for.
    assert main(["export", str(tmp_path / "hub"), "--model", str(public_vggt / "model.safetensors")]) == 2
    assert_one_line_of_error(capsys, "`checkpoint` does not fit", "missing `aggregator.patch_embed.blocks.2.")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--model", "{tmp}/none"], ["`model`", "{tmp}/none", "no config.json"]),
        (["--model", "{tmp}/foreign"], ["`model`", "{tmp}/foreign", "`model_type` 'qwen2'"]),
        (["--model", "{tmp}/empty"], ["`model`", "{tmp}/empty", "no config.json", "the path of the file"]),
        (["--model", "{tmp}/none.pt"], ["no file", "{tmp}/none.pt"]),
        (["--model", "{tmp}/foreign", "--revision", "v1"], ["`revision`", "'v1'", "{tmp}/foreign"]),
        (["--model", "{tmp}/none.pt", "--revision", "v1"], ["`revision`", "'v1'", "{tmp}/none.pt"]),
        (["--model", "org/none"], ["`model`", "'org/none', looked up on the Hub (offline, in its cache)"]),
        (["--license", "mit"], ["`license_id`", "'mit' with GEODE"]),
    ],
)
def test_export_says_what_it_cannot_take(capsys, tmp_path, arguments, fragments):
    for name in ("foreign", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "qwen2"}')
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main(["export", str(tmp_path / "hub"), *arguments]) == 2
    assert_one_line_of_error(capsys, *(fragment.format(tmp=tmp_path) for fragment in fragments))
    assert not (tmp_path / "hub").exists()


def test_export_takes_a_geode_folder_by_its_config(capsys, tmp_path):
    assert main(["export", str(tmp_path / "hub"), "--model", str(geode.tiny_checkpoint())]) == 0
    # The tiny one is known by its place; of a copy nobody has stated what its card must say.
    assert card_of(tmp_path / "hub")["license"] == "apache-2.0"
    assert "modeling_geode.py" in {path.name for path in (tmp_path / "hub").iterdir()}
    shutil.copytree(geode.tiny_checkpoint(), tmp_path / "copy")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "other"), "--model", str(tmp_path / "copy")]) == 2
    assert_one_line_of_error(capsys, "`facts`", tmp_path / "copy", "docs/hub.md")
    assert not (tmp_path / "other").exists()


def test_compare_measures_boxes_between_centres():
    from geode.demo import compare, describe

    row = {"ground_truth": "", "box": [1.0, 2.0, 0.5, 0.4, 0.6, 1.0, 0.2]}
    box = Box3D(center=(4.0, 6.0, 0.5), size=(0.4, 0.6, 1.0), yaw=0.2)
    comparison = compare(row, Answer(text="ignored", values=[], boxes=[box]))
    assert comparison.error == 5.0  # 3, 4 and 0 metres along the axes
    assert describe(comparison).endswith("error 5.00 m)")


def test_compare_measures_numbers_in_the_asked_unit():
    from geode.demo import compare, describe

    answer = Answer(text="4", values=[Measurement("<REG>", 4.0, "count", 4.2)], boxes=[])
    comparison = compare({"ground_truth": "5", "value": 5.0, "unit": "count"}, answer)
    assert comparison == ("number", "4", "5", 1.0, "count", 0.2)
    assert describe(comparison) == "-> 4 (truth 5, error 1)"


def test_compare_does_not_mix_units():
    from geode.demo import compare, describe

    row = {"ground_truth": "150", "value": 150.0, "unit": "cm"}
    answer = Answer(text="1.50", values=[Measurement("<REG>", 1.5, "m", 1.5)], boxes=[])
    assert compare(row, answer) == ("number", "1.50", "150.00 cm", None, None, None)
    assert describe(compare(row, answer)) == "-> 1.50 (truth 150.00 cm, no number in the answer)"


def test_compare_reads_the_letter_of_a_choice():
    from geode.demo import compare

    row = {"ground_truth": "B", "options": ["A. left", "B. right"]}
    errors = [compare(row, Answer(text=text, values=[], boxes=[])).error for text in ("B", " b. right", "A", "")]
    assert errors == [0.0, 0.0, 1.0, 1.0]


def test_summary_counts_what_was_answered():
    from geode.demo import Comparison, summarize

    comparisons = [
        Comparison("number", "", "", 1.0, "m", 0.1),
        Comparison("number", "", "", 3.0, "m", 0.3),
        Comparison("number", "", "", None),
        Comparison("box", "", "", 0.25, "m"),
        Comparison("choice", "", "", 0.0),
        Comparison("choice", "", "", 1.0),
    ]
    assert summarize(comparisons, seconds=2.04) == (
        "summary: 6 questions in 2.0 s; 2 numbers with a median error of 20.0 %; 1 boxes with a mean error of 0.25 m "
        "between centres; 1 of 2 choices right; 1 without the value that was asked for"
    )
