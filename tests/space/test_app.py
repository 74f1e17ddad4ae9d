"""The page's functions, its interface for programs, and the Space that it becomes."""

import json
import re
import subprocess
import sys

import app
import gradio as gr
import pytest
import yaml
from explorer.observing import MAX_CHARACTERS
from gradio_client import Client
from transformers import AutoConfig

from tests.clean_machine import PROJECT_ROOT
from tests.hub_server import HubServer
from tests.space.conftest import OTHER, TEXT

SPACE = PROJECT_ROOT / "space"
PLACE = "output.neurons"


def is_refused(shown: tuple, *words: str) -> bool:
    """Whether there is a message with these words and no figure."""
    message, *parts = shown
    hidden = all(part["visible"] is False and part["value"] is None for part in parts)
    return hidden and message.startswith("⚠️") and "\n" not in message and all(word in message for word in words)


def test_a_sentence_gives_facts_raster_guesses_rates_and_energy(checkpoints):
    facts, *parts = app.show(TEXT, OTHER, str(checkpoints / "masked"), 1, PLACE, 8)
    assert "2 layers, 16 wide, elastic neurons, 2 time steps" in facts
    assert re.search(r"neurons that fire \| \d+% .*without spikes .* times.*similarity", facts, re.DOTALL)
    assert [part["visible"] for part in parts] == [True] * 4
    assert "Layer 1, feed-forward out" in parts[0]["value"].layout.title.text


def test_a_layer_that_the_model_does_not_have_is_its_last(checkpoints):
    _, raster, *_ = app.show(TEXT, "", str(checkpoints / "masked"), 11, "no such place", 8)
    assert raster["value"].layout.title.text.startswith("Layer 1, into query")


def test_a_decoder_is_drawn_with_the_places_that_it_has(checkpoints):
    folder = str(checkpoints / "decoder")
    _, place = app._controls_for(folder, 0, PLACE)
    facts, raster, *_ = app.show(TEXT, OTHER, folder, 1, place["value"], 8)
    assert "similarity" in facts and raster["value"].layout.title.text.startswith(f"Layer 1, {place['choices'][0][0]}")
    assert place["value"] == place["choices"][0][1] != PLACE


def test_a_dense_model_has_no_raster(checkpoints):
    facts, raster, guesses, rates, energy = app.show(TEXT, "", str(checkpoints / "dense"), 0, PLACE, 8)
    assert "dense" in facts and "similarity" not in facts
    assert [part["visible"] for part in (raster, guesses, rates, energy)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n", ["empty"]),
        ("cat " * 40, ["42 tokens", "takes 32"]),
        ("x" * (MAX_CHARACTERS + 1), ["4,001 characters", "takes 4,000"]),
    ],
)
def test_a_text_that_cannot_be_shown_is_refused_and_not_cut(checkpoints, text, words):
    assert is_refused(app.show(text, "", str(checkpoints / "masked"), 0, PLACE, 8), *words)


def test_so_is_a_sentence_to_compare_with(checkpoints):
    assert is_refused(app.show(TEXT, "cat " * 40, str(checkpoints / "masked"), 0, PLACE, 8), "42 tokens")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut off", ["cannot be loaded"]),
        ("no json", ["cannot be loaded"]),
        ("nowhere", ["no folder with a config.json"]),
        ("not calibrated", ["not calibrated", "model.calibrate"]),
        ("another kind", ["of type gpt2", "spikelm"]),
        ("weights missing", ["lacks weights", "layer.1.intermediate.dense.bias"]),
    ],
)
def test_a_checkpoint_that_is_broken_is_refused_in_a_line(checkpoints, name, words):
    assert is_refused(app.show(TEXT, "", str(checkpoints / name), 0, PLACE, 8), name, *words)


def test_visitors_of_a_space_see_no_folder_of_it_and_no_model_of_its_owner(checkpoints, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "somebody/space")
    assert is_refused(
        app.show(TEXT, "", str(checkpoints / "not calibrated"), 0, PLACE, 8), "names a folder of the machine"
    )
    assert is_refused(app.show(TEXT, "", "/nowhere", 0, PLACE, 8), "names a folder of the machine")
    asked = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: asked.append(options["token"]) or 1 / 0)
    app.show(TEXT, "", "owner/private", 0, PLACE, 8)
    assert asked == [False]


def test_no_checkpoint_is_refused():
    assert is_refused(app.show(TEXT, "", None, 0, PLACE, 8), "Choose a checkpoint")


def test_the_controls_offer_what_the_checkpoint_has(checkpoints):
    layer, place = app._controls_for(str(checkpoints / "masked"), 5, PLACE)
    assert (layer["maximum"], layer["value"], place["value"]) == (1, 1, PLACE)
    assert ("feed-forward out", PLACE) in place["choices"] and len(place["choices"]) == 6


def test_programs_ask_for_one_thing_and_get_what_the_page_shows(url, checkpoints):
    assert url.startswith("http://127.0.0.1:")
    client = Client(url, verbose=False)
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/show"]
    folder = str(checkpoints / "masked")
    facts, raster, guesses, rates, energy = client.predict(TEXT, OTHER, folder, 0, PLACE, 32, api_name="/show")
    shown = app.show(TEXT, OTHER, folder, 0, PLACE, 32)
    assert facts == shown[0]
    drawn = json.loads(raster["value"]["plot"])["data"]
    assert [panel["z"] for panel in drawn] == [[list(row) for row in panel.z] for panel in shown[1]["value"].data]
    message, *_ = client.predict("", "", folder, 0, PLACE, 32, api_name="/show")
    assert "empty" in message


def test_the_header_is_what_the_hub_reads():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (SPACE / "requirements.txt").read_text(), re.MULTILINE))
    assert (header["sdk"], header["sdk_version"]) == ("gradio", pins["gradio"]) == ("gradio", gr.__version__)
    assert (SPACE / header["app_file"]).is_file() and len(header["short_description"]) <= 60
    # What runs there is what is tested here.
    project = dict(re.findall(r"^([\w-]+)==(\S+)$", (PROJECT_ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {name: project[name] for name in pins if name in project} == {
        name: version for name, version in pins.items() if name in project
    }


def test_the_space_needs_nothing_else_of_the_project_and_the_network_for_named_checkpoints_alone(tmp_path, checkpoints):
    folder = tmp_path / "space"
    subprocess.run(["make", "-s", "space", f"SPACE={folder}"], cwd=PROJECT_ROOT, check=True, capture_output=True)
    code = f"""
import socket
from unittest import mock
def refuse(*address):
    raise SystemExit(f"asked the network: {{address}}")
with mock.patch.object(socket.socket, "connect", refuse), mock.patch.object(socket, "getaddrinfo", refuse):
    import app, modeling_spikelm, spike_metrics
    for module in (app, modeling_spikelm, spike_metrics):
        assert module.__file__.startswith({str(folder)!r}), module.__file__
    checkpoint = app.offered()[0][1]
    assert checkpoint.startswith({str(folder)!r})
    print(app.show("A man plays the guitar.", "", checkpoint, 0, "output.neurons", 8)[0])
from huggingface_hub import HfApi
HfApi().create_repo("tester/masked")
HfApi().upload_folder(repo_id="tester/masked", folder_path={str(checkpoints / "masked")!r})
for name in ("tester/masked", "tester/nothing"):
    print(app.show({TEXT!r}, "", name, 0, "output.neurons", 8)[0])
"""
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spikelm-minilm-l6" in done.stdout and "2 layers, 16 wide, elastic" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("⚠️ tester/nothing cannot be loaded: ")
    assert {path.name for path in folder.iterdir()} >= {"README.md", "requirements.txt", "app.py"}
