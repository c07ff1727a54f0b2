r"""The reverse process as a policy.

    state x_t, action x_s ~ N(m_theta(x_t), C(x_t)) = one reverse step, reward R(x_0, prompt) at the end.

Any kernel whose steps are Gaussian given the state is one: DDPM and DDIM with eta > 0 (`ReverseKernel`), on a flow
schedule the flow SDE (the same kernel: its step is exact, not an Euler step), with a calibrated covariance
(`variance="posterior"`), with calibrated noise (`WithNoise`). Its laws give samples, log-probabilities and KL.

**The last step.** To clean data the kernel has no noise, so the action is certain and log p is infinite. Nothing is
done about it silently; a policy says which of these it does:

    Floor(std)      the step gets noise of this standard deviation, and the samples have it. Unbiased for that sampler
    "pathwise"      the step is differentiated: its gradient is grad R(x_0) . d m_theta / d theta. Unbiased, but needs
                    the derivative of R
    "drop"          the step has no gradient. Biased by that step's share, over a third at 10 steps

A grid that ends at a noise level above 0, or a kernel with `last="decoder"`, has a density in every step, and needs
none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lowvar.gradients import ReverseChain, reverse_chain
from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import ReverseKernel
from lowvar.process.solver import Solver
from lowvar.reward.claims import Claim

__all__ = ["Floor", "Policy", "Terminal", "rows"]


@dataclass(frozen=True)
class Floor:
    """Noise of the last step, so that it has a density.

    Args:
        std: standard deviation, above 0, in the units of the data.

    Raises:
        ValueError: if it is not positive.

    Example:
        >>> Floor(0.05).std
        0.05
    """

    std: float

    def __post_init__(self) -> None:
        """Checks the sign."""
        if not self.std > 0:
            raise ValueError(f"the floor is {self.std}; give a standard deviation above 0, or terminal='pathwise'")


Terminal = Literal["pathwise", "drop"] | Floor


@dataclass(frozen=True, eq=False)
class Policy:
    """A denoiser and a kernel on a grid, as a policy.

    Args:
        denoiser: with parameters that require gradients; or, for a conditional policy, a function from a batch's
            prompts to a denoiser of that batch. Under guidance both branches are differentiated
            (`lowvar.process.Guided`).
        kernel: a solver whose steps are Gaussian kernels with noise.
        grid: decreasing times (K + 1,).
        terminal: what is done about a last step without noise; None where it has some.

    Raises:
        ValueError: if steps have no noise, the last step has no density and terminal is None, or the other way round.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), trailing(schedule, 4), terminal=Floor(0.05))
        >>> policy.steps, policy.scored, policy.claim.label
        (4, (0, 1, 2, 3), 'unbiased')
    """

    denoiser: Denoiser | Callable[[Any], Denoiser]
    kernel: Solver
    grid: Tensor
    terminal: Terminal | None = None

    def __post_init__(self) -> None:
        """Checks that every step has a density or a rule."""
        if len(self.grid) < 2 or bool((self.grid[1:] >= self.grid[:-1]).any()):
            raise ValueError(f"the grid has times {self.grid.tolist()[:4]} ..; give at least 2, decreasing")
        if not self.kernel.stochastic:
            raise ValueError(f"{self.kernel} adds no noise, so its actions have no probabilities; give eta above 0")
        if not (self.terminal is None or isinstance(self.terminal, Floor) or self.terminal in ("pathwise", "drop")):
            raise ValueError(f"terminal is {self.terminal!r}; allowed: Floor(std), 'pathwise', 'drop', None")
        if self.terminal is None and self.certain:
            raise ValueError(
                "the last step goes to clean data and adds no noise, so it has no log-probability; choose "
                "terminal=Floor(0.05) (noise there), 'pathwise' (needs the reward's derivative) or 'drop' (biased)"
            )
        if self.terminal is not None and not self.certain:
            raise ValueError(f"every step has noise, so terminal={self.terminal!r} has no meaning; leave it out")

    @property
    def certain(self) -> bool:
        """Whether the kernel by itself leaves the last step without noise."""
        decoder = isinstance(self.kernel, ReverseKernel) and self.kernel.last == "decoder"
        return float(self.grid[-1]) == 0 and not decoder

    @property
    def steps(self) -> int:
        """K."""
        return len(self.grid) - 1

    @property
    def scored(self) -> tuple[int, ...]:
        """Steps that have a density."""
        last = self.certain and not isinstance(self.terminal, Floor)
        return tuple(range(self.steps - last))

    @property
    def claim(self) -> Claim:
        """What the rule for the last step does to every estimator."""
        if self.terminal != "drop":
            return Claim("none")
        return Claim("truncation", "the last step has no gradient")

    def bound(self, prompts: Any = None) -> Denoiser:
        """The denoiser of a batch with these prompts.

        Raises:
            ValueError: if prompts are given to an unconditional policy, or missing.
        """
        if isinstance(self.denoiser, Denoiser):
            if prompts is not None:
                raise ValueError(
                    "prompts were given, and the denoiser is one for all; give a function of the prompts: "
                    "Policy(lambda prompts: NetworkDenoiser(..., conditioning={...: prompts}), ...)"
                )
            return self.denoiser
        if prompts is None:
            raise ValueError("this policy is conditional: give prompts, one a sample")
        return self.denoiser(prompts)

    def chain(self, prompts: Any = None) -> ReverseChain:
        """The chain of a batch with these prompts."""
        floor = self.terminal.std if isinstance(self.terminal, Floor) else None
        if floor is None and float(self.grid[-1]) == 0 and not self.certain:
            floor = 0.0  # what the kernel's own last step says
        return reverse_chain(self.bound(prompts), self.kernel, self.grid, floor=floor)


def rows(prompts: Any, which: Tensor) -> Any:
    """The prompts of some samples: rows of a tensor, entries of a list, or of each value of a mapping.

    Args:
        prompts: of n samples, or None.
        which: numbers, (m,) int64.

    Example:
        >>> import torch
        >>> rows({"text": ["a", "b"], "label": torch.tensor([3, 4])}, torch.tensor([1]))
        {'text': ['b'], 'label': tensor([4])}
    """
    if prompts is None:
        return None
    if isinstance(prompts, Mapping):
        return {name: rows(value, which) for name, value in prompts.items()}
    if isinstance(prompts, Tensor):
        return prompts[which.to(prompts.device)]
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        return [prompts[int(i)] for i in which]
    raise TypeError(f"prompts are a {type(prompts).__name__}; give a tensor, a list, or a mapping of those")
