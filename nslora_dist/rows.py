"""Rows of text from the hub or from local files, read by rank 0 and shared, and the tokenizer they go through."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value, load_dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nslora_dist import dist
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.named import is_local
from nslora_dist.recipe import BaseModelSection, PromptSet, Texts

log = logging.getLogger("nslora_dist")

# Reading a local file would report its use to the hub: seconds of waiting per file where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}

T = TypeVar("T")


def load_tokenizer(section: BaseModelSection) -> PreTrainedTokenizerBase:
    """Loads the base model's tokenizer; it pads with its padding token, or with its end-of-sequence token.

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
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_rows(section: Texts | PromptSet, fields: Sequence[str], *, name: str) -> Dataset:
    """Opens a hub dataset, a local file or a local folder, and checks the fields that will be read.

    What exists on disk is local, everything else a hub name. One local file is whatever split the recipe names.

    Args:
        section: Path, subset and split; a set of prompts may keep only its first ``samples`` rows.
        fields: Columns to keep; every value in them must be text.
        name: The section's place in the recipe, for messages.

    Returns:
        A dataset of at least one row with exactly these columns.

    Raises:
        UserError: nothing there that can be read, no such subset, split or field, no rows, or a row that is not text.
    """
    where = f"{name}.path {section.path}"
    rows = _open(section, where=where, name=name)
    for field in dict.fromkeys(fields):
        if field not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"{where}: no field '{field}'{nearest(field, rows.column_names)}; its fields are {known}")
    if len(rows) == 0:
        raise UserError(f"{where}: split '{section.split}' has no rows; give a file or split that has some")
    rows = rows.select_columns(list(dict.fromkeys(fields)))
    if isinstance(section, PromptSet) and section.samples is not None:
        if section.samples > len(rows):
            log.warning("%s: %d rows asked for (samples), %d there: all are used", where, section.samples, len(rows))
        rows = rows.select(range(min(section.samples, len(rows))))
    for field in rows.column_names:
        _check_text(rows, field, where=where)
    return rows


def from_rank0(make: Callable[[], T]) -> T:
    """Rank 0's ``make()`` on every rank: what ranks compute from it then agrees, and files are read once.

    Every rank must call it.

    Raises:
        UserError: on every rank, where rank 0 could not make it.
    """
    made: T | None = None
    with dist.together("reading data"):
        if dist.is_main():
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


def _open(section: Texts | PromptSet, *, where: str, name: str) -> Dataset:
    path = Path(section.path)
    is_local(section.path, key=f"{name}.path")
    arguments: dict[str, Any] = {"path": section.path, "name": section.subset}
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(f"{where}: files of kind '{path.suffix}' are not read; use {', '.join(BUILDERS)}")
        if section.subset is not None:
            raise UserError(
                f"{name}.subset {section.subset}: {section.path} is one file and has no subsets; leave it out"
            )
        if path.stat().st_size == 0:
            raise UserError(f"{where}: the file is empty; give one with rows")
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
    if Path(section.path).exists():
        return f"{where}: cannot be read as {Path(section.path).suffix.lstrip('.') or 'a folder of data files'}: {said}"
    return (
        f"{where}: no local file of that name, and no hub dataset could be read ({said}); mend the path or the network"
    )


def _means_a_file(path: str) -> bool:
    """Whether a path that does not exist cannot be a hub name either."""
    return Path(path).suffix in BUILDERS or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or path.startswith(".")


def _check_text(rows: Dataset, field: str, *, where: str) -> None:
    feature = rows.features[field]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view"):
        column = rows.with_format("arrow")[:][field]
        index = pc.index(pc.is_null(column), True).as_py() if column.null_count else -1
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:  # the JSON reader lets other encodings through, up to the first access
            raise UserError(f"{where}: field '{field}' is not UTF-8 throughout; convert the file to UTF-8") from error
    else:
        index = next((i for i, row in enumerate(rows) if not isinstance(row[field], str)), -1)
    if index < 0:
        return
    value = rows[index][field]
    found = "missing or null" if value is None else f"{type(value).__name__} {one_line(repr(value), limit=40)}"
    raise UserError(
        f"{where}: row {index} (the first is 0): field '{field}' is {found}, not text; correct or remove that row"
    )
