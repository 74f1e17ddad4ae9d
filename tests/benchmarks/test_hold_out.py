"""Settings are chosen on rows of the training split that share no text with the rest, and on none of a dev set."""

import subprocess
import sys
from pathlib import Path

import pytest

from glue_tasks.loading import SENTENCES, load_task
from glue_tasks.tasks import TASKS

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import hold_out
from hold_out import Arguments
from same_texts import texts

RTE = "index\tsentence1\tsentence2\tlabel\n"


def rows(start: int, count: int, suffix: str = "") -> str:
    """Pairs of numbered sentences; the first sentence of a pair stands in its neighbour as well."""
    lines = (
        f"{number}\tSentence {number // 2}{suffix}.\tOther {number}{suffix}.\tentailment"
        for number in range(start, start + count)
    )
    return "\n".join(lines) + "\n"


@pytest.fixture
def glue(tmp_path):
    for folder in ("RTE", "CoLA"):
        (tmp_path / "glue" / folder).mkdir(parents=True)
    (tmp_path / "glue/RTE/train.tsv").write_text(RTE + rows(0, 40))
    (tmp_path / "glue/RTE/dev.tsv").write_text(RTE + rows(0, 4, " of the dev set"))
    cola = "".join(f"x\t{number % 2}\t\tSaid {number}\u2028\r times.\n" for number in range(20))
    (tmp_path / "glue/CoLA/train.tsv").write_text(cola, newline="")
    (tmp_path / "glue/CoLA/dev.tsv").write_text("x\t1\t\tSaid of the dev set.\n")
    return tmp_path / "glue"


def test_parts_share_no_text_and_have_none_of_the_dev_set(glue, tmp_path):
    command = ["--data_dir", glue, "--output_dir", tmp_path / "choosing", "--task_name", "rte", "cola"]
    command += ["--percentage", "25"]
    done = subprocess.run(
        [sys.executable, hold_out.__file__, *map(str, command)], check=True, capture_output=True, text=True
    )
    splits = load_task(TASKS["rte"], tmp_path / "choosing")
    train, held_out = (texts(splits[name]) for name in ("train", "validation"))
    assert len(splits["validation"]) == 10 and train.isdisjoint(held_out)
    assert not any("dev set" in text for text in train | held_out)
    # Every row is in one part, or shares its first sentence with a row that is held out.
    left_out = 40 - len(splits["train"]) - 10
    assert f"RTE: {len(splits['train'])} rows to train on, 10 held out, {left_out} left out" in done.stdout
    assert 0 < left_out <= 10
    # A file without a header keeps its first row, and only a line feed ends a row.
    cola = load_task(TASKS["cola"], tmp_path / "choosing")
    assert (len(cola["train"]), len(cola["validation"])) == (15, 5)
    found = {text for name in cola for text in cola[name][SENTENCES[0]]}
    assert found == {f"Said {number}\u2028\r times." for number in range(20)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"percentage": 100.0}, "between 0 and 100"),
        ({"task_name": ["mnli"]}, "several dev sets"),
        ({"output_dir": "/"}, "exists; name another"),
    ],
)
def test_what_cannot_be_split_is_refused(glue, more, message):
    with pytest.raises(ValueError, match=message):
        Arguments(**{"data_dir": str(glue), "output_dir": str(glue / "new"), **more})
