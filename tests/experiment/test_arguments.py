from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments

from distillation.arguments import DistillationArguments
from experiment.arguments import ModelArguments, local_inputs, parse_arguments
from glue_tasks.arguments import GlueArguments
from pretraining_data.arguments import DataArguments


@dataclass
class Needed:
    name: str
    numbers: list[int] | None = None


def parse(*argv, dataclasses=(ModelArguments, TrainingArguments)):
    *parsed, _ = parse_arguments(dataclasses, list(argv))
    return parsed


def test_without_phases_a_run_does_everything():
    _, training = parse("--output_dir", "x")
    assert (training.do_train, training.do_eval, training.do_predict) == (True, True, True)


@pytest.mark.parametrize("flag", ["--do_eval", "--do_eval=True"])
def test_named_phases_are_the_only_ones(flag):
    _, training = parse("--output_dir", "x", flag)
    assert (training.do_train, training.do_eval, training.do_predict) == (False, True, False)


def test_a_command_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--do_train False --do_eval False leaves nothing to do"):
        parse("--output_dir", "x", "--do_train", "False", "--do_eval", "False")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("do_train: false\n")
    assert parse(str(recipe), "--output_dir", "x", "--do_eval")[1].do_eval


def test_a_phase_that_a_script_has_not_is_refused_and_is_none_of_its_own():
    def parse_without_predict(*argv):
        return parse_arguments([TrainingArguments], ["--output_dir", "x", *argv], phases=("do_train", "do_eval"))[0]

    told = "--do_predict does nothing in this script, which has --do_train, --do_eval. Leave it out."
    for flags in (["--do_predict"], ["--do_eval", "--do_predict"]):
        with pytest.raises(ValueError, match=told):
            parse_without_predict(*flags)
    training = parse_without_predict("--do_predict", "False")
    assert (training.do_train, training.do_eval) == (True, True)


def test_hyphens_are_seen_as_the_parser_sees_them():
    _, training = parse("--output-dir", "x", "--do-eval")
    assert (training.output_dir, training.do_train) == ("x", False)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        parse("--output-dir", "x", "--hub-token", "hf_secret")


def test_recipe_fills_required_flags_and_converts_numbers(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\nnumbers: [1, 2]\nlearning_rate: 2e-4\nbf16: false\n")
    needed, training = parse(str(recipe), "--output_dir", "x", dataclasses=(Needed, TrainingArguments))
    assert (needed.name, needed.numbers) == ("a", [1, 2])
    assert training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("numbers: 3", "numbers", [3]),
        ("save_strategy: no", "save_strategy", "no"),
        ("bf16: no", "bf16", False),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("per_device_train_batch_size: '4'", "per_device_train_batch_size", 4),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("logging_steps: null", "logging_steps", 500),
        ("run_name: true_run", "run_name", "true_run"),
    ],
)
def test_a_recipes_value_is_what_it_would_be_as_a_flag(line, name, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\n{line}\n" if name == "numbers" else f"name: a\nnumbers: [1]\n{line}\n")
    needed, training = parse(str(recipe), "--output_dir", "x", dataclasses=(Needed, TrainingArguments))
    assert getattr(needed if hasattr(needed, name) else training, name) == value


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train_sampling_strategy: group_by_lenght", "invalid choice: 'group_by_lenght'"),
        ("max_steps: 2.5", "invalid int value: '2.5'"),
        ("learning_rate: [1]", "learning_rate to .*takes one value"),
        ("bf16: maybe", "Truthy value expected"),
        ("run_name: [a, b]", "run_name to .*takes one value"),
    ],
)
def test_a_recipes_wrong_value_is_refused_as_that_of_a_flag(line, told, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line + "\n")
    with pytest.raises(ValueError, match=told):
        parse(str(recipe), "--output_dir", "x")


def test_json_recipes_are_read_too(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"output_dir": "y", "seed": 7}')
    assert parse(str(recipe))[1].seed == 7


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "just words\n"])
def test_recipe_has_to_be_a_mapping(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match="mapping"):
        parse(str(recipe), "--output_dir", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "\tmax_steps: 2\n", "a.yaml cannot be read: while scanning"),
        ("a.yaml", "max_steps: [2\n", "a.yaml cannot be read"),
        ("a.yaml", "max_steps: 2\nmax_steps: 3\n", "a.yaml cannot be read: max_steps is in it twice"),
        ("a.yaml", "1: 2\n", "sets 1, which this script has no flag for.$"),
        ("a.yaml", "max-steps: 2\n", "sets max-steps, .* Names of flags have underscores here"),
        ("a.json", "{'max_steps': 2}", "a.json cannot be read: Expecting property name"),
        ("a.json", '{"max_steps": 2, "max_steps": 3}', "a.json cannot be read: max_steps is in it twice"),
        ("a.yaml", "\udcff", "a.yaml cannot be read: 'utf-8' codec"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        parse(str(tmp_path / name), "--output_dir", "x")


def test_a_recipe_may_merge_what_is_said_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("<<: {seed: 7, max_steps: 3}\nmax_steps: 4\n")
    training = parse(str(recipe), "--output_dir", "x")[1]
    assert (training.seed, training.max_steps) == (7, 4)


def test_missing_recipe_and_missing_output_dir_are_named():
    with pytest.raises(ValueError, match="no recipe file absent.yaml"):
        parse("absent.yaml", "--output_dir", "x")
    with pytest.raises(ValueError, match="--output_dir"):
        parse("--seed", "1")


def test_tensorboard_is_the_default_and_can_be_replaced():
    assert parse("--output_dir", "x")[1].report_to == ["tensorboard"]
    assert parse("--output_dir", "x", "--report_to", "none")[1].report_to == []


def test_non_finite_losses_are_not_hidden():
    assert not parse("--output_dir", "x")[1].logging_nan_inf_filter


def test_checkpoint_and_configuration_exclude_each_other():
    with pytest.raises(ValueError, match="--config_name"):
        parse("--output_dir", "x", "--model_name_or_path", "a", "--config_name", "b")


def test_what_a_command_reads_on_this_disk_is_known_recipe_and_teacher_included(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "tokenizer", "one", "two", "glue", "teacher"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text("tokenizer_name: tokenizer\n")
    argv = ["recipe.yaml", "--model_name_or_path", "model", "--output_dir", "out"]
    mlm = parse(*argv, "--train_file", "one", "two", dataclasses=(ModelArguments, DataArguments, TrainingArguments))
    assert set(local_inputs(argv, *mlm)) == {Path(name) for name in ("recipe.yaml", "model", "tokenizer", "one", "two")}
    argv[2] = "someone/model"
    more = ["--task_name", "rte", "--data_dir", "glue", "--teacher_name_or_path", "teacher"]
    kinds = (ModelArguments, GlueArguments, DistillationArguments, TrainingArguments)
    glue = parse(*argv, *more, dataclasses=kinds)
    assert set(local_inputs(argv, *glue)) == {Path(name) for name in ("recipe.yaml", "tokenizer", "glue", "teacher")}
