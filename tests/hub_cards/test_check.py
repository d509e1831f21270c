# SPDX-License-Identifier: Apache-2.0
"""Tests of `geode check`: an export is sound, and each thing that can be wrong with a folder is said, alone and with a remedy."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from geode.cli import main
from geode.hub_cards.check import check, check_files
from geode.hub_cards.manifest import MANIFEST, hash_file, hash_parts, part_of
from geode.hub_cards.stranger import run_as_stranger


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_section(path, title, new):
    before, heading, rest = path.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert heading
    _, following, after = rest.partition("\n## ")
    path.write_text(f"{before}{heading}{new}{following}{after}", encoding="utf-8")


def edit_json(path, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def record(folder, *names):
    """Make the recorded hashes those of the files, as somebody would who wants a change not to be seen."""

    def change(document):
        for name in names:
            table = "code" if name.endswith(".py") else "files"
            document[table][name] = hash_file(folder / name)

    edit_json(folder / MANIFEST, change)


def shard(folder):
    """Put the weights in two files, recorded, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit_json(folder / MANIFEST, lambda document: document["files"].pop("model.safetensors"))
    record(folder, *sorted(set(weight_map.values())))


def with_results(folder, text):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "VSI-Bench.yaml").write_text(text)


def with_part(**part):
    def spoil(folder):
        edit_json(folder / MANIFEST, lambda document: document["parts"]["point_encoder"].update(part))

    return spoil


def swap_shards(folder):
    shard(folder)
    first, second = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    shutil.copy(second, first)
    record(folder, first.name)


def drop_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    edit_json(folder / MANIFEST, lambda document: document["files"].pop("model-00002-of-00002.safetensors"))


def recorded(name, old, new):
    """Edit a file and its hash with it."""

    def spoil(folder):
        edit(folder / name, old, new)
        record(folder, name)

    return spoil


@pytest.fixture(scope="module")
def light(exported, tmp_path_factory):
    """The export with two tensors of each part, since most tests copy and hash all of it."""
    target = tmp_path_factory.mktemp("light") / "geode-tiny"
    shutil.copytree(exported, target)
    weights, kept = load_file(target / "model.safetensors"), {}
    for part in hash_parts(target):
        names = sorted((weights[name].numel(), name) for name in weights if part_of(name) == part)
        kept |= {name: weights[name] for _, name in names[:2]}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    record(target, "model.safetensors")
    return target


@pytest.fixture
def folder(light, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(light, tmp_path / "geode-tiny"))


@pytest.fixture
def whole(exported, tmp_path):
    """A copy that can be run."""
    return Path(shutil.copytree(exported, tmp_path / "geode-tiny"))


FAULTS = {
    "code changed": (
        lambda f: edit(f / "mamba_geode.py", "import math", "import math  #"),
        "mamba_geode.py",
        "its SHA-256 is not the one",
    ),
    "weights changed": (
        lambda f: save_file(
            {k: v + 1 for k, v in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
        ),
        "model.safetensors",
        "its SHA-256 is not the one",
    ),
    "code added": (lambda f: (f / "extra_geode.py").write_text("x = 1\n"), "extra_geode.py", "it was added later"),
    "weights added": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "adapter.safetensors"),
        "adapter.safetensors",
        "it was added later",
    ),
    "file lost": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja", "recorded .* and not there"),
    "no record": (lambda f: (f / MANIFEST).unlink(), MANIFEST, "is missing, so that nobody can tell"),
    "record broken": (lambda f: (f / MANIFEST).write_text("{"), MANIFEST, "cannot be read"),
    "pickle": (lambda f: torch.save({"a": 1}, f / "extra.dat"), "extra.dat", "archive with the pickle"),
    "pickle in text": (lambda f: (f / "notes.txt").write_bytes(pickle.dumps([1])), "notes.txt", "is a pickle"),
    "object array": (lambda f: np.save(f / "x.npy", np.array([None])), "x.npy", "ends in .npy"),
    "token": (lambda f: (f / "notes.txt").write_text(f"hf_{'a1B2' * 9}"), "notes.txt", "holds an access token"),
    "no auto_map": (
        recorded("config.json", '"auto_map"', '"auto_maps"'),
        "config.json",
        "it has no `auto_map`",
    ),
    "auto_map to nothing": (
        recorded("processor_config.json", "processing_geode.GeodeProcessor", "processing_geode.Processor"),
        "processor_config.json",
        "names processing_geode.Processor, which is not there",
    ),
    "auto_map to others": (
        recorded("config.json", "configuration_geode.GeodeConfig", "evil/code--configuration_geode.GeodeConfig"),
        "config.json",
        "the code of another repository",
    ),
    "image processor elsewhere": (
        recorded("processor_config.json", "video_processing_geode.GeodeImageProcessor", "a.B"),
        "processor_config.json",
        "names a.B, which is not there",
    ),
    "config broken": (
        lambda f: ((f / "config.json").write_text("{"), record(f, "config.json")),
        "config.json",
        "no object in JSON",
    ),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md", "there is no card"),
    "header broken": (
        lambda f: edit(f / "README.md", "language: en", "language: [en"),
        "README.md",
        "its header cannot be read",
    ),
    "no licence on the card": (
        lambda f: edit(f / "README.md", "license: apache-2.0\n", ""),
        "README.md",
        "no `license`",
    ),
    "no library": (
        lambda f: edit(f / "README.md", "library_name: transformers\n", ""),
        "README.md",
        "no `library_name`",
    ),
    "results of no model": (
        lambda f: edit(f / "README.md", "language: en", "model-index:\n- name: x\n  results:\n  - task: {}"),
        "README.md",
        "its header cannot be read: Invalid `model_index`",
    ),
    "section lost": (
        lambda f: edit(f / "README.md", "## Limitations", "## Others"),
        "README.md",
        'no section "Limitations"',
    ),
    "section empty": (
        lambda f: edit_section(f / "README.md", "Evaluation", ""),
        "README.md",
        'no section "Evaluation", or an empty one',
    ),
    "no snippet": (lambda f: edit(f / "README.md", "```python", "```text"), "README.md", "no Python block"),
    "part not for commerce": (
        with_part(source="facebook/sonata", license="cc-by-nc-4.0"),
        "README.md",
        "its licence is 'apache-2.0', and it has parts that do not permit it: point_encoder. State 'cc-by-nc-4.0'",
    ),
    "part with own terms": (with_part(license="other"), "README.md", "do not permit it: point_encoder. State 'other'"),
    "results broken": (
        lambda f: with_results(f, "- dataset: {id: a/b}\n  value: 1.0\n"),
        ".eval_results/VSI-Bench.yaml",
        "no list of results",
    ),
    "results without number": (
        lambda f: with_results(f, "- dataset: {id: a/b, task_id: full}\n  value: good\n"),
        ".eval_results/VSI-Bench.yaml",
        "no list of results",
    ),
    "shard lost": (
        drop_shard,
        "model.safetensors.index.json",
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "shard mixed up": (
        swap_shards,
        "model-00001-of-00002.safetensors",
        "it lacks `.*`, which model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_said_alone_with_a_remedy(folder, fault):
    spoil, where, what = FAULTS[fault]
    spoil(folder)
    problems = check_files(folder)
    assert {problem.where for problem in problems} == {where}, problems
    assert re.search(what, str(problems[0])), problems
    for problem in problems:
        assert "\n" not in str(problem)
        assert problem.remedy.strip()
        assert str(problem).endswith(f"{problem.remedy}.")


@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "processor_config.json", "tokenizer.json"])
def test_a_file_that_every_model_needs_is_missed(folder, name):
    (folder / name).unlink()
    found = {(problem.where, problem.what) for problem in check_files(folder)}
    assert any(where == name and "is missing" in what for where, what in found)


def test_an_import_within_the_folder_that_leads_nowhere_is_said(folder):
    (folder / "mamba_geode.py").unlink()
    edit_json(folder / MANIFEST, lambda document: document["code"].pop("mamba_geode.py"))
    importers = {path.name for path in folder.glob("*.py") if "from .mamba_geode import" in path.read_text()}
    found = {problem.where: problem.what for problem in check_files(folder)}
    assert found == dict.fromkeys(importers, "it imports .mamba_geode, which is not there")
    assert importers


def test_a_sound_export_has_no_fault_and_so_has_a_sharded_one(folder):
    assert check_files(folder) == []
    before = hash_parts(folder)
    shard(folder)
    assert check_files(folder) == []
    assert hash_parts(folder) == before


def test_hashes_of_parts_tell_which_part_has_changed(whole):
    folder = whole
    before = hash_parts(folder)
    weights = load_file(folder / "model.safetensors")
    assert {name: part["parameters"] for name, part in before.items()} == {
        part: sum(
            tensor.numel() for name, tensor in weights.items() if part in name.removeprefix("model.").split(".")[0]
        )
        for part in before
    }
    assert json.loads((folder / MANIFEST).read_text())["parts"]["drh"] == before["drh"]
    name = next(name for name in weights if name.startswith("model.drm."))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = hash_parts(folder)
    assert {part for part in before if before[part] != after[part]} == {"drm"}


def test_check_loads_and_runs_the_card_where_geode_is_absent(exported, capsys):
    assert main(["check", str(exported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"checked: {exported}, no problems"
    printed = [line.removeprefix("note: the snippet printed: ") for line in lines if "the snippet printed" in line]
    # The geometry is that of the shipped room, the frames are noise.
    assert re.fullmatch(r"\d+\.\d\d", printed[0])
    assert printed[1].startswith("[Measurement(token='<REG>', value=")


def test_check_prints_problems_runs_nothing_and_ends_with_1(folder, capsys):
    (folder / "modeling_geode.py").write_text("raise SystemExit('was run')\n")
    edit(folder / "README.md", "## Limitations", "## Others")
    assert main(["check", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in lines if line.startswith("problem: ")] == [
        "modeling_geode.py",
        "config.json",
        "config.json",
        "config.json",
        "README.md",
    ]
    assert any(line.startswith("note: not run") for line in lines)
    assert lines[-1] == f"checked: {folder}, 5 problems"


def test_check_says_what_it_cannot_take(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], "There is no folder at"),
        ([str(tmp_path), "--revision", "v1"], "`revision` is for names on the Hub, got 'v1'"),
    ):
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_snippet_without_a_name_is_not_run(folder):
    edit(folder / "README.md", 'name = "path', 'path = "path')
    report = check(folder)
    assert [str(problem) for problem in report.problems] == [
        'README.md: its snippet has no line `name = "..."` that says what is loaded. Write `name = "ORG/NAME"` on a line of its '
        "own, and use `name` below it."
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "step"),
    [
        ("configuration_geode.py", "import math", "import geode", "AutoConfig.from_pretrained"),
        ("processing_geode.py", "import inspect", "import inspect\nimport geode", "AutoProcessor.from_pretrained"),
        ("modeling_geode.py", "import torch\n", "import torch\nimport geode\n", "AutoModel.from_pretrained"),
        ("README.md", "print(answer.values)", "print(answer.boxes[0].colour)", "the snippet of the card"),
    ],
)
def test_what_fails_in_a_run_is_named_by_its_step(whole, name, old, new, step):
    """As by somebody who has changed the record, too."""
    folder = whole
    edit(folder / name, old, new)
    if name != "README.md":
        record(folder, name)
    (problem,) = check(folder).problems
    assert problem.what.startswith(f"{step} failed where `geode` is not installed: ")
    assert re.search(
        r"No module named 'geode'|IndexError|AttributeError|requires the following packages", problem.what
    )


@pytest.mark.slow
def test_a_run_sees_no_token_and_ends_in_time(exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    snippet = 'name = "x"\nimport os\nprint(name, "hf_secret" in os.environ.values(), os.environ["HF_HUB_OFFLINE"])\n'
    assert run_as_stranger(exported, snippet).printed == f"{exported.resolve()} False 1"
    # Installed here, and no requirement of those that a stranger has.
    packages = ["geode", "av", "peft", "pyarrow", "pytest", "torch", "transformers", "safetensors", "PIL"]
    snippet = f'name = "x"\nfrom importlib.util import find_spec\nprint([p for p in {packages} if find_spec(p)])\n'
    assert run_as_stranger(exported, snippet).printed == str(packages[5:])
    outcome = run_as_stranger(exported, 'name = "x"\n', timeout_s=0.5)
    assert (outcome.failed_step, outcome.error) == ("the run", "it took more than 0.5 s")


@pytest.mark.slow
def test_an_exported_vggt_is_sound(tmp_path, capsys):
    public, fixtures = tmp_path / "public", Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
    public.mkdir()
    shutil.copy(fixtures / "model.safetensors", public)
    (public / "config.json").write_text(json.dumps(json.loads((fixtures / "config.json").read_text())["model"]))
    assert main(["export", str(tmp_path / "hub"), "--model", str(public), "--license", "mit"]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "hub")]) == 0
    assert "the snippet printed: torch.Size([1, 2, 42, 56, 1])" in capsys.readouterr().out
    assert (
        (tmp_path / "hub" / "LICENSE")
        .read_text()
        .startswith("The contents of this folder have several terms.\n\n- weights (public): mit\n\nThe code")
    )


def test_card_is_read_by_the_validators_of_the_client(exported):
    data = ModelCard.load(exported / "README.md", ignore_metadata_errors=False).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "video-text-to-text")
