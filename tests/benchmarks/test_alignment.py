# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import alignment


def test_errors_of_two_rooms_are_those_of_their_rows(tmp_path, capsys, monkeypatch):
    pytest.importorskip("embreex", reason="rendering needs embreex")
    monkeypatch.setattr(alignment, "CASES", [(3, 0.0, 0.0)])
    alignment.main(["--num-rooms", "2", "--json", str(tmp_path / "errors.json")])
    ((case, rows),) = [
        (entry["case"], entry["errors"]) for entry in json.loads((tmp_path / "errors.json").read_text())
    ]
    assert case == [3, 0.0, 0.0]
    assert len(rows) == 2
    # Exact geometry: gravity to a tenth of a degree, each scale to one per cent.
    assert all(row["gravity_deg"] < 0.2 for row in rows)
    assert all(row[source] < 1 for row in rows for source in alignment.SOURCES)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| 3 | 0 % | up to 0 deg | 2 of 2 | ")
    assert alignment.spread([row["camera_height"] for row in rows]) in line


def test_turns_are_of_the_cameras_own_axes():
    """A quarter of a roll takes the camera's x to its y; a quarter of a tilt takes its y to its z."""
    assert alignment.turn(alignment.math.pi / 2, 0.0)[:, 0].round(9).tolist() == [0.0, 1.0, 0.0]
    assert alignment.turn(0.0, alignment.math.pi / 2)[:, 1].round(9).tolist() == [0.0, 0.0, 1.0]
