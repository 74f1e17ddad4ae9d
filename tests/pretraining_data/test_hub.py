"""Datasets by their Hub name, fetched by the real client from a Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.hub_server import HubServer, run_client

ROOT = Path(__file__).parents[2]
NAME = "someone/documents"
COMMIT = "a" * 40
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.jsonl
  - split: test
    path: en/test.jsonl
---
"""
FILES = {
    "README.md": CARD.encode(),
    "en/train.jsonl": b"".join(b'{"text": "document %d"}\n' % number for number in range(40)),
    "en/test.jsonl": b'{"text": "test document"}\n',
}
LOAD = """
import json, sys
from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
results = []
for values in json.loads(sys.argv[1]):
    try:
        splits = load_documents(DataArguments(**values), 0)
        results.append({name: [row["text"] for row in split] for name, split in splits.items()})
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = urlsplit(self.path).path
        if path.startswith(f"/api/datasets/{NAME}/tree/"):
            self.answer([self.entry(name) for name in FILES])
        elif path.startswith(f"/api/datasets/{NAME}"):
            self.answer({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif path.startswith(f"/datasets/{NAME}/resolve/"):
            name = path.removeprefix(f"/datasets/{NAME}/resolve/").split("/", 1)[1]
            self.answer(FILES.get(name), error="EntryNotFound")
        else:
            self.answer(None)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in FILES)]
        self.answer(
            [self.entry(path) for path in asked if path in FILES]
            + [{"type": "directory", "path": path, "oid": COMMIT, "size": 0} for path in folders]
        )

    def entry(self, name):
        content = FILES[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, content, error="RepoNotFound"):
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            content = b""
        else:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_datasets_by_name(endpoint, tmp_path):
    requests = [
        {"dataset_name": [NAME]},
        {"dataset_name": [NAME], "dataset_config_name": ["en"], "validation_split_name": "test", "streaming": True},
        {"dataset_name": [NAME], "train_split_name": "trian"},
        {"dataset_name": [NAME], "dataset_config_name": ["de"]},
        {"dataset_name": ["someone/else"]},
    ]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    # The variables that would keep the client from the network, or from this Hub's cache.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LOAD, json.dumps(requests)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    held_out, streamed, wrong_split, wrong_config, missing = json.loads(run.stdout)
    documents = [f"document {number}" for number in range(40)]
    assert sorted(held_out["train"] + held_out["validation"]) == sorted(documents)
    assert len(held_out["validation"]) == 2
    assert streamed == {"train": documents, "validation": ["test document"]}
    assert wrong_split == f"ValueError: {NAME} has no split 'trian'; its splits are ['test', 'train']."
    assert "'de' not found. Available: ['en']" in wrong_config
    assert "'someone/else' doesn't exist on the Hub" in missing


# Like Wikipedia and BookCorpus: articles; and a loading script, beside it the Hub's copy in parquet files, a sentence a
# row.
PUSH = """
import io
from datasets import Dataset
from huggingface_hub import HfApi
Dataset.from_dict({"text": [f"Article {n}. It is long." for n in range(40)]}).push_to_hub("tester/articles", "2023.en")
api, books = HfApi(), "tester/books"
api.create_repo(books, repo_type="dataset")
api.create_branch(books, branch="refs/convert/parquet", repo_type="dataset")
api.upload_file(path_or_fileobj=b"import datasets", path_in_repo="books.py", repo_id=books, repo_type="dataset")
for shard in range(2):
    file = io.BytesIO()
    rows = ["", *(f"sentence {n} ." for n in range(75 * shard, 75 * (shard + 1)))]
    Dataset.from_dict({"text": rows}).to_parquet(file)
    api.upload_file(path_or_fileobj=file.getvalue(), path_in_repo=f"plain_text/train/000{shard}.parquet",
                    repo_id=books, repo_type="dataset", revision="refs/convert/parquet")
print([ref.ref for ref in api.list_repo_refs(books, repo_type="dataset").converts])
"""


def test_a_loading_script_is_read_from_the_hubs_parquet_copy_as_documents_of_several_rows(tmp_path):
    both = {"dataset_name": ["tester/articles", "tester/books"], "dataset_config_name": ["2023.en", "default"]}
    copy = both | {"dataset_revision": ["main", "refs/convert/parquet"], "rows_per_document": [1, 8]}
    requests = [both, copy, copy | {"preprocessing_num_workers": 2}, copy | {"streaming": True}]
    with HubServer() as hub:
        pushed = run_client(hub, tmp_path, PUSH)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.splitlines()[-1] == "['refs/convert/parquet']"
        loaded = run_client(hub, tmp_path, f"import sys\nsys.argv = ['', {json.dumps(requests)!r}]\n{LOAD}")
    assert loaded.returncode == 0, loaded.stderr
    as_script, as_rows, with_two_processes, streamed = json.loads(loaded.stdout.splitlines()[-1])
    assert "tester/books cannot be loaded from revision 'main'" in as_script
    assert "--dataset_revision refs/convert/parquet" in as_script
    articles = [f"Article {n}. It is long." for n in range(40)]

    def books(first, end):
        return [
            "\n".join(f"sentence {n} ." for n in range(start, min(start + 8, end))) for start in range(first, end, 8)
        ]

    # Of a stream, documents end with their file.
    for splits, documents in ((as_rows, books(0, 150)), (streamed, books(0, 75) + books(75, 150))):
        # All of both, in their order, and each document on one side only.
        assert sorted(splits["train"] + splits["validation"]) == sorted(articles + documents)
        assert splits["train"] == [document for document in articles + documents if document in splits["train"]]
    assert with_two_processes == as_rows
    # 5 % of each, and they take turns.
    assert [document.split()[0] for document in as_rows["validation"]] == ["Article", "sentence", "Article"]
