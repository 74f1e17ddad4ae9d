"""Packs text into one small file of token ids, for convert_packed.py on a machine that has nothing but a GPU.

python pack_text.py --tokenizer_name BERT --text_files corpus/*.txt --sentence_files sentences.txt --output text.npz
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser

from distillation.packed_text import pack
from experiment.reporting import full_disk_errors, input_errors


@dataclass
class PackArguments:
    tokenizer_name: str = field(metadata={"help": "The BERT to convert: a folder, or a name on the Hub."})
    output: str = field(metadata={"help": "The file to write, text.npz; must not exist."})
    text_files: list[str] = field(default_factory=list, metadata={"help": "Running text, of which rows are cut."})
    sentence_files: list[str] = field(default_factory=list, metadata={"help": "A sentence a line; each stays whole."})
    pair_files: list[str] = field(
        default_factory=list, metadata={"help": "Two sentences a line with a tab between them, for tasks of pairs."}
    )


@full_disk_errors()
def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(PackArguments).parse_args_into_dataclasses(argv, look_for_args_file=False)
    output = Path(arguments.output)
    with input_errors():
        if output.suffix != ".npz" or output.exists():
            raise ValueError(f"--output {output}: name a file that ends in .npz and does not exist yet.")
        if not output.resolve().parent.is_dir():
            raise ValueError(f"The folder of --output {output} does not exist.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"--tokenizer_name {arguments.tokenizer_name} has no tokenizer: {error}") from error
        texts, sentences = lines(arguments.text_files), lines(arguments.sentence_files)
        count = pack(texts, sentences, tokenizer, output, pairs(arguments.pair_files))
    print(f"{output}: {count:,} tokens, {output.stat().st_size / count:.2f} bytes a token")


def pairs(files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The lines of text files as two sentences each.

    Raises:
        ValueError: a file cannot be read as UTF-8 text, or a line has not two sentences.
    """
    for line in lines(files):
        match [part.strip() for part in line.split("\t")]:
            case [first, second] if first and second:
                yield first, second
            case _:
                raise ValueError(
                    f"--pair_files: a line has two sentences with one tab between them, not {line[:60]!r}."
                )


def lines(files: Iterable[str]) -> Iterator[str]:
    """The lines of text files that hold anything.

    Raises:
        ValueError: a file cannot be read as UTF-8 text.
    """
    for name in files:
        try:
            with Path(name).open(encoding="utf-8") as file:
                yield from (line for line in map(str.strip, file) if line)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} cannot be read as text: {error}") from error


if __name__ == "__main__":
    main()
