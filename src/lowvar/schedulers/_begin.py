r"""The begin of a chain in a pipeline that hands over noise, where the grid begins at a level below it.

A pipeline owns the loop, and knows nothing of states at other levels than its scheduler's first:

    x = init_noise_sigma z;     for t in timesteps:   out = network(scale_model_input(x, t), t);   x = step(out, t, x)

The twin's flow takes z from t = 1 to the grid's first level t_0 without an evaluation, F z. At t_0 the pipeline's x is
z, and both of the scheduler's methods read it as F z: `scale_model_input` gives it to the network, `step` goes on from
it. So K evaluations are made, all at levels where the network has something to say, and no pipeline is changed.

What it rests on is checked, because nothing else would show that it fails: a pipeline that gives the network x itself
(DDPMPipeline, the flow ones) is told so at its first step. DiTPipeline hands `step` what `scale_model_input` returned,
which is then F z already. A pipeline that called `add_noise` since `set_timesteps` hands over an image with noise, a
state of its own level (image-to-image at full strength), which is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowvar.errors import UserError

__all__ = ["Begin"]


class Begin:
    """Noise and the state it stands for, between `scale_model_input` and `step`.

    Args:
        flow: F.

    Attributes:
        is_image: whether a state of the first level is handed over, and no noise.
    """

    def __init__(self, flow: Callable[[Tensor], Tensor]) -> None:
        self._flow, self.is_image = flow, False
        self._made: tuple[Tensor, Tensor] | None = None

    def entry(self, x: Tensor) -> Tensor:
        """The state that noise x stands for, as the network is given it."""
        self._made = x, (x if self.is_image else self._flow(x))
        return self._made[1]

    def state(self, x: Tensor) -> Tensor:
        """The state that `step` goes on from; a batch that guidance doubled is made again.

        Raises:
            UserError: if the network was not given the state.
        """
        made, self._made = self._made, None
        if made is None:
            raise UserError(
                "start_with_twin is 'input', and this pipeline does not call scale_model_input, so the network was "
                "asked at the noise itself: set start_with_twin to False, or begin with scheduler.start(noise) and True"
            )
        before, after = made
        if x is before or x is after:
            return after
        return x if self.is_image else self._flow(x)
