"""Counting an encoder and a decoder, which see sequences of their own."""

import json

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BartForSequenceClassification

import draw_spikes
import measure_spikes
from configuration_spikelm import SpikeLMBartConfig
from modeling_spikelm import SpikeLMBartForConditionalGeneration
from spike_metrics.counting import SpikeCounter, count
from spike_metrics.counts import layer_and_place
from spike_metrics.energy import compute_energy, energy_with_data_movement
from spike_metrics.evaluation import spike_figures
from spike_metrics.inputs import with_target
from spike_metrics.report import energies
from spike_metrics.spikes import record_spikes

WIDTH, ENCODER_WIDE, DECODER_WIDE, WORDS, LAYERS = 16, 24, 20, 60, 2
SIZES = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": ENCODER_WIDE,
    "decoder_ffn_dim": DECODER_WIDE,
    "max_position_embeddings": 32,
}
# Of the three rows of the batch, what is read; and what is written.
READ, WRITTEN = (7, 6, 5), (4, 1, 7)


@pytest.fixture
def pairs(batch) -> dict[str, torch.Tensor]:
    """Sources of seven positions, and targets of as many."""
    labels = torch.randint(5, WORDS, (3, 7), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(WRITTEN):
        labels[row, length:] = -100
    return batch | {"labels": labels}


@pytest.fixture
def writer(pairs) -> SpikeLMBartForConditionalGeneration:
    return make_writer(pairs)


def make_writer(pairs, **fields) -> SpikeLMBartForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"num_time_steps": 2, "init_std": 0.3} | fields
    model = SpikeLMBartForConditionalGeneration(SpikeLMBartConfig(**SIZES | fields))
    model.calibrate(pairs)
    return model


def test_multiply_accumulates_of_a_bart_by_hand(pairs):
    counted = count(BartForConditionalGeneration(BartConfig(**SIZES)), [pairs])
    assert (counted.tokens, counted.written_tokens) == (sum(READ), sum(WRITTEN))
    encoder = sum(READ) * (4 * WIDTH**2 + 2 * WIDTH * ENCODER_WIDE) + 2 * WIDTH * sum(n * n for n in READ)
    of_source = sum(READ) * 2 * WIDTH**2  # keys and values of cross-attention
    decoder = sum(WRITTEN) * (6 * WIDTH**2 + 2 * WIDTH * DECODER_WIDE)
    attention = 2 * WIDTH * sum(n * (n + 1) // 2 + n * read for n, read in zip(WRITTEN, READ, strict=True))
    head = sum(WRITTEN) * WIDTH * WORDS
    assert counted.macs == LAYERS * (encoder + of_source + decoder + attention) + head
    assert counted.writing.macs == LAYERS * (decoder + attention) + head
    counted.check_is_complete()


@pytest.mark.parametrize("neuron", ["elastic", "learned"])
def test_a_spiking_bart_is_the_same_network_with_spikes_in_every_layer(neuron, pairs):
    spiking = count(make_writer(pairs, neuron=neuron), [pairs])
    dense = count(BartForConditionalGeneration(BartConfig(**SIZES)), [pairs])
    assert {p.name: (p.dense_macs, p.bias_adds // p.steps) for p in spiking.products} == {
        p.name: (p.macs, p.bias_adds) for p in dense.products
    }
    assert {product.name for product in spiking.products if not product.sees_spikes} == {"lm_head"}
    assert 0 < spiking.firing_rate < 1
    assert len(spiking.neurons) == LAYERS * (6 + 10) + 1
    spiking.check_is_complete()


def test_every_group_is_counted_at_the_tokens_that_it_sees(writer, pairs):
    for group in count(writer, [pairs]).neurons:
        reads = ".encoder." in group.name or "memory_neurons" in group.name
        reads |= "encoder_attn.key" in group.name or "encoder_attn.value" in group.name
        assert group.positions == (sum(READ) if reads else sum(WRITTEN)), group.name
    with_padding = count(writer, [pairs], include_padding=True)
    assert {group.positions for group in with_padding.neurons} == {21}


def test_accumulates_of_attention_are_those_of_every_pair_that_meets(writer):
    inputs = {"input_ids": torch.randint(5, WORDS, (1, 6)), "decoder_input_ids": torch.randint(5, WORDS, (1, 4))}
    counted = {product.name: product for product in count(writer, [inputs]).products}
    spikes = record_spikes(writer, inputs)
    for name, sees in (
        ("encoder.layers.1.self_attn", lambda query, key: True),
        ("decoder.layers.1.self_attn", lambda query, key: key <= query),
        ("decoder.layers.1.encoder_attn", lambda query, key: True),
    ):
        name, queries = f"model.{name}", 6 if name.startswith("encoder.") else 4
        for suffix, role in ((".q k^T", "key"), (".probs v", "value")):
            fired = spikes[f"{name}.{role}_neurons"]
            pairs = [(q, k) for q in range(queries) for k in range(fired.shape[1]) if sees(q, k)]
            expected = [sum(int(step[key].count_nonzero()) for _, key in pairs) for step in fired]
            product = counted[name + suffix]
            assert product.accumulates == expected
            # In each of two steps: a score for every pair and head, or a vector of all heads for every query.
            scores = len(pairs) * (4 if name.startswith("model.encoder") else 2)
            assert product.outputs == 2 * (scores if role == "key" else queries * WIDTH)


@pytest.mark.parametrize("given", ["labels", "tokenizer's labels", "ids", "texts", "encoded"])
def test_a_target_is_found_however_it_is_given(given, writer, pairs):
    labels = pairs.pop("labels")
    ids = writer.prepare_decoder_input_ids_from_labels(labels)
    wanted = sum(WRITTEN)
    if given == "labels":
        pairs["labels"] = labels
    elif given == "tokenizer's labels":
        pairs["labels"] = labels.masked_fill(labels == -100, writer.config.pad_token_id)
    elif given == "ids":
        pairs |= {"decoder_input_ids": ids, "decoder_attention_mask": (labels != -100).long()}
    elif given == "encoded":
        pairs |= {"encoder_outputs": writer.get_encoder()(**pairs), "labels": labels}
        pairs["input_ids"] = None
    else:  # the decoder reads the source behind a first token, of whatever is no padding
        wanted = sum(min(length + 1, 7) for length in READ)
    counted = count(writer, [pairs])
    assert (counted.tokens, counted.written_tokens) == (sum(READ), wanted)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1]), torch.eye(3)], ids=["a class", "several classes"])
def test_labels_that_are_classes_are_no_target(labels, batch):
    config = BartConfig(**SIZES, num_labels=3, eos_token_id=2)
    batch["input_ids"][:, 2] = config.eos_token_id
    model = BartForSequenceClassification(config)
    assert count(model, [batch | {"labels": labels}]).to_dict() == count(model, [batch]).to_dict()


def test_a_written_token_costs_what_a_longer_target_adds(writer):
    """But for attention, whose pairs are not the same for each, and has no part here: a single token is read."""
    source = torch.randint(5, WORDS, (1, 1))
    joules = energies(count(writer, [{"input_ids": source, "decoder_input_ids": source}]))
    product = energies(count(writer, [{"input_ids": source, "decoder_input_ids": source}]).writing)["model"]
    assert joules["written_token"]["convention"] == product["convention"] < joules["model"]["convention"]
    assert joules["written_token"]["ratio"] > 1
    two = count(writer, [{"input_ids": source, "decoder_input_ids": source.repeat(1, 2)}])
    assert energies(two)["written_token"]["convention"] == compute_energy(two.writing).convention / 2
    figures = spike_figures(two)
    assert figures["token_energy_mj"] == energies(two)["written_token"]["convention"]
    assert figures["token_energy_ratio"] == figures["token_dense_energy_mj"] / figures["token_energy_mj"]


def test_membranes_that_move_are_those_of_the_part(writer, pairs):
    counted = count(writer, [pairs])
    whole, written = (energy_with_data_movement(part).membranes for part in (counted, counted.writing))
    assert 0 < written < whole
    sees_source = [group for group in counted.neurons if group.is_of_source]
    assert {group.name.split(".")[1] for group in sees_source} == {"encoder", "decoder"}
    assert all(energy_with_data_movement(part).membranes == 0 for part in counted.by_place().values())


def test_generation_is_not_counted_as_it_runs(writer, pairs):
    with SpikeCounter(writer), pytest.raises(ValueError, match="ran and the whole model did not, as where generate"):
        writer.generate(pairs["input_ids"])


def test_generation_after_a_forward_is_not_counted_either(writer, pairs):
    with SpikeCounter(writer) as counter:
        writer(**pairs)
        before = counter.result().to_dict()
        with pytest.raises(ValueError, match="ran and the whole model did not"):
            writer.generate(pairs["input_ids"])
    assert counter.result().to_dict() == before


def test_a_layer_and_its_stack_are_told_from_a_name():
    assert layer_and_place("model.decoder.layers.3.encoder_attn.q_proj") == (3, "decoder.encoder_attn.q_proj")
    assert layer_and_place("model.encoder.layers.0.fc1") == (0, "encoder.fc1")
    assert layer_and_place("model.layers.1.mlp.down_proj") == (1, "mlp.down_proj")


def test_the_commands_count_and_draw_what_a_model_reads_and_writes(pairs, tokenizer, tmp_path, capsys):
    writer = make_writer(pairs, num_time_steps=1, encoder_layers=1, decoder_layers=1)
    # Words for ids that the tokenizer has, but its own padding, which is 0.
    writer.config.pad_token_id = writer.generation_config.pad_token_id = tokenizer.pad_token_id
    writer.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    report_file = tmp_path / "spikes.json"
    arguments = ["--model_name_or_path", str(tmp_path / "writer"), "--max_seq_length", "16"]
    sentences = ["the cat sat on the mat", "the dog"]
    measure_spikes.main([*arguments, "--text", *sentences, "--max_new_tokens", "5", "--output_file", str(report_file)])
    printed = capsys.readouterr().out
    assert "tokens written" in printed and "of a token written, with the head" in printed
    report = json.loads(report_file.read_text())["without_padding"]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt", return_token_type_ids=False)
    written = writer.generate(**inputs, max_new_tokens=5)
    assert report["counts"]["written_tokens"] == int((written[:, 1:] != tokenizer.pad_token_id).sum())
    token = report["energy_mj_per_sequence"]["written_token"]
    assert 0 < token["convention"] < token["dense"]
    pictures = tmp_path / "pictures"
    draw_spikes.main([*arguments, "--text", *sentences, "--max_new_tokens", "5", "--output_dir", str(pictures)])
    sides = [f"{side}_{name}.png" for side in ("encoder", "decoder") for name in ("raster_layer_0", "sentence")]
    assert {*sides, "energy.png", "index.html"} <= {path.name for path in pictures.iterdir()}
    with pytest.raises(SystemExit, match="--max_new_tokens 33 is more than the model's max_position_embeddings=32"):
        measure_spikes.main([*arguments, "--text", "a", "--max_new_tokens", "33"])


def test_a_layer_that_one_stack_alone_has_is_drawn_there(pairs, tokenizer, tmp_path):
    writer = make_writer(pairs, num_time_steps=1, encoder_layers=1, decoder_layers=2)
    for part in (writer, tokenizer):
        part.save_pretrained(tmp_path / "writer")
    arguments = ["--model_name_or_path", str(tmp_path / "writer"), "--max_seq_length", "16", "--text", "the cat"]
    arguments += ["--max_new_tokens", "3", "--raster_neurons", "2", "--output_dir", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit, match="--raster_layers 2: the model has the layers 0 to 1"):
        draw_spikes.main([*arguments, "--raster_layers", "2"])
    draw_spikes.main([*arguments, "--raster_layers", "1"])
    drawn = {path.name for path in (tmp_path / "pictures").glob("*coder_*.png")}
    assert drawn == {"decoder_sentence.png", "decoder_raster_layer_1.png"}


def test_layers_are_counted_from_the_end_of_their_own_stack():
    sides = {"encoder_": ["encoder.layers.0.fc1"], "decoder_": [f"decoder.layers.{layer}.fc1" for layer in range(3)]}
    assert draw_spikes.chosen_layers(sides, [0, -1]) == {"encoder_": [0], "decoder_": [0, 2]}
    assert draw_spikes.chosen_layers(sides, [-2]) == {"decoder_": [1]}


@pytest.mark.parametrize("padding", [1, 2, None], ids=["own", "the end", "none"])
def test_the_end_that_is_written_is_counted_whatever_fills_up_a_row(padding, writer, monkeypatch):
    end = writer.config.eos_token_id
    assert end == 2
    filler = end if padding is None else padding
    writer.config.pad_token_id = writer.generation_config.pad_token_id = padding
    written = torch.tensor([[2, 5, 6, end], [2, end, filler, filler]])
    monkeypatch.setattr(writer, "generate", lambda **_: written)
    batch = with_target(writer, {"input_ids": torch.tensor([[5, 6], [7, 8]])}, 3)
    assert batch["decoder_input_ids"].tolist() == written[:, :-1].tolist()
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert count(writer, [batch]).written_tokens == 4


@pytest.mark.parametrize(("ends", "tokens"), [(None, 4), (0, 3), ([3, 0], 2)])
def test_a_row_ends_where_any_end_is_written_if_there_is_one(ends, tokens, writer, monkeypatch):
    writer.generation_config.eos_token_id = ends
    monkeypatch.setattr(writer, "generate", lambda **_: torch.tensor([[2, 5, 3, 0, 7]]))
    mask = with_target(writer, {"input_ids": torch.tensor([[5, 6]])}, 4)["decoder_attention_mask"]
    assert mask.sum() == tokens


def test_one_text_is_written_of_a_sequence_whatever_a_checkpoint_asks_for(writer, batch):
    plain = with_target(writer.eval(), batch, 3)
    writer.generation_config.update(num_return_sequences=2, num_beams=2, return_dict_in_generate=True)
    asked = with_target(writer, batch, 3)
    assert all(torch.equal(asked[name], values) for name, values in plain.items())
