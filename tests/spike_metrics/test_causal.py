"""Counting a causal decoder, whose tokens see those before them alone and whose heads share keys and values."""

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configuration_spikelm import SpikeLMLlamaConfig
from modeling_spikelm import SpikeLMLlamaForCausalLM
from spike_metrics.counting import SpikeCounter, count
from spike_metrics.energy import compute_energy
from spike_metrics.spikes import record_spikes

HIDDEN, WIDE, HEADS, SHARED, LAYERS, WORDS = 16, 24, 4, 2, 2, 60
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "intermediate_size": WIDE,
}


@pytest.fixture
def llama_batch(batch) -> dict[str, torch.Tensor]:
    """The batch, padded on the left."""
    return {name: values.flip(1) for name, values in batch.items()}


@pytest.fixture
def decoder(llama_batch) -> SpikeLMLlamaForCausalLM:
    torch.manual_seed(0)
    model = SpikeLMLlamaForCausalLM(SpikeLMLlamaConfig(**SIZES, num_time_steps=2, initializer_range=0.3))
    model.calibrate(llama_batch)
    return model


def test_multiply_accumulates_of_a_llama_by_hand(llama_batch):
    counted = count(LlamaForCausalLM(LlamaConfig(**SIZES)), [llama_batch])
    lengths = (7, 6, 5)
    a_layer = 2 * HIDDEN**2 + 2 * HIDDEN * HIDDEN * SHARED // HEADS + 3 * HIDDEN * WIDE
    attention = LAYERS * 2 * HIDDEN * sum(n * (n + 1) // 2 for n in lengths)
    assert counted.macs == sum(lengths) * (LAYERS * a_layer + HIDDEN * WORDS) + attention
    counted.check_is_complete()


def test_a_spiking_decoder_is_the_same_network_with_spikes_in_every_layer(decoder, llama_batch):
    spiking = count(decoder, [llama_batch])
    dense = count(LlamaForCausalLM(LlamaConfig(**SIZES)), [llama_batch])
    assert {p.name: p.dense_macs for p in spiking.products} == {p.name: p.macs for p in dense.products}
    assert {product.name for product in spiking.products if not product.sees_spikes} == {"lm_head"}
    assert 0 < spiking.firing_rate < 1
    assert len(spiking.neurons) == LAYERS * 6
    spiking.check_is_complete()


def test_a_shift_is_an_addition_for_every_output_where_there_is_no_bias(llama_batch):
    torch.manual_seed(0)
    config = SpikeLMLlamaConfig(**SIZES, num_time_steps=2, initializer_range=0.3, neuron="thrifty")
    model = SpikeLMLlamaForCausalLM(config)
    model.calibrate(llama_batch)
    counted = count(model, [llama_batch])
    layers = [product for product in counted.products if product.name.endswith("_proj")]
    assert len(layers) == LAYERS * 7
    assert counted.bias_adds == sum(product.outputs for product in layers) > 0
    # The dense network has none.
    assert compute_energy(counted, dense=True).biases == 0
    assert compute_energy(counted).biases == pytest.approx(counted.bias_adds * 0.9 / 3 * 1e-9)


@pytest.mark.parametrize("window", [None, 3])
def test_accumulates_of_attention_are_those_of_every_pair_that_meets(decoder, window):
    for layer in decoder.model.layers:
        layer.self_attn.sliding_window = window  # read by the count alone
    ids = torch.randint(0, WORDS, (1, 6))
    counted = {product.name: product for product in count(decoder, [{"input_ids": ids}]).products}
    spikes = record_spikes(decoder, {"input_ids": ids})
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        for suffix, role in ((".q k^T", "key"), (".probs v", "value")):
            expected = [0, 0]
            for query in range(6):
                for key in range(query + 1):
                    if window is None or query - key < window:
                        for step in range(2):
                            fired = spikes[f"{name}.{role}_neurons"][step, key].count_nonzero()
                            expected[step] += int(fired) * HEADS // SHARED
            assert counted[name + suffix].accumulates == expected


@pytest.mark.parametrize("kind", ["Mistral", "Mistral without", "Qwen2 in its last layer"])
def test_a_dense_decoder_with_a_window_meets_the_keys_within_it_alone(kind, llama_batch):
    if kind.startswith("Mistral"):
        windows = [3 if kind == "Mistral" else None] * LAYERS
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=windows[0]))
    else:
        windows = [None, 3]
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1))
    counted = {product.name: product.macs for product in count(model, [llama_batch]).products}
    for layer, window in enumerate(windows):
        pairs = sum(min(query + 1, window or query + 1) for length in (7, 6, 5) for query in range(length))
        for suffix in (".q k^T", ".probs v"):
            assert counted[f"model.layers.{layer}.self_attn{suffix}"] == pairs * HIDDEN


def test_a_window_in_the_configuration_is_that_of_the_layers_that_slide(llama_batch):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    plain = {product.name: product.macs for product in count(model, [llama_batch]).products}
    # Read by the count alone.
    model.config.sliding_window, model.config.layer_types = 3, ["full_attention", "sliding_attention"]
    counted = {product.name: product.macs for product in count(model, [llama_batch]).products}
    fewer = {name for name, macs in counted.items() if macs < plain[name]}
    assert fewer == {f"model.layers.1.self_attn{suffix}" for suffix in (".q k^T", ".probs v")}


def test_a_further_token_costs_what_a_forward_of_one_token_with_a_cache_does(decoder):
    """So a mean over the tokens of a text is one over tokens written; by hand, the spikes that enter each product."""
    decoder.generation_config.eos_token_id = None
    seen = {}
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
    attention = decoder.model.layers[1].self_attn
    attend, met = attention.attend, []

    def watch(query, key, value, *args, **kwargs):
        met.append(int(key.count_nonzero()) * HEADS // SHARED)
        return attend(query, key, value, *args, **kwargs)

    attention.attend = watch
    text = decoder.generate(torch.arange(5, 12)[None], max_new_tokens=5, do_sample=False)
    alone = {name: torch.cat([x for x in inputs if x.shape[1] == 1], dim=1) for name, inputs in seen.items()}
    attention.attend = attend
    # The last token of five was written and not read.
    longer, shorter = (count(decoder, [{"input_ids": text[:, :end]}]) for end in (11, 7))
    for whole, part in zip(longer.products, shorter.products, strict=True):
        more = whole.macs - part.macs + sum(whole.accumulates) - sum(part.accumulates)
        if whole.name in alone:
            # The head makes the logits of one token after the prompt, too.
            inputs = alone[whole.name][:, -4:]
            assert inputs.shape[1] == longer.written_tokens - shorter.written_tokens == 4
            entries = inputs.numel() if whole.name == "lm_head" else inputs.count_nonzero()
            assert more == entries * decoder.get_submodule(whole.name).out_features
        elif whole.name == "model.layers.1.self_attn.q k^T":
            assert more == sum(met[-4:])


@pytest.mark.parametrize("include_padding", [False, True])
def test_generation_is_not_counted_token_by_token(decoder, include_padding):
    with (
        SpikeCounter(decoder, include_padding),
        pytest.raises(ValueError, match=r"as in generate\(\)"),
    ):
        decoder.generate(torch.arange(5, 12)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_in_a_wrapper_it_is_the_model_that_is_counted(wrap, decoder, llama_batch):
    plain = count(decoder, [llama_batch])
    assert plain.written_tokens
    assert count(wrap(decoder), [llama_batch]).to_dict(per_neuron=True) == plain.to_dict(per_neuron=True)
    decoder.quantize_weights()
    assert count(wrap(decoder), [llama_batch]).accumulates > 0.9 * plain.accumulates


def test_a_head_that_runs_on_some_tokens_is_not_counted_as_on_all(decoder, llama_batch):
    with pytest.raises(ValueError, match="With logits_to_keep"):
        count(decoder, [llama_batch | {"logits_to_keep": 1}])


def test_keys_of_a_group_that_peft_trains_are_spikes_too(decoder, llama_batch):
    peft = pytest.importorskip("peft")
    plain = count(decoder, [llama_batch])
    wrapped = peft.get_peft_model(
        decoder, peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["key_neurons"])
    )
    counted = {p.name.removeprefix("base_model.model."): p for p in count(wrapped, [llama_batch]).products}
    for product in plain.products:
        if product.name.endswith("q k^T"):
            assert (counted[product.name].macs, counted[product.name].accumulates) == (0, product.accumulates)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_texts_packed_into_a_row_are_not_counted_as_one(decoder, how):
    packed = {"input_ids": torch.arange(5, 11)[None], "use_cache": False}
    if how == "position_ids":
        packed["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2]])
    else:
        packed |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="Several texts are packed into a row"):
        count(decoder, packed)
    if how == "position_ids":
        with SpikeCounter(decoder, neurons_only=True) as counter, torch.no_grad():
            decoder(**packed)
        assert 0 < counter.result().firing_rate < 1
