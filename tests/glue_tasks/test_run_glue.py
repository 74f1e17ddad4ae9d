import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from experiment import precision
from experiment.folder_lock import unlocking_folders
from experiment.publishing import Publisher
from experiment.run_record import RunRecord
from experiment.written_files import LIST_NAME, WrittenFiles
from glue_tasks.tasks import GLUE_AVERAGE_COLUMNS, GLUE_TASKS
from run_glue import main
from spike_metrics.counting import count
from spike_metrics.evaluation import spike_figures
from tests.clean_machine import run_on_clean_machine
from tests.forked_processes import launch_forked
from tests.hub_server import HubServer, check_card, run_client
from tests.killing import Command

ROOT = Path(__file__).resolve().parents[2]


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """A command line on the fixtures; what `more` says again wins."""
    argv = ["--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(output)]
    argv += ["--max_seq_length", "32", "--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
    return [*argv, "--learning_rate", "0.01", "--report_to", "none", *more]


def results(output: Path) -> dict:
    return json.loads((output / "glue_results.json").read_text())


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_nine_tasks_and_the_probe_end_in_one_table(write_glue, tiny_bert, tmp_path, capsys):
    output = tmp_path / "out"
    main(command(tiny_bert, write_glue(), output, "--task_name", "all", "bigram_shift", "--num_train_epochs", "1"))
    printed = capsys.readouterr().out
    assert (output / "glue_results.md").read_text() in printed
    table = results(output)
    assert set(table["columns"]) == {*GLUE_AVERAGE_COLUMNS, "WNLI", "BigramShift"}
    assert table["average"]["columns"] == list(GLUE_AVERAGE_COLUMNS)
    assert table["columns"]["MRPC"]["metric"] == "f1"
    assert set(table["columns"]["STS-B"]["metrics"]) == {"pearson", "spearmanr"}
    for name in GLUE_TASKS:
        assert (output / name / "all_results.json").is_file()
        assert (output / name / "README.md").is_file()
    submissions = {path.name: path.read_text().splitlines() for path in (output / "submission").iterdir()}
    assert set(submissions) == {f"{column}.tsv" for column in table["columns"]}
    assert all([line.split("\t")[0] for line in lines] == ["index", *"0123"] for lines in submissions.values())
    assert submissions["QNLI.tsv"][1].split("\t")[1] in ("entailment", "not_entailment")
    rte = AutoConfig.from_pretrained(output / "rte")
    assert rte.label2id == {"entailment": 0, "not_entailment": 1}
    stsb = AutoModelForSequenceClassification.from_pretrained(output / "stsb")
    assert (stsb.config.problem_type, stsb.num_labels) == ("regression", 1)


def test_a_spikelm_starts_from_its_masked_lm_and_the_kept_model_has_the_shown_score(write_glue, tiny_spikelm, tmp_path):
    output, data = tmp_path / "out", write_glue("MRPC", test=0)
    main(command(tiny_spikelm, data, output, "--task_name", "mrpc", "--num_train_epochs", "3"))
    shown = results(output)["columns"]["MRPC"]
    history = log_history(output / "mrpc")
    epochs = [entry for entry in history if "eval_accuracy" in entry]
    # The first epoch with the highest accuracy, and that epoch's F1, whichever F1 is the highest.
    best = max(epochs, key=lambda entry: entry["eval_accuracy"])
    assert (shown["epoch_shown"], shown["epochs"], shown["epochs_trained"]) == ("best", [best["epoch"]], 3)
    assert shown["metrics"]["accuracy"]["median"] == pytest.approx(100 * best["eval_accuracy"])
    assert shown["score"] == pytest.approx(100 * best["eval_f1"])
    model = AutoModelForSequenceClassification.from_pretrained(output / "mrpc").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "mrpc")
    rows = [line.split("\t") for line in (data / "MRPC" / "dev.tsv").read_text("utf-8-sig").splitlines()[1:]]
    inputs = tokenizer([row[3] for row in rows], [row[4] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        correct = model(**inputs).logits.argmax(-1) == torch.tensor([int(row[0]) for row in rows])
    assert 100 * correct.float().mean().item() == pytest.approx(shown["metrics"]["accuracy"]["median"])
    counted = spike_figures(count(model, [dict(inputs)]))
    assert {name: values["median"] for name, values in shown["spikes"].items()} == pytest.approx(counted, rel=1e-9)
    row = (output / "glue_results.md").read_text().splitlines()[2]
    assert f"** | {counted['firing_rate']:.1%} | {counted['model_energy_mj']:.3g} | " in row
    reported = json.loads((output / "mrpc" / "all_results.json").read_text())
    assert reported["eval_firing_rate"] == shown["spikes"]["firing_rate"]["median"]
    card = (output / "mrpc" / "README.md").read_text()
    assert f"| MRPC: firing rate | {counted['firing_rate']:.1%} |" in card
    assert "language: en\n" in card


def test_amplitudes_calibrated_in_pretraining_stay_as_they_are(write_glue, tiny_spikelm, tmp_path):
    main(command(tiny_spikelm, write_glue("RTE", test=0), tmp_path / "out", "--task_name", "rte"))
    before = load_file(tiny_spikelm / "model.safetensors")
    after = load_file(tmp_path / "out" / "rte" / "model.safetensors")
    names = [name for name in before if name.endswith("amplitude")]
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    changed = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[changed], after[changed])


def test_another_k_is_calibrated_before_the_first_step_whatever_the_batches_of_the_training(
    write_glue, tiny_spikelm, tmp_path
):
    data, found = write_glue("RTE", test=0), {}
    for batch_size, more in (("4", []), ("2", []), ("4", ["--calibration_batches", "0"])):
        output = tmp_path / "-".join([batch_size, *more])
        argv = command(tiny_spikelm, data, output, "--task_name", "rte", "--num_train_epochs", "1", *more)
        argv += ["--per_device_train_batch_size", batch_size, "--config_overrides", "amplitude_scale=6.0"]
        main(argv)
        assert AutoConfig.from_pretrained(output / "rte").amplitude_scale == 6.0
        saved = load_file(output / "rte" / "model.safetensors")
        found[output.name] = torch.stack([value for name, value in saved.items() if name.endswith("amplitude")])
    first, second, by_training = found.values()
    assert torch.equal(first, second) and first.all()
    assert by_training.all() and not torch.equal(first, by_training)


def test_of_several_epochs_the_highest_score_is_kept(write_glue, tiny_bert, tmp_path):
    output, data = tmp_path / "out", write_glue("SST-2", test=0)
    rows = [f"row of {word}\t{label}" for label, word in enumerate(("train", "test"))]
    for split in ("train", "dev"):
        (data / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows * 8, ""]))
    main(command(tiny_bert, data, output, "--task_name", "sst2", "--num_train_epochs", "8"))
    scores = [entry["eval_accuracy"] for entry in log_history(output / "sst2") if "eval_accuracy" in entry]
    assert scores[0] < max(scores), "the example has to be learnt, but not in one epoch"
    shown = results(output)["columns"]["SST-2"]
    assert shown["score"] == pytest.approx(100 * max(scores))
    assert shown["epochs"] == [1 + scores.index(max(scores))]


def test_mnli_shows_matched_from_the_best_and_mismatched_from_the_last_epoch(write_glue, tiny_bert, tmp_path):
    output, data = tmp_path / "out", write_glue("MNLI", test=0)
    main(command(tiny_bert, data, output, "--task_name", "mnli"))
    columns = results(output)["columns"]
    history = log_history(output / "mnli")
    matched = [entry["eval_matched_accuracy"] for entry in history if "eval_matched_accuracy" in entry]
    mismatched = [entry["eval_mismatched_accuracy"] for entry in history if "eval_mismatched_accuracy" in entry]
    assert columns["MNLI-m"]["epoch_shown"] == "best"
    assert columns["MNLI-m"]["score"] == pytest.approx(100 * max(matched))
    assert (columns["MNLI-mm"]["epoch_shown"], columns["MNLI-mm"]["epochs"]) == ("last", [2.0])
    assert columns["MNLI-mm"]["score"] == pytest.approx(100 * mismatched[-1])


def test_the_last_epoch_is_shown_if_asked_for(write_glue, tiny_bert, tmp_path):
    output, data = tmp_path / "out", write_glue("CoLA", test=0)
    main(command(tiny_bert, data, output, "--task_name", "cola", "--report_epoch", "last", "--save_strategy", "no"))
    shown = results(output)["columns"]["CoLA"]
    assert (shown["epoch_shown"], shown["epochs"]) == ("last", [2.0])
    assert not list((output / "cola").glob("checkpoint-*"))


def test_the_epochs_of_a_task_go_before_those_of_all_and_those_before_the_published(write_glue, tiny_bert, tmp_path):
    data = write_glue("RTE", "WNLI", test=0)
    both = command(tiny_bert, data, tmp_path / "both", "--task_name", "rte", "wnli", "--task_epochs", "rte=1")
    main(both)
    assert [c["epochs_trained"] for c in results(tmp_path / "both")["columns"].values()] == [1, 2]
    position = both.index("--num_train_epochs")
    published = [*both[:position], *both[position + 2 :], "--task_epochs", "wnli=1", "--output_dir"]
    main([*published, str(tmp_path / "published"), "--report_epoch", "last"])
    assert [c["epochs_trained"] for c in results(tmp_path / "published")["columns"].values()] == [20, 1]


def test_epochs_of_a_task_that_is_not_trained_are_named(write_glue, tiny_bert, tmp_path, caplog):
    more = ("--task_name", "rte", "--task_epochs", "rte=1", "cola=1", "--max_steps", "1")
    main(command(tiny_bert, write_glue("RTE", test=0), tmp_path / "out", *more))
    (warning,) = (record.getMessage() for record in caplog.records if "--task_epochs" in record.getMessage())
    assert "cola is not among the tasks of this command" in warning


def test_several_seeds_are_runs_of_their_own(write_glue, tiny_bert, tmp_path):
    output, data = tmp_path / "out", write_glue("RTE")
    seeds = ("--num_seeds", "2", "--seed", "7")
    # Without learning the classifier stays as its seed made it.
    main(command(tiny_bert, data, output, "--task_name", "rte", *seeds, "--learning_rate", "0"))
    column = results(output)["columns"]["RTE"]
    assert column["seeds"] == [7, 8]
    assert column["score"] == pytest.approx(sum(column["metrics"]["accuracy"]["values"]) / 2)
    first, second = (load_file(output / "rte" / f"seed_{seed}" / "model.safetensors") for seed in (7, 8))
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    assert (output / "submission" / "seed_8" / "RTE.tsv").is_file()


@pytest.mark.parametrize("phase", ["--do_eval", "--do_predict"])
def test_a_model_that_is_no_classifier_is_not_scored(phase, write_glue, tiny_bert, tmp_path):
    with pytest.raises(SystemExit, match="is no classifier yet.* train .--do_train"):
        main(command(tiny_bert, write_glue("RTE"), tmp_path / "out", "--task_name", "rte", phase))
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_model_can_be_evaluated_alone(write_glue, tiny_bert, tmp_path):
    data = write_glue("RTE", test=0)
    main(command(tiny_bert, data, tmp_path / "trained", "--task_name", "rte"))
    main(command(tmp_path / "trained" / "rte", data, tmp_path / "seen", "--task_name", "rte", "--do_eval"))
    trained, seen = (results(tmp_path / name)["columns"]["RTE"] for name in ("trained", "seen"))
    assert seen["score"] == trained["score"]
    assert (seen["epoch_shown"], seen["epochs_trained"], seen["train_examples"]) == ("as loaded", 0, 0)
    assert not (tmp_path / "seen" / "rte" / "model.safetensors").exists()


def test_the_same_command_again_does_nothing_twice(write_glue, tiny_bert, tmp_path, capsys):
    argv = command(tiny_bert, write_glue("RTE"), tmp_path / "out", "--task_name", "rte")
    main(argv)
    first = capsys.readouterr().out.splitlines()
    before = snapshot(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rte").rglob("*")}
    main(argv)
    assert snapshot(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rte").rglob("*")} == times
    assert capsys.readouterr().out.splitlines()[-5:] == first[-5:]


def test_an_interrupted_command_goes_on_and_ends_as_if_it_had_not_been(write_glue, tiny_bert, tmp_path, monkeypatch):
    data = write_glue("RTE", "WNLI")
    tasks = ("--task_name", "rte", "wnli", "--num_train_epochs", "3")
    main(command(tiny_bert, data, tmp_path / "whole", *tasks))
    on_save = Publisher.on_save

    def interrupt(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if "wnli" in args.output_dir:
            raise KeyboardInterrupt

    output = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Publisher, "on_save", interrupt)
        main(command(tiny_bert, data, output, *tasks))
    assert [path.name for path in (output / "wnli").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output / "glue_results.json").exists()
    log_before = log_history(output / "wnli" / "checkpoint-3")
    finished = (output / "rte" / "model.safetensors").stat().st_mtime_ns
    main(command(tiny_bert, data, output, *tasks))
    assert (output / "rte" / "model.safetensors").stat().st_mtime_ns == finished
    assert results(output) == results(tmp_path / "whole")
    # Run times are in the log: the first epoch was not run again.
    assert log_history(output / "wnli")[: len(log_before)] == log_before
    weights, expected = (load_file(folder / "wnli" / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "launch",
    [(), ("--config_file", "accelerate_configs/two_cpu_processes.yaml", "--main_process_port", "0")],
    ids=["one process", "two processes"],
)
def test_sigterm_ends_with_its_code_and_the_same_command_as_if_it_had_not_come(launch, write_glue, tiny_bert, tmp_path):
    """In the second epoch, and with rows grouped by length, whose order hangs on the epoch."""
    data = write_glue("RTE", "WNLI", train=40)
    tasks = ["--task_name", "rte", "wnli", "--logging_steps", "1", "--save_strategy", "no", "--report_epoch", "last"]
    tasks += ["--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", "2" if launch else "4"]

    def process(name: str) -> Command:
        argv = ["run_glue.py", *command(tiny_bert, data, tmp_path / name, *tasks), "--disable_tqdm", "True"]
        return Command(argv, tmp_path / name, tmp_path / f"{name}-scratch", 10, launch=launch)

    assert process("whole").run().code == 0
    cut, output = process("cut"), tmp_path / "cut"
    life = cut.run(until=cut.has_logged(13), end=lambda: cut.signal(signal.SIGTERM))
    assert life.code == (1 if launch else 143), life.output[-3000:]  # the launcher has a code of its own
    assert 13 <= len(life.steps) < 20
    assert [path.name for path in (output / "rte").glob("checkpoint-*")] == [f"checkpoint-{life.steps[-1]}"]
    assert not (output / "wnli").exists()
    again = cut.run()
    assert again.code == 0, again.output[-3000:]
    assert again.steps[0] == life.steps[-1] + 1
    for task in ("rte", "wnli"):
        name = f"{task}/model.safetensors"
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("stage", [(Trainer, "evaluate"), (Publisher, "publish")], ids=["evaluation", "push"])
@pytest.mark.parametrize("epoch", ["best", "last"])
def test_what_was_cut_off_after_the_training_is_done_without_training_again(
    write_glue, tiny_bert, tmp_path, monkeypatch, stage, epoch
):
    data = write_glue("RTE")
    more = ["--report_epoch", epoch, *(["--save_strategy", "no"] if epoch == "last" else [])]
    whole, cut = (command(tiny_bert, data, tmp_path / name, "--task_name", "rte", *more) for name in ("whole", "cut"))
    main(whole)

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    train = Trainer.train
    with monkeypatch.context() as patch:
        patch.setattr("run_glue.try_first_step", lambda *arguments: None)  # it trains and evaluates as well
        # Evaluations within the training are not the one to be cut off.
        patch.setattr(Trainer, "train", lambda self, **named: (train(self, **named), patch.setattr(*stage, stop))[0])
        with pytest.raises(KeyboardInterrupt):
            main(cut)
    monkeypatch.setattr(Trainer, "train", None)
    main(cut)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "rte/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_another_command_is_refused_by_name_until_it_may_overwrite(write_glue, tiny_bert, tmp_path):
    output, data = tmp_path / "out", write_glue("RTE", "WNLI")
    main(command(tiny_bert, data, output, "--task_name", "rte", "wnli"))
    before = snapshot(output)
    changed = command(tiny_bert, data, output, "--task_name", "rte", "--learning_rate", "0.5")
    with pytest.raises(SystemExit, match=r"another run: learning_rate was 0\.01 and is 0\.5"):
        main(changed)
    assert snapshot(output) == before
    main([*changed, "--overwrite_output_dir"])
    assert set(results(output)["columns"]) == {"RTE"}
    # Nothing of the earlier run is left to be taken for this one's.
    assert not (output / "wnli").exists()
    assert [path.name for path in (output / "submission").iterdir()] == ["RTE.tsv"]


def test_tasks_can_be_added_to_a_folder_and_the_table_has_them_all(write_glue, tiny_bert, tmp_path):
    data = write_glue("RTE", "WNLI", "CoLA")
    together, apart = tmp_path / "together", tmp_path / "apart"
    main(command(tiny_bert, data, together, "--task_name", "rte", "wnli", "--task_epochs", "wnli=1"))
    main(command(tiny_bert, data, apart, "--task_name", "wnli", "--task_epochs", "wnli=1"))
    before = snapshot(apart / "wnli")
    main(command(tiny_bert, data, apart, "--task_name", "rte"))
    assert snapshot(apart / "wnli") == before
    assert results(apart) == results(together)
    # A task that is there with other epochs is another run, and so is one with other data.
    with pytest.raises(SystemExit, match=r"wnli holds another run: num_train_epochs was 1\.0 and is 2\.0\."):
        main(command(tiny_bert, data, apart, "--task_name", "cola", "wnli"))
    assert not (apart / "cola").exists()
    # What has other arguments is not put into one table with these.
    resumed = command(tiny_bert, data, apart, "--task_name", "rte", "--learning_rate", "0.5")
    main([*resumed, "--resume_from_checkpoint", str(next((apart / "rte").glob("checkpoint-*")))])
    assert set(results(apart)["columns"]) == {"RTE"}


@pytest.mark.parametrize("ci", ["false", "true"])  # transformers logs in another way where CI=true
def test_what_there_is_to_say_about_a_checkpoint_is_said_once(write_glue, tiny_bert, tmp_path, ci):
    argv = command(tiny_bert, write_glue("RTE", "WNLI"), tmp_path / "out", "--task_name", "rte", "wnli")
    run = subprocess.run(
        [sys.executable, "run_glue.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CI": ci},
    )
    assert run.stderr.count("LOAD REPORT") == 1


def test_changed_data_are_refused(write_glue, tiny_bert, tmp_path):
    data = write_glue("RTE")
    argv = command(tiny_bert, data, tmp_path / "out", "--task_name", "rte")
    main(argv)
    path = data / "RTE" / "dev.tsv"
    path.write_text(path.read_text().replace("row 1", "row 7"))
    with pytest.raises(SystemExit, match="rte holds another run: the data has changed"):
        main(argv)


def _bad_label(data: Path, model: Path) -> list[str]:
    path = data / "WNLI" / "dev.tsv"
    path.write_text(path.read_text() + "6\ta\tb\t2\n")
    return []


def _missing_file(data: Path, model: Path) -> list[str]:
    (data / "WNLI" / "train.tsv").unlink()
    return []


def _empty_file(data: Path, model: Path) -> list[str]:
    (data / "WNLI" / "train.tsv").write_text("")
    return []


def _truncated_weights(data: Path, model: Path) -> list[str]:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return []


def _no_amplitudes(data: Path, model: Path) -> list[str]:
    bert = AutoModelForMaskedLM.from_pretrained(model)
    bert.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "spikelm"}))
    return []


def _small_vocabulary(data: Path, model: Path) -> list[str]:
    bert = AutoModelForMaskedLM.from_pretrained(model)
    bert.resize_token_embeddings(9)
    bert.save_pretrained(model)
    return []


def _other_classes(data: Path, model: Path) -> list[str]:
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    AutoModelForSequenceClassification.from_pretrained(model, **labels).save_pretrained(model)
    return []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data, model: ["--task_name", "colla"], "unknown task 'colla'"),
        (lambda data, model: ["--data_dir", str(data / "nowhere")], "no folder .*nowhere.RTE"),
        (_missing_file, r"no file .*WNLI.train\.tsv"),
        (_empty_file, r"WNLI.train\.tsv is empty"),
        (_bad_label, r"WNLI.dev\.tsv:8: label '2' is outside the labels of wnli: 0, 1"),
        (_truncated_weights, "weights of .* are damaged"),
        (_no_amplitudes, "without spike amplitudes"),
        (_small_vocabulary, r"token id \d+, but the model has only 9 embeddings"),
        (_other_classes, r"classifies \['cat', 'dog'\], but rte asks for"),
        (lambda data, model: ["--max_seq_length", "65"], "max_seq_length is 65, but the model takes at most 64"),
        (lambda data, model: ["--task_epochs", "rte:3"], "--task_epochs rte:3: write <task>=<epochs>"),
        (lambda data, model: ["--num_seeds", "0"], "--num_seeds is 0"),
        (lambda data, model: ["--preprocessing_num_workers", "0"], "--preprocessing_num_workers is 0"),
        (lambda data, model: ["--eval_delay", "5"], "--eval_delay 5.*every epoch is evaluated"),
        (lambda data, model: ["--save_on_each_node"], "--save_on_each_node is not taken here: all nodes share"),
        (lambda data, model: ["--resume_from_checkpoint", str(model)], "one task and one seed"),
    ],
    ids=[
        "task", "folder", "missing-file", "empty-file", "label", "truncated-weights", "no-amplitudes", "token-ids",
        "classes", "too-long", "epochs", "seeds", "workers", "delay", "each-node", "resume",
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_leaves_no_trace(spoil, message, write_glue, tiny_bert, tmp_path):
    data, model, output = write_glue("RTE", "WNLI"), tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_bert, model)
    argv = command(model, data, output, "--task_name", "rte", "wnli")
    with pytest.raises(SystemExit, match=message) as stopped:
        main([*argv, *spoil(data, model)])
    assert str(stopped.value).startswith("error: ")
    assert not output.exists()


def test_a_warm_start_of_16_bits_is_trained_in_float32_and_that_is_said_once(write_glue, tiny_bert, tmp_path, caplog):
    precision.logger.info_once.cache_clear()
    AutoModelForMaskedLM.from_pretrained(tiny_bert).half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "half")
    argv = command(tmp_path / "half", write_glue("RTE", "WNLI", test=0), tmp_path / "out", "--task_name", "rte", "wnli")
    main([*argv, "--model_type", "spikelm", "--num_train_epochs", "1", "--spike_batches", "0"])
    for task in ("rte", "wnli"):
        saved = load_file(tmp_path / "out" / task / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
    assert caplog.text.count("holds weights in F16") == 1


@pytest.mark.parametrize("limit", [16, 1000])
def test_sentences_may_be_as_long_as_the_model_takes_whatever_the_tokenizer_says(
    limit, write_glue, tiny_spikelm, tmp_path
):
    AutoTokenizer.from_pretrained(tiny_spikelm, model_max_length=limit).save_pretrained(tmp_path / "tokenizer")
    argv = command(tiny_spikelm, write_glue("RTE", test=0), tmp_path / "out", "--task_name", "rte", "--max_steps", "1")
    argv += ["--tokenizer_name", str(tmp_path / "tokenizer"), "--max_seq_length"]
    main([*argv, "64"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "rte").model_max_length == 64
    with pytest.raises(SystemExit, match="max_seq_length is 65, but the model takes at most 64"):
        main([*argv, "65"])


def test_two_processes_write_once_what_one_would(write_glue, tiny_bert, tmp_path):
    data = write_glue("MNLI", dev=7, test=5)
    argv = ["run_glue.py", *command(tiny_bert, data, tmp_path / "out", "--task_name", "mnli")]
    run = launch_forked("two_cpu_processes", argv, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| MNLI-mm |") == 1
    columns = results(tmp_path / "out")["columns"]
    assert {name: column["validation_examples"] for name, column in columns.items()} == {"MNLI-m": 7, "MNLI-mm": 7}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "mnli").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    reported = json.loads((tmp_path / "out" / "mnli" / "all_results.json").read_text())
    for column, ending in (("MNLI-m", "matched"), ("MNLI-mm", "mismatched")):
        rows = [line.split("\t") for line in (data / "MNLI" / f"dev_{ending}.tsv").read_text().splitlines()[1:]]
        pairs = ([row[8] for row in rows], [row[9] for row in rows])
        inputs = tokenizer(*pairs, padding=True, truncation=True, max_length=32, return_tensors="pt")
        counted = spike_figures(count(model, [dict(inputs)]))
        spikes = {name: values["median"] for name, values in columns[column]["spikes"].items()}
        assert spikes == pytest.approx(counted, rel=1e-9)
        assert "firing_rate" not in spikes and spikes["model_energy_ratio"] == 1
        # The row that fills up the second process's batch counts nowhere.
        labels = torch.tensor([model.config.label2id[row[-1]] for row in rows])
        with torch.no_grad():
            assert reported[f"eval_{ending}_loss"] == pytest.approx(
                model(**inputs, labels=labels).loss.item(), rel=1e-5
            )
    state = json.loads((tmp_path / "out" / "mnli" / "trainer_state.json").read_text())
    assert state["global_step"] == 4  # 12 rows, 2 epochs, 2 processes x 4 rows
    for column in ("MNLI-m", "MNLI-mm"):
        lines = (tmp_path / "out" / "submission" / f"{column}.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines[1:]] == list("01234")


def test_every_task_is_pushed_complete_to_a_repository_of_its_own(write_glue, tiny_spikelm, tmp_path):
    cache, clean_cache = tmp_path / "cache", tmp_path / "clean"
    cache.mkdir()
    clean_cache.mkdir()
    argv = command(tiny_spikelm, write_glue("MNLI", "RTE", test=0), tmp_path / "out", "--task_name", "mnli", "rte")
    argv += ["--push_to_hub", "--hub_model_id", "tester/glue"]
    with HubServer() as hub:
        pushed = run_client(hub, cache, f"import run_glue\nrun_glue.main({argv!r})", OMP_NUM_THREADS="1")
        assert pushed.returncode == 0, pushed.stderr
        secret = hub.token
        assert secret not in pushed.stdout + pushed.stderr
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
        for name, scores in (("mnli", ["matched_accuracy", "mismatched_accuracy"]), ("rte", ["accuracy"])):
            files = hub.commits(f"tester/glue-{name}")[-1].files
            assert {"model.safetensors", "config.json", "modeling_spikelm.py", "spiking.py"} <= files.keys()
            assert not [file for file in files if file.endswith(".bin")]
            card = files["README.md"].decode()
            assert check_card(card) == ([], [])
            shown = {result.metric_name: result for result in ModelCard(card).data.eval_results}
            assert list(shown) == scores
            for score, result in shown.items():
                split = f"validation_{score.removesuffix('_accuracy')}" if name == "mnli" else "validation"
                origin = (result.dataset_type, result.dataset_config, result.dataset_split)
                assert origin == ("nyu-mll/glue", name, split)
        # What has ended is pushed once, whatever tasks the command has beside it.
        commits = len(hub.commits("tester/glue-rte"))
        for again in (argv, [*argv, "--task_name", "rte"]):
            done = run_client(hub, cache, f"import run_glue\nrun_glue.main({again!r})", OMP_NUM_THREADS="1")
            assert done.returncode == 0 and "finished already, and was pushed to tester/glue-rte" in done.stderr
        assert len(hub.commits("tester/glue-rte")) == commits
        with pytest.raises(KeyError):
            hub.commits("tester/glue")
        loaded = run_on_clean_machine(
            "from transformers import AutoModelForSequenceClassification as Auto\n"
            "print(Auto.from_pretrained('tester/glue-rte', trust_remote_code=True).config.id2label)",
            env=hub.environment(clean_cache),
        )
    assert loaded.returncode == 0, loaded.stderr
    assert "{0: 'entailment', 1: 'not_entailment'}" in loaded.stdout


def test_the_folder_of_the_model_to_start_from_is_not_the_one_to_write_into(write_glue, tiny_spikelm, tmp_path):
    """The model of a pre-training in place, and the result of one task for the next: whatever flag is given."""
    data, out = write_glue("RTE"), tmp_path / "out"
    main(command(tiny_spikelm, data, out, "--task_name", "rte", "--num_train_epochs", "1"))
    base = tmp_path / "base"
    shutil.copytree(tiny_spikelm, base)
    pretraining = RunRecord(tmp_path / "run", {}, "")
    with unlocking_folders():
        pretraining.open()
        pretraining.record_beginning()
    with WrittenFiles(tmp_path / "run").writing(*(path.name for path in base.iterdir())):
        for path in base.iterdir():
            shutil.copy(path, tmp_path / "run")
    before = snapshot(tmp_path)
    cases = {(out / "rte", out): "reads", (tmp_path / "run",) * 2: "reads", (base, base): "is not empty"}
    for (model, output), said in cases.items():
        for flags in ([], ["--overwrite_output_dir"]):
            with pytest.raises(SystemExit, match=said) as refused:
                main(command(model, data, output, "--task_name", "rte", *flags))
            assert "--overwrite_output_dir" not in str(refused.value)
    assert snapshot(tmp_path) == before


def test_overwriting_keeps_the_old_results_until_a_task_is_trained_and_a_users_files_for_ever(
    write_glue, tiny_bert, tmp_path, monkeypatch
):
    out, data = tmp_path / "out", write_glue("RTE", "WNLI")
    main(command(tiny_bert, data, out, "--task_name", "rte", "wnli", "--num_train_epochs", "1"))
    before = snapshot(out)
    users = ["submission/to_conference.pdf", "rte/notes.txt", "checkpoint-mine/weights", "README.md"]
    for name in users:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    new = command(tiny_bert, data, out, "--task_name", "rte", "--num_train_epochs", "1", "--seed", "7")
    train = Trainer.train

    def killed(trainer, **named):
        if trainer.args.output_dir == str(out / "rte"):  # and not while a step is tried
            raise KeyboardInterrupt
        return train(trainer, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train", killed)
        main([*new, "--overwrite_output_dir"])
    kept = snapshot(out / "replaced-1")
    assert {name: kept[name] for name in before if Path(name).name != LIST_NAME} == {
        name: content for name, content in before.items() if Path(name).name != LIST_NAME
    }
    for task in ("rte", "wnli"):
        AutoModelForSequenceClassification.from_pretrained(out / "replaced-1" / task)
    main(new)
    assert not (out / "replaced-1").exists() and not (out / "wnli").exists()
    assert set(results(out)["columns"]) == {"RTE"}
    assert [(out / name).read_text() for name in users] == ["mine"] * len(users)
    # An evaluation is nothing that a model could be deleted for.
    weights = (out / "rte" / "model.safetensors").read_bytes()
    trained = shutil.copytree(out / "rte", tmp_path / "trained")
    evaluate = command(trained, data, out, "--task_name", "rte", "--do_eval", "--overwrite_output_dir")
    main([*evaluate, "--seed", "8"])
    assert (out / "replaced-1" / "rte" / "model.safetensors").read_bytes() == weights


def test_overwriting_leaves_other_runs_in_the_folder_alone(write_glue, tiny_bert, tmp_path):
    out = tmp_path / "out"
    argv = command(tiny_bert, write_glue("RTE"), out, "--task_name", "rte")
    main(argv)
    (out / "pretrained").mkdir()
    (out / "pretrained" / "run.json").write_text("{}")
    (out / "pretrained" / "model.safetensors").write_text("weeks of work")
    main([*argv, "--overwrite_output_dir"])
    assert (out / "pretrained" / "model.safetensors").read_text() == "weeks of work"


def test_scores_of_a_checkpoint_that_has_changed_since_are_not_shown_again(write_glue, tiny_bert, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_bert, checkpoint)
    argv = command(checkpoint, write_glue("RTE"), tmp_path / "out", "--task_name", "rte")
    main(argv)
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {name: weight + 1e-6 for name, weight in weights.items()}, checkpoint / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SystemExit, match="checkpoint_digest"):
        main(argv)


def test_a_copied_checkpoint_and_a_newer_version_of_the_project_show_what_is_finished(write_glue, tiny_bert, tmp_path):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(tiny_bert, checkpoint)
    argv = command(checkpoint, write_glue("RTE"), out, "--task_name", "rte")
    main(argv)
    before = results(out)
    # As a fresh clone of a checkpoint's repository has it, and as a version without --fit_tokens recorded it.
    os.utime(checkpoint / "model.safetensors", ns=(0, 0))
    for file in (out / "run.json", out / "rte" / "run.json"):
        record = json.loads(file.read_text())
        assert record["arguments"].pop("fit_tokens") == 0
        file.write_text(json.dumps(record))
    (out / "glue_results.json").unlink()
    main(argv)
    assert results(out) == before
