"""The model card of an adapter, and the tables it shares with the report."""

import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ARM_LABELS = {
    "base": "base",
    "lora": "plain LoRA",
    "lora_frozen_a": "LoRA, random A frozen",
    "null_space": "null-space adapter",
    "null_lora": "Null-LoRA",
}
METHODS = {
    "lora_null": "LoRA-Null (arXiv 2503.02659): the update is confined to, or starts from, the directions that the "
    "calibration activations hardly use",
    "lora": "LoRA",
    "null_lora": "Null-LoRA (arXiv 2512.15233): the update lies in the null space of the weight itself on both sides, "
    "one half of each factor frozen",
}
TAGS = {"lora_null": ["lora-null", "null-space"], "null_lora": ["null-lora", "null-space"]}
FORMS = {
    "delta": "delta: A stays at its initial value and B - B0 is trained from zero on the untouched base",
    "residual": "residual: trained on W - B0 A0 and exported exactly, as B A - B0 A0, at twice the rank",
}
INTERFERENCE = (
    "‖ΔW X‖ / ‖W X‖: how far the adapter moves what each layer did on a text, at the base's own activations. "
    "Divergence: KL(base ‖ adapted) of the next token, in nats: what all layers come to together."
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned and the others right-aligned."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, rule, *rows]
    )


def percent(value: float | None) -> str:
    """A share in 0..1 as ``97.5%``; "–" for what was not measured."""
    return "–" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    """Three significant digits; "–" for what was not measured, or is no number."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def arm_label(arm: str) -> str:
    """An evaluated arm's name as a person reads it."""
    return ARM_LABELS.get(arm, arm.replace("_", " "))


def ordered_arms(evaluation: Mapping[str, Any]) -> list[str]:
    """The evaluated arms, the base first and the others as they were evaluated."""
    return sorted(evaluation, key=lambda arm: arm != "base")


def evaluation_table(evaluation: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of adaptation and retention, one row an arm, the base first; as in ``report.json``."""
    kept = list(dict.fromkeys(name for arm in evaluation.values() for name in arm.get("retention_by") or {}))
    header = ["", "task accuracy", "knowledge retention", *kept]
    rows = []
    for arm in ordered_arms(evaluation):
        scores = evaluation[arm]
        by_name = scores.get("retention_by") or {}
        shares = [scores.get("adaptation"), scores.get("retention"), *(by_name.get(name) for name in kept)]
        rows.append([arm_label(arm), *map(percent, shares)])
    return header, rows


def lm_eval_table(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown of lm-eval's figures, one row a task and metric, one column an arm; nothing where none were measured."""
    arms = [arm for arm in ordered_arms(evaluation) if evaluation[arm].get("lm_eval")]
    measured = {arm: evaluation[arm]["lm_eval"] for arm in arms}
    tasks: dict[str, dict[str, Any]] = {task: entry for found in measured.values() for task, entry in found.items()}

    def cell(arm: str, task: str, metric: str) -> str:
        found = measured[arm].get(task, {}).get("metrics", {}).get(metric, {})
        error = found.get("stderr")
        return number(found.get("value")) + ("" if error is None else f" ± {number(error)}")

    rows = [
        [task, metric, "–" if entry.get("samples") is None else str(entry["samples"])]
        + ["–" if entry.get("shots") is None else str(entry["shots"])]
        + [cell(arm, task, metric) for arm in arms]
        for task, entry in tasks.items()
        for metric in entry["metrics"]
    ]
    return [markdown_table(["task", "metric", "samples", "shots", *map(arm_label, arms)], rows)] if rows else []


def interference_tables(interference: Mapping[str, Any]) -> list[str]:
    """Markdown tables of ‖ΔW X‖ / ‖W X‖: over all sources, by source, by probe; those that were measured.

    In front of them the budget that training kept to, where there was one; beside them the divergence of the output.
    """
    head = ["largest module", "root mean square over modules", "mean over modules", "divergence, nats a token"]

    def cells(found: Mapping[str, Any]) -> list[str]:
        return [number(found.get(key)) for key in ("max", "rms", "mean", "divergence")]

    tables = [budget_sentence(budget)] if (budget := interference.get("budget")) else []
    if interference.get("max") is not None:
        tables.append(markdown_table(["", *head], [["calibration mixture", *cells(interference)]]))
    for kind in ("source", "probe"):
        if by_name := interference.get(f"by_{kind}"):
            rows = [[name, *cells(value)] for name, value in by_name.items()]
            tables.append(markdown_table([kind, *head], rows))
    return tables


def budget_sentence(budget: Mapping[str, Any]) -> str:
    """What training kept to, and what it came to: ``limit``, ``over`` and ``final`` as ``Budget.facts`` has them."""
    over, spent = {
        "module": ("every module", "the largest module's is"),
        "total": ("the root mean square over modules", "that is"),
    }[budget["over"]]
    return (
        f"Training kept every step within a budget of {budget['limit']:g} for {over}, on the calibration mixture; at "
        f"the end {spent} {number(budget.get('final'))} (of B in float32, before any rounding to 16 bits)."
    )


def weight_null_table(facts: Mapping[str, Any]) -> list[str]:
    """Markdown of Null-LoRA's null spaces: per kind of module the directions kept on either side and the ranks left."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in facts["modules"].items():
        kinds.setdefault(name.rsplit(".", 1)[1], []).append(entry)

    def span(values: Sequence[int]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"

    rows = [
        [
            kind,
            str(len(entries)),
            *(span([entry[side]["kept"] for entry in entries]) for side in ("right", "left")),
            span([entry["rank"] for entry in entries]),
        ]
        for kind, entries in kinds.items()
    ]
    left_out = f"Left out, for want of a null space: {', '.join(facts['left_out'])}." if facts["left_out"] else ""
    return [
        f"Null directions of each weight: singular values up to {facts['threshold']:g} of its largest, no more than "
        f"{facts['dim']} a side.",
        markdown_table(["module", "times", "right", "left", "rank"], rows),
        *filter(None, [left_out]),
    ]


def model_card(
    folder: Path, card: Mapping[str, Any], *, base_model: str, revision: str | None, ranks: list[int], scale: float
) -> str:
    """The whole ``README.md``, front matter for the hub included; ``card`` as ``write_adapter`` takes it."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        # The hub refuses a card whose base is a folder on somebody's disk; the text names it all the same.
        base_model=None if Path(base_model).exists() else base_model,
        library_name="peft",
        pipeline_tag="text-generation" if "auto_class" not in card else None,
        tags=["lora", *TAGS.get(card.get("method", "lora_null"), []), "nslora_dist"],
    )
    return str(
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(folder, card, base_model, revision, ranks, scale)}")
    )


def _card_text(
    folder: Path, card: Mapping[str, Any], base_model: str, revision: str | None, ranks: list[int], scale: float
) -> str:
    """The card's body in Markdown: only what was measured or set has a section."""
    name = card.get("name") or folder.name
    spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    at = f" at revision `{revision}`" if revision else ""
    formless = card.get("method") in ("lora", "null_lora")
    facts = [
        ("method", METHODS.get(card.get("method", ""), card.get("method"))),
        ("form", None if formless else FORMS.get(card.get("form", ""), card.get("form"))),
        ("initial A", card.get("a_init")),
        ("A frozen", None if card.get("freeze_a") is None else ("yes" if card["freeze_a"] else "no")),
        ("rank", spread),
        ("scale (alpha / rank)", f"{scale:g}"),
        ("base quantization in training", card.get("quantization")),
    ]
    argument = f', revision="{revision}"' if revision else ""
    auto_class = card.get("auto_class", "AutoModelForCausalLM")
    loading = [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'base = {auto_class}.from_pretrained("{base_model}"{argument}, dtype="auto")',
        f'model = PeftModel.from_pretrained(base, "{folder}")',
        "```",
    ]
    parts = [
        f"# {name}",
        f"A LoRA adapter for `{base_model}`{at}, to be used on that base as it is.",
        "\n".join(f"- {key}: {value}" for key, value in facts if value is not None),
        "## Loading",
        "\n".join(loading),
    ]
    texts = [(kind, card.get(f"{kind}s") or {}) for kind in ("source", "probe")]
    if any(named for _, named in texts):
        rows = [
            [
                name,
                kind,
                *(str(entry[key]) if key in entry else "–" for key in ("path", "sequences", "tokens", "weight")),
            ]
            for kind, named in texts
            for name, entry in named.items()
        ]
        parts += [
            "## Calibration",
            "Sources shaped the null space; probes were only measured. What was not calibrated on is not protected.",
            markdown_table(["name", "kind", "path", "sequences", "tokens", "weight"], rows),
        ]
    if leak := card.get("leak"):
        shown = {"calibration": "calibration texts", "heldout": "held-out texts", "random": "a random basis"}
        rows = [[label, number(leak.get(key))] for key, label in shown.items()]
        parts += [
            "## Leak",
            "Share of the activations' energy that lies in the chosen null space: 0 would be a true null space.",
            markdown_table(["measured on", "leak"], rows),
        ]
    if weight_null := card.get("weight_null_space"):
        parts += ["## Null space of the weights", *weight_null_table(weight_null)]
    if tables := interference_tables(card.get("interference") or {}):
        parts += [
            "## Interference",
            INTERFERENCE,
            *tables,
        ]
    if evaluation := card.get("evaluation"):
        parts += ["## Evaluation", markdown_table(*evaluation_table(evaluation)), *lm_eval_table(evaluation)]
    versions = card.get("versions") or _versions()
    parts += ["## Versions", "\n".join(f"- {package} {version}" for package, version in versions.items())]
    return "\n\n".join(parts) + "\n"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("nslora_dist", "torch", "transformers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a clone, not installed
            continue
    return found
