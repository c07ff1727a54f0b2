r"""What an estimator of a policy gradient claims, as data: tests read it, tables are generated from it.

A claim is about the expectation of the estimate, g = E[estimate] against grad E R. Most bias of reward tuning is one of

    factor      g = c grad E R with a known c: only the step size changes
    direction   prompts or samples are weighted otherwise than the objective says
    truncation  a part of the gradient is left out

and estimates that are unbiased at the old parameters may be biased once these have moved (`off_policy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Claim", "beside_paths", "combined"]

Bias = Literal["none", "factor", "direction", "truncation"]


@dataclass(frozen=True)
class Claim:
    """Of one ingredient or of a whole estimator.

    Attributes:
        bias: its kind; "none" is unbiased.
        why: in a sentence.
        source: paper or derivation.

    Example:
        >>> Claim("factor", "the mean includes the sample itself: 1 - 1/n").label
        'biased'
    """

    bias: Bias
    why: str = ""
    source: str = ""

    @property
    def label(self) -> Literal["unbiased", "biased"]:
        """In one word."""
        return "unbiased" if self.bias == "none" else "biased"


def beside_paths(claim: Claim) -> Claim:
    """Of scores whose sum with pathwise terms is the estimate: a factor of one part alone is no step size.

    Example:
        >>> beside_paths(Claim("factor", "the mean includes the run itself: 1 - 1/n")).bias
        'direction'
    """
    if claim.bias != "factor":
        return claim
    return Claim("direction", f"{claim.why}; the pathwise part has no such factor", claim.source)


_WORST: tuple[Bias, ...] = ("none", "factor", "truncation", "direction")


def combined(*claims: Claim) -> Claim:
    """Of ingredients used together: the worst of their biases, every reason.

    Example:
        >>> combined(Claim("none"), Claim("truncation", "the last 2 steps only")).bias
        'truncation'
    """
    given = [claim for claim in claims if claim.bias != "none"]
    if not given:
        return Claim("none", source="; ".join(dict.fromkeys(c.source for c in claims if c.source)))
    bias: Bias = max(given, key=lambda claim: _WORST.index(claim.bias)).bias
    why, source = (
        "; ".join(dict.fromkeys(text for text in texts if text))
        for texts in ([c.why for c in given], [c.source for c in claims])
    )
    return Claim(bias, why, source)
