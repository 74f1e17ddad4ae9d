"""A small Hugging Face Hub on 127.0.0.1, so that tests can push and pull with the real client.

It keeps every commit as a full snapshot in memory. Models and datasets, branches, regular and LFS uploads, model cards
and access rights behave as on the Hub as far as `huggingface_hub`, `transformers` and `datasets` look; pull requests,
discussions, tags and `.gitignore` are absent.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.clean_machine import PROJECT_ROOT, neutral_environment

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npz", "*.parquet", "*.arrow", "*tfevents*")
# Where the Hub keeps copies of datasets that it has converted, as in refs/convert/parquet.
CONVERTED = "refs/convert/"
LFS_SIZE = 10 * 2**20
LICENSES = frozenset(
    "apache-2.0 mit openrail afl-3.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 "
    "lgpl-3.0 isc mpl-2.0 odc-by odbl unlicense unknown other".split()
)
PIPELINE_TAGS = frozenset(
    "fill-mask text-classification token-classification question-answering multiple-choice sentence-similarity "
    "feature-extraction text-ranking zero-shot-classification table-question-answering summarization translation "
    "text-generation other".split()
)
_METADATA = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Commit:
    """One commit: `files` is the whole tree after it (path -> content); `parent` is None for a repository's first."""

    oid: str
    message: str
    parent: str | None
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class _Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, bytes], lfs: frozenset[str] = frozenset()) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{parent} {branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = commit = Commit(oid, message, parent, files, lfs)
        self.branches[branch] = oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        history = [self.at(revision)]
        while history[-1].parent is not None:
            history.append(self.commits[history[-1].parent])
        return history


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, /, **fields: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields


class HubServer:
    """A Hub with one user, as a context manager.

    Attributes: `endpoint` (value for HF_ENDPOINT), `user` (the only namespace that can be written), `token` (the only
    token accepted; any other is refused with 401, as on the Hub, on reads too), `requests` (method and path with query
    of every request so far, in order of arrival).
    """

    def __init__(self) -> None:
        self.user = "tester"
        self.token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[tuple[str, str]] = []
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._uploads: dict[str, tuple[str, int]] = {}
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """History of a branch, oldest first; the first is the Hub's own (`.gitattributes`). KeyError: no such repo."""
        with self._lock:
            return self._repos[f"{repo_type}s", repo_id].history(revision)[::-1]

    def environment(self, cache_dir: str | os.PathLike) -> dict[str, str]:
        """Environment of a subprocess that talks to this Hub and keeps every Hugging Face cache in `cache_dir`.

        The offline modes are set to 0 and not only left out, so that the dict can be laid over another environment.
        """
        return neutral_environment() | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": os.fspath(cache_dir),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


def run_client(server: HubServer, cache_dir: str | os.PathLike, code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs Python `code` against `server` in a subprocess (HF_ENDPOINT is read when huggingface_hub is imported).

    The project's modules can be imported there. `env` is laid over `server.environment(cache_dir)`, for instance
    `HF_TOKEN="wrong"`. stdout and stderr are captured as text.
    """
    python = {"PYTHONPATH": str(PROJECT_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = server.environment(cache_dir) | python | env
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cache_dir, capture_output=True, text=True, timeout=300
    )


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the metadata block of a card (`---`, YAML, `---`), as validate-yaml finds them."""
    block = _METADATA.match(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML cannot be parsed: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []

    def as_list(value: object) -> list:
        return value if isinstance(value, list) else [value]

    repo_id = re.compile(r"[\w.-]+(/[\w.-]+)?")
    allowed: dict[str, Callable[[str], object]] = {
        "license": LICENSES.__contains__,
        "pipeline_tag": PIPELINE_TAGS.__contains__,
        "language": re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code").fullmatch,
        "base_model": lambda name: repo_id.fullmatch(name) and not name.startswith("."),
        "datasets": lambda name: repo_id.fullmatch(name) and not name.startswith("."),
        "tags": bool,
        "metrics": bool,
        "library_name": bool,
    }
    scalars = ("license", "pipeline_tag", "library_name")
    errors = [
        f'"{key}" with value {value!r} is not valid'
        for key, is_allowed in allowed.items()
        if key in data
        for value in ([data[key]] if key in scalars else as_list(data[key]))
        if not isinstance(value, str) or not is_allowed(value)
    ]
    if "model-index" in data:
        errors += _check_model_index(data["model-index"])
    return errors, []


def _check_model_index(index: object) -> list[str]:
    """What the Hub requires of a model-index: a list of names with results, each with task, dataset and metrics."""
    if not isinstance(index, list) or not index:
        return ['"model-index" must be a non-empty list']
    errors: list[str] = []

    def require(entry: object, where: str, **kinds: type | tuple[type, ...]) -> bool:
        bad = [k for k, kind in kinds.items() if not isinstance(entry, dict) or not isinstance(entry.get(k), kind)]
        errors.extend(f'"{where}.{key}" is missing or of the wrong type' for key in bad)
        return not bad

    for i, model in enumerate(index):
        if not require(model, f"model-index[{i}]", name=str, results=list):
            continue
        for j, result in enumerate(model["results"]):
            where = f"model-index[{i}].results[{j}]"
            if not require(result, where, task=dict, dataset=dict, metrics=list):
                continue
            require(result["task"], f"{where}.task", type=str)
            require(result["dataset"], f"{where}.dataset", type=str, name=str)
            optional = {key: str for key in ("config", "split", "revision") if key in result["dataset"]}
            require(result["dataset"], f"{where}.dataset", **optional)
            if not result["metrics"]:
                errors.append(f'"{where}.metrics" is empty')
            for k, metric in enumerate(result["metrics"]):
                require(metric, f"{where}.metrics[{k}]", type=str, value=(int, float, str, list, dict))
    return errors


def _card_data(files: dict[str, bytes]) -> dict:
    block = _METADATA.match(files.get("README.md", b"").decode())
    return (yaml.safe_load(block[1]) or {}) if block else {}


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_entry(commit: Commit, path: str) -> dict:
    content = commit.files[path]
    entry: dict = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path in commit.lfs:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


_ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
_REPO = r"(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"


def _route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    def add(handler: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return add


class _Handler(BaseHTTPRequestHandler):
    """One method for each endpoint; each returns the JSON to answer with, or raises `_Refused`."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    body: bytes
    query: dict[str, list[str]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self.body = self._read_body()
        self.headers_out: dict[str, str] = {}
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        status = 200
        answer: object
        with self.hub._lock:
            self.hub.requests.append((self.command, self.path))
            try:
                answer = self._dispatch("GET" if self.command == "HEAD" else self.command, url.path)
            except _Refused as refusal:
                status, answer = refusal.status, {"error": refusal.message, **refusal.fields}
                in_header = refusal.message.encode("ascii", "replace").decode().replace("\n", " ")
                self.headers_out["X-Error-Message"] = in_header
                if refusal.code:
                    self.headers_out["X-Error-Code"] = refusal.code
            except (ValueError, KeyError, TypeError) as error:  # a request that no client should send
                status, answer = 400, {"error": f"malformed request: {error!r}"}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if content is answer else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.headers_out.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _dispatch(self, method: str, path: str) -> object:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise _Refused(401, "Invalid credentials in Authorization header")
        self.known = authorization is not None
        for route_method, pattern, handler in _ROUTES:
            if route_method == method and (match := pattern.fullmatch(path)):
                # Split first, unquote after: a branch name may hold %2F.
                return handler(self, **{name: unquote(text) for name, text in match.groupdict("").items()})
        raise _Refused(404, f"the test Hub has no endpoint {method} {path}")

    def _repo(self, kind: str, repo_id: str, write: bool = False) -> _Repo:
        if write and not self.known:
            raise _Refused(401, "Authentication required")
        repo = self.hub._repos.get((kind or "models", repo_id))
        if repo is None or (repo.private and not self.known):
            # As on the Hub, a stranger cannot tell a private repository from one that does not exist.
            raise _Refused(404 if self.known else 401, "Repository not found", "RepoNotFound")
        return repo

    @_route("GET", "/api/whoami-v2")
    def whoami(self) -> dict:
        if not self.known:
            raise _Refused(401, "Authentication required")
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": token}}

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> dict:
        errors, warnings = check_card(json.loads(self.body)["content"])
        messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            raise _Refused(400, "; ".join(errors), **messages)
        return messages

    @_route("POST", "/api/repos/create")
    def create_repo(self) -> dict:
        if not self.known:
            raise _Refused(401, "Authentication required")
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise _Refused(403, f"You don't have the rights to create a repository under the namespace {owner!r}")
        kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        if (kind, repo_id) in self.hub._repos:
            raise _Refused(409, f"You already created this {kind[:-1]} repo", url=url)
        self.hub._repos[kind, repo_id] = repo = _Repo(private=wanted.get("visibility") == "private")
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.add("main", "initial commit", {".gitattributes": attributes.encode()})
        return {"url": url, "name": repo_id}

    @_route("POST", rf"/api/{_REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, kind: str, repo_id: str, branch: str) -> dict:
        repo = self._repo(kind, repo_id, write=True)
        if branch in repo.branches:
            raise _Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.at(json.loads(self.body or b"{}").get("startingPoint") or "main").oid
        return {}

    @_route("POST", rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo_id: str, revision: str) -> dict:
        commit = self._repo(kind, repo_id, write=True).at(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            is_lfs = file["size"] > LFS_SIZE or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if path in commit.files:  # lets the client leave out what did not change
                entry = _file_entry(commit, path)
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(answer)
        return {"files": answers}

    @_route("POST", r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str, repo_id: str) -> dict:
        self._repo(kind, repo_id, write=True)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub._objects:
                # Signed addresses stand in for the token, which the client does not send to storage.
                signature = secrets.token_urlsafe(16)
                self.hub._uploads[signature] = (wanted["oid"], wanted["size"])
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs-upload/{signature}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    @_route("PUT", "/lfs-upload/(?P<signature>[^/]+)")
    def lfs_upload(self, signature: str) -> dict:
        if signature not in self.hub._uploads:
            raise _Refused(403, "this address was not signed by the Hub")
        if (hashlib.sha256(self.body).hexdigest(), len(self.body)) != self.hub._uploads[signature]:
            raise _Refused(400, "the content does not have the announced size and sha256")
        self.hub._objects[self.hub._uploads.pop(signature)[0]] = self.body
        return {}

    @_route("POST", rf"/api/{_REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo_id: str, revision: str) -> dict:
        repo = self._repo(kind, repo_id, write=True)
        if "create_pr" in self.query:
            raise _Refused(400, "the test Hub has no pull requests")
        if revision not in repo.branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.at(revision)
        files, lfs = dict(head.files), set(head.lfs)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            match operation["key"]:
                case "file":
                    files[path] = base64.b64decode(value["content"], validate=True)
                    lfs.discard(path)
                case "lfsFile":
                    if value["oid"] not in self.hub._objects:
                        raise _Refused(400, f"{path}: LFS object {value['oid']} was never uploaded")
                    files[path] = self.hub._objects[value["oid"]]
                    lfs.add(path)
                case "deletedFile" if path in files:
                    del files[path]
                case "deletedFolder" if gone := [p for p in files if p.startswith(path.rstrip("/") + "/")]:
                    for name in gone:
                        del files[name]
                case "deletedFile" | "deletedFolder":
                    raise _Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                case key:
                    raise _Refused(400, f"the test Hub knows no operation {key!r}")
        if errors := check_card(files.get("README.md", b"").decode())[0]:
            raise _Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        commit = repo.add(revision, header["value"]["summary"], files, frozenset(lfs & files.keys()))
        return {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}

    @_route("GET", rf"/api/{_REPO}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, repo_id: str, revision: str) -> dict:
        repo = self._repo(kind, repo_id)
        commit = repo.at(revision or "main")
        card = _card_data(commit.files)
        siblings: list[dict] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                entry = _file_entry(commit, sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 130}
        return {
            "_id": repo_id,
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": next(iter(repo.commits.values())).date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "siblings": siblings,
        }

    @_route("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> list[dict]:
        commit = self._repo(kind, repo_id).at(revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        paths = sorted(path for path in commit.files if path.startswith(prefix))
        if prefix and not paths:
            raise _Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {
            "/".join(parts[:depth])
            for parts in (path.split("/") for path in paths)
            for depth in range(prefix.count("/") + 1, len(parts))
        }
        within = (lambda path: True) if recursive else (lambda path: "/" not in path.removeprefix(prefix))
        return [
            {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in sorted(folders)
            if within(path)
        ] + [_file_entry(commit, path) for path in paths if within(path)]

    @_route("POST", rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> list[dict]:
        commit = self._repo(kind, repo_id).at(revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        return [_file_entry(commit, path) for path in wanted if path in commit.files]

    @_route("GET", rf"/api/{_REPO}/refs")
    def refs(self, kind: str, repo_id: str) -> dict:
        listed: dict[str, list[dict]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, oid in self._repo(kind, repo_id).branches.items():
            is_copy = name.startswith(CONVERTED)
            ref = name if is_copy else f"refs/heads/{name}"
            entry = {"name": name.removeprefix(CONVERTED), "ref": ref, "targetCommit": oid}
            listed["converts" if is_copy else "branches"].append(entry)
        return listed

    @_route("GET", rf"/api/{_REPO}/commits/(?P<revision>[^/]+)")
    def list_commits(self, kind: str, repo_id: str, revision: str) -> list[dict]:
        entries = []
        for commit in self._repo(kind, repo_id).history(revision):
            entry = {"id": commit.oid, "date": commit.date, "title": commit.message, "message": ""}
            entries.append(entry | {"authors": [{"user": self.hub.user}]})
        return entries

    @_route("GET", r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> bytes:
        commit = self._repo(kind, repo_id).at(revision)
        self.headers_out["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise _Refused(404, f"{quote(path)} does not exist on {revision}", "EntryNotFound")
        entry = _file_entry(commit, path)
        self.headers_out["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            self.headers_out |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        return commit.files[path]
