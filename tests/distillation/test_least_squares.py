"""Weights fitted to a teacher by least squares: they are the best there are, and padding and batches change nothing."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configuration_spikelm import SpikeLMConfig
from distillation.least_squares import _Moments, check_can_fit, fit_to_teacher
from distillation.losses import hidden_state_errors
from modeling_spikelm import (
    SpikeLMBartForConditionalGeneration,
    SpikeLMForSequenceClassification,
    SpikeLMLlamaForCausalLM,
    SpikeLMModel,
)

ROWS = torch.randint(1, 60, (64, 12), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(1, 60, (16, 12), generator=torch.Generator().manual_seed(1))


def make_models(folder, student_class=SpikeLMModel, **fields):
    config = SpikeLMConfig.from_pretrained(folder, **{"neuron": "thrifty", "num_time_steps": 1} | fields)
    student = student_class.from_pretrained(folder, config=config)
    student.calibrate({"input_ids": ROWS[:16]})
    return student, AutoModel.from_pretrained(folder)


def error(student, teacher):
    """Mean over the layers, on rows that nothing was fitted to."""
    with torch.no_grad():
        found, wished = (
            model.eval()(HELD_OUT, output_hidden_states=True).hidden_states for model in (student.base_model, teacher)
        )
    return hidden_state_errors(found[1:], wished[1:], torch.ones_like(HELD_OUT, dtype=torch.bool)).mean().item()


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_change_is_that_of_least_squares_with_a_price_on_weights(ridge, has_bias):
    numbers = np.random.default_rng(0)
    x, r, w = numbers.normal(3, 1, (50, 4)), numbers.normal(size=(50, 3)) - 7, numbers.uniform(0.1, 2, (50, 1))
    parts = [[torch.tensor(values[part]).float() for values in (x, r, w)] for part in (slice(20), slice(20, 50))]
    moments = _Moments(*parts[0][:2], is_centred=has_bias)
    for part in parts:
        moments.add(*part)
    change, shift = moments.solve(ridge)
    # The price is so many more rows, with a wish of 0; a column of ones is the shift, which costs nothing.
    middle = (w * x).sum(0) / w.sum() if has_bias else 0
    price = np.sqrt(ridge * (w * (x - middle) ** 2).sum(0).mean())
    rows = np.block([[np.sqrt(w) * x, np.sqrt(w) * has_bias], [price * np.eye(4), np.zeros((4, 1))]])
    best, *_ = np.linalg.lstsq(rows, np.vstack([np.sqrt(w) * r, np.zeros((4, 3))]), rcond=None)
    np.testing.assert_allclose(change, best[:4].T, atol=1e-5)
    np.testing.assert_allclose(shift, best[4], atol=1e-4)


def test_a_student_that_trains_in_mixed_precision_is_fitted_in_float32(save_teacher):
    """As accelerate wraps what it trains: autocast lies around the forward of that one object."""
    student, teacher = make_models(save_teacher())
    seen = set()
    student.encoder.layer[0].register_forward_pre_hook(lambda layer, args: seen.add(torch.is_autocast_enabled("cpu")))
    student.forward = torch.autocast("cpu", dtype=torch.bfloat16)(student.forward)
    fit_to_teacher(student, teacher, [{"input_ids": ROWS}])
    assert seen == {False}


@pytest.mark.parametrize("fields", [{}, {"num_time_steps": 3}, {"neuron": "bi-spiking"}, {"neuron": "lif"}])
def test_a_fitted_student_is_nearer_to_its_teacher_on_other_text(save_teacher, fields):
    student, teacher = make_models(save_teacher(), **fields)
    before = error(student, teacher)
    fit_to_teacher(student.train(), teacher, [{"input_ids": ROWS[:40]}, {"input_ids": ROWS[40:]}])
    assert student.training
    assert error(student, teacher) < 0.9 * before


def make_decoders(folder, steps=1, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes, **fields, initializer_range=0.3)).eval()
    dense.save_pretrained(folder)
    student = SpikeLMLlamaForCausalLM.from_pretrained(folder, neuron="thrifty", num_time_steps=steps)
    student.calibrate({"input_ids": ROWS})
    return student, dense


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"steps": 2}])
def test_a_decoder_is_fitted_too(tmp_path, fields):
    student, dense = make_decoders(tmp_path, **fields)
    before = error(student, dense.model)
    fit_to_teacher(student, dense, [{"input_ids": ROWS[:40]}, {"input_ids": ROWS[40:]}])
    assert error(student, dense.model) < 0.9 * before


def test_a_layer_that_runs_many_times_fills_no_cache(tmp_path, monkeypatch):
    student, dense = make_decoders(tmp_path)
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kwargs: pytest.fail("a cache is filled"))
    fit_to_teacher(student, dense, [{"input_ids": ROWS}])


def test_of_layers_of_several_kinds_each_is_run_with_its_own_mask(tmp_path):
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2, "use_sliding_window": True}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=60, **sizes, num_key_value_heads=2, **kinds, initializer_range=0.3)
    dense = Qwen2ForCausalLM(config).eval()
    dense.save_pretrained(tmp_path)
    student = SpikeLMLlamaForCausalLM.from_pretrained(tmp_path, neuron="thrifty", num_time_steps=1)
    student.calibrate({"input_ids": ROWS})
    given = []
    dense.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        dense(ROWS)
    fit_to_teacher(student, dense, [{"input_ids": ROWS}])
    assert len(given) > 1
    for output in given[1:]:
        torch.testing.assert_close(output, given[0])


def test_a_group_that_never_fires_leaves_weights_alone_and_the_shift_is_fitted(save_teacher):
    student, teacher = make_models(save_teacher(), neuron="elastic", amplitude_scale=50)
    before = error(student, teacher)
    weights = {name: value.clone() for name, value in student.named_parameters() if name.endswith("query.weight")}
    fit_to_teacher(student, teacher, [{"input_ids": ROWS}])
    assert weights and all(torch.equal(student.get_parameter(name), value) for name, value in weights.items())
    assert error(student, teacher) < before


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"intermediate_size": 48}, "the teacher has intermediate_size=48, but the student has intermediate_size=32"),
        ({"num_attention_heads": 4}, "the teacher has num_attention_heads=4, but the student has"),
    ],
)
def test_layers_of_other_sizes_are_refused(save_teacher, sizes, message):
    student, _ = make_models(save_teacher())
    with pytest.raises(ValueError, match=message):
        check_can_fit(student, BertModel(BertConfig.from_pretrained(save_teacher(), **sizes)))


def test_a_dense_student_is_refused(save_teacher):
    _, teacher = make_models(save_teacher())
    with pytest.raises(ValueError, match="this student is a BertModel; name its type, such as --model_type spikelm"):
        check_can_fit(teacher, teacher)


def make_writers(folder, **fields):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=60, **sizes, **heads, max_position_embeddings=32, init_std=0.3)
    dense = BartForConditionalGeneration(config).eval()
    dense.save_pretrained(folder)
    student = SpikeLMBartForConditionalGeneration.from_pretrained(folder, neuron="thrifty", **fields)
    student.calibrate(read_and_written(ROWS))
    return student, dense


def read_and_written(rows):
    """What is written is shorter than what is read; both sides have padding."""
    read, written = rows.clone(), rows.flip(1)[:, :7].clone()
    read[::2, 9:], written[::3, 5:] = 1, 1
    masks = {"attention_mask": (read != 1).long(), "decoder_attention_mask": (written != 1).long()}
    return {"input_ids": read, "decoder_input_ids": written} | masks


def errors_of_both(student, dense):
    """Of the layers of encoder and decoder, on rows that nothing was fitted to."""
    batch = read_and_written(HELD_OUT)
    with torch.no_grad():
        found, wished = (model.eval().model(**batch, output_hidden_states=True) for model in (student, dense))
    return torch.stack(
        [
            hidden_state_errors(found[f"{side}_hidden_states"][1:], wished[f"{side}_hidden_states"][1:], mask.bool())
            for side, mask in (
                ("encoder", batch["attention_mask"]),
                ("decoder", batch["decoder_attention_mask"]),
            )
        ]
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_an_encoder_and_what_writes_behind_it_are_fitted_one_after_the_other(tmp_path, steps):
    student, dense = make_writers(tmp_path, num_time_steps=steps)
    before = errors_of_both(student, dense)
    fit_to_teacher(student, dense, [read_and_written(ROWS[:40]), read_and_written(ROWS[40:])])
    assert (errors_of_both(student, dense) < 0.95 * before).all()


def sums_and_products(model, batch):
    """What norms get, and what products give that go into no sum, by their names."""
    found = {}

    def see(module, args, output):
        found[names[module]] = output if isinstance(module, torch.nn.Linear) else args[0]

    names = {
        module: name
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "fc1", "_layer_norm"))
    }
    hooks = [module.register_forward_hook(see) for module in names]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_the_mean_over_tokens_of_every_sum_and_product_becomes_the_dense_one(tmp_path):
    """As a bias costs nothing. A sum is what a norm gets, and a token counts there by 1 over its variance."""
    student, dense = make_writers(tmp_path, num_time_steps=1)
    batch = read_and_written(ROWS)
    fit_to_teacher(student, dense, [batch])
    seen = [sums_and_products(model.eval().model, batch) for model in (student, dense)]
    assert len(seen[0]) == 2 * (2 + 4) + 2 * (3 + 3 + 3 + 1)
    for name, wished in seen[1].items():
        is_read = "encoder.layers" in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        is_token = batch["attention_mask" if is_read else "decoder_attention_mask"].bool()
        weight = (1 / wished.var(-1, keepdim=True) if name.endswith("norm") else torch.ones_like(wished))[is_token]
        lacking = (weight * (wished - seen[0][name])[is_token]).mean(0) / weight.mean()
        torch.testing.assert_close(lacking, torch.zeros_like(lacking), atol=1e-4, rtol=0, msg=name)


def test_what_a_decoder_reads_of_the_encoder_gets_levels_of_the_fitted_encoder(tmp_path):
    student, dense = make_writers(tmp_path, num_time_steps=1)
    fit_to_teacher(student, dense, [read_and_written(ROWS)])
    group = student.model.decoder.memory_neurons
    fitted = group.calibration().clone()
    student.reset_calibration()
    student.calibrate(read_and_written(ROWS))
    torch.testing.assert_close(group.calibration(), fitted)


def test_neither_batches_nor_padding_change_what_comes_out(save_teacher):
    rows = [row[: 6 + number % 6] for number, row in enumerate(ROWS)]
    states = []
    for size in (64, 10):
        student, teacher = make_models(save_teacher())
        batches = []
        for start in range(0, 64, size):
            ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + size], batch_first=True)
            batches.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
        fit_to_teacher(student, teacher, batches)
        states.append(student.state_dict())
    # Rounding turns a spike here and there.
    for name, value in states[0].items():
        assert (value - states[1][name]).norm() <= 0.02 * value.norm() + 1e-4, name


def test_of_a_classifier_the_encoder_is_fitted_and_nothing_else(save_teacher):
    student, teacher = make_models(save_teacher("labels"), SpikeLMForSequenceClassification)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fit_to_teacher(student, teacher, [{"input_ids": ROWS}])
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("bert.encoder.") for name in changed)


def test_without_text_there_is_nothing_to_fit_to(save_teacher):
    student, teacher = make_models(save_teacher())
    with pytest.raises(ValueError, match="There is no batch"):
        fit_to_teacher(student, teacher, [])
