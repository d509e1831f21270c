# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

import geode
from geode.cli import main
from geode.hub_cards.licences import find_terms, verdict
from geode.hub_cards.terms import Part, combined_terms


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_card(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n\n# A model\n")
    return folder


# What publishers state is in the specification of the parts: Qwen2.5-1.5B Apache-2.0, InternViT MIT, VGGT-1B non-commercial and
# VGGT-1B-Commercial with terms of its own, Sonata's weights CC-BY-NC-4.0.
@pytest.mark.parametrize(
    ("name", "want", "permits"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0", True),
        ("OpenGVLab/InternViT-300M-448px-V2_5", "mit", True),
        ("facebook/VGGT-1B", "cc-by-nc-4.0", False),
        ("facebook/VGGT-1B-Commercial", "other", True),
        ("facebook/sonata", "cc-by-nc-4.0", False),
        ("OpenGVLab/InternVL3-2B-hf", None, None),
    ],
)
def test_terms_of_published_parts(tmp_path, name, want, permits):
    part = find_terms("encoder", name, COMMIT, tmp_path)
    assert (part.name, part.source, part.revision) == ("encoder", name, COMMIT)
    assert (part.license, part.permits_commerce) == (want, permits)
    assert part.stated_by == (None if want is None else "publisher")
    # A copy may be of anything: its name tells nothing.
    copy = find_terms("encoder", name.rpartition("/")[2], None, tmp_path)
    assert (copy.license, copy.permits_commerce, copy.stated_by) == (None, None, None)


def test_terms_of_ones_own_are_linked(tmp_path):
    link = "https://huggingface.co/facebook/VGGT-1B-Commercial"
    assert find_terms("encoder", "facebook/VGGT-1B-Commercial", COMMIT, tmp_path).link == link
    write_card(tmp_path, "license: other\nlicense_name: vggt\nlicense_link: LICENSE.txt")
    part = find_terms("encoder", "facebook/VGGT-1B-Commercial", COMMIT, tmp_path)
    # A file beside their card is not one beside ours.
    assert (part.license, part.license_name, part.link) == ("other", "vggt", f"{link}/blob/{COMMIT}/LICENSE.txt")
    assert part.permits_commerce is True
    assert find_terms("encoder", "vggt", None, tmp_path).link is None
    write_card(tmp_path, "license: other\nlicense_link: https://a.b/terms")
    assert find_terms("encoder", "vggt", None, tmp_path).link == "https://a.b/terms"


@pytest.mark.parametrize(
    ("card", "want", "permits"),
    [
        ("license: mit", "mit", True),
        ("license: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", False),
        ("license: cc-by-sa-4.0", "cc-by-sa-4.0", None),
        ("license: other\nlicense_name: qwen-research", "other", False),
        ("license: other\nlicense_name: fair-noncommercial", "other", False),
        ("license: other\nlicense_name: own-terms", "other", None),
        ("license: [mit, cc-by-nc-4.0]", "other", False),
        ("tags: [vision]", None, None),
    ],
)
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_card_speaks_for_a_part_that_is_not_known(tmp_path, card, want, permits, revision):
    part = find_terms("encoder", "org/part", revision, write_card(tmp_path, card))
    assert (part.license, part.permits_commerce) == (want, permits)
    assert part.stated_by == (None if want is None else "card")


def test_a_card_about_code_does_not_free_weights_and_a_strict_one_binds(tmp_path):
    part = find_terms("encoder", "facebook/sonata", COMMIT, write_card(tmp_path, "license: apache-2.0"))
    assert (part.license, part.permits_commerce) == ("cc-by-nc-4.0", False)
    part = find_terms("encoder", "Qwen/Qwen2.5-1.5B-Instruct", COMMIT, write_card(tmp_path, "license: cc-by-nc-4.0"))
    assert (part.license, part.permits_commerce) == ("apache-2.0", False)


def parts_of(*terms):
    return [
        Part(f"part{index}", "a copy", licence, is_commercial=permits)
        for index, (licence, permits) in enumerate(terms)
    ]


@pytest.mark.parametrize(
    ("terms", "want"),
    [
        ([("mit", None), ("apache-2.0", None), ("cc-by-4.0", None)], ("apache-2.0", True)),
        ([("mit", None), ("cc-by-nc-4.0", None), ("cc-by-nc-4.0", None)], ("cc-by-nc-4.0", False)),
        ([("cc-by-nc-4.0", None), ("cc-by-nc-sa-4.0", None)], ("other", False)),
        ([("cc-by-nc-4.0", None), ("other", True)], ("other", False)),
        ([("cc-by-nc-4.0", None), (None, None)], ("other", False)),
        ([("apache-2.0", False)], ("other", False)),
        ([("mit", None), ("other", True)], ("other", True)),
        ([("mit", None), ("gpl-3.0", None)], ("other", None)),
        ([("mit", None), (None, None)], (None, None)),
    ],
)
def test_the_whole_is_as_strict_as_its_strictest_part(terms, want):
    assert combined_terms("apache-2.0", parts_of(*terms)) == want


def test_the_verdict_names_causes_and_what_is_not_known():
    text = verdict(parts_of(("cc-by-nc-4.0", None), ("mit", None), (None, None)))
    assert text == (
        "the whole: other, not for commercial use, because of part0; the licence of part2 is to be found out before anything is published"
    )
    assert verdict(parts_of(("mit", None))) == "the whole: apache-2.0"
    assert verdict(parts_of(("other", True))) == "the whole: other: the terms of each part hold, read them before use"
    want = "the whole: cc-by-nc-sa-4.0, not for commercial use, because of what was added"
    assert verdict(parts_of(("mit", None)), "cc-by-nc-sa-4.0") == want


def report(capsys, folder) -> list[list[str]]:
    """The cells of each line that `geode licences` prints."""
    assert main(["licences", str(folder)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def test_report_lists_every_part(capsys, tmp_path):
    parts = [
        find_terms("reconstructor", "facebook/VGGT-1B-Commercial", COMMIT, tmp_path),
        find_terms("language_model", "qwen", None, tmp_path),
    ]
    config = {"model_type": "geode", "parts": [part._asdict() for part in parts]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert report(capsys, tmp_path) == [
        ["part", "from", "licence", "stated by", "commercial use"],
        ["reconstructor", f"facebook/VGGT-1B-Commercial@{COMMIT[:12]}", "other", "publisher", "yes"],
        ["language_model", "qwen (a local copy)", "not known", "nobody", "not known"],
        ["terms of reconstructor: https://huggingface.co/facebook/VGGT-1B-Commercial"],
        [],
        ["the whole: not known; the licence of language_model is to be found out before anything is published"],
    ]


def test_a_reconstructor_that_was_attached_later_is_not_forgotten(capsys, tmp_path):
    part = find_terms("language_model", "Qwen/Qwen2.5-1.5B-Instruct", COMMIT, tmp_path)
    config = {"model_type": "geode", "reconstructor_config": {"hidden_size": 8}, "parts": [part._asdict()]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    *_, line, _, whole = report(capsys, tmp_path)
    assert line[0] == "reconstructor"
    assert whole[0].startswith("the whole: not known; the licence of reconstructor is to be found out")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("facebook/sonata", "`parts` of config.json must be a list of objects, got 'facebook/sonata'"),
        ([{"part": "point_encoder"}], "`name` of `parts` of config.json must be a str, got None"),
        ([{"name": "a", "source": "b", "is_commercial": "yes"}], "`is_commercial` of .* must be a bool, got 'yes'"),
    ],
)
def test_a_record_that_cannot_be_read_is_an_error(tmp_path, capsys, parts, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "geode", "parts": parts}))
    assert main(["licences", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_report_of_a_checkpoint_without_parts_is_what_its_card_states(capsys, tmp_path):
    assert main(["licences", str(geode.tiny_checkpoint())]) == 0
    assert capsys.readouterr().out == (
        "parts: none recorded\nthe whole: apache-2.0, as its card states (commercial use: yes)\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "geode"}')
    assert main(["licences", str(tmp_path)]) == 2
    assert "does not say what it was made from" in capsys.readouterr().err
    assert main(["licences", str(tmp_path / "none")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


def test_report_needs_a_configuration(capsys, tmp_path):
    assert main(["licences", str(tmp_path)]) == 2
    assert f"`checkpoint` must hold a config.json, and '{tmp_path}' holds none" in capsys.readouterr().err
