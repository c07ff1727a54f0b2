r"""Training objectives: a weighting of the squared error by noise level, and a term for the variance head.

Every prediction target is a linear function of x_0 given x_t, so its squared error is the error of x0_hat times a
factor,

    ||target - out||^2 = k(logsnr) ||x_0 - x0_hat||^2,      k = snr              epsilon
                                                                1                sample
                                                                1 + snr          v (VP)
                                                                (1 + snr^1/2)^2  flow
                                                                snr + 1/sd^2     edm (sd = std of the data)

and an objective is *one weighting function of logsnr*, w(logsnr) on ||x_0 - x0_hat||^2, whatever the network predicts:

    loss = (w / k) ||target - out||^2 / d + variance term.

`Simple` has w = k (the plain mean squared error of the target). Labels say what a part of training does to the plain
one of the same prediction: `unbiased` (the same expected gradient), `changes the objective` (that of another loss, on
purpose) or `biased` (that of no loss: an approximation). From which x_0 the target is made is a matter of `targets`.

By default the variance term sees the mean detached, so the mean's gradient is that of the squared error alone, bit for
bit (Nichol & Dhariwal 2021, Sec. 3.1). With `detach_mean=False` the likelihood trains the mean too, and with
`LikelihoodOnly`, w = 0, nothing else does: with the bound of a step that is L_vlb of Ho et al. 2020.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvar.process.denoiser import NetworkDenoiser, Prediction, expand, to_target
from lowvar.process.schedule import Level
from lowvar.train.targets import PlainTarget, Target, implied_noise

__all__ = ["Label", "LikelihoodOnly", "Losses", "Objective", "Simple", "VarianceTerm", "Weighting", "log_error_factor"]

Label = Literal["unbiased", "changes the objective", "biased"]
_PLAIN = PlainTarget()
_BOUND = 60.0  # a weight is read at |logsnr| <= 60: schedules that begin at pure noise have -inf


def log_error_factor(prediction: Prediction, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Log k of the module's table, float64: squared error of the target over squared error of x0_hat.

    Raises:
        ValueError: if the prediction is unknown.

    Example:
        >>> round(float(log_error_factor("v_prediction", torch.tensor(0.0)).exp()), 6)
        2.0
    """
    logsnr = logsnr.double().clamp(-_BOUND, _BOUND)
    if prediction == "epsilon":
        return logsnr
    if prediction == "sample":
        return torch.zeros_like(logsnr)
    if prediction == "v_prediction":
        return F.softplus(logsnr)
    if prediction == "flow":
        return 2 * F.softplus(logsnr / 2)
    if prediction == "edm":
        return torch.logaddexp(logsnr, torch.full_like(logsnr, -2 * math.log(sigma_data)))
    raise ValueError(f"prediction is {prediction!r}; allowed: epsilon, sample, v_prediction, flow, edm")


class Weighting(ABC):
    """A weighting function w(logsnr) >= 0 of the squared error of x0_hat."""

    label: ClassVar[Label]

    @abstractmethod
    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """Log w at logsnr, float64; `prediction` matters for `Simple` only, whose plain loss depends on it."""

    def target_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """w / k: the factor on the target's squared error, float64."""
        logsnr = logsnr.double().clamp(-_BOUND, _BOUND)
        log_k = log_error_factor(prediction, logsnr, sigma_data)
        return torch.exp(self.log_weight(logsnr, prediction, sigma_data) - log_k)


@dataclass(frozen=True)
class Simple(Weighting):
    """w = k: the mean squared error of the prediction target, unweighted (Ho et al. 2020, L_simple). Label: unbiased.

    Example:
        >>> float(Simple().target_weight(torch.tensor(3.0), "v_prediction"))
        1.0
    """

    label: ClassVar[Label] = "unbiased"

    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """See the base class."""
        return log_error_factor(prediction, logsnr, sigma_data)


@dataclass(frozen=True)
class LikelihoodOnly(Weighting):
    """w = 0: the squared error is left out, and a variance term that sees the mean is all there is.

    Example:
        >>> float(LikelihoodOnly().target_weight(torch.tensor(3.0), "epsilon"))
        0.0
    """

    label: ClassVar[Label] = "changes the objective"

    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """See the base class."""
        return torch.full_like(logsnr.double(), -math.inf)


class VarianceTerm(ABC):
    """What trains a variance head; it is added to the loss times `factor`."""

    @abstractmethod
    def factor(self, denoiser: NetworkDenoiser) -> float:
        """The number the term is multiplied by in the loss."""

    @abstractmethod
    def bits(self, denoiser: NetworkDenoiser, x0: Tensor, x: Tensor, level: Level, out: Tensor, head: Tensor) -> Tensor:
        """The term a sample, bits a dimension, (B,), given the prediction `out` and the raw head output.

        Whether `out` carries a gradient is the objective's choice (`Objective.detach_mean`), not the term's.
        """


@dataclass(frozen=True)
class Losses:
    """Losses a sample, float32 or wider, (B,).

    Attributes:
        loss: what is minimised.
        error: mean squared error of the prediction target, unweighted.
        variance: the variance term in bits a dimension, without its factor; None without head.
    """

    loss: Tensor
    error: Tensor
    variance: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A weighting and, for networks with a variance head, a variance term.

    Args:
        weighting: of the squared error.
        variance: for the head, or None.
        detach_mean: whether the variance term sees the mean without its gradient.
        uncertainty: what the weighted squared error (B,) at logsnr (B,) is replaced with, a learned weight and its
            price (`uncertainty`); None: nothing.

    Raises:
        ValueError: if nothing trains the mean.

    Example:
        >>> from lowvar.process import CosineVP
        >>> schedule = CosineVP()
        >>> denoiser = NetworkDenoiser(lambda x, t: torch.zeros_like(x), schedule, "epsilon")
        >>> eps = torch.ones(2, 1, 2, 2)
        >>> Objective(Simple()).losses(denoiser, torch.zeros_like(eps), eps, schedule.at([0.2, 0.9])).loss.tolist()
        [1.0, 1.0]
    """

    weighting: Weighting
    variance: VarianceTerm | None = None
    detach_mean: bool = True
    uncertainty: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Checks that something trains the mean."""
        if isinstance(self.weighting, LikelihoodOnly) and (self.variance is None or self.detach_mean):
            raise ValueError(
                "LikelihoodOnly leaves the squared error out, so that a variance term with detach_mean=False must "
                "train the mean"
            )

    @property
    def label(self) -> Label:
        """`unbiased` if the expected gradient is that of the plain mean squared error, else `changes the objective`.

        A variance term, even where it leaves the mean's gradient alone, reaches what mean and head share, so it counts
        as a change.
        """
        plain = self.variance is None and self.uncertainty is None
        return self.weighting.label if plain else "changes the objective"

    def losses(
        self, denoiser: NetworkDenoiser, x0: Tensor, eps: Tensor, level: Level, target: Target = _PLAIN
    ) -> Losses:
        """Losses of the network at x_t = alpha x_0 + sigma eps.

        Args:
            denoiser: the network; its `clip` is not applied in training.
            x0: data, (B, *event_shape).
            eps: noise, same shape.
            level: (B,) levels with t > 0.
            target: from which x_0 the thing to predict is made; a variance term keeps the x_0 that is given.
        """
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
        out, head = denoiser.raw(x, level)
        return self.from_output(denoiser, x0, eps, x, level, out, head, target)

    def from_output(
        self,
        denoiser: NetworkDenoiser,
        x0: Tensor,
        eps: Tensor,
        x: Tensor,
        level: Level,
        out: Tensor,
        head: Tensor | None,
        target: Target = _PLAIN,
    ) -> Losses:
        """Losses from a network's raw output (see `NetworkDenoiser.raw`).

        Raises:
            ValueError: if there is a variance term and no head, or a head that nothing trains.
        """
        clean, noise = x0, eps
        if not isinstance(target, PlainTarget):
            clean = target.clean(x0, eps, level)
            noise = implied_noise(clean, x0, eps, level)
        wanted = to_target(denoiser.prediction, clean, noise, level, denoiser.sigma_data)
        error = ((wanted - out) ** 2).flatten(1).mean(1)
        loss = error
        if not isinstance(self.weighting, Simple):
            weight = self.weighting.target_weight(level.logsnr, denoiser.prediction, denoiser.sigma_data)
            loss = weight.to(error) * error
        if self.uncertainty is not None:
            loss = self.uncertainty(loss, level.logsnr)
        if (self.variance is None) != (head is None):
            raise ValueError(
                "the network has a variance head that no term of the objective trains"
                if self.variance is None
                else "the objective has a variance term, the network no variance head"
            )
        if self.variance is None or head is None:
            return Losses(loss, error)
        bits = self.variance.bits(denoiser, x0, x, level, out.detach() if self.detach_mean else out, head)
        return Losses(loss + self.variance.factor(denoiser) * bits.to(loss), error, bits.to(loss))
