"""`generate()` of a spiking decoder: transformers' own, with a cache of spikes."""

import math

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation import CompileConfig

from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm.spike_cache import packed, unpacked
from tests.modeling_spikelm.test_llama import SIZES, make_model

STEPS = pytest.mark.parametrize("num_time_steps", [1, 2, 4], ids="T{}".format)
PROMPT = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(1))
# Whatever it says, it goes on.
GOES_ON = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}


def token_by_token(model, input_ids, cache, **options):
    logits = [
        model(input_ids[:, [i]], past_key_values=cache, use_cache=True, **options).logits
        for i in range(input_ids.shape[1])
    ]
    return torch.cat(logits, dim=1)


@STEPS
def test_a_cache_changes_no_logit(num_time_steps):
    model = make_model(num_time_steps)
    input_ids = torch.randint(3, 61, (3, 12))
    with torch.no_grad():
        wanted = model(input_ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            torch.testing.assert_close(token_by_token(model, input_ids, cache), wanted, rtol=0, atol=1e-5)
        # A part of the prompt at once, and more than one token after it.
        first = model(input_ids[:, :5])
        second = model(input_ids[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, wanted[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("neuron", NEURONS)
def test_the_cache_keeps_four_spikes_in_a_byte(neuron):
    model = make_model(4, neuron=neuron)
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        wanted = model(PROMPT, use_cache=False).logits
        for layer in cache.layers:
            assert layer.keys.dtype == layer.values.dtype == torch.int8
            assert layer.keys.shape == layer.values.shape == (1, 2, 9, 8)
            assert unpacked(layer.keys, 4).unique().tolist() == ([0, 1] if neuron == "lif" else [-1, 0, 1])
        found = token_by_token(model, PROMPT, DynamicCache(config=model.config))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_window_has_a_cache_of_its_size():
    model = make_model(2, sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    input_ids = torch.randint(3, 61, (2, 12))
    with torch.no_grad():
        wanted = model(input_ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
            torch.testing.assert_close(token_by_token(model, input_ids, cache), wanted, rtol=0, atol=1e-5)
            assert cache.layers[1].keys.shape[2] <= 4


def test_a_model_that_is_not_calibrated_caches_its_spikes():
    model = make_model(calibrated=False)
    cache = model.generate(PROMPT, return_dict_in_generate=True, **GOES_ON).past_key_values
    assert cache.layers[0].keys.dtype == torch.float32


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3), min_size=1, max_size=9))
def test_codes_of_steps_come_back_from_their_bytes(codes):
    codes = torch.tensor(codes, dtype=torch.int8)
    kept = packed(codes)
    assert kept.dtype == torch.int8 and kept.shape == (3 * math.ceil(len(codes) / 4),)
    assert torch.equal(unpacked(kept, len(codes)), codes)


def test_four_steps_are_a_number_to_the_base_four():
    assert packed(torch.tensor([[1], [-1], [0], [1]], dtype=torch.int8)).tolist() == [1 - 4 + 64]


@STEPS
def test_the_cache_has_the_sizes_of_a_dense_models(num_time_steps):
    model = make_model(num_time_steps)
    dense = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in SIZES}))
    found, wanted = (each(PROMPT, use_cache=True).past_key_values for each in (model, dense))
    for layer, dense_layer in zip(found.layers, wanted.layers, strict=True):
        assert layer.keys.shape == layer.values.shape == dense_layer.keys.shape


def test_a_cache_of_other_time_steps_is_refused():
    model = make_model(4)
    cache = make_model(2)(PROMPT).past_key_values
    with pytest.raises(ValueError, match="8 values of a head and a token, of 2 time steps, and not 8, of 4"):
        model(PROMPT, past_key_values=cache)


def test_a_cache_from_before_calibration_is_refused():
    model = make_model(calibrated=False)
    cache = model(PROMPT).past_key_values
    model.calibrate({"input_ids": PROMPT})
    with pytest.raises(ValueError, match="filled before calibration.*Begin with an empty cache"):
        model(PROMPT, past_key_values=cache)


@STEPS
def test_a_prompt_alone_and_in_a_padded_batch_gets_the_same_tokens(num_time_steps):
    model = make_model(num_time_steps)
    alone = model.generate(PROMPT, **GOES_ON)[0, 9:]
    longer = torch.randint(3, 61, (1, 14))
    padded = torch.cat((torch.nn.functional.pad(PROMPT, (5, 0)), longer))
    mask = (padded != 0).long()
    for cache in (None, "static"):
        together = model.generate(padded, attention_mask=mask, cache_implementation=cache, **GOES_ON)
        assert together[0, 14:].tolist() == alone.tolist()
        assert together[1, 14:].tolist() == model.generate(longer, **GOES_ON)[0, 14:].tolist()
    # So does a forward that is told nothing but what is padding.
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[0, 5:], model(PROMPT).logits[0], rtol=0, atol=1e-5
    )


def test_greedy_takes_the_best_token_of_every_forward():
    model = make_model()
    tokens = PROMPT
    for _ in range(8):
        logits = model(tokens).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    in_parts = {"cache_implementation": "static", "prefill_chunk_size": 4}
    for options in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        in_parts,
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(PROMPT, **GOES_ON, **options), tokens), options


def test_an_assistant_a_kept_cache_and_embeddings_change_no_token():
    model, assistant = make_model(), make_model(num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    wanted = model.generate(PROMPT, **GOES_ON)
    for helper in (model, assistant):
        assert torch.equal(model.generate(PROMPT, assistant_model=helper, **GOES_ON), wanted)
    begun = model.generate(PROMPT, return_dict_in_generate=True, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    rest = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(begun.sequences, past_key_values=begun.past_key_values, **rest), wanted)
    embeddings = model.get_input_embeddings()(PROMPT)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GOES_ON), wanted[:, 9:])


def test_beams_and_samples_are_the_same_with_and_without_a_cache():
    model = make_model()
    for options in ({"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}):
        found = []
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            torch.manual_seed(2)
            found.append(model.generate(PROMPT, **GOES_ON | options, **cache))
        assert found[0].shape == (3, 17)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), options
        assert len(found[0].unique(dim=0)) == 3


def test_a_static_cache_writes_by_one_graph():
    """As transformers compiles it on a GPU; tracing is the same on a CPU, and code is made of it in its own tests."""
    model = make_model(1, num_hidden_layers=1)
    options = {**GOES_ON, "cache_implementation": "static"}
    wanted = model.generate(PROMPT, **options)
    torch._dynamo.reset()
    counters.clear()
    as_on_a_gpu = CompileConfig(backend="eager", fullgraph=True, mode=None)
    as_on_a_gpu._compile_all_devices = True
    assert torch.equal(model.generate(PROMPT, compile_config=as_on_a_gpu, **options), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_an_empty_static_cache_that_is_allocated_already_is_allocated_anew():
    model = make_model()
    cache = StaticCache(config=model.config, max_cache_len=32)
    sizes = {"num_heads": model.config.num_key_value_heads, "head_dim": model.config.head_dim}
    cache.early_initialization(batch_size=len(PROMPT), dtype=torch.float32, device="cpu", **sizes)
    options = GOES_ON
    wanted = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, past_key_values=cache, **options), wanted)
    assert cache.layers[0].keys.dtype == torch.int8


def test_training_behind_a_cache_keeps_the_gradient():
    gradients = []
    for use_cache in (False, True):
        model = make_model().train()
        model(PROMPT, labels=PROMPT, use_cache=use_cache).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert gradients[0].any() and torch.equal(*gradients)


@pytest.mark.parametrize("neuron", ["elastic", "thrifty"])
def test_new_tokens_keep_their_gradient_behind_a_cache_that_is_not_empty(neuron):
    model = make_model(neuron=neuron)
    cache = model(PROMPT[:, :4], use_cache=True).past_key_values
    model(PROMPT[:, 4:], past_key_values=cache, labels=PROMPT[:, 4:]).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()

    # Without one, where the first tokens' keys and values have no gradient either.
    def cut(group, args, spikes):
        return torch.cat((spikes[:, :4].detach(), spikes[:, 4:]), dim=1)

    for layer in model.model.layers:
        for group in (layer.self_attn.key_neurons, layer.self_attn.value_neurons):
            group.register_forward_hook(cut)
    labels = PROMPT.masked_fill(torch.arange(9) < 5, -100)
    model(PROMPT, labels=labels, use_cache=False).loss.backward()
    assert found["model.layers.1.self_attn.k_proj.weight"].any()
    for name, weight in model.named_parameters():
        # Learned levels have one from what the cache holds, too.
        if "neurons" not in name:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_values_alone_keep_their_gradient_behind_a_cache():
    """As with an adapter of queries and values: the first layer's keys have none."""
    model = make_model()
    for name, weight in model.named_parameters():
        weight.requires_grad_("v_proj" in name)
    cache = model(PROMPT[:, :4], use_cache=True).past_key_values
    model(PROMPT[:, 4:], past_key_values=cache, labels=PROMPT[:, 4:]).loss.backward()
    assert all(layer.self_attn.v_proj.weight.grad.any() for layer in model.model.layers)


@pytest.mark.parametrize("neuron", ["elastic", "thrifty"])
def test_weights_that_are_elsewhere_until_a_forward_write_the_same(neuron):
    model = make_model(neuron=neuron)
    wanted = model.generate(PROMPT, **GOES_ON)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert model.model.layers[0].self_attn.key_neurons.amplitude.is_meta
    for cache in (None, "static"):
        assert torch.equal(model.generate(PROMPT, cache_implementation=cache, **GOES_ON), wanted)
    with pytest.raises(ValueError, match="cannot write the levels of neurons that are offloaded.*calibrate and save"):
        model.calibrate({"input_ids": PROMPT})


def test_a_model_whose_weights_alone_are_elsewhere_can_be_calibrated():
    model, wanted = (make_model(calibrated=False) for _ in range(2))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for each in (model, wanted):
        each.calibrate({"input_ids": PROMPT})
    assert torch.equal(model.generate(PROMPT, **GOES_ON), wanted.generate(PROMPT, **GOES_ON))


def test_its_own_first_layers_can_be_the_assistant():
    model = make_model()
    wanted = model.generate(PROMPT, **GOES_ON)
    assert torch.equal(model.generate(PROMPT, assistant_early_exit=1, **GOES_ON), wanted)


def test_a_mask_may_be_as_long_as_a_cache_of_fixed_length():
    model = make_model()
    padded = torch.nn.functional.pad(PROMPT, (2, 0))
    mask = torch.nn.functional.pad((padded != 0).long(), (0, 5))
    cache = StaticCache(config=model.config, max_cache_len=16)
    begun = model(padded[:, :8], attention_mask=mask, past_key_values=cache).logits
    rest = model(padded[:, 8:], attention_mask=mask, past_key_values=cache).logits
    wanted = model(PROMPT).logits
    torch.testing.assert_close(torch.cat((begun[:, 2:], rest), dim=1), wanted, rtol=0, atol=1e-5)


class WithoutLoss(QuantizedLayer):
    """One of transformers' own, of which no backend is installed: it rounds nothing, and gives back floats."""

    def __init__(self):
        super().__init__(nbits=8, axis_key=0, axis_value=0, q_group_size=1, residual_length=4)

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor.float()


def test_a_cache_that_gives_floats_back_is_refused():
    model = make_model(2)
    with pytest.raises(ValueError, match="gives back torch.float32 where it was given int8 codes"):
        model.generate(PROMPT, past_key_values=Cache(layers=[WithoutLoss(), WithoutLoss()]), **GOES_ON)


def test_a_mask_without_the_tokens_of_the_cache_is_refused():
    model = make_model()
    cache = model(PROMPT[:, :5]).past_key_values
    with pytest.raises(ValueError, match="attention_mask is of 4 tokens, but there are 5 in past_key_values and 4 new"):
        model(PROMPT[:, 5:], attention_mask=torch.ones(1, 4), past_key_values=cache)


def test_continuous_batching_is_refused_before_it_takes_memory():
    for begin in (lambda model: model.generate_batch([[3, 4]]), lambda model: model.init_continuous_batching()):
        with pytest.raises(NotImplementedError, match="Call generate\\(\\) with a padded batch"):
            begin(make_model())
