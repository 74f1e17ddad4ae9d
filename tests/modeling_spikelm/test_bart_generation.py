"""`generate()` of a spiking encoder and decoder: transformers' own, with caches of spikes for both attentions."""

import accelerate
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm.spike_cache import unpacked
from tests.modeling_spikelm.old_transformers import LOOKS_PROMPTS_UP
from tests.modeling_spikelm.test_bart import make_model

STEPS = pytest.mark.parametrize("num_time_steps", [1, 2, 4], ids="T{}".format)
SOURCE = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(1))
# Whatever it says, it goes on.
GOES_ON = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}


def caches(model, written: int, read: int) -> list[EncoderDecoderCache]:
    """A growing one and one of fixed size, for so many tokens of the target and of the source."""
    growing = (DynamicCache(config=model.config) for _ in range(2))
    fixed = (StaticCache(config=model.config, max_cache_len=length) for length in (written, read))
    return [EncoderDecoderCache(*growing), EncoderDecoderCache(*fixed)]


def token_by_token(model, inputs, decoder_input_ids, cache) -> torch.Tensor:
    logits = [
        model(**inputs, decoder_input_ids=decoder_input_ids[:, [i]], past_key_values=cache, use_cache=True).logits
        for i in range(decoder_input_ids.shape[1])
    ]
    return torch.cat(logits, dim=1)


@STEPS
def test_a_cache_changes_no_logit(num_time_steps):
    model = make_model(num_time_steps)
    inputs = {"input_ids": torch.randint(3, 61, (3, 9)), "attention_mask": torch.ones(3, 9)}
    inputs["attention_mask"][1, 5:] = 0
    target = torch.randint(3, 61, (3, 12))
    with torch.no_grad():
        wanted = model(**inputs, decoder_input_ids=target, use_cache=False).logits
        for cache in caches(model, 16, 9):
            torch.testing.assert_close(token_by_token(model, inputs, target, cache), wanted, rtol=0, atol=1e-5)
        # A part of the target at once, and more than one token after it.
        first = model(**inputs, decoder_input_ids=target[:, :5])
        second = model(**inputs, decoder_input_ids=target[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, wanted[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("neuron", NEURONS)
def test_both_caches_keep_four_spikes_in_a_byte(neuron):
    model = make_model(4, neuron=neuron)
    target = torch.randint(3, 61, (1, 5))
    with torch.no_grad():
        cache = model(SOURCE, decoder_input_ids=target, use_cache=True).past_key_values
        wanted = model(SOURCE, decoder_input_ids=target, use_cache=False).logits
        found = token_by_token(model, {"input_ids": SOURCE}, target, caches(model, 5, 9)[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for part, length in ((cache.self_attention_cache, 5), (cache.cross_attention_cache, 9)):
        assert len(part.layers) == 3
        for layer in part.layers:
            assert layer.keys.dtype == layer.values.dtype == torch.int8
            assert layer.keys.shape == layer.values.shape == (1, 2, length, 16)
            assert set(unpacked(layer.keys, 4).unique().tolist()) <= ({0, 1} if neuron == "lif" else {-1, 0, 1})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_spikes_come_back_in_the_precision_of_the_model(attention):
    model = make_model(attn_implementation=attention).bfloat16()
    target = torch.randint(3, 61, (1, 5))
    with torch.no_grad():
        wanted = model(SOURCE, decoder_input_ids=target, use_cache=False).logits
        found = token_by_token(model, {"input_ids": SOURCE}, target, caches(model, 5, 9)[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.1 * wanted.std().item())


def test_of_the_source_everything_is_computed_once():
    model = make_model()
    seen = []
    for name in ("encoder", "decoder.memory_neurons", "decoder.layers.0.encoder_attn.k_proj"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model.generate(SOURCE, num_beams=2, **GOES_ON)
    assert seen == ["encoder", "decoder.memory_neurons", "decoder.layers.0.encoder_attn.k_proj"]


def test_a_model_that_is_not_calibrated_caches_its_spikes():
    model = make_model(calibrated=False)
    cache = model.generate(SOURCE, return_dict_in_generate=True, **GOES_ON).past_key_values
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        assert part.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize("emptied", ["self_attention_cache", "cross_attention_cache"])
def test_a_cache_from_before_calibration_is_refused(emptied):
    model = make_model(calibrated=False)
    cache = model(SOURCE).past_key_values
    model.calibrate({"input_ids": SOURCE})
    parts = {"self_attention_cache": cache.self_attention_cache, "cross_attention_cache": cache.cross_attention_cache}
    parts[emptied] = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="filled before calibration.*Begin with an empty cache"):
        model(SOURCE, past_key_values=EncoderDecoderCache(*parts.values()))


@STEPS
def test_a_source_alone_and_in_a_padded_batch_gets_the_same_tokens(num_time_steps):
    model = make_model(num_time_steps)
    alone = model.generate(SOURCE, **GOES_ON)
    longer = torch.randint(3, 61, (1, 14))
    for side in ((0, 5), (5, 0)):
        padded = torch.cat((torch.nn.functional.pad(SOURCE, side, value=1), longer))
        mask = (padded != 1).long()
        for cache in (None, "static"):
            together = model.generate(padded, attention_mask=mask, cache_implementation=cache, **GOES_ON)
            assert together[0].tolist() == alone[0].tolist()
            assert together[1].tolist() == model.generate(longer, **GOES_ON)[0].tolist()


def test_a_beginning_alone_and_in_a_padded_batch_is_continued_by_the_same_tokens():
    """The decoder's prompts, of which the shorter one is padded in front."""
    model = make_model()
    sources = torch.cat((SOURCE, SOURCE.flip(1)))
    prompts = torch.tensor([[1, 1, 2, 17], [2, 8, 9, 10]])
    mask = (prompts != 1).long()
    alone = model.generate(SOURCE, decoder_input_ids=prompts[:1, 2:], **GOES_ON)[0, 2:]
    for cache in (None, "static"):
        together = model.generate(
            sources, decoder_input_ids=prompts, decoder_attention_mask=mask, cache_implementation=cache, **GOES_ON
        )
        assert together[0, 4:].tolist() == alone.tolist(), cache


def test_greedy_takes_the_best_token_of_every_forward():
    model = make_model()
    tokens = torch.tensor([[model.config.decoder_start_token_id]])
    for number in range(8):
        logits = model(SOURCE, decoder_input_ids=tokens).logits[:, -1]
        # The configuration forces an end.
        best = logits.argmax(-1, keepdim=True) if number < 7 else torch.tensor([[model.config.eos_token_id]])
        assert number == 7 or best.item() != model.config.eos_token_id
        tokens = torch.cat((tokens, best), dim=1)
    ways = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    if LOOKS_PROMPTS_UP:
        ways.append({"prompt_lookup_num_tokens": 2})
    for options in ways:
        assert torch.equal(model.generate(SOURCE, **GOES_ON, **options), tokens), options


@pytest.mark.parametrize("cache", [None, "static"])
def test_more_tokens_than_positions_are_refused(cache):
    too_many = make_model().config.max_position_embeddings + 2
    with pytest.raises(ValueError, match="is 25 tokens long.*max_position_embeddings=24.*write fewer tokens"):
        make_model().generate(SOURCE, min_new_tokens=too_many, max_new_tokens=too_many, cache_implementation=cache)


def test_an_assistant_and_a_kept_cache_change_no_token():
    # It may be cut off anywhere, without the token that ends a text.
    model, assistant = make_model(forced_eos_token_id=None), make_model(decoder_layers=1, forced_eos_token_id=None)
    assistant.generation_config.num_assistant_tokens = 3
    wanted = model.generate(SOURCE, **GOES_ON)
    for helper in (model, assistant):
        assert torch.equal(model.generate(SOURCE, assistant_model=helper, **GOES_ON), wanted)
    begun = model.generate(SOURCE, return_dict_in_generate=True, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    rest = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    # Without a mask of what is written, transformers takes all of it for new, of a dense BART too.
    written = {"decoder_input_ids": begun.sequences, "decoder_attention_mask": torch.ones_like(begun.sequences)}
    kept = written | {"past_key_values": begun.past_key_values}
    assert torch.equal(model.generate(SOURCE, **kept, **rest), wanted)


def test_beams_and_samples_are_the_same_with_and_without_a_cache():
    model = make_model()
    for options in ({"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}):
        found = []
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            torch.manual_seed(2)
            found.append(model.generate(SOURCE, **GOES_ON | options, **cache))
        assert found[0].shape == (3, 9)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), options
        assert len(found[0].unique(dim=0)) == 3


def test_tokens_come_out_one_by_one():
    class Collected(BaseStreamer):
        def __init__(self):
            self.tokens: list[list[int]] = []

        def put(self, value):
            self.tokens.append(value.flatten().tolist())

        def end(self):
            self.tokens.append([])

    model, streamer = make_model(), Collected()
    written = model.generate(SOURCE, streamer=streamer, **GOES_ON)[0].tolist()
    assert streamer.tokens == [*([token] for token in written), []]


def test_what_it_reads_may_be_embeddings_or_what_the_encoder_has_made():
    model = make_model()
    written = model.generate(SOURCE, **GOES_ON)
    embeddings = model.get_input_embeddings()(SOURCE)
    encoded = model.get_encoder()(SOURCE)
    for inputs in ({"inputs_embeds": embeddings}, {"encoder_outputs": encoded}):
        assert torch.equal(model.generate(**inputs, **GOES_ON), written)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_it_hands_out_what_both_sides_saw(num_beams):
    """Means over the steps, of every layer and every token; so many rows as there are beams."""
    model = make_model(encoder_layers=1)
    model.set_attn_implementation("eager")
    records = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    written = model.generate(SOURCE, num_beams=num_beams, **GOES_ON, **records)
    assert [states.shape for states in written.encoder_hidden_states] == [(1, 9, 32)] * 2
    assert [attention.shape for attention in written.encoder_attentions] == [(1, 4, 9, 9)]
    assert len(written.decoder_hidden_states) == len(written.cross_attentions) == 8
    for number in range(8):
        assert [states.shape for states in written.decoder_hidden_states[number]] == [(num_beams, 1, 32)] * 4
        own = [attention.shape for attention in written.decoder_attentions[number]]
        assert own == [(num_beams, 2, 1, number + 1)] * 3
        for attention in written.cross_attentions[number]:
            assert attention.shape == (num_beams, 2, 1, 9)
            torch.testing.assert_close(attention.sum(-1), torch.ones(num_beams, 2, 1))


def test_a_static_cache_writes_by_one_graph():
    """As transformers compiles it on a GPU; tracing is the same on a CPU."""
    model = make_model(1, encoder_layers=1, decoder_layers=1)
    options = {**GOES_ON, "cache_implementation": "static"}
    wanted = model.generate(SOURCE, **options)
    torch._dynamo.reset()
    counters.clear()
    as_on_a_gpu = CompileConfig(backend="eager", fullgraph=True, mode=None)
    as_on_a_gpu._compile_all_devices = True
    assert torch.equal(model.generate(SOURCE, compile_config=as_on_a_gpu, **options), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_trains():
    """torch.compile without a break; code is made of graphs in tests of the encoder, whose operations these are."""
    model = make_model(1, encoder_layers=1, decoder_layers=1).train()
    torch._dynamo.reset()
    gradients = []
    for one in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        one(SOURCE, labels=SOURCE[:, :5]).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_training_behind_a_cache_keeps_the_gradient():
    gradients = []
    for use_cache in (False, True):
        model = make_model().train()
        outputs = model(SOURCE, labels=SOURCE, use_cache=use_cache)
        assert (outputs.past_key_values is not None) == use_cache
        outputs.loss.backward()
        attentions = model.model.decoder.layers[0].self_attn, model.model.decoder.layers[0].encoder_attn
        gradients.append([attention.k_proj.weight.grad for attention in attentions])
    for without, behind in zip(*gradients, strict=True):
        assert without.any() and torch.equal(without, behind)


def test_weights_that_are_elsewhere_until_a_forward_write_the_same():
    model = make_model(neuron="thrifty")
    wanted = model.generate(SOURCE, **GOES_ON)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(model.generate(SOURCE, **GOES_ON), wanted)


def test_time_steps_that_were_changed_after_building_are_refused():
    model = make_model()
    model.config.num_time_steps = 4
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="built with num_time_steps="):
            run(SOURCE)
