# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The tiny checkpoint as `geode export` writes it. Tests that change it take `folder`."""
    from geode.commands import export_model  # slow to import, and not every test needs it

    folder = tmp_path_factory.mktemp("exported") / "geode-tiny"
    export_model(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the export that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "geode-tiny"))


@pytest.fixture(scope="module")
def uploads_folder(tmp_path_factory) -> Path:
    """Where `page` keeps what is uploaded."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def served(uploads_folder) -> Iterator[tuple[str, int]]:
    """Address and process of the page of `geode demo --ui`, which a process of its own serves."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "geode.cli", "demo", "--ui", "--port", str(port)]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(uploads_folder)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        assert line.startswith("page: "), line
        yield line.removeprefix("page: ").strip(), server.pid
        server.terminate()


@pytest.fixture(scope="module")
def page(served) -> str:
    """The page's address."""
    return served[0]


@pytest.fixture(scope="module")
def page_process(served) -> int:
    """The id of the process that serves it."""
    return served[1]
