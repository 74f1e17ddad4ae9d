"""The flags of a benchmark: what is wrong with them is said in one line."""

from typing import TypeVar

import project  # noqa: F401
from transformers import HfArgumentParser

from experiment.reporting import input_errors

Arguments = TypeVar("Arguments")


def read_arguments(kind: type[Arguments]) -> Arguments:
    """The command line as that dataclass.

    Raises:
        SystemExit: code 1 or 2, for a flag that is unknown or a value that is not possible.
    """
    with input_errors():
        (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses()
    return arguments
