"""Rows of text from the hub or from local files, read by rank 0 and shared, and the tokenizer they go through."""

import logging
import re
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from datasets import Dataset, load_dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.table import InMemoryTable
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nslora_dist import dist, watch
from nslora_dist.bad_rows import Tally
from nslora_dist.column_rows import judge_rows
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.json_rows import is_array, is_by_line, read_json, refuse_other_encodings
from nslora_dist.named import is_local
from nslora_dist.recipe import BaseModelSection
from nslora_dist.recipe_data import PromptSet, Texts

log = logging.getLogger("nslora_dist")

# Reading a local file would report its use to the hub: seconds of waiting per file where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")

_JUDGED = 1000  # rows of a dataset judged at a time
_CHUNK_SIZE = 16 * 2**20

T = TypeVar("T")


def load_tokenizer(section: BaseModelSection, *, embedded: int | None = None) -> PreTrainedTokenizerBase:
    """Loads the base model's tokenizer; it pads with its padding token, or with its end-of-sequence token.

    Args:
        section: the recipe's.
        embedded: rows of the base's embedding; a padding token that was added beyond them is not used.

    Raises:
        UserError: no tokenizer at ``base_model.path``, or one without an end-of-sequence token.
    """
    where = f"base_model.path {section.path}"
    is_local(section.path, key="base_model.path")
    if not Path(section.path).exists() and _means_a_file(section.path):
        raise UserError(f"{where}: no such folder; give a local model folder or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file format at hand raises
        raise UserError(
            f"{where}: no tokenizer could be loaded ({one_line(error)}); "
            "give a local model folder or a hub name that can be reached"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one of a config.json alone
        raise UserError(
            f"{where}: no tokenizer is there, or one that knows no token but special ones; copy tokenizer.json and "
            "tokenizer_config.json of the model into it"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None or (embedded is not None and tokenizer.pad_token_id >= embedded):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Rows:
    """The usable rows of a set, and what became of the others.

    Attributes:
        table: One column a field, all text.
        numbers: (rows,), int64: where each row stands in what was read; ``Tally.place`` puts it into words.
        sizes: (rows,), int64: characters or bytes of its text, roughly.
        read: Rows read, the bad ones included.
        tally: The bad ones, for the caller to warn of (``Tally.warn``) once it has added its own.
    """

    table: Dataset
    numbers: np.ndarray
    sizes: np.ndarray
    read: int
    tally: Tally

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.table)

    def chunks(self, order: np.ndarray, *, rows: int) -> Iterator[tuple[np.ndarray, dict[str, list[str]]]]:
        """The rows in this order, at most ``rows`` and about 16 MiB of text at a time, at least one.

        Yields:
            The rows' indices, and their texts by field.
        """
        start = 0
        while start < len(order):
            chosen = order[start : start + rows]
            fits = int(np.searchsorted(np.cumsum(self.sizes[chosen]), _CHUNK_SIZE, side="right"))
            chosen = chosen[: max(1, fits)]
            found = self.table[chosen]
            yield chosen, {field: list(found[field]) for field in self.table.column_names}
            start += len(chosen)


def load_rows(section: Texts | PromptSet, fields: Sequence[str], *, name: str, filled: Sequence[str] = ()) -> Rows:
    """Opens a hub dataset, a local file or a local folder, and judges every row by the fields that will be read.

    What exists on disk is local, everything else a hub name. One local file is whatever split the recipe names.

    Args:
        section: Path, subset, split and ``on_bad_row``; a set of prompts may keep only its first ``samples`` usable
            rows, and no row past them is judged.
        fields: Columns to keep; every value in them must be text.
        name: The section's place in the recipe, for messages.
        filled: Fields that must not be empty.

    Returns:
        At least one row.

    Raises:
        UserError: nothing there that can be read, no such subset, split or field, no rows, a bad row under
            ``on_bad_row: error``, or none left under ``skip``.
    """
    where = f"{name}.path {section.path}"
    fields = list(dict.fromkeys(fields))
    limit = section.samples if isinstance(section, PromptSet) else None
    path = Path(section.path)
    is_local(section.path, key=f"{name}.path")
    if path.is_file():
        _check_file(section, where=where, name=name)
    rows: Rows | None = None
    if path.is_file() and path.suffix in JSON_SUFFIXES:
        rows = _read_json(section, fields, filled=filled, limit=limit, where=where, name=name)
    if rows is None:
        rows = _read_dataset(section, fields, filled=filled, limit=limit, where=where, name=name)
    if rows.read == 0:
        raise UserError(f"{where}: split '{section.split}' has no rows; give a file or split that has some")
    if len(rows) == 0:
        raise UserError(f"{where}: no usable row is left, of {rows.read}: {rows.tally.summary()}; mend the data")
    if limit is not None and limit > len(rows):
        log.warning("%s: %d rows asked for (samples), %d there: all are used", where, limit, len(rows))
    return rows


def from_rank0(make: Callable[[], T]) -> T:
    """Rank 0's ``make()`` on every rank: what ranks compute from it then agrees, and files are read once.

    Every rank must call it. The others wait for as long as rank 0 computes, or fetches what it reads.

    Raises:
        UserError: on every rank, where rank 0 could not make it.
    """
    made: T | None = None
    with dist.together("reading data"):
        if dist.is_main():
            with watch.working():
                made = make()
    return dist.share(made)  # type: ignore[return-value]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Tokenises texts, with or without the tokenizer's own special tokens (such as a BOS in front)."""
    # verbose=False: lengths are this project's concern, tokenizers warn against a maximum of their own.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up; it is masked and never scored, so any would do."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64, that depends on the seeds alone."""
    return np.random.default_rng([seed % 2**63 for seed in seeds]).permutation(count)


def one_line(error: BaseException | str, *, limit: int = 200) -> str:
    """An error's text without line breaks, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_file(section: Texts | PromptSet, *, where: str, name: str) -> None:
    path = Path(section.path)
    if path.suffix not in BUILDERS:
        raise UserError(f"{where}: files of kind '{path.suffix}' are not read; use {', '.join(BUILDERS)}")
    if section.subset is not None:
        raise UserError(f"{name}.subset {section.subset}: {section.path} is one file and has no subsets; leave it out")
    if path.stat().st_size == 0:
        raise UserError(f"{where}: the file is empty; give one with rows")


def _read_json(
    section: Texts | PromptSet, fields: list[str], *, filled: Sequence[str], limit: int | None, where: str, name: str
) -> Rows | None:
    """A local JSON file's rows; None where it has another shape, which ``datasets`` may know."""
    path = Path(section.path)
    try:
        refuse_other_encodings(path, where=where)
        by_line = is_by_line(path)
        if not by_line and not is_array(path):
            return None
        tally = Tally(section.on_bad_row, where=where, name=name, lines=by_line)
        found = read_json(path, fields, filled=filled, split=section.split, limit=limit, tally=tally)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from error
    # A fingerprint of its own: by default the whole table would be pickled for one.
    table = Dataset(InMemoryTable(found.table), fingerprint=uuid.uuid4().hex)
    kept = slice(limit)
    if limit is not None and len(table) > limit:
        table = table.select(range(limit))
    return Rows(table, found.numbers[kept], found.sizes[kept], found.read, tally)


def _read_dataset(
    section: Texts | PromptSet, fields: list[str], *, filled: Sequence[str], limit: int | None, where: str, name: str
) -> Rows:
    rows = _open(section, where=where, name=name)
    for field in fields:
        if field not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"{where}: no field '{field}'{nearest(field, rows.column_names)}; its fields are {known}")
    rows = rows.select_columns(fields)
    tally = Tally(section.on_bad_row, where=where, name=name, lines=False)
    kept, sizes = array("q"), array("q")
    read = 0
    most = len(rows) if limit is None else limit
    for start in range(0, len(rows), _JUDGED):
        watch.progress(f"{name}, {start} rows read")
        problems, lengths = judge_rows(rows, range(start, min(start + _JUDGED, len(rows))), filled=filled)
        for index, (problem, length) in enumerate(zip(problems, lengths, strict=True), start=start):
            if len(kept) == most:
                break
            read += 1
            if problem is not None:
                tally.add(index, problem)
                continue
            kept.append(index)
            sizes.append(length)
        if len(kept) == most:
            break
    numbers = np.array(kept, np.int64)
    # A selection that is a range stays mapped from disk as it is.
    rows = rows.select(range(len(kept)) if not tally.counts else numbers)
    return Rows(rows, numbers, np.array(sizes, np.int64), read, tally)


def _open(section: Texts | PromptSet, *, where: str, name: str) -> Dataset:
    path = Path(section.path)
    arguments: dict[str, Any] = {"path": section.path, "name": section.subset}
    if path.is_file():
        split = re.match(r"\w+", section.split)  # "train" of "train[:100]"
        files = {split.group() if split else "train": str(path)}
        arguments = {"path": BUILDERS[path.suffix], "data_files": files}
    elif not path.exists() and _means_a_file(section.path):
        raise UserError(f"{where}: no such file or folder; a hub name is written owner/name")
    elif section.path in _PACKAGED_DATASETS_MODULES and not path.exists():
        raise UserError(f"{where}: that is a file format, not a dataset; give a file, or a hub name as owner/name")
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        return load_dataset(**arguments, split=section.split)
    except Exception as error:  # every file format and the hub client raise their own
        raise UserError(_why_unreadable(error, section, where=where, name=name)) from error
    finally:
        datasets.logging.set_verbosity(level)


def _why_unreadable(error: Exception, section: Texts | PromptSet, *, where: str, name: str) -> str:
    said = one_line(error.__cause__ or error)
    if "no data" in said or isinstance(error, StopIteration):
        return f"{where}: split '{section.split}' has no rows; give a file or split that has some"
    if "nknown split" in said or "Unrecognized instruction" in said:
        return f"{name}.split '{section.split}' of {section.path}: {said}"
    if "onfig" in said and ("not found" in said or "missing" in said):
        return f"{name}.subset {section.subset} of {section.path}: {said}"
    if "save_to_disk" in said:
        return f"{where}: is a folder of save_to_disk; write its split with to_parquet or to_json, and name that file"
    if Path(section.path).is_dir() and "JSON" in said:
        return f"{where}: cannot be read as a folder of data files: {said}; name one file, to be told the line"
    if Path(section.path).exists():
        return f"{where}: cannot be read as {Path(section.path).suffix.lstrip('.') or 'a folder of data files'}: {said}"
    return (
        f"{where}: no local file of that name, and no hub dataset could be read ({said}); mend the path or the network"
    )


def _means_a_file(path: str) -> bool:
    """Whether a path that does not exist cannot be a hub name either."""
    return Path(path).suffix in BUILDERS or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or path.startswith(".")
