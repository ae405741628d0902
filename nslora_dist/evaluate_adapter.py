"""``launch/evaluate.py``: any LoRA folders on a recipe's base → what they learned, kept and disturb, side by side."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from nslora_dist import dist, watch
from nslora_dist.adapter_set import AdapterSet, put_to_work
from nslora_dist.artifacts import write_json
from nslora_dist.base_config import check_context, check_tokens, context_of, load_config
from nslora_dist.base_files import BaseFiles, locate
from nslora_dist.base_model import build_empty, torch_dtype
from nslora_dist.base_weights import fill_unit
from nslora_dist.calibration_data import calibration_texts
from nslora_dist.data import load_tokenizer
from nslora_dist.effects import divergence, interference, measure, summarise
from nslora_dist.engines import start_engine
from nslora_dist.engines.base import Job, adapter_dtype
from nslora_dist.errors import UserError, unwritable
from nslora_dist.evaluate import EvaluationSets, evaluate
from nslora_dist.input_groups import LinearShape, input_groups
from nslora_dist.merging.tasks import StoredLora, read_stored
from nslora_dist.plan.check import check
from nslora_dist.plan.shapes import shapes_of
from nslora_dist.provenance import read_provenance
from nslora_dist.recipe import Recipe
from nslora_dist.redact import redact_all
from nslora_dist.report import strict, summary_table

log = logging.getLogger("nslora_dist")


def run_evaluation(recipe: Recipe, device: torch.device, *, adapter: Sequence[str], output: str) -> None:
    """Evaluates adapters on the recipe's base, prints one table and writes it as JSON; collective, rank 0 writes.

    The base is loaded once, with all adapters beside each other. Accuracy on the recipe's adaptation and retention
    sets, and interference and divergence on its calibration texts by forward passes (docs/methods.md §1c, §1f): what
    training reports.

    Args:
        recipe: base, engine, evaluation sets and calibration texts; what it says of training is not used.
        device: this rank's.
        adapter: ``FOLDER`` or ``NAME=FOLDER`` of each.
        output: the JSON file.

    Raises:
        UserError: whatever is wrong with the recipe, an adapter or ``output``; nothing is written then.
        Preempted: a rank was asked to stop; nothing is written then either.
    """
    started = time.perf_counter()
    watch.saved("the beginning, for nothing is written before the last adapter is done")
    folders = named_folders(adapter)
    target = Path(output)
    with dist.together("reading the adapters"):
        _claim(target)
        base = locate(recipe.base_model)
        checkpoint = BaseFiles(base)
        config = load_config(recipe.base_model)
        check_context(config, "calibration.sequence_length", recipe.calibration.sequence_length)
        shapes = linear_shapes(recipe, config)
        stored = {name: read_fitting(name, folder, shapes) for name, folder in folders.items()}
        described = _describe(stored, folders, checkpoint) if dist.is_main() else {}
        check(
            recipe,
            "load",
            world_size=dist.world_size(),
            device=device,
            ranks_per_node=dist.ranks_per_node(),
            shapes=shapes_of(recipe, config),
        )
    tokenizer = load_tokenizer(recipe.base_model, embedded=config.vocab_size)
    texts = calibration_texts(recipe.calibration, tokenizer)
    sets = EvaluationSets.load(recipe.evaluation, tokenizer, base=base, context=context_of(config))
    with dist.together("looking at the data"):
        largest = {text.place: text.largest_token for text in texts} | sets.largest_tokens
        check_tokens(config, recipe.base_model.path, largest)
    engine = start_engine(make_set_job(recipe, config, checkpoint, shapes, stored, device=device), recipe)
    scores, disturbed = {"base": evaluate(engine, sets.before_training(), device=device)}, {}
    for name, own in stored.items():
        put_to_work(engine.model, name)
        scores[name] = evaluate(engine, sets, device=device)
        size = recipe.calibration.batch_size
        effects = measure(engine, texts, batch_size=size, device=device)
        found = interference(effects)
        # The set's other modules belong to other adapters, and their zeros to no mean.
        mine = {text: {m: value for m, value in values.items() if m in own.factors} for text, values in found.items()}
        disturbed[name] = summarise(mine, texts, divergence(effects))
    engine.close()
    report = redact_all(
        strict(
            {
                "recipe": recipe.model_dump(mode="json"),
                "engine": recipe.engine.name,
                "world_size": dist.world_size(),
                "quantization": recipe.base_model.quantization,
                "adapters": described,
                "evaluation": scores,
                "interference_by_arm": disturbed,
                "seconds": time.perf_counter() - started,
            }
        )
    )
    with dist.together("writing the evaluation"):
        if dist.is_main():
            print(summary_table(report))
            try:
                write_json(target, report)
            except OSError as error:
                raise unwritable(f"--output {target}", error) from error
            print(f"evaluation {target}")


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER``, then named by its last part, in order.

    Raises:
        UserError: a name is empty, taken or given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        folder = Path(path) if equals and not Path(text).is_dir() else Path(text)
        name = name if folder != Path(text) else folder.resolve().name
        if not name or name == "base":
            raise UserError(f"--adapter {text}: the name '{name}' is empty or taken; give NAME=FOLDER")
        if name in found:
            raise UserError(f"--adapter {text}: {found[name]} has the name '{name}' already; give NAME=FOLDER")
        found[name] = folder
    return found


def _claim(target: Path) -> None:
    """Makes the folder of the file to come, before hours of work for it."""
    if target.exists() or target.is_symlink():
        raise UserError(f"--output {target}: exists already; give another path, or move it away")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"--output {target}", error) from error


def linear_shapes(recipe: Recipe, config: PreTrainedConfig) -> dict[str, LinearShape]:
    """Every linear in the base's decoder blocks, by name."""
    groups = input_groups(build_empty(recipe.base_model, config))
    return {shape.name: shape for group in groups for shape in group.modules}


def read_fitting(name: str, folder: Path, shapes: Mapping[str, LinearShape]) -> StoredLora:
    """Reads an adapter and compares its modules with the base's linears.

    Raises:
        UserError: no readable LoRA folder, or an adapter of another base; the message names the module.
    """
    where = f"--adapter {name}={folder}"
    stored = read_stored(where, folder)
    if stored.heads:
        raise UserError(f"{where}: replaces {min(stored.heads)} as a whole (modules_to_save); only low ranks are read")
    for module, pair in stored.factors.items():
        if module not in shapes:
            raise UserError(f"{where}: adapts {module}, and the base's blocks have no such linear; is it another's?")
        shape = shapes[module]
        own, bases = (pair.lora_b.shape[0], pair.lora_a.shape[1]), (shape.out_features, shape.in_features)
        if own != bases:
            raise UserError(f"{where}: its {module} is {own} and the base's {bases}; it is an adapter of another base")
    return stored


def make_set_job(
    recipe: Recipe,
    config: PreTrainedConfig,
    checkpoint: BaseFiles,
    shapes: Mapping[str, LinearShape],
    stored: Mapping[str, StoredLora],
    *,
    device: torch.device,
) -> Job:
    """The base with every adapter beside each other; modules that none adapts stay plain."""
    model = build_empty(recipe.base_model, config)
    dtype = adapter_dtype(recipe, torch_dtype(recipe.base_model))
    for module, shape in shapes.items():
        mine = {name: own.factors[module] for name, own in stored.items() if module in own.factors}
        if mine:
            made = AdapterSet(
                model.get_submodule(module),
                name=module,
                in_features=shape.in_features,
                out_features=shape.out_features,
                ranks={name: pair.rank for name, pair in mine.items()},
                scales={name: stored[name].scales[module] for name in mine},
                dtype=dtype,
            )
            model.set_submodule(module, made)

    def fill(unit: nn.Module, name: str) -> None:
        fill_unit(unit, name, checkpoint, device=device)
        for own in [m for m in unit.modules() if isinstance(m, AdapterSet)]:
            factors = {adapter: stored[adapter].factors[own.name] for adapter in own.spans}
            own.fill({n: (pair.lora_a.to(dtype), pair.lora_b.to(dtype)) for n, pair in factors.items()}, device=device)

    return Job(model=model, fill=fill, device=device)


def _describe(
    stored: Mapping[str, StoredLora], folders: Mapping[str, Path], checkpoint: BaseFiles
) -> dict[str, dict[str, Any]]:
    """Path, modules, ranks, and whether it was made on this base: None where its folder does not say."""
    described: dict[str, dict[str, Any]] = {}
    for name, own in stored.items():
        provenance = read_provenance(folders[name])
        same = None if provenance is None else provenance.base == checkpoint.fingerprint()
        if same is False:
            assert provenance is not None
            log.warning("--adapter %s: was made on another base, %s", name, provenance.base_model)
        ranks = sorted({pair.rank for pair in own.factors.values()})
        described[name] = {
            "path": str(folders[name]),
            "modules": len(own.factors),
            "ranks": ranks,
            "same_base": same,
        }
    return described
