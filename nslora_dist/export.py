"""The adapter on disk: a plain LoRA on the original base in PEFT's format, with a card that says what it disturbs.

Nothing of this project is needed to load it: PEFT, vLLM and merging tools read the folder as any other LoRA.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nslora_dist import dist, watch
from nslora_dist.adapter import AdaptedLinear, adapted_linears
from nslora_dist.artifacts import load_tensors, read_json, save_tensors, write_text
from nslora_dist.card import model_card
from nslora_dist.engines.base import Engine
from nslora_dist.errors import UserError
from nslora_dist.folders import replace_folder
from nslora_dist.null_lora import NullLoraLinear, confined_factors
from nslora_dist.provenance import CONFIG_FILE, WEIGHTS_FILE, verify_files
from nslora_dist.redact import redact

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's ``init_lora_weights`` that leave the base as it is; PiSSA, CorDA, OLoRA, LoRA-GA and LoftQ take part of it."""
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Factors:
    """One module's ΔW = scale · B A on the original base, before the scale.

    Attributes:
        lora_a: (r, d_in), the down-projection.
        lora_b: (d_out, r), the up-projection.
    """

    lora_a: Tensor
    lora_b: Tensor

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.lora_a.shape[0]


def residual_factors(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Factors:
    """ΔW = B A - B₀ A₀ as factors of rank 2r, without rounding: A' = [A; A₀], B' = [B, -B₀] (docs/methods.md §1a).

    The scale stays what it was: ``scale · B' A'`` is the update. Tensors of two dtypes meet in the wider one.

    Args:
        a: (r, d_in), trained or frozen.
        b: (d_out, r), trained.
        a0: (r, d_in), as initialised.
        b0: (d_out, r), as initialised.
    """
    return Factors(torch.cat([a, a0]), torch.cat([b, -b0], dim=1))


def gather_factors(
    engine: Engine, dtype: torch.dtype, *, null_bases: Mapping[str, Tensor] | None = None
) -> dict[str, Factors]:
    """Every module's factors, gathered one module at a time; collective, and filled on rank 0 alone.

    Args:
        engine: holds the adapted model, sharded or not.
        dtype: the one the update was computed in: more digits would claim what no forward pass has seen.
        null_bases: for Null-LoRA, on rank 0: ``<module>.right`` and ``<module>.left`` in float32. Its factors are
            projected once more, in float64, and kept in float32: rounded to 8 bits they would leave the null space.
    """
    factors: dict[str, Factors] = {}
    for name, module in adapted_linears(engine.model).items():
        watch.progress(name)
        a, b = engine.gather(module.lora_A), engine.gather(module.lora_B)
        if isinstance(module, NullLoraLinear):
            if dist.is_main():
                assert null_bases is not None
                right, left = null_bases[f"{name}.right"], null_bases[f"{name}.left"]
                whole_a, whole_b = confined_factors(a.double(), b.double(), right, left)
                factors[name] = Factors(whole_a.float(), whole_b.float())
            continue
        assert isinstance(module, AdaptedLinear)
        a0 = a if module.start_A is None else engine.gather(module.start_A)
        b0 = None if module.start_B is None else engine.gather(module.start_B)
        if dist.is_main():
            made = Factors(a, b) if b0 is None else residual_factors(a, b, a0, b0)
            factors[name] = Factors(made.lora_a.to(dtype), made.lora_b.to(dtype))
    return factors


def fitting_targets(targets: Sequence[str], factors: Iterable[str], left_out: Iterable[str]) -> list[str]:
    """``target_modules`` for PEFT where some modules that a target fits have no factors: their others by full name."""
    missing = {name.rsplit(".", 1)[1] for name in left_out}
    whole = [target for target in targets if target not in missing]
    return whole + [name for name in factors if name.rsplit(".", 1)[1] in missing]


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    *,
    scale: float,
    base_model: str,
    revision: str | None,
    target_modules: Sequence[str],
    card: Mapping[str, Any],
    task_type: str | None = "CAUSAL_LM",
    location: Path | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``, all or nothing.

    Dtypes are kept. Ranks are read off the tensors and may differ: ``rank_pattern`` and ``alpha_pattern`` then keep
    ``alpha / rank`` equal to ``scale`` everywhere.

    Args:
        folder: replaced whole if it exists.
        factors: module name in the Hugging Face model (``model.layers.0.self_attn.q_proj``) to its factors.
        scale: ΔW = scale · B A; ``lora_alpha`` is written as scale · rank.
        base_model: hub name or folder of the original base.
        revision: the base's revision on the hub.
        target_modules: full names or last parts (``q_proj``), as in the recipe.
        card: what the model card tells, every key optional: ``name``; ``method``, ``form``, ``a_init``, ``freeze_a``,
            ``quantization`` as in the recipe; ``sources`` and ``probes`` ({name: {path, sequences, tokens, weight}});
            ``leak``, ``interference``, ``evaluation`` as in ``report.json``; ``versions`` ({package: version});
            ``auto_class``, the transformers class that loads the base.
        task_type: PEFT's name of the kind of model; None for one whose heads PEFT is to leave alone.
        location: where the folder will lie in the end, for the card; ``folder`` itself by default.
        more: writes further files into the folder before it takes its place.

    Raises:
        ValueError: a tensor is empty, not 2-D or does not fit its partner, a module is outside ``target_modules``, or
            a target has no module; the message names it.
        TypeError: ``target_modules`` is one text instead of a list.
        UserError: no factors at all, or a value that is not finite.
    """
    from peft import LoraConfig, TaskType

    if not factors:
        raise UserError(f"{folder}: no module was adapted, so there is nothing to export; check adapter.target_modules")
    for module, pair in factors.items():
        _check(module, pair)
    _check_targets(factors, target_modules)

    # The commonest rank is the rule and the others the exceptions, so that an even adapter needs no patterns: not every
    # reader knows them.
    rank = Counter(pair.rank for pair in factors.values()).most_common(1)[0][0]
    uneven = {module: pair.rank for module, pair in factors.items() if pair.rank != rank}
    config = LoraConfig(
        task_type=None if task_type is None else TaskType(task_type),
        inference_mode=True,
        base_model_name_or_path=base_model,
        revision=revision,
        r=rank,
        lora_alpha=_alpha(scale, rank),  # type: ignore[arg-type]  # annotated int, used as any number
        target_modules=list(target_modules),
        rank_pattern=uneven,
        alpha_pattern={module: _alpha(scale, rank) for module, rank in uneven.items()},
    )
    tensors: dict[str, Tensor] = {}
    for module, pair in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.lora_a
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.lora_b
    ranks = sorted({pair.rank for pair in factors.values()})
    text = redact(
        model_card(location or folder, card, base_model=base_model, revision=revision, ranks=ranks, scale=scale)
    )
    with replace_folder(folder) as partial:
        config.save_pretrained(str(partial))
        save_tensors(partial / WEIGHTS_FILE, tensors)
        write_text(partial / "README.md", text)
        if more is not None:
            more(partial)


def read_adapter(folder: Path, *, heads: dict[str, Tensor] | None = None) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Reads a LoRA folder in PEFT's format, this project's or another's.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        heads: is given the whole modules that PEFT saved beside the factors (``modules_to_save``: the head of a
            classifier), by their names in the Hugging Face model; without it such modules are an error.

    Returns:
        Module name to factors, on the CPU in the file's dtype, and the contents of ``adapter_config.json``.

    Raises:
        UserError: a file is missing, damaged or not the one that ``nslora.json`` describes, or it holds more than two
            factors a module (DoRA, biases, saved modules, embeddings): what these add would be lost without a word.
    """
    verify_files(folder)
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG_FILE}: peft_type is not LORA; only LoRA adapters can be read")
    _check_config(folder / CONFIG_FILE, config)
    path = folder / WEIGHTS_FILE
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        match = KEY.fullmatch(key)
        if match is None and heads is not None and _is_saved_module(key, config):
            heads[key.removeprefix("base_model.model.")] = tensor
            continue
        if match is None and key.endswith(".base_layer.weight"):
            raise UserError(
                f"{path}: '{key}' is a copy of the base's own layer, which PEFT keeps beside an adapted head or "
                "embedding; save the adapter again with save_pretrained(..., save_embedding_layers=False)"
            )
        if match is None:
            raise UserError(f"{path}: '{key}' is no LoRA factor of a linear layer; only plain LoRA can be read")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise UserError(f"{path}: holds no factors; export the adapter again")
    factors = {}
    for module, pair in sides.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {module} has only lora_{next(iter(pair))}; export the adapter again")
        factors[module] = Factors(pair["A"], pair["B"])
        try:
            _check(module, factors[module])
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
    return factors, config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """What is read of a config is of the kind that PEFT writes."""
    names = {"base_model_name_or_path", "revision", "task_type"}
    patterns = {"rank_pattern", "alpha_pattern"}
    for key in (*names, *patterns, "target_modules", "modules_to_save"):
        value = config.get(key)
        if key in patterns:
            fits = isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())
        elif key in names:
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
            fits = fits or (key == "target_modules" and isinstance(value, str))
        if value is not None and not fits:
            raise UserError(f"{path}: its {key} is nothing that PEFT writes; fetch or export the adapter again")
    for pattern in config.get("alpha_pattern") or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: '{pattern}' in alpha_pattern is no regular expression ({error})") from error


def _is_saved_module(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a module that ``modules_to_save`` names by its whole name or its last part."""
    module = key.removeprefix("base_model.model.").rpartition(".")[0]
    saved = config.get("modules_to_save") or []
    return any(f".{name}." in f".{module}." for name in saved)


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale in ΔW = scale · B A that PEFT gives ``module`` under ``adapter_config.json``'s contents."""
    alpha = config["lora_alpha"]
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):  # PEFT's own rule: the first that fits the end of the name
            alpha = value
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def changes_base(start: object) -> bool:
    """Whether PEFT's ``init_lora_weights`` takes the adapter's start out of the base's weights, or might."""
    return (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS


def _alpha(scale: float, rank: int) -> float:
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha  # PEFT's own files hold whole numbers as integers


def _check(module: str, pair: Factors) -> None:
    for side, tensor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b)):
        if tensor.numel() == 0:
            raise ValueError(f"{module}: {side} is empty, {tuple(tensor.shape)}: a sharded tensor was not gathered")
        if tensor.ndim != 2:
            raise ValueError(f"{module}: {side} has shape {tuple(tensor.shape)}; a matrix is needed")
    if pair.lora_a.shape[0] != pair.lora_b.shape[1]:
        raise ValueError(
            f"{module}: lora_A {tuple(pair.lora_a.shape)} and lora_B {tuple(pair.lora_b.shape)} differ in their rank"
        )
    for side, tensor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b)):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{module}: {side} has values that are not finite; lower train.learning_rate and train again"
            )


def _check_targets(factors: Mapping[str, Factors], target_modules: Sequence[str]) -> None:
    """PEFT adapts every module that a target fits and no other: both sides have to agree with the factors."""
    if isinstance(target_modules, str):
        raise TypeError(f"target_modules is the text '{target_modules}'; give a list of names")
    unused = set(target_modules)
    for module in factors:
        fitting = {target for target in target_modules if f".{module}".endswith(f".{target}")}
        if not fitting:
            raise ValueError(f"{module}: none of target_modules {list(target_modules)} fits it; PEFT would not load it")
        unused -= fitting
    if unused:
        raise ValueError(f"target module '{min(unused)}' has no factors; PEFT would start it at random")
