"""Settings that were measured to cost what they are there to save.

Every setting is as exact as its label says, and some combinations leave the gradient more variance than the plain
recipe has. Which, is a matter of measurement (`benchmarks/training.py`): the sentences here are claims about its
results, which a test reads. They warn and refuse nothing.
"""

from __future__ import annotations

from lowvar.train.config import TrainConfig

__all__ = ["cautions"]


def cautions(config: TrainConfig) -> list[str]:
    """One sentence for each combination of settings that measured badly.

    Example:
        >>> cautions(TrainConfig(times="gradient-norm", target="stable"))
        []
        >>> print(*cautions(TrainConfig(times="entropy-rate")))
        times entropy-rate left the gradient more variance than uniform times in every network that was measured; give \
times gradient-norm, or leave times out
    """
    found = []
    if config.times == "entropy-rate":
        found.append(
            "times entropy-rate left the gradient more variance than uniform times in every network that was measured; "
            "give times gradient-norm, or leave times out"
        )
    if config.times == "loss-second-moment" and config.target == "stable" and config.prediction == "epsilon":
        found.append(
            "times loss-second-moment beside target stable took no variance off the gradient late in training in one "
            "of two networks that predict noise, and times gradient-norm more than half in both; give times "
            "gradient-norm"
        )
    return found
