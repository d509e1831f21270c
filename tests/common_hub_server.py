# SPDX-License-Identifier: Apache-2.0
"""
A Hub on this machine, for the real client of `huggingface_hub`: repositories, commits, LFS, branches, tags, private repositories.

It answers the requests that the installed client makes and no others; whatever else is asked is answered with 404 and kept in
`unknown`. Xet, which the client prefers where it is installed, is switched off by the environment: see `HubServer.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml


USER = "tester"
LARGE = re.compile(r"\.(safetensors|parquet|mp4)$")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Blob(NamedTuple):
    """A file of a commit."""

    data: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls it."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Commits by hash, the newest last, and what branches and tags point at. `objects` are the large files that have arrived."""

    is_private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        text = json.dumps([len(self.commits), branch, sorted((name, blob.oid) for name, blob in files.items())])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


class HubServer:
    """
    The server's state, which tests read and set.

    `refuse` says of a large file (its content) whether its upload fails; `uploads` counts arrivals by SHA-256; `requests` holds
    method and path of each request.
    """

    def __init__(self, token: str):
        self.token = token
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.refuse = lambda data: False
        self.lock = threading.Lock()
        self.url = ""

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """The environment of a client with a home of its own, with or without a token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        found = {
            **kept,
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }
        return found if token is None else {**found, "HF_TOKEN": token}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments):
        """Print nothing."""

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                action(self, *(unquote(part) for part in found.groups()))
                return
        with self.hub.lock:
            self.hub.unknown.append((self.command, path))
        self._fail(404, "EntryNotFound", "no such endpoint")

    # ---- answers ----

    def _send(self, status: int, data: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str):
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repository(self, kind: str, name: str, *, writes: bool = False) -> Repository | None:
        """The repository, or None after an answer as the Hub gives it: of a private one a stranger learns nothing."""
        found = self.hub.repositories.get((kind, name))
        if writes and not self.has_token:
            self._fail(401, "", "Invalid username or password.")
        elif found is None or (found.is_private and not self.has_token):
            self._fail(404 if self.has_token else 401, "RepoNotFound", "Repository not found")
        else:
            return found
        return None

    def _commit_of(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self._repository(kind, name)
        if repository is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha

    # ---- endpoints ----

    def whoami(self):
        if self.has_token:
            self._json({"type": "user", "name": USER, "auth": {"accessToken": {"displayName": "t", "role": "write"}}})
        else:
            self._fail(401, "", "Invalid username or password.")

    def create(self):
        if not self.has_token:
            self._fail(401, "", "Invalid username or password.")
            return
        asked = json.loads(self.body)
        name, kind = f"{asked['organization'] or USER}/{asked['name']}", asked.get("type", "model")
        prefix = "" if kind == "model" else f"{kind}s/"
        with self.hub.lock:
            is_new = (kind, name) not in self.hub.repositories
            if is_new:
                self.hub.repositories[kind, name] = Repository(asked.get("visibility") == "private")
        url = {"url": f"{self.hub.url}/{prefix}{name}"}
        self._json(url if is_new else {**url, "error": "You already created this repo"}, 200 if is_new else 409)

    def preupload(self, kinds: str, name: str, revision: str):
        repository = self._repository(KINDS[kinds], name, writes=True)
        if repository is None:
            return
        if revision not in repository.branches:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[repository.branches[revision]]
        answers = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if LARGE.search(entry["path"]) else "regular",
                "shouldIgnore": False,
                # Of a large file the SHA-256 of its content, as the client compares it.
                "oid": (files[name].sha256 if files[name].is_large else files[name].oid) if name in files else None,
            }
            for entry in json.loads(self.body)["files"]
            for name in [entry["path"]]
        ]
        self._json({"files": answers})

    def batch(self, prefix: str, name: str):
        kind = KINDS[prefix.rstrip("/") or "models"]
        repository = self._repository(kind, name, writes=True)
        if repository is None:
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in repository.objects:  # the protocol: no actions for what is there
                base = f"{self.hub.url}/lfs/{kind}/{name}/{entry['oid']}"
                answer["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, kind: str, name: str, oid: str):
        # As on the Hub, the address itself permits this: no token is sent along.
        if self.hub.refuse(self.body):
            self._send(403, b"the signature has expired", {})
        elif hashlib.sha256(self.body).hexdigest() != oid:
            self._send(400, b"the content has another hash", {})
        else:
            with self.hub.lock:
                self.hub.repositories[kind, name].objects[oid] = self.body
                self.hub.uploads[oid] = self.hub.uploads.get(oid, 0) + 1
            self._send(200, b"", {})

    def verify(self, kind: str, name: str, oid: str):
        repository = self._repository(kind, name, writes=True)
        if repository is not None:
            is_here = len(repository.objects.get(oid, b"")) == json.loads(self.body)["size"]
            self._json({}, 200 if is_here else 404)

    def commit(self, kinds: str, name: str, revision: str):
        repository = self._repository(KINDS[kinds], name, writes=True)
        if repository is None:
            return
        files = dict(repository.commits[repository.branches[revision]])
        for entry in map(json.loads, self.body.splitlines()):
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repository.objects:
                    self._fail(400, "", f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = Blob(repository.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        with self.hub.lock:
            sha = repository.commit(revision, files)
        prefix = "" if kinds == "models" else f"{kinds}/"
        self._json({"commitUrl": f"{self.hub.url}/{prefix}{name}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, kinds: str, name: str, revision: str = "main"):
        found = self._commit_of(KINDS[kinds], name, revision)
        if found is not None:
            repository, sha = found
            siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
            fields = {"id": name, "sha": sha, "private": repository.is_private, "siblings": siblings}
            self._json({**fields, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, kinds: str, name: str, revision: str, folder: str = ""):
        found = self._commit_of(KINDS[kinds], name, revision)
        if found is not None:
            repository, sha = found
            below = {path: blob for path, blob in repository.commits[sha].items() if path.startswith(folder)}
            if not below:
                self._fail(404, "EntryNotFound", f"{folder} does not exist on {revision}")
                return
            entries = []
            for path, blob in sorted(below.items()):
                entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
                large = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}}
                entries.append({**entry, **(large if blob.is_large else {})})
            self._json(entries)

    def refs(self, kinds: str, name: str):
        repository = self._repository(KINDS[kinds], name)
        if repository is not None:
            listed = {
                folder: [
                    {"name": key, "ref": f"refs/{place}/{key}", "targetCommit": sha} for key, sha in table.items()
                ]
                for folder, place, table in (
                    ("branches", "heads", repository.branches),
                    ("tags", "tags", repository.tags),
                )
            }
            self._json({**listed, "converts": []})

    def branch(self, kinds: str, name: str, branch: str):
        repository = self._repository(KINDS[kinds], name, writes=True)
        if repository is not None:
            start = repository.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
            is_new = repository.branches.setdefault(branch, start) == start
            self._json({}, 200 if is_new else 409)

    def tag(self, kinds: str, name: str, revision: str):
        repository = self._repository(KINDS[kinds], name, writes=True)
        if repository is not None:
            tag = json.loads(self.body)["tag"]
            if tag in repository.tags:
                self._fail(409, "", "Tag reference exists already")
            else:
                repository.tags[tag] = repository.resolve(revision)
                self._json({})

    def validate(self):
        """The Hub's rules on a header, those that matter here: YAML, a mapping, and a licence, if there is one, by its name."""
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        try:
            data = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        found = data.get("license", "other") if isinstance(data, dict) else data
        if re.fullmatch(r"[a-z0-9.+-]+", str(found)):
            self._json({"errors": [], "warnings": []})
        else:
            self._json({"errors": [{"message": f'"license" must be a licence, got {found!r}'}], "warnings": []}, 400)

    def file(self, prefix: str, name: str, revision: str, path: str):
        found = self._commit_of(KINDS[prefix.rstrip("/") or "models"], name, revision)
        if found is None:
            return
        repository, sha = found
        blob = repository.commits[sha].get(path)
        if blob is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.sha256 if blob.is_large else blob.oid}"'}
        if blob.is_large:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(blob.data))}
        self._send(200, blob.data, headers)


_API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("POST",), rf"{_API}/preupload/([^/]+)", Handler.preupload),
    (("POST",), r"/((?:datasets/|spaces/)?)([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(\w+)/([^/]+/[^/]+)/(\w{64})", Handler.upload),
    (("POST",), r"/lfs/(\w+)/([^/]+/[^/]+)/(\w{64})/verify", Handler.verify),
    (("POST",), rf"{_API}/commit/([^/]+)", Handler.commit),
    (("GET",), rf"{_API}", Handler.info),
    (("GET",), rf"{_API}/revision/([^/]+)", Handler.info),
    (("GET",), rf"{_API}/tree/([^/]+)", Handler.tree),
    (("GET",), rf"{_API}/tree/([^/]+)/(.+)", Handler.tree),
    (("GET",), rf"{_API}/refs", Handler.refs),
    (("POST",), rf"{_API}/branch/([^/]+)", Handler.branch),
    (("POST",), rf"{_API}/tag/([^/]+)", Handler.tag),
    (("GET", "HEAD"), r"/((?:datasets/|spaces/)?)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.file),
]


@contextmanager
def serve(token: str) -> Iterator[HubServer]:
    """Run a Hub on a free port of this machine until the block ends."""
    hub = HubServer(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


__all__ = ["HubServer", "Repository", "serve"]
