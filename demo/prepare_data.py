"""Data of the demo, made of what Python itself and the installed packages ship: no network, nothing to commit.

The text is English prose from `pydoc_data.topics` and from docstrings, one sentence a line, a module's sentences
together and modules apart by a blank line. The labelled task is the bigram-shift probe (Conneau et al., 2018, "What
you can cram into a single vector"): does a sentence stand as it was written (0), or were two neighbouring words
swapped (1)? It comes in GLUE's TSV layout. Some modules are held out: their sentences are in no training file.
"""

import ast
import inspect
import pydoc_data.topics
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser

from experiment.reporting import full_disk_errors, input_errors
from experiment.written_files import WrittenFiles

# Folders whose docstrings are not about what the package does, or belong to somebody else.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "_vendor",
    "vendored",
    "externals",
    "idlelib",
    "lib2to3",
}
# Sections of a docstring that hold lists of names and code.
SKIPPED_SECTIONS = {"example", "examples", "references", "see also", "usage", "shape", "methods", "attributes"}
PROSE_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "seealso"}
FUNCTION_WORDS = frozenset(
    "a an and are as at be been but by can could do does for from had has have how if in into is it its may must no "
    "not of on only or should so than that the their them then there these they this those to was were what when "
    "where which while who will with would you your".split()
)
# A sentence has a verb: an auxiliary, or (most docstrings begin so) a verb first, or a subject that heralds one.
AUXILIARIES = frozenset(
    "are be been being can cannot could did do does had has have is may might must shall should was were will "
    "would".split()
)
OPENINGS = frozenset(
    "add allow append apply assign assume build calculate call change check choose clear close collect combine "
    "compare compute configure consider construct contain convert copy count create decide decode define delete "
    "describe detect determine disable display download draw emit enable encode ensure estimate evaluate execute "
    "expand extract fetch fill filter find fit flatten format generate get give handle he i if implement import "
    "indicate infer initialize insert it iterate join keep let load look make map mark merge modify move normalize "
    "note obtain open override parse perform plot predict prepare print process produce provide raise read record "
    "reduce register remove rename replace report represent reset resolve restore retrieve return run save scale "
    "search see select send set she show since skip solve sort specify split start stop store take test that there "
    "these they this those transform try unless update use validate verify wait we when wrap write you".split()
)
# What begins so and has no comma is seldom more than a clause.
SUBORDINATE = {"although", "if", "since", "unless", "when", "whether", "which", "while"}

_UNDERLINE = re.compile(r"([=\-~^\"'*+#`.])\1{2,}")
_DIRECTIVE = re.compile(r"\.\. *([\w-]+(?::[\w-]+)?)::(.*)")
_BULLET = re.compile(r"(?:[-*+•]|\(?\d+[.)]|\[\d+\])\s+")
_GOOGLE_ENTRY = re.compile(r"[\w*.`]+(?: ?\([^)]*\))?: +")
_MARKUP = [
    (re.compile(r"\s*\[\w+\]_"), ""),  # footnote
    (re.compile(r":[\w:+-]+:`[!~]?([^`<]+?)(?: *<[^`]*>)?`"), r"\1"),  # role
    (re.compile(r"`([^`<]+?) *<[^`]*>`_{0,2}"), r"\1"),  # link
    (re.compile(r"``?([^`]+)``?_?"), r"\1"),  # code
    (re.compile(r"\*\*?([^*\s][^*]*)\*\*?"), r"\1"),  # emphasis
]
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+(?:['-][a-z]+)*[,;:]?")


@dataclass
class DemoDataArguments:
    """Where the demo's data go and how much of it there is."""

    output_dir: str = field(metadata={"help": "Folder for text/ and glue/; files of an earlier run are overwritten."})
    packages: list[str] = field(
        default_factory=lambda: "numpy scipy sklearn pandas networkx".split(),
        metadata={"help": "Installed packages to read beside the standard library; those not installed are left out."},
    )
    dev_examples: int = field(default=1500, metadata={"help": "Held-out probe examples (an even number)."})
    max_train_examples: int = field(default=40_000, metadata={"help": "At most so many probe examples to train on."})
    seed: int = field(default=0, metadata={"help": "Decides which modules are held out and which words are swapped."})

    def __post_init__(self) -> None:
        for name in ("dev_examples", "max_train_examples"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(f"{name} must be a positive even number, so that the labels balance; got {value}")


def paragraphs(docstring: str) -> Iterator[str]:
    """Paragraphs of running text in a docstring or topic: without headings, code, doctests, tables and parameter lists.

    Reads reStructuredText, the numpy and the Google style by their layout. Of parameters the descriptions are kept, the
    names and types are not.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    current: list[str] = []
    last_indent = 0
    dropped_indent: int | None = None  # what is indented deeper than this is dropped ...
    dropped_to_blank = False  # ... so is everything up to the next blank line,
    dropped_section = dropped_fence = False  # up to the next heading, up to the closing fence

    def finish() -> Iterator[str]:
        if current:
            yield " ".join(current)
            current.clear()

    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith("```"):
            yield from finish()
            dropped_fence = not dropped_fence and not (len(text) > 3 and text.endswith("```"))
            continue
        if dropped_fence:
            continue
        if not text:
            yield from finish()
            dropped_to_blank = False
            continue
        if dropped_indent is not None:
            if indent > dropped_indent:
                continue
            dropped_indent = None
        if _UNDERLINE.fullmatch(following.strip()) and not _UNDERLINE.fullmatch(text):
            yield from finish()
            dropped_section = text.lower().rstrip(":") in SKIPPED_SECTIONS
            continue
        if dropped_section or dropped_to_blank or _UNDERLINE.fullmatch(text):
            continue
        if text.startswith((">>>", "...", "$ ", "|", "+-")):
            yield from finish()
            dropped_to_blank = True
            continue
        if text.startswith((".. ", ":")):
            yield from finish()
            directive = _DIRECTIVE.fullmatch(text)
            if directive and directive[1] in PROSE_DIRECTIVES:
                current.extend(filter(None, [directive[2].strip()]))
                last_indent = indent + 3
            else:
                dropped_indent = indent
            continue
        if text.endswith(":") and text.count(" ") < 2:  # a Google heading
            yield from finish()
            if text[:-1].lower() in SKIPPED_SECTIONS:
                dropped_indent = indent
            continue
        entry = _BULLET.match(text) or _GOOGLE_ENTRY.match(text)
        if entry or indent != last_indent:
            yield from finish()
        text = text[entry.end() :] if entry else text
        current.append(text)
        # A list entry's further lines are indented, or not.
        last_indent = len(following) - len(following.lstrip()) if entry else indent
        if text.endswith("::"):
            yield from finish()
            dropped_indent = indent
    yield from finish()


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph that read as English prose: 6 to 30 words, a capital first, a full stop last.

    Identifiers, numbers, formulas, brackets, quotes and symbols make a sentence unfit, and it is left out as a whole.
    """
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
        words = sentence[:-1].split(" ")
        if not (sentence.endswith(".") and sentence[0].isupper() and 6 <= len(words) <= 30):
            continue
        if not all(_WORD.fullmatch(word) for word in words):
            continue
        bare = [word.rstrip(",;:") for word in words]
        if any(len(word) == 1 and word not in "aAI" for word in bare):
            continue
        if sum(word.islower() for word in bare[1:]) < 0.85 * len(bare[1:]):
            continue
        if any(word[1:] != word[1:].lower() and not word.isupper() for word in bare):
            continue
        lower = [word.lower() for word in bare]
        has_verb = not AUXILIARIES.isdisjoint(lower) or not OPENINGS.isdisjoint((lower[0], lower[0].removesuffix("s")))
        if lower[0] in SUBORDINATE and "," not in sentence:
            continue
        if has_verb and lower[1] != "of" and sum(word in FUNCTION_WORDS for word in lower) >= 2:
            yield sentence


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module's source, in its order; none if it is not valid Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return

    def visit(node: ast.AST) -> Iterator[str]:
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and (docstring := ast.get_docstring(node, clean=False)):
            yield docstring
        for child in ast.iter_child_nodes(node):
            # Expressions hold no docstrings, and are most of a tree.
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from visit(child)

    yield from visit(tree)


def module_documents(folder: Path) -> dict[str, list[str]]:
    """Sentences of each module under `folder`, by its path; the modules are read, never imported."""
    documents = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not SKIPPED_FOLDERS.intersection(name.parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            documents[name.as_posix()] = [s for d in docstrings(source) for p in paragraphs(d) for s in sentences(p)]
    return documents


def collect(packages: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Documents of Python's topics, the standard library and those of `packages` that are installed, by source."""
    folders = {"standard library": Path(sysconfig.get_path("stdlib"))}
    for package in packages:
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            folders[package] = Path(spec.submodule_search_locations[0])
    topics = {
        name: [s for p in paragraphs(text) for s in sentences(p)] for name, text in pydoc_data.topics.topics.items()
    }
    with ProcessPoolExecutor() as pool:
        results = tqdm(pool.map(module_documents, folders.values()), "packages read", len(folders), disable=None)
        read = dict(zip(folders, results, strict=True))
    return {"pydoc topics": topics, **read}


def deduplicate(sources: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Each sentence once, where it first occurs (case and punctuation aside); documents left empty are dropped."""
    seen: set[str] = set()
    documents = {}
    for source, modules in sources.items():
        for module, module_sentences in modules.items():
            kept = []
            for sentence in module_sentences:
                if (key := re.sub(r"[^a-z ]", "", sentence.lower())) not in seen:
                    seen.add(key)
                    kept.append(sentence)
            if kept:
                documents[f"{source}/{module}"] = kept
    return documents


def split(
    documents: dict[str, list[str]], held_out: int, rng: random.Random
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents for training and for validation; the latter, drawn at random, hold `held_out` sentences or a few more.

    Raises ValueError when that would leave less to train on than to validate on.
    """
    total = sum(map(len, documents.values()))
    if total < 4 * held_out:
        raise ValueError(
            f"only {total} sentences found, too few to hold out {held_out}: "
            "read more --packages or lower --dev_examples"
        )
    names = sorted(documents)
    rng.shuffle(names)
    validation: set[str] = set()
    count = 0
    for name in names:
        if count >= held_out:
            break
        # One long module must not be the whole validation set.
        if len(documents[name]) <= held_out // 4:
            validation.add(name)
            count += len(documents[name])
    return (
        {name: text for name, text in documents.items() if name not in validation},
        {name: text for name, text in documents.items() if name in validation},
    )


def shift(sentence: str, rng: random.Random) -> str | None:
    """`sentence` (lower case, ending in a full stop) with two neighbouring words swapped, None if no swap changes it.

    Words beside a comma, semicolon or colon stay where they are, so that no misplaced mark tells of the swap.
    """
    words = sentence.removesuffix(".").split(" ")
    places = [
        i
        for i, (left, right) in enumerate(zip(words, words[1:], strict=False))
        if left != right and left[-1].isalpha() and right[-1].isalpha()
    ]
    if not places:
        return None
    i = rng.choice(places)
    words[i : i + 2] = words[i + 1], words[i]
    return " ".join(words) + "."


def bigram_shift(
    text: Iterable[str], limit: int, rng: random.Random, originals: Set[str] = frozenset(), both: bool = False
) -> list[tuple[str, int]]:
    """At most `limit` probe examples (sentence, label) in random order, as many of each label.

    With `both`, a sentence of `text` appears twice, as written and shifted; else once, as one or the other. A shift
    that happens to give one of `originals` (lower case) is left out. All is lower case: the capital of a first word
    would give the swaps away.
    """
    pool = sorted({sentence.lower() for sentence in text})
    rng.shuffle(pool)
    pairs = [(sentence, shifted) for sentence in pool if (shifted := shift(sentence, rng)) and shifted not in originals]
    if both:
        examples = [(form, label) for pair in pairs[: limit // 2] for label, form in enumerate(pair)]
    else:
        examples = [(pair[i % 2], i % 2) for i, pair in enumerate(pairs[: min(limit, len(pairs)) // 2 * 2])]
    rng.shuffle(examples)
    return examples


def write_data(sources: dict[str, dict[str, list[str]]], args: DemoDataArguments) -> dict[str, int]:
    """Splits `sources`, writes text/ and glue/BigramShift/ under the output folder, returns how much of each there is.

    Raises ValueError, before anything is written, when there are too few sentences or files of somebody else are there.
    """
    rng = random.Random(args.seed)
    # Somewhat more than the probe takes: of some sentences no swap is possible.
    train, validation = split(deduplicate(sources), args.dev_examples + args.dev_examples // 8, rng)
    train_text, validation_text = ([s for text in part.values() for s in text] for part in (train, validation))
    originals = {sentence.lower() for sentence in (*train_text, *validation_text)}
    dev_examples = bigram_shift(validation_text, args.dev_examples, rng, originals)
    if len(dev_examples) < args.dev_examples:
        raise ValueError(
            f"the held-out sentences give only {len(dev_examples)} probe examples of the {args.dev_examples} wanted: "
            "read more --packages or lower --dev_examples"
        )
    train_examples = bigram_shift(train_text, args.max_train_examples, rng, originals, both=True)

    files = {}
    for name, documents in (("train", train), ("validation", validation)):
        text = "\n\n".join("\n".join(document) for document in documents.values())
        files[f"text/{name}.txt"] = text + "\n"
    for name, examples in (("train", train_examples), ("dev", dev_examples)):
        rows = "".join(f"{sentence}\t{label}\n" for sentence, label in examples)
        files[f"glue/BigramShift/{name}.tsv"] = "sentence\tlabel\n" + rows
    written = WrittenFiles(args.output_dir)
    written.refuse_others(*files)
    with written.writing(*files):
        for name, content in files.items():
            path = Path(args.output_dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return {
        "train documents": len(train),
        "train sentences": len(train_text),
        "validation documents": len(validation),
        "validation sentences": len(validation_text),
        "probe train examples": len(train_examples),
        "probe dev examples": len(dev_examples),
    }


def main() -> None:
    (args,) = HfArgumentParser(DemoDataArguments).parse_args_into_dataclasses()
    sources = collect(args.packages)
    for source, documents in sources.items():
        print(f"{sum(map(len, documents.values())):7,} sentences from {source}")
    with full_disk_errors(), input_errors():
        counts = write_data(sources, args)
    for what, number in counts.items():
        print(f"{number:7,} {what}")


if __name__ == "__main__":
    main()
