r"""Variance of the training gradient: what each part of `lowvar.train` takes off it, at matched cost.

A cell is a data set, a process, a prediction and a moment of training. Its network (a U-Net of width 32; for the table,
scikit-learn's breast cancer data, the residual MLP) is trained by the plain recipe: AdamW, independent draws, the
process's own times, uniform or EDM's lognormal ones. At the moment's weights, R replicate batches of B samples are
drawn by every method, and

    V   = tr Cov(g) over replicate batches: draws inside a batch may depend on one another
    VRF = V_plain / V_method x (cost of a plain batch / cost of the method's batch)

once with cost in network evaluations and once in seconds of this process (forward, backward and draws, medians of
interleaved batches). Intervals are the jackknife over replicates of log VRF; methods share sample numbers, so noise is
common where they allow it. `bias` is ||E g_method - E g_plain||^2 / (V_plain / R) by an estimate that is 0 in the mean
for an unbiased method (over pairs of different replicates); its interval is the jackknife's.

    python benchmarks/training.py --cells digits-vp-v --minutes 20     # missing cells
    python benchmarks/training.py --report                             # results and docs page
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.gradients import controlled
from lowvar.metrics.intervals import Interval, Replicates
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, Flow, Schedule
from lowvar.train import (
    CrossPairs,
    DrawPlan,
    Draws,
    EntropyRateTimes,
    FixedTimes,
    GradientNormTimes,
    LearnedScheduleTimes,
    LognormalTimes,
    LossSecondMomentTimes,
    NetworkConfig,
    Objective,
    OrthogonalNoise,
    PlainTarget,
    ReferencePlan,
    SameImagePairs,
    Simple,
    SobolPoints,
    UniformTimes,
    build_network,
    reference_noise,
    taylor_variate,
)
from lowvar.train.timesteps import Times

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "training"
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "training.json", ROOT / "docs" / "results" / "training.md"

BATCH, REPLICATES = 64, 64
MOMENTS = {"start": 50, "middle": 500, "end": 2000}


@dataclass(frozen=True)
class Cell:
    """Data, process and prediction."""

    data: str
    process: str
    prediction: str

    @property
    def name(self) -> str:
        """What the command line calls it."""
        short = {"v_prediction": "v", "epsilon": "eps"}.get(self.prediction, self.prediction)
        return "-".join(dict.fromkeys([self.data.replace(":", ""), self.process, short]))


CELLS = {
    c.name: c
    for c in (
        Cell("digits", "vp", "v_prediction"),
        Cell("digits", "vp", "epsilon"),
        Cell("digits", "edm", "edm"),
        Cell("digits", "flow", "flow"),
        Cell("photos:16", "vp", "v_prediction"),
        Cell("photos:16", "vp", "epsilon"),
        Cell("photos:16", "edm", "edm"),
        Cell("photos:16", "flow", "flow"),
        Cell("table", "vp", "epsilon"),
    )
}


def schedule_of(cell: Cell) -> Schedule:
    """The noise schedule of a process."""
    if cell.process == "vp":
        return schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})
    return VE() if cell.process == "edm" else Flow()


def times_of(cell: Cell, schedule: Schedule) -> FixedTimes:
    """The plain recipe's times."""
    if cell.process == "edm":
        return LognormalTimes(schedule)
    return UniformTimes(1000 if cell.process == "vp" else None, t_min=1e-5)


@lru_cache(maxsize=2)
def data_of(name: str) -> Any:
    """The data set; `table` is scikit-learn's breast cancer data as a file of 30 columns."""
    from lowvar.data import load

    if name != "table":
        return load(name)
    from sklearn.datasets import load_breast_cancer

    path = CACHE / "breast-cancer.csv"
    table: Any = load_breast_cancer(as_frame=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.data.to_csv(path, index=False)
    return load(str(path))


# ------------------------------------------------------------------------------------------------------------- networks


def network_at(cell: Cell, moment: str) -> nn.Module:
    """The network of a cell at a moment; trained, with its earlier moments kept, where that is missing."""
    from safetensors.torch import load_file, save_file

    data, folder = data_of(cell.data), CACHE / "networks" / cell.name
    network: Any = build_network(data.shape, NetworkConfig(width=32), None, seed=0)
    loss = torch.tensor(math.nan)
    if not (folder / f"{moment}.safetensors").exists():
        schedule = schedule_of(cell)
        plan, times = DrawPlan(data.train, schedule, BATCH, 0), times_of(cell, schedule)
        denoiser = NetworkDenoiser(network, schedule, cell.prediction)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.0)
        folder.mkdir(parents=True, exist_ok=True)
        for update in range(MOMENTS[moment]):
            draws = plan.draws(update, times)
            loss = Objective(Simple()).losses(denoiser, draws.x0, draws.eps, draws.level).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            for name, at in MOMENTS.items():
                if update + 1 == at:
                    save_file(network.state_dict(), folder / f"{name}.safetensors")
        print(f"{cell.name}: trained, last loss {float(loss.detach()):.4f}", flush=True)
    network.load_state_dict(load_file(folder / f"{moment}.safetensors"))
    return network.eval()


# -------------------------------------------------------------------------------------------------------------- methods

Batch = Callable[[int], Tensor]  # the loss of replicate batch r, with its graph


@dataclass(frozen=True)
class Method:
    """How a batch is drawn and reduced.

    Attributes:
        plan: further arguments of `DrawPlan`.
        times: importance-sampled times: learned on a pilot, or None for the cell's own.
        stable: whether x_0 in the target is the stable target's, over at most 2,048 images.
        taylor: whether the loss is controlled by its Taylor expansion of order 1, with coefficients by logsnr.
        strata: whether a batch holds the classes in proportion, for data that have them.
    """

    plan: dict[str, Any]
    times: str | None = None
    stable: bool = False
    taylor: bool = False
    strata: bool = False

    @property
    def evaluations(self) -> float:
        """Of the network, over plain's: a Taylor variate adds one with a directional derivative, two more."""
        return 3.0 if self.taylor else 1.0


SAME: dict[str, Any] = {"pairing": SameImagePairs()}
CROSS: dict[str, Any] = {"pairing": CrossPairs(), "stratified": True}
SOBOL: dict[str, Any] = {"pairing": SobolPoints(BATCH)}
AUTO = "importance, gradient norms + stable + cross + stratified"
METHODS: dict[str, Method] = {
    "plain": Method({}),
    "stratified": Method({"stratified": True}),
    "same-image pairs": Method(SAME),
    "cross pairs": Method({"pairing": CrossPairs()}),
    "orthogonal noise": Method({"pairing": OrthogonalNoise(4)}),
    "sobol": Method(SOBOL),
    "importance, losses": Method({}, "losses"),
    "importance, gradient norms": Method({}, "gradient norms"),
    "importance, entropy rate": Method({}, "entropy rate"),
    "importance, learned schedule": Method({}, "learned schedule"),
    "class strata": Method({}, strata=True),
    "taylor control variate": Method({}, taylor=True),
    "stable target": Method({}, stable=True),
    "cross + stratified": Method(CROSS),
    "stable + cross + stratified": Method(CROSS, stable=True),
    "stable + same + stratified": Method(SAME | {"stratified": True}, stable=True),
    "importance, losses + cross + stratified": Method(CROSS, "losses"),
    "importance, losses + stable + cross + stratified": Method(CROSS, "losses", stable=True),
    "importance, gradient norms + stable + cross + stratified": Method(CROSS, "gradient norms", stable=True),
    "importance, losses + stable + sobol": Method(SOBOL, "losses", stable=True),
    "importance, gradient norms + stable + sobol": Method(SOBOL, "gradient norms", stable=True),
}


def batches(cell: Cell, denoiser: NetworkDenoiser, method: Method, times: Times) -> Batch:
    """Replicate batches of a method."""
    data = data_of(cell.data)
    strata = {"labels": data.train.labels} if method.strata else {}
    plan = DrawPlan(data.train, denoiser.schedule, BATCH, 1, Independent(1), **method.plan, **strata)
    objective = Objective(Simple())
    references = ReferencePlan(data.train, 2048, reference_noise(1)) if method.stable else None

    def loss(r: int) -> Tensor:
        draws = plan.draws(1000 + r, times)
        target = PlainTarget() if references is None else references.target(1000 + r)
        losses = objective.losses(denoiser, draws.x0, draws.eps, draws.level, target)
        if method.taylor:
            return taylor_controlled(losses.loss, draws).mean()
        return (draws.weight.to(losses.loss) * losses.loss).mean()

    def taylor_controlled(own: Tensor, draws: Draws) -> Tensor:
        x0, level = draws.x0, draws.level
        v, mean = taylor_variate(lambda eps: objective.losses(denoiser, x0, eps, level).loss, draws.eps)
        return controlled(own, v, mean, bins=(level.logsnr > 0).long() + (level.logsnr > 4).long())

    return loss


# ---------------------------------------------------------------------------------------------------------- measurement


def gradient(network: nn.Module, loss: Tensor, keep: bool = False) -> Tensor:
    """The gradient of a loss as one vector, float32; `keep` the graph for others."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()), retain_graph=keep)])


def variance(gram: Tensor, kept: Tensor) -> Tensor:
    """tr Cov of the replicates `kept` from their inner products: (sum |g|^2 - |sum g|^2 / n) / (n - 1)."""
    g = gram[kept][:, kept]
    n = len(kept)
    return (g.diagonal().sum() - g.sum() / n) / (n - 1)


def apart(gram: Tensor, cross: Tensor, plain: Tensor, kept: Tensor) -> Tensor:
    """||E g - E g_plain||^2 without bias: over pairs of different replicates."""
    d = (gram - cross - cross.T + plain)[kept][:, kept]
    n = len(kept)
    return (d.sum() - d.diagonal().sum()) / (n * (n - 1))


def interval(statistic: Callable[[Tensor], Tensor], n: int) -> Interval:
    """A statistic of the kept replicates with its jackknife interval."""
    everyone = torch.arange(n)
    without = torch.stack([statistic(everyone[everyone != j]) for j in range(n)]).double()
    return Replicates(float(statistic(everyone)), without, torch.ones(n)).interval()


def run_cell(cell: Cell, moment: str, names: Collection[str]) -> dict[str, Any]:
    """The methods of those names, and plain, in one cell."""
    network = network_at(cell, moment)
    denoiser = NetworkDenoiser(network, schedule_of(cell), cell.prediction)  # type: ignore[arg-type]
    learned = lru_cache(None)(partial(learn_times, cell, denoiser, network))
    classes = data_of(cell.data).train.labels is not None
    chosen = {k: m for k, m in METHODS.items() if (k == "plain" or k in names) and (classes or not m.strata)}
    losses = {k: batches(cell, denoiser, m, learned(m.times, m.stable)) for k, m in chosen.items()}
    gradients: dict[str, list[Tensor]] = {k: [] for k in chosen}
    seconds: dict[str, list[float]] = {k: [] for k in chosen}
    for r in range(REPLICATES):
        for name, loss in losses.items():  # interleaved, so that a busy machine slows all alike
            begun = time.perf_counter()
            gradients[name].append(gradient(network, loss(r)))
            seconds[name].append(time.perf_counter() - begun)
    stacked = {k: torch.stack(g) for k, g in gradients.items()}
    shift = stacked["plain"].mean(0)
    for g in stacked.values():
        g.sub_(shift)  # inner products of what differs, in float32 without cancellation
    plain = (stacked["plain"] @ stacked["plain"].T).double()
    rows = []
    for name, g in stacked.items():
        gram, cross = (g @ g.T).double(), (g @ stacked["plain"].T).double()
        price = METHODS[name].evaluations
        log_vrf = interval(
            lambda kept, gram=gram, price=price: (variance(plain, kept) / variance(gram, kept) / price).log(),
            REPLICATES,
        )
        bias = interval(
            lambda kept, gram=gram, cross=cross: apart(gram, cross, plain, kept) / (variance(plain, kept) / len(kept)),
            REPLICATES,
        )
        ratio = sorted(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))[REPLICATES // 2]
        row = {"method": name, "vrf": math.exp(log_vrf.value), "low": math.exp(log_vrf.low)}
        row |= {"high": math.exp(log_vrf.high), "seconds_ratio": ratio, "bias": bias.value, "bias_low": bias.low}
        rows.append(row)
        print(f"{cell.name} {moment} {name}: VRF {row['vrf']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", flush=True)
    return {"cell": cell.name, "moment": moment, "batch": BATCH, "replicates": REPLICATES, "rows": rows}


def learn_times(cell: Cell, denoiser: NetworkDenoiser, network: nn.Module, word: str | None, stable: bool) -> Times:
    """Importance-sampled times, from a pilot of which no replicate knows; None: the plain ones."""
    plain = times_of(cell, denoiser.schedule)
    if word is None:
        return plain
    times: Times
    if word == "gradient norms":
        times = GradientNormTimes(plain=plain)
    elif word == "learned schedule":
        times = LearnedScheduleTimes(plain)
    elif word == "entropy rate":
        times = EntropyRateTimes(denoiser.schedule, denoiser.prediction, plain=plain)
    else:
        times = LossSecondMomentTimes(1000) if cell.process == "vp" else LossSecondMomentTimes(64, plain=plain)
    objective, images = Objective(Simple()), data_of(cell.data).train
    norms = times.learns_from == "squared gradient norms"
    plan = DrawPlan(images, denoiser.schedule, 50 if norms else 1000, 2, Independent(2), stratified=True)
    references = ReferencePlan(images, 2048, reference_noise(2)) if stable else None
    for update in range(10):
        draws = plan.draws(update, times)
        target = PlainTarget() if references is None else references.target(update)
        with torch.set_grad_enabled(norms):
            seen = objective.losses(denoiser, draws.x0, draws.eps, draws.level, target).loss
        if norms:
            parts = seen.split(1)
            seen = torch.stack([gradient(network, part.sum(), keep=True).square().sum() for part in parts])
        times = times.updated(draws.bin, seen)
    return times


# --------------------------------------------------------------------------------------------------------------- report


def _path(cell: Cell, moment: str) -> Path:
    return CACHE / "cells" / f"{cell.name}@{moment}.json"


def _kept(cell: Cell, moment: str) -> dict[str, Any] | None:
    """What was measured of a cell: in the folder of cells, else in the committed results."""
    if (path := _path(cell, moment)).exists():
        return json.loads(path.read_text())
    committed = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
    return next((c for c in committed if (c["cell"], c["moment"]) == (cell.name, moment)), None)


def places() -> Iterator[tuple[Cell, str]]:
    """All cells."""
    return ((cell, moment) for moment in ("end", "middle", "start") for cell in CELLS.values())


def report() -> None:
    """Writes the results of the cells that were run."""
    found = [c for cell, moment in places() if (c := _kept(cell, moment)) is not None]
    results = {
        "what": "Variance of the training gradient by method, at matched cost",
        "date": dt.date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "cells": found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    rows = {(c["cell"], c["moment"]): {r["method"]: r for r in c["rows"]} for c in found}
    names = [c for c in CELLS if any((c, moment) in rows for moment in MOMENTS)]
    lines = [
        (
            f"VRF of `auto` at equal network evaluations with 95% intervals, batches of {BATCH}, {REPLICATES} "
            f"replicate batches; in brackets the median time of a batch over plain's. Measured {results['date']} with "
            f"torch {torch.__version__}; script `benchmarks/training.py`."
        ),
        "",
        "| network | " + " | ".join(f"{moment}, {updates} updates" for moment, updates in MOMENTS.items()) + " |",
        "|---" * (len(MOMENTS) + 1) + "|",
    ]

    def of_auto(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"{row['vrf']:.2f} [{row['low']:.2f}, {row['high']:.2f}] ({row['seconds_ratio']:.2f})"

    for name in names:
        texts = [of_auto(rows.get((name, moment), {}).get(AUTO)) for moment in MOMENTS]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    values = sorted(r[AUTO]["vrf"] for (_, moment), r in rows.items() if AUTO in r and moment != "start")
    if values:
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        lines += ["", f"Over the {len(values)} trained networks: least {values[0]:.2f}, median {middle:.2f}."]
    lines += [
        "",
        (
            f"Every part, {', '.join(MOMENTS)}; `*`: the interval holds 1, `biased`: an expected gradient that is not "
            "plain's (its interval is above 0). All intervals are in `benchmarks/results/training.json`."
        ),
        "",
        "| method | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]

    def short(row: dict[str, Any] | None) -> str:
        if row is None:
            return "–"
        around = "*" if row["low"] < 1 < row["high"] else ""
        return f"{row['vrf']:.2f}{around}" + (" biased" if row["bias_low"] > 0 else "")

    for method in METHODS:
        if method == "plain":
            continue
        cells = [" / ".join(short(rows.get((name, m), {}).get(method)) for m in MOMENTS) for name in names]
        lines.append("| " + " | ".join([method + (" (`auto`)" if method == AUTO else ""), *cells]) + " |")
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{RESULTS}\n{TABLE}")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help="comma separated")
    parser.add_argument("--moments", default="end,middle,start", help="comma separated")
    parser.add_argument("--only", default="", help="text that a method's name must contain")
    parser.add_argument("--minutes", type=float, default=60, help="budget, processor minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    unknown = [c for c in arguments.cells.split(",") if c not in CELLS]
    if unknown:
        parser.error(f"cells are {', '.join(unknown)}; allowed: {', '.join(CELLS)}")
    if arguments.report:
        report()
        return
    torch.set_num_threads(arguments.threads)
    end = time.process_time() + 60 * arguments.minutes
    for cell, moment in places():
        wanted = cell.name in arguments.cells.split(",") and moment in arguments.moments.split(",")
        known = (_kept(cell, moment) or {"rows": []})["rows"]
        missing = {k for k in METHODS if arguments.only in k} - {row["method"] for row in known}
        if not wanted or not missing or time.process_time() > end:
            continue
        made = run_cell(cell, moment, missing)
        made["rows"] = known + [row for row in made["rows"] if row["method"] in missing]
        path = _path(cell, moment)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made))


if __name__ == "__main__":
    main()
