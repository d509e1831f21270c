# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Space upload, and how they talk to it."""

import json
import uuid
import zipfile
from pathlib import Path

from geode import embedded_scene


ROOM = embedded_scene()


def write_archive(path: Path, *, folder: str = "scene") -> Path:
    """Put the geometry of the embedded room into a .zip, in a folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in sorted((ROOM / "geometry").iterdir()):
            opened.write(file, f"{folder}/{file.name}")
    return path


class Visitor:
    """A browser's part of the conversation with the page, over plain HTTP: upload, join the queue, read what comes of it."""

    def __init__(self, client):
        self.client, self.session = client, uuid.uuid4().hex[:11]
        functions = client.get("config").raise_for_status().json()["dependencies"]
        self.numbers = {function["api_name"]: number for number, function in enumerate(functions)}

    def upload(self, path: Path) -> dict:
        with path.open("rb") as file:
            response = self.client.post("gradio_api/upload", files={"files": (path.name, file)})
        (where,) = response.raise_for_status().json()
        return {"path": where, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def call(self, name: str, *values) -> list | str:
        """What a function of the page returns, or the text of its error."""
        job = {"data": values, "fn_index": self.numbers[name], "session_hash": self.session}
        self.client.post("gradio_api/queue/join", json=job).raise_for_status()
        with self.client.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    return output["data"] if message["success"] else output["error"]
        raise AssertionError("the page sent no result")


__all__ = ["ROOM", "Visitor", "write_archive"]
