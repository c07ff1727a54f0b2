r"""Rollouts: what the policy did, kept for the gradient.

    x_{t_0} ~ start,   x_{t_{k+1}} ~ p_old(. | x_{t_k}),   k = 0 .. K - 1,

run without a graph. A rollout keeps, of each step that gets a gradient, its state, its action (the next state),
log p_old(action | state) and x0_hat(state); the laws are evaluated again with a graph, step by step, when a loss is
built (`surrogate_loss`). So memory holds the states and the graph of one step.

Less memory: `batch_size` bounds what runs at once, `store="cpu"` keeps states off the device, `x0_hat=False` leaves the
denoised states out, and `steps` keeps a window of steps only. A window drawn by `step_window` leaves the gradient
unbiased when its terms are multiplied by K / |window|, which `surrogate_loss` does.

Noise is an argument: draw 0 gives the start, draw k + 1 the noise of step k, as in `lowvar.sample`; so rollout i is
sample i of `lowvar.sample.generate`, and common or antithetic noise is a matter of the source. Runs that share noise
know each other's: baselines leave all runs of a `stream` out of each one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowvar.gradients import ReverseChain
from lowvar.process.noise import Antithetic, Common, NoiseSource
from lowvar.reward.policy import Policy, rows

__all__ = ["Rollout", "rollout", "step_window"]


@dataclass(frozen=True, eq=False)
class Rollout:
    """n runs of a policy; m of its K steps are kept.

    Attributes:
        samples: x_0, (n, *shape).
        steps: numbers of the kept steps, m of them, increasing.
        states: x_{t_k}, (m, n, *shape).
        actions: x_{t_{k+1}}, (m, n, *shape).
        log_prob: log p_old(action | state) in nats, (m, n); 0 at a step without a density.
        score2: squared length of the score with respect to the mean, in the kernel's own metric, (m, n): r^T C^-1 r
            with r = action - mean. For an isotropic kernel it is |S|^2 of that mean, up to the step's variance.
        x0_hat: the denoised states, (m, n, *shape), or None.
        index: numbers of the samples, (n,).
        prompts: as given.
        groups: number of each sample's group (of one prompt), (n,) int64.
        weight: factor of the kept steps' score terms that makes up for those left out: K / |window|, right for windows
            that were drawn at random (`step_window`).
        noise: where it came from.
    """

    samples: Tensor
    steps: tuple[int, ...]
    states: Tensor = field(repr=False)
    actions: Tensor = field(repr=False)
    log_prob: Tensor
    score2: Tensor
    x0_hat: Tensor | None = field(repr=False)
    index: Tensor
    prompts: Any
    groups: Tensor
    weight: float
    noise: NoiseSource

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.samples)

    @property
    def streams(self) -> Tensor | None:
        """Numbers (n,) that runs of one noise have in common (mirrored or the same); None: no two share any."""
        index = _stream(self.noise, self.index)
        return None if index is self.index else index

    @property
    def independent(self) -> int:
        """Number of runs that share no noise: of streams."""
        streams = self.streams
        return self.n if streams is None else len(streams.unique())

    def part(self, which: Tensor) -> Rollout:
        """Some of the runs, by their places (m,) int64: a minibatch."""
        return Rollout(
            self.samples[which],
            self.steps,
            self.states[:, which],
            self.actions[:, which],
            self.log_prob[:, which],
            self.score2[:, which],
            None if self.x0_hat is None else self.x0_hat[:, which],
            self.index[which],
            rows(self.prompts, which),
            self.groups[which],
            self.weight,
            self.noise,
        )


def _stream(noise: NoiseSource, index: Tensor) -> Tensor:
    if isinstance(noise, Antithetic):
        return _stream(noise.base, index // 2)
    if isinstance(noise, Common):
        return _stream(noise.base, torch.zeros_like(index) if noise.size is None else index // noise.size)
    return index


def step_window(policy: Policy, noise: NoiseSource, update: int, size: int) -> tuple[int, ...]:
    """`size` steps of a policy at random, each equally likely, increasing.

    Args:
        policy: its steps with a density are drawn from.
        noise: source of the choice: sample number `update`, draw 0.
        update: number of the update; the same number gives the same window.
        size: steps.

    Raises:
        ValueError: if size is out of range.

    Example:
        See `Rollout.weight` for the factor that goes with it.

        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward.policy import Floor
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> grid = torch.linspace(1, 0, 9, dtype=torch.float64)
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), grid, Floor(0.1))
        >>> len(step_window(policy, Independent(0), update=3, size=2))
        2
    """
    every = policy.scored
    if not 1 <= size <= len(every):
        raise ValueError(f"a window of {size} steps; the policy has {len(every)} steps with a density")
    order = noise.uniform([update], (len(every),), dtype=torch.float64)[0].argsort()[:size]
    return tuple(sorted(every[int(i)] for i in order))


@torch.no_grad()
def rollout(
    policy: Policy,
    noise: NoiseSource,
    n: int,
    shape: Sequence[int],
    *,
    first: int = 0,
    prompts: Any = None,
    groups: Tensor | None = None,
    num_generations: int | None = None,
    steps: Sequence[int] | None = None,
    begin: tuple[int, Tensor] | None = None,
    until: int | None = None,
    x0_hat: bool = True,
    batch_size: int = 256,
    store: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Runs a policy n times.

    Args:
        policy: the policy; its parameters are p_old.
        noise: source of the noise.
        n: number of runs.
        shape: of a sample.
        first: number of the first sample.
        prompts: one a sample (a tensor, a list, or a mapping of those), for a conditional policy.
        groups: number of each sample's group, (n,); samples of one prompt are a group.
        num_generations: G, size of groups of neighbouring samples, in place of `groups`. Without either, all n are one.
        steps: the steps to keep, drawn at random (a fixed window is biased); None: all. A last step that is
            differentiated is always kept.
        begin: (k, x): not from the start but from step k at states x (n, *shape), which an earlier rollout gave.
        until: the step to stop before; the samples are then the states there. None: all steps.
        x0_hat: whether to keep the denoised states (baselines on them need it).
        batch_size: runs at once; it does not change their noise.
        store: device of the kept states and denoised states; None: the one they are made on.
        dtype, device: of the states.

    Raises:
        ValueError: if numbers do not fit.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward.policy import Floor
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> grid = torch.linspace(1, 0, 5, dtype=torch.float64)
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), grid, Floor(0.1))
        >>> ran = rollout(policy, Independent(0), 6, (2,), num_generations=3)
        >>> tuple(ran.states.shape), tuple(ran.log_prob.shape), ran.groups.tolist()
        ((4, 6, 2), (4, 6), [0, 0, 0, 1, 1, 1])
    """
    if groups is not None and num_generations is not None:
        raise ValueError("groups and num_generations both say which samples belong together; give one of them")
    if num_generations is not None and (num_generations < 1 or n % num_generations):
        raise ValueError(f"num_generations is {num_generations} and n {n}; groups have to fill the batch")
    if groups is None:
        groups = torch.arange(n) // (num_generations or max(n, 1))
    if groups.shape != (n,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}; give one number a sample, ({n},)")
    low, high = 0 if begin is None else begin[0], policy.steps if until is None else until
    if not 0 <= low < high <= policy.steps:
        raise ValueError(f"a run from step {low} to step {high} of {policy.steps}; give at least one step")
    if begin is not None and len(begin[1]) != n:
        raise ValueError(f"{len(begin[1])} states to begin from, and n is {n}")
    kept = tuple(range(low, high)) if steps is None else tuple(steps)
    if not kept or list(kept) != sorted(set(kept)) or not low <= kept[0] <= kept[-1] < high:
        raise ValueError(f"steps are {kept}; give increasing numbers from {low} to {high - 1}")
    if policy.terminal == "pathwise" and high == policy.steps and kept[-1] + 1 < high:
        kept = (*kept, policy.steps - 1)  # that step's gradient is not a term of the window
    wanted = sorted({level for k in kept for level in (k, k + 1)})
    parts: list[tuple[Tensor, ...]] = []
    for row in range(0, n, batch_size):
        place = torch.arange(row, min(row + batch_size, n))
        chain, index = policy.chain(rows(prompts, place)), first + place
        if begin is None:
            x = chain.start(noise, index, shape, dtype=dtype, device=device)
        else:
            x = begin[1][row : row + batch_size].to(device, dtype)
        parts.append(_run(policy, chain, noise, index, x, range(low, high), kept, wanted, store, x0_hat))
    seen, log_prob, score2, denoised, samples = (
        torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), (1, 1, 1, 1, 0), strict=True)
    )
    scored = set(policy.scored) & set(range(low, high))
    return Rollout(
        samples,
        kept,
        _levels(seen, [wanted.index(k) for k in kept]),
        _levels(seen, [wanted.index(k + 1) for k in kept]),
        log_prob,
        score2,
        denoised if x0_hat else None,
        first + torch.arange(n),
        prompts,
        groups.to(samples.device),
        len(scored) / max(len(scored & set(kept)), 1),
        noise,
    )


def _run(
    policy: Policy,
    chain: ReverseChain,
    noise: NoiseSource,
    index: Tensor,
    x: Tensor,
    span: range,
    kept: Sequence[int],
    wanted: Sequence[int],
    store: torch.device | str | None,
    x0_hat: bool,
) -> tuple[Tensor, ...]:
    """One batch: states at the wanted levels, log p and score^2 and x0_hat of the kept steps, and the last states."""
    seen, log_prob, score2, denoised = [], [], [], []
    store = x.device if store is None else store
    for k in span:
        if k in wanted:
            seen.append(x.to(store))
        law, posterior = chain.evaluated(k, x)
        y = law.mean
        if chain.noisy(k):
            y = law.sample(noise.normal(index, x.shape[1:], draw=k + 1, dtype=x.dtype, device=x.device))
        if k in kept:
            nothing = x.new_zeros(len(x))
            density = k in policy.scored
            log_prob.append(law.log_prob(y) if density else nothing)
            score2.append(law.covariance.inverse_quadratic(y - law.mean) if density else nothing)
            denoised.append(posterior.mean.to(store) if x0_hat else x[:, :0])
        x = y
    if span.stop in wanted:
        seen.append(x.to(store))
    return torch.stack(seen), torch.stack(log_prob), torch.stack(score2), torch.stack(denoised), x


def _levels(seen: Tensor, places: list[int]) -> Tensor:
    """Rows of `seen`: a view where they are neighbours."""
    if places == list(range(places[0], places[0] + len(places))):
        return seen[places[0] : places[0] + len(places)]
    return seen[places]
