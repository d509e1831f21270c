# SPDX-License-Identifier: Apache-2.0
"""The wheel, as a stranger gets it: built from the source distribution, in a clean environment, from an empty folder."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build from the files that git knows, so that ignored and forgotten files cannot help."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """
    An environment that has the wheel and this interpreter's libraries, but not this checkout.

    The libraries come by a .pth file rather than by pip, because torch alone is a download of hundreds of megabytes. An
    editable install is itself a .pth file, which is not read from a folder that is added in this way.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    libraries = run(sys.executable, "-c", purelib, cwd=folder).strip()
    own = Path(run(python, "-c", purelib, cwd=folder).strip())
    (own / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin"


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"geode", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    for name in ("geode/modeling_geode/modeling_geode.py", "geode/tiny/model.safetensors", "geode/tiny/config.json"):
        assert name in names
    for name in ("room.mp4", "questions.jsonl", "scene.json"):
        assert f"geode/assets/embedded_scene/{name}" in names
    assert [name for name in names if name.endswith((".pyc", ".pyo")) or "test" in name] == []


@pytest.mark.slow
def test_wheel_runs_the_demo_from_an_empty_folder(installed, tmp_path):
    assert run(installed / "python", "-c", "import geode; print(geode.__file__)", cwd=tmp_path).startswith(
        str(installed.parent)
    )
    output = run(installed / "geode", "demo", "--out", "picture", cwd=tmp_path)
    assert output.splitlines()[-1] == f"picture: {Path('picture') / 'scene.png'}"
    assert (tmp_path / "picture" / "scene.png").is_file()
    assert output.count("answer: ") > 10


@pytest.mark.slow
def test_wheel_answers_about_a_video_from_an_empty_folder(installed, tmp_path):
    scene = "import geode; print(geode.embedded_scene())"
    video = Path(run(installed / "python", "-c", scene, cwd=tmp_path).strip()) / "room.mp4"
    output = run(installed / "geode", "ask", video, "What is the size of this room (in square meters)?", cwd=tmp_path)
    assert output.startswith("answer: ")


@pytest.mark.slow
def test_wheel_exports_a_folder_with_its_code(installed, tmp_path):
    assert run(installed / "geode", "export", "hub", cwd=tmp_path) == "exported: hub\n"
    assert (tmp_path / "hub" / "modeling_geode.py").is_file()
    assert (tmp_path / "hub" / "processing_geode.py").is_file()
    assert (tmp_path / "hub" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert run(installed / "geode", "check", "hub", cwd=tmp_path).endswith("checked: hub, no problems\n")
