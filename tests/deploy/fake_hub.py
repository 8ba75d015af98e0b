"""A Hugging Face Hub in memory: the HTTP endpoints that huggingface_hub's client calls to make a repository, commit to it and download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN, OWNER = "hf_of_ada", "ada"
Files = dict[str, bytes]


class FakeHub:
    """Repositories by name: whether each is private, its commits (id, message, files) from the first, and its tags. `stored` holds the
    large files by SHA-256, `calls` the requests. Only OWNER may write, to names of its own."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[tuple[str, str, Files]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.large: set[str] = set()
        self.stored: Files = {}
        self.calls: list[str] = []
        self.url = ""

    def commit(self, repository: str, message: str, changes: Files) -> str:
        earlier = self.commits[repository][-1][2] if self.commits[repository] else {}
        oid = hashlib.sha1(f"{repository}{len(self.commits[repository])}{message}".encode()).hexdigest()
        self.commits[repository].append((oid, message, {**earlier, **changes}))
        return oid

    def at(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """The commit of a revision, and its files."""
        commits = self.commits[repository]
        known = {oid: (oid, files) for oid, _, files in commits} | {"main": (commits[-1][0], commits[-1][2])}
        return known.get(self.tags.get(repository, {}).get(revision, revision))

    def alter(self, repository: str, name: str, content: bytes) -> None:
        """Replace a file in the last commit, as a corrupt disk of the hub would."""
        self.commits[repository][-1][2][name] = content


@contextmanager
def serving() -> Iterator[FakeHub]:
    """The hub behind an HTTP server on a free port."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: FakeHub, cache: str, monkeypatch: pytest.MonkeyPatch, *, token: str | None = TOKEN) -> None:
    """Point the client in this process at the hub, as HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_DISABLE_XET and HF_TOKEN do before it is loaded."""
    settings = {
        "ENDPOINT": hub.url,
        "HF_HUB_CACHE": cache,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": cache + "/no",
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def environment(hub: FakeHub, cache: str) -> dict[str, str]:
    """The same for a process of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


class Handler(BaseHTTPRequestHandler):
    """Serves the hub; errors carry the headers by which the client tells them apart."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.calls.append(f"{self.command} {'/'.join(path)}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.is_owner = token == TOKEN
        if token and not self.is_owner:
            self.fail(401, message="Invalid credentials in Authorization header")
        elif path[:2] == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif path == ["api", "repos", "create"]:
            self.create()
        elif path[0] == "lfs":
            self.hub.stored[path[1]] = self.body
            self.answer({})
        elif path[:2] == ["api", "models"]:
            self.of_model("/".join(path[2:4]), path[4:])
        elif path[1].endswith(".git"):
            objects = [self.action(one["oid"], one["size"]) for one in json.loads(self.body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.of_model("/".join(path[:2]), path[2:])

    def of_model(self, repository: str, rest: list[str]) -> None:
        hub = self.hub
        if repository not in hub.commits or (hub.private[repository] and not self.is_owner):
            self.fail(401 if not self.is_owner else 404, "RepoNotFound")
        elif rest[:1] in (["preupload"], ["commit"]) and not self.may_write(repository):
            self.fail(403, message="you don't have the rights")
        elif rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]})
        elif rest[:1] == ["commit"]:
            oid = self.commit(repository)
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repository}/commit/{oid}", "hookOutput": ""})
        else:
            self.at_revision(repository, rest)

    def at_revision(self, repository: str, rest: list[str]) -> None:
        """The model's information, the list of its files, or one of them."""
        found = self.hub.at(repository, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.fail(404, "RevisionNotFound")
        oid, files = found
        if not rest or rest[0] == "revision":
            self.answer(
                {"id": repository, "sha": oid, "private": self.hub.private[repository], "siblings": [{"rfilename": n} for n in files]}
            )
        elif rest[0] == "tree":
            self.answer([self.entry(name, content) for name, content in files.items()])
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            content = files["/".join(rest[2:])]
            self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid})
        else:
            self.fail(404, "EntryNotFound", headers={"X-Repo-Commit": oid})
        return None

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40} | (large if name in self.hub.large else {})

    def create(self) -> None:
        asked = json.loads(self.body)
        repository = f"{asked['organization']}/{asked['name']}"
        if not self.is_owner:
            self.fail(401, message="Invalid username or password.")
        elif not self.may_write(repository):
            self.fail(403, message="you don't have the rights to create a model there")
        elif repository in self.hub.commits:
            self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{repository}"}, 409)
        else:
            self.hub.private[repository] = asked.get("visibility") == "private"
            self.hub.commits[repository] = []
            self.hub.commit(repository, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.answer({"url": f"{self.hub.url}/{repository}", "name": repository, "id": "1"})

    def may_write(self, repository: str) -> bool:
        return self.is_owner and repository.startswith(f"{OWNER}/")

    def action(self, oid: str, size: int) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}
        return {"oid": oid, "size": size} | ({} if oid in self.hub.stored else {"actions": {"upload": upload}})

    def commit(self, repository: str) -> str:
        changes, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content = self.hub.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                changes[value["path"]] = content
                self.hub.large.add(value["path"])
            else:
                raise AssertionError(item["key"])
        return self.hub.commit(repository, message, changes)

    def answer(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        self.send(
            status, json.dumps({"error": message or code}).encode(), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        )

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
