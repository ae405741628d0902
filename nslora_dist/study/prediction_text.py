"""What ``summary.md`` says of forgetting foretold: its tables of rank correlations and of what is safe."""

from collections.abc import Mapping
from typing import Any

from nslora_dist.card import markdown_table
from nslora_dist.study.prediction import ALLOWED, LOST
from nslora_dist.study.written import NONE, interval, score, small


def prediction_text(found: Mapping[str, Any]) -> list[str]:
    """The summary's part on forgetting foretold, of ``prediction.predict``'s figures."""
    parts = [
        "## Forgetting, predicted",
        f"Spearman's rank correlation of interference with forgetting over the {found['cells']} cells whose texts "
        "exercise all that is asked; *others*: over those of arms that are not confined to a null space; *within*: the "
        "mean over bases, tasks and arms, each by itself. *Safe below*: the interference before the first cell that "
        f"lost more than {LOST:.0%} of the answers (*none*), and the one up to which at most {ALLOWED[-1]:.0%} of the "
        "cells lose so much (by isotonic regression), of all cells, of the arms in a null space and of the others. In "
        "brackets: 95% intervals over resampled variants. *rms* and *mean* are over all modules that any arm adapts; "
        "one without an adapter counts as zero.",
    ]
    rows = [[name.replace("_", " "), *_correlation(own)] for name, own in found["aggregates"].items()]
    if rows:
        parts.append(markdown_table(["aggregate", *CORRELATION], rows))
        arms = list(found["aggregates"]["rms"]["within"])
        own = [[arm, *(score(a["within"].get(arm)) for a in found["aggregates"].values())] for arm in arms]
        header = ["within arm", *(name.replace("_", " ") for name in found["aggregates"])]
        parts.append(markdown_table(header, own))
    parts += _settings_tables(found)
    rows = [
        [piece, interval(own["spearman"]), interval(own["kl"]), small(own["safe_below"])]
        for piece, own in found["probes"]["by_piece"].items()
    ]
    rows.append(["all together", interval(found["probes"]["all"]), interval(found["probes"]["all_kl"]), NONE])
    limit = found["limit"]
    header = ["piece", "interference", "divergence", f"interference safe below: {ALLOWED[-1]:.0%}"]
    parts += ["Probe by probe, over all cells, each with what is lost of its own piece:", markdown_table(header, rows)]
    rows = [
        [f"other {way}s", str(own["cells"]), str(own["lost"]), score(own["most"])]
        for way, own in limit["elsewhere"].items()
    ]
    return [
        *parts,
        f"No cell whose divergence stays below {small(limit['below'])} nats a token on every probe lost more "
        f"than {LOST:.0%}: {limit['cells']} cells, of {limit['harmless']} that lost no more. With the limit that other "
        "cells set, so that none that is judged had a say in it:",
        markdown_table(["limit set on", "cells below it", f"lost more than {LOST:.0%}", "at most"], rows),
    ]


CORRELATION = ("across", "others", "within", "safe below: none", f"{ALLOWED[-1]:.0%}", "in a null space", "others'")


def _correlation(own: Mapping[str, Any]) -> list[str]:
    """The cells under ``CORRELATION``."""
    safe = [*own["safe_below"].values(), own["safe_below_in_null_space"], own["safe_below_others"]]
    return [
        *(interval(own[which]) for which in ("across", "across_others")),
        score(own["within_mean"]),
        *map(small, safe),
    ]


def _settings_tables(found: Mapping[str, Any]) -> list[str]:
    header = ["", "cells", *CORRELATION]
    parts = []
    rows = [
        [f"{name}: {kind}", str(own["cells"]), *_correlation(own[kind])]
        for name, own in found["settings"].items()
        for kind in ("rms", "kl")
    ]
    if rows:
        parts += ["A base and task at a time:", markdown_table(header, rows)]
    if found["few"]:
        rows = [[f"{count} sequences a source", NONE, *_correlation(own)] for count, own in found["few"].items()]
        parts += [
            "How few sequences tell as much: interference measured on the first so many of each source, of cells that "
            "are calibrated on all of them:",
            markdown_table(header, rows),
        ]
    rows = [
        [
            name,
            str(own["cells"]),
            ", ".join(own["covered"]) or "nothing of it",
            interval(own["calibration"]),
            interval(own["probes"]),
            interval(own["probes_kl"]),
        ]
        for name, own in found["calibrations"].items()
    ]
    return [
        *parts,
        "When the texts are not what is asked: correlation of all forgetting with interference on the calibration's "
        "own texts, with its mean over the probes, one for each piece, and with the probes' mean divergence:",
        markdown_table(["calibration", "cells", "exercises", "its texts", "probes", "probes' divergence"], rows),
    ]
