"""The CPU's dropout: its statistics, its gradients, and what autograd keeps."""

import threading

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from modeling_spikelm import SpikeLMConfig, SpikeLMModel, SpikingNeurons
from modeling_spikelm.dropout import dropout, written_out_attention
from modeling_spikelm.packing import _PACKING, SpikePacking


def test_dropout_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1000, 1000), 0.1)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.002)


def test_the_share_is_as_exact_in_bfloat16():
    """Whose own precision would round the threshold, and drop 10.06 %."""
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1 << 24, dtype=torch.bfloat16), 0.1)
    assert (dropped == 0).float().mean(dtype=torch.float64).item() == pytest.approx(0.1, abs=3e-4)


def test_dropout_passes_the_gradient_through_the_mask_of_its_forward():
    values = torch.ones(64, 8, requires_grad=True)
    dropped = dropout(values, 0.5)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped)


def test_dropout_repeats_with_the_seed():
    def draw():
        torch.manual_seed(3)
        return dropout(torch.ones(100), 0.3)

    assert torch.equal(draw(), draw())


def test_a_gradient_of_dropout_can_be_differentiated():
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def drop(values):
        torch.manual_seed(0)
        return dropout(values, 0.5).square()

    assert torch.autograd.gradgradcheck(drop, values)


@pytest.mark.parametrize("masked", [False, True])
# Several sequences a piece, and one; and, as of a decoder that attends to an encoder, more queries than keys.
@pytest.mark.parametrize(("queries", "length"), [(5, 5), (160, 160), (7, 5)])
@pytest.mark.parametrize("probability", [0.0, 0.2])
def test_attention_equals_its_equation_under_the_same_mask(masked, queries, length, probability):
    """With the identity as values, the context is the matrix of kept probabilities, so the drawn mask can be read."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 12, rows, 8, requires_grad=True) for rows in (queries, length, length))
    mask = None
    if masked:
        mask = torch.ones(3, 1, queries, length, dtype=torch.bool)
        mask[1, :, :, 3:] = False
    torch.manual_seed(1)
    kept = written_out_attention(query, key, torch.eye(length).expand(3, 12, -1, -1), mask, 0.3, probability) != 0
    torch.manual_seed(1)
    context = written_out_attention(query, key, value, mask, 0.3, probability)
    scores = query @ key.transpose(2, 3) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    expected = (torch.softmax(scores, -1) * kept / (1 - probability)) @ value
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(context)
    found = torch.autograd.grad(context, (query, key, value), gradient)
    wanted = torch.autograd.grad(expected, (query, key, value), gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.2])
def test_a_gradient_of_attention_can_be_differentiated(probability):
    operands = [torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=needed) for needed in (True, False, True)]
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[1, :, :, 2:] = False

    def attend(*operands):
        torch.manual_seed(0)
        return written_out_attention(*operands, mask, 0.3, probability)

    assert torch.autograd.gradgradcheck(attend, operands)


@pytest.mark.parametrize("form", [torch.bool, torch.float32])
@pytest.mark.parametrize("probability", [0.0, 0.2])
def test_bfloat16_attention_is_the_float32_one_also_where_a_sequence_is_masked_as_a_whole(form, probability):
    """float32's lowest number, which masks floats, is no finite number of bfloat16's."""
    torch.manual_seed(0)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    mask[1] = False
    if form == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    operands = torch.randn(3, 3, 12, 5, 8).bfloat16()
    gradient = torch.randn(3, 12, 5, 8).bfloat16()

    def attend(dtype):
        torch.manual_seed(1)
        inputs = [operand.to(dtype).requires_grad_() for operand in operands]
        context = written_out_attention(*inputs, mask, 0.3, probability)
        return [found.float() for found in (context, *torch.autograd.grad(context, inputs, gradient.to(dtype)))]

    torch.testing.assert_close(attend(torch.bfloat16), attend(torch.float32), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_attention_of_two_dtypes_has_the_querys(dtypes):
    query = torch.randn(2, 3, 5, 8, dtype=dtypes[0], requires_grad=True)
    key, value = (torch.randn(2, 3, 5, 8, dtype=dtypes[1], requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        context = written_out_attention(query, key, value, None, 0.3, 0.2)
    context.float().sum().backward()
    assert context.dtype == query.grad.dtype == dtypes[0] and key.grad.dtype == value.grad.dtype == dtypes[1]


def neurons_and_linear():
    neurons = SpikingNeurons(SpikeLMConfig(num_time_steps=2), 8)
    neurons.set_amplitude(torch.tensor([0.7, 1.3]))
    return neurons, nn.Linear(8, 4)


def kept_bytes(function):
    """Bytes that are allocated in `function` and still there after it, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages()), result


def test_packed_spikes_give_the_same_gradients_from_fewer_bytes():
    neurons, linear = neurons_and_linear()
    inputs = torch.randn(6, 5, 8, requires_grad=True)
    unpacked_bytes, outputs = kept_bytes(lambda: linear(neurons(inputs)))
    wanted = torch.autograd.grad(outputs.square().sum(), (inputs, linear.weight))

    def packed():
        with SpikePacking():
            return linear(neurons(inputs))

    packed_bytes, outputs = kept_bytes(packed)
    found = torch.autograd.grad(outputs.square().sum(), (inputs, linear.weight))
    assert packed_bytes <= unpacked_bytes - inputs.numel() * 4
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_spikes_that_a_hook_has_written_are_kept_as_they_are():
    neurons, linear = neurons_and_linear()
    neurons.register_forward_hook(lambda module, args, spikes: spikes.detach().mul_(3.0))
    inputs = torch.randn(6, 5, 8)
    with SpikePacking():
        outputs = linear(neurons(inputs))
    (found,) = torch.autograd.grad(outputs.sum(), linear.weight)
    torch.testing.assert_close(found[0], neurons(inputs).sum((0, 1)))


def test_packed_spikes_whose_amplitudes_were_changed_are_not_unpacked_as_others():
    neurons, linear = neurons_and_linear()
    with SpikePacking():
        outputs = linear(neurons(torch.randn(6, 5, 8)))  # the neurons themselves have nothing to pass back
    neurons.set_amplitude(2 * neurons.amplitude)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward pass"):
        outputs.sum().backward()


@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_bias_of_attention_has_a_gradient(dtype, probability):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = SpikeLMConfig(**sizes, vocab_size=50, attention_probs_dropout_prob=probability)
    model = SpikeLMModel(config, add_pooling_layer=False)
    tokens = {"input_ids": torch.arange(10).view(2, 5)}
    model.calibrate(tokens)
    bias = torch.zeros(1, 1, 5, 5, dtype=dtype, requires_grad=True)
    states = model.to(dtype).train()(**tokens, attention_mask=bias).last_hidden_state
    assert torch.autograd.grad(states.float().square().sum(), bias)[0].any()


def test_codes_of_spikes_that_are_gone_are_not_kept():
    """As in a checkpointed layer, whose spikes nobody saves."""
    neurons, _ = neurons_and_linear()
    packing = SpikePacking()
    with packing:
        for _ in range(3):
            neurons(torch.randn(6, 5, 8))
        assert len(packing._announced) == 1
    assert not packing._announced


def test_threads_that_pack_side_by_side_leave_nothing_behind():
    entered, leave = threading.Event(), threading.Event()

    def pack_until_told():
        with SpikePacking():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=pack_until_told)
    with SpikePacking():
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert _PACKING.get() is None
    neurons, linear = neurons_and_linear()
    inputs = torch.randn(6, 5, 8)
    # The spikes as floats, and the outputs: nobody packs any more.
    kept, outputs = kept_bytes(lambda: linear(neurons(inputs)))
    assert kept >= 4 * (inputs.numel() + outputs.numel())


def test_training_in_16_bits_without_dropout_leaves_torchs_attention_whose_backward_is_slow():
    config = SpikeLMConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_time_steps=2
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = SpikeLMModel(config)
    inputs = torch.randint(20, (3, 5))

    def names(is_training):
        model.train(is_training)
        with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(inputs).last_hidden_state.sum().backward()
        return " ".join(event.key for event in profiled.key_averages())

    assert "flash_attention" in names(False) and "flash_attention" not in names(True)
