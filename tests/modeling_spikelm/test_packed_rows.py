"""Sequences packed into one row without padding, as attentions take them that know no mask but where each begins."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from configuration_spikelm import SpikeLMConfig, SpikeLMLlamaConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMLlamaForCausalLM
from modeling_spikelm.steps import boundaries, repeat_boundaries

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LENGTHS = (5, 7)
NAME = "flash_stand_in"


def stand_in(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs):
    """Flash attention's way with `cu_seq_lens_q`: all rows are one, and what lies outside of a sequence is not written.

    Transformers' own integration makes it so; here is no flash attention.
    """
    rows = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(len(query) + 1) * query.shape[2]
    context = torch.full_like(rows[0], torch.nan)
    for begin, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        sequence = (states[begin:end].transpose(0, 1) for states in rows)
        found = nn.functional.scaled_dot_product_attention(
            *sequence, scale=scaling, is_causal=module.is_causal, enable_gqa=True
        )
        context[begin:end] = found.transpose(0, 1)
    return context.view(len(query), query.shape[2], query.shape[1], -1), None


@pytest.fixture(autouse=True)
def registered():
    AttentionInterface.register(NAME, stand_in)
    yield
    AttentionInterface._global_mapping.pop(NAME)


def make_model(form: str, steps: int):
    torch.manual_seed(0)
    if form == "llama":
        config = SpikeLMLlamaConfig(**SIZES, num_key_value_heads=2, num_time_steps=steps, initializer_range=0.3)
        model = SpikeLMLlamaForCausalLM(config).eval()
    else:
        model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=steps, initializer_range=0.3)).eval()
    model.calibrate({"input_ids": torch.randint(3, 60, (4, 12))})
    return model


def packed_and_apart(model, **given):
    """Logits of sequences in one row under the stand-in, and of each alone under torch's own attention."""
    texts = [torch.randint(3, 60, (1, length)) for length in LENGTHS]
    apart = torch.cat([model(text, **given.get("each", {})).logits for text in texts], 1)
    # Asked for by its name, one with "flash" in it would be looked for on the Hub.
    model.config._attn_implementation = NAME
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    row = {"input_ids": torch.cat(texts, 1), "position_ids": positions}
    return model(**row, **given.get("row", {}), **given.get("each", {})).logits, apart


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("form", ["bert", "llama"])
def test_boundaries_that_are_given_hold_in_every_time_step(form, steps):
    ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    row = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    each = {"use_cache": False} if form == "llama" else {}
    found, wanted = packed_and_apart(make_model(form, steps), row=row, each=each)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_of_a_causal_decoder_positions_that_begin_anew_say_it_too(steps):
    found, wanted = packed_and_apart(make_model("llama", steps), each={"use_cache": False})
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["bert", "llama"])
def test_boundaries_of_several_rows_are_refused(form):
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    with pytest.raises(ValueError, match=r"packed into a single row: give input_ids \(1, L\), not \(2, L\)"):
        make_model(form, 2)(torch.ones(2, 4, dtype=torch.long), **given)


def test_boundaries_by_hand():
    packed = boundaries(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    assert packed.tolist() == [0, 3, 5, 6] and packed.dtype == torch.int32
    assert repeat_boundaries(packed, 2).tolist() == [0, 3, 5, 6, 9, 11, 12]
    assert repeat_boundaries(packed, 1).dtype == torch.int32
