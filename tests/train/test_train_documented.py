"""The table of parts in docs/training.md says what the code says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowvar.train
from lowvar.process import CosineVP
from lowvar.train.pairs import Pairing
from lowvar.train.timesteps import Times

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def rows() -> list[list[str]]:
    text = PAGE.read_text().split("<!-- parts -->")[1].split("<!-- end -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_label(row: list[str]) -> None:
    part = getattr(lowvar.train, row[0].strip("`"))
    label = part.label
    if isinstance(label, property):  # depends on the settings: those of the default
        given: dict[str, tuple[Any, ...]] = {"StableTarget": (torch.zeros(1, 2),), "LognormalTimes": (CosineVP(),)}
        label = part(*given.get(part.__name__, ())).label
    assert label == row[3]


@pytest.mark.parametrize("base", [Times, Pairing, lowvar.train.Weighting])
def test_every_part_is_in_the_table(base: type) -> None:
    named = {row[0].strip("`") for row in rows()}
    public = {
        n for n in lowvar.train.__all__ if isinstance(c := getattr(lowvar.train, n), type) and issubclass(c, base)
    }
    assert public - named <= {
        base.__name__,
        "FixedTimes",
        "GivenTimes",
        "IndependentSamples",
        "LearnedBins",
        "LikelihoodOnly",
    }
