r"""The reverse process as a program: gradients of E f(x_0) through a chain of Gaussian kernels.

    x_{k+1} ~ N(m_theta(x_k), C_k),   k = 0 .. K - 1,       cost f(x_K),

with an estimator for every step:

    "pathwise"     x_{k+1} = m + C^(1/2) z, differentiated through: exact, and the memory of a network evaluation a step
    "score"        x_{k+1} detached, zero(log p(x_{k+1} | x_k)) times the cost less a baseline: no derivative of f
    "stop"         x_{k+1} detached and nothing else: what came before has no gradient. Biased (truncation)
    Roulette(p)    pathwise; the gradient goes on to earlier steps with probability p, divided by p. Unbiased, and
                   backpropagation takes 1 / (1 - p) such steps on average

They may be mixed in any order, as sites of a program may; the usual mixture is `chain.last(k, rest)`: the last k steps
pathwise, where the derivative is short, and the rest by another rule. A step without noise (the last one, to clean
data) has no density and is not scored; a `floor` gives it one, N(m_theta, C + floor^2 I), and noise in the output.

Backpropagation keeps one state a segment of `checkpoint` steps and computes a segment again when its turn comes: noise
is a function of its number, so the second time it is the same. One step a segment keeps K states and one evaluation.

Sources: J. Schulman et al., "Gradient estimation using stochastic computation graphs", 2015; K. Clark, P. Vicol,
K. Swersky, D. Fleet, "Directly fine-tuning diffusion models on differentiable rewards", 2024 (last K steps);
T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as recomputed

from lowvar.gradients.baselines import Baseline, Nothing
from lowvar.gradients.estimator import GradientLabel, SiteState, zero
from lowvar.process.covariance import Diagonal, Isotropic
from lowvar.process.denoiser import Denoiser, NetworkDenoiser
from lowvar.process.kernel import Gaussian
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver

__all__ = ["ChainGradient", "ReverseChain", "Roulette", "StepRule", "reverse_chain"]


@dataclass(frozen=True)
class Roulette:
    """Pathwise with probability `keep`, for all samples of a batch together.

    Args:
        keep: in (0, 1].

    Raises:
        ValueError: if it is not.

    Example:
        >>> Roulette(0.75).keep
        0.75
    """

    keep: float

    def __post_init__(self) -> None:
        """Checks the probability."""
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; give a probability above 0, at most 1")


StepRule = Literal["pathwise", "score", "stop"] | Roulette


@dataclass(frozen=True)
class ChainGradient:
    """A batch of chains.

    Attributes:
        loss: its value is the mean cost, its gradient the estimate.
        costs: of each chain, (B,), without gradient.
        samples: the last states, (B, *shape), without gradient.
        log_prob: of the score steps, summed, (B,).
        state: of the baseline, after this batch.
        label: "biased" if a step is "stop".
        each: the chains' terms of the loss, (B,), with their graph.
    """

    loss: Tensor
    costs: Tensor
    samples: Tensor
    log_prob: Tensor
    state: SiteState
    label: GradientLabel
    each: Tensor


@dataclass(frozen=True, eq=False)
class ReverseChain:
    """See `reverse_chain`."""

    denoiser: Denoiser
    kernel: Solver
    levels: Level
    plan: Any = field(repr=False)
    floor: float | None = None

    @property
    def steps(self) -> int:
        """K."""
        return len(self.levels) - 1

    def clean(self, k: int) -> bool:
        """Whether step k is the one to clean data."""
        return k + 1 == self.steps and float(self.levels.sigma[-1]) == 0

    def noisy(self, k: int) -> bool:
        """Whether step k adds noise, as in `lowvar.sample.trajectory`; with a floor the step to clean data does too."""
        return self.floor is not None if self.clean(k) else self.kernel.stochastic

    def law(self, k: int, x: Tensor) -> Gaussian:
        """The kernel of step k at states x (B, *shape).

        Raises:
            ValueError: if the solver's steps are no Gaussian kernels.
        """
        return self.evaluated(k, x)[0]

    def evaluated(self, k: int, x: Tensor) -> tuple[Gaussian, Posterior]:
        """The kernel of step k at states x (B, *shape), and the posterior it was made from.

        Raises:
            ValueError: if the solver's steps are no Gaussian kernels.
        """
        posterior = self.denoiser(x, self.levels[k])
        state = self.kernel.start(x)
        law = None if state.memory is not None else self.kernel.step(self.plan, k, state, posterior, None)[1].law
        if law is None or self.kernel.nfe(2) != 2:
            raise ValueError(
                f"{type(self.kernel).__name__} has no density given the state alone; give a solver whose steps are "
                "Gaussian kernels: ReverseKernel, or WithNoise around one"
            )
        if self.floor and self.clean(k):
            law = Gaussian(law.mean, law.covariance.affine(self.floor**2, 1.0))
        return law, posterior

    def distribution(self, k: int, x: Tensor) -> Normal:
        """The kernel of step k at one state (*shape), for `s.markov` in a program.

        Raises:
            ValueError: if the covariance is not diagonal or the step has no noise.
        """
        law = self.law(k, x[None])
        if not isinstance(law.covariance, Diagonal | Isotropic) or not self.noisy(k):
            raise ValueError(f"step {k} is not a diagonal Gaussian with noise; use surrogate() or law()")
        return Normal(law.mean[0], law.covariance.diagonal().expand_as(law.mean)[0].sqrt())

    def last(self, k: int, rest: StepRule = "score") -> tuple[StepRule, ...]:
        """Rules: the last k noisy steps pathwise, those before by `rest`.

        Raises:
            ValueError: if k is out of range.
        """
        if not 0 <= k <= self.steps:
            raise ValueError(f"k is {k}; the chain has {self.steps} steps")
        noisy = [i for i in range(self.steps) if self.noisy(i)]
        early = set(noisy[: len(noisy) - k] if k else noisy)
        return tuple(rest if i in early else "pathwise" for i in range(self.steps))

    def start(
        self,
        source: NoiseSource,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The states at the first level, (B, *shape), from draw 0."""
        z = source.normal(index, shape, draw=0, dtype=dtype, device=device)
        return self.kernel.initial(z, self.denoiser.schedule.at(1.0), self.levels[0])

    def surrogate(
        self,
        cost: Callable[[Tensor], Tensor],
        source: NoiseSource,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        rules: StepRule | Sequence[StepRule] = "pathwise",
        baseline: Baseline | None = None,
        state: SiteState | None = None,
        checkpoint: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weight: Tensor | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> ChainGradient:
        """Runs chains and builds the surrogate of their cost.

        Args:
            cost: from the last states (B, *shape) to (B,).
            source: noise; draw 0 is the start, draw k + 1 the noise of step k, as in `lowvar.sample`.
            index: numbers of the samples, (B,).
            shape: of a state.
            rules: one for every step, or one for all.
            baseline: subtracted from the cost at score steps; None is 0.
            state: the baseline's.
            checkpoint: steps a segment that is computed again in the backward pass; 0 keeps everything (needed for
                second derivatives). None: 1, or 0 under `torch.func`, whose transforms cannot compute again.
            dtype, device: of the states.
            weight: of each chain in the loss, (B,); None: 1 / B.
            begin: (k, x): not at the start, but at step k from states x (B, *shape), which an earlier run gave.

        Raises:
            ValueError: if the rules do not fit the steps, a step without noise is to be scored, or segments are asked
                for under `torch.func`.
        """
        every: tuple[StepRule, ...]
        every = tuple(rules) if not isinstance(rules, str | Roulette) else (rules,) * self.steps  # pyright: ignore[reportAssignmentType]
        if len(every) != self.steps:
            raise ValueError(f"{len(every)} rules for {self.steps} steps; give one a step, or one for all")
        if isinstance(rules, str | Roulette):
            every = tuple(rule if self.noisy(k) else "pathwise" for k, rule in enumerate(every))
        for k, rule in enumerate(every):
            if rule not in ("pathwise", "score", "stop") and not isinstance(rule, Roulette):
                raise ValueError(f"step {k} has rule {rule!r}; allowed: pathwise, score, stop, Roulette(keep)")
            if rule == "score" and not self.noisy(k):
                raise ValueError(f"step {k} adds no noise, so it has no score; allowed there: pathwise, stop")
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        if checkpoint is None:
            checkpoint = 0 if transformed else 1
        if checkpoint < 0:
            raise ValueError(f"checkpoint is {checkpoint}; give a number of steps, or 0 to keep everything")
        if checkpoint and transformed:
            raise ValueError(
                f"checkpoint is {checkpoint} under a transform of torch.func, which cannot compute again; give 0 "
                "there, or call backward()"
            )
        index = torch.as_tensor(index)
        first, x = (0, self.start(source, index, shape, dtype=dtype, device=device)) if begin is None else begin
        log_prob = torch.zeros(len(index), dtype=dtype, device=device)

        def run(x: Tensor, log_prob: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
            for k in range(low, high):
                x, log_prob = self._step(k, x, log_prob, every[k], source, index)
            return x, log_prob

        size = checkpoint or self.steps
        for low in range(first, self.steps, size):
            high = min(low + size, self.steps)
            if checkpoint and torch.is_grad_enabled():
                x, log_prob = _recomputed(run, x, log_prob, low, high, _leaves(self.denoiser))
            else:
                x, log_prob = run(x, log_prob, low, high)
        value = cost(x)
        if value.shape != (len(index),):
            raise ValueError(f"the cost has shape {tuple(value.shape)}; give one number a chain, ({len(index)},)")
        rule, before = Nothing() if baseline is None else baseline, state
        if before is None:
            before = rule.start(Normal(0.0, 1.0))
        f = value.detach()
        each = value
        if "score" in every:
            each = value + (f - rule.subtracted({}, f, before).value.detach()) * zero(log_prob)
        loss = each.mean() if weight is None else (weight * each).sum()
        label: GradientLabel = "biased" if "stop" in every else "unbiased"
        return ChainGradient(loss, f, x.detach(), log_prob.detach(), rule.updated(before, {}, f), label, each)

    def _step(
        self, k: int, x: Tensor, log_prob: Tensor, rule: StepRule, source: NoiseSource, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        like = {"dtype": x.dtype, "device": x.device}
        if isinstance(rule, Roulette):
            u = source.uniform(index[:1], (), draw=k + 1, **like)
            goes_on = (u < rule.keep).to(x.dtype)
            x = x.detach() + goes_on / rule.keep * zero(x) if bool(goes_on) else x.detach()
        law = self.law(k, x)
        y = law.mean
        if self.noisy(k):
            y = law.sample(source.normal(index, x.shape[1:], draw=k + 1, **like))
        if rule in ("score", "stop"):
            y = y.detach()
        if rule == "score":
            log_prob = log_prob + law.log_prob(y)
        return y, log_prob


_Run = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


class _Segment(torch.autograd.Function):
    """A segment that keeps its input only, not even the graph of its operations."""

    @staticmethod
    def forward(ctx: Any, run: _Run, low: int, high: int, x: Tensor, log_prob: Tensor, *leaves: Tensor) -> Any:
        ctx.run, ctx.low, ctx.high, ctx.leaves = run, low, high, leaves
        ctx.save_for_backward(x, log_prob)
        with torch.no_grad():
            return run(x, log_prob, low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = [v.detach().requires_grad_() for v in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.run(*inputs, ctx.low, ctx.high)
        needed = [(out, g) for out, g in zip(outputs, grads, strict=True) if out.requires_grad]
        wanted = [*inputs, *ctx.leaves]
        found = torch.autograd.grad([o for o, _ in needed], wanted, [g for _, g in needed], allow_unused=True)
        return None, None, None, *found


def _leaves(denoiser: Denoiser) -> list[Tensor] | None:
    """What a denoiser is differentiated in, where that is known."""
    if type(denoiser) is not NetworkDenoiser or not isinstance(denoiser.network, torch.nn.Module):
        return None
    given = pytree.tree_leaves(denoiser.conditioning)
    tensors = [*denoiser.network.parameters(), *(v for v in given if isinstance(v, Tensor))]
    return [v for v in tensors if v.requires_grad]


def _recomputed(
    run: _Run, x: Tensor, log_prob: Tensor, low: int, high: int, leaves: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    if leaves is not None:
        return _Segment.apply(run, low, high, x, log_prob, *leaves)  # pyright: ignore[reportReturnType]
    return recomputed(  # pyright: ignore[reportReturnType]
        run, x, log_prob, low, high, use_reentrant=False, preserve_rng_state=False
    )


def reverse_chain(denoiser: Denoiser, kernel: Solver, grid: Tensor, *, floor: float | None = None) -> ReverseChain:
    """The reverse process of a denoiser as a chain of Gaussian steps.

    Args:
        denoiser: network and schedule; parameters that require gradients are differentiated.
        kernel: a solver whose steps are Gaussian kernels.
        grid: decreasing times (K + 1,).
        floor: standard deviation of the noise added to the step to clean data, which then has a density; 0 keeps what
            the kernel says (`last="decoder"`), None leaves that step without noise.

    Raises:
        ValueError: if the floor is negative.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> chain = reverse_chain(twin.denoiser(schedule), ReverseKernel(variance="small"), trailing(schedule, 4))
        >>> out = chain.surrogate(lambda x: x.sum(1), Independent(0), range(8), (2,), rules=chain.last(2))
        >>> out.loss.backward()
        >>> tuple(shift.grad.shape), out.label
        ((2,), 'unbiased')
    """
    if floor is not None and floor < 0:
        raise ValueError(f"floor is {floor}; give a standard deviation >= 0, or None for a last step without noise")
    levels = denoiser.schedule.at(grid)
    return ReverseChain(denoiser, kernel, levels, kernel.prepare(levels), floor)
