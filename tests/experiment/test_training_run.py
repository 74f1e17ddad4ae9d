import pytest
from transformers import PreTrainedConfig, TrainingArguments

from experiment import training_run
from experiment.run_record import RunRecord
from experiment.training_run import TrainingRun


def test_a_folder_in_which_another_command_ends_meanwhile_is_not_trained_in_from_the_beginning(tmp_path, monkeypatch):
    def record() -> RunRecord:
        return RunRecord(tmp_path / "run", {"seed": 1}, "data")

    def other_ends(*_) -> None:
        other = record()
        other.open()
        other.record_beginning()
        other.record_training()
        other.record_end()

    training = TrainingArguments(str(tmp_path / "run"), do_train=True, use_cpu=True, report_to="none")
    run = TrainingRun(record(), training, overwrite=False)
    assert run.is_left_to_do(PreTrainedConfig())
    monkeypatch.setattr(training_run, "try_first_step", other_ends)  # which takes its time
    with pytest.raises(ValueError, match="Another command went on in .* while this one began. Repeat this one"):
        run.claim(None, None, {})
    assert not TrainingRun(record(), training, overwrite=False).is_left_to_do(PreTrainedConfig())
