# SPDX-License-Identifier: Apache-2.0
"""What is shipped runs no code out of files or text: the security rules of ruff (those of bandit), which need no exception but three."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "benchmarks",
    "configuration",
    "data",
    "evaluation",
    "geode",
    "hub_cards",
    "modeling_geode",
    "trainers",
    "setup.py",
)
# Assertions state what cannot be, "passwords" are names of tokens, and programs are started from lists of arguments, without a shell.
HARMLESS = "S101,S105,S603"


def find_dangers(*paths: Path | str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "S",
        "--ignore",
        HARMLESS,
    ]
    return subprocess.run(
        [*command, "--output-format", "concise", *map(str, paths)], cwd=ROOT, capture_output=True, text=True
    )


def find_unsafe_loads(code: str) -> list[int]:
    """Lines that call a `load` of torch or numpy which may unpickle; ruff has no rule for them."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load")]
    safe = {"torch": "weights_only=True", "np": "allow_pickle=False", "numpy": "allow_pickle=False"}
    return [
        call.lineno
        for call in loads
        if safe[ast.unparse(call.func).partition(".")[0]] not in [ast.unparse(keyword) for keyword in call.keywords]
    ]


def list_files() -> list[Path]:
    return [
        path for name in SOURCES for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]


def test_sources_load_no_pickle_evaluate_no_text_and_start_no_shell():
    found = find_dangers(*SOURCES)
    assert found.returncode == 0, found.stdout


def test_no_rule_is_switched_off_in_the_sources():
    """`noqa` would hide what the test above looks for."""
    files = [
        path for name in SOURCES for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    assert len(files) > 100
    silenced = [path.name for path in files if "noqa: S" in path.read_text("utf-8")]
    assert silenced == []


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle\npickle.load(file)", "S301"),
        ("eval(text)", "S307"),
        ("exec(text)", "S102"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "S506"),
        ("import subprocess\nsubprocess.run(f'ls {name}', shell=True)", "S602"),
        ("import os\nos.system(text)", "S605"),
        ("import tarfile\ntarfile.open(path).extractall()", "S202"),
        ("import tempfile\ntempfile.mktemp()", "S306"),
        ("import requests\nrequests.get(url, verify=False)", "S501"),
        ("try:\n    run()\nexcept Exception:\n    pass", "S110"),
    ],
)
def test_each_danger_would_be_found(tmp_path, code, rule):
    (tmp_path / "danger.py").write_text(f"{code}\n")
    found = find_dangers(tmp_path)
    assert found.returncode == 1
    assert f" {rule} " in found.stdout


def test_arrays_and_checkpoints_are_loaded_without_pickles():
    found = {path.name: find_unsafe_loads(path.read_text("utf-8")) for path in list_files()}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "is_safe"),
    [
        ("torch.load(path, map_location='cpu', weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("np.load(path)", False),
        ("np.load(path, allow_pickle=False)", True),
        ("json.load(file)", True),
    ],
)
def test_loads_that_may_unpickle_are_found(code, is_safe):
    assert find_unsafe_loads(f"x = 1\ny = {code}") == ([] if is_safe else [2])


# ---- code of a checkpoint ----

CALL = re.compile(r"[\w.]*from_pretrained\(((?:[^()]|\([^()]*\))*)\)")


def unpinned_calls(text: str) -> list[str]:
    """Calls that run a repository's code without saying of which commit."""
    calls = [match[1] for match in CALL.finditer(text)]
    return [call for call in calls if "trust_remote_code=True" in call and "revision=" not in call]


def test_every_snippet_that_runs_a_repositorys_code_names_its_revision():
    folders = (*SOURCES[:-1], "docs", "examples")
    texts = [
        path for folder in folders for kind in ("md", "py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    texts += list(ROOT.glob("*.md"))
    assert len(texts) > 200
    found = {path.relative_to(ROOT).as_posix(): unpinned_calls(path.read_text("utf-8")) for path in texts}
    # This one loads a folder, in the process that `geode check` starts for it.
    assert found.pop("hub_cards/stranger.py") == ["folder, trust_remote_code=True"]
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_calls_without_a_revision_are_found():
    assert unpinned_calls('x = AutoModel.from_pretrained(f("a/b"), trust_remote_code=True)') != []
    assert unpinned_calls('AutoModel.from_pretrained("a/b", revision="1f", trust_remote_code=True).eval()') == []
    assert unpinned_calls('AutoModel.from_pretrained("a/b")') == []


def test_recipes_run_no_remote_code():
    paths = list((ROOT / "configuration").rglob("*.yaml"))
    assert len(paths) > 10
    for path in paths:
        keys = {key for mapping in walk(yaml.safe_load(path.read_text("utf-8"))) for key in mapping}
        assert not keys & {"trust_remote_code", "dataset_trust_remote_code"}, path


def walk(value) -> list[dict]:
    """Every mapping in a document."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) else []), *(found for entry in inner for found in walk(entry))]
