"""What the project's checkpoint does, then how one is made: data -> run_mlm.py -> run_glue.py -> reload, in minutes.

python -m demo.run --output_dir .demo
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import binomtest
from transformers import HfArgumentParser

from demo.show import dense_model, show

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "This function returns the [MASK] of the given array."
# In a process of its own that starts in another folder and cannot see this project: only the checkpoint's code runs.
FILL_MASK = """
import sys
from transformers import pipeline
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
print(", ".join(f"{guess['token_str']} ({guess['score']:.2f})" for guess in fill(sys.argv[2])))
"""


@dataclass
class DemoArguments:
    output_dir: str = field(metadata={"help": "Where data, checkpoints and results go."})


def main() -> None:
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    folder = Path(arguments.output_dir).resolve()
    data, pretrained, finetuned = folder / "data", folder / "pretrained", folder / "finetuned"
    show(folder / "pictures")
    print("\nNow a model is made, small and in minutes: the dense one starts to spike, learns some prose, then a task.")
    run("-m", "demo.prepare_data", "--output_dir", data)
    # Bars are for people who watch.
    how = ["--overwrite_output_dir", "--disable_tqdm", str(not sys.stderr.isatty())]
    run(
        *("run_mlm.py", "recipes/demo_pretrain.yaml", "--model_name_or_path", dense_model()),
        *("--train_file", data / "text/train.txt", "--validation_file", data / "text/validation.txt"),
        *("--output_dir", pretrained, *how),
    )
    run(
        *("run_glue.py", "recipes/demo_glue.yaml", "--model_name_or_path", pretrained, "--data_dir", data / "glue"),
        *("--output_dir", finetuned, *how),
    )
    guesses = subprocess.run(
        [sys.executable, "-I", "-c", FILL_MASK, str(pretrained), SENTENCE],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if not report(data, pretrained, finetuned, guesses):
        sys.exit("The demo ran through, but missed one of its two bounds.")


def run(*command: str | Path) -> None:
    print("\n$ python " + " ".join(str(part) for part in command), flush=True)
    if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        sys.exit("The demo ends here; the command says why above.")


def report(data: Path, pretrained: Path, finetuned: Path, guesses: str) -> bool:
    """Prints both scores beside their baselines; whether both are clear of them."""
    masked = json.loads((pretrained / "all_results.json").read_text(encoding="utf-8"))
    table = json.loads((finetuned / "glue_results.json").read_text(encoding="utf-8"))
    probe = table["columns"]["BigramShift"]
    accuracy, count = probe["score"] / 100, probe["validation_examples"]
    lower = binomtest(round(accuracy * count), count).proportion_ci(0.95, method="wilson").low
    labels = [row.rpartition("\t")[2] for row in (data / "glue/BigramShift/dev.tsv").read_text().splitlines()[1:]]
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    loss, unigram = masked["eval_mlm_loss"], masked["eval_unigram_loss"]
    print(f"""
Masked words, held-out prose:   loss {loss:.2f} nats, {unigram - loss:.2f} below the {unigram:.2f} of a unigram
                                model of the training text on the same positions (0.30 wanted)
Swapped words, {count} sentences: {accuracy:.1%} right, 95 % lower bound {lower:.1%};
                                the majority class gets {majority:.1%} (5 points more wanted)
{SENTENCE}
                                {guesses}
The checkpoints are {pretrained} and {finetuned / "bigram_shift"}.""")
    return unigram - loss >= 0.3 and count >= 1000 and lower >= majority + 0.05


if __name__ == "__main__":
    main()
