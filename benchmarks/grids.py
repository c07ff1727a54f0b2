r"""Grids chosen by variance against uniform t, uniform logsnr and Karras, each kernel on its own grid.

What it claims, and how it is made to hold:

- mixtures in 2, 8 and 64 dimensions with exact scores, cosine schedule: the kernel is all that differs from continuous
  time. Kernels: C := 0 (`small`), one calibrated variance a level (`isotropic`), one a principal component and level
  (`basis`), and the exact C(x_t) (`full`);
- all grids start at t = 1 and are last evaluated at the same time (t = .001): what a grid gains by ending earlier is
  not counted here, but in the row `free end`, which ends where 257 grey levels are decided;
- path KL is measured on states that the grids were not made from: 2,000 exact x_t at every knot (`full`: 500; 100 in
  64 dimensions), less the continuous limit from the mmse curve; its standard error comes with it;
- energy distance of 2,048 samples against 4,096 of the target, common starting noise; intervals are 95% block
  jackknife, paired;
- adaptive steps: path KL along exact bridges q(x_s | x_t, x_0), at equal numbers of steps and of evaluations.

    python benchmarks/grids.py            # runs the cells that are missing
    python benchmarks/grids.py --report   # writes benchmarks/results/grids.json, docs/results/grids.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.intervals import Replicates
from lowvar.process import (
    BasisDiagonal,
    CosineVP,
    Covariance,
    Denoiser,
    Independent,
    Isotropic,
    Level,
    Posterior,
    ReverseKernel,
    WithCovariance,
)
from lowvar.process.cost import CostCurve, monotone, posterior_costs
from lowvar.process.denoiser import expand
from lowvar.process.grid import karras, uniform, uniform_logsnr
from lowvar.process.kernel import step_coefficients
from lowvar.process.matched import matched
from lowvar.process.planning import optimal
from lowvar.process.probe import squared_deviation, third_cumulant
from lowvar.sample import StepControl, generate
from lowvar.testing import MixtureTarget, mixture2, mixture8, mixture64

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "benchmarks" / "grids"
RESULTS = ROOT / "benchmarks" / "results" / "grids.json"
TABLE = ROOT / "docs" / "results" / "grids.md"

TARGETS = {"mixture2": mixture2, "mixture8": mixture8, "mixture64": mixture64}
KERNELS = ("small", "isotropic", "basis", "full")
OWN, RIVALS = ("matched", "optimal"), ("uniform", "uniform-logsnr", "karras")
STEPS = (5, 10, 20)
SCHEDULE = CosineVP()
KNOTS = torch.linspace(-10, float(SCHEDULE.logsnr(SCHEDULE.t_min)), 81, dtype=torch.float64)
SAMPLES, REFERENCE = 2048, 4096


class Cell(NamedTuple):
    """An entry of the tables."""

    target: str
    kernel: str
    grid: str
    steps: int

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return CACHE / f"{self.target}@{self.kernel}@{self.grid.replace(' ', '-')}@{self.steps}.json"


def cells() -> list[Cell]:
    """In the order they are run."""
    grids = (*OWN, "free end", *RIVALS)
    found = [Cell(t, k, g, s) for s in STEPS for t in TARGETS for k in KERNELS for g in grids]
    return [c for c in found if not (c.kernel == "full" and c.grid in ("optimal", "free end"))]  # no curve for it


@cache
def target_of(name: str) -> MixtureTarget:
    """The mixture."""
    return TARGETS[name]()


@cache
def moments(name: str) -> tuple[Tensor, Tensor]:
    """What a calibration would measure: E C_ii in the principal components (L, d), and T (L,), at the knots."""
    target, rows, third = target_of(name), [], []
    n = 400 if target.d > 8 else 2000
    z, w = (Independent(k).normal(range(n), target.event_shape, dtype=torch.float64) for k in (21, 22))
    for value in KNOTS:
        level = SCHEDULE.level(value)
        x = target.noisy(range(n), level, Independent(20))
        C = target.posterior(x, level, "pca-diagonal").covariance
        assert isinstance(C, BasisDiagonal)
        rows.append(C.variance.flatten(1).mean(0))
        few = slice(0, 200)
        third.append(third_cumulant(target.denoiser(SCHEDULE, None), x[few], level, z[few], w[few]).mean())
    return monotone(torch.stack(rows)), torch.stack(third)


@cache
def curve_of(name: str, kernel: str) -> CostCurve:
    """The cost curve that the grids are made from."""
    v, third = moments(name)
    if kernel in ("small", "isotropic"):
        v = v.mean(1, keepdim=True)
    noise = "small" if kernel == "small" else "table"
    return CostCurve(KNOTS, v, target_of(name).d, noise, third=third)


@cache
def grid_of(cell: Cell) -> Tensor:
    """The times."""
    curve, K, end = curve_of(cell.target, cell.kernel), cell.steps, SCHEDULE.t_min
    if cell.grid == "matched":
        return matched(curve, SCHEDULE, K, "full" if cell.kernel == "full" else None, t_end=end)
    if cell.grid == "optimal":
        return optimal(curve, SCHEDULE, K, t_end=end).grid
    if cell.grid == "free end":
        return optimal(curve.ending_with(curve.variance, 257), SCHEDULE, K).grid
    return {"uniform": uniform, "uniform-logsnr": uniform_logsnr, "karras": karras}[cell.grid](SCHEDULE, K)


def denoiser_of(name: str, kernel: str) -> Denoiser:
    """Exact mean, and the covariance that the kernel is given."""
    target, curve = target_of(name), curve_of(name, kernel)
    if kernel == "full":
        return target.denoiser(SCHEDULE, "dense")
    plain = target.denoiser(SCHEDULE, None)
    if kernel == "small":
        return plain

    def table(x: Tensor, level: Level, posterior: Posterior) -> Covariance:
        variance = curve.variance_at(level.logsnr).to(x)
        if kernel == "isotropic":
            return Isotropic(variance[..., 0], target.event_shape)
        return BasisDiagonal(target.twin.basis, variance.reshape(-1, *target.event_shape))

    return WithCovariance(plain, table)


# ------------------------------------------------------------------------------------------------------- measurements


def expected_kl(V: Tensor, C: Tensor, dsnr: Tensor) -> Tensor:
    """E KL given x_t of a step with noise variances V where the posterior's are C (B, d), nats (B,)."""
    step = dsnr[..., None]
    return 0.5 * (step * (C - V) / (1 + step * V) + torch.log1p(step * V)).sum(-1)


def path_kl(cell: Cell) -> tuple[float, float]:
    """Measured path KL up to the last evaluation, nats, and its standard error."""
    target, curve = target_of(cell.target), curve_of(cell.target, cell.kernel)
    n = 2000 if cell.kernel != "full" else (500 if target.d <= 8 else 100)
    logsnr = SCHEDULE.logsnr(grid_of(cell)[:-1])
    snr, total, variance = torch.exp(logsnr), 0.0, 0.0
    for k in range(len(logsnr) - 1):
        level = SCHEDULE.level(logsnr[k])
        x, dsnr = target.noisy(range(n), level, Independent(30)), snr[k + 1] - snr[k]
        if cell.kernel == "full":
            C = target.posterior(x, level, "dense").covariance
            assert C is not None
            costs = posterior_costs(C, dsnr[None], "full")[:, 0]
        else:
            C = target.posterior(x, level, "pca-diagonal").covariance
            assert isinstance(C, BasisDiagonal)
            c = C.variance.flatten(1)
            v = torch.zeros(1, 1) if cell.kernel == "small" else curve.variance_at(logsnr[k])[None]
            costs = expected_kl(v.double().expand_as(c), c, dsnr)
        total, variance = total + float(costs.mean()), variance + float(costs.var()) / n
    # v of the last levels falls below the table's noise; the limit is that of the finest curve, in the basis
    least = curve_of(cell.target, "basis")
    return total - float(least.information(logsnr[-1]) - least.information(logsnr[0])), variance**0.5


@cache
def reference(name: str) -> Any:
    """Energy statistic against samples of the target."""
    x = target_of(name).sample(range(REFERENCE), Independent(40)).float()
    return energy_statistic(x.flatten(1))


def energy(cell: Cell) -> Replicates:
    """Energy distance of the kernel's samples, replicates for intervals."""
    variance = "small" if cell.kernel == "small" else "posterior"
    kernel = ReverseKernel(1.0, variance)  # type: ignore[arg-type]
    target = target_of(cell.target)
    made = generate(
        denoiser_of(cell.target, cell.kernel), kernel, grid_of(cell), target.event_shape, SAMPLES, Independent(41)
    )
    return reference(cell.target).replicates(made.flatten(1))


def adaptive(name: str, kernel: str, steps: int, rho: float, exact: bool, n: int = 2000) -> dict[str, float]:
    """Path KL and steps of adaptive stepping with a probe or the exact R, along bridges of the forward process."""
    target, curve = target_of(name), curve_of(name, kernel)
    denoiser, P = denoiser_of(name, kernel), target.twin.basis.matrix()
    grid = matched(curve, SCHEDULE, steps, t_end=float(SCHEDULE.time(8.0)))
    control = StepControl.of(curve, SCHEDULE, grid, rho)
    x0, u = target.sample(range(n), Independent(50)), torch.zeros(n, dtype=torch.float64)
    start = control.level(u)
    eps = Independent(51).normal(range(n), target.event_shape, dtype=torch.float64)
    x = expand(start.alpha, x0) * x0 + expand(start.sigma, x0) * eps
    kl, taken, k = torch.zeros(n, dtype=torch.float64), torch.zeros(n), 0
    while bool((u < control.last).any()):
        at = (u < control.last).nonzero()[:, 0]
        t = control.level(u[at])
        C = target.posterior(x[at], t, "dense").covariance
        assert C is not None
        rotated = P.mT @ C.dense() @ P
        v = torch.zeros(1) if kernel == "small" else curve.variance_at(t.logsnr)
        V = v.double().expand(len(at), target.d)
        z = Independent(52).normal(at, target.event_shape, draw=k, dtype=torch.float64)
        R = squared_deviation(denoiser, x[at], t, z)[1]
        R = ((rotated - torch.diag_embed(V)) ** 2).sum((1, 2)) if exact else R
        after = control.advance(u[at], R)
        s = control.level(after)
        kl[at] += expected_kl(V, torch.diagonal(rotated, dim1=1, dim2=2), torch.exp(s.logsnr) - torch.exp(t.logsnr))
        c = step_coefficients(t, s)
        noise = Independent(53).normal(at, target.event_shape, draw=k, dtype=torch.float64)
        mean = expand(c.a, noise) * x[at] + expand(c.kappa, noise) * x0[at]
        x[at] = mean + expand(c.lambda2, noise).sqrt() * noise
        u[at], taken[at], k = after, taken[at] + 1, k + 1
    least = curve_of(name, "basis")
    ends = SCHEDULE.logsnr(grid[[0, -2]]).clamp_min(-12.0)
    continuous = float(least.information(ends[1]) - least.information(ends[0]))
    steps_taken = float(taken.mean()) + 1
    return {
        "steps": steps_taken,
        "nfe": steps_taken if rho == 1 else 2 * steps_taken - 1,
        "path_kl": float(kl.mean()) - continuous,
        "se": float(kl.std()) / n**0.5,
    }


ADAPTIVE = [(t, k, s) for t in ("mixture2", "mixture8") for k in ("isotropic", "basis") for s in (18,)]
MODES = {"grid": (1.0, False), "one probe": (1.5, False), "exact R": (1.5, True)}


def run(minutes: float, threads: int, part: str) -> None:
    """Runs missing cells until the budget is spent."""
    from tqdm import tqdm

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    CACHE.mkdir(parents=True, exist_ok=True)
    for cell in tqdm([c for c in cells() if part != "adaptive" and not c.file.exists()], desc="cells"):
        if time.perf_counter() - begun > 60 * minutes:
            print("budget spent; run again to go on")
            return
        value, se = path_kl(cell)
        record: dict[str, Any] = {"path_kl": value, "se": se, "times": grid_of(cell).tolist()}
        heavy = cell.target == "mixture64" and cell.kernel == "full"  # an eigendecomposition a sample and step
        if not heavy and cell.grid != "optimal":  # hardly another grid than the matched one
            r = energy(cell)
            record["energy"] = {"value": r.value, "leave_out": r.leave_out.tolist(), "sizes": r.sizes.tolist()}
        cell.file.write_text(json.dumps(record))
    for name, kernel, steps in tqdm(ADAPTIVE if part != "grids" else [], desc="adaptive"):
        for mode, (rho, exact) in MODES.items():
            file = CACHE / f"adaptive@{name}@{kernel}@{steps}@{mode.replace(' ', '-')}.json"
            if not file.exists() and time.perf_counter() - begun < 60 * minutes:
                file.write_text(json.dumps(adaptive(name, kernel, steps, rho, exact)))


# ------------------------------------------------------------------------------------------------------------- report


def report() -> None:
    """Writes the committed results from the cells that were run."""
    import lowvar

    found = {c: json.loads(c.file.read_text()) for c in cells() if c.file.exists()}

    def replicates(cell: Cell) -> Replicates:
        e = found[cell]["energy"]
        return Replicates(e["value"], torch.tensor(e["leave_out"]).double(), torch.tensor(e["sizes"]))

    rows, duels = [], []
    for cell, record in found.items():
        row = cell._asdict() | {"path_kl": record["path_kl"], "path_kl_se": record["se"]}
        if "energy" in record:
            i = replicates(cell).interval()
            row |= {"energy": i.value, "energy_low": i.low, "energy_high": i.high}
        rows.append(row)
        if cell.grid not in RIVALS:
            continue
        for own in (*OWN, "free end"):
            mine = cell._replace(grid=own)
            if mine not in found:
                continue
            duel = cell._asdict() | {"own": own}
            if own != "free end":
                gap = found[mine]["path_kl"] - record["path_kl"]
                half = 1.96 * (found[mine]["se"] ** 2 + record["se"] ** 2) ** 0.5
                duel["path_kl"] = [gap, gap - half, gap + half]
            if "energy" in record and "energy" in found[mine]:
                i = replicates(mine).minus(replicates(cell)).interval()
                duel["energy"] = [i.value, i.low, i.high]
            duels.append(duel)
    adaptives = []
    for name, kernel, steps in ADAPTIVE:
        for mode in MODES:
            file = CACHE / f"adaptive@{name}@{kernel}@{steps}@{mode.replace(' ', '-')}.json"
            if file.exists():
                head = {"target": name, "kernel": kernel, "grid_steps": steps, "mode": mode}
                adaptives.append(head | json.loads(file.read_text()))
    results = {
        "what": (__doc__ or "").splitlines()[0],
        "date": dt.date.today().isoformat(),
        "samples": SAMPLES,
        "versions": {
            "lowvar": lowvar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, CPU",
        },
        "rows": rows,
        "duels": duels,
        "adaptive": adaptives,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(_markdown(results))
    print(TABLE.read_text())


def _markdown(results: dict[str, Any]) -> str:
    by = {(r["target"], r["kernel"], r["steps"], r["grid"]): r for r in results["rows"]}
    grids = (*OWN, *RIVALS)
    lines = ["| target | kernel | steps | " + " | ".join(grids) + " |", "|---" * (len(grids) + 3) + "|"]
    quality = [
        "| target | kernel | steps | " + " | ".join((*grids, "free end")) + " |",
        "|---" * (len(grids) + 4) + "|",
    ]
    for key in dict.fromkeys((t, k, s) for t, k, s, _ in by):
        kl = [f"{by[*key, g]['path_kl']:.3f}" if (*key, g) in by else "" for g in grids]
        lines.append("| " + " | ".join([key[0], key[1], str(key[2]), *kl]) + " |")
        e = [f"{by[*key, g]['energy']:.4f}" if "energy" in by.get((*key, g), {}) else "" for g in (*grids, "free end")]
        if any(e):
            quality.append("| " + " | ".join([key[0], key[1], str(key[2]), *e]) + " |")
    counts = []
    for metric in ("path_kl", "energy"):
        for own in (*OWN, "free end"):
            d = [x[metric] for x in results["duels"] if x["own"] == own and metric in x]
            if d:
                ahead, behind = sum(x[2] < 0 for x in d), sum(x[1] > 0 for x in d)
                counts.append(f"| {metric} | {own} | {ahead} | {len(d) - ahead - behind} | {behind} |")
    adaptive_lines = [
        "| target | kernel | mode | steps | NFE | path KL | path KL x steps | path KL x NFE |",
        "|---" * 8 + "|",
    ]
    for a in results["adaptive"]:
        adaptive_lines.append(
            f"| {a['target']} | {a['kernel']} | {a['mode']} | {a['steps']:.1f} | {a['nfe']:.1f} | {a['path_kl']:.3f} ± "
            f"{1.96 * a['se']:.3f} | {a['path_kl'] * a['steps']:.2f} | {a['path_kl'] * a['nfe']:.2f} |"
        )
    parts = [
        f"Path KL in nats up to the last evaluation (measured {results['date']}):",
        "\n".join(lines),
        f"Energy distance of {results['samples']} samples:",
        "\n".join(quality),
        "Pairs of an own grid and one of uniform, uniform-logsnr and Karras, by their 95% intervals:",
        "\n".join(["| | own grid | ahead | level | behind |", "|---|---|---|---|---|", *counts]),
        "Adaptive steps (path KL falls as 1 / steps, so that its product with steps or evaluations compares them):",
        "\n".join(adaptive_lines),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="budget")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--part", choices=("all", "grids", "adaptive"), default="all", help="what to run")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments.minutes, arguments.threads, arguments.part)
    report()


if __name__ == "__main__":
    main()
