"""What became of a verdict's promises: met where the second interval reaches what was promised, or is better."""

from __future__ import annotations

from typing import Any

import pytest

from lowvar.profile import promises


def around(value: float, by: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - by, "high": value + by}


def rewarded(reward: str, factor: float) -> dict[str, Any]:
    row = {"name": "x0", "factor": factor, "factor_low": factor - 0.1, "factor_high": factor + 0.1}
    return {"verdict": [], "reward": {"reward": reward, "recommended": "x0", "rows": [row]}}


@pytest.mark.parametrize(("now", "met"), [(1.1, True), (1.3, True), (1.5, False)])
def test_a_fault_of_training_is_gone_below_a_quarter(now: float, met: bool) -> None:
    """The largest error of all levels; an interval that reaches 1.25 is given the benefit."""
    line = {"do": "train at them", "worth": True, "fault": True, "part": "training"}
    first = {"verdict": [line], "errors": [{"excess": around(1.0)}, {"excess": around(3.0)}]}
    (found,) = promises(first, {"errors": [{"excess": around(now)}, {"excess": around(0.8)}]})
    assert found.before is not None
    assert (found.before.value, found.measured.value, found.met) == (3.0, now, met)


@pytest.mark.parametrize(("now", "met"), [(1.0, True), (0.75, True), (0.6, False), (1.5, False)])
def test_a_fault_of_the_variance_is_gone_within_a_quarter(now: float, met: bool) -> None:
    def summary(ratio: float) -> dict[str, Any]:
        own = {"name": "small", "ratio": [around(1.0), around(ratio)], "posterior": []}
        return {"reverse": {"own": "small", "variances": [own]}}

    line = {"do": "another", "worth": True, "fault": True, "part": "sampling"}
    (found,) = promises({"verdict": [line], **summary(2.0)}, summary(now))
    assert (found.measured.value, found.met) == (now, met)


@pytest.mark.parametrize(("now", "met"), [(2.0, True), (1.0, True), (2.15, True), (2.5, False)])
def test_a_sampler_has_the_score_that_was_promised(now: float, met: bool) -> None:
    cells = {name: {"sampler": name, "grid": "trailing", "steps": 10} for name in ("ddim", "unipc")}

    def summary(**scores: float) -> dict[str, Any]:
        rows = [{"metric": "energy", **cells[name], **around(score)} for name, score in scores.items()]
        return {"metric": "energy", "rows": rows}

    line = {"do": "unipc", "worth": True, "part": "sampling", "settings": {"sampler": "unipc"}}
    first = {"verdict": [line], **summary(ddim=5.0, unipc=2.0), "current": cells["ddim"], "recommended": cells["unipc"]}
    second = {**summary(unipc=now), "current": cells["unipc"]}
    (found,) = promises(first, second)
    assert found.before is not None
    assert (found.before.value, found.expected.value, found.measured.value, found.met) == (5.0, 2.0, now, met)
    assert promises(first, {**second, "metric": "frechet"}) == ()


def test_an_estimator_s_factor_is_that_of_one_reward() -> None:
    """A second profile for another reward says nothing of the first one's promise."""
    (kept,), (broken,) = (promises(rewarded("jpeg", 3.0), rewarded("jpeg", f)) for f in (3.1, 1.5))
    assert (kept.met, broken.met) == (True, False)
    assert promises(rewarded("jpeg", 3.0), rewarded("brightness", 1.5)) == ()


def test_what_only_one_profile_has_is_passed_over() -> None:
    """Other parts, no upper ends, no numbers: nothing is promised that cannot be told."""
    line = {"do": "auto", "worth": True, "part": "training"}
    rows = [{"name": "auto", "vrf": 2.0, "low": 1.5, "high": None}]
    assert promises({"verdict": [line], "techniques": rows}, {}) == ()
    assert promises({}, {"techniques": rows}) == ()
    (found,) = promises({"verdict": [line], "techniques": rows}, {"techniques": rows})
    assert found.met
    none = [{"name": "auto", "vrf": None, "low": None, "high": None}]
    assert promises({"verdict": [line], "techniques": rows}, {"techniques": none}) == ()
