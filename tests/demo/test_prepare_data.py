import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.prepare_data import (
    DemoDataArguments,
    bigram_shift,
    collect,
    deduplicate,
    docstrings,
    module_documents,
    paragraphs,
    sentences,
    shift,
    split,
    write_data,
)

words = st.text(string.ascii_lowercase, min_size=1, max_size=4)
marked_words = st.tuples(words, st.sampled_from(["", "", "", ",", ";", ":"])).map("".join)
plain_sentences = st.builds(
    lambda first, last: " ".join([*first, last]) + ".", st.lists(marked_words, max_size=8), words
)


def made_up_sources(modules=40, per_module=10):
    rng = random.Random(7)
    nouns, verbs = ("table cable stable apple staple sample temple simple".split(), "finds makes takes".split())
    return {
        "made up": {
            f"module{m}.py": [
                f"The {rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)} of chapter {'i' * (m + 1)} "
                f"on page {'x' * (s + 1)}."
                for s in range(per_module)
            ]
            for m in range(modules)
        }
    }


def read_probe(path):
    header, *rows = path.read_text().splitlines()
    assert header == "sentence\tlabel"
    pairs = [row.split("\t") for row in rows]
    return [(sentence, int(label)) for sentence, label in pairs]


NUMPY_STYLE = """
Compute the weighted mean along the given axis.

This function is used by ``fit`` and is
not part of the public interface.

Parameters
----------
x : array_like, shape (n, m)
    The values that are to be averaged in this call.
axis : int, optional
    The axis along which the values are averaged.

Returns
-------
mean : ndarray
    The mean of all the values that were given.

Notes
-----
The result may differ from that of the naive method::

    This line is code and must not be in the text.

>>> mean([1])
This output is not prose and must not be there.

.. math:: This is not prose and must not be there.
   Nor is this line that is a part of it.

.. note::
   The order of the values has no effect on it.

+------+
| This is a cell of the table and must not be there. |

Examples
--------
This sentence is only here to explain the example.
>>> mean([1])
This output is not prose and must not be there.
"""
GOOGLE_STYLE = """Open the file and return what is in it.

Args:
    path (`str`, *optional*): The path of the file that is to be read. It must
        be the path of a text file.
    mode: This must be one of the known modes.

Example:

    This is what the example is meant to show here.

```python
This is a line of code and not of prose.
This is one more line of the same code.
```

* The first of the points is not very long.
* The second of the points is
  a little longer than that.
"""


@pytest.mark.parametrize(
    ("docstring", "prose"),
    [
        (
            NUMPY_STYLE,
            [
                "Compute the weighted mean along the given axis.",
                "This function is used by fit and is not part of the public interface.",
                "The values that are to be averaged in this call.",
                "The axis along which the values are averaged.",
                "The mean of all the values that were given.",
                "The order of the values has no effect on it.",
            ],
        ),
        (
            GOOGLE_STYLE,
            [
                "Open the file and return what is in it.",
                "The path of the file that is to be read.",
                "It must be the path of a text file.",
                "This must be one of the known modes.",
                "The first of the points is not very long.",
                "The second of the points is a little longer than that.",
            ],
        ),
    ],
)
def test_prose_of_a_docstring_without_code_headings_and_tables(docstring, prose):
    found = [sentence for paragraph in paragraphs(docstring) for sentence in sentences(paragraph)]
    assert found == prose


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        ("It is as short as that.", True),
        ("It is too short.", False),
        (f"It is {'very ' * 40}long for a sentence.", False),
        ("it is not the beginning of the sentence.", False),
        ("It is not the end of the sentence", False),
        ("The value of n_samples is not a word.", False),
        ("The value is 3 in all of these cases.", False),
        ("The value (if there is any) is used.", False),
        ("The value of x is the one that counts.", False),
        ("The class RandomForest is the one to be used.", False),
        ("The café is the only one in the town.", False),
        ("The names of all the files in the folder.", False),
        ("If it is not a valid name of a file.", False),
        ("If it is not a valid name, the file is read.", True),
        ("Return the names of all the files in the folder.", True),
        ("Use :func:`~os.path.join` for it as it is.", False),
        ("Use :func:`join` for *all* of them, as it is `said there <http://x.y>`_.", True),
    ],
)
def test_which_sentences_count_as_prose(paragraph, kept):
    assert bool(list(sentences(paragraph))) is kept


def test_modules_are_read_but_not_run_and_broken_ones_and_tests_are_left_out(tmp_path):
    prose = '"""This is a sentence of the {} module."""\n'
    (tmp_path / "tests").mkdir()
    for name in ("good", "tests/bad"):
        (tmp_path / f"{name}.py").write_text(prose.format("first") + "raise SystemExit('was run')\n")
    (tmp_path / "broken.py").write_text(prose.format("other") + "def (\n")
    assert module_documents(tmp_path) == {"broken.py": [], "good.py": ["This is a sentence of the first module."]}


def test_docstrings_in_order_wherever_they_are_defined():
    source = (
        '"""m"""\nif 1:\n  try:\n    pass\n  except E:\n    async def f():\n      """f"""\n'
        '      class C:\n        """C"""\n        """no docstring"""\nx = """no docstring"""\ndef g():\n  """g"""\n'
    )
    assert list(docstrings(source)) == ["m", "f", "C", "g"]


def test_sentences_are_kept_once():
    sources = {"a": {"m": ["It is so.", "It is not."]}, "b": {"m": ["it is: so.", "It was."], "n": ["It is so."]}}
    assert deduplicate(sources) == {"a/m": ["It is so.", "It is not."], "b/m": ["It was."]}


@given(plain_sentences, st.integers(0, 3))
def test_a_shift_swaps_two_different_neighbours_and_leaves_all_marks_in_place(sentence, seed):
    shifted = shift(sentence, random.Random(seed))
    before = sentence.removesuffix(".").split(" ")
    swappable = [a != b and a[-1].isalpha() and b[-1].isalpha() for a, b in zip(before, before[1:], strict=False)]
    if shifted is None:
        assert not any(swappable)
        return
    assert shifted.endswith(".")
    after = shifted.removesuffix(".").split(" ")
    moved = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(moved) == 2 and moved[1] == moved[0] + 1 and swappable[moved[0]]
    assert after[moved[0]] == before[moved[1]] and after[moved[1]] == before[moved[0]]


@given(st.sets(plain_sentences, min_size=2, max_size=30), st.integers(2, 40), st.booleans(), st.integers(0, 3))
def test_probe_is_balanced_and_takes_each_sentence_as_often_as_said(text, limit, both, seed):
    examples = bigram_shift(text, limit, random.Random(seed), frozenset(text), both)
    labels = [label for _, label in examples]
    assert len(examples) <= limit and labels.count(0) == labels.count(1)
    originals = [sentence for sentence, label in examples if label == 0]
    assert len(set(originals)) == len(originals) and text.issuperset(originals)
    assert text.isdisjoint(sentence for sentence, label in examples if label == 1)
    assert examples == bigram_shift(text, limit, random.Random(seed), frozenset(text), both)
    sorted_words = [sorted(re.findall("[a-z]+", sentence)) for sentence, _ in examples]
    by_words = [sorted(re.findall("[a-z]+", sentence)) for sentence in text]
    for key in sorted_words:
        assert sorted_words.count(key) <= by_words.count(key) * (2 if both else 1)


def test_a_shift_that_gives_another_sentence_of_the_text_is_left_out():
    assert bigram_shift(["it is.", "is it."], 2, random.Random(0), {"it is.", "is it."}, both=True) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_long_module_is_not_the_whole_validation_set(seed):
    documents = {"long": ["It is long."] * 60} | deduplicate(made_up_sources())
    assert "long" in split(documents, 50, random.Random(seed))[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_held_out_sentence_is_in_training(seed):
    documents = deduplicate(made_up_sources())
    train, validation = split(documents, 50, random.Random(seed))
    assert train | validation == documents and train.keys().isdisjoint(validation)
    assert 50 <= sum(map(len, validation.values())) < 50 + 50 // 4


def test_files_hold_the_split_the_probe_and_the_counts(tmp_path):
    counts = write_data(made_up_sources(), DemoDataArguments(str(tmp_path), dev_examples=40))
    documents = {
        name: [part.splitlines() for part in (tmp_path / "text" / f"{name}.txt").read_text().split("\n\n")]
        for name in ("train", "validation")
    }
    train_text, validation_text = ([s for d in documents[name] for s in d] for name in ("train", "validation"))
    train, dev = (read_probe(tmp_path / "glue" / "BigramShift" / f"{name}.tsv") for name in ("train", "dev"))
    assert counts == {
        "train documents": len(documents["train"]),
        "train sentences": len(train_text),
        "validation documents": len(documents["validation"]),
        "validation sentences": len(validation_text),
        "probe train examples": len(train),
        "probe dev examples": len(dev),
    }
    assert len(dev) == 40 and sum(label for _, label in dev) == 20
    assert sum(label for _, label in train) * 2 == len(train) > 200
    assert {s for s, label in train if label == 0} <= {s.lower() for s in train_text}
    assert {s for s, label in dev if label == 0} <= {s.lower() for s in validation_text}
    assert {s.lower() for s in train_text}.isdisjoint(s.lower() for s in validation_text)
    # Word counts identify the sentence behind an example, shifted or not.
    assert {tuple(sorted(s.split())) for s, _ in dev}.isdisjoint(tuple(sorted(s.split())) for s, _ in train)
    assert all(s == s.lower() for s, _ in train + dev)


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data(made_up_sources(), DemoDataArguments(str(tmp_path / folder), dev_examples=40, seed=seed))
    a, b, c = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / folder).rglob("*.t[xs][tv]"))} for folder in "abc"
    )
    assert len(a) == 4 and a == b
    assert all(a[name] != c[name] for name in a)


def test_a_users_text_is_not_replaced(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds text/train.txt, which this command did not write"):
        write_data(made_up_sources(), DemoDataArguments(str(tmp_path), dev_examples=40))
    assert [path.name for path in tmp_path.rglob("*.*")] == ["train.txt"]
    (tmp_path / "text" / "train.txt").unlink()
    for seed in (0, 1):  # its own it may replace
        write_data(made_up_sources(), DemoDataArguments(str(tmp_path), dev_examples=40, seed=seed))


def test_too_few_sentences_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="only 100 sentences found"):
        write_data(made_up_sources(10), DemoDataArguments(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, 3, -2])
def test_numbers_that_cannot_balance_are_refused(value):
    with pytest.raises(ValueError, match="positive even number"):
        DemoDataArguments("out", dev_examples=value)


def test_python_and_an_installed_package_give_enough_real_prose(tmp_path):
    sources = collect(["sklearn", "surely_not_installed"])
    assert sources.keys() == {"pydoc topics", "standard library", "sklearn"}
    counts = write_data(sources, DemoDataArguments(str(tmp_path), dev_examples=1000))
    assert counts["probe dev examples"] == 1000 and counts["train sentences"] > 5000
    text = (tmp_path / "text" / "train.txt").read_text()
    assert re.fullmatch(r"[A-Za-z ,;:'.\n-]+", text)
