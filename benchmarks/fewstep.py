r"""Few-step sampling on five targets: lowvar's samplers against diffusers' schedulers and DPM-Solver-v3 at equal NFE.

What it claims, and how it is made to hold:

- every sampler runs the *same* network (fewstep_networks.py: stock diffusers training, plain MSE) or the same exact
  score, from the *same* starting noise; 8,192 samples a cell, two training seeds, intervals by the block jackknife over
  32 blocks, paired on common noise, training seeds combined as independent;
- peers are as shipped, with their default spacing and with their best one, which is picked on a pilot of 1,024 samples
  with other seeds (by Frechet distance at 5 NFE for 3 and 5, at 10 NFE for the rest), and clip x0 as ours does wherever
  they offer it;
- cost is the number of network evaluations (NFE);
- scores are against held-out data (fewstep_targets.py), with the floor (data against data), the Gaussian twin alone
  (0 NFE) and the network's own samples at 200 evaluations beside them.

Cells are kept in build/benchmarks/fewstep (or $LOWVAR_BENCHMARKS/fewstep), those of trained networks in the results too
(the networks are the same when they are trained again), and not run again; our own are run again where their
declaration changes.

    python benchmarks/fewstep_networks.py                          # trains the four networks
    python benchmarks/fewstep.py --targets digits --minutes 90     # missing cells, few steps first
    python benchmarks/fewstep.py --report                          # benchmarks/results/fewstep.json, docs/results/
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fewstep_samplers import DEFAULT, drawn, is_own, key, own_rows, peer_rows, with_memory
from fewstep_targets import CACHE, RESULTS, TARGETS, Target
from kept import Kept

from lowvar.metrics import Replicates
from lowvar.process.noise import Independent

__all__ = ["KEPT", "NFES", "PILOT", "Place", "cells", "converged", "main", "pick"]

KEPT = Kept(CACHE / "runs", RESULTS)
NFES = (3, 5, 8, 10, 20, 50)
PHASES = ((3, 5), (8, 10), (20, 50))
OWN_EXTRA = {DEFAULT: (1, 2, 4)}  # where half of a peer's NFE falls between the columns
PILOT = {"n": 1024, "seed": 90_000, "nfe": (5, 10)}
CONVERGED = (("dpmsolver++", 200), ("sde-dpmsolver++", 200))
CONVERGED_N = {"digits": 2048, "photos": 2048}


@dataclass(frozen=True)
class Place:
    """One cell: sampler, NFE and, of a peer, its spacing."""

    sampler: str
    nfe: int
    spacing: str | None = None

    @property
    def label(self) -> str:
        """`sampler@nfe@spacing`."""
        return f"{self.sampler}@{self.nfe}" + (f"@{self.spacing}" if self.spacing else "")

    def name(self, target: str, seed: int, n: int) -> str:
        """What the cell is kept as."""
        return f"{target}/seed{seed}/n{n}/{self.sampler}@{self.nfe}@{key(self.sampler, self.spacing)}"


class Clock:
    """The budget: processor time of this process, so that a busy machine does not cut it short."""

    def __init__(self, minutes: float) -> None:
        self.end = time.process_time() + 60 * minutes

    @property
    def spent(self) -> bool:
        """Whether it is used up."""
        return time.process_time() > self.end


# --------------------------------------------------------------------------------------------------------------- pilot


def pilot(name: str, clock: Clock, nfes: Sequence[int] = NFES) -> dict[str, dict[str, dict[str, float | None]]]:
    """{peer: {nfe: {spacing: Frechet distance}}} for the columns `nfes`, run where it is missing.

    None stands where a spacing diverges or fails.
    """
    found = KEPT[f"{name}/pilot"] or {}
    target, denoiser = TARGETS[name], None
    for nfe in sorted({_pilot_of(k) for k in nfes}):
        for row in peer_rows(name):
            scores = found.setdefault(row.name, {}).setdefault(str(nfe), {})
            for spacing in row.spacings:
                if spacing in scores or clock.spent:
                    continue
                if denoiser is None:
                    denoiser = with_memory(target.denoiser(0))
                begun = time.perf_counter()
                try:
                    x, *_ = drawn(name, 0, denoiser, row.name, nfe, spacing, PILOT["n"], Independent(PILOT["seed"]))
                    finite = bool(torch.isfinite(x).all())
                    scores[spacing] = target.replicates(x, ("frechet",))["frechet"].value if finite else None
                except (ValueError, IndexError, RuntimeError, AssertionError) as error:
                    print(f"{name} pilot {row.name}@{nfe}@{spacing}: {type(error).__name__}: {error}", flush=True)
                    scores[spacing] = None
                took = time.perf_counter() - begun
                print(f"{name} pilot {row.name}@{nfe}@{spacing} {scores[spacing]} ({took:.1f} s)", flush=True)
                KEPT[f"{name}/pilot"] = found
    return found


def _pilot_of(nfe: int) -> int:
    """The pilot's number of evaluations that speaks for a column."""
    return PILOT["nfe"][0] if nfe < 8 else PILOT["nfe"][1]


def pick(scores: dict[str, dict[str, dict[str, float | None]]], peer: str, nfe: int) -> str | None:
    """A peer's best spacing of the pilot for a number of evaluations; None before the pilot was run."""
    at = scores.get(peer, {}).get(str(_pilot_of(nfe)), {})
    able = {s: v for s, v in at.items() if v is not None and math.isfinite(v)}
    return min(able, key=lambda s: able[s]) if able else None


# --------------------------------------------------------------------------------------------------------------- cells


def _reduced(name: str, seeds: Sequence[int], n: int, scores: dict[str, Any]) -> list[str]:
    """The peers of 20 and 50 evaluations: every stochastic one and the best three at 10."""
    at_10 = {}
    for row in peer_rows(name):
        spacing = pick(scores, row.name, 10)
        values = [KEPT[Place(row.name, 10, spacing).name(name, s, n)] for s in seeds] if spacing else []
        known = [v["scores"]["frechet"]["value"] for v in values if v and v["scores"]]
        if known:
            at_10[row.name] = sum(known) / len(known)
    best = sorted(at_10, key=lambda peer: at_10[peer])[:3]
    return [row.name for row in peer_rows(name) if row.stochastic or row.name in best]


def cells(name: str, nfes: Sequence[int], seeds: Sequence[int], n: int, scores: dict[str, Any]) -> Iterator[Place]:
    """The cells of a target in the order they are run: few steps first, best spacings before default ones."""
    for phase in PHASES:
        inside = [nfe for nfe in phase if nfe in nfes]
        if not inside:
            continue
        few = max(inside) <= 10
        peers = peer_rows(name)
        if not few:
            able = _reduced(name, seeds, n, scores)
            peers = [row for row in peers if row.name in able]
        for nfe in inside:
            for row in peers:
                spacing = pick(scores, row.name, nfe)
                if spacing is not None:
                    yield Place(row.name, nfe, spacing)
        for nfe in inside:
            yield from (Place(own, nfe) for own in own_rows())
        if few:
            for own, extra in OWN_EXTRA.items():
                yield from (Place(own, nfe) for nfe in extra if own in own_rows() and phase == PHASES[0])
        for nfe in inside:
            for row in peers:
                if pick(scores, row.name, nfe) not in (None, row.default):
                    yield Place(row.name, nfe, row.default)


def fields(r: Replicates) -> dict[str, Any]:
    """Replicates as they are kept: eight digits."""
    without = [float(f"{v:.8g}") for v in r.leave_out.tolist()]
    return {"value": r.value, "leave_out": without, "sizes": r.sizes.tolist()}


def record(target: Target, samples: torch.Tensor, nfe: int, grid: str, seconds: float) -> dict[str, Any]:
    """A cell as it is kept."""
    bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
    made: dict[str, Any] = {"nfe": nfe, "grid": grid, "n": len(samples), "seconds": round(seconds, 3), "scores": None}
    if bad:
        return made | {"diverged": bad}
    begun = time.perf_counter()
    made["scores"] = {metric: fields(r) for metric, r in target.replicates(samples).items()}
    return made | {"scoring_seconds": round(time.perf_counter() - begun, 3)}


def reference(name: str, seed: int, n: int) -> None:
    """Floor, twin alone and what the target is, once."""
    kept = f"{name}/seed{seed}/n{n}/reference"
    if KEPT[kept] is not None:
        return
    target = TARGETS[name]
    denoiser = target.denoiser(seed)
    x = Independent(1).normal(range(256), target.shape)
    with torch.no_grad():
        denoiser(x, denoiser.schedule.at(0.5))
        begun = time.process_time()
        denoiser(x, denoiser.schedule.at(0.5))
    seconds = (time.process_time() - begun) / 256
    print(f"{name} seed {seed}: {1e3 * seconds:.2f} ms an evaluation", flush=True)
    calibration = target.calibration(seed)
    twin = calibration.twin.sample(Independent(10_000 + seed).normal(range(n), target.shape))
    twin = twin if denoiser.clip is None else twin.clamp(-denoiser.clip, denoiser.clip)
    assert calibration.mixture is not None
    mixture = calibration.mixture.sample(
        Independent(20_000 + seed).uniform(range(n), (1,))[:, 0],
        Independent(10_000 + seed).normal(range(n), target.shape),
    )
    mixture = mixture if denoiser.clip is None else mixture.clamp(-denoiser.clip, denoiser.clip)
    KEPT[kept] = {
        "floor": {m: fields(r) for m, r in target.floor(n).items()},
        "twin alone": record(target, twin.float(), 0, "none", 0.0),
        "mixture twin alone": record(target, mixture.float(), 0, "none", 0.0)
        | {"components": calibration.mixture.components},
        "about": target.about(),
        "seconds_an_evaluation": seconds,
    }


def converged(name: str, n: int) -> int:
    """Samples of the rows at 200 evaluations."""
    return min(n, CONVERGED_N.get(name, n))


def run(arguments: argparse.Namespace) -> None:
    """Runs missing cells until the budget of each target is spent."""
    torch.set_num_threads(arguments.threads)
    seeds = [int(s) for s in arguments.seeds.split(",")]
    nfes = [int(s) for s in arguments.nfe.split(",")]
    n = arguments.n
    for name in arguments.targets.split(","):
        target, clock = TARGETS[name], Clock(arguments.minutes)
        scores = pilot(name, clock, nfes) if arguments.rows != "own" else KEPT[f"{name}/pilot"] or {}
        for seed in seeds:
            reference(name, seed, n)
        memory = {seed: with_memory(target.denoiser(seed)) for seed in seeds}
        done = 0
        for phase in PHASES:
            for place in cells(name, [k for k in nfes if k in phase], seeds, n, scores):
                wanted = arguments.rows == "all" or (arguments.rows == "own") == is_own(place.sampler)
                if not wanted or not re.search(arguments.only, place.label):
                    continue
                for seed in seeds:
                    kept = place.name(name, seed, n)
                    if KEPT[kept] is not None or clock.spent:
                        continue
                    x, nfe, grid, seconds = drawn(name, seed, memory[seed], place.sampler, place.nfe, place.spacing, n)
                    KEPT[kept] = made = record(target, x, nfe, grid, seconds)
                    done += 1
                    value = made["scores"]["frechet"]["value"] if made["scores"] else math.nan
                    print(f"{name} seed {seed} {place.label} frechet {value:.4g} ({seconds:.1f} s)", flush=True)
        for sampler, steps in CONVERGED:
            place = Place(sampler, steps, "linspace")
            few = converged(name, n)
            for seed in seeds:
                kept = place.name(name, seed, few)
                if (
                    KEPT[kept] is not None
                    or clock.spent
                    or arguments.rows == "own"
                    or not re.search(arguments.only, place.label)
                ):
                    continue
                x, nfe, grid, seconds = drawn(name, seed, memory[seed], sampler, steps, "linspace", few)
                KEPT[kept] = record(target, x, nfe, grid, seconds)
        print(f"{name}: {done} cells{'; budget spent, run again to go on' if clock.spent else ''}", flush=True)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma separated")
    parser.add_argument("--nfe", default=",".join(map(str, NFES)), help="comma separated")
    parser.add_argument("--seeds", default="0,1", help="training seeds, comma separated")
    parser.add_argument("--rows", choices=("all", "own", "peers"), default="all", help="which samplers are run")
    parser.add_argument("--only", default="", help="regular expression that sampler@nfe@spacing must match")
    parser.add_argument("--n", type=int, default=8192, help="samples a cell")
    parser.add_argument("--minutes", type=float, default=90, help="budget of a target, processor minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    unknown = [t for t in arguments.targets.split(",") if t not in TARGETS]
    if unknown:
        parser.error(f"targets are {', '.join(unknown)}; allowed: {', '.join(TARGETS)}")
    if not arguments.report:
        run(arguments)
        return
    from fewstep_report import report

    report(arguments.n, [int(s) for s in arguments.seeds.split(",")])


if __name__ == "__main__":
    main()
