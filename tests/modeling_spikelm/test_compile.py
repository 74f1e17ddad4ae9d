"""The steady state under torch.compile and on a device: one graph, compiled once, that never asks for a value."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import BertTokenizer

from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForPreTraining, SpikeLMForSequenceClassification
from modeling_spikelm.neurons import neuron_groups
from pretraining_data.masking import MaskingCollator
from tests.modeling_spikelm.old_transformers import takes_masks_unseen
from tests.modeling_spikelm.test_llama import make_model as make_decoder

HEADS = (SpikeLMForMaskedLM, SpikeLMForPreTraining, SpikeLMForSequenceClassification)
every_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda c: c.__name__)
WAITS_FOR_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@pytest.fixture
def collator(config) -> MaskingCollator:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [f"word{number}" for number in range(config.vocab_size - len(tokens))]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    return MaskingCollator(tokenizer, probability=0.3, with_positions=True)


def batches(model_class, collator) -> Iterator[dict[str, torch.Tensor]]:
    """Three batches of one shape, each with other labels and other padding."""
    for first in (0, 3, 6):
        rows = [
            {"input_ids": [2, *range(10 + n, 26 + n - n % 3), 3], "example_id": n, "next_sentence_label": n % 2}
            for n in range(first, first + 3)
        ]
        batch = collator(rows)
        next_sentence_label = batch.pop("next_sentence_label")
        if model_class is SpikeLMForPreTraining:
            batch["next_sentence_label"] = next_sentence_label
        if model_class is SpikeLMForSequenceClassification:
            del batch["masked_lm_positions"]
            batch["labels"] = next_sentence_label
        yield batch


def calibrated(model_class, config, batch) -> torch.nn.Module:
    """In training mode, without dropout, which eager and compiled code draw differently."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = model_class(config)
    model.calibrate([batch])
    return model


@pytest.fixture
def regions_train() -> Iterator[None]:
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def compiled_into(graphs: list[torch.fx.GraphModule], model: torch.nn.Module) -> torch.nn.Module:
    """The model as one graph; its forward and its backward are put into `graphs` as a compiler gets them."""

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))


def step(model, batch) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def waiting_operations(graph: torch.fx.GraphModule) -> list[str]:
    """Operations whose output's shape, or a number on the host, depends on values; indexing does with a bool index."""

    def is_boolean(index) -> bool:
        return index is not None and index.meta["val"].dtype == torch.bool

    return [
        str(node.target)
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and WAITS_FOR_VALUES & set(node.target.tags)
        if node.target is not torch.ops.aten.index.Tensor or any(map(is_boolean, node.args[1]))
    ]


@every_head
def test_training_compiles_once_into_one_graph_without_waiting_and_equals_eager(
    model_class, config, collator, regions_train
):
    given = list(batches(model_class, collator))
    model = calibrated(model_class, config, given[0])
    graphs = []
    compiled = compiled_into(graphs, copy.deepcopy(model))
    step(compiled, given[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [step(compiled, batch) for batch in given]
    assert [waiting_operations(graph) for graph in graphs] == [[], []]
    for batch, mine in zip(given, found, strict=True):
        torch.testing.assert_close(mine, step(model, batch), rtol=1e-4, atol=1e-6)


@every_head
def test_inference_compiles_once_into_one_graph_without_waiting_and_equals_eager(model_class, config, collator):
    given = list(batches(model_class, collator))
    model = calibrated(model_class, config, given[0]).eval()
    graphs = []
    compiled = compiled_into(graphs, model)
    with torch.no_grad():
        compiled(**given[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            found = [compiled(**batch).to_tuple() for batch in given]
        assert [waiting_operations(graph) for graph in graphs] == [[]]
        for batch, mine in zip(given, found, strict=True):
            torch.testing.assert_close(mine, model(**batch).to_tuple(), rtol=1e-4, atol=1e-5)


@takes_masks_unseen
@every_head
def test_a_device_is_never_waited_for(model_class, config, collator):
    """Nothing on the meta device has a value, so whoever asks for one there fails."""
    batch, *_ = batches(model_class, collator)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    model = model_class(config)
    model.calibrate([batch])
    model.train().to("meta")
    batch = {name: value.to("meta") for name, value in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    assert loss.is_meta
    with torch.no_grad():
        model.eval()(**batch)


def test_a_decoder_trains_as_one_graph_without_waiting_and_equals_eager():
    model = make_decoder(1, num_hidden_layers=1).train()
    rows = torch.randint(3, 61, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    given = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in rows]
    for number, batch in enumerate(given):
        batch["attention_mask"][0, : 2 + number] = 0
        batch["labels"][0, : 2 + number] = -100
    graphs = []
    compiled = compiled_into(graphs, copy.deepcopy(model))
    step(compiled, given[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [step(compiled, batch) for batch in given]
    assert [waiting_operations(graph) for graph in graphs] == [[], []]
    for batch, mine in zip(given, found, strict=True):
        torch.testing.assert_close(mine, step(model, batch), rtol=1e-4, atol=1e-6)


def regions(graph: torch.fx.GraphModule) -> list[str]:
    """The name of the compiled part that each region of a graph calls."""
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    return [call.args[0].target for call in calls]


def size(graph: torch.fx.GraphModule) -> int:
    """How many nodes a compiler makes code of."""
    return sum(len(part.graph.nodes) for part in graph.modules() if isinstance(part, torch.fx.GraphModule))


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_one_layer_is_compiled_for_all(mode, config, collator, regions_train):
    batch, *_ = batches(SpikeLMForMaskedLM, collator)
    sizes = []
    for config.num_hidden_layers in (2, 5):
        model = calibrated(SpikeLMForMaskedLM, config, batch)
        graphs = []
        compiled = compiled_into(graphs, model)
        if mode == "training":
            step(compiled, batch)
        else:
            with torch.no_grad():
                compiled.eval()(**batch)
        assert [len(regions(graph)) for graph in graphs] == [config.num_hidden_layers] * len(graphs)
        assert all(len(set(regions(graph))) == 1 for graph in graphs)
        sizes.append(sum(map(size, graphs)))
    # What three layers more add are calls; compiled one by one, they would more than double it.
    assert sizes[1] - sizes[0] < sizes[0] / 2, sizes


def test_where_a_backward_pass_may_write_over_what_it_is_given_each_layer_is_compiled_by_itself(config, collator):
    """Inductor would write over a region's inputs, and gradients would be wrong; no other backend does so."""
    batch, *_ = batches(SpikeLMForMaskedLM, collator)
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    graphs = []
    with torch._functorch.config.patch(donated_buffer=True):  # as torch has it
        found = step(compiled_into(graphs, copy.deepcopy(model)), batch)
    assert [regions(graph) for graph in graphs] == [[], []]
    torch.testing.assert_close(found, step(model, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["output_attentions", "checkpointing"])
def test_what_a_layer_does_beside_its_output_compiles_into_the_one_graph_too(what, config, collator, regions_train):
    batch, *_ = batches(SpikeLMForMaskedLM, collator)
    config._attn_implementation = "eager"
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    if what == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        batch[what] = True
    # The first forward that records installs the recorders of transformers, which cannot be compiled.
    expected = step(model, batch)
    found = step(compiled_into([], copy.deepcopy(model)), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("donated", [False, True])
def test_a_model_that_is_not_calibrated_runs_compiled_and_its_first_step_calibrates_it(config, collator, donated):
    """The calibration is no part of any graph, and a region of a graph has to be a whole one."""
    batch, *_ = batches(SpikeLMForMaskedLM, collator)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config)
    mine = copy.deepcopy(model)
    with torch._functorch.config.patch(donated_buffer=donated):
        torch._dynamo.reset()
        compiled = torch.compile(mine, backend="aot_eager")
        with torch.no_grad():
            found = compiled.eval()(**batch).to_tuple()
        torch.testing.assert_close(found, model.eval()(**batch).to_tuple(), rtol=1e-4, atol=1e-5)
        compiled.train()
        model.train()
        for _ in range(2):
            torch.testing.assert_close(step(compiled, batch), step(model, batch), rtol=1e-4, atol=1e-6)
    assert all(group.is_calibrated for group in neuron_groups(mine))
    torch.testing.assert_close(dict(mine.named_buffers()), dict(model.named_buffers()))


def test_a_model_that_was_compiled_in_place_is_calibrated_as_another_is(config, collator):
    """A graph of before would run without the hooks by which a calibration sees what comes in."""
    first, second, *_ = batches(SpikeLMForMaskedLM, collator)
    model = calibrated(SpikeLMForMaskedLM, config, first)
    mine = copy.deepcopy(model)
    torch._dynamo.reset()
    mine.compile(backend="aot_eager")
    with torch.no_grad():
        mine.eval()(**first)
    tokens = {"input_ids": second["input_ids"], "attention_mask": second["attention_mask"]}
    for each in (mine, model):
        each.calibrate(tokens)
    torch.testing.assert_close(dict(mine.named_buffers()), dict(model.named_buffers()))


def test_a_hook_that_keeps_what_comes_into_a_layer_compiles_too(config, collator):
    batch, *_ = batches(SpikeLMForMaskedLM, collator)
    model = calibrated(SpikeLMForMaskedLM, config, batch).eval()
    kept = []
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        expected = model(**batch).loss
        kept.clear()
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(**batch).loss
    torch.testing.assert_close(found, expected)
    assert len(kept) == config.num_hidden_layers
