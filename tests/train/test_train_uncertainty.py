"""Uncertainty weighting finds the log of the expected loss; curves are the weightings' formulas."""

from __future__ import annotations

import pytest
import torch

from lowvar.train import LikelihoodOnly, MinSNR
from lowvar.train.uncertainty import Uncertainty, weighting_curves


def test_optimum_is_the_log_of_the_expected_loss() -> None:
    """Minimising the convex loss in (amplitude, offset): u is the log of a loss that varies smoothly."""
    logsnr = torch.linspace(-10, 10, 200, dtype=torch.float64)
    target = -1.0 + 0.8 * torch.sin(logsnr / 5)
    weigh = Uncertainty(features=48, seed=3).double()
    optimiser = torch.optim.LBFGS(weigh.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = weigh(target.exp(), logsnr).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        assert float((weigh.log_uncertainty(logsnr) - target).abs().max()) < 0.02
        assert float((weigh.weight(logsnr) * target.exp() - 1).abs().max()) < 0.02  # every level contributes 1
        assert float(weigh(target.exp(), logsnr).mean()) == pytest.approx(float((1 + target).mean()), abs=1e-3)


def test_gradient_for_the_network_is_a_weight() -> None:
    weigh = Uncertainty(seed=1)
    with torch.no_grad():
        weigh.amplitude.normal_(generator=torch.Generator().manual_seed(0))
        weigh.offset.fill_(0.3)
    loss = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    logsnr = torch.tensor([-torch.inf, 0.0, 4.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(weigh(loss, logsnr).sum(), loss)
    torch.testing.assert_close(found, weigh.weight(logsnr))
    assert bool(torch.isfinite(found).all())


def test_state_and_seed() -> None:
    one, two, other = Uncertainty(seed=1), Uncertainty(seed=1), Uncertainty(seed=2)
    assert torch.equal(one.get_buffer("phase"), two.get_buffer("phase"))
    assert not torch.equal(one.get_buffer("phase"), other.get_buffer("phase"))
    with torch.no_grad():
        one.amplitude.add_(1)
    other.load_state_dict(one.state_dict())
    x = torch.linspace(-5, 5, 7)
    assert torch.equal(one.log_uncertainty(x), other.log_uncertainty(x))
    assert one.label == "changes the objective"
    with pytest.raises(ValueError, match="features is 0"):
        Uncertainty(0)


def test_curves() -> None:
    levels = torch.tensor([3.0, 0.0])
    curves = {c.name: c for c in weighting_curves("v_prediction", levels)}
    assert list(curves) == ["simple", "min-snr", "p2", "edm"]
    assert curves["simple"].logsnr.tolist() == [0, 3]
    snr = torch.tensor([0.0, 3.0], dtype=torch.float64).exp()
    torch.testing.assert_close(curves["simple"].weight, 1 + snr)
    torch.testing.assert_close(curves["min-snr"].weight, snr.clamp(max=5))
    torch.testing.assert_close(curves["p2"].weight, snr / (1 + snr))
    torch.testing.assert_close(curves["edm"].weight, snr + 4)
    assert all(float(c.relative.mean()) == pytest.approx(1) for c in curves.values())
    assert torch.equal(curves["simple"].relative, torch.ones(2, dtype=torch.float64))


def test_curves_with_what_was_learned() -> None:
    learned = Uncertainty()
    with torch.no_grad():
        learned.offset.add_(2.0)
    found = weighting_curves("epsilon", weightings={"m": MinSNR(), "none": LikelihoodOnly()}, uncertainty=learned)
    assert [c.name for c in found] == ["m", "none", "uncertainty"]
    torch.testing.assert_close(found[2].relative, torch.ones(121, dtype=torch.float64))
    assert float(found[1].relative.abs().max()) == 0
    with pytest.raises(ValueError, match="not finite"):
        weighting_curves("epsilon", torch.tensor([torch.inf]))
