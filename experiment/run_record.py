"""What an output folder belongs to, so that the same command resumes and another one is refused."""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

RECORD_NAME = "run.json"

# Where a run lies, how it is watched and how it is spread over processes is no part of what it computes.
_NOT_RECORDED = {
    "output_dir",
    "overwrite_output_dir",
    "overwrite_cache",
    "resume_from_checkpoint",
    "cache_dir",
    "preprocessing_num_workers",
    "local_rank",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "parallelism_config",
    "ddp_backend",
    "ddp_timeout",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "push_to_hub",
}
_NOT_RECORDED_PREFIXES = ("hub_", "log", "save_", "push_to_hub_")


def recorded_arguments(*arguments: Any) -> dict[str, Any]:
    """The fields of argument dataclasses that decide what a run computes, as JSON values."""
    values: dict[str, Any] = {}
    for group in arguments:
        as_dict = group.to_dict() if isinstance(group, TrainingArguments) else vars(group)
        for field in fields(group):
            if field.init and field.name not in _NOT_RECORDED and not field.name.startswith(_NOT_RECORDED_PREFIXES):
                values[field.name] = as_dict.get(field.name)
    return json.loads(json.dumps(values, default=str))


@dataclass
class RunRecord:
    """The arguments and the data of one run, kept as run.json in its output folder.

    Args:
        output_dir: the folder.
        arguments: from `recorded_arguments`.
        data_fingerprint: a hash of the data that the run trains and evaluates on.
    """

    output_dir: str | Path
    arguments: dict[str, Any]
    data_fingerprint: str

    def open(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """Claims the folder for this run. Every process has to call; nothing is written if any of them refuses.

        Args:
            overwrite: start anew, whatever the folder holds; checkpoints and record of the earlier run are deleted.
            resume_from_checkpoint: go on from this checkpoint, whatever the folder's record says.

        Returns:
            The checkpoint to go on from, or None to start at the beginning.

        Raises:
            ValueError: the folder holds another run (the message names the difference) or other files, or the
                checkpoint to resume from does not exist.
        """
        folder, state = Path(self.output_dir), PartialState()
        checkpoint = self.check(overwrite, resume_from_checkpoint)
        state.wait_for_everyone()
        if state.is_main_process:
            if overwrite and not resume_from_checkpoint:
                _delete_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            content = {"arguments": self.arguments, "data_fingerprint": self.data_fingerprint}
            (folder / RECORD_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        state.wait_for_everyone()
        return checkpoint

    def check(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """What `open` does, arguments, return value and errors, without writing anything."""
        folder = Path(self.output_dir)
        if resume_from_checkpoint:
            if not Path(resume_from_checkpoint, "trainer_state.json").is_file():
                raise ValueError(f"--resume_from_checkpoint {resume_from_checkpoint} is no checkpoint of the Trainer.")
            return resume_from_checkpoint
        if overwrite or not folder.exists() or not any(folder.iterdir()):
            return None
        if not folder.is_dir() or not (folder / RECORD_NAME).is_file():
            raise ValueError(
                f"The output folder {folder} is not empty and holds no run of this script. Choose another "
                "--output_dir, or give --overwrite_output_dir."
            )
        earlier = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        differences = self._differences(earlier)
        if differences:
            raise ValueError(
                f"The output folder {folder} holds another run: {'; '.join(differences)}. Repeat its command to resume "
                "it, choose another --output_dir, or give --overwrite_output_dir to start anew."
            )
        return _last_complete_checkpoint(folder)

    def _differences(self, earlier: dict[str, Any]) -> list[str]:
        before = earlier["arguments"]
        differences = [
            f"{name} was {before.get(name)!r} and is {self.arguments.get(name)!r}"
            for name in sorted(before.keys() | self.arguments.keys())
            if before.get(name) != self.arguments.get(name)
        ]
        if earlier["data_fingerprint"] != self.data_fingerprint:
            differences.append("the data has changed")
        return differences


def _last_complete_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that has its trainer_state.json, which the Trainer writes last; None if there is none."""
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    steps = {int(path.name.rpartition("-")[2]): path for path in complete if path.name.rpartition("-")[2].isdecimal()}
    return str(steps[max(steps)]) if steps else None


def _delete_run(folder: Path) -> None:
    """Deletes checkpoints, model and results, so that nothing of the earlier run is taken for the new one's."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)
    for pattern in (RECORD_NAME, TRAINER_STATE_NAME, "*_results.json", "model*.safetensors*", "README.md"):
        for path in folder.glob(pattern):
            path.unlink()
