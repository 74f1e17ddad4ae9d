"""Texts and what is to be written of them, from a user's files or the Hub, as splits of two columns."""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, get_dataset_split_names, load_dataset

from glue_tasks.tables import Table, read_table

from .arguments import PairArguments
from .known_datasets import HubDataset

logger = logging.getLogger(__name__)

SOURCE, TARGET = "source", "target"
# Names that need no flag, if the data have just one of each.
TEXT_COLUMNS = ("text", "document", "article", "dialogue", "source")
SUMMARY_COLUMNS = ("summary", "highlights", "headline", "title", "target")
# Where one column holds all languages, an object of texts.
TRANSLATION = "translation"
FLAGS = "--text_column_name and --summary_column_name"


@dataclass(frozen=True)
class Columns:
    """Where a text stands and what is to be written of it: two columns, or two languages in `TRANSLATION`.

    Attributes:
        target: `None` where there is only the text.
    """

    source: str
    target: str | None
    are_languages: bool = False


def load_pairs(arguments: PairArguments, splits: Mapping[str, bool], cache_dir: str | None = None) -> DatasetDict:
    """Read the splits that a command uses.

    Rows without a text, or without what is to be written, are dropped and counted; but all rows of the test split are
    kept, and its column `target` is missing where not all of its rows have one.

    Args:
        splits: their names, and whether each has to be there.
        cache_dir: where what comes from the Hub is kept.

    Returns:
        Splits with the columns `source` and `target`, texts both; those that there are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: data cannot be read, a split or column is missing, a column may be several or holds no texts, or no
            row is left.
    """
    if arguments.hub_dataset:
        return _from_hub(arguments.hub_dataset, arguments, splits, cache_dir)
    tables = {split: read_table(path) for split, path in arguments.files.items() if split in splits}
    pairs = DatasetDict({split: _of_table(table, split, arguments) for split, table in tables.items()})
    _report_shared(pairs)
    return pairs


def _report_shared(pairs: DatasetDict) -> None:
    """Says how many texts that a user's files score by were trained on as well."""
    known = set(pairs["train"][SOURCE]) if "train" in pairs else set()
    for split in (split for split in pairs if split != "train"):
        shared = sum(text in known for text in pairs[split][SOURCE])
        if shared:
            logger.warning(
                "%d of the %d %s texts are training texts as well; of new text a score on these says nothing.",
                *(shared, len(pairs[split]), split),
            )


def _of_table(table: Table, split: str, arguments: PairArguments) -> Dataset:
    name = str(table.path)
    columns = _columns(name, list(table.columns), arguments, needs_target=split != "test")
    if columns.are_languages and table.columns[TRANSLATION]:
        _refuse_one_language(name, table.columns[TRANSLATION][0], columns, arguments)
    texts = {}
    for kind, column in ((SOURCE, columns.source), (TARGET, columns.target)):
        if column is None:
            continue
        cells = table.columns[TRANSLATION if columns.are_languages else column]
        if columns.are_languages:
            is_needed = kind == SOURCE or split != "test"
            cells = [_in_language(*row, column, is_needed) for row in zip(table.places, cells, strict=True)]
        for place, cell in zip(table.places, cells, strict=True):
            _check_text(place, column, cell)
        texts[kind] = cells[: arguments.sample_limit(split)]
    rows = Dataset.from_dict(texts, features=Features(dict.fromkeys(texts, Value("string"))))
    return _usable_rows(name, rows, split, table.places)


def _from_hub(
    dataset: HubDataset, arguments: PairArguments, splits: Mapping[str, bool], cache_dir: str | None
) -> DatasetDict:
    where = {"path": dataset.name, "revision": dataset.revision}
    try:
        available = get_dataset_split_names(**where, config_name=dataset.config)
    except RuntimeError as error:  # what datasets raises at a loading script
        raise ValueError(
            f"{dataset.name} cannot be loaded from revision {dataset.revision!r}: {error}. If the Hub has converted "
            "it, read that copy with --dataset_revision refs/convert/parquet."
        ) from error
    missing = [split for split, is_needed in splits.items() if is_needed and split not in available]
    if missing:
        raise ValueError(f"{dataset.name} has no split {missing[0]!r}; its splits are {', '.join(available)}.")
    arguments = replace(arguments, text_column_name=dataset.text, summary_column_name=dataset.summary)
    loaded = {}
    for split in (split for split in splits if split in available):
        name, limit = f"{dataset.name}, {split}", arguments.sample_limit(split)
        rows = load_dataset(**where, name=dataset.config, split=split, cache_dir=cache_dir)
        rows = rows if limit is None else rows.take(limit)
        columns = _columns(name, rows.column_names, arguments, needs_target=split != "test")
        loaded[split] = _usable_rows(name, _of_columns(name, rows, columns, split != "test", arguments), split)
    return DatasetDict(loaded)


def _of_columns(name: str, rows: Dataset, columns: Columns, needs_target: bool, arguments: PairArguments) -> Dataset:
    names = {SOURCE: columns.source} | ({TARGET: columns.target} if columns.target else {})
    if columns.are_languages:
        if len(rows):
            _refuse_one_language(name, rows[0][TRANSLATION], columns, arguments)
        return rows.map(
            lambda row: {
                kind: _in_language(name, row[TRANSLATION], lang, kind == SOURCE or needs_target)
                for kind, lang in names.items()
            },
            remove_columns=rows.column_names,
            features=Features(dict.fromkeys(names, Value("string"))),
        )
    for column in names.values():
        dtype = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
        if dtype not in ("string", "large_string"):
            raise ValueError(f"{name}: column {column!r} holds no texts but values of type {dtype}.")
    rows = rows.select_columns(list(names.values()))
    return rows.rename_columns({column: kind for kind, column in names.items()})


def _columns(name: str, columns: Sequence[str], arguments: PairArguments, needs_target: bool) -> Columns:
    """What of these columns holds texts and targets.

    Raises:
        ValueError: a column is missing, or may be several.
    """
    source, target = arguments.text_column_name, arguments.summary_column_name
    if not source and arguments.source_lang and arguments.target_lang:
        source, target = (_called(lang, columns) for lang in (arguments.source_lang, arguments.target_lang))
        if source not in columns and TRANSLATION in columns:
            return Columns(arguments.source_lang, arguments.target_lang, are_languages=True)
    if not source:
        source = _found(name, columns, TEXT_COLUMNS, "the text")
        target = _found(name, columns, SUMMARY_COLUMNS, "what is to be written", needs_target)
    _refuse_the_same(name, source, target, arguments)
    target = target if needs_target or target in columns else None
    missing = [column for column in (source, target) if column and column not in columns]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]!r}; its columns are {', '.join(columns)}.")
    return Columns(str(source), target)


def _refuse_the_same(name: str, source: str | None, target: str | None, arguments: PairArguments) -> None:
    if source is not None and source == target:
        flags = ("source_lang", "target_lang") if arguments.translates else ("text_column_name", "summary_column_name")
        named = " and ".join(f"--{flag} {getattr(arguments, flag)}" for flag in flags)
        raise ValueError(f"{name}: {named} are both {source!r}, and a model would learn to copy; name two.")


def _found(
    name: str, columns: Sequence[str], candidates: Sequence[str], what: str, is_needed: bool = True
) -> str | None:
    found = [column for column in candidates if column in columns]
    if len(found) == 1 or not (found or is_needed):
        return found[0] if found else None
    which = f"has several that could ({', '.join(found)})" if found else f"has none of {', '.join(candidates)}"
    raise ValueError(
        f"Which column of {name} holds {what}? It {which}; its columns are {', '.join(columns)}. Name both "
        f"with {FLAGS}."
    )


def _called(lang: str, names: Container[str]) -> str:
    """What a language is called here: as the tokenizer does (eng_Latn, en_XX), or else as everybody does."""
    return lang if lang in names else lang.partition("_")[0]


def _refuse_one_language(name: str, texts: Any, columns: Columns, arguments: PairArguments) -> None:
    """As `_refuse_the_same`, of the first cell of `TRANSLATION`."""
    if isinstance(texts, Mapping):
        source, target = (_called(str(lang), texts) for lang in (columns.source, columns.target))
        _refuse_the_same(name, source, target, arguments)


def _in_language(place: str, texts: Any, lang: str, is_needed: bool) -> Any:
    """The text of a cell of `TRANSLATION` in one language; of an empty cell nothing, as of one in a column of texts."""
    if texts is None:
        return None
    languages = texts if isinstance(texts, Mapping) else {}
    name = _called(lang, languages)
    if name not in languages and (is_needed or not languages):
        known = ", ".join(languages) or "none"
        raise ValueError(f"{place}: the column {TRANSLATION!r} has no text in {lang!r}; its languages are {known}.")
    return languages.get(name)


def _check_text(place: str, column: str, cell: Any) -> None:
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"{place}: column {column!r} holds {str(cell)[:50]!r}, which is no text.")
    try:
        (cell or "").encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can have it
        raise ValueError(f"{place}: column {column!r} holds no valid text ({error}).") from error


def _usable_rows(name: str, rows: Dataset, split: str, places: Sequence[str] | None = None) -> Dataset:
    """The rows that can be used, and in the log what was dropped.

    Args:
        places: what a message calls the rows (default: their numbers).
    """
    blank = [
        number
        for number, cells in enumerate(zip(*(rows[column] for column in rows.column_names), strict=True))
        if not all(cell and cell.strip() for cell in cells)
    ]
    if split == "test":
        if TARGET in rows.column_names and not all(target and target.strip() for target in rows[TARGET]):
            logger.warning("%s: not every row says what is to be written, so that what is written gets no score.", name)
            rows = rows.remove_columns(TARGET)
        return rows
    kept = sorted(set(range(len(rows))) - set(blank))
    if not kept:
        raise ValueError(f"{name} holds no row to use: none of {len(rows)} has a text and what is to be written of it.")
    first = "" if not blank else places[blank[0]] if places else f"row {blank[0] + 1}"
    logger.log(
        logging.WARNING if blank else logging.INFO,
        "%s: %d rows read, %d used, %d dropped%s.",
        *(name, len(rows), len(kept), len(blank)),
        f" without a text or without what is to be written (first: {first})" if blank else "",
    )
    return rows if not blank else rows.select(kept)
