"""What autograd keeps of a training step on a GPU, counted on the way that a GPU takes, by Triton's interpreter."""

import gc
import weakref
from collections import Counter

import pytest
import torch

from modeling_spikelm import (
    SpikeLMBartConfig,
    SpikeLMBartModel,
    SpikeLMConfig,
    SpikeLMLlamaConfig,
    SpikeLMLlamaModel,
    SpikeLMModel,
    attention,
    launching,
    seeded_dropout,
)
from modeling_spikelm.fast_paths import FAST_PATHS
from modeling_spikelm.packing import SpikePacking, _PackedSpikes

LENGTH, WIDTH, HEADS, LAYERS = 4, 16, 2, 3


@pytest.fixture
def on_gpu(monkeypatch):
    pytest.importorskip("triton")
    for module in (launching, attention):
        monkeypatch.setattr(module, "is_eager_on_gpu", lambda tensor: True)
    # Attention is torch's own, as it is on a GPU.
    monkeypatch.setattr(FAST_PATHS, "cpu_attention", False)
    monkeypatch.setattr(seeded_dropout, "LEAST_VALUES", 1)


@pytest.fixture
def kept(monkeypatch):
    """Bytes that autograd keeps, by dtype; what several keep counts once."""
    storages = {}
    pack = SpikePacking._pack

    def counting_pack(self, tensor):
        packed = pack(self, tensor)
        memory = packed.made_of.codes if isinstance(packed, _PackedSpikes) else packed
        storages[memory.untyped_storage()._cdata] = memory
        return packed

    monkeypatch.setattr(SpikePacking, "_pack", counting_pack)

    def bytes_of(forward):
        storages.clear()
        outputs = forward()
        counted = Counter()
        for memory in storages.values():
            counted[memory.dtype] += memory.untyped_storage().nbytes()
        del outputs
        return counted

    return bytes_of


def make_model(num_time_steps, neuron="elastic"):
    torch.manual_seed(0)
    config = SpikeLMConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        num_time_steps=num_time_steps,
        neuron=neuron,
        # With dropout in there, what torch does on a CPU is not what it does on a GPU.
        attention_probs_dropout_prob=0.0,
    )
    return SpikeLMModel(config, add_pooling_layer=False).train()


def make_batch(size):
    tokens = torch.arange(size * LENGTH).view(size, LENGTH) % 32
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def forward(model, size):
    with torch.autocast("cpu", torch.bfloat16):
        return model(**make_batch(size)).last_hidden_state


@pytest.mark.parametrize("num_time_steps", [4, 3])
def test_a_layer_keeps_less_than_25_bytes_for_each_of_its_hidden_values(on_gpu, kept, num_time_steps):
    model = make_model(num_time_steps)
    model.calibrate([make_batch(1)])
    # What a batch does not change, such as weights, drops out.
    more, less = kept(lambda: forward(model, 3)), kept(lambda: forward(model, 1))
    values = 2 * num_time_steps * LENGTH * WIDTH
    found = {dtype: (more[dtype] - less[dtype]) / values for dtype in more if more[dtype] != less[dtype]}
    # Of five groups of neurons of the width and one of four times that, with the codes of two steps in a byte.
    codes = (5 + 4) * -(-num_time_steps // 2) / num_time_steps
    # A query, a context, and what enters GELU; keys and values are codes. Masks are kept once, in rows of 8 values.
    halves = 2 * (1 + 1 + 4) * LAYERS + 2 * 8 / WIDTH
    # What enters two LayerNorms, with the mean and the deviation of a row; of attention, a number for each head. Of
    # dropout, nothing.
    floats = 4 * (2 + 2 * 2 / WIDTH + HEADS / WIDTH) * LAYERS
    assert found == {torch.int8: codes * LAYERS, torch.bfloat16: halves, torch.float32: floats}
    of_base = codes + 12 + 4 * (2 + 2 * 2 / 768 + 12 / 768)
    assert of_base < (24.6 if num_time_steps == 4 else 26.2)


@pytest.mark.parametrize("neuron", ["elastic", "learned", "thrifty", "bi-spiking", "lif"])
def test_what_a_step_has_kept_goes_with_it_and_does_not_wait_for_the_garbage_collector(neuron, monkeypatch):
    model = make_model(3, neuron)
    model.calibrate([make_batch(1)])
    codes = []
    announce = SpikePacking.announce

    def watch(spikes, of_spikes, *levels):
        codes.append(weakref.ref(of_spikes))
        announce(spikes, of_spikes, *levels)

    monkeypatch.setattr(SpikePacking, "announce", staticmethod(watch))
    gc.collect()
    gc.disable()
    try:
        forward(model, 2).sum().backward()
        assert [reference() for reference in codes] == [None] * (0 if neuron == "lif" else 6 * LAYERS)
    finally:
        gc.enable()


def make_bart():
    sizes = {"d_model": WIDTH, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    layers = {"encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH}
    return SpikeLMBartModel(SpikeLMBartConfig(vocab_size=32, num_time_steps=2, **sizes, **layers))


def make_llama():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": WIDTH}
    config = SpikeLMLlamaConfig(vocab_size=32, num_time_steps=2, num_hidden_layers=LAYERS, **sizes)
    return SpikeLMLlamaModel(config)


@pytest.mark.parametrize(
    ("make", "masks"), [(lambda: make_model(2), 1), (make_bart, 3), (make_llama, 1)], ids=["bert", "bart", "llama"]
)
def test_a_mask_that_all_layers_share_masks_as_that_of_each_does(make, masks, on_gpu, monkeypatch):
    model = make().eval()
    batch = make_batch(2)
    # Padding at the front, where a decoder sees a mask that is not its own.
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    model.calibrate([batch])
    taken = []
    attend = attention.SpikingAttention.attend

    def watch(self, query, key, value, mask, **kwargs):
        taken.append(mask)
        return attend(self, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention.SpikingAttention, "attend", watch)

    @torch.no_grad()
    def run():
        taken.clear()
        return model(**batch).last_hidden_state

    found = run()
    assert {mask.dtype for mask in taken} == {torch.float32}
    assert len({mask.untyped_storage()._cdata for mask in taken}) == masks and len(taken) == masks * LAYERS
    monkeypatch.setattr(attention, "MASK_ALIGNMENT", 1)
    assert torch.equal(found, run())
    monkeypatch.setattr(attention, "is_eager_on_gpu", lambda tensor: False)
    assert torch.equal(found, run())
    assert {mask.dtype for mask in taken} == {torch.bool}
