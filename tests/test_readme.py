# SPDX-License-Identifier: Apache-2.0
"""The README's example prints what the README says, and its links lead somewhere."""

import re
from pathlib import Path

import geode
from geode.modeling_geode.video_processing_geode import load_video_frames
from tests.modeling_geode.common_geode import tiny_vggt


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_example_prints_what_the_readme_says(capsys):
    (example, *_) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (promised,) = re.findall(r"^prints `([^`]+)`", TEXT, flags=re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert capsys.readouterr().out.strip() == promised


def test_example_with_a_reconstructor_runs(tmp_path):
    """As printed, but for a small random VGGT in the place of the public one, and the shipped video."""
    _, _, example, *_ = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    tiny_vggt(image_size=56).save_pretrained(tmp_path)
    public, video = 'convert_vggt_checkpoint("facebook/VGGT-1B")', '"room.mp4"'
    assert public in example
    assert video in example
    example = example.replace(public, f"VggtModel.from_pretrained({str(tmp_path)!r})")
    example = example.replace(video, repr(str(geode.embedded_scene() / "room.mp4")))
    checkpoint = geode.tiny_checkpoint()
    names = {
        "frames": load_video_frames(geode.embedded_scene() / "room.mp4", num_frames=4)[0],
        "model": geode.GeodeForConditionalGeneration.from_pretrained(checkpoint),
        "processor": geode.GeodeProcessor.from_pretrained(checkpoint),
    }
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert names["scene"].scale_source == "camera_height"
    assert len(names["encoded"].rationale_tokens) == names["processor"].num_rationale_tokens


def test_local_links_and_pictures_exist():
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT)
    assert len(targets) >= 8
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_is_short_and_leads_with_two_commands():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert lines.index("make demo     # asks a rendered room 26 questions and draws the answers") < 30
    assert "## Limitations" in lines
