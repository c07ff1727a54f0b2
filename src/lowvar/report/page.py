"""The page: sections put into a template, written beside its run in one move.

The template is Jinja2 with autoescape on: whatever a run says (a sampler's name, a path, a configuration value) arrives
as text. The page loads nothing: style, drawings and pictures are inside it, and there is no script. It depends on the
files in the folder alone, not on the folder's name, the clock or the machine, so rebuilding gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowvar.errors import UserError
from lowvar.report.nouns import nouns
from lowvar.report.run import Run, number, read
from lowvar.report.sections import SECTIONS
from lowvar.report.text import count, duration

__all__ = ["NAME", "build", "render"]

NAME = "report.html"
_LEADS = {
    "demo": "One small network, trained here, sampled in many ways: what the choice of variance and solver is worth.",
    "evaluate": "The same network and the same noise, sampled in many ways, scored against held-out data.",
    "train": "How the training went, by update and by noise level.",
    "tune": "The reverse process as a policy: what a reward gained, how far the sampler moved, at what cost.",
    "estimate": "The mean of a statistic over a sampler, with its interval, what it cost and what it would have cost.",
    "profile": "Where the variance comes from, in training and in sampling, what lowers it, and by how much.",
    "calibrate": "How wrong the network is at each noise level: the variance that its reverse steps should have.",
}


def _text(value: Any) -> str:
    """A short JSON value as text; the name of an object that has one."""
    if isinstance(value, Mapping):
        return next(
            (str(value[key]) for key in ("name", "kind", "type", "path") if isinstance(value.get(key), str)), ""
        )
    return "" if value is None or isinstance(value, list) else str(value)


def _data(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    data = summary.get("data") or config.get("data")
    if not isinstance(data, Mapping):
        return _text(data)
    shape = data.get("shape")
    sizes = [
        f"{count(n)} {key}" for key in ("train", "calibration", "test") if (n := number(data.get(key))) is not None
    ]
    shown = " × ".join(str(n) for n in shape) if isinstance(shape, list) else ""
    return " · ".join(
        filter(None, [_text(data), shown, " / ".join(size for size in sizes if not size.startswith("–"))])
    )


def _network(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    network = summary.get("network") or config.get("network") or config.get("model")
    if not isinstance(network, Mapping):
        return _text(network)
    n = number(network.get("parameters"))
    return " · ".join(
        filter(None, [_text(network), f"{count(n)} parameters" if n is not None and not math.isnan(n) else ""])
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few short entries; the rest stands in the last section."""
    summary = run.summary
    config = summary["config"] if isinstance(summary.get("config"), Mapping) else {}
    place = summary["environment"] if isinstance(summary.get("environment"), Mapping) else {}
    seconds, accuracy = number(summary.get("seconds")), number(summary.get("classifier_accuracy"))
    versions = [f"{name} {place[name]}" for name in ("python", "torch", "diffusers") if place.get(name)]
    features = f"classifier, {100 * accuracy:.1f}% right" if accuracy is not None and not math.isnan(accuracy) else ""
    digest = _text(summary.get("extractor_hash"))[:12]
    facts = [
        ("Data", _data(summary, config)),
        ("Network", _network(summary, config)),
        ("Schedule", _text(summary.get("schedule") or config.get("schedule"))),
        ("Seed", _text(summary.get("seed"))),
        ("Time", "" if seconds is None or math.isnan(seconds) else duration(seconds)),
        ("Device", _text(place.get("device"))),
        ("Scored with", " · ".join(filter(None, [features, digest]))),
        ("Versions", ", ".join([f"lowvar {_text(summary.get('version'))}", *versions])),
    ]
    return [(name, text) for name, text in facts if text]


def render(run: Run) -> str:
    """The page of a run.

    Raises:
        UserError: if a file of the run holds something that cannot be shown.
    """
    environment = Environment(
        loader=PackageLoader("lowvar.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [section for make in SECTIONS if (section := make(run)) is not None]
    return environment.get_template("page.html.j2").render(
        command=run.command,
        lead=_LEADS.get(run.command, ""),
        facts=_facts(run),
        sections=sections,
        words=nouns(run),
        version=_text(run.summary.get("version")),
    )


def build(run: Path) -> Path:
    """Writes RUN/report.html from the files in RUN.

    Args:
        run: the folder that a command wrote.

    Returns:
        The path of the page.

    Raises:
        UserError: if `run` is no run folder, a file in it is broken, or the page cannot be written.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> summary = {"command": "train", "version": "0.1.0", "seed": 0, "seconds": 3.0, "config": {"lr": 1e-3}}
        >>> _ = (folder / "summary.json").write_text(json.dumps(summary))
        >>> build(folder).name
        'report.html'
    """
    text = render(read(Path(run)))
    page, draft = Path(run) / NAME, Path(run) / f"{NAME}.partial"
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(page)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {page} ({error.strerror}); make room or give a folder that can be written"
        ) from None
    return page
