# SPDX-License-Identifier: Apache-2.0
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geode.cli import build_parser, main
from geode.trainers.plan import read_plan, run
from geode.trainers.plan_arguments import Assumptions, parse_devices


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configuration" / "recipes"
STAGE2 = RECIPES / "stage2" / "geode_1.5b_8x80gb.yaml"
ALIGNMENT = RECIPES / "alignment" / "geode_1.5b_8x80gb.yaml"
LORA = RECIPES / "stage2" / "geode_1.5b_lora_1x24gb.yaml"

# transformers warns of options that concern an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore")


def planned(*arguments: str) -> str:
    return run(build_parser().parse_args(["plan", *arguments]))


def table(text: str, title: str) -> list[list[str]]:
    (body,) = re.findall(rf"^\*\*{re.escape(title)}\*\*\n\n(.*?)\n\n", text, flags=re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return [rows[0], *rows[2:]]


def test_table_of_the_documents_is_current():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^geode plan (configuration/.*)$", page, flags=re.MULTILINE)
    (shown,) = re.findall(r"<!-- plan: begin -->\n(.*)\n<!-- plan: end -->", page, flags=re.DOTALL)
    assert shown == planned(*(str(ROOT / name) for name in command.split()))


def test_plan_of_stage_2_agrees_with_a_rule_of_thumb():
    """Over 7 FLOP for each parameter and token with activation checkpointing, and attention on top; hours by definition."""
    plan = read_plan(STAGE2, Assumptions())
    assert plan.rows == -(-931_000 // 8)
    assert plan.tokens == 16 * 256 + 16 + 8 * 96
    rule = plan.facts.trained["language_model"] * plan.tokens
    assert 7 * rule < plan.training < 12 * rule
    text = planned(str(STAGE2), "--devices", "2xH100", "--mfu", "0.5", "--encoder-mfu", "0.25")
    hours = plan.rows * (plan.training / 0.5 + plan.encoders / 0.25) / 989e12 / 3600
    header, row, _, encoding = table(text, "Accelerator-hours, and hours of the clock")
    assert header == ["Recipe", "2xH100"]
    assert row == ["stage2/geode_1.5b_8x80gb", f"{hours:.1f} ({hours / 2:.1f})"]
    assert encoding[0] == "encoding 1,000,000 videos"


def test_every_assumption_is_printed_and_changes_with_its_option():
    values = {name: 2 * value for name, value in vars(Assumptions()).items()}
    options = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    text = planned(str(ALIGNMENT), *options)
    for name, value in values.items():
        printed = value if isinstance(value, int) else f"{value:g}"
        assert f"- `--{name.replace('_', '-')} {printed}`: " in text
    assert "- dense bf16 TFLOP/s of one accelerator, by its maker: 8xA100-80GB 312, 8xH200 989, 64xH100 989" in text


def test_adapter_trains_less_and_a_store_spares_the_encoders():
    full, adapter = (read_plan(path, Assumptions()) for path in (STAGE2, LORA))
    assert adapter.encoders == 0 < full.encoders
    assert adapter.facts.reconstructor_flops == 0 < full.facts.reconstructor_flops
    assert 0 < sum(adapter.facts.trained.values()) < 0.1 * sum(full.facts.trained.values())
    assert adapter.facts.layer_trained == adapter.facts.layer_parameters - full.facts.layer_parameters


def test_steps_of_a_recipe_come_before_its_records(capsys, tmp_path):
    recipe = tmp_path / "stage2" / "short.yaml"
    recipe.parent.mkdir()
    recipe.write_text(STAGE2.read_text("utf-8") + "max_steps: 10\n", encoding="utf-8")
    assert read_plan(recipe, Assumptions()).rows == 10 * 8 * 1 * 2
    assert main(["plan", str(recipe), "--rows", "80"]) == 2
    assert "`--rows` 80 has no effect" in capsys.readouterr().err


def test_rows_and_what_does_not_fit_are_said():
    text = planned(str(STAGE2), "--devices", "8xSMALL:100:30", "--rows", "80")
    assert table(text, "Work")[1][2] == "10"
    memory = {row[1]: row[2] for row in table(text, "Memory of one process, GB")[1:]}
    assert memory["DDP"].endswith(" (too much)")
    assert not memory["FSDP2"].endswith(" (too much)")


def test_devices_are_read():
    assert parse_devices("64xH100")[1:] == (64, 989e12, 80e9)
    assert parse_devices("1xX.1-b:12.5:24")[1:] == (1, 12.5e12, 24e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "8xT4"], "`devices` must be as 8xH200"),
        (["--devices", "0xH200"], "got '0xH200'"),
        (["--devices", "2xX:0:4"], "`devices` must have positive TFLOPS and GB, got '2xX:0:4'"),
        (["--mfu", "0"], "`mfu` must be a positive number, got 0.0"),
        (["--rows", "0"], "`rows` must be a whole number of at least 1, got 0"),
    ],
)
def test_mistakes_end_with_one_line(options, message, capsys):
    assert main(["plan", str(STAGE2), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_recipe_must_be_there_and_lie_in_a_folder_of_its_stage(capsys, tmp_path):
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "`recipe` must be a YAML file" in capsys.readouterr().err
    shutil.copy(STAGE2, tmp_path / "mine.yaml")
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 2
    assert "called as its stage, one of ('alignment', 'stage1', 'stage2')" in capsys.readouterr().err


def test_help_loads_no_torch():
    script = (
        "import sys, geode.cli\ntry: geode.cli.main(['plan', '--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--mfu" in result.stdout
    assert {"torch", "transformers", "numpy", "yaml"}.isdisjoint(result.stdout.splitlines()[-1].split())
