"""run_distill.py from text to a student that loads, in one process."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

import run_distill
from distillation.trainer import DistillationTrainer
from experiment.publishing import Publisher
from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.forked_processes import launch_forked
from tests.other_vocabulary import with_other_vocabulary
from tests.test_run_mlm import assert_same_weights, interrupted

ROOT = Path(run_distill.__file__).parent
SHORT = """--per_device_train_batch_size 8 --learning_rate 2e-3 --max_steps 12 --max_seq_length 32 --max_eval_samples 16
--save_steps 6 --logging_steps 1 --report_to none --use_cpu --seed 1 --config_overrides
num_time_steps=2,hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0""".split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


@pytest.fixture(scope="module")
def teachers(corpus, tmp_path_factory) -> dict[str, Path]:
    """A BERT with a masked-LM head and one without any, random but far from doing nothing."""
    folder = tmp_path_factory.mktemp("teachers")
    texts = load_dataset("text", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
    tokenizer = train_wordpiece(texts, 400, True, model_max_length=64)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.2}
    for name, kind in (("with_head", BertForMaskedLM), ("bare", BertModel)):
        torch.manual_seed(0)
        kind(BertConfig(**sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("with_head", "bare")}


def command(teacher, corpus, output, *more) -> list[str]:
    return [
        "--teacher_name_or_path",
        str(teacher),
        "--train_file",
        str(corpus),
        "--output_dir",
        str(output),
        *SHORT,
        *more,
    ]


@pytest.fixture(scope="module")
def distilled(teachers, corpus, tmp_path_factory) -> dict[str, Path]:
    """What a run of each teacher has left behind."""
    outputs = {name: tmp_path_factory.mktemp("students") / name for name in teachers}
    for name, output in outputs.items():
        run_distill.main(command(teachers[name], corpus, output))
    return outputs


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name, auto_class", [("with_head", AutoModelForMaskedLM), ("bare", AutoModel)])
def test_the_student_comes_nearer_to_its_teacher_and_loads(distilled, teachers, name, auto_class):
    losses = [entry["loss"] for entry in history(distilled[name]) if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    results = json.loads((distilled[name] / "all_results.json").read_text())
    model = auto_class.from_pretrained(distilled[name]).eval()
    assert model.config.model_type == "spikelm" and model.config.num_time_steps == 2
    # The error is that of the model that was saved, on text that it was not trained on.
    assert 0 < results["eval_hidden_error_1"] < results["eval_hidden_error_2"] < 2
    assert results["eval_hidden_error"] == results["eval_loss"]
    assert 0 < results["eval_firing_rate"] < 1
    teacher = load_file(teachers[name] / "model.safetensors")
    weights = load_file(distilled[name] / "model.safetensors")
    frozen = [key for key in weights if ".embeddings." in key or key.startswith("embeddings.")]
    assert len(frozen) == 5
    for key in frozen:
        assert torch.equal(weights[key], teacher[key])


def test_the_card_names_the_teacher_and_the_error(distilled):
    card = (distilled["bare"] / "README.md").read_text()
    assert "hidden states of bare from the text of `topics.txt`" in card
    assert "feature-extraction" in card and "hidden_error" in card
    assert "hidden states and logits of with_head" in (distilled["with_head"] / "README.md").read_text()


def test_a_teacher_of_another_vocabulary_is_refused(teachers, corpus, tmp_path):
    other = with_other_vocabulary(teachers["bare"], tmp_path / "other")
    more = ("--model_name_or_path", str(teachers["bare"]))
    with pytest.raises(SystemExit, match="has a tokenizer of another vocabulary"):
        run_distill.main(command(other, corpus, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_the_same_command_resumes_to_the_same_weights(distilled, teachers, corpus, tmp_path):
    again = command(teachers["bare"], corpus, tmp_path / "out")
    interrupted(again, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 6, run_distill)
    run_distill.main(again)
    assert_same_weights(tmp_path / "out", distilled["bare"])


def test_make_convert_is_its_recipe_and_the_same_command_goes_on(teachers, corpus, tmp_path):
    def convert(output):
        names = [f"TEXT={corpus}", f"TEACHER={teachers['bare']}", f"CONVERTED={output}"]
        make = ["make", "--no-print-directory", "-n", "convert", *names]
        said = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True)
        *_, line = said.stdout.replace("\\\n", " ").strip().splitlines()
        assert "run_distill.py recipes/convert_to_spikelm.yaml" in line
        flags = shlex.split(line.partition("run_distill.py")[2])
        # The budget, and what a machine may lack.
        small = "--max_steps 4 --save_steps 2 --warmup_steps 1 --per_device_train_batch_size 8 --bf16 False --use_cpu"
        return [str(ROOT / flags[0]), *flags[1:], *small.split(), "--validation_split_percentage", "20"]

    run_distill.main(convert(tmp_path / "whole"))
    cut_off = convert(tmp_path / "cut_off")
    interrupted(cut_off, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 2, run_distill)
    run_distill.main(cut_off)
    assert_same_weights(tmp_path / "cut_off", tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert (config["neuron"], config["num_time_steps"]) == ("thrifty", 1)


def test_documents_can_have_rows_of_their_own(teachers, tmp_path, caplog):
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join("the bank " * (1 + number % 3) for number in range(80)))
    more = ("--one_document_per_row", "--train_sampling_strategy", "group_by_length", "--max_steps", "2")
    run_distill.main(command(teachers["bare"], text, tmp_path / "out", *more, "--validation_split_percentage", "20"))
    assert "in rows of one document and at most 32 tokens." in (tmp_path / "out/README.md").read_text()
    packed = re.findall(r"Packed (\d+) documents into (\d+) rows", caplog.text)
    assert len(packed) == 2 and all(documents == rows for documents, rows in packed)


def test_a_stream_teaches_and_is_resumed_where_it_was(teachers, corpus, tmp_path):
    more = ("--streaming", "--validation_file", str(corpus), "--max_steps", "4", "--save_steps", "2")
    run_distill.main(command(teachers["with_head"], corpus, tmp_path / "whole", *more))
    cut_off = command(teachers["with_head"], corpus, tmp_path / "cut_off", *more)
    interrupted(cut_off, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 2, run_distill)
    run_distill.main(cut_off)
    assert_same_weights(tmp_path / "cut_off", tmp_path / "whole")


def test_a_student_that_was_fitted_begins_nearer_and_is_not_fitted_again_when_it_goes_on(teachers, corpus, tmp_path):
    def fitted(name, tokens):
        steps = ("--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-5", "--fit_tokens", tokens)
        return command(teachers["bare"], corpus, tmp_path / name, *steps)

    errors = {}
    for tokens in ("0", "1200"):
        run_distill.main(fitted(tokens, tokens))
        errors[tokens] = json.loads((tmp_path / tokens / "all_results.json").read_text())["eval_hidden_error"]
    assert errors["1200"] < 0.9 * errors["0"]
    cut_off = fitted("again", "1200")
    interrupted(cut_off, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 1, run_distill)
    run_distill.main(cut_off)
    assert_same_weights(tmp_path / "again", tmp_path / "1200")


def test_a_student_goes_on_from_a_student(distilled, teachers, corpus, tmp_path):
    more = (
        "--model_name_or_path",
        str(distilled["bare"]),
        "--config_overrides",
        "num_time_steps=4",
        "--max_steps",
        "2",
    )
    run_distill.main(command(teachers["bare"], corpus, tmp_path / "out", *more))
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_time_steps == 4


def test_a_student_that_trains_its_embeddings_begins_with_the_teachers_head_where_it_has_none(
    distilled, teachers, corpus, tmp_path
):
    def head_of(student: Path, name: str) -> dict[str, torch.Tensor]:
        more = ("--model_name_or_path", str(student), "--train_embeddings", "--learning_rate", "0")
        run_distill.main(command(teachers["with_head"], corpus, tmp_path / name, *more, "--max_steps", "1"))
        weights = load_file(tmp_path / name / "model.safetensors")
        return {key: value for key, value in weights.items() if key.startswith("cls.")}

    weights = load_file(teachers["with_head"] / "model.safetensors")
    found = head_of(distilled["bare"], "bare")
    assert found and all(torch.equal(value, weights[key]) for key, value in found.items())
    # One that it has learned is kept.
    own = load_file(distilled["with_head"] / "model.safetensors")
    found = head_of(distilled["with_head"], "own")
    assert all(torch.equal(value, own[key]) for key, value in found.items())
    assert not all(torch.equal(value, weights[key]) for key, value in found.items())


@pytest.mark.parametrize("own", [False, True])
def test_frozen_embeddings_are_those_of_the_teacher_whatever_the_student_was_made_of(
    distilled, teachers, corpus, tmp_path, own
):
    torch.manual_seed(1)
    fine_tuned = BertForSequenceClassification(BertConfig.from_pretrained(teachers["bare"]))
    fine_tuned.save_pretrained(tmp_path / "fine_tuned")
    AutoTokenizer.from_pretrained(teachers["bare"]).save_pretrained(tmp_path / "fine_tuned")
    more = ["--model_name_or_path", str(distilled["bare"]), "--max_steps", "1", "--learning_rate", "1e-9"]
    more += ["--train_embeddings"] if own else []
    run_distill.main(command(tmp_path / "fine_tuned", corpus, tmp_path / "out", *more))
    found = AutoModel.from_pretrained(tmp_path / "out")
    before = AutoModel.from_pretrained(distilled["bare"])
    wanted = before if own else fine_tuned.bert
    for name, values in found.embeddings.named_parameters():
        torch.testing.assert_close(values, wanted.embeddings.get_parameter(name), rtol=0, atol=1e-6)
    weight = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(found.get_parameter(weight), before.get_parameter(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["with_head", "bare"])
def test_pairs_of_text_teach_what_a_classifier_reads(teachers, corpus, tmp_path, monkeypatch, name):
    """As the teacher of a task on pairs reads them: two segments, each with its token type."""
    seen = []
    loss_terms = DistillationTrainer.loss_terms

    def watched(self, model, inputs):
        seen.append(inputs["token_type_ids"])
        return loss_terms(self, model, inputs)

    monkeypatch.setattr(DistillationTrainer, "loss_terms", watched)
    more = ("--objective", "mlm_nsp", "--first_token_weight", "1", "--loss_diagnostics", "--max_steps", "4")
    run_distill.main(command(teachers[name], corpus, tmp_path / "out", *more))
    assert all(types.unique().tolist() == [0, 1] for types in seen)
    figures = [entry for entry in history(tmp_path / "out") if "first_token_loss" in entry]
    assert len(figures) == 4 and all(entry["first_token_gradient"] > 0 for entry in figures)


REENTRANT = ("--activation_checkpointing_kwargs", '{"use_reentrant": true}')


def test_two_processes_that_checkpoint_do_without_gradients_of_a_pooler_that_nothing_reads(teachers, corpus, tmp_path):
    small = ("--max_steps", "2", "--activation_checkpointing", "--per_device_train_batch_size", "4")

    def launch(name, *more):
        argv = ["run_distill.py", *command(teachers["bare"], corpus, tmp_path / name, *small, *more)]
        return launch_forked("two_cpu_processes", argv, "--num_processes", "2")

    done = launch("out")
    assert done.returncode == 0, done.stderr[-3000:]
    # Without looking for them the second step fails, so it is tried before anything is written.
    done = launch("other", "--ddp_find_unused_parameters", "False")
    assert done.returncode != 0 and "The first step was tried on a few rows" in done.stderr
    assert not (tmp_path / "other").exists()


def test_hidden_states_are_learned_with_any_checkpointing(teachers, corpus, tmp_path):
    more = ("--max_steps", "1", "--activation_checkpointing", *REENTRANT)
    run_distill.main(command(teachers["bare"], corpus, tmp_path / "out", *more))
    assert history(tmp_path / "out")[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "more, message",
    [
        (("--model_type", "bert"), "--model_type bert: the student is a SpikeLM"),
        (("--streaming", "--max_steps", "-1"), "--streaming needs --max_steps"),
        (("--hidden_weight", "-1"), "--hidden_weight is -1.0"),
        (("--temperature", "2", "--logits_weight", "0"), "--temperature 2 with --logits_weight 0 says nothing"),
        (("--label_weight", "0.5"), "--label_weight 0.5 is about a masked-LM head, and .*bare has none; leave"),
        (("--mlm_probability", "0.3"), "--mlm_probability 0.3 is about a masked-LM head, and .*bare has none; leave"),
        (
            ("--sentence_weight", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
            "--sentence_weight 1 with --per_device_train_batch_size 4: .* takes 8 or more",
        ),
        (
            ("--value_relation_weight", "1", "--activation_checkpointing", *REENTRANT),
            "--value_relation_weight with use_reentrant .* gradients cannot be had",
        ),
        (
            ("--loss_diagnostics", "--logging_strategy", "epoch"),
            "--loss_diagnostics with --logging_strategy epoch shows nothing",
        ),
        (
            ("--loss_diagnostics", "--max_steps", "2", "--logging_steps", "3"),
            "--loss_diagnostics shows nothing in --max_steps 2 with --logging_steps 3",
        ),
    ],
)
def test_bad_flags_end_in_one_line_and_nothing_is_written(teachers, corpus, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run_distill.main(command(teachers["bare"], corpus, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_shape_is_refused(distilled, teachers, corpus, tmp_path):
    config = BertConfig.from_pretrained(teachers["bare"], num_hidden_layers=1)
    BertModel(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(teachers["bare"]).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="has num_hidden_layers=1, but the student has num_hidden_layers=2"):
        more = ("--model_name_or_path", str(distilled["bare"]))
        run_distill.main(command(tmp_path / "other", corpus, tmp_path / "out", *more))
    without = command("x", corpus, tmp_path / "out")[2:]
    with pytest.raises(SystemExit, match="--teacher_name_or_path is missing"):
        run_distill.main(without)
