# SPDX-License-Identifier: Apache-2.0
"""
What stands between visitors and gradio's server: it passes the calls that the page makes and no others, and bounds what they send.

gradio serves each file below its folder for uploads to whoever knows its path, fetches addresses that stand where a file is expected,
and keeps what was uploaded and never used. None of this is needed here.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from starlette.requests import ClientDisconnect


# First parts of gradio's paths that the page and gradio's client use. Files, proxies and recordings are not among them.
PASSED = (
    "app_id",
    "call",
    "cancel",
    "heartbeat",
    "info",
    "login_check",
    "queue",
    "reset",
    "startup-events",
    "theme.css",
    "upload",
    "upload_progress",
    "user",
)
MAX_CALL_BYTES = 2**18  # of a call that is no upload; a question and two names of files are far less
MAX_STORED_BYTES = 2 * 2**30  # of all uploads that nobody has encoded yet
MAX_JOBS_PER_VISITOR = 3  # that wait or run; so nobody fills the queue alone
_PREFIX = "/gradio_api/"
_FORM_BYTES = 2**16  # what a form adds to its file


class Guard:
    """
    ASGI middleware before gradio's server.

    Args:
        app (`Callable`):
            The server.
        folder (`Path`):
            Where it keeps uploads. What lies there for longer than `max_age_s` is deleted.
        max_upload_bytes (`int`):
            Largest upload.
        max_age_s (`float`):
            Age at which an upload is deleted.
        jobs_of (`Callable[[str], int]`):
            Number of a visitor's jobs that wait or run.
    """

    def __init__(
        self, app: Callable, *, folder: Path, max_upload_bytes: int, max_age_s: float, jobs_of: Callable[[str], int]
    ):
        self.app = app
        self.folder = folder
        self.max_upload_bytes = max_upload_bytes
        self.max_age_s = max_age_s
        self.jobs_of = jobs_of
        self._num_arriving = 0

    async def __call__(self, scope, receive, send):
        """Answer one request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _, is_call, path = scope["path"].partition(_PREFIX)
        kind = path.split("/")[0]
        if is_call and kind not in PASSED:
            await _refuse(send, 403, "This page serves no files and takes no such calls.")
        elif is_call and kind == "upload":
            await self._take_upload(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
        else:
            await self._take_call(scope, receive, send, is_job=path in ("queue/join", "queue/join/") or kind == "call")

    async def _take_upload(self, scope, receive, send):
        largest = self.max_upload_bytes + _FORM_BYTES
        stored = stored_bytes(self.folder, max_age_s=self.max_age_s)
        if stored + (self._num_arriving + 1) * largest > MAX_STORED_BYTES:
            await _refuse(send, 507, "Too many uploads wait to be encoded. Try again in some minutes.")
            return
        left = largest

        async def receive_bounded():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # The server's own limit is for each file of a form, of which there may be many.
            return message if left >= 0 else {"type": "http.disconnect"}

        self._num_arriving += 1
        try:
            await self.app(scope, receive_bounded, send)
        except ClientDisconnect:
            if left >= 0:
                raise
            await _refuse(send, 413, f"An upload may have at most {self.max_upload_bytes:,} bytes.")
        finally:
            self._num_arriving -= 1

    async def _take_call(self, scope, receive, send, *, is_job: bool):
        body = b""
        is_whole = False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > MAX_CALL_BYTES:
                await _refuse(
                    send, 413, f"A call may have at most {MAX_CALL_BYTES:,} bytes. Files are uploaded first."
                )
                return
        if is_job and self.jobs_of(_visitor_of(body)) >= MAX_JOBS_PER_VISITOR:
            await _refuse(
                send,
                429,
                f"You have {MAX_JOBS_PER_VISITOR} questions in the queue. Wait for an answer before you ask again.",
            )
            return
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again():
            return pending.pop() if pending else await receive()

        await self.app(scope, receive_again, send)


def uploads_folder() -> Path:
    """Return where gradio keeps uploads: GRADIO_TEMP_DIR, which is set to a new folder of this user alone if it is not."""
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="geode-uploads-")
    return Path(os.environ["GRADIO_TEMP_DIR"])


def stored_bytes(folder: Path, *, max_age_s: float) -> int:
    """
    Count what a folder of uploads holds, and delete what has lain there for too long: gradio forgets uploads that broke off.

    Args:
        folder (`Path`): The folder.
        max_age_s (`float`): Age at which a file is deleted.

    Returns:
        `int`: Bytes of the files that are left.
    """
    total, oldest = 0, time.time() - max_age_s
    for path in folder.iterdir() if folder.is_dir() else ():
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        try:
            stats = [file.stat() for file in files]
        except FileNotFoundError:  # encoded and deleted meanwhile
            continue
        size = sum(stat.st_size for stat in stats)
        if stats and max(stat.st_mtime for stat in stats) < oldest:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        else:
            total += size
    return total


def _visitor_of(body: bytes) -> str:
    """The visitor's name for the session; without one each call is a visitor of its own."""
    try:
        found = json.loads(body)
    except ValueError:  # which the server says better
        return ""
    return str(found.get("session_hash") or "") if isinstance(found, dict) else ""


async def _refuse(send, status: int, text: str):
    # The page shows `error`, gradio's client `detail`.
    body = json.dumps({"error": text, "detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["Guard", "stored_bytes", "uploads_folder"]
