"""Which texts count as the same, and that pairs which a task is scored on are not among those without labels."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from glue_tasks.tables import read_table

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import other_pairs
from other_pairs import Arguments
from same_texts import plain, rows_without

HEADERS = {
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
}
ROWS = {"MRPC": "1\t0\t1\t{}\t{}", "STS-B": "0\ta\tb\tc\t0\td\te\t{}\t{}\t2.5"}


def write(folder: Path, task: str, split: str, *pairs: tuple[str, str]) -> None:
    path = folder / task / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEADERS[task], *(ROWS[task].format(*pair) for pair in pairs)]) + "\n")


def test_a_text_is_its_words():
    assert plain("The plane 's down , he said .") == plain("the plane's down, he said")
    assert plain("The plane is down") != plain("The plane is not down")


def test_a_row_goes_if_either_text_was_seen():
    texts = {"sentence1": ["A b.", "C d.", "E f."], "sentence2": ["G h.", "I j.", "a B"]}
    rows = Dataset.from_dict({**texts, "label": [0, 1, 2]})
    assert rows_without(rows, {"a b"})["label"][:] == [1]
    assert rows_without(rows.remove_columns("sentence2"), {"a b"})["label"][:] == [1, 2]


def test_pairs_of_all_tasks_and_of_a_text_without_what_a_task_is_scored_on(tmp_path):
    glue = tmp_path / "glue"
    write(glue, "MRPC", "train", ("Cats sleep a lot.", "Cats are asleep."), ('He said "no".', "It was no."))
    write(glue, "MRPC", "dev", ("One more.", "Another one."))
    write(glue, "STS-B", "train", ("Dogs bark .", "Dogs are loud ."), ("One  more", "Unlike it."))
    write(glue, "STS-B", "dev", ("cats are asleep", "A bird."))
    paragraph = "The first one here has words. The second one has as many. Short one. The last one has enough again."
    (tmp_path / "text.txt").write_text(paragraph + "\n")
    command = [sys.executable, other_pairs.__file__, "--data_dir", glue, "--task_name", "mrpc", "stsb"]
    command += ["--text_file", tmp_path / "text.txt", "--output", tmp_path / "pairs.tsv"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    # As run_glue.py will read it.
    table = read_table(tmp_path / "pairs.tsv")
    assert set(zip(table.columns["sentence1"], table.columns["sentence2"], strict=True)) == {
        ('He said "no".', "It was no."),
        ("Dogs bark .", "Dogs are loud ."),
        ("The first one here has words.", "The second one has as many."),
    }


def test_a_task_without_pairs_and_a_file_that_exists_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--task_name cola: these tasks have no pairs"):
        Arguments("glue", str(tmp_path / "pairs.tsv"), task_name=["mrpc", "cola"])
    with pytest.raises(ValueError, match="--task_name mrcp: no such task; there are cola, "):
        Arguments("glue", str(tmp_path / "pairs.tsv"), task_name=["mrcp"])
    with pytest.raises(ValueError, match="separated by tabs; name it something.tsv"):
        Arguments("glue", str(tmp_path / "pairs.csv"))
    with pytest.raises(ValueError, match="there is no such folder"):
        Arguments("glue", str(tmp_path / "nowhere/pairs.tsv"))
    (tmp_path / "lines.txt").write_text("The first one here has words.\nThe second one has as many.\n")
    with pytest.raises(SystemExit, match="no sentences one after another in a line; give a paragraph a line"):
        other_pairs.neighbours(tmp_path / "lines.txt", 5, 0)
    (tmp_path / "pairs.tsv").touch()
    with pytest.raises(ValueError, match=r"pairs\.tsv exists; name another file"):
        Arguments("glue", str(tmp_path / "pairs.tsv"))
