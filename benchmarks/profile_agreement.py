r"""Do the factors that `lowvar profile` measures agree with those of `benchmarks/training.py`?

Both measure the variance of a batch's gradient with a technique against plain draws, on the same networks at the same
moments: this with the profile's own estimator (`lowvar.profile.measure`), on batches of other numbers, with pilots of
its own. A cell, one technique on one network, agrees where the two 95% intervals overlap; the goal is 90% of them.
Intervals of two measurements of one quantity overlap in more than 95%, so what is missing is what the two do
differently: the stable target's references are 1,024 here and up to 2,048 there, and times are learned on other pilots.

    python benchmarks/profile_agreement.py --minutes 20     # missing networks
    python benchmarks/profile_agreement.py --report         # results and docs page
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import time
from typing import Any

import torch
import training as t  # in the same folder

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.profile import Measured, measure
from lowvar.train import Objective, Simple

CACHE = t.CACHE.parent / "profile"
RESULTS, TABLE = t.ROOT / "benchmarks" / "results" / "profile.json", t.ROOT / "docs" / "results" / "profile.md"
PLACES = (("digits-vp-v", "end"), ("digits-vp-v", "middle"), ("photos16-vp-v", "middle"))
SEED = 1000  # other batches than the benchmark's
NAMES = {
    "stratified times": "stratified",
    "sobol points": "sobol",
    "times by losses": "importance, losses",
    "times by gradient norms": "importance, gradient norms",
    "cross pairs, stratified times": "cross + stratified",
    "stable target, cross pairs, stratified times": "stable + cross + stratified",
    "auto": t.AUTO,
}


def run(cell: str, moment: str, replicates: int) -> dict[str, Any]:
    """The profile's factors on a network."""
    begun, one = time.process_time(), t.CELLS[cell]
    network, schedule = t.network_at(one, moment), t.schedule_of(one)
    network.requires_grad_(True)
    denoiser = NetworkDenoiser(network, schedule, one.prediction)  # type: ignore[arg-type]
    last: Measured | None = None
    for last in measure(
        denoiser,
        Objective(Simple()),
        t.data_of(one.data).train,
        replicates=replicates,
        batch_size=t.BATCH,
        times=t.times_of(one, schedule),
        seed=SEED,
    ):
        print(f"{cell} {moment}: {last.replicates} replicates", flush=True)
    assert last is not None
    rows = [{"name": r.name, "vrf": r.vrf, "low": r.low, "high": r.high, "cost": r.cost} for r in last.reductions]
    seconds = round(time.process_time() - begun, 1)
    return {"cell": cell, "moment": moment, "replicates": last.replicates, "processor_seconds": seconds, "rows": rows}


def benchmark(cell: str, moment: str) -> dict[str, Any]:
    """Rows of `benchmarks/results/training.json` by method."""
    cells = json.loads(t.RESULTS.read_text())["cells"]
    found = next((c for c in cells if (c["cell"], c["moment"]) == (cell, moment)), {"rows": []})
    return {row["method"]: row for row in found["rows"]}


def report() -> None:
    """Writes the results, and the table of the docs."""
    kept = [json.loads(p.read_text()) for c, m in PLACES if (p := CACHE / f"{c}@{m}.json").exists()]
    lines, agree, total = [], 0, 0
    for cell in kept:
        known = benchmark(cell["cell"], cell["moment"])
        for row in cell["rows"]:
            name = str(row["name"])
            other = known.get(NAMES.get(name, name))
            if other is None:
                continue
            row["benchmark"] = {k: other[k] for k in ("vrf", "low", "high")}
            row["overlap"] = row["low"] <= other["high"] and other["low"] <= row["high"]
            agree, total = agree + row["overlap"], total + 1
            texts = [f"{r['vrf']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in (row, other)]
            place = f"{cell['cell']}, {cell['moment']}"
            lines.append(f"| {place} | {row['name']} | {texts[0]} | {texts[1]} | {'yes' if row['overlap'] else 'no'} |")
    results = {
        "what": "Factors of lowvar profile beside those of benchmarks/training.py",
        "date": dt.date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "agree": agree,
        "cells": total,
        "networks": kept,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    intro = (
        f"Variance-reduction factors with 95% intervals, batches of {t.BATCH}: as `lowvar profile` measures them, and "
        f"as `benchmarks/training.py` did. {agree} of {total} intervals overlap. Measured {results['date']} with torch "
        f"{torch.__version__}; script `benchmarks/profile_agreement.py`."
    )
    table = [
        intro,
        "",
        "| network | technique | profile | benchmark | overlap |",
        "|---|---|---|---|---|",
        *lines,
    ]
    TABLE.write_text("\n".join(table) + "\n")
    print(f"{agree} of {total}\n{RESULTS}\n{TABLE}")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="budget, processor minutes between networks")
    parser.add_argument("--replicates", type=int, default=48, help="batches of each technique")
    parser.add_argument("--report", action="store_true", help="only write the results from what was run")
    arguments = parser.parse_args()
    if arguments.report:
        report()
        return
    torch.set_num_threads(1)
    end = time.process_time() + 60 * arguments.minutes
    CACHE.mkdir(parents=True, exist_ok=True)
    for cell, moment in PLACES:
        path = CACHE / f"{cell}@{moment}.json"
        if not path.exists() and time.process_time() < end:
            path.write_text(json.dumps(run(cell, moment, arguments.replicates)))


if __name__ == "__main__":
    main()
