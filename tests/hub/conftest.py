"""A Hub of one's own: as much of the real one as huggingface_hub's client needs to make, fill and read repositories, over HTTP on this machine."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_onlyForThisTest0123456789"


class LocalHub(ThreadingHTTPServer):
    """Repositories in memory: a list of commits each, of which each is the whole tree, path -> (contents, whether LFS).

    `fail(method, path, *outcomes)` lets the next requests whose path matches the pattern fail, each in its way: a status; `"cut"`, the connection
    closed without an answer; `"lost"`, the same after the request was served; a number of bytes as `{"body": n}`, after which an answer's body is
    cut; `"page"`, a status of 502 with a page for people in place of JSON.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, list[dict]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict]] = []
        self.failures: list[tuple[str, str, list]] = []
        self.connections: list[socket.socket] = []
        self.lock = threading.RLock()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def stop(self):
        self.shutdown()
        for connection in self.connections:  # clients keep them open, and what served them would go on
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests

    def fail(self, method: str, path: str, *outcomes):
        self.failures.append((method, path, list(outcomes)))

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.requests)

    def headers_of(self, method: str, path: str) -> list[dict]:
        return [headers for m, p, headers in self.requests if m == method and re.search(path, p)]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: contents for path, (contents, _) in self.commit(repo, revision)["tree"].items()}

    def history(self, repo: str) -> list[str]:
        return [commit["message"] for commit in self.commits[repo]]

    def commit(self, repo: str, revision: str) -> dict | None:
        commits = self.commits[repo]
        return commits[-1] if revision == "main" else next((c for c in commits if c["sha"] == revision), None)

    def make(self, repo: str, private: bool = True, files: dict[str, bytes] | None = None):
        self.private[repo] = private
        self.commits[repo] = []
        self.add(repo, {path: (contents, False) for path, contents in (files or {}).items()}, "initial commit")

    def add(self, repo: str, tree: dict, message: str) -> str:
        sha = hashlib.sha1(f"{self.endpoint}/{repo}/{len(self.commits[repo])}".encode()).hexdigest()
        self.commits[repo].append({"sha": sha, "message": message, "tree": tree})
        return sha

    def outcome(self, method: str, path: str):
        with self.lock:
            for wanted, pattern, outcomes in self.failures:
                if outcomes and wanted == method and re.search(pattern, path):
                    return outcomes.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the client's acknowledgement of its head
    server: LocalHub

    def log_message(self, *args):
        pass

    def serve(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.failure = self.server.outcome(self.command, path)
        if isinstance(self.failure, int):
            return self.error(self.failure, "Injected")
        if self.failure == "cut":
            return self.hang_up()
        if self.failure == "page":
            return self.answer(None, 502, contents=b"<html>Bad Gateway</html>")
        with self.server.lock:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return function(self, body, *match.groups())
        return self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, value=None, status=200, headers=None, contents: bytes | None = None, first: int = 0):
        if self.failure == "lost":
            return self.hang_up()
        contents = json.dumps(value).encode() if contents is None else contents
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(contents) - first))
        self.end_headers()
        contents = contents[first:] if self.command != "HEAD" else b""
        if isinstance(self.failure, dict) and contents:
            self.wfile.write(contents[: self.failure["body"]])
            self.wfile.flush()
            return self.hang_up()
        self.wfile.write(contents)
        return None

    def error(self, status, code):
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code != "Injected" else {}
        return self.answer({"error": code}, status, headers | ({"Retry-After": "7"} if status == 429 else {}))

    @property
    def knows_you(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def repository(self, repo: str, writing: bool = False) -> bool:
        """Whether the request may go on; if not, it is answered. Like the Hub, which does not tell strangers what it hides."""
        known = repo in self.server.commits and (self.knows_you or not (writing or self.server.private[repo]))
        if not known:
            self.error(404 if self.knows_you else 401, "RepoNotFound")
        return known

    # What is asked of the API.

    def create(self, body):
        wanted = json.loads(body)
        if not self.knows_you:
            return self.error(401, "Unauthorized")
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.server.commits:
            return self.answer({"url": f"{self.server.endpoint}/{repo}", "error": "You already created it"}, 409)
        self.server.make(repo, wanted.get("visibility") == "private")
        return self.answer({"url": f"{self.server.endpoint}/{repo}"})

    def validate(self, body):
        return self.answer({"warnings": [], "errors": []})

    def info(self, body, repo, revision="main"):
        if not self.repository(repo):
            return None
        commit = self.server.commit(repo, revision or "main")
        if commit is None:
            return self.error(404, "RevisionNotFound")
        tree, card = commit["tree"], {}
        if "README.md" in tree and (found := re.match(rb"---\n(.*?)\n---", tree["README.md"][0], re.DOTALL)):
            card = yaml.safe_load(found[1])
        siblings = [{"rfilename": path} for path in tree]
        facts = {"id": repo, "sha": commit["sha"], "private": self.server.private[repo], "siblings": siblings}
        return self.answer(facts | {"cardData": card, "tags": []})

    def tree(self, body, repo, revision, folder=None):
        if not self.repository(repo):
            return None
        tree = self.server.commit(repo, revision)["tree"]
        files = [
            {"type": "file", "path": path, "size": len(contents), "oid": git_oid(contents)}
            | ({"lfs": {"oid": sha256(contents), "size": len(contents), "pointerSize": 1}} if lfs else {})
            for path, (contents, lfs) in tree.items()
            if path.startswith(folder or "")
        ]
        return self.answer(files) if files or not folder else self.error(404, "EntryNotFound")

    def preupload(self, body, repo, revision):
        if not self.repository(repo, writing=True):
            return None
        files, tree = [], self.server.commit(repo, revision)["tree"]
        for file in json.loads(body)["files"]:
            contents, lfs = tree.get(file["path"], (None, False))
            oid = None if contents is None else sha256(contents) if lfs else git_oid(contents)
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer({"files": files})

    def batch(self, body, repo):
        if not self.repository(repo, writing=True):
            return None
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/storage/{wanted['oid']}"}}
            objects.append(entry)
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if sha256(body) != oid:
            return self.error(400, "Damaged")
        self.server.blobs[oid] = body
        return self.answer({})

    def take(self, body, repo, revision):
        if not self.repository(repo, writing=True):
            return None
        header, *operations = map(json.loads, body.splitlines())
        tree = dict(self.server.commit(repo, revision)["tree"])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                tree[value["path"]] = (self.server.blobs[value["oid"]], True)
            else:
                tree.pop(value["path"])
        sha = self.server.add(repo, tree, header["value"]["summary"])
        return self.answer({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, body, repo, revision, path):
        if not self.repository(repo):
            return None
        commit = self.server.commit(repo, revision)
        if commit is None:
            return self.error(404, "RevisionNotFound")
        headers = {"X-Repo-Commit": commit["sha"]}
        if path not in commit["tree"]:
            return self.answer({}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        contents, lfs = commit["tree"][path]
        headers |= {"ETag": f'"{sha256(contents) if lfs else git_oid(contents)}"', "Accept-Ranges": "bytes"}
        first = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        if first is None:
            return self.answer(None, 200, headers, contents)
        start = int(first[1])
        headers["Content-Range"] = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
        return self.answer(None, 206, headers, contents, start)


REPO = r"([\w.-]+/[\w.-]+?)"
ROUTES: list[tuple[tuple, str, Callable]] = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(\w+))?", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/(\w+)(?:/(.+))?", Handler.tree),
    (("POST",), rf"/api/models/{REPO}/preupload/(\w+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(\w+)", Handler.take),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/storage/(\w+)", Handler.store),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(\w+)/(.+)", Handler.resolve),
]


def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def git_oid(contents: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The local Hub, and the client of this process pointed at it, logged in, with an empty cache."""
    import transformers.dynamic_module_utils
    from huggingface_hub import constants, hf_api

    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the endpoint of then
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.stop()
    thread.join()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long the client would have slept, each time."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
