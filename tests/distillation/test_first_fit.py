"""The fit before the first step: on the rows of all processes together, once, and not where weights are sharded."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, TrainerState

from distillation.first_fit import FirstFit, fit_before_training, rows_of
from distillation.least_squares import fit_to_teacher
from distillation.losses import hidden_state_errors
from modeling_spikelm import SpikeLMModel
from pretraining_data.streams import OrderedStream, StreamPasses
from tests.distillation.test_trainer import make_trainer  # noqa: F401  (a fixture)
from tests.forked_processes import launch_forked

WORKER = """
import json, sys
import torch, torch.distributed as dist
from transformers import AutoModel
from distillation.least_squares import fit_to_teacher
from modeling_spikelm import SpikeLMModel
folder, output = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
rows = torch.randint(1, 60, (40, 12))
student = SpikeLMModel.from_pretrained(folder, neuron="thrifty", num_time_steps=1)
student.calibrate({"input_ids": rows})
fit_to_teacher(student, AutoModel.from_pretrained(folder), [{"input_ids": rows[rank::2]}])
torch.save(student.state_dict(), f"{output}/rank{rank}.pt")
dist.destroy_process_group()
"""


def error(trainer):
    trainer.model.eval()
    batch = trainer.data_collator([{"input_ids": row["input_ids"]} for row in trainer.train_dataset])
    with torch.no_grad():
        found, wished = (
            model(**batch, output_hidden_states=True).hidden_states for model in (trainer.model, trainer.teacher)
        )
    return hidden_state_errors(found[1:], wished[1:], batch["attention_mask"].bool()).mean().item()


@pytest.mark.parametrize("tokens", [0, 400])
def test_a_training_begins_with_the_fit(make_trainer, tokens):  # noqa: F811
    trainer = make_trainer("", rows=60, max_steps=1, learning_rate=0.0)
    trainer.model.calibrate(trainer.data_collator(list(trainer.train_dataset)))
    before = error(trainer)
    fit_before_training(trainer, tokens)
    trainer.train()
    assert error(trainer) < 0.8 * before if tokens else error(trainer) == before


def test_rows_are_taken_from_everywhere_until_they_hold_as_many_tokens_as_asked_for():
    data = Dataset.from_list([{"input_ids": [number] * 10} for number in range(100)])
    taken = [row["input_ids"][0] for row in rows_of(data, 295)]
    assert len(taken) == len(set(taken)) == 30 and max(taken) > 80
    assert taken == [row["input_ids"][0] for row in rows_of(data, 295)]
    assert len(rows_of(data, 10**6)) == 100
    padded = data.map(lambda row: {"attention_mask": [1] * 3 + [0] * 7})
    assert len(rows_of(padded, 295)) == 99
    stream = data.to_iterable_dataset()
    assert [row["input_ids"][0] for row in rows_of(stream, 25)] == [0, 1, 2]


def test_of_a_stream_that_never_ends_no_row_is_taken_twice():
    few = Dataset.from_list([{"input_ids": [number] * 10} for number in range(5)]).to_iterable_dataset()
    assert [row["input_ids"][0] for row in rows_of(StreamPasses(OrderedStream(few, 1)), 1000)] == list(range(5))


def test_a_training_that_goes_on_is_not_fitted_again(make_trainer):  # noqa: F811
    trainer = make_trainer("", max_steps=1)
    trainer.model.calibrate(trainer.data_collator(list(trainer.train_dataset)))
    before = error(trainer)
    FirstFit(trainer, 7).on_train_begin(trainer.args, TrainerState(global_step=3), trainer.control)
    assert error(trainer) == before


def test_weights_that_are_going_to_be_sharded_are_refused(make_trainer):  # noqa: F811
    trainer = make_trainer("")
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="--fit_tokens takes whole weights"):
        fit_before_training(trainer, 4)


def test_two_processes_fit_to_the_rows_of_both(save_teacher, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    argv = [str(tmp_path / "worker.py"), json.dumps([save_teacher(), str(tmp_path)])]
    done = launch_forked("two_cpu_processes", argv, "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # Each solves by itself what both have summed.
    torch.testing.assert_close(one, other)

    torch.manual_seed(0)
    rows = torch.randint(1, 60, (40, 12))
    student = SpikeLMModel.from_pretrained(save_teacher(), neuron="thrifty", num_time_steps=1)
    student.calibrate({"input_ids": rows})
    fit_to_teacher(
        student, AutoModel.from_pretrained(save_teacher()), [{"input_ids": rows[rank::2]} for rank in (0, 1)]
    )
    for name, value in student.state_dict().items():
        # Rounding turns a spike here and there.
        assert (value - one[name]).norm() <= 0.02 * value.norm() + 1e-4, name
