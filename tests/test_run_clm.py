"""run_clm.py from text to a decoder that writes, in one process: from scratch, as a stream, and from a teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    pipeline,
)

import run_clm
from experiment.publishing import Publisher
from modeling_spikelm import SpikeLMLlamaForCausalLM
from tests.corpus import write_corpus
from tests.other_vocabulary import with_other_vocabulary
from tests.test_run_mlm import assert_same_weights, interrupted

ROOT = Path(__file__).parent.parent
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SHORT = """--per_device_train_batch_size 4 --learning_rate 3e-3 --max_steps 12 --save_steps 6 --logging_steps 1
--max_seq_length 32 --max_eval_samples 16 --use_cpu --report_to none --disable_tqdm True --seed 1""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


def from_scratch(corpus, output, *more) -> list[str]:
    sizes = ",".join(f"{name}={value}" for name, value in SIZES.items())
    command = ["--train_file", str(corpus), "--vocab_size", "400", "--config_overrides", f"{sizes},num_time_steps=2"]
    return [*command, *SHORT, "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """What one run has left behind."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run_clm.main(from_scratch(corpus, folder))
    return folder


@pytest.fixture(scope="module")
def teacher(trained, tmp_path_factory) -> Path:
    """A Llama, random but far from doing nothing, with the tokenizer of the run."""
    folder = tmp_path_factory.mktemp("teacher") / "dense"
    tokenizer = AutoTokenizer.from_pretrained(trained)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def history(folder: Path, name: str = "loss") -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def test_a_decoder_learns_reports_its_perplexity_and_writes(trained):
    losses, reported = history(trained), results(trained)
    assert losses[-1] < losses[0] - 0.1
    assert reported["eval_perplexity"] == pytest.approx(torch.tensor(reported["eval_loss"]).exp().item(), rel=1e-4)
    assert 0 < reported["eval_firing_rate"] < 1
    written = pipeline("text-generation", model=str(trained))("The", max_new_tokens=4, return_full_text=False)
    assert isinstance(written[0]["generated_text"], str)
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.generation_config.use_cache and model.config.eos_token_id == 0


def test_the_perplexity_is_that_of_every_token_but_the_first_of_its_row(trained, tmp_path):
    """Rows of unequal lengths, batches of four: what the Trainer's mean over batches gets wrong."""
    rows = [{"input_ids": list(range(3 + number, 9 + 3 * number))} for number in range(6)]
    splits = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows)}
    DatasetDict(splits).save_to_disk(tmp_path / "rows")
    command = ["--dataset_name", str(tmp_path / "rows"), "--model_name_or_path", str(trained), "--do_eval", *SHORT]
    run_clm.main([*command, "--per_device_eval_batch_size", "4", "--output_dir", str(tmp_path / "run")])
    model, total, count = AutoModelForCausalLM.from_pretrained(trained).eval(), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert results(tmp_path / "run")["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_card_is_that_of_a_decoder(trained):
    card = (trained / "README.md").read_text()
    assert "a causal decoder in Llama's form" in card and 'pipeline("text-generation"' in card
    assert "pipeline_tag: text-generation" in card and "perplexity" in card and "license: apache-2.0" in card
    assert "| dense / this, with the head |" in card and "encoder" not in card.partition("## Citation")[0]


def test_the_same_command_resumes_to_the_same_weights(trained, corpus, tmp_path):
    command = from_scratch(corpus, tmp_path / "out")
    interrupted(command, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 6, run_clm)
    run_clm.main(command)
    assert_same_weights(tmp_path / "out", trained)


def test_a_stream_is_read_pass_after_pass_and_resumed_where_it_was(corpus, tmp_path):
    few_rows = ["--streaming", "--max_train_samples", "20", "--validation_split_percentage", "20"]
    whole, cut = (from_scratch(corpus, tmp_path / name, *few_rows) for name in ("whole", "cut"))
    run_clm.main(whole)
    interrupted(cut, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 6, run_clm)
    run_clm.main(cut)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_int8_weights_are_evaluated_as_they_are_and_trained_as_floats(trained, corpus, tmp_path):
    SpikeLMLlamaForCausalLM.from_pretrained(trained).quantize_weights().save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "int8")
    command = ["--model_name_or_path", str(tmp_path / "int8"), "--train_file", str(corpus), *SHORT]
    run_clm.main([*command, "--do_eval", "--output_dir", str(tmp_path / "evaluated")])
    run_clm.main([*command, "--max_steps", "1", "--learning_rate", "1e-6", "--output_dir", str(tmp_path / "trained")])
    for name in ("evaluated", "trained"):
        assert results(tmp_path / name)["eval_loss"] == pytest.approx(results(trained)["eval_loss"], abs=0.05)
    assert not json.loads((tmp_path / "trained" / "config.json").read_text())["int8_weights"]


def test_the_dense_model_is_trained_by_the_same_command(corpus, tmp_path):
    command = from_scratch(corpus, tmp_path / "out", "--model_type", "llama", "--max_steps", "1")
    command[command.index("--config_overrides") + 1] = ",".join(f"{name}={value}" for name, value in SIZES.items())
    run_clm.main(command)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    assert "dense **llama**" in (tmp_path / "out" / "README.md").read_text()


def student(teacher, corpus, output, *more) -> list[str]:
    command = ["--teacher_name_or_path", str(teacher), "--train_file", str(corpus), "--output_dir", str(output)]
    return [*command, *SHORT, "--config_overrides", "num_time_steps=2,neuron=thrifty", *more]


def test_a_student_comes_nearer_to_its_teacher(teacher, corpus, tmp_path):
    terms = ["--loss_diagnostics", "--max_steps", "24"]
    run_clm.main(student(teacher, corpus, tmp_path / "out", *terms))
    for term in ("hidden", "logits", "label"):
        losses = history(tmp_path / "out", f"{term}_loss")
        assert losses[-1] < 0.98 * losses[0], term
    assert all(0 < rate < 1 for rate in history(tmp_path / "out", "firing_rate"))
    assert len(history(tmp_path / "out", "firing_rate")) == len(history(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.neuron) == ("spikelm_llama", "thrifty")
    dense, weights = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "out"))
    assert torch.equal(weights["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"], dense["lm_head.weight"])
    assert results(tmp_path / "out")["eval_perplexity"] > 1
    card = (tmp_path / "out" / "README.md").read_text()
    # Weights that were a Llama's have its licence, which nobody here knows.
    assert "Learned the hidden states and logits of dense" in card and "license:" not in card


def test_a_student_that_began_elsewhere_takes_what_is_not_in_a_layer_from_its_teacher(teacher, corpus, tmp_path):
    shutil.copytree(teacher, tmp_path / "start")
    start = {name: value + 1 for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(start, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    still = ("--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1", "--learning_rate", "0")
    run_clm.main(student(teacher, corpus, tmp_path / "out", *still))
    dense, weights = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "out"))
    for name in dense:
        assert torch.equal(weights[name], start[name] if ".layers." in name else dense[name]), name


def test_a_student_that_was_fitted_begins_nearer(teacher, corpus, tmp_path):
    losses = []
    for tokens in ("0", "1200"):
        small = ("--max_steps", "1", "--learning_rate", "1e-6", "--fit_tokens", tokens, "--logits_weight", "0")
        run_clm.main(student(teacher, corpus, tmp_path / tokens, *small))
        losses += history(tmp_path / tokens, "loss")
        assert "Learned the hidden states of dense to predict" in (tmp_path / tokens / "README.md").read_text()
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--label_smoothing_factor", "0.1"), "--label_smoothing_factor: the Trainer smooths"),
        (("--hidden_weight", "2"), "--hidden_weight is about learning from a teacher"),
        (("--max_seq_length", "128"), r"Rows of up to 128 tokens \(--max_seq_length\) are more"),
        (("--vocab_size", "100"), "vocab_size has to be at least 258"),
        (("--model_type", "nonsense"), "no model type 'nonsense'; for instance spikelm_llama or llama"),
        (("--metric_for_best_model", "f1"), "choose one of loss, perplexity, next_token_accuracy"),
        (("--streaming", "--max_steps", "-1"), "--streaming needs --max_steps"),
        (("--mlm_probability", "0.1"), "--mlm_probability"),
        (("--config_overrides", "num_attention_heads=4,num_key_value_heads=3"), "num_key_value_heads=3"),
    ],
)
def test_bad_flags_end_in_one_line_and_nothing_is_written(corpus, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run_clm.main(from_scratch(corpus, tmp_path / "out", *more))
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model_type, message",
    [
        ("bert", "BertLMHeadModel sees the tokens behind"),
        ("spikelm", "type .spikelm. have no class for AutoModelForCausalLM"),
    ],
)
def test_an_encoder_is_refused_in_one_line(corpus, tmp_path, model_type, message):
    command = from_scratch(corpus, tmp_path / "out", "--model_type", model_type)
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
    command[command.index("--config_overrides") + 1] = sizes
    with pytest.raises(SystemExit, match=message) as stopped:
        run_clm.main(command)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_student_trains_in_16_bits_and_computes_activations_twice(teacher, corpus, tmp_path):
    more = ["--bf16", "--gradient_checkpointing", "--max_steps", "2", "--spike_batches", "0"]
    run_clm.main(student(teacher, corpus, tmp_path / "out", *more))
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out" / "model.safetensors").values())


def test_terms_of_an_encoder_are_refused(teacher, corpus, tmp_path):
    with pytest.raises(SystemExit, match="--sentence_weight is about an encoder alone"):
        run_clm.main(student(teacher, corpus, tmp_path / "out", "--sentence_weight", "1"))


def test_too_little_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text("One.\n\nTwo.\n\nThree.\n")
    for streaming in ([], ["--streaming"]):
        more = ["--validation_file", str(tmp_path / "text.txt"), *streaming]
        with pytest.raises(SystemExit, match="documents do not fill one row of --max_seq_length 32") as stopped:
            run_clm.main(from_scratch(tmp_path / "text.txt", tmp_path / "out", *more))
        assert "\n" not in str(stopped.value)
        assert not (tmp_path / "out").exists()


def test_the_recipe_is_understood(corpus, tmp_path):
    recipe = str(ROOT / "recipes" / "decoder_two_cores.yaml")
    small = ["--train_file", str(corpus), *SHORT, "--max_steps", "1", "--spike_batches", "0"]
    run_clm.main([recipe, *small, "--output_dir", str(tmp_path / "out"), "--eval_strategy", "no"])
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.hidden_size, config.num_time_steps, config.tie_word_embeddings) == (256, 4, True)


def test_a_teacher_of_another_kind_or_without_a_head_is_refused(teacher, corpus, tmp_path):
    LlamaModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    for name, message in (("bare", "has no head that says which token is next"), ("gpt2", "is of type 'gpt2'")):
        AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / name)
        start = ["--model_name_or_path", str(teacher)]
        with pytest.raises(SystemExit, match=message):
            run_clm.main(student(tmp_path / name, corpus, tmp_path / "out", *start))
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary_is_refused(teacher, corpus, tmp_path):
    other = with_other_vocabulary(teacher, tmp_path / "other")
    with pytest.raises(SystemExit, match="has a tokenizer of another vocabulary: .* is 399 there and 398") as stopped:
        run_clm.main(student(other, corpus, tmp_path / "out", "--model_name_or_path", str(teacher)))
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()
