r"""The coefficient of the Gaussian twin, beta(l), against that of its remainder, kappa(a, b): which is worth having.

The reverse ODE (in the twin's basis, centred, y = x' / sigma, u = e^l = alpha / sigma, v = 1 + c u^2) with the twin's
denoiser D = u c sigma / v y as a control variate of coefficient beta,

    x0_hat = m + beta(l) D + r,     dy / dl = beta (v - 1) / v y + u r,     Phi(l -> s) = exp int_l^s beta (v - 1) / v,

is integrated by the exponential Adams formulas of `lowvar.process.multistep` (which are beta = 1, or 0 without a twin):
only Phi and the gain of the remainder change, and the weights of r are one quadrature a direction, once a grid.

    none      beta = 0
    twin      beta = 1
    beta      beta(l) = Cov(x0_hat, D) / Var(D) at the level l, over noisy calibration data: the literal optimum
    limited   beta(l) limited to [0, 1]: the twin may fade, and no more
    path      beta of the grid's own steps, Cov(dx0_hat, dD) / Var(dD) of the increments along the network's own paths
    kappa     beta = 1, and r_k stands for r(l) as kappa(l_k, l) r_k (order 1; `lowvar.process.path`)

at order 1 and as predictor-corrector of two points, all on the trailing grid from the same noise, ending with the
posterior mean. beta and kappa are pooled over the same groups of directions, and measured on what no score sees.

For an exact denoiser beta(l) is 1 whatever the data's law: E x0_hat x_t' = E x_0 x_t' = alpha c, which is what D has.
So `beta` can differ from `twin` by the network's error only, and cannot fade where the twin knows nothing.

    python benchmarks/linear_coefficient.py     # writes results/linear_coefficient.json and docs/results/..md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate import fit_twin, path_moments
from lowvar.metrics import Replicates
from lowvar.process.denoiser import Denoiser
from lowvar.process.flow import TwinFlow
from lowvar.process.multistep import MultistepPlan, MultistepSolver, _gauss_legendre, _Step  # type: ignore[attr-defined]
from lowvar.process.noise import Independent
from lowvar.process.path import PathMoments, spread_groups
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.process.solver import Solver, State, StepInfo
from lowvar.process.twin import GaussianTwin

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "linear_coefficient.json"
TABLE = ROOT / "docs" / "results" / "linear_coefficient.md"
STEPS, SEEDS = (3, 5, 8), (0, 1)
FORMS = {
    "order 1": (1, 0, ("none", "twin", "beta", "limited", "path", "kappa")),
    "predictor-corrector": (2, 2, ("none", "twin", "beta", "limited", "path")),
}
_FINE = 4001


@dataclass(frozen=True)
class Coefficient:
    """beta by group of directions at increasing l, linear in between and flat outside.

    Attributes:
        l: (L,).
        value: (L, G).
        groups: of the directions, (d,).
    """

    l: Tensor
    value: Tensor
    groups: Tensor

    @classmethod
    def constant(cls, value: float, d: int) -> Coefficient:
        """One number everywhere."""
        two = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return cls(two, torch.full((2, 1), value, dtype=torch.float64), torch.zeros(d, dtype=torch.long))

    def at(self, l: Tensor) -> Tensor:
        """beta, (*l.shape, d)."""
        place = torch.searchsorted(self.l, l.contiguous()).clamp(1, len(self.l) - 1)
        low, high = self.l[place - 1], self.l[place]
        weight = ((l - low) / (high - low)).clamp(0, 1)[..., None]
        return (self.value[place - 1] * (1 - weight) + self.value[place] * weight)[..., self.groups]


@dataclass(frozen=True)
class WithCoefficient(Solver):
    """`MultistepSolver` at tau = 0 whose plan is made with beta, and the remainder's trend kappa where it is given.

    Args:
        base: twin, predictor and corrector; its decay is the remainder's trend v^-p.
        beta: the twin's coefficient.
        kappa: path moments of the remainder, for a predictor of one point.
    """

    base: MultistepSolver
    beta: Coefficient
    kappa: PathMoments | None = None

    @property
    def order(self) -> int:
        """The base's."""
        return self.base.order

    @property
    def stochastic(self) -> bool:
        """No."""
        return False

    def prepare(self, levels: Level) -> MultistepPlan:
        """The base's plan with other transitions, gains and weights."""
        plan, twin = self.base.prepare(levels), self.base.twin
        assert twin is not None, "beta is the coefficient of a twin"
        c = twin.spectrum.double().flatten()
        l = levels.logsnr / 2
        gain = [g * self.beta.at(l[k]).reshape(g.shape) for k, g in enumerate(plan.gain)]
        steps = [None if s is None else self._step(l, k, c, s) for k, s in enumerate(plan.steps)]
        return MultistepPlan(plan.mean, plan.shift, plan.sigma, gain, steps)

    def _step(self, l: Tensor, k: int, c: Tensor, like: _Step) -> _Step:
        shape, t, s = like.phi.shape, float(l[k]), float(l[k + 1])
        fine = torch.linspace(t, s, _FINE, dtype=torch.float64)
        cu2 = c * torch.exp(2 * fine)[:, None]
        rate = self.beta.at(fine) * cu2 / (1 + cu2)
        area = torch.cumulative_trapezoid(rate, fine, dim=0)
        left = area[-1] - torch.cat([torch.zeros(1, len(c), dtype=torch.float64), area])  # from each l to s
        x, w = _gauss_legendre(self.base.nodes)
        nodes = t + (s - t) * (1 + x) / 2
        place = (nodes - t) / (s - t) * (_FINE - 1)
        low = place.floor().long().clamp(max=_FINE - 2)
        part = (place - low)[:, None]
        phi = torch.exp(left[low] * (1 - part) + left[low + 1] * part)
        v = 1 + c * torch.exp(2 * nodes)[:, None]
        weight = phi * v**-self.base.decay * ((s - t) / 2 * w * torch.exp(nodes))[:, None]
        old = [float(l[j]) for j in range(k, max(k - 3, -1), -1)]

        def project(points: Sequence[float]) -> Tensor:
            at = [(1 + c * torch.exp(torch.tensor(2 * p, dtype=torch.float64))) for p in points]
            return self.base._project(nodes, weight, list(points), at)

        if self.kappa is not None:
            trend = self.kappa.trust(2 * t, 2 * nodes)[0][:, spread_groups(c)]
            predictor = (phi * trend * ((s - t) / 2 * w * torch.exp(nodes))[:, None]).sum(0)[None]
        else:
            predictor = project(old[: self.base.predictor])
        correction = None
        if like.correction is not None:
            better = project([s, *old[: self.base.corrector - 1]])
            correction = torch.zeros(like.correction.shape[0], len(c), dtype=torch.float64)
            correction[: len(better)] += better
            correction[1 : 1 + len(predictor)] -= predictor
            correction = correction.reshape(-1, *shape)
        return _Step(torch.exp(left[0]).reshape(shape), like.std, predictor.reshape(-1, *shape), correction)

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return self.base.start(x)

    def step(
        self, plan: MultistepPlan, k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """See the base class."""
        return self.base.step(plan, k, state, posterior, z)


# ------------------------------------------------------------------------------------------------------------ measured


def _pooled(pairs: Sequence[tuple[Tensor, Tensor]], groups: Tensor) -> Tensor:
    """sum E D x0_hat / sum E D^2 over a group's directions for each pair (D, x0_hat), centred, (n, d); (L, G)."""
    rows = []
    for D, x0 in pairs:
        D, x0 = (v.flatten(1).double() - v.flatten(1).double().mean(0) for v in (D, x0))
        top, bottom = (torch.zeros(int(groups.max()) + 1, dtype=torch.float64) for _ in range(2))
        top.index_add_(0, groups, (D * x0).mean(0))
        bottom.index_add_(0, groups, (D * D).mean(0))
        rows.append(top / bottom.clamp_min(1e-300))
    return torch.stack(rows)


def _both(denoiser: Denoiser, twin: GaussianTwin, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """D and x0_hat in the twin's basis."""
    x0 = denoiser(x, level).mean
    return twin.basis.forward(twin.posterior(x, level).mean - twin.mean.to(x)), twin.basis.forward(x0)


@torch.no_grad()
def level_beta(
    denoiser: Denoiser, twin: GaussianTwin, data: Tensor, knots: int = 25, replicates: int = 4
) -> Coefficient:
    """beta(l) at equally spaced levels over noisy calibration data."""
    schedule, groups = denoiser.schedule, spread_groups(twin.spectrum)
    logsnr = torch.linspace(float(schedule.logsnr(1.0)), float(schedule.logsnr(schedule.t_min)), knots).double()
    pairs = []
    for k, value in enumerate(logsnr):
        level, parts = schedule.at(schedule.time(value)), []
        for r in range(replicates):
            eps = Independent(11).normal(range(len(data)), data.shape[1:], draw=k * replicates + r, dtype=data.dtype)
            x = float(level.alpha) * data + float(level.sigma) * eps
            parts += [_both(denoiser, twin, part, level) for part in x.split(256)]
        pairs.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    return Coefficient(logsnr / 2, _pooled(pairs, groups), groups)


@torch.no_grad()
def path_beta(denoiser: Denoiser, twin: GaussianTwin, grid: Tensor, n: int = 512, levels: int = 40) -> Coefficient:
    """beta of the increments between the grid's levels along fine reverse paths, at the middles of the steps."""
    schedule, groups = denoiser.schedule, spread_groups(twin.spectrum)
    own = schedule.at(grid[:-1]).logsnr
    low, high = float(own[0]), float(own[-1])
    fine = torch.cat([own, torch.linspace(low, high, levels, dtype=torch.float64)[1:-1]]).unique()
    points = schedule.at(torch.cat([schedule.time(fine), torch.zeros(1, dtype=torch.float64)]))
    solver = TwinFlow(twin)
    plan, seen = solver.prepare(points), {}
    z = Independent(12).normal(range(n), twin.mean.shape)
    state = solver.start(solver.initial(z, schedule.at(1.0), points[0]))
    for k, value in enumerate(fine.tolist()):
        x0 = denoiser(state.x, points[k])
        if bool((own - value).abs().min() < 1e-9):
            mean = twin.posterior(state.x, points[k]).mean - twin.mean.to(state.x)
            seen[value] = twin.basis.forward(mean), twin.basis.forward(x0.mean)
        state, _ = solver.step(plan, k, state, x0, None)
    at = sorted(seen)
    pairs = [(seen[b][0] - seen[a][0], seen[b][1] - seen[a][1]) for a, b in pairwise(at)]
    middles = torch.tensor([(a + b) / 4 for a, b in pairwise(at)], dtype=torch.float64)
    value = _pooled(pairs, groups)
    if len(middles) == 1:
        middles, value = torch.cat([middles, middles + 1]), torch.cat([value, value])
    return Coefficient(middles, value, groups)


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Case:
    """A target with one denoiser and what was measured on it."""

    denoiser: Denoiser
    twin: GaussianTwin
    data: Tensor
    clip: float | None
    score: Callable[[Tensor], dict[str, Replicates]]


def solvers(case: Case, schedule: Schedule, steps: int, kept: dict[str, Any]) -> dict[tuple[str, str], Solver]:
    """The solvers by form and coefficient; `kept` holds what does not depend on the grid."""
    from lowvar.process.grid import trailing

    d = case.twin.mean.numel()
    if not kept:
        kept["beta"] = level_beta(case.denoiser, case.twin, case.data)
        kept["kappa"] = path_moments(case.denoiser, case.twin)
    coefficients = {
        "none": Coefficient.constant(0.0, d),
        "twin": Coefficient.constant(1.0, d),
        "beta": kept["beta"],
        "limited": replace(kept["beta"], value=kept["beta"].value.clamp(0, 1)),
        "kappa": Coefficient.constant(1.0, d),
    }
    if any("path" in names for _, _, names in FORMS.values()):
        coefficients["path"] = path_beta(case.denoiser, case.twin, trailing(schedule, steps))
    return {
        (form, name): WithCoefficient(
            MultistepSolver(case.twin, q, c), coefficients[name], kept["kappa"] if name == "kappa" else None
        )
        for form, (q, c, names) in FORMS.items()
        for name in names
    }


def run(n: dict[str, int]) -> dict[str, Any]:
    """Every cell, by target; intervals are of both seeds together."""
    from lowvar.process.grid import trailing
    from lowvar.sample import generate

    found: dict[tuple[Any, ...], list[dict[str, Replicates]]] = {}
    betas: dict[str, Any] = {}
    for target in n:
        for seed in SEEDS:
            case, kept = cases(target, seed), {}
            schedule = case.denoiser.schedule
            for steps in STEPS:
                grid = trailing(schedule, steps)
                for (form, name), solver in solvers(case, schedule, steps, kept).items():
                    noise, shape = Independent(40_000 + seed), tuple(case.twin.mean.shape)
                    x = generate(case.denoiser, solver, grid, shape, n[target], noise, batch_size=512, clip=case.clip)
                    x = torch.nan_to_num(x, nan=1e3, posinf=1e3, neginf=-1e3)
                    found.setdefault((target, steps, form, name), []).append(case.score(x))
                    print(
                        target, seed, steps, form, name, round(found[target, steps, form, name][-1]["frechet"].value, 4)
                    )
            value = kept["beta"].value
            betas.setdefault(target, []).append(
                {
                    "logsnr": (2 * kept["beta"].l).tolist(),
                    "largest": value[:, -1].tolist(),
                    "smallest": value[:, 0].tolist(),
                }
            )
    rows = []
    for (target, steps, form, name), scores in found.items():
        for metric in scores[0]:
            row = {
                "target": target,
                "steps": steps,
                "form": form,
                "coefficient": name,
                "metric": metric,
                "n": n[target],
            }
            row |= combined([s[metric].interval() for s in scores])
            base = found[target, steps, form, "twin"]
            row["minus_twin"] = combined(
                [a[metric].minus(b[metric]).interval() for a, b in zip(scores, base, strict=True)]
            )
            rows.append(row)
    return {"date": dt.date.today().isoformat(), "seeds": list(SEEDS), "rows": rows, "beta": betas}


def combined(intervals: list[Any]) -> dict[str, float]:
    """Mean over seeds with its 95% interval."""
    value = sum(i.value for i in intervals) / len(intervals)
    half = sum(((i.high - i.low) / 2) ** 2 for i in intervals) ** 0.5 / len(intervals)
    return {"value": value, "low": value - half, "high": value + half}


def cases(target: str, seed: int) -> Case:
    """mixture8 with its exact posterior; the demo's digits network of a training seed."""
    if target == "mixture8":
        from fewstep_targets import TARGETS

        mixture: Any = TARGETS[target]
        twin = fit_twin(mixture._draws(4, 20_000).split(1024))
        return Case(mixture.denoiser(seed), twin, mixture.calibration_data(), None, mixture.replicates)
    from lowvar.cli.models import open_model
    from lowvar.data import load
    from lowvar.metrics import Scorer

    data = load("digits")
    model = open_model(NETWORKS / f"seed{seed}" / "model", torch.device("cpu"))
    assert model.calibration is not None
    scorer = Scorer(data, metrics=("frechet", "energy", "spectrum"), cache=NETWORKS)
    return Case(model.denoiser, model.calibration.twin, data.calibration.all(), 1.0, scorer.replicates)


def markdown(result: dict[str, Any]) -> str:
    """The page's table."""
    rows = {
        (r["target"], r["form"], r["coefficient"], r["steps"]): r for r in result["rows"] if r["metric"] == "frechet"
    }
    caption = (
        "Frechet distance, mean of two seeds with 95% intervals; in brackets the paired difference to `twin`, bold "
        f"where its interval excludes 0. Measured {result['date']}.\n"
    )
    lines = [
        caption,
        "| target | form | coefficient | " + " | ".join(f"{s} NFE" for s in STEPS) + " |",
        "|---" * (3 + len(STEPS)) + "|",
    ]
    for target in dict.fromkeys(r["target"] for r in result["rows"]):
        for form, (_, _, names) in FORMS.items():
            for name in names:
                texts = []
                for steps in STEPS:
                    r = rows[target, form, name, steps]
                    d = r["minus_twin"]
                    text = f"{r['value']:.3f} ± {(r['high'] - r['low']) / 2:.3f}"
                    if name != "twin":
                        mark = "**" if d["low"] > 0 or d["high"] < 0 else ""
                        text += f" ({mark}{d['value']:+.3f}{mark})"
                    texts.append(text)
                lines.append("| " + " | ".join([target, form, name, *texts]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mixture", type=int, default=8192, help="samples a cell of mixture8")
    parser.add_argument("--digits", type=int, default=2048, help="samples a cell of digits; 0: leave them out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"mixture8": arguments.mixture, "digits": arguments.digits}
    result = run({name: size for name, size in sizes.items() if size})
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(markdown(result))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
