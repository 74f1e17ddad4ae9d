"""The test Hub against the real clients, each in a subprocess."""

import hashlib
import json
import urllib.error
import urllib.request

import pytest

from tests.clean_machine import run_on_clean_machine
from tests.hub_server import HubServer, check_card, run_client

MODEL = """
import torch
from transformers import BertConfig, BertModel
torch.manual_seed(0)
model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=16))
"""
CARD = "---\nlicense: apache-2.0\npipeline_tag: fill-mask\n---\n# A card\n"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_model_round_trip_from_an_empty_cache_and_revision_pin(hub, tmp_path):
    (tmp_path / "push").mkdir()
    succeed(run_client(hub, tmp_path / "push", MODEL + """
model.push_to_hub("tester/tiny", commit_message="first")
with torch.no_grad():
    model.embeddings.word_embeddings.weight[3] += 1
model.push_to_hub("tester/tiny", commit_message="second")
model.push_to_hub("tester/tiny", commit_message="on a branch", revision="side/one")
model.push_to_hub("tester/hidden", private=True)
"""))  # fmt: skip
    initial, first, second = hub.commits("tester/tiny")
    assert [first.message, second.message] == ["first", "second"]
    assert [initial.parent, first.parent, second.parent] == [None, initial.oid, first.oid]
    assert initial.files.keys() == {".gitattributes"}
    assert second.files.keys() >= {"config.json", "model.safetensors"}
    assert first.files["config.json"] == second.files["config.json"]
    assert first.files["model.safetensors"] != second.files["model.safetensors"]
    assert "model.safetensors" in second.lfs and "config.json" not in second.lfs
    # Nothing changed since "second", so that the client sends no third commit to the new branch.
    assert hub.commits("tester/tiny", "side/one")[-1] == second

    pulled = succeed(run_on_clean_machine(f"""
from transformers import AutoModel
from huggingface_hub import hf_hub_download, list_repo_commits, model_info, repo_exists, snapshot_download
for revision in ("main", {first.oid!r}, "side/one"):
    model = AutoModel.from_pretrained("tester/tiny", revision=revision)
    print(model.embeddings.word_embeddings.weight[3].sum().item())
print(hf_hub_download("tester/tiny", "config.json"))
print(snapshot_download("tester/tiny", revision="side/one"))
print(model_info("tester/tiny").sha, [c.commit_id for c in list_repo_commits("tester/tiny")])
print([repo_exists("tester/" + name) for name in ("tiny", "hidden", "none")])
print(repo_exists("tester/hidden", token=False), model_info("tester/hidden").private)
for revision, name in (("main", "absent.txt"), ("absent", "config.json")):
    try:
        hf_hub_download("tester/tiny", name, revision=revision)
    except Exception as error:
        print(type(error).__name__)
""", env=hub.environment(tmp_path / "pull"))).splitlines()  # fmt: skip
    sums = [float(line) for line in pulled[:3]]
    assert sums[0] == pytest.approx(sums[1] + 16) and sums[0] == sums[2]
    assert pulled[3].startswith(str(tmp_path / "pull")) and pulled[4].endswith(second.oid)
    assert pulled[5] == f"{second.oid} {[second.oid, first.oid, initial.oid]}"
    assert pulled[6:8] == ["[True, True, False]", "False True"]
    assert pulled[8:] == ["RemoteEntryNotFoundError", "RevisionNotFoundError"]


def test_code_travels_over_the_hub(hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "configuration_toy.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass ToyConfig(PreTrainedConfig):\n    model_type = 'toy'\n"
    )
    config = {"model_type": "toy", "auto_map": {"AutoConfig": "configuration_toy.ToyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    push = (
        "from huggingface_hub import create_repo, upload_folder\ncreate_repo('tester/toy')\n"
        f"upload_folder(repo_id='tester/toy', folder_path={str(folder)!r})"
    )
    succeed(run_client(hub, tmp_path, push))
    load = "from transformers import AutoConfig; print(type(AutoConfig.from_pretrained('tester/toy', {})))"
    loaded = run_on_clean_machine(load.format("trust_remote_code=True"), env=hub.environment(tmp_path / "pull"))
    assert "transformers_modules.tester.toy" in succeed(loaded)
    assert hub.commits("tester/toy")[-1].oid in loaded.stdout
    refused = run_on_clean_machine(load.format("trust_remote_code=False"), env=hub.environment(tmp_path / "pull"))
    assert refused.returncode == 1 and "trust_remote_code" in refused.stderr


def test_folder_uploads_in_the_background_become_commits_in_order(hub, tmp_path):
    output = succeed(run_client(hub, tmp_path, f"""
from pathlib import Path
from huggingface_hub import HfApi, ModelCard
api = HfApi()
print(api.create_repo("run", exist_ok=False).repo_id, api.create_repo("run", exist_ok=True).repo_id)
folder = Path("run")
(folder / "runs").mkdir(parents=True)
(folder / "README.md").write_text({CARD!r})
(folder / "big.bin").write_bytes(bytes(range(256)) * 4096)
(folder / "empty.bin").touch()
(folder / "training_args.bin").write_bytes(b"secret")
jobs = []
for step in range(4):
    (folder / "runs" / "log.txt").write_text(f"step {{step}}")
    jobs.append(api.upload_folder(repo_id="tester/run", folder_path=folder, commit_message=f"step {{step}}",
                                  ignore_patterns=["training_args.bin"], run_as_future=True))
    jobs[-1].result()
api.delete_file("big.bin", "tester/run", commit_message="without big")
api.upload_folder(repo_id="tester/run", folder_path=folder, delete_patterns="runs/*", allow_patterns="README.md",
                  commit_message="without runs")
ModelCard.load("tester/run").validate()
print(sorted(api.list_repo_files("tester/run")), [b.name for b in api.list_repo_refs("tester/run").branches])
print([e.path for e in api.list_repo_tree("tester/run", revision=jobs[0].result().oid)])
print([e.path for e in api.list_repo_tree("tester/run", "runs", revision=jobs[0].result().oid)])
"""))  # fmt: skip
    _, *steps, without_big, without_runs = hub.commits("tester/run")
    assert [commit.message for commit in steps] == [f"step {i}" for i in range(4)]
    assert [commit.files["runs/log.txt"] for commit in steps] == [b"step %d" % i for i in range(4)]
    expected = {".gitattributes", "README.md", "big.bin", "empty.bin", "runs/log.txt"}
    assert all(commit.files.keys() == expected for commit in steps)
    assert steps[0].files["big.bin"] == bytes(range(256)) * 4096 and steps[0].files["empty.bin"] == b""
    assert without_big.files.keys() == expected - {"big.bin"}
    assert without_runs.files.keys() == expected - {"big.bin", "runs/log.txt"}
    ids, listing, root, folder = output.splitlines()
    assert ids == "tester/run tester/run"
    assert listing == "['.gitattributes', 'README.md', 'empty.bin'] ['main']"
    assert root == "['runs', '.gitattributes', 'README.md', 'big.bin', 'empty.bin']" and folder == "['runs/log.txt']"
    # The unchanged big file was sent once.
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


def test_writes_without_the_right_token_are_refused_and_change_nothing(hub, tmp_path):
    succeed(run_client(hub, tmp_path, "from huggingface_hub import create_repo; create_repo('tester/mine')"))
    before = hub.commits("tester/mine")
    push = "from huggingface_hub import upload_file; upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='{}')"
    for token, repo_id, message in [
        ("hf_wrong", "tester/mine", "Invalid credentials"),
        ("", "tester/mine", "Authentication required"),
        (hub.token, "tester/none", "RepositoryNotFoundError"),
    ]:
        result = run_client(hub, tmp_path, push.format(repo_id), HF_TOKEN=token)
        assert result.returncode == 1 and message in result.stderr, result.stderr
    create = "from huggingface_hub import create_repo; create_repo('{}')"
    for token, repo_id, message in [
        ("hf_wrong", "tester/new", "Invalid credentials"),
        (hub.token, "google/new", "403 Forbidden"),
        (hub.token, "tester/mine", "already created"),
    ]:
        result = run_client(hub, tmp_path, create.format(repo_id), HF_TOKEN=token)
        assert result.returncode == 1 and message in result.stderr, result.stderr
    assert hub.commits("tester/mine") == before
    with pytest.raises(KeyError):
        hub.commits("tester/new")


def test_bad_card_is_refused_before_anything_is_committed(hub, tmp_path):
    result = run_client(hub, tmp_path, """
from huggingface_hub import create_repo, upload_file
create_repo("tester/bad")
upload_file(path_or_fileobj=b"---\\nlicense: my-own\\n---\\n", path_in_repo="README.md", repo_id="tester/bad")
""")  # fmt: skip
    assert result.returncode == 1 and "\"license\" with value 'my-own' is not valid" in result.stderr
    assert not [path for _, path in hub.requests if "/preupload/" in path or "/commit/" in path]


def test_dataset_repository_loads_with_datasets(hub, tmp_path):
    output = succeed(run_client(hub, tmp_path, """
from datasets import Dataset, load_dataset
Dataset.from_dict({"text": ["a", "b"]}).push_to_hub("tester/corpus")
print(load_dataset("tester/corpus", split="train")["text"][:])
"""))  # fmt: skip
    assert output.splitlines()[-1] == "['a', 'b']"
    assert "data/train-00000-of-00001.parquet" in hub.commits("tester/corpus", repo_type="dataset")[-1].files


def post(hub, path, payload, method="POST", token=None):
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    request = urllib.request.Request(hub.endpoint + path, body, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_lfs_upload_with_another_sha256_or_an_unsigned_address_is_refused(hub):
    assert post(hub, "/api/repos/create", {"name": "lfs"}, token=hub.token)[0] == 200
    content, other = b"announced", b"different"
    wanted = {"objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}]}
    batch = "/tester/lfs.git/info/lfs/objects/batch"
    assert post(hub, batch, wanted)[0] == 401
    href = post(hub, batch, wanted, token=hub.token)[1]["objects"][0]["actions"]["upload"]["href"]
    path = href.removeprefix(hub.endpoint)
    assert post(hub, path, other, method="PUT")[0] == 400
    assert post(hub, path + "x", content, method="PUT")[0] == 403
    line = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", **wanted["objects"][0]}}
    body = b"\n".join(json.dumps(item).encode() for item in [{"key": "header", "value": {"summary": "s"}}, line])
    assert post(hub, "/api/models/tester/lfs/commit/main", body, token=hub.token)[0] == 400
    assert post(hub, path, content, method="PUT")[0] == 200
    assert post(hub, "/api/models/tester/lfs/commit/main", body, token=hub.token)[0] == 200
    assert hub.commits("tester/lfs")[-1].files["w.bin"] == content


def test_commit_on_an_outdated_parent_is_refused(hub):
    post(hub, "/api/repos/create", {"name": "race"}, token=hub.token)
    parent = hub.commits("tester/race")[-1].oid

    def commit(name):
        file = {"key": "file", "value": {"path": name, "content": "YQ==", "encoding": "base64"}}
        header = {"key": "header", "value": {"summary": name, "parentCommit": parent}}
        body = b"\n".join(json.dumps(item).encode() for item in [header, file])
        return post(hub, "/api/models/tester/race/commit/main", body, token=hub.token)[0]

    assert [commit("first"), commit("second")] == [200, 412]
    assert hub.commits("tester/race")[-1].files.keys() == {".gitattributes", "first"}


RESULT = {
    "task": {"type": "fill-mask"},
    "dataset": {"type": "text", "name": "text"},
    "metrics": [{"type": "perplexity", "value": 12.5}],
}


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: apache-2.0\nlanguage: en\ntags: [a, b]\npipeline_tag: fill-mask", None),
        ("license: [", "cannot be parsed"),
        ("- a\n- b", "must be a mapping"),
        ("license: mine", '"license"'),
        ("pipeline_tag: mask-filling", '"pipeline_tag"'),
        ("language: English", '"language"'),
        ("base_model: ./output/run", '"base_model"'),
        ("datasets: [/data/text]", '"datasets"'),
        ("tags: [1]", '"tags"'),
        (json.dumps({"model-index": [{"name": "m", "results": [RESULT]}]}), None),
        (json.dumps({"model-index": [{"results": [RESULT]}]}), '"model-index[0].name"'),
        (json.dumps({"model-index": []}), "non-empty list"),
        (json.dumps({"model-index": [{"name": "m", "results": [RESULT | {"metrics": []}]}]}), "metrics"),
        (json.dumps({"model-index": [{"name": "m", "results": [RESULT | {"dataset": {"type": "x"}}]}]}), ".name"),
        (json.dumps({"model-index": [{"name": "m", "results": [RESULT | {"task": {}}]}]}), "task.type"),
    ],
)
def test_card_metadata(metadata, error):
    errors, warnings = check_card(f"---\n{metadata}\n---\n# Title\n")
    assert warnings == []
    assert errors == [] if error is None else (len(errors) == 1 and error in errors[0])


@pytest.mark.parametrize("content", ["", "# Title\n\n---\nlicense: mit\n---\n"])
def test_card_without_metadata_gets_a_warning(content):
    assert check_card(content) == ([], ["empty or missing yaml metadata in repo card"])
