r"""Baselines that look at what they may not: the cost of the sample they are subtracted from, or the sample itself.

(f_i - b_i) grad log p(x_i) is unbiased if b_i does not depend on sample i given all else. A mean that includes f_i
scales the gradient by 1 - 1/n; a b_i(x_i) adds the bias E[b grad log p] = grad E b, which only a baseline that adds it
back (`knows`: a control variate) may have. Both show when one number is moved and nothing else: this is done once, at
`init`, on three samples. So does a baseline that asks a distribution for a mean it does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.baselines import Baseline, Sum
from lowvar.gradients.distributions import base, noise_of, sample
from lowvar.process.noise import Independent

__all__ = ["refuse_own_sample"]


def _drawn(d: Distribution, count: int) -> list[Tensor]:
    index, source, noise = range(count), Independent(0), {}
    for draw, (name, kind) in enumerate(noise_of(d).items()):
        noise[name] = getattr(source, kind.kind)(index, kind.shape, draw=draw, dtype=torch.float64)
    return [sample(d, {name: e[i].to(_dtype(d)) for name, e in noise.items()}).detach() for i in index]


def _dtype(d: Distribution) -> torch.dtype:
    found = [v.dtype for v in d.__dict__.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return found[0] if found else torch.get_default_dtype()


def refuse_own_sample(baseline: Baseline, d: Distribution) -> None:
    """Refuses a baseline that depends on the sample it is subtracted from.

    Args:
        baseline: of one site; the parts of a sum one by one.
        d: the site's distribution.

    Raises:
        ValueError: if it does, saying on what, or if it is not finite.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.gradients import LeaveOneOut
        >>> refuse_own_sample(LeaveOneOut(), Bernoulli(torch.tensor(0.3)))
    """
    for part in baseline.parts if isinstance(baseline, Sum) else (baseline,):
        state = part.start(d)
        draws = _drawn(d, 8)
        other = next((x for x in draws[3:] if not torch.equal(x, draws[0])), None)

        def subtracted(
            first: Tensor, cost: float, part: Baseline = part, draws: list[Tensor] = draws, state: object = state
        ) -> Tensor:
            each = [part.record(d, x, state) for x in (first, *draws[1:3])]  # pyright: ignore[reportArgumentType]
            record = {key: torch.stack([own[key] for own in each]) for key in each[0]}
            costs = torch.tensor([cost, 2.0, -0.5], dtype=_dtype(d), device=first.device)
            rule = Baseline.subtracted if isinstance(baseline, Sum) else type(part).subtracted  # a sum asks predict
            b = rule(part, record, costs, state)  # pyright: ignore[reportArgumentType]
            return b.value[0].detach()

        name, kind = type(part).__name__, type(base(d)).__name__
        try:
            plain = subtracted(draws[0], 1.0)
        except NotImplementedError as missing:
            raise ValueError(
                f"baseline {name} asks {kind} for a mean or a variance that it does not have; give the mean in closed "
                "form, Regression(h, mean)"
            ) from missing
        if not bool(plain.isfinite().all()):
            raise ValueError(
                f"baseline {name} is {plain.flatten().tolist()[0]:g} at a site of {kind}, whose mean or variance is "
                "not finite; give a function whose mean is known, Regression(h, mean)"
            )
        if not torch.equal(plain, subtracted(draws[0], 1.0)):
            continue  # a network with a random part: one cannot tell
        if not torch.equal(plain, subtracted(draws[0], 3.0)):
            raise ValueError(
                f"baseline {name} changes with the cost of the sample it is subtracted from, which biases the "
                "gradient; fit it to the other samples (`others` and `costs` of predict) or to earlier batches"
            )
        if not part.knows and other is not None and not torch.equal(plain, subtracted(other, 1.0)):
            raise ValueError(
                f"baseline {name} changes with the sample it is subtracted from, which biases the gradient by that of "
                "its mean; compute it from what comes before the site, or make it a control variate with a known mean: "
                "Regression(h, mean)"
            )
