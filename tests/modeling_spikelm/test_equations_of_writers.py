"""Both forms that write, once more from their equations, with the neuron's oracle and the steps in a dimension of their
own: where a membrane is kept and where not, and what the mean over the steps is of."""

import pytest
import torch
from torch.nn.functional import embedding, layer_norm, linear

from modeling_spikelm.spiking import spike_reference
from tests.modeling_spikelm.test_bart import make_model as make_bart
from tests.modeling_spikelm.test_llama import make_model as make_llama

CASES = pytest.mark.parametrize(
    "steps, reset", [(2, "reference"), (4, "reference"), (2, "symmetric"), (4, "symmetric")]
)
IDS = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(2))
TARGET = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(3))


class Equations:
    """
    Args:
        model: whose parameters and amplitudes are taken by their names.
    """

    def __init__(self, model):
        self.values = model.state_dict()
        self.config = model.config

    def product(self, name, x):
        return linear(x, self.values[f"{name}.weight"], self.values.get(f"{name}.bias"))

    def spikes(self, name, x, has_membrane=True):
        """`(T, B, L, F)` in and out."""
        decay, reset = self.config.membrane_decay, self.config.membrane_reset
        return spike_reference(x, self.values[f"{name}.amplitude"], decay, reset, has_membrane)

    def keys_and_values(self, name, key, value):
        """Ternary in every step, of that step alone."""
        return (self.spikes(f"{name}.{kind}_neurons", x, False) for kind, x in (("key", key), ("value", value)))

    def attention(self, query, key, value, heads, is_causal):
        """`(T, B, L, F)`; heads of queries share those of keys and values, one after another."""
        query = query.unflatten(-1, (heads, -1)).transpose(2, 3)
        size = query.shape[-1]
        key, value = (x.unflatten(-1, (-1, size)).transpose(2, 3) for x in (key, value))
        key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
        scores = query @ key.mT / size**0.5
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)

    def repeated(self, x):
        return x.expand(self.config.num_time_steps, *x.shape)


class Llama(Equations):
    def norm(self, name, x):
        scale = x.square().mean(-1, keepdim=True).add(self.config.rms_norm_eps).rsqrt()
        return x * scale * self.values[f"{name}.weight"]

    def rotated(self, x):
        """Entries i and i + d / 2 of a head are a complex number, which position p turns by p / theta^(2 i / d)."""
        size = self.config.head_dim
        first, second = x.unflatten(-1, (-1, size)).chunk(2, -1)
        angles = torch.arange(x.shape[2])[:, None] / self.config.rope_parameters["rope_theta"] ** (
            torch.arange(0, size, 2) / size
        )
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag), -1).flatten(3)

    def logits(self, ids):
        x = self.repeated(embedding(ids, self.values["model.embed_tokens.weight"]))
        for number in range(self.config.num_hidden_layers):
            layer = f"model.layers.{number}"
            attention = f"{layer}.self_attn"
            spikes = self.spikes(f"{attention}.neurons", self.norm(f"{layer}.input_layernorm", x))
            query, key = (self.rotated(self.product(f"{attention}.{kind}_proj", spikes)) for kind in "qk")
            key, value = self.keys_and_values(attention, key, self.product(f"{attention}.v_proj", spikes))
            context = self.attention(query, key, value, self.config.num_attention_heads, is_causal=True)
            x = x + self.product(f"{attention}.o_proj", self.spikes(f"{attention}.output_neurons", context))
            spikes = self.spikes(f"{layer}.mlp.neurons", self.norm(f"{layer}.post_attention_layernorm", x))
            gate, up = (self.product(f"{layer}.mlp.{kind}_proj", spikes) for kind in ("gate", "up"))
            inner = self.spikes(f"{layer}.mlp.down_neurons", gate * gate.sigmoid() * up)
            x = x + self.product(f"{layer}.mlp.down_proj", inner)
        return self.product("lm_head", self.norm("model.norm", x.mean(0)))


class Bart(Equations):
    def norm(self, name, x):
        return layer_norm(x, x.shape[-1:], self.values[f"{name}.weight"], self.values[f"{name}.bias"])

    def embedded(self, stack, ids):
        # The first two positions are none, as in fairseq's models.
        positions = self.values[f"{stack}.embed_positions.weight"][2 : 2 + ids.shape[1]]
        x = embedding(ids, self.values["model.shared.weight"]) + positions
        return self.repeated(self.norm(f"{stack}.layernorm_embedding", x))

    def attended(self, name, spikes, source, heads, is_causal=False):
        query = self.product(f"{name}.q_proj", spikes)
        key, value = (self.product(f"{name}.{kind}_proj", source) for kind in "kv")
        context = self.attention(query, *self.keys_and_values(name, key, value), heads, is_causal)
        return self.product(f"{name}.out_proj", self.spikes(f"{name}.output_neurons", context))

    def layer(self, name, x, heads, memory=None):
        spikes = self.spikes(f"{name}.self_attn.neurons", x)
        attended = self.attended(f"{name}.self_attn", spikes, spikes, heads, is_causal=memory is not None)
        x = self.norm(f"{name}.self_attn_layer_norm", x + attended)
        if memory is not None:
            spikes = self.spikes(f"{name}.encoder_attn.neurons", x)
            attended = self.attended(f"{name}.encoder_attn", spikes, memory, heads)
            x = self.norm(f"{name}.encoder_attn_layer_norm", x + attended)
        inner = self.product(f"{name}.fc1", self.spikes(f"{name}.fc1_neurons", x))
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        return self.norm(
            f"{name}.final_layer_norm", x + self.product(f"{name}.fc2", self.spikes(f"{name}.fc2_neurons", inner))
        )

    def logits(self, ids, target):
        x = self.embedded("model.encoder", ids)
        for number in range(self.config.encoder_layers):
            x = self.layer(f"model.encoder.layers.{number}", x, self.config.encoder_attention_heads)
        # The decoder reads the mean, and the steps begin anew.
        memory = self.spikes("model.decoder.memory_neurons", self.repeated(x.mean(0)))
        x = self.embedded("model.decoder", target)
        for number in range(self.config.decoder_layers):
            x = self.layer(f"model.decoder.layers.{number}", x, self.config.decoder_attention_heads, memory)
        return self.product("lm_head", x.mean(0)) + self.values["final_logits_bias"]


@CASES
@torch.no_grad()
def test_llamas_form_is_its_equations(steps, reset):
    model = make_llama(steps, membrane_reset=reset)
    torch.testing.assert_close(model(IDS).logits, Llama(model).logits(IDS), rtol=0, atol=1e-4)


@CASES
@torch.no_grad()
def test_barts_form_is_its_equations(steps, reset):
    model = make_bart(steps, membrane_reset=reset)
    found = model(IDS, decoder_input_ids=TARGET).logits
    torch.testing.assert_close(found, Bart(model).logits(IDS, TARGET), rtol=0, atol=1e-4)
