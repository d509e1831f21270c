# SPDX-License-Identifier: Apache-2.0
"""The Space under attack and under load, over HTTP against the real server on loopback: files, addresses, floods, and who gets which answer."""

import asyncio
import dataclasses
import json
import os
import re
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from geode import SceneGeometry
from geode.commands import load_checkpoint
from geode.hub_cards.space import guard, room
from geode.hub_cards.space.guard import stored_bytes
from geode.hub_cards.space.interface import MAX_WAITING
from geode.hub_cards.space.room import ask_room, describe_reply, open_room, small_frame, small_geometry
from tests.hub_cards.common_space import ROOM, Visitor
from tests.trainers.common_precompute import make_video


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(page):
    with httpx.Client(base_url=page, timeout=300) as client:
        yield client


def given_file(path: object) -> dict:
    """A file as the page names one in a call, which its visitor has not uploaded."""
    return {"path": str(path), "orig_name": "room.mp4", "meta": {"_type": "gradio.FileData"}}


# ---- files ----


def test_no_file_is_served_not_even_an_upload_to_its_owner(page, client, uploads_folder):
    uploaded = Path(Visitor(client).upload(ROOM / "room.mp4")["path"])
    assert uploaded.is_file()
    outside = os.path.relpath("/etc/passwd", uploaded.parent)
    paths = [
        uploaded,
        uploads_folder,
        "/etc/passwd",
        "/proc/self/environ",
        ROOT / "README.md",
        ROOT / ".git" / "config",
    ]
    paths += [uploaded.parent / outside, f"{uploaded.parent}/%2e%2e/%2e%2e/etc/passwd", "http://127.0.0.1:9/x"]
    for path in paths:
        for call in (f"gradio_api/file={path}", f"gradio_api/file/{path}", f"gradio_api/proxy={path}", f"file={path}"):
            response = client.get(call)
            # gradio's first page stands for what it does not know.
            assert response.status_code in (403, 404), call
            assert b"root:" not in response.content
    for name in ("static", "assets", "svelte"):
        assert client.get(f"{name}/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd").status_code in (403, 404)
    uploaded.unlink()


@pytest.mark.parametrize(
    "name", ["run/ask", "api/ask", "component_server", "process_recording", "deep_link", "vibe-edit", "file"]
)
def test_calls_that_the_page_does_not_make_are_refused(client, name):
    assert client.post(f"gradio_api/{name}", json={"data": []}).status_code == 403
    assert client.post(f"gradio_api//{name}", json={"data": []}).status_code == 403


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/environ", ROOT / "README.md", ROOM / "room.mp4", "../../etc/passwd"]
)
def test_files_of_the_server_are_no_uploads(client, path):
    visitor = Visitor(client)
    for values in (
        [given_file(path), None, True, None],
        [None, given_file(path), False, None],
        [None, None, given_file(path), None],
    ):
        # Where gradio itself refuses, the page says no more than that it does.
        assert not isinstance(visitor.call("encode", *values), list)
    assert "There is no room" in visitor.call("ask", None, "Locate the sofa.")
    assert not isinstance(visitor.call("ask", None, given_file(path)), list)


def test_addresses_are_not_fetched(client):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/room.mp4"
        visitor = Visitor(client)
        for given in (given_file(address), {**given_file("room.mp4"), "url": address}):
            assert not isinstance(visitor.call("encode", given, None, True, None), list)
        # Not only where a file belongs.
        assert "An address is not fetched" in visitor.call("ask", None, given_file("http://example.invalid/a"))
        server.shutdown()
        thread.join()
    assert asked == []


def test_a_forged_session_is_not_taken(client):
    """The state stands in the call, too; the server takes its own."""
    forged = {"room": {"name": "x"}, "boxes": [], "chat": []}
    assert "There is no room" in Visitor(client).call("ask", forged, "Locate the sofa.")


def test_uploads_lie_in_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    folder = guard.uploads_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert guard.uploads_folder() == folder == Path(os.environ["GRADIO_TEMP_DIR"])
    folder.rmdir()


# ---- floods ----


def test_calls_and_uploads_have_a_size(page, client, uploads_folder):
    before = stored_bytes(uploads_folder, max_age_s=3600)
    call = {"data": [None, "x" * guard.MAX_CALL_BYTES], "fn_index": 0, "session_hash": "a"}
    response = client.post("gradio_api/queue/join", json=call)
    assert response.status_code == 413
    assert "at most 262,144 bytes" in response.json()["detail"]
    half = bytes(40 * 2**20)
    # Two files of one form are each below the limit for a file, and above it together.
    response = client.post("gradio_api/upload", files=[("files", (f"{number}.mp4", half)) for number in range(2)])
    assert response.status_code == 413
    assert "at most 67,108,864 bytes" in response.json()["error"]
    assert stored_bytes(uploads_folder, max_age_s=3600) - before < 66 * 2**20
    # What broke off is deleted when it is old enough.
    assert stored_bytes(uploads_folder, max_age_s=-1) == 0
    assert [path for path in uploads_folder.rglob("*") if path.is_file()] == []


def make_guard(folder: Path, *, jobs: int = 0):
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"passed"})

    return guard.Guard(app, folder=folder, max_upload_bytes=1000, max_age_s=60.0, jobs_of=lambda visitor: jobs)


def post(app, path: str, content: bytes) -> httpx.Response:
    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content)

    return asyncio.run(send())


def test_uploads_that_nobody_encodes_are_bounded_and_age(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "room.mp4").write_bytes(bytes(70_000))
    (tmp_path / "partial").write_bytes(bytes(300))
    monkeypatch.setattr(guard, "MAX_STORED_BYTES", 140_000)
    assert post(make_guard(tmp_path), "/gradio_api/upload", b"x").status_code == 200
    monkeypatch.setattr(guard, "MAX_STORED_BYTES", 130_000)
    refused = post(make_guard(tmp_path), "/gradio_api/upload", b"x")
    assert refused.status_code == 507
    assert "Too many uploads wait" in refused.json()["error"]
    old = time.time() - 61
    os.utime(tmp_path / "a" / "room.mp4", (old, old))
    assert post(make_guard(tmp_path), "/gradio_api/upload", b"x").status_code == 200
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]


def test_a_visitor_may_have_so_many_jobs(tmp_path):
    body = json.dumps({"session_hash": "a", "data": []}).encode()
    for path in ("/gradio_api/queue/join", "/gradio_api/call/ask"):
        assert post(make_guard(tmp_path, jobs=guard.MAX_JOBS_PER_VISITOR - 1), path, body).text == "passed"
        refused = post(make_guard(tmp_path, jobs=guard.MAX_JOBS_PER_VISITOR), path, body)
        assert refused.status_code == 429
        assert "Wait for an answer" in refused.json()["detail"]
    assert post(make_guard(tmp_path, jobs=9), "/gradio_api/reset", body).text == "passed"


def test_what_a_session_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr(room, "MAX_POINTS_KEPT", 1000)
    monkeypatch.setattr(room, "MAX_CAMERAS_KEPT", 2)
    whole = SceneGeometry.load(ROOM / "geometry")
    small = small_geometry(whole)
    assert (small.num_points, small.num_cameras) == (1000, 2)
    assert torch.equal(small.points[[0, -1]], whole.points[[0, -1]])
    assert torch.equal(small.world_from_cam[-1], whole.world_from_cam[-1])
    frame = np.arange(1080 * 1920 * 3, dtype=np.uint32).astype(np.uint8).reshape(1080, 1920, 3)
    assert small_frame(frame).shape == (240, 427, 3)
    assert np.array_equal(small_frame(frame[:96, :128]), frame[:96, :128])


def test_a_conversation_has_an_end(monkeypatch):
    import gradio

    from geode.hub_cards.space import interface

    monkeypatch.setattr(interface, "MAX_TURNS", 1)
    session = interface.Session(chat=({"role": "user"}, {"role": "assistant"}))
    with pytest.raises(gradio.Error, match=r"may have 1 questions here\. Clear it"):
        interface.on_question(None, None, session, "Locate the sofa.")


# ---- load ----


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint()


def write_room(folder: Path, number: int) -> tuple[Path, Path]:
    """A video of its own, and the embedded room, larger for each number."""
    whole, factor = SceneGeometry.load(ROOM / "geometry"), 1 + 0.25 * number
    poses = whole.world_from_cam.clone()
    poses[:, :3, 3] *= factor
    dataclasses.replace(whole, points=whole.points * factor, world_from_cam=poses).save(folder / f"scene_{number}")
    video = folder / f"room_{number}.mp4"
    make_video(video, seed=number)
    archive = folder / f"geometry_{number}.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for name in ("geometry.json", "geometry.safetensors"):
            opened.write(folder / f"scene_{number}" / name, name)
    return video, archive


def plain_answer(text: str) -> str:
    """Without what depends on when it was asked: the time, and the number of a box in its conversation."""
    return re.sub(r"Box \d+", "Box", text.partition("<sub>")[0])


def answers_alone(checkpoint, video: Path, archive: Path, questions) -> list[str]:
    """What the page must show, computed here."""
    opened = open_room(*checkpoint, video, archive)
    return [plain_answer(describe_reply(ask_room(*checkpoint, opened, question), 1)) for question in questions]


def answers_of_visitor(page: str, video: Path, archive: Path, questions) -> list[str]:
    """Upload, encode and ask, as one visitor; other visitors do so meanwhile."""
    with httpx.Client(base_url=page, timeout=600) as client:
        visitor = Visitor(client)
        found = visitor.call("encode", visitor.upload(video), visitor.upload(archive), False, None)
        assert isinstance(found, list), found
        chats = [visitor.call("ask", None, question)[1] for question in questions]
    texts = [chat[-1]["content"] for chat in chats]
    # The conversation is the visitor's own, whole and in order.
    assert [len(chat) for chat in chats] == [2 * (number + 1) for number in range(len(questions))]
    return [plain_answer(text if isinstance(text, str) else text[0]["text"]) for text in texts]


def check_visitors(page: str, checkpoint, folder: Path, *, num_visitors: int, questions) -> None:
    rooms = [write_room(folder, number) for number in range(num_visitors)]
    alone = [answers_alone(checkpoint, *files, questions) for files in rooms]
    assert len({tuple(answers) for answers in alone}) == num_visitors
    with ThreadPoolExecutor(num_visitors) as pool:
        found = list(pool.map(lambda files: answers_of_visitor(page, *files, questions), rooms))
    assert found == alone


QUESTIONS = ("What is the size of this room (in square meters)?", "Locate the sofa.")


def test_visitors_at_a_time_get_the_answers_about_their_own_rooms(page, checkpoint, tmp_path):
    check_visitors(page, checkpoint, tmp_path, num_visitors=3, questions=QUESTIONS)


def join(client: httpx.Client, name: str, *values) -> tuple[Visitor, httpx.Response]:
    visitor = Visitor(client)
    job = {"data": values, "fn_index": visitor.numbers[name], "session_hash": visitor.session}
    return visitor, client.post("gradio_api/queue/join", json=job)


def result_of(client: httpx.Client, visitor: Visitor) -> dict:
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": visitor.session}) as lines:
        messages = (json.loads(line.removeprefix("data:")) for line in lines.iter_lines() if line)
        return next(message for message in messages if message["msg"] == "process_completed")


def test_a_full_queue_says_so_and_answers_those_that_wait(client):
    busy, response = join(client, "embedded")
    assert response.status_code == 200
    waiting = [join(client, "ask", None, "How many?") for _ in range(MAX_WAITING + 2)]
    assert {response.status_code for _, response in waiting} == {200, 503}
    refused = next(response for _, response in waiting if response.status_code == 503)
    assert f"Queue is full. Max size is {MAX_WAITING}" in refused.json()["detail"]
    assert result_of(client, busy)["success"]
    for visitor, response in waiting:
        if response.status_code == 200:
            assert "There is no room" in result_of(client, visitor)["output"]["error"]


def resident_bytes(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_flat_and_the_queue_fair_over_many_requests(page, page_process, checkpoint, tmp_path):
    """Eight rooms at a time, three rounds; then one visitor floods and another is answered all the same."""
    sizes = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        check_visitors(page, checkpoint, tmp_path / str(number), num_visitors=8, questions=QUESTIONS * 4)
        sizes.append(resident_bytes(page_process))
    # A round leaves eight rooms, which stay until there are 50 or they are an hour old.
    assert sizes[2] - sizes[1] < 8 * 10 * 2**20
    with httpx.Client(base_url=page, timeout=600) as client:
        flooding = Visitor(client)
        job = {"data": [], "fn_index": flooding.numbers["embedded"], "session_hash": flooding.session}
        taken = [client.post("gradio_api/queue/join", json=job).status_code for _ in range(10)]
        assert taken == [200] * guard.MAX_JOBS_PER_VISITOR + [429] * (10 - guard.MAX_JOBS_PER_VISITOR)
        other = Visitor(client)
        assert isinstance(other.call("embedded"), list)
