"""What stands in a profile's summary and figures about each of its parts, and what summaries say to other commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowvar.cli.models import Model
    from lowvar.metrics.intervals import Interval
    from lowvar.profile import (
        Promise,
        ReverseProfile,
        RewardProfile,
        StatisticProfile,
        TrainingProfile,
        VarianceCheck,
    )

__all__ = [
    "USUAL_BATCH",
    "about_profile",
    "about_promises",
    "about_reverse",
    "about_reward",
    "about_statistic",
    "read_profile",
    "reverse_figures",
    "trained_batch",
]

USUAL_BATCH = 64  # of a model that does not say


def _interval(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def about_profile(found: TrainingProfile) -> dict[str, Any]:
    """What stands in a summary about the training gradient."""
    from lowvar.profile import SOURCES

    sources = found.sources
    return {
        "shares": {u: _interval(sources.shares[u]) for u in SOURCES},
        "variance": _interval(sources.variance),
        "noise_scale": _interval(sources.noise_scale),
        "batch_size": found.batch_size,
        "blocks": sources.blocks,
        "directions": found.sketched,
        "levels": [
            {"logsnr_low": low, "logsnr_high": high, **{u: _interval(i) for u, i in parts.items()}}
            for high, low, parts in zip(found.edges, found.edges[1:], sources.levels, strict=False)
        ],
        "groups": [
            {"name": name, "variance": _interval(whole), "shares": {u: _interval(i) for u, i in parts.items()}}
            for name, whole, parts in zip(found.groups, sources.group_variance, sources.groups, strict=True)
        ],
        "errors": [
            {
                "logsnr_low": e.logsnr_low,
                "logsnr_high": e.logsnr_high,
                "error": _interval(e.error),
                "bound_low": e.low,
                "bound_high": e.high,
                "excess": _interval(e.excess),
            }
            for e in found.errors
        ],
        "replicates": found.replicates,
        "techniques": [
            {"name": r.name, "vrf": r.vrf, "low": r.low, "high": r.high, "cost": r.cost, "verdict": r.verdict}
            for r in found.reductions
        ],
    }


def _about_check(check: VarianceCheck) -> dict[str, Any]:
    return {
        "name": check.name,
        "n": check.n,
        "logsnr": list(check.logsnr),
        "ratio": [_interval(i) for i in check.ratio],
        "posterior": [_interval(i) for i in check.posterior],
        "bits": [_interval(i) for i in check.bits],
        "total": _interval(check.total),
    }


def about_reverse(found: ReverseProfile, steps: int) -> dict[str, Any]:
    """What stands in a summary about the reverse process."""
    return {
        "steps": steps,
        "images": found.calibration.n,
        "structures": [
            {
                "logsnr": s.logsnr,
                "states": s.states,
                "norm": _interval(s.norm),
                "state": {k: _interval(i) for k, i in s.state.items()},
                "table": {k: _interval(i) for k, i in s.table.items()},
            }
            for s in found.structures
        ],
        "own": found.own,
        "variances": [_about_check(c) for c in found.checks.values()],
        "paid": None if found.paid is None else _interval(found.paid),
        "saved": None if found.saved is None else _interval(found.saved),
        "predicted": [asdict(p) for p in found.predicted],
    }


def reverse_figures(found: ReverseProfile, model: Model, about: dict[str, str]) -> dict[str, Any]:
    """Curves for the report."""
    import torch

    from lowvar.cli.measure import mmse_figure

    def curve(name: str, which: str) -> dict[str, Any]:
        check = found.checks[name]
        rows = getattr(check, which)
        return {
            "logsnr": list(check.logsnr),
            "value" if which != "bits" else "bits": torch.tensor([i.value for i in rows]),
            "se": torch.tensor([i.se for i in rows]),
        }

    checks = found.checks
    ratios = {name: curve(name, "ratio") for name in checks}
    own = found.own
    if own is not None and checks and checks[own].posterior:
        ratios[f"{own}, of C"] = curve(own, "posterior")
    bits = {
        name: curve(name, "bits") | {"total": c.total.value, "total_se": c.total.se, "prior": None, "decoder": None}
        for name, c in checks.items()
    }
    return {
        "mmse": mmse_figure(found.calibration, model.denoiser),
        "standardised": ratios,
        "steps": bits,
        "about": about,
    }


def about_statistic(found: StatisticProfile) -> dict[str, Any]:
    """What stands in a summary about a statistic."""
    about = {k: v for k, v in vars(found).items() if k != "candidates"}
    return about | {"candidates": [vars(c) for c in found.candidates]}


def about_reward(found: RewardProfile) -> dict[str, Any]:
    """What stands in a summary about a reward."""
    return {k: v for k, v in vars(found).items() if k != "rows"} | {"rows": [vars(r) for r in found.rows]}


def about_promises(found: Sequence[Promise], folder: Path | None) -> dict[str, Any]:
    """What stands in a summary about an earlier profile's promises."""
    from lowvar.cli.results import plain

    rows = [
        {
            "what": p.what,
            "before": None if p.before is None else _interval(p.before),
            "expected": _interval(p.expected),
            "measured": _interval(p.measured),
            "met": p.met,
        }
        for p in found
    ]
    return plain({"run": folder, "rows": rows})


def trained_batch(folder: Path) -> int:
    """The batch that a run of `lowvar train` was trained with, as its summary says; 64 for other models."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return USUAL_BATCH
    config = summary.get("config") if isinstance(summary, dict) and summary.get("command") == "train" else None
    own = config.get("batch_size") if isinstance(config, dict) else None
    return own if isinstance(own, int) and own >= 1 else USUAL_BATCH


def read_profile(folder: Path, flag: str) -> dict[str, Any]:
    """The summary of a profile.

    Args:
        folder: that `lowvar profile` wrote.
        flag: that named it, for the message.

    Raises:
        UserError: if it is none.
    """
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} is {folder}, whose summary.json cannot be read ({reason}); give a profile") from None
    if not isinstance(summary, dict) or summary.get("command") != "profile":
        raise UserError(f"{flag} is {folder}, which is no profile; give a folder that `lowvar profile` wrote")
    return summary
