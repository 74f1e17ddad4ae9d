"""What the page shows, on small models: the figures hold what was counted."""

import pytest
import torch
from explorer import figures
from explorer.checkpoints import OURS, load
from explorer.observing import answer, hint, observe, similarity

from spike_metrics.counting import count
from spike_metrics.energy import compute_energy
from spike_metrics.spikes import record_spikes, spike_sizes
from tests.space.conftest import OTHER, TEXT


@pytest.fixture
def masked(checkpoints):
    return observe(str(checkpoints / "masked"), TEXT)


def test_the_raster_has_every_spike_and_says_amplitude_and_rate_of_each_neuron(masked):
    name = masked.groups[1, "output.neurons"]
    figure = figures.raster(masked, 1, "output.neurons", neurons=1000)
    spikes, sizes = masked.spikes[name], masked.sizes[name]
    assert [list(panel.z) for panel in figure.data] == spikes.tolist()
    assert [label.partition(" ")[2] for label in figure.data[0].y] == list(masked.tokens)
    fired = (spikes[:, :, 5] != 0).float().mean()
    assert figure.data[1].x[5] == f"neuron 5, amplitude {sizes[1, 5]:.3g}, fires at {fired:.0%}"
    assert "%{x}" in figure.data[1].hovertemplate and "%{y}" in figure.data[1].hovertemplate


def test_a_raster_of_fewer_neurons_spreads_them_over_the_group(masked):
    figure = figures.raster(masked, 0, "output.neurons", neurons=3)
    assert [label.split(",")[0] for label in figure.data[0].x] == ["neuron 0", "neuron 12", "neuron 23"]


def test_what_looks_like_html_in_a_text_is_shown_as_it_is(checkpoints):
    seen = observe(str(checkpoints / "masked"), "the < b > cat")
    labels = figures.raster(seen, 0, "output.neurons", 8).data[0].y
    assert "2 &lt;" in labels and not any("<" in label for label in labels)


def test_rates_and_energies_are_those_that_are_counted(checkpoints, masked, tokenizer):
    model = load(str(checkpoints / "masked")).model
    counted = count(model, [dict(tokenizer(TEXT, return_tensors="pt"))])
    (panel,) = figures.rates(masked).data
    by_name = {group.name: group.firing_rates for group in counted.neurons}
    expected = [[100 * sum(by_name[masked.groups[layer, place]]) / 2 for place in masked.places] for layer in range(2)]
    assert [list(row) for row in panel.z] == [pytest.approx(row) for row in expected]
    bars = {bar.name: sum(bar.x) for bar in figures.energy(masked).data}
    own, dense = (compute_energy(counted.encoder, dense=is_dense).convention for is_dense in (False, True))
    assert bars == pytest.approx({"this model": own, "without spikes": dense})
    assert masked.millijoules == pytest.approx((own, dense))


def test_a_mask_is_filled_with_what_the_head_finds_likely(checkpoints, tokenizer):
    folder = str(checkpoints / "masked")
    batch = dict(tokenizer(TEXT, return_tensors="pt"))
    with torch.no_grad():
        logits = load(folder).model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
    best = logits.softmax(-1).topk(5)
    guesses = answer(folder, TEXT)
    assert list(guesses) == tokenizer.convert_ids_to_tokens(best.indices[0])
    assert list(guesses.values()) == pytest.approx(best.values[0].tolist(), abs=1e-5)
    assert answer(folder, "the cat") == {} and "[MASK]" in hint(folder)


def test_labels_have_their_names(checkpoints):
    guesses = answer(str(checkpoints / "labels"), TEXT)
    assert guesses.keys() == {"a question", "an answer"} and sum(guesses.values()) == pytest.approx(1, abs=1e-5)


def test_the_similarity_is_the_cosine_of_means_over_tokens(checkpoints, tokenizer):
    folder = str(checkpoints / "labels")
    model = load(folder).model
    with torch.no_grad():
        one, two = (
            model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (TEXT, OTHER)
        )
    assert similarity(folder, TEXT, OTHER) == pytest.approx((one @ two / one.norm() / two.norm()).item(), abs=1e-5)
    assert similarity(folder, TEXT, TEXT) == pytest.approx(1)


def test_a_dense_model_has_an_energy_and_no_spikes(checkpoints):
    seen = observe(str(checkpoints / "dense"), TEXT)
    own, dense = seen.millijoules
    assert not seen.spikes and own == dense > 0


def test_int8_weights_show_the_spikes_of_the_checkpoint(tokenizer):
    seen = observe(str(OURS), "A man plays the guitar.")
    model = type(load(str(OURS)).model).from_pretrained(OURS)
    assert model.config.int8_weights
    own = load(str(OURS)).tokenizer
    spikes = record_spikes(model, dict(own("A man plays the guitar.", return_tensors="pt")))
    assert seen.spikes.keys() == spikes.keys()
    assert all(torch.equal(seen.spikes[name], spikes[name]) for name in spikes)
    sizes = spike_sizes(model)
    assert all(torch.equal(seen.sizes[name], sizes[name]) for name in sizes)
