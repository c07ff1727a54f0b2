r"""Laws of a schedule.

logsnr(t) = log(alpha_t^2 / sigma_t^2) decreases on [0, 1],   alpha_0 = 1, sigma_0 = 0,
time(logsnr(t)) = t,   VP: alpha^2 + sigma^2 = 1,   VE: alpha = 1,   flow: alpha + sigma = 1,
schedule_from_config(schedule.config()) is the same schedule.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from lowvar.process.discrete import schedule_from_config
from lowvar.process.schedule import Schedule

__all__ = [
    "ScheduleLaws",
    "check_config",
    "check_decreasing",
    "check_ends",
    "check_family",
    "check_inverse",
    "check_levels",
    "check_range",
    "check_shapes",
    "check_timestep",
]


def _times(schedule: Schedule) -> Tensor:
    """Times in (0, 1), where logsnr is above its value at t = 1 (a clipped end has no inverse)."""
    inner = torch.linspace(0, 1, 401, dtype=torch.float64)[1:-1]
    t = torch.cat(
        [torch.tensor([1e-6, 1e-4, 1e-3], dtype=torch.float64), inner, torch.tensor([0.999], dtype=torch.float64)]
    )
    t = t.sort().values
    t = t[schedule.logsnr(t) > schedule.logsnr(1.0)]
    if len(t) < 300:
        raise AssertionError("logsnr is not above its value at t = 1 on most of (0, 1)")
    return t


def check_decreasing(schedule: Schedule) -> None:
    """Logsnr is float64 and decreases strictly."""
    logsnr = schedule.logsnr(_times(schedule))
    if logsnr.dtype != torch.float64:
        raise AssertionError(f"logsnr is {logsnr.dtype}, must be float64")
    if not bool((logsnr.diff() < 0).all()):
        raise AssertionError("logsnr does not decrease with t")


def check_family(schedule: Schedule) -> None:
    """Alpha and sigma obey the family's relation and make the logsnr."""
    level = schedule.at(
        torch.cat([torch.zeros(1, dtype=torch.float64), _times(schedule), torch.ones(1, dtype=torch.float64)])
    )
    total = {
        "vp": level.alpha**2 + level.sigma**2,
        "ve": level.alpha,
        "flow": level.alpha + level.sigma,
    }[schedule.family]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    inner = level[1:-1]
    torch.testing.assert_close(2 * torch.log(inner.alpha / inner.sigma), inner.logsnr, rtol=1e-10, atol=1e-10)


def check_ends(schedule: Schedule) -> None:
    """t = 0 is clean data, t = 1 the noisiest level, and times beyond the ends are 0 and 1."""
    clean = schedule.at(0.0)
    if (float(clean.alpha), float(clean.sigma), float(clean.logsnr)) != (1.0, 0.0, float("inf")):
        raise AssertionError(
            f"t = 0 must be clean data, has alpha {clean.alpha}, sigma {clean.sigma}, logsnr {clean.logsnr}"
        )
    noisy = schedule.at(1.0)
    if not float(noisy.sigma) > float(noisy.alpha):
        raise AssertionError(f"t = 1 must be mostly noise, has alpha {noisy.alpha}, sigma {noisy.sigma}")
    ends = schedule.time(torch.tensor([float("inf"), -1e4], dtype=torch.float64)).tolist()
    if ends != [0.0, 1.0]:
        raise AssertionError(f"times beyond the ends must be 0 and 1, are {ends}")
    if not 0 < schedule.t_min < 1:
        raise AssertionError(f"t_min must lie in (0, 1), is {schedule.t_min}")


def check_inverse(schedule: Schedule, tolerance: float = 1e-9) -> None:
    """time(logsnr(t)) = t, and logsnr(time(l)) = l where that is well conditioned."""
    t = _times(schedule)
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=0, atol=tolerance)
    high, low = schedule.logsnr(torch.tensor([0.02, 0.95], dtype=torch.float64)).tolist()
    l = torch.linspace(low, high, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.logsnr(schedule.time(l)), l, rtol=0, atol=1e-7)


def check_levels(schedule: Schedule) -> None:
    """`level(logsnr)` is `at(t)`: two ways to one level."""
    t = _times(schedule)
    one, two = schedule.at(t), schedule.level(schedule.logsnr(t))
    for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def check_config(schedule: Schedule) -> None:
    """The config survives JSON and makes the same schedule again."""
    again = schedule_from_config(json.loads(json.dumps(schedule.config())))
    if again.fingerprint != schedule.fingerprint:
        raise AssertionError(f"{schedule.config()} makes another schedule: fingerprint {again.fingerprint}")
    t = _times(schedule)
    torch.testing.assert_close(again.logsnr(t), schedule.logsnr(t), rtol=1e-12, atol=1e-12)


def check_range(schedule: Schedule) -> None:
    """Times outside [0, 1] are refused."""
    for t in (-0.01, 1.01, float("nan")):
        try:
            schedule.at(t)
        except ValueError:
            continue
        raise AssertionError(f"time {t} was accepted")


def check_shapes(schedule: Schedule) -> None:
    """Numbers and tensors of any shape go through, entry by entry."""
    t = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64).expand(2, 3)
    level = schedule.at(t)
    for value in vars(level).values():
        if value.shape != t.shape or value.dtype != torch.float64:
            raise AssertionError(f"a level has shape {tuple(value.shape)} and dtype {value.dtype} for times (2, 3)")
    if float(schedule.logsnr(0.5)) != float(level.logsnr[0, 1]):
        raise AssertionError("logsnr of a number and of a tensor differ")


def check_timestep(schedule: Schedule) -> None:
    """The network's time input increases with noise, and `time_of` inverts it."""
    t = _times(schedule)
    timestep = schedule.timestep(t)
    if not bool((timestep.diff() > 0).all()):
        raise AssertionError("timestep does not increase with t")
    torch.testing.assert_close(schedule.time_of(timestep), t, rtol=0, atol=1e-9)


class ScheduleLaws:
    """Inherit, and supply the fixture `schedule`."""

    def test_decreasing(self, schedule: Schedule) -> None:
        """See `check_decreasing`."""
        check_decreasing(schedule)

    def test_family(self, schedule: Schedule) -> None:
        """See `check_family`."""
        check_family(schedule)

    def test_ends(self, schedule: Schedule) -> None:
        """See `check_ends`."""
        check_ends(schedule)

    def test_inverse(self, schedule: Schedule) -> None:
        """See `check_inverse`."""
        check_inverse(schedule)

    def test_levels(self, schedule: Schedule) -> None:
        """See `check_levels`."""
        check_levels(schedule)

    def test_config(self, schedule: Schedule) -> None:
        """See `check_config`."""
        check_config(schedule)

    def test_range(self, schedule: Schedule) -> None:
        """See `check_range`."""
        check_range(schedule)

    def test_shapes(self, schedule: Schedule) -> None:
        """See `check_shapes`."""
        check_shapes(schedule)

    def test_timestep(self, schedule: Schedule) -> None:
        """See `check_timestep`."""
        check_timestep(schedule)
