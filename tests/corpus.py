"""A small corpus of real English for tests: the prose of CPython's own help topics."""

from pathlib import Path
from pydoc_data.topics import topics

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_time_steps=2"


def write_corpus(path: Path, count: int = 30, first: int = 0) -> Path:
    """A .txt file of `count` documents, separated by blank lines."""
    names = sorted(topics)[first : first + count]
    documents = [" ".join(topics[name].split())[:2000] for name in names]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path
