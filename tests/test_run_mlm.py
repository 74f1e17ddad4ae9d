import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    Trainer,
    TrainingArguments,
)

import run_clm
import run_mlm
from configuration_spikelm import SpikeLMConfig
from experiment import training_run
from experiment.publishing import Publisher
from modeling_spikelm import SpikeLMForMaskedLM
from pretraining_data.arguments import DataArguments
from pretraining_data.masking import most_labels
from pretraining_data.preparation import mask
from spike_metrics.counting import count
from spike_metrics.evaluation import spike_figures
from tests.carried_code import CODE
from tests.corpus import TINY, write_corpus
from tests.forked_processes import launch_forked
from tests.hub_server import HubServer, check_card, run_client

ROOT = Path(__file__).parent.parent
SHORT = [
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--max_steps", "4", "--save_steps", "2"),
    *(
        "--max_seq_length",
        "64",
        "--max_eval_samples",
        "16",
        "--use_cpu",
        "--report_to",
        "none",
        "--disable_tqdm",
        "True",
    ),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


def from_scratch(corpus, *more) -> list[str]:
    return ["--train_file", str(corpus), "--vocab_size", "600", "--config_overrides", TINY, *SHORT, *more]


def results(folder) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """The output folder of one short run, shared by the tests that only look at it or start from it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run_mlm.main(from_scratch(corpus, "--output_dir", str(folder)))
    return folder


def test_a_run_reports_loss_perplexity_accuracy_and_the_unigram_baseline(trained):
    reported = results(trained)
    assert reported["eval_perplexity"] == pytest.approx(torch.tensor(reported["eval_mlm_loss"]).exp().item(), rel=1e-4)
    assert reported["eval_loss"] == reported["eval_mlm_loss"]
    assert 0 <= reported["eval_masked_accuracy"] <= 1
    assert 4 < reported["eval_unigram_loss"] < 6.4


@pytest.mark.parametrize("checkpoint", ["", "checkpoint-2", "checkpoint-4"])
def test_every_checkpoint_has_code_weights_tokenizer_and_a_card(trained, checkpoint):
    names = {path.name for path in (trained / checkpoint).iterdir()}
    assert names >= CODE.keys() | {"model.safetensors", "config.json"}
    assert names >= {"tokenizer.json", "README.md"}
    assert not [name for name in names if name.endswith(".bin") and name != "training_args.bin"]
    card = ModelCard.load(trained / checkpoint / "README.md")
    assert (card.data.pipeline_tag, card.data.license) == ("fill-mask", "apache-2.0")
    assert "trust_remote_code=True" in card.text
    assert "{{" not in card.content
    model = AutoModelForMaskedLM.from_pretrained(trained / checkpoint)
    assert all(m.amplitude.all() for m in model.modules() if hasattr(m, "amplitude"))


def test_the_final_card_shows_the_runs_numbers(trained):
    card = ModelCard.load(trained / "README.md")
    shown = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert shown["mlm_loss"] == pytest.approx(results(trained)["eval_mlm_loss"], abs=1e-3)
    assert f"{results(trained)['eval_mlm_loss']:.4f}" in card.text


def test_firing_rate_and_energy_stand_beside_the_scores_and_are_those_of_the_saved_model(trained, tmp_path):
    rows = [{"input_ids": [2, 10 + n, 4, 30 + n, 3], "labels": [-100, -100, 30, -100, -100]} for n in range(40)]
    splits = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:20])}
    DatasetDict(splits).save_to_disk(tmp_path / "static")
    command = ["--dataset_name", str(tmp_path / "static"), *SHORT, "--model_name_or_path", str(trained)]
    command += ["--max_eval_samples", "20", "--per_device_eval_batch_size", "6", "--spike_batches", "2"]
    run_mlm.main([*command, "--output_dir", str(tmp_path / "run")])
    saved_model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    counted = spike_figures(count(saved_model, [{"input_ids": torch.tensor([row["input_ids"] for row in rows[:12]])}]))
    assert counted["counted_sequences"] == 12 and 0 < counted["firing_rate"] < 1
    for file in ("all_results.json", "eval_results.json"):
        reported = json.loads((tmp_path / "run" / file).read_text())
        assert {name: reported[f"eval_{name}"] for name in counted} == pytest.approx(counted, rel=1e-9)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| firing rate | {counted['firing_rate']:.1%} |" in card
    assert f"| dense / this, with pooler and heads | {counted['model_energy_ratio']:.2f} |" in card
    assert "4.6 pJ" in card


def test_firing_rates_are_logged_while_training_and_change_nothing(trained, corpus, tmp_path):
    for name, more in (("counted", []), ("plain", ["--spike_batches", "0"])):
        run_mlm.main(from_scratch(corpus, "--logging_steps", "1", *more, "--output_dir", str(tmp_path / name)))
        assert_same_weights(tmp_path / name, trained)
    rates = [[e.get("firing_rate") for e in history(tmp_path / name) if "loss" in e] for name in ("counted", "plain")]
    assert len(rates[0]) == 4 and all(0 < rate < 1 for rate in rates[0])
    assert rates[1] == [None] * 4
    assert not [name for name in results(tmp_path / "plain") if "energy" in name or "firing" in name]


@pytest.mark.parametrize(("model_type", "gets_positions"), [("spikelm", True), ("bert", False)])
def test_only_a_model_that_takes_positions_is_given_them_and_only_to_train(
    model_type, gets_positions, corpus, tmp_path, monkeypatch
):
    given = {True: set(), False: set()}
    shapes = {True: set(), False: set()}

    def load_model(*arguments):
        model = experiment_load_model(*arguments)
        model.register_forward_pre_hook(lambda m, _, inputs: given[m.training].update(inputs), with_kwargs=True)
        model.register_forward_hook(lambda m, _, outputs: shapes[m.training].add(outputs.logits.ndim))
        return model

    experiment_load_model = run_mlm.load_model
    monkeypatch.setattr(run_mlm, "load_model", load_model)
    sizes = TINY.removesuffix(",num_time_steps=2")
    more = ["--model_type", model_type, "--config_overrides", sizes, "--spike_batches", "0", "--max_steps", "1"]
    run_mlm.main(from_scratch(corpus, *more, "--output_dir", str(tmp_path)))
    assert ("masked_lm_positions" in given[True], "masked_lm_positions" in given[False]) == (gets_positions, False)
    # (labels, V) while this script trains, (B, L, V) for whoever loads what it has trained.
    assert shapes == {True: {2 if gets_positions else 3}, False: {3}}
    assert not json.loads((tmp_path / "config.json").read_text()).get("sparse_prediction")


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_a_compiled_run_trains_in_a_single_graph_and_learns_what_an_eager_one_does(
    objective, trained, corpus, tmp_path
):
    dropouts = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    command = ["--train_file", str(corpus), *SHORT, "--model_name_or_path", str(trained), "--objective", objective]
    command += ["--config_overrides", dropouts, "--spike_batches", "0", "--pad_to_multiple_of", "64"]
    run_mlm.main([*command, "--output_dir", str(tmp_path / "eager")])
    torch.compiler.reset()
    counters.clear()
    with mock.patch.dict(os.environ):  # where TrainingArguments leaves what it has been told of compiling
        # Inductor would take its time to write C++ for the same graphs.
        compiled = ["--torch_compile", "--torch_compile_backend", "aot_eager"]
        run_mlm.main([*command, *compiled, "--output_dir", str(tmp_path / "compiled")])
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    losses = [results(tmp_path / name)["eval_mlm_loss"] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["map", "stream"])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line_and_is_not_resumed(corpus, tmp_path, more):
    command = from_scratch(corpus, "--validation_split_percentage", "20", *more, "--output_dir", str(tmp_path))
    command += [
        "--learning_rate",
        "1e30",
        "--save_steps",
        "1",
        "--max_grad_norm",
        "0",
        "--lr_scheduler_type",
        "constant",
    ]
    with pytest.raises(SystemExit, match=r"^error: The training stopped in step 2, .* Training rows: \d+, \d+, \d+"):
        run_mlm.main(command)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "written_files.json", "checkpoint-1", "not-finite-step-2"}
    with pytest.raises(SystemExit, match="The training stopped in step 2"):
        run_mlm.main(command)


def test_a_model_that_cannot_be_counted_trains_without_figures(corpus, tmp_path):
    sizes = "dim=32,n_layers=1,n_heads=2,hidden_dim=64"
    more = ["--model_type", "distilbert", "--config_overrides", sizes, "--output_dir", str(tmp_path)]
    run_mlm.main(from_scratch(corpus, *more))
    assert results(tmp_path)["eval_mlm_loss"] > 0
    assert not [name for name in results(tmp_path) if "energy" in name]
    assert "energy of the encoder" not in (tmp_path / "README.md").read_text()


def assert_same_weights(folder: Path, expected: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, value in load_file(expected / "model.safetensors").items():
        assert torch.equal(weights[name], value), name


def interrupted(command: list[str], owner: type, method: str, when=lambda *args: True, script=run_mlm) -> None:
    """Runs a script until it calls the method for the first time `when` that is so, and does what it says."""
    original = getattr(owner, method)

    def interrupt(*args, **kwargs):
        original(*args, **kwargs)
        if when(*args):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_run, "try_first_step", lambda *args, **kwargs: None)  # it evaluates as well
        patch.setattr(owner, method, interrupt)
        script.main(command)


@pytest.mark.parametrize("step", [2, 4])
def test_the_same_command_resumes_to_the_same_weights(trained, corpus, tmp_path, step):
    """Continued from a checkpoint, the last one included, the run ends as the one that was never interrupted."""
    command = from_scratch(corpus, "--output_dir", str(tmp_path))
    interrupted(command, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == step)
    assert not (tmp_path / "model.safetensors").exists()
    run_mlm.main(command)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert_same_weights(tmp_path, trained)
    assert_same_weights(tmp_path / "checkpoint-4", trained)
    assert results(tmp_path)["eval_mlm_loss"] == results(trained)["eval_mlm_loss"]


@pytest.mark.parametrize("more", [[], ["--save_strategy", "no"]], ids=["checkpoints", "no-checkpoints"])
def test_a_finished_command_again_says_so_and_writes_nothing(corpus, tmp_path, capsys, more):
    command = from_scratch(corpus, *more, "--output_dir", str(tmp_path))
    run_mlm.main(command)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    run_mlm.main(command)
    said = capsys.readouterr().out
    assert f"This run is finished; its results are in {tmp_path / 'all_results.json'}." in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    run_mlm.main([*command, "--overwrite_output_dir"])
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns > before[tmp_path / "model.safetensors"]


@pytest.mark.parametrize("stage", [(Trainer, "evaluate"), (Publisher, "publish")], ids=["evaluation", "push"])
def test_what_was_cut_off_after_the_training_is_done_without_training_again(
    trained, corpus, tmp_path, monkeypatch, stage
):
    command = from_scratch(corpus, "--save_strategy", "no", "--output_dir", str(tmp_path))
    interrupted(command, *stage)
    weights_written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "README.md").unlink(missing_ok=True)
    monkeypatch.setattr(Trainer, "train", None)
    run_mlm.main(command)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == weights_written
    assert_same_weights(tmp_path, trained)
    assert results(tmp_path)["eval_mlm_loss"] == results(trained)["eval_mlm_loss"]
    assert "train_loss" in results(tmp_path)
    assert "| steps | 4 |" in (tmp_path / "README.md").read_text()


PUSH_DATA_AND_RUN = """
from pathlib import Path
from datasets import Dataset
import run_mlm
Dataset.from_dict({{"text": {!r}}}).push_to_hub("tester/docs", "en")
for command in {!r}:
    run_mlm.main(command)
    print("results of", Path(command[command.index("--output_dir") + 1], "train_results.json").stat().st_mtime_ns)
"""


def test_a_finished_run_on_hub_data_is_pushed_when_that_is_asked_for_and_only_once(tmp_path):
    documents = write_corpus(tmp_path / "topics.txt").read_text().split("\n\n")
    data = ["--dataset_name", "tester/docs", "--dataset_config_name", "en", "--vocab_size", "600"]
    command = [*data, "--config_overrides", TINY, *SHORT, "--output_dir", str(tmp_path / "run")]
    late = ["--push_to_hub", "--hub_model_id", "tester/late"]
    commands = [[*command, *more] for more in ([], late, late, [])]
    with HubServer() as hub:
        done = run_client(hub, tmp_path, PUSH_DATA_AND_RUN.format(documents, commands), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-3000:]
        initial, pushed = hub.commits("tester/late")
    *runs, rest = re.split(r"^results of (\d+)\n", done.stdout, flags=re.MULTILINE)
    said, trained_at = runs[::2], runs[1::2]
    assert ["This run is finished" in text for text in said] == [False, False, True, True]
    assert len(trained_at) == 4 and len(set(trained_at)) == 1
    assert "model.safetensors" in pushed.files
    card = pushed.files["README.md"].decode()
    assert check_card(card) == ([], [])
    results_from = {(r.dataset_type, r.dataset_config, r.dataset_split) for r in ModelCard(card).data.eval_results}
    assert results_from == {("tester/docs", "en", "train")}


def test_a_size_for_a_tokenizer_that_is_there_already_is_said_to_be_unused(trained, corpus, tmp_path, caplog):
    command = ["--train_file", str(corpus), *SHORT, "--prepare_only", "--vocab_size", "700"]
    run_mlm.main([*command, "--output_dir", str(tmp_path / "new")])
    assert "is not used" not in caplog.text
    run_mlm.main([*command, "--output_dir", str(tmp_path / "old"), "--tokenizer_name", str(trained)])
    assert "--vocab_size 700 is not used" in caplog.text
    assert "--lowercase" not in caplog.text


def test_a_model_is_evaluated_alone_on_a_validation_file(trained, tmp_path):
    validation = write_corpus(tmp_path / "validation.txt", count=4, first=40)
    command = ["--do_eval", "--validation_file", str(validation), *SHORT, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="no training data to make a tokenizer of"):
        run_mlm.main(command)
    run_mlm.main([*command, "--model_name_or_path", str(trained)])
    reported = results(tmp_path / "run")
    assert 0 < reported["eval_mlm_loss"] < 10
    assert "eval_unigram_loss" not in reported
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "all_results.json",
        "eval_results.json",
        "run.json",
        "written_files.json",
    ]


def copy_tree(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--learning_rate", "2e-3"], "learning_rate was 0.001 and is 0.002"),
        (["--mlm_probability", "0.2"], "mlm_probability was 0.15 and is 0.2"),
        (["--max_train_samples", "8"], "the data has changed"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_naming_the_difference(trained, corpus, change, named):
    before = snapshot(trained)
    with pytest.raises(SystemExit, match=re.escape(named)):
        run_mlm.main(from_scratch(corpus, "--output_dir", str(trained), *change))
    assert snapshot(trained) == before


def test_overwrite_starts_anew_and_resume_from_checkpoint_goes_on_anyway(corpus, tmp_path):
    folder = tmp_path / "run"
    run_mlm.main(from_scratch(corpus, "--output_dir", str(folder)))
    changed = from_scratch(corpus, "--output_dir", str(folder), "--learning_rate", "2e-3", "--logging_steps", "1")
    run_mlm.main([*changed, "--resume_from_checkpoint", str(folder / "checkpoint-2")])
    # The checkpoint's own log has no step in it.
    assert [entry["step"] for entry in history(folder) if "loss" in entry] == [3, 4]
    run_mlm.main([*changed, "--overwrite_output_dir", "--max_steps", "2"])
    assert [entry["step"] for entry in history(folder) if "loss" in entry] == [1, 2]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("start", ["", "checkpoint-4"], ids=["model", "checkpoint"])
def test_training_in_the_folder_of_its_own_model_is_refused_and_no_flag_recommended(trained, corpus, start, flags):
    """A run's folder, and the folder of a model that no run wrote."""
    before = snapshot(trained)
    command = ["--train_file", str(corpus), *SHORT, "--model_name_or_path", str(trained / start), *flags]
    with pytest.raises(SystemExit, match=f"his command reads {trained / start}[, ]") as refused:
        run_mlm.main([*command, "--output_dir", str(trained)])
    assert "--overwrite_output_dir" not in str(refused.value)
    assert snapshot(trained) == before


@pytest.mark.parametrize("model_type", ["bart", "spikelm_bart"])
def test_a_model_that_writes_is_not_trained_to_fill_masks(model_type, corpus, tmp_path):
    sizes = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2"
    start = ["--model_type", model_type, "--config_overrides", f"{sizes},encoder_ffn_dim=16,decoder_ffn_dim=16"]
    with pytest.raises(SystemExit, match="run_summarization.py trains it"):
        run_mlm.main([*start, "--train_file", str(corpus), "--vocab_size", "200", "--output_dir", str(tmp_path)])


def test_a_folder_that_is_no_run_is_refused_before_a_text_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty: it holds notes.txt"):
        run_mlm.main(["--train_file", "nowhere.txt", "--output_dir", str(tmp_path)])


def test_a_folder_that_is_no_run_is_refused_even_if_it_may_be_overwritten(trained, corpus, tmp_path):
    project = tmp_path / "project"
    # A model that was downloaded, say.
    shutil.copytree(trained, project, ignore=shutil.ignore_patterns("written_files.json", "run.json"))
    before = snapshot(project)
    command = ["--train_file", str(corpus), *SHORT, "--model_name_or_path", str(project), "--overwrite_output_dir"]
    with pytest.raises(SystemExit, match="is not empty: it holds .* Choose another --output_dir"):
        run_mlm.main([*command, "--output_dir", str(project)])
    assert snapshot(project) == before


def test_overwriting_keeps_the_old_model_until_the_new_run_has_a_checkpoint(trained, corpus, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    users = {"notes.txt": "mine", "checkpoint-4/scores.json": "mine", "model_v1.safetensors": "mine"}
    users["README.md"] = "my words instead of the run's"
    for name, text in users.items():
        (folder / name).write_text(text)
    command = from_scratch(corpus, "--seed", "7", "--overwrite_output_dir", "--output_dir", str(folder))
    step = Trainer.training_step

    def killed(trainer, *args, **named):
        if trainer.args.output_dir == str(folder):  # and not while a step is tried
            raise KeyboardInterrupt
        return step(trainer, *args, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", killed)
        run_mlm.main(command)
    assert_same_weights(folder / "replaced-1", trained)
    assert AutoModelForMaskedLM.from_pretrained(folder / "replaced-1").config.model_type == "spikelm"
    run_mlm.main(command[:-3] + command[-2:])
    assert (folder / "model.safetensors").read_bytes() != (trained / "model.safetensors").read_bytes()
    left = snapshot(folder)
    assert all(left.pop(str(folder / name)) == b"mine" for name in ("notes.txt", "model_v1.safetensors"))
    assert left[str(folder / "kept-README.md")].decode() == users["README.md"]
    replaced = {name: text for name, text in left.items() if "replaced-" in name}
    assert replaced == {str(folder / "replaced-1" / "checkpoint-4" / "scores.json"): b"mine"}


def test_an_output_folder_within_the_folder_of_texts_is_not_read_as_text(corpus, tmp_path):
    shutil.copy(corpus, tmp_path / "topics.txt")
    command = from_scratch(tmp_path, "--output_dir", str(tmp_path / "run"))
    interrupted(command, Trainer, "evaluate")
    run_mlm.main(command)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["is_finished"]
    # Nor are the results of one run texts for the next.
    run_mlm.main([*command, "--output_dir", str(tmp_path / "another")])
    fingerprints = [
        json.loads((tmp_path / name / "run.json").read_text())["data_fingerprint"] for name in ("run", "another")
    ]
    assert fingerprints[0] == fingerprints[1]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepared_corpus_trains_to_the_same_weights_as_the_text_it_was_made_of(trained, corpus, tmp_path):
    prepared = tmp_path / "prepared"
    run_mlm.main(
        from_scratch(corpus, "--prepare_only", "--preprocessing_num_workers", "2", "--output_dir", str(prepared))
    )
    assert set(load_from_disk(prepared)) == {"train", "validation"}
    command = [
        "--dataset_name",
        str(prepared),
        "--config_overrides",
        TINY,
        *SHORT,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    run_mlm.main(command)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in load_file(trained / "model.safetensors").items():
        assert torch.equal(weights[name], value), name
    other = [*command[:-1], str(tmp_path / "other")]
    with pytest.raises(SystemExit, match=r"in rows of \d+ tokens, and --max_seq_length is 77; give --max_seq_length"):
        run_mlm.main([*other, "--max_seq_length", "77"])
    with pytest.raises(SystemExit, match="tokenised already, and stay as they are; leave out --one_document_per_row"):
        run_mlm.main([*other, "--one_document_per_row"])
    with pytest.raises(SystemExit, match="was prepared for an encoder, with other tokens at the ends of its rows"):
        run_clm.main([*other, "--max_seq_length", "64"])


def test_batches_of_a_stream_are_equally_wide_as_several_processes_get_them_in_one_tensor(tmp_path):
    arguments = DataArguments(train_file=["text.txt"], streaming=True, max_seq_length=9, pad_to_multiple_of=4)
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3]]}).to_iterable_dataset()
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    _, collator = mask(rows, tokenizer, {"labels", "masked_lm_positions"}, arguments, training)
    for length in (3, 9):
        batch = collator([{"input_ids": [2, *[5] * (length - 2), 3], "example_id": 0}])
        assert batch["input_ids"].shape == (1, 12)
        assert batch["masked_lm_positions"].shape == (1, most_labels(12, 0.15))


def test_a_stream_trains(corpus, tmp_path):
    run_mlm.main(
        from_scratch(corpus, "--streaming", "--output_dir", str(tmp_path), "--validation_split_percentage", "20")
    )
    assert results(tmp_path)["eval_mlm_loss"] > 0
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()


@pytest.mark.parametrize("step", [2, 8], ids=["first-pass", "second-pass"])
def test_a_stream_is_resumed_where_it_was(corpus, tmp_path, step):
    """Rows are read again in another order and with other masks, so any other place would give other weights."""
    shared = [*from_scratch(corpus, "--streaming"), "--max_train_samples", "20", "--max_steps", "12"]
    shared += ["--validation_split_percentage", "20", "--gradient_accumulation_steps", "1"]
    run_mlm.main([*shared, "--output_dir", str(tmp_path / "whole")])
    command = [*shared, "--output_dir", str(tmp_path / "resumed")]
    interrupted(command, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == step)
    run_mlm.main(command)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_dense_bert_trains_through_the_same_script(corpus, tmp_path):
    overrides = TINY.rpartition(",")[0]
    run_mlm.main(
        [*from_scratch(corpus, "--model_type", "bert", "--output_dir", str(tmp_path)), "--config_overrides", overrides]
    )
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is BertForMaskedLM
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code" not in card
    reported = results(tmp_path)
    assert reported["eval_model_energy_ratio"] == 1
    assert reported["eval_model_energy_mj"] == reported["eval_model_dense_energy_mj"] > 0
    assert "eval_firing_rate" not in reported and "| firing rate |" not in card


def test_bert_checkpoint_is_warm_start_or_baseline_as_model_type_says(trained, corpus, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_act="gelu_new",
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    command = ["--train_file", str(corpus), *SHORT, "--model_name_or_path", str(tmp_path / "bert")]
    run_mlm.main([*command, "--output_dir", str(tmp_path / "dense")])
    assert "Calibrated" not in caplog.text
    run_mlm.main([*command, "--output_dir", str(tmp_path / "spiking"), "--model_type", "spikelm"])
    assert caplog.text.count("Calibrated the spike amplitudes on 128 training rows") == 1
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")) is BertForMaskedLM
    spiking = AutoModelForMaskedLM.from_pretrained(tmp_path / "spiking")
    assert type(spiking) is SpikeLMForMaskedLM
    assert spiking.config.mlm_transform_act == "gelu_new"
    moved = (spiking.bert.embeddings.word_embeddings.weight - bert.bert.embeddings.word_embeddings.weight).abs().max()
    assert 0 < moved < 0.02


def test_another_neuron_is_one_field_away_and_named_on_the_card(corpus, tmp_path):
    command = from_scratch(corpus, "--config_overrides", f"{TINY},neuron=lif", "--output_dir", str(tmp_path))
    run_mlm.main(command)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert model.config.neuron == "lif"
    assert all(group.amplitude.tolist() == [1, 1] for group in model.modules() if hasattr(group, "amplitude"))
    assert results(tmp_path)["eval_firing_rate"] > 0
    card = ModelCard.load(tmp_path / "README.md").text
    assert "the spikes of lif neurons" in card and "| neuron | lif |" in card
    assert "amplitude" not in card


@pytest.fixture(scope="module")
def trained_on_pairs(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    run_mlm.main(from_scratch(corpus, "--objective", "mlm_nsp", "--output_dir", str(folder)))
    return folder


def test_next_sentence_objective_trains_the_pre_training_model(trained_on_pairs):
    assert type(AutoModelForPreTraining.from_pretrained(trained_on_pairs)).__name__ == "SpikeLMForPreTraining"
    assert 0 <= results(trained_on_pairs)["eval_next_sentence_accuracy"] <= 1
    assert results(trained_on_pairs)["eval_loss"] > results(trained_on_pairs)["eval_mlm_loss"]
    assert AutoModelForMaskedLM.from_pretrained(trained_on_pairs).config.architectures == ["SpikeLMForPreTraining"]


def test_the_evaluation_loss_is_the_mean_over_the_data_whatever_its_batches(corpus, trained_on_pairs, tmp_path):
    evaluate = ["--model_name_or_path", str(trained_on_pairs), "--validation_file", str(corpus), "--do_eval", *SHORT]
    evaluate += ["--objective", "mlm_nsp", "--spike_batches", "0"]
    losses = {}
    for size in ("16", "3"):  # all in one batch; and a single row left over
        run_mlm.main([*evaluate, "--per_device_eval_batch_size", size, "--output_dir", str(tmp_path / size)])
        losses[size] = results(tmp_path / size)["eval_loss"]
    assert losses["3"] == pytest.approx(losses["16"], rel=1e-6)


def test_a_checkpoint_of_16_bits_is_trained_and_saved_in_float32(corpus, trained, tmp_path):
    AutoModelForMaskedLM.from_pretrained(trained).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "half")
    command = ["--model_name_or_path", str(tmp_path / "half"), "--train_file", str(corpus), *SHORT]
    command += ["--learning_rate", "1e-5", "--spike_batches", "0", "--output_dir", str(tmp_path / "run")]
    run_mlm.main(command)
    before = load_file(tmp_path / "half" / "model.safetensors")
    moved = []
    for folder in ("checkpoint-2", ""):
        after = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert {value.dtype for value in after.values()} == {torch.float32}
        assert json.loads((tmp_path / "run" / folder / "config.json").read_text())["dtype"] == "float32"
        weights = [name for name in after if name.endswith("dense.weight")]
        moved.append(torch.cat([(after[name] != before[name].float()).flatten() for name in weights]).float().mean())
    # Nearly every weight takes part; bfloat16 would leave most of them where they were.
    assert min(moved) > 0.95
    # Evaluated alone, once more in float32: nothing of the weights is rounded.
    evaluation = ["--do_eval", "--validation_file", str(corpus), *SHORT, "--spike_batches", "0"]
    losses = []
    for folder in ("half", "whole"):
        if folder == "whole":
            AutoModelForMaskedLM.from_pretrained(tmp_path / "half").float().save_pretrained(tmp_path / "whole")
            AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "whole")
        output = tmp_path / f"evaluated-{folder}"
        run_mlm.main([*evaluation, "--model_name_or_path", str(tmp_path / folder), "--output_dir", str(output)])
        losses.append(results(output)["eval_loss"])
    assert losses[0] == losses[1]


def test_an_int8_model_is_not_evaluated_in_16_bits(corpus, trained, tmp_path):
    AutoModelForMaskedLM.from_pretrained(trained).quantize_weights().save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "int8")
    command = ["--model_name_or_path", str(tmp_path / "int8"), "--validation_file", str(corpus), "--do_eval", *SHORT]
    with pytest.raises(SystemExit, match="int8 weights computes in float32 whatever .* leave out --bf16_full_eval"):
        run_mlm.main([*command, "--bf16_full_eval", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_evaluation_leaves_nothing_beside_its_output_folder(corpus, trained, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command = ["--model_name_or_path", str(trained), "--validation_file", str(corpus), "--do_eval", *SHORT]
    run_mlm.main([*command, "--report_to", "tensorboard", "--output_dir", str(tmp_path / "run")])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert list((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))


LONG = f"{TINY},max_position_embeddings=1024"


@pytest.mark.parametrize("tokenizer", ["trained", "named", "prepared"])
def test_the_saved_tokenizer_takes_what_the_model_takes(tokenizer, corpus, trained, tmp_path):
    """Nothing of a text is cut off without a word, and fine-tuning takes what pre-training took."""
    command = [*from_scratch(corpus), "--config_overrides", LONG, "--max_seq_length", "600", "--max_steps", "1"]
    if tokenizer == "named":
        assert AutoTokenizer.from_pretrained(trained).model_max_length == 512
        command += ["--tokenizer_name", str(trained)]
    if tokenizer == "prepared":
        run_mlm.main([*command, "--prepare_only", "--output_dir", str(tmp_path / "packed")])
        command[:2] = ["--dataset_name", str(tmp_path / "packed")]
    run_mlm.main([*command, "--spike_batches", "0", "--output_dir", str(tmp_path / "run")])
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    text = "word " * 1100
    tokens = saved(text, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 1024)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run")(**tokens).logits.isfinite().all()


def test_a_model_that_keeps_positions_for_itself_gets_a_tokenizer_that_leaves_them(corpus, tmp_path):
    """RoBERTa's first position is the second after its padding token's."""
    sizes = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=65"
    command = [*from_scratch(corpus), "--model_type", "roberta", "--config_overrides", sizes, "--max_steps", "1"]
    run_mlm.main([*command, "--spike_batches", "0", "--output_dir", str(tmp_path)])
    tokens = AutoTokenizer.from_pretrained(tmp_path)("word " * 70, truncation=True, return_tensors="pt")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path)(**tokens).logits.isfinite().all()


def test_rows_with_labels_are_used_as_they_are(trained, tmp_path, monkeypatch):
    rows = [{"input_ids": [2, 10 + n, 4, 3], "labels": [-100, -100, 30 + n, -100]} for n in range(40)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "static")
    seen = []
    forward = SpikeLMForMaskedLM.forward

    @functools.wraps(forward)
    def watched(self, *args, **inputs):
        seen.append(inputs)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(SpikeLMForMaskedLM, "forward", watched)
    run_mlm.main(
        [
            "--dataset_name",
            str(tmp_path / "static"),
            *SHORT,
            "--model_name_or_path",
            str(trained),
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    assert seen
    for batch in seen:
        for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert {"input_ids": tokens, "labels": labels} in rows


def on_two_processes(arguments: list[str], may_fail: bool = False) -> subprocess.CompletedProcess:
    done = launch_forked("two_cpu_processes", ["run_mlm.py", *arguments])
    assert may_fail or done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_loss_that_is_not_finite_ends_every_process_and_is_said_once(corpus, tmp_path):
    unstable = "--learning_rate 1e30 --max_grad_norm 0 --lr_scheduler_type constant --save_steps 1".split()
    command = from_scratch(corpus, *unstable, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path))
    # A process that goes on alone would wait for the other one for half an hour.
    done = on_two_processes(command, may_fail=True)
    assert done.returncode != 0
    assert done.stderr.count("error: The training stopped in step 2") == 1, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "written_files.json",
        "checkpoint-1",
        "not-finite-step-2",
    }


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["map", "stream"])
def test_two_processes_train_what_one_trains_and_then_have_nothing_left_to_do(corpus, tmp_path, more):
    overrides = f"{TINY},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    shared = from_scratch(corpus, "--max_grad_norm", "0", "--validation_split_percentage", "20", *more)
    shared[shared.index("--config_overrides") + 1] = overrides
    run_mlm.main([*shared, "--output_dir", str(tmp_path / "one")])
    two = [*shared, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    on_two_processes(two)
    one, other = load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-5, msg=name)
    for loss in ("eval_loss", "eval_mlm_loss"):
        assert results(tmp_path / "two")[loss] == pytest.approx(results(tmp_path / "one")[loss], rel=1e-5), loss
    # Every process counts the same rows, so the figures are those of one process.
    counted = [results(tmp_path / name)["eval_counted_sequences"] for name in ("one", "two")]
    assert counted[0] == counted[1] > 0
    assert results(tmp_path / "two")["eval_firing_rate"] == pytest.approx(
        results(tmp_path / "one")["eval_firing_rate"], rel=1e-3
    )
    assert on_two_processes(two).stdout.count("This run is finished") == 1


def test_two_processes_prepare_what_one_prepares(corpus, tmp_path):
    command = from_scratch(corpus, "--prepare_only", "--output_dir")
    run_mlm.main([*command, str(tmp_path / "one")])
    on_two_processes([*command, str(tmp_path / "two")])
    one, two = (load_from_disk(tmp_path / name) for name in ("one", "two"))
    assert {name: split[:] for name, split in one.items()} == {name: split[:] for name, split in two.items()}
    vocabularies = [AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer").get_vocab() for name in ("one", "two")]
    assert vocabularies[0] == vocabularies[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def broken_checkpoint(trained: Path, folder: Path, damage) -> Path:
    copy_tree(trained / "checkpoint-2", folder)
    damage(folder)
    return folder


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_amplitudes(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if "amplitude" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))


BAD_INPUT = {
    "missing file": (lambda t, c, p: ["--train_file", str(p / "absent.txt")], "absent.txt does not exist"),
    "empty file": (lambda t, c, p: ["--train_file", str(touch(p / "empty.txt"))], "empty"),
    "csv without the text column": (
        lambda t, c, p: ["--train_file", str(touch(p / "a.csv", "title,body\na,b\n"))],
        "no column 'text'; its columns are ['title', 'body']",
    ),
    "wrong split name": (
        lambda t, c, p: ["--dataset_name", saved(p / "set"), "--train_split_name", "trian"],
        "no split 'trian'; its splits are ['train']",
    ),
    "truncated weights": (
        lambda t, c, p: ["--train_file", str(c), "--model_name_or_path", str(broken_checkpoint(t, p / "x", truncate))],
        "damaged",
    ),
    "no amplitudes": (
        lambda t, c, p: [
            "--train_file",
            str(c),
            "--model_name_or_path",
            str(broken_checkpoint(t, p / "x", drop_amplitudes)),
        ],
        "without spike amplitudes",
    ),
    "another model type": (
        lambda t, c, p: [
            *("--train_file", str(c), "--model_type", "spikelm"),
            *("--model_name_or_path", str(broken_checkpoint(t, p / "x", change_type))),
        ],
        "'roberta'",
    ),
    "weights of another model type": (
        lambda t, c, p: [
            *("--train_file", str(c)),
            *("--model_name_or_path", str(broken_checkpoint(t, p / "x", change_type))),
        ],
        "not those of a model of type 'roberta'",
    ),
    "weights of another size": (
        lambda t, c, p: [
            *("--train_file", str(c), "--model_name_or_path", str(t)),
            *("--config_overrides", "intermediate_size=48"),
        ],
        "do not fit its configuration",
    ),
    "a checkpoint with amplitudes for another k": (
        lambda t, c, p: [
            *from_scratch(c, "--resume_from_checkpoint", str(t / "checkpoint-2")),
            *("--config_overrides", f"{TINY},amplitude_scale=6.0"),
        ],
        "was trained with amplitude_scale=2.0, so this command, which says amplitude_scale=6.0, cannot go on",
    ),
    "vocabulary too small": (
        lambda t, c, p: [*from_scratch(c), "--config_overrides", f"{TINY},vocab_size=100"],
        "vocab_size=100",
    ),
    "token ids outside the vocabulary": (
        lambda t, c, p: ["--dataset_name", saved(p / "set", ids=[5, 600]), "--model_name_or_path", str(t)],
        "input_ids 600, outside [0, 600)",
    ),
    "blocks too long": (
        lambda t, c, p: [*from_scratch(c), "--max_seq_length", "1024"],
        "max_position_embeddings=512",
    ),
    "padded blocks too long": (
        lambda t, c, p: [*from_scratch(c), "--max_seq_length", "510", "--pad_to_multiple_of", "100"],
        "Rows of up to 600 tokens",
    ),
    "stream without an end": (lambda t, c, p: [*from_scratch(c), "--streaming", "--max_steps", "-1"], "--max_steps"),
    "stream to be prepared": (lambda t, c, p: [*from_scratch(c), "--streaming", "--prepare_only"], "--prepare_only"),
    "unknown field": (lambda t, c, p: [*from_scratch(c), "--config_overrides", "hiden_size=3"], "hiden_size"),
    "impossible field": (
        lambda t, c, p: [*from_scratch(c), "--config_overrides", "num_time_steps=0"],
        "num_time_steps=0",
    ),
    "field that the neuron does not use": (
        lambda t, c, p: [*from_scratch(c), "--config_overrides", "neuron=lif,amplitude_scale=3"],
        "amplitude_scale=3.0 is not possible; it must be 2.0",
    ),
    "token on the command line": (lambda t, c, p: [*from_scratch(c), "--hub_token", "hf_secret"], "HF_TOKEN"),
    "unknown key in a recipe": (
        lambda t, c, p: [str(touch(p / "r.yaml", "learning_rat: 1\n")), *from_scratch(c)],
        "learning_rat",
    ),
}


def touch(path: Path, text: str = "") -> Path:
    path.write_text(text)
    return path


def saved(folder: Path, ids: list[int] | None = None) -> str:
    rows = [{"input_ids": [*ids, n]} for n in range(40)] if ids else [{"text": f"document {n}"} for n in range(40)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("exists", [True, False], ids=["into a folder", "into none"])
def test_bad_input_is_one_clear_error_and_touches_nothing(case, exists, trained, corpus, tmp_path):
    arguments, message = BAD_INPUT[case]
    output = tmp_path / "output"
    if exists:
        output.mkdir()
        (output / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run_mlm.main([*arguments(trained, corpus, tmp_path), "--output_dir", str(output)])
    # Most is looked at after the folder, which may be refused already.
    assert message in str(stopped.value) or exists and "is not empty: it holds precious.txt" in str(stopped.value)
    assert str(stopped.value).startswith("error: ")
    assert "hf_secret" not in str(stopped.value)
    assert [path.name for path in output.rglob("*")] == ["precious.txt"] if exists else not output.exists()


def test_folder_with_other_files_is_refused(corpus, tmp_path):
    touch(tmp_path / "thesis.tex", "precious")
    with pytest.raises(SystemExit, match="holds no run of this script"):
        run_mlm.main(from_scratch(corpus, "--output_dir", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_leaves_the_shell_with_one_line_and_a_code(corpus, tmp_path):
    done = subprocess.run(
        [sys.executable, "run_mlm.py", "--train_file", f"{tmp_path}/absent.txt", "--output_dir", f"{tmp_path}/x"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "absent.txt" in line] == [
        f"error: {tmp_path}/absent.txt does not exist."
    ]
    assert "Traceback" not in done.stderr


def test_a_recipe_sets_flags_and_the_command_line_overrides_them(corpus, tmp_path):
    recipe = touch(
        tmp_path / "recipe.yaml", f"train_file: ['{corpus}']\nlearning_rate: 3e-4\nmax_steps: 2\nvocab_size: 600\n"
    )
    more = SHORT[: SHORT.index("--learning_rate")] + SHORT[SHORT.index("--save_steps") :]
    run_mlm.main(
        [str(recipe), *more, "--config_overrides", TINY, "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    )
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (recorded["learning_rate"], recorded["max_steps"], recorded["vocab_size"]) == (3e-4, 3, 600)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("pretrain_*.yaml")), ids=lambda path: path.name)
def test_shipped_recipe_is_understood(recipe, tmp_path):
    from transformers import TrainingArguments

    from experiment.arguments import ModelArguments, parse_arguments
    from pretraining_data.arguments import DataArguments

    data = [] if "two_cores" not in recipe.name else ["--train_file", "x.txt"]
    _, model, arguments, training, _ = parse_arguments(
        (run_mlm.ScriptArguments, ModelArguments, DataArguments, TrainingArguments),
        [str(recipe), "--output_dir", str(tmp_path), *data],
    )
    assert training.max_steps > 0
    assert SpikeLMConfig.model_type == model.model_type
    assert arguments.max_seq_length == 128


def test_both_readings_of_the_base_recipe_are_of_wikipedia_and_bookcorpus_and_differ_in_their_schedule_only():
    nominal, effective = (
        yaml.safe_load((ROOT / "recipes" / f"pretrain_base_{reading}.yaml").read_text())
        for reading in ("nominal", "effective")
    )
    assert nominal["dataset_name"] == ["wikimedia/wikipedia", "bookcorpus/bookcorpus"]
    assert nominal["dataset_revision"][1] == "refs/convert/parquet"
    assert {name for name in nominal | effective if nominal.get(name) != effective.get(name)} == {
        "warmup_steps",
        "max_steps",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
    }


def test_tokenizer_trained_on_the_corpus_is_saved_and_used(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert isinstance(tokenizer, BertTokenizer)
    assert len(tokenizer) == AutoModelForMaskedLM.from_pretrained(trained).config.vocab_size == 600


def test_help_lists_the_flags_of_every_part():
    with pytest.raises(SystemExit) as stopped:
        run_mlm.main(["--help"])
    assert stopped.value.code == 0


def test_cards_show_no_path_of_this_machine(trained, corpus, tmp_path):
    command = ["--train_file", str(corpus), *SHORT, "--model_name_or_path", str(trained), "--output_dir"]
    run_mlm.main([*command, str(tmp_path / "next")])
    card = (tmp_path / "next" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(trained.parent) not in card
    assert "| started from | trained |" in card
    assert "`topics.txt`" in card


def test_corpus_prepared_with_another_tokenizer_is_refused(trained, corpus, tmp_path):
    other = [*from_scratch(corpus), "--vocab_size", "500", "--prepare_only", "--output_dir", str(tmp_path / "prepared")]
    run_mlm.main(other)
    command = ["--dataset_name", str(tmp_path / "prepared"), *SHORT, "--model_name_or_path", str(trained)]
    with pytest.raises(SystemExit, match="another tokenizer"):
        run_mlm.main([*command, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["spikelm", "bert"])
def test_accumulated_steps_weigh_as_much_as_one_large_step(model_type, corpus, tmp_path):
    """With a mean over the batch as its loss, a model that took N small steps for one would move N times too far."""
    overrides = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
    overrides += ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    shared = from_scratch(corpus, "--objective", "mlm_nsp", "--model_type", model_type, "--max_steps", "1")
    shared += ["--logging_steps", "1", "--config_overrides", overrides]
    norms = []
    for number, (rows, steps) in enumerate([("4", "1"), ("2", "2")]):
        sizes = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps]
        run_mlm.main([*shared, *sizes, "--output_dir", str(tmp_path / str(number))])
        norms.append(next(entry["grad_norm"] for entry in history(tmp_path / str(number)) if "grad_norm" in entry))
    assert norms[1] == pytest.approx(norms[0], rel=0.35)
