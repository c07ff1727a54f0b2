r"""Reward tuning on digits: gradient variances, and reward calls to a fixed reward, against DDPO and AWM.

`reward_setting` says what is tuned, `reward_variance` what is measured of gradients, `reward_curves` of tuning runs,
`reward_peers` what DDPO and AWM are. Runs are kept in build/benchmarks/reward (or $LOWVAR_BENCHMARKS/reward) and in the
results, and are not made again.

    python benchmarks/reward.py --part variance
    python benchmarks/reward.py --part curves --minutes 30
    python benchmarks/reward.py --report
"""

from __future__ import annotations

import argparse
import time

import torch
from kept import Kept
from reward_curves import METHODS, SEEDS, TUNING_SEED, Setting, chosen, name_of, run, settings
from reward_report import report
from reward_setting import BUILD, REWARDS, ROOT
from reward_variance import cell, cells

RESULTS, TABLE = ROOT / "benchmarks" / "results" / "reward.json", ROOT / "docs" / "results" / "reward.md"
KEPT = Kept(BUILD, RESULTS)


def made(reward: str, setting: Setting, seed: int, end: float) -> None:
    """Makes a run where it was not made."""
    name = name_of(reward, setting, seed)
    if KEPT[name] is None and time.process_time() <= end:
        KEPT[name] = run(reward, setting, seed)


def make(part: str, rewards: list[str], end: float) -> None:
    """Makes the runs of a part that are missing, until the processor time `end`."""
    if part == "variance":
        for reward, moment in (c for c in cells() if c[0] in rewards):
            name = f"variance/{reward}-{moment}"
            if KEPT[name] is None and time.process_time() <= end:
                KEPT[name] = cell(reward, moment)
        return
    for reward in rewards:
        for setting in (s for method in METHODS for s in settings(method, reward)):
            made(reward, setting, TUNING_SEED, end)
    best = {reward: chosen(KEPT.all(), reward) for reward in rewards}
    for seed in SEEDS:
        for reward in rewards:
            for setting in {s: None for column in best[reward].values() for s in column.values()}:
                made(reward, setting, seed, end)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("variance", "curves"), default="variance")
    parser.add_argument("--minutes", type=float, default=60, help="budget, processor minutes")
    parser.add_argument("--rewards", default=",".join(REWARDS), help="comma separated")
    parser.add_argument("--report", action="store_true", help="only write the results from the runs that were made")
    arguments = parser.parse_args()
    if not arguments.report:
        torch.set_num_threads(1)
        make(arguments.part, arguments.rewards.split(","), time.process_time() + 60 * arguments.minutes)
    report(KEPT.all(), RESULTS, TABLE)


if __name__ == "__main__":
    main()
