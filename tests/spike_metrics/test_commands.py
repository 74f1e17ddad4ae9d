"""measure_spikes.py and draw_spikes.py."""

import base64
import copy
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, BertConfig, PreTrainedConfig

import draw_spikes
import measure_spikes
from configuration_spikelm import SpikeLMLlamaConfig
from modeling_spikelm import SpikeLMLlamaForCausalLM
from spike_metrics.counting import count
from spike_metrics.heads import auto_class_of
from spike_metrics.pictures import draw_amplitudes, draw_energy, draw_firing_rates, draw_raster, draw_sentence


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "spikelm")
    tokenizer.save_pretrained(tmp_path / "spikelm")
    return str(tmp_path / "spikelm")


@pytest.fixture
def dense_checkpoint(bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


SENTENCES = ["the cat sat on the mat", "the dog"]
SHORT = ["--max_seq_length", "16"]


def measure(checkpoint, *arguments):
    measure_spikes.main(["--model_name_or_path", checkpoint, *SHORT, *arguments])


def test_counts_and_energies_go_into_json(checkpoint, model, tokenizer, tmp_path, capsys):
    report_file = tmp_path / "spikes.json"
    measure(checkpoint, "--text", *SENTENCES, "--output_file", str(report_file), "--per_neuron")
    report = json.loads(report_file.read_text())
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    for name, include_padding in (("without_padding", False), ("with_padding", True)):
        assert report[name]["counts"] == json.loads(json.dumps(count(model, [batch], include_padding).to_dict(True)))
    assert report["without_padding"]["counts"]["tokens"] < report["with_padding"]["counts"]["tokens"]
    energy = report["with_padding"]["energy_mj_per_sequence"]
    assert energy["encoder"]["convention"] < energy["encoder"]["dense"] < energy["model"]["dense"]
    output = capsys.readouterr().out
    assert "without padding" in output and "with padding" in output and "softmax" in output


def test_a_dense_model_is_the_baseline_by_the_same_command(checkpoint, dense_checkpoint, tmp_path):
    reports = []
    for folder in (checkpoint, dense_checkpoint):
        report_file = tmp_path / "report.json"
        measure(folder, "--text", *SENTENCES, "--output_file", str(report_file))
        reports.append(json.loads(report_file.read_text())["without_padding"])
    spiking, dense = (report["energy_mj_per_sequence"] for report in reports)
    assert spiking["encoder"]["dense"] == pytest.approx(dense["encoder"]["convention"])
    assert (dense["encoder"]["ratio"], dense["published_convention"]) == (1, None)
    assert reports[1]["counts"]["firing_rate"] is None


def test_files_datasets_and_sentences_count_the_same(checkpoint, tmp_path):
    (tmp_path / "lines.txt").write_text("\n\n".join(SENTENCES))
    (tmp_path / "table.csv").write_text("sentence\n" + "\n".join(SENTENCES) + "\n")
    Dataset.from_dict({"text": SENTENCES}).save_to_disk(tmp_path / "saved")
    sources = [
        ["--text", *SENTENCES],
        ["--text_file", str(tmp_path / "lines.txt")],
        ["--text_file", str(tmp_path / "table.csv"), "--text_column_name", "sentence"],
        ["--text_file", str(tmp_path / "saved")],
    ]
    reports = []
    for source in sources:
        measure(checkpoint, *source, "--output_file", str(tmp_path / "out.json"))
        reports.append(json.loads((tmp_path / "out.json").read_text()))
    assert all(report == reports[0] for report in reports[1:])


def save_rows(folder, *rows) -> str:
    Dataset.from_dict({"input_ids": list(rows)}, Features({"input_ids": List(Value("int64"))})).save_to_disk(folder)
    return str(folder)


def test_tokenised_rows_without_a_token_are_dropped_and_that_is_said(checkpoint, tmp_path, caplog):
    rows, reports = [[5, 6, 7], [], [8], None, [9]], []
    for name, used in (("all", rows), ("full", list(filter(None, rows)))):
        report_file = tmp_path / "out.json"
        arguments = ["--max_samples", "2", "--output_file", str(report_file)]
        measure(checkpoint, "--text_file", save_rows(tmp_path / name, *used), *arguments)
        reports.append(json.loads(report_file.read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["without_padding"]["counts"]["sequences"] == 2
    (message,) = (message for message in caplog.messages if "they hold no token" in message)
    assert message.endswith("all: 3 rows read, 2 used, 1 dropped (they hold no token).")
    with pytest.raises(SystemExit, match="none holds no document: no row has a token"):
        measure(checkpoint, "--text_file", save_rows(tmp_path / "none", [], None))


@pytest.mark.parametrize("token", [60, -1])
def test_a_token_that_the_model_does_not_have_is_one_line(token, checkpoint, tmp_path):
    folder = save_rows(tmp_path / "rows", [5, 6], [7, token])
    with pytest.raises(SystemExit, match=f"A tokenised row holds the token {token}, but the model has only vocab_size"):
        measure(checkpoint, "--text_file", folder)


def test_padding_to_the_full_length_as_published(checkpoint, tmp_path):
    measure(checkpoint, "--text", "the cat", "--pad_to_max_length", "--output_file", str(tmp_path / "out.json"))
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["with_padding"]["counts"]["tokens"] == 16


def test_a_sequence_may_have_a_single_token_of_text(checkpoint, tmp_path):
    report_file = tmp_path / "out.json"
    measure(checkpoint, "--text", *SENTENCES, "--max_seq_length", "3", "--output_file", str(report_file))
    assert json.loads(report_file.read_text())["without_padding"]["counts"]["tokens"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --text"),
        (["--text", "a", "--text_file", "b"], "exactly one of --text"),
        (["--text", " "], "blank"),
        (["--text", "a", "--split", "test"], "--split says what to read of data, and --text is read as it is"),
        (["--text", "a", "--text_column_name", "sentence"], "--text_column_name says what to read"),
        (["--text", "a", "--dataset_config_name", "en"], "--dataset_config_name says what to read"),
        (["--text", "a", "--max_seq_length", "64"], "max_position_embeddings=32"),
        (["--text", "a", "--max_seq_length", "1"], "--max_seq_length 1 leaves no room for text beside the 2 special"),
        (["--text", "a", "--max_seq_length", "2"], "give 3 or more"),
        (["--text", "a", "--batch_size", "0"], "--batch_size has to be at least 1"),
        (["--text", "a", "--per_neuron"], "--output_file"),
        (["--text", "a", "--output_file", "no/such/folder/x.json"], "does not exist"),
        (["--text_file", "no-such-file.txt"], "no-such-file.txt does not exist"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, message):
    with pytest.raises(SystemExit, match=message):
        measure(checkpoint, *arguments)


def test_a_report_replaces_only_reports_and_is_never_read_as_text(checkpoint, tmp_path):
    texts, users = tmp_path / "texts", tmp_path / "users.json"
    texts.mkdir()
    (texts / "lines.txt").write_text("the cat")
    users.write_text('{"text": "mine"}')
    (tmp_path / "report.json").write_text("not JSON")
    for output in (users, tmp_path / "report.json"):
        with pytest.raises(SystemExit, match=f"--output_file {output} is there and is no report"):
            measure(checkpoint, "--text_file", str(users), "--output_file", str(output))
    with pytest.raises(SystemExit, match="would be read as text"):
        measure(checkpoint, "--text_file", str(texts), "--output_file", str(texts / "report.json"))
    assert users.read_text() == '{"text": "mine"}' and len(list(texts.iterdir())) == 1


def test_pictures_do_not_replace_a_page_of_somebody_else(checkpoint, tmp_path):
    (tmp_path / "index.html").write_text("my home page")
    command = ["--model_name_or_path", str(checkpoint), *SHORT, "--text", *SENTENCES, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="holds index.html, which this command did not write"):
        draw_spikes.main(command)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.html"]


def test_pictures_and_a_page_that_holds_them(checkpoint, tmp_path):
    text = "the cat <b> $ and $ the dog"
    folder = tmp_path / "pictures"
    awkward = Path(checkpoint).rename(tmp_path / "a<b>&c")
    draw_spikes.main(
        ["--model_name_or_path", str(awkward), *SHORT, "--text", text, SENTENCES[1], "--output_dir", str(folder)]
    )
    names = {"sentence.png", "raster_layer_0.png", "raster_layer_1.png"}
    names |= {"firing_rates.png", "amplitudes.png", "energy.png"}
    assert {path.name for path in folder.iterdir()} == names | {"index.html", "written_files.json"}
    page = (folder / "index.html").read_text()
    embedded = {base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert embedded == {(folder / name).read_bytes() for name in names}
    assert "<h1>Spikes of a&lt;b&gt;&amp;c</h1>" in page
    assert not re.search(r"<script|<link|https?://", page)
    assert "the cat &lt;b&gt; $ and $ the dog" in page and "elastic, amplitude_scale 2.0" in page
    assert "python draw_spikes.py --model_name_or_path" in page and '<meta name="viewport"' in page
    for name in names:
        with Image.open(folder / name) as image:
            assert min(image.size) > 200


def test_the_raster_shows_every_spike_in_its_place():
    spikes = torch.zeros(2, 3, 5, dtype=torch.int8)
    spikes[1, 2, 4], spikes[0, 0, 1] = 1, -1
    figure = draw_raster({"encoder.layer.7.output.neurons": spikes}, ["a", "b", "c"], layer=7)
    panels = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert [panel.T.tolist() for panel in panels] == spikes.tolist()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="Layer 3"):
        draw_raster({"encoder.layer.7.output.neurons": spikes}, ["a", "b", "c"], layer=3)


def test_the_raster_has_its_first_neuron_lowest_and_says_what_white_is():
    figure = draw_raster({"encoder.layer.0.output.neurons": torch.zeros(1, 2, 3, dtype=torch.int8)}, ["a", "b"], 0)
    low, high = figure.axes[0].get_ylim()
    assert low < high
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["+ spike", "- spike", "silent"]


def test_the_title_of_a_narrow_raster_is_not_printed_over():
    figure = draw_raster({"encoder.layer.0.output.neurons": torch.zeros(1, 2, 3, dtype=torch.int8)}, ["a", "b"], 0)
    figure.savefig(io.BytesIO(), format="png")
    title, colours = (part.get_window_extent() for part in (figure._suptitle, figure.legends[0]))
    assert not title.overlaps(colours)


def test_a_sentence_is_drawn_line_by_line_as_it_enters_its_layers():
    entrance, other = torch.zeros(2, 1, 3, 5, dtype=torch.int8)
    entrance[0, 2, 4], other[0, 0, 0] = 1, -1
    spikes = {"layer.3.attention.self.neurons": entrance, "layer.3.output.neurons": other}
    (axis,) = draw_sentence(spikes, ["a", "b", "c"], [3], 5).axes
    assert np.asarray(axis.images[0].get_array()).tolist() == entrance[0].tolist()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    assert axis.get_title() == "layer 3: 7% fire"


def test_a_large_head_does_not_hide_the_energy_of_the_encoder(model, batch):
    encoder, behind = draw_energy(count(model, [batch])).axes
    longest = [max(bar.get_width() for bar in axis.patches) for axis in (encoder, behind)]
    assert [axis.get_xlim()[1] / bar for axis, bar in zip((encoder, behind), longest, strict=True)] == [
        pytest.approx(1.12)
    ] * 2
    assert "decoder" in " ".join(label.get_text() for label in behind.get_yticklabels())
    assert "decoder" not in " ".join(label.get_text() for label in encoder.get_yticklabels())


def test_colours_of_rates_end_at_all_neurons_and_those_of_amplitudes_at_each_panels_largest(model, batch):
    counted = count(model, [batch])
    assert {axis.images[0].get_clim() for axis in draw_firing_rates(counted).axes} == {(0, 100)}
    for axis in draw_amplitudes(counted).axes:
        assert axis.images[0].get_clim() == (0, np.asarray(axis.images[0].get_array()).max())


@pytest.mark.parametrize(("layers", "message"), [("2", "layers 0 to 1"), ("-3", "layers 0 to 1")])
def test_a_layer_that_is_not_there_is_an_error(checkpoint, tmp_path, layers, message):
    folder = tmp_path / "pictures"
    arguments = ["--model_name_or_path", checkpoint, *SHORT, "--text", "a", "--output_dir", str(folder)]
    with pytest.raises(SystemExit, match=message):
        draw_spikes.main([*arguments, "--raster_layers", layers])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("architectures", "auto_class"),
    [(["BertForMaskedLM"], "AutoModelForMaskedLM"), (["BertModel"], "AutoModel"), (None, "AutoModel")],
)
def test_a_checkpoint_is_loaded_as_what_it_was_saved_as(architectures, auto_class):
    assert auto_class_of(BertConfig(architectures=architectures)).__name__ == auto_class


def test_code_that_comes_with_a_checkpoint_names_its_own_class():
    config = PreTrainedConfig(architectures=["Other"], auto_map={"AutoModelForMaskedLM": "someone/repo--file.Other"})
    assert auto_class_of(config).__name__ == "AutoModelForMaskedLM"


@pytest.fixture
def decoder(tokenizer, tmp_path) -> str:
    """One whose tokenizer has an end of a text and no padding, as many have."""
    config = SpikeLMLlamaConfig(
        **{"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "eos_token_id": None},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_time_steps": 2, "max_position_embeddings": 32},
    )
    decoder = SpikeLMLlamaForCausalLM(config)
    decoder.calibrate([{"input_ids": torch.arange(5, 15)[None]}])
    decoder.save_pretrained(tmp_path / "decoder")
    without = copy.deepcopy(tokenizer)
    without.pad_token, without.eos_token = None, without.sep_token
    without.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def test_a_decoder_is_counted_with_its_head_and_drawn(decoder, tmp_path, capsys):
    measure(decoder, "--text", *SENTENCES)
    assert "lm_head" in capsys.readouterr().out
    draw_spikes.main(["--model_name_or_path", decoder, *SHORT, "--text", "the cat", "--output_dir", str(tmp_path)])
    assert (tmp_path / "sentence.png").is_file() and (tmp_path / "energy.png").is_file()


@pytest.mark.parametrize("kind", ["checkpoint", "decoder"])
def test_int8_weights_are_counted_as_the_float_model_that_they_stand_for(kind, tokenizer, tmp_path, request):
    folder = request.getfixturevalue(kind)
    model = auto_class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder).quantize_weights()
    reports = []
    for name in ("int8", "float"):
        (model if name == "int8" else model.dequantize_weights()).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
        measure(str(tmp_path / name), "--text", "the cat", "--output_file", str(tmp_path / f"{name}.json"))
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["without_padding"]["counts"]["accumulates"] > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_on_whichever_side_it_is(side, tokenizer):
    tokenizer.padding_side = side
    short, batch = (tokenizer(SENTENCES[::-1][:number], padding=True, return_tensors="pt") for number in (1, 2))
    first = draw_spikes.only_first(dict(batch))
    assert first.keys() == short.keys()
    assert all(torch.equal(first[name], short[name]) for name in first)


def test_a_dense_model_has_nothing_to_draw(dense_checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    arguments = ["--model_name_or_path", dense_checkpoint, *SHORT, "--text", "a", "--output_dir", str(folder)]
    with pytest.raises(SystemExit, match="no spiking neurons"):
        draw_spikes.main(arguments)
    assert not folder.exists()
