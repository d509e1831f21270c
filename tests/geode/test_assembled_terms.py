# SPDX-License-Identifier: Apache-2.0
"""From public parts to a published folder: configuration, facts, card, licence file and `geode licences` say the same of licences."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from geode.assemble import Assembly
from geode.cli import main
from geode.hub_cards.check import check_files
from geode.hub_cards.manifest import MANIFEST
from tests.hub_cards.common_cards import SONATA, write_facts
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache

from .common_parts import SMALL_DRM, TINY_TEXT, TINY_VISION, make_geometry, make_internvl, make_qwen, make_vision


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint of made-up parts under their public names: Sonata and VGGT are not for commercial use."""
    folder = tmp_path_factory.mktemp("published")
    make_qwen(folder / "qwen", sizes=TINY_TEXT)
    make_vision(folder / "vision", sizes=TINY_VISION)
    points, reconstructor = make_geometry(folder)
    (folder / "qwen" / "LICENSE").write_text("The terms of Qwen.\n")
    (folder / "qwen" / "NOTICE.md").write_text("Who is to be named.\n")
    (Path(points).parent / "LICENSE.txt").write_text("Not for commercial use.\n")
    (Path(reconstructor) / "LICENSE.pdf").write_bytes(b"%PDF-1.7\n\0\xff\xfe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf" / "hub"))
        for place, name in (
            (folder / "vision" / "public", "OpenGVLab/InternViT-300M-448px-V2_5"),
            (folder / "qwen", "Qwen/Qwen2.5-1.5B-Instruct"),
            (Path(points).parent, "facebook/sonata"),
            (Path(reconstructor), "facebook/VGGT-1B"),
        ):
            put_in_hub_cache(place, name, folder / "hf")
        Assembly(model_overrides=SMALL_DRM).write(folder / "out", show_progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A checkpoint of local copies: an InternVL model, whose card says what it is, and Sonata, of which nobody says anything."""
    folder = tmp_path_factory.mktemp("local")
    make_internvl(folder, vision=TINY_VISION, text=TINY_TEXT)
    (folder / "own" / "README.md").write_text("---\nlicense: mit\n---\n")
    points, _ = make_geometry(folder)
    assembly = Assembly(init_from=str(folder / "own"), points=points, reconstructor=None, model_overrides=SMALL_DRM)
    assembly.write(folder / "out", show_progress=False)
    return folder / "out"


def export(checkpoint: Path, out: Path, facts: Path) -> int:
    return main(["export", str(out), "--model", str(checkpoint), "--facts", str(facts)])


def licences(folder: Path, capsys) -> list[str]:
    capsys.readouterr()
    assert main(["licences", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def test_card_licence_and_report_of_an_assembled_checkpoint_agree(published, tmp_path, capsys):
    assert export(published, tmp_path / "hub", write_facts(tmp_path, "parts")) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "excluded by: point encoder, reconstructor." in card.text
    licence = (tmp_path / "hub" / "LICENSE").read_text()
    assert "As a whole it is not for commercial use." in licence
    before, after = licences(published, capsys), licences(tmp_path / "hub", capsys)
    verdict = "the whole: cc-by-nc-4.0, not for commercial use, because of point_encoder and reconstructor"
    assert before[-1] == after[-1] == verdict
    parts = {line.split()[0]: line.split()[1:] for line in before[1:5]}
    assert {line.split()[0]: line.split()[1:] for line in after[1:5]} == parts
    assert re.split(" {2,}", after[5]) == ["added to these", "apache-2.0", "facts", "yes"]
    for name, (source, license_id, *_) in parts.items():
        source = source.removesuffix(f"@{COMMIT[:12]}")
        assert (
            f"| {name.replace('_', ' ')} | [{source}](https://huggingface.co/{source}) at `{COMMIT}` | {license_id} |"
            in card.text
        )
        assert f"- {name} ({source} at {COMMIT}): {license_id}, see https://huggingface.co/{source}\n" in licence
    assert check_files(tmp_path / "hub") == []

    # What was trained is bound by its own licence, too, and then all of them say that.
    own = write_facts(tmp_path, "parts", license="cc-by-nc-sa-4.0")
    assert export(published, tmp_path / "strict", own) == 0
    assert ModelCard.load(tmp_path / "strict" / "README.md").data.license == "cc-by-nc-sa-4.0"
    assert licences(tmp_path / "strict", capsys)[-1].startswith("the whole: cc-by-nc-sa-4.0, not for commercial use")
    text = (tmp_path / "strict" / "README.md").read_text()
    (tmp_path / "strict" / "README.md").write_text(text.replace("license: cc-by-nc-sa-4.0", "license: apache-2.0"))
    (problem,) = check_files(tmp_path / "strict")
    assert "parts that do not permit it: point_encoder, reconstructor, what was added" in problem.what


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"point_encoder": {"license": "mit"}},
            "`license` of `point_encoder` is 'mit', and the model's config.json has 'cc-by-nc-4.0'",
        ),
        (
            {"point_encoder": {"source": "my own weights", "license": "mit"}},
            "`license` of `point_encoder` is 'mit', and the model's",
        ),
        (
            {"point_encoder": {"is_commercial": True}},
            "which excludes commercial use, and `is_commercial` says otherwise",
        ),
        (
            {"projector": SONATA},
            "got ['language_model', 'point_encoder', 'projector', 'reconstructor', 'vision_tower']",
        ),
    ],
)
def test_facts_that_contradict_the_configuration_are_refused(published, tmp_path, capsys, parts, message):
    assert export(published, tmp_path / "hub", write_facts(tmp_path, parts=parts)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_facts_add_what_the_configuration_does_not_know(local, tmp_path, capsys):
    *_, line = licences(local, capsys)
    assert line == "the whole: not known; the licence of point_encoder is to be found out before anything is published"
    assert export(local, tmp_path / "hub", write_facts(tmp_path, "parts")) == 2
    assert "`point_encoder` must have `source` and `license`" in capsys.readouterr().err

    facts = write_facts(tmp_path, parts={"point_encoder": {"license": "cc-by-nc-4.0"}})
    assert export(local, tmp_path / "hub", facts) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    # One part brings three modules of the model.
    for module in ("Vision tower", "Projector", "Language model"):
        assert re.search(rf"^\| {module} \| [\d,]+ parameters, own \|$", card.text, flags=re.MULTILINE)
    assert "| vision language model | own | mit |" in card.text
    recorded = json.loads((tmp_path / "hub" / MANIFEST).read_text())["parts"]
    assert recorded["vision_language_model"]["stated_by"] == "card"
    assert (recorded["point_encoder"]["license"], recorded["point_encoder"]["stated_by"]) == ("cc-by-nc-4.0", "facts")
    assert licences(tmp_path / "hub", capsys)[-1] == (
        "the whole: cc-by-nc-4.0, not for commercial use, because of point_encoder"
    )


def test_without_its_reconstructor_a_model_is_free_of_its_terms(published, tmp_path, capsys):
    from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration

    model = GeodeForConditionalGeneration.from_pretrained(published)
    model.detach_reconstructor()
    model.save_pretrained(tmp_path / "out")
    assert "reconstructor" not in "\n".join(licences(tmp_path / "out", capsys))


# ---- the texts ----

TEXTS = {
    "licenses/language_model-LICENSE": "The terms of Qwen.\n",
    "licenses/language_model-NOTICE.md": "Who is to be named.\n",
    "licenses/point_encoder-LICENSE.txt": "Not for commercial use.\n",
}


def texts_in(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in (folder / "licenses").iterdir()}


def test_licence_files_of_parts_are_copied_under_their_parts_names(published, capsys):
    assert texts_in(published) == TEXTS
    found = {
        source: {part["name"]: part["texts"] for part in json.loads((published / source).read_text())["parts"]}
        for source in ("parts.json", "config.json")
    }
    assert found["parts.json"] == found["config.json"]
    assert found["parts.json"] == {
        "vision_tower": [],
        "language_model": list(TEXTS)[:2],
        "point_encoder": list(TEXTS)[2:],
        "reconstructor": [],  # one that is no text
    }
    assert [line for line in licences(published, capsys) if line.startswith("text of ")] == [
        "text of vision_tower: none came with it, see https://huggingface.co/OpenGVLab/InternViT-300M-448px-V2_5",
        f"text of language_model: {published / 'licenses/language_model-LICENSE'}",
        f"text of language_model: {published / 'licenses/language_model-NOTICE.md'}",
        f"text of point_encoder: {published / 'licenses/point_encoder-LICENSE.txt'}",
        "text of reconstructor: none came with it, see https://huggingface.co/facebook/VGGT-1B",
    ]


def test_licence_files_go_with_an_export_and_are_missed_where_there_is_the_config_alone(published, tmp_path, capsys):
    assert export(published, tmp_path / "hub", write_facts(tmp_path, "parts")) == 0
    assert texts_in(tmp_path / "hub") == TEXTS
    assert set(TEXTS) <= set(json.loads((tmp_path / "hub" / MANIFEST).read_text())["files"])
    assert f"text of point_encoder: {tmp_path / 'hub' / list(TEXTS)[2]}" in licences(tmp_path / "hub", capsys)
    assert check_files(tmp_path / "hub") == []

    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((published / "config.json").read_bytes())
    line = f"text of point_encoder: {list(TEXTS)[2]} of the assembled checkpoint, and not here"
    assert line in licences(tmp_path / "config", capsys)


def test_assemble_says_where_licence_files_are(tmp_path, capsys):
    make_internvl(tmp_path, vision=TINY_VISION, text=TINY_TEXT)
    (tmp_path / "own" / "LICENSE").write_text("The terms of InternVL.\n")
    points, _ = make_geometry(tmp_path)
    arguments = ["--init-from", str(tmp_path / "own"), "--points", points, "--no-reconstructor"]
    out = tmp_path / "out"
    assert main(["assemble", str(out), *arguments, "--model-overrides", json.dumps(SMALL_DRM)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"text of vision_language_model: {out / 'licenses/vision_language_model-LICENSE'}",
        "text of point_encoder: none came with it",
        f"assembled: {out}",
    ]
    assert texts_in(out) == {"licenses/vision_language_model-LICENSE": "The terms of InternVL.\n"}


@pytest.mark.parametrize("names", ["licenses/a", ["licenses/../../a"], ["/etc/passwd"], ["licenses/.a"], [1]])
def test_recorded_texts_may_not_lead_elsewhere(published, tmp_path, capsys, names):
    config = json.loads((published / "config.json").read_text())
    config["parts"][0]["texts"] = names
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["licences", str(tmp_path)]) == 2
    assert f"must be names such as 'licenses/point_encoder-LICENSE', got {names!r}" in capsys.readouterr().err
