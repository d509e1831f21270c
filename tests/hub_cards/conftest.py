# SPDX-License-Identifier: Apache-2.0
import shutil
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
