"""Which of lm-eval's tasks a recipe names, loaded and looked through before anything is trained."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nslora_dist.errors import UserError
from nslora_dist.recipe_lm_eval import LmEvalSection

log = logging.getLogger("nslora_dist")
KINDS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")
GREEDY = {
    *("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "use_cache"),
}
"""What a task may say of generation that greedy decoding obeys, or that has no meaning for it."""
DEFAULT_NEW_TOKENS = 256
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("penalty_alpha", "token_healing"), 0),
    **dict.fromkeys(("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("watermarking_config", "dola_layers", "max_new_tokens", "max_time", "stop_strings")),
}
"""What else of a ``generation_config.json`` changes transformers' answers without sampling → where it does not."""


def load_tasks(section: LmEvalSection, *, most: Callable[[], int]) -> Mapping[str, Any]:
    """lm-eval's ``TaskDict`` of the section's tasks, their data sets included.

    Args:
        section: the recipe's.
        most: gives the tokens that the model takes.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, runs code without leave, cannot be loaded, or samples.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluation.lm_eval: lm-eval cannot be imported ({error}); pip install -e '.[lm-eval]' in the clone, "
            "or go without it: evaluation.lm_eval=null"
        ) from error
    # lm-eval warns of every model that it did not load itself, and of its own duplicate names.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = section.include_path
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"evaluation.lm_eval.include_path {folder}: no such folder; give one with task files (*.yaml)")
    manager = None
    if folder is not None:  # lm-eval's own 14,000 names take their time to read
        manager = TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not set(section.tasks) <= set(manager.task_index):
        manager = TaskManager(include_path=folder)
    for name in section.tasks:
        _known(name, manager.task_index, folder)
        if not section.allow_code_execution:
            _harmless(name, manager.task_index)
    loaded = _load(section, manager)
    for name, task in loaded["tasks"].items():
        _check(name, task, section, most)
        _few_shots(task, section)
    return loaded


def _known(name: str, index: Mapping[str, Any], folder: str | None) -> None:
    if name in index:
        return
    near = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
    meant = f" (did you mean {', '.join(near)}?)" if near else ""
    also = "" if folder is None else f", nor does {folder}"
    raise UserError(
        f"evaluation.lm_eval.tasks: lm-eval has no task, group or tag '{name}'{also}{meant}; "
        "lm_eval ls tasks lists them all"
    )


def _leaves(what: Any, index: Mapping[str, Any], seen: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks of a task, group or tag, by name or spelled out, as their files say; nothing of them is loaded."""
    if isinstance(what, Mapping):
        members = what.get("task")
        if isinstance(members, list):
            for member in members:
                yield from _leaves(member, index, seen)
            return
        yield str(members), what
        what = members  # a task in a group may be another's, with changes
    if not isinstance(what, str) or what in seen or what not in index:
        return
    seen.add(what)
    entry = index[what]
    if entry.cfg is None:  # a tag
        for member in sorted(entry.tags):
            yield from _leaves(member, index, seen)
    elif "group" in entry.cfg:
        yield from _leaves(entry.cfg, index, seen)
    else:
        yield what, entry.cfg


def _harmless(name: str, index: Mapping[str, Any]) -> None:
    for leaf, config in _leaves(name, index, set()):
        if config.get("unsafe_code"):
            _refuse(name, leaf)


def _refuse(name: str, leaf: str) -> None:
    task = name if leaf == name else f"{name} (its task {leaf})"
    raise UserError(
        f"evaluation.lm_eval.tasks: {task} runs programs that the model writes on this machine; leave it out, or set "
        "evaluation.lm_eval.allow_code_execution: true where that can do no harm, in a container without network say"
    )


def _load(section: LmEvalSection, manager: Any) -> Mapping[str, Any]:
    """Task by task first, so that the message can name the one at fault."""
    allowed = "HF_ALLOW_CODE_EVAL" in os.environ
    if section.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read when the task's own code is loaded
    built = []
    try:
        for name in section.tasks:
            try:
                found = manager.load([name])
            except Exception as error:  # a data set, a package or a file that is missing, in a task's own words
                said = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"evaluation.lm_eval.tasks: {name} cannot be loaded ({said[:300]}); it may need its data set from "
                    "the hub or another package: run the same once where they can be had, or leave it out"
                ) from error
            built.append(found)
    finally:
        if not allowed:
            os.environ.pop("HF_ALLOW_CODE_EVAL", None)
    whole: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for found in built:
        twice = sorted(set(found["tasks"]) & set(whole["tasks"]))
        if twice:
            raise UserError(f"evaluation.lm_eval.tasks: {twice[0]} is in two of the groups named; name one of them")
        for key in whole:
            whole[key].update(found.get(key) or {})
    return whole


def _check(name: str, task: Any, section: LmEvalSection, most: Callable[[], int]) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not section.allow_code_execution:
        _refuse(name, name)
    if task.OUTPUT_TYPE not in KINDS or getattr(task, "MULTIMODAL", False):
        raise UserError(f"evaluation.lm_eval.tasks: {name} asks for more than text ({task.OUTPUT_TYPE}); leave it out")
    if task.OUTPUT_TYPE != "generate_until":
        return
    wanted = task.config.generation_kwargs or {}
    beyond = sorted(set(wanted) - GREEDY) or (["do_sample"] if wanted.get("do_sample") else [])
    if beyond or (wanted.get("do_sample") is None and float(wanted.get("temperature") or 0.0) > 0.0):
        raise UserError(
            f"evaluation.lm_eval.tasks: {name} sets {beyond[0] if beyond else 'temperature'} for generation, and "
            "answers are decoded greedily here; leave it out, or take a copy of its file without that into "
            "evaluation.lm_eval.include_path"
        )
    new = next((int(wanted[key]) for key in wanted if key.startswith("max_")), DEFAULT_NEW_TOKENS)
    if new >= most():
        raise UserError(
            f"evaluation.lm_eval.tasks: {name} generates up to {new} tokens, and the model takes {most()} in all; set "
            "generation_kwargs.max_gen_toks lower in a copy of its file in evaluation.lm_eval.include_path"
        )


def warn_of_settings(generation: Any, tasks: Mapping[str, Any]) -> None:
    """Names what lm-eval's own model would take over from the base into its answers, through ``generate``."""
    found = {key: getattr(generation, key, None) for key in NEUTRAL}
    kept = [f"{key}={value!r}" for key, value in found.items() if value not in (None, NEUTRAL[key], [])]
    asked = [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"]
    if kept and asked:
        log.warning(
            "evaluation.lm_eval: the base's generation settings (generation_config.json) have %s; answers are decoded "
            "without that here, so that the figures of %s may not be those of lm_eval --model hf",
            ", ".join(kept),
            ", ".join(asked),
        )


def _few_shots(task: Any, section: LmEvalSection) -> None:
    """As lm-eval's own command does: a task that is made for no examples keeps none."""
    own = task.get_config("num_fewshot")
    if section.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=section.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
