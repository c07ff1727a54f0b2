"""The docs' table is what the estimators declare."""

from __future__ import annotations

from pathlib import Path

from lowvar.calibrate import ESTIMATORS, HEADS, estimator_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "covariances.md"


def test_docs_repeat_the_claims() -> None:
    text = PAGE.read_text()
    shown = text.partition("<!-- estimators -->\n")[2].partition("<!-- end -->")[0].strip()
    assert shown == estimator_table(), f"put estimator_table() between the marks of {PAGE.name}"


def test_every_head_is_declared() -> None:
    assert set(HEADS) < set(ESTIMATORS)
    assert all(HEADS[name].declares.training_nfe >= 1 for name in HEADS), "a head is trained"
    assert [name for name, claims in ESTIMATORS.items() if not claims.per_sample] == ["analytic", "table"]
