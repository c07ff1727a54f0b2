"""Shares during training: what they cost is bounded, by a clock that the test turns; nothing of the run changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvar.data import load
from lowvar.profile import SharesRecord, watched, watching
from lowvar.profile.crossed import Crossed
from lowvar.train import TrainConfig, Trainer, Update

torch.set_num_threads(1)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(monkeypatch: pytest.MonkeyPatch, update: float, block: float, updates: int, most: float) -> tuple[Any, ...]:
    """A run whose updates and blocks take so many seconds: spent, total, records, what was logged."""
    clock, spent, logged = Clock(), 0.0, []

    def records() -> Iterator[Update]:
        for u in range(updates):
            clock.now += update
            yield Update(u + 1, 0.0, 0.0, 0.0)

    def blocks(trainer: Any, memory: float) -> tuple[Iterator[Crossed], int]:
        def made() -> Iterator[Crossed]:
            nonlocal spent
            k = 0
            while True:
                clock.now += block
                spent += block
                k += 1
                terms = torch.rand(1, 7, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
                yield Crossed(terms, terms[:, 0], torch.rand(1, 2, 3).double(), torch.zeros(1, 2, dtype=torch.int64))

        return made(), 2

    monkeypatch.setattr(watching, "_blocks", blocks)
    log = SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    trainer: Any = SimpleNamespace(run=records, accelerator=log)
    found = [r for r in watched(trainer, 100, most=most, clock=clock) if isinstance(r, SharesRecord)]
    return spent, clock.now, found, logged


@pytest.mark.parametrize(("update", "block"), [(1.0, 0.5), (1.0, 30.0), (0.01, 0.012)], ids=["light", "heavy", "even"])
def test_the_price_is_bounded(monkeypatch: pytest.MonkeyPatch, update: float, block: float) -> None:
    """2% of the training's time, and at most the first block more, whose price nobody knew."""
    spent, total, records, logged = run(monkeypatch, update, block, 4000, 0.02)
    training = total - spent
    assert 0 < spent <= 0.02 * training + block
    if block <= 20 * update:
        assert spent > 0.015 * training
        assert records
        assert [step for step, _ in logged] == [r.update for r in records]
        assert set(logged[-1][1]) >= {"variance share/x", "variance share/t,eps", "variance share/part of the run"}
        assert records[-1].share <= 0.021


def test_no_time_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    spent, _, records, _ = run(monkeypatch, 1.0, 1.0, 40, 0.02)
    assert (spent, records) == (0.0, [])


def test_the_run_is_as_it_would_be() -> None:
    """Weights after updates with blocks between them are those without, and the shares come from the run's network."""
    config = TrainConfig(updates=18, batch_size=4, network={"width": 8}, warmup=0, head="none")  # type: ignore[arg-type]
    plain, other = (Trainer(load("digits"), config, device="cpu") for _ in range(2))
    for _ in plain.run():
        pass
    tick = count()
    records = list(watched(other, 18, most=0.99, clock=lambda: float(next(tick))))  # a block after every update
    assert any(isinstance(r, SharesRecord) for r in records)
    a, b = plain.ema_network().state_dict(), other.ema_network().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert sum(i.value for i in next(r for r in records if isinstance(r, SharesRecord)).sources.shares.values()) == (
        pytest.approx(1)
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"every is 0 and most 0\.02"):
        next(watched(SimpleNamespace(), 0))  # type: ignore[arg-type]
