"""An output folder that is there as a whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def refuse_used(output: Path) -> None:
    """
    Raises:
        ValueError: there is something in the folder, or a file has its name.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output} is not empty; name another folder.")


@contextmanager
def filled(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` at the end, and goes if anything fails before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as place:
        folder = Path(place, output.name)
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
