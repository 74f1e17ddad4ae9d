import datasets
import pytest
from transformers import BertTokenizer

WORDS = "the a river king city of and in was born people old new water year war house red light stone bird".split()


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    """A cache of datasets for each test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word of `WORDS`; letters and the full stop for the rest."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [word for word in WORDS if word not in tokens]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@pytest.fixture(scope="session")
def words():
    return WORDS
