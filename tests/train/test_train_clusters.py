"""Clusters as strata: found, a function of images and seed, and what they take off the variance of a mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.data import TensorImages, load
from lowvar.errors import UserError
from lowvar.process import CosineVP
from lowvar.process.noise import Independent
from lowvar.train import DrawPlan, cluster_labels, config_from
from lowvar.train.clusters import LIMIT
from lowvar.train.parts import make_plan


def blobs(sizes: tuple[int, ...]) -> tuple[TensorImages, Tensor]:
    """Well separated groups of rows in mixed order, and their numbers."""
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[Independent(4).uniform(range(len(group)), ()).argsort()]
    centres = torch.tensor([[-0.8, 0.0], [0.8, 0.0], [0.0, 0.9], [0.0, -0.9]])[: len(sizes)]
    return TensorImages(centres[group] + 0.02 * Independent(5).uniform(range(len(group)), (2,))), group


@pytest.mark.parametrize("limit", [LIMIT, 50])
def test_separate_groups_are_found(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvar.train.clusters.LIMIT", limit)
    images, group = blobs((70, 40, 20))
    labels = cluster_labels(images, 3, seed=1)
    assert labels.dtype == torch.int64
    pairs = {(int(a), int(b)) for a, b in zip(labels, group, strict=True)}
    assert len(pairs) == 3
    assert torch.equal(labels, cluster_labels(images, 3, seed=1))


def test_few_different_images() -> None:
    same = TensorImages(torch.zeros(5, 2))
    assert cluster_labels(same, 3).unique().numel() == 1
    assert cluster_labels(blobs((2, 1))[0], 16).shape == (3,)


def test_batches_hold_the_clusters_in_proportion_and_the_mean_varies_less() -> None:
    """Digits: the batch mean's variance is the one within clusters (W / V = .48), not that of all; chances stay."""
    images = load("digits").train
    config = config_from({"strata": "cluster", "batch_size": 57, "seed": 2})
    plan = make_plan(config, images, CosineVP())
    assert plan.labels is not None
    x = images.images(range(len(images))).flatten(1).double()
    sizes = plan.labels.bincount()
    assert len(sizes) == 16
    within = sum(float(((x[plan.labels == c] - x[plan.labels == c].mean(0)) ** 2).sum()) for c in range(16))
    share = within / float(((x - x.mean(0)) ** 2).sum())

    def variance(of: DrawPlan) -> float:
        batches = [of.permutation(e)[: 57 * 21].reshape(21, 57) for e in range(20)]
        means = torch.stack([x[rows].mean(0) for epoch in batches for rows in epoch])
        return float(means.var(0).sum())

    ratio = variance(plan) / variance(make_plan(config_from({"batch_size": 57, "seed": 2}), images, CosineVP()))
    assert share == pytest.approx(0.48, abs=0.02)
    assert ratio == pytest.approx(share, rel=0.15)
    for rows in plan.permutation(3)[: 57 * 20].reshape(20, 57):
        counts = plan.labels[rows].bincount(minlength=16)
        assert float((counts - 57 * sizes / len(images)).abs().max()) < 2
    assert torch.equal(plan.permutation(3).sort().values, torch.arange(len(images)))


@pytest.mark.parametrize("values", [{"strata": "clusters"}, {"strata": "class"}])
def test_what_does_not_fit_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"strata is ('clusters'|class, but the data have no classes; give strata clus)"
    ):
        make_plan(config_from(values), blobs((3, 3))[0], CosineVP())


def test_no_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 0; give at least 1 cluster"):
        cluster_labels(blobs((3, 3))[0], 0)


def test_the_number_of_clusters_is_a_setting() -> None:
    images, group = blobs((30, 20, 10, 12))
    for word, count in (("cluster:4", 4), ("cluster:2", 2), ("cluster", 16)):
        config = config_from({"strata": word, "batch_size": 6})
        assert config.clusters == count
        plan = make_plan(config, images, CosineVP())
        assert plan.labels is not None
        assert len(plan.labels.unique()) == count
    four = make_plan(config_from({"strata": "cluster:4", "batch_size": 6}), images, CosineVP()).labels
    assert four is not None
    assert len({(int(a), int(b)) for a, b in zip(four, group, strict=True)}) == 4
    assert config_from({"strata": "class"}).clusters is None
    assert config_from({}).clusters is None
    for word in ("cluster:1", "cluster:", "cluster:x", "clusters", "class:3", "Cluster:4"):
        with pytest.raises(UserError, match=f"strata is '{word}'; give none, class, cluster or cluster:K"):
            config_from({"strata": word})
