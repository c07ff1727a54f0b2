"""Details of pictures: exact on small ones, invariant where they should be, and worth a candidate of their own."""

from __future__ import annotations

import math

import pytest
import torch

from lowvar.metrics import statistic_named
from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
from lowvar.reward import Floor, Policy, RewardProblem, SurrogateControl, edges, estimator_named, reward_named
from lowvar.reward.report import candidates


def test_sums_of_a_checkerboard() -> None:
    """+-1 in turn: only the diagonal detail of each block, +-2; 4 blocks of 4 x 4 pixels, and one a pixel further."""
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    x[..., ::2, 1::2] = x[..., 1::2, ::2] = -1
    found = edges(x)[0].reshape(7, 3)
    for k, s in enumerate((0.02, 0.1, 0.5)):
        one = 0.5 * math.log1p((2 / s) ** 2)
        assert found[2, k] == pytest.approx(4 * one)
        assert found[6, k] == pytest.approx(one)
    assert found[[0, 1, 3, 4, 5]].abs().max() == 0


def test_signs_and_brightness_do_not_matter() -> None:
    x = 0.4 * Independent(0).normal(range(3), (3, 9, 8), dtype=torch.float64)
    x = x.clamp(-0.5, 0.5)
    assert edges(x).shape == (3, 63)
    assert torch.allclose(edges(-x), edges(x))
    assert torch.allclose(edges(x + 0.25), edges(x))
    x = x.requires_grad_(True)
    assert bool((torch.autograd.grad(edges(x).sum(), x)[0].abs() > 0).any())


@pytest.mark.parametrize("shape", [(2, 8), (2, 1, 3, 8)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="edges are of pictures"):
        edges(torch.zeros(shape))


def test_they_explain_the_size_of_a_file() -> None:
    """Regression on held-out pictures of every roughness: what is left of the JPEG size's variance, below a fifth."""
    source, n = Independent(1), 600
    smooth = source.normal(range(n), (1, 2, 2))
    rough = source.normal(range(n), (1, 8, 8), draw=1)
    share = source.uniform(range(n), (1, 1, 1), draw=2)
    x = (torch.nn.functional.interpolate(smooth, scale_factor=4.0) * (1 - share) + rough * share).clamp(-1, 1)
    size = statistic_named("jpeg")(x).double()
    columns = torch.cat([edges(x).double(), torch.ones(n, 1, dtype=torch.float64)], 1)
    weights = torch.linalg.lstsq(columns[:400], size[:400, None]).solution
    left = size[400:] - (columns[400:] @ weights)[:, 0]
    assert float(left.var()) < 0.2 * float(size[400:].var())


def test_candidates_of_pictures_and_black_boxes_have_them() -> None:
    schedule, shift = CosineVP(), torch.zeros(1, 8, 8, requires_grad=True)

    def named(reward: str, shape: tuple[int, ...]) -> list[str]:
        twin = GaussianTwin(shift.reshape(shape), PixelBasis(shape), torch.ones(shape))
        policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 4), Floor(0.1))
        return [e.name for e in candidates(RewardProblem(policy, reward_named(reward), [shift], shape))]

    own = {"scores, x0 baseline of edges", "surrogate control variate of edges"}
    assert own <= set(named("jpeg", (1, 8, 8)))
    assert not own & set(named("brightness", (1, 8, 8)))
    assert not own & set(named("jpeg", (64,)))
    made = estimator_named("surrogate-edges")
    assert isinstance(made, SurrogateControl)
    assert made.features is edges
