r"""Designs by name, for a sampler and a statistic.

    noise        independent · antithetic · sobol                         how the noise of a unit is chosen
    controls     + twin · + mixture · + features                          what is subtracted (cross-fitted)
    structures   few-step · multilevel · single-term · stratified         several streams; + antithetic where valid

`twin` alone is independent + twin. A name is its parts in any order, joined by "+": "twin+antithetic".
Not combined: twin with mixture (which knows all that the twin knows), controls with several streams (each stream would
need its own), single-term with pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lowvar.errors import UserError
from lowvar.expect.antithetic import AntitheticUnits
from lowvar.expect.design import Design, OneStream
from lowvar.expect.features import LEVERAGE
from lowvar.expect.fewstep import few_step
from lowvar.expect.independent import IndependentUnits
from lowvar.expect.integrand import Integrand
from lowvar.expect.multilevel import ladder, multilevel
from lowvar.expect.sampler import Sampler
from lowvar.expect.single_term import single_term
from lowvar.expect.sobol import Bridge, SobolUnits, bridge_of
from lowvar.expect.strata import stratified
from lowvar.expect.streams import Stream, sample_stream, shadow_stream, surrogate_stream
from lowvar.expect.units import UnitNoise

__all__ = ["CONTROLS", "NOISES", "STRUCTURES", "Catalogue", "canonical"]

NOISES = ("independent", "antithetic", "sobol")
CONTROLS = ("twin", "mixture", "features")
STRUCTURES = ("few-step", "multilevel", "single-term", "stratified")
FEW_NETS = "the control's coefficient comes from few nets: at 24 nets the interval covered 92%"
RARE = "the statistic takes few values: levels differ in rare samples only, and their variance is estimated from those"

_INDEPENDENT, _ANTITHETIC, _SOBOL, _TWIN, _SINGLE, _MIXTURE = 0, 1, 2, 40, 41, 43
_FEW, _LEVELS, _CLASSES = 64, 128, 1024  # one or two streams for each level or class from there


def canonical(name: str) -> str:
    """A design's name in its usual order.

    Raises:
        UserError: if a part is unknown or parts cannot be combined.

    Example:
        >>> canonical("twin+antithetic"), canonical("twin")
        ('antithetic+twin', 'twin')
    """
    parts = [p.strip() for p in name.split("+")]
    known = (*NOISES, *CONTROLS, *STRUCTURES)
    for p in parts:
        if p not in known:
            raise UserError(f"design is {name!r}; give 'auto' or parts of it joined by '+': {', '.join(known)}")
    noises, controls = [p for p in NOISES if p in parts], [p for p in CONTROLS if p in parts]
    structures = [p for p in STRUCTURES if p in parts]
    wrong = len(noises) > 1 or len(structures) > 1 or len(set(parts)) < len(parts)
    wrong = wrong or bool(structures and (controls or "sobol" in noises))
    wrong = wrong or {"twin", "mixture"} <= set(parts) or bool("single-term" in structures and "antithetic" in noises)
    if wrong:
        raise UserError(
            f"design {name!r} cannot be combined; give one of {', '.join(NOISES)} with any of {', '.join(CONTROLS)}, "
            f"or one of {', '.join(STRUCTURES)}, all but single-term also with antithetic"
        )
    noise = [n for n in noises if n != "independent" or len(parts) == 1]
    return "+".join([*structures, *noise, *controls])


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The designs of a sampler and a statistic; streams are made once.

    Attributes:
        sampler: the sampler.
        statistic: the statistic.
        controls: those whose values are drawn beside every sample.
    """

    sampler: Sampler
    statistic: Integrand
    controls: tuple[str, ...] = CONTROLS
    _streams: dict[str, Stream] = field(default_factory=dict, repr=False)
    _made: dict[str, Design] = field(default_factory=dict, repr=False)

    def bridge(self) -> Bridge:
        """What nets cover."""
        return bridge_of(
            torch.Size(self.sampler.noise_shape or self.sampler.event_shape), self.sampler.draws, self.sampler.shadow
        )

    def samples(self, noise: str, points: int = 0) -> Stream:
        """The stream of samples under a noise; `points` a net for sobol."""
        key = f"{noise}{points or ''}"
        if key not in self._streams:
            units: UnitNoise = IndependentUnits()
            number = _INDEPENDENT
            if noise == "antithetic":
                units, number = AntitheticUnits(), _ANTITHETIC
            if noise == "sobol":
                units, number = SobolUnits(points, self.bridge()), _SOBOL + points.bit_length()
            self._streams[key] = sample_stream(
                self.sampler, self.statistic, units, number, key=key, controls=self.controls
            )
        return self._streams[key]

    def twin(self) -> Stream:
        """The stream of the twin alone."""
        if "twin alone" not in self._streams:
            self._streams["twin alone"] = shadow_stream(self.sampler, self.statistic, _TWIN)
        return self._streams["twin alone"]

    def mixture(self) -> Stream:
        """The stream of the mixture's chain alone."""
        if "mixture alone" not in self._streams:
            self._streams["mixture alone"] = surrogate_stream(self.sampler, self.statistic, _MIXTURE, self.bridge())
        return self._streams["mixture alone"]

    def levels(self) -> list[Sampler]:
        """The sampler and its coarser versions, coarsest first."""
        return ladder(self.sampler)

    def one(self, noise: str, controls: tuple[str, ...], points: int = 0) -> OneStream:
        """Samples under a noise with controls.

        Raises:
            UserError: if the sampler has no twin, or the statistic too many numbers for features.
        """
        main = self.samples(noise, points)
        columns: list[str] = []
        for control in ("twin", "mixture"):
            if control not in controls:
                continue
            if control not in main.columns:
                what = "Gaussian" if control == "twin" else "mixture"
                raise UserError(
                    f"design {control!r} needs a sampler with a {what} twin, and this one has none: calibrate the "
                    f"model, or leave {control!r} out of the design"
                )
            columns.append(control)
        if "features" in controls:
            found = [c for c in main.columns if c.startswith("feature")]
            if not found:
                raise UserError(
                    f"design 'features' is for statistics of up to 64 numbers, this one has "
                    f"{self.statistic.shape.numel()}; use 'twin'"
                )
            columns += found
        streams = (main,)
        if "twin" in controls or "mixture" in controls:
            streams = (main, self.twin() if "twin" in controls else self.mixture())
        declared = LEVERAGE if "features" in controls else FEW_NETS if noise == "sobol" and controls else None
        name = "+".join([*([noise] if noise != "independent" or not controls else []), *controls])
        return OneStream(name, streams, tuple(columns), declared)

    def design(
        self,
        name: str,
        *,
        points: int = 64,
        discrete: bool = False,
        steps: int | None = None,
        levels: int | None = None,
    ) -> Design:
        """A design by its name.

        Args:
            name: see the module.
            points: of a net.
            discrete: whether the statistic takes few values.
            steps: evaluations of the coarse sampler of few-step; default the next coarser.
            levels: finest levels that multilevel uses; default all.

        Raises:
            UserError: if the name is unknown or the sampler lacks what it needs.
        """
        parts = canonical(name).split("+")
        noise = next((p for p in NOISES if p in parts), "independent")
        structure = next((p for p in STRUCTURES if p in parts), None)
        if structure is None:
            return self.one(noise, tuple(c for c in CONTROLS if c in parts), points if noise == "sobol" else 0)
        key = f"{canonical(name)} {discrete} {steps} {levels}"
        if key not in self._made:
            units = AntitheticUnits() if noise == "antithetic" else IndependentUnits()
            self._made[key] = self._structure(structure, units, discrete, steps, levels)
        return self._made[key]

    def _structure(
        self, structure: str, units: UnitNoise, discrete: bool, steps: int | None, count: int | None
    ) -> Design:
        away = 32 if units.size > 1 else 0
        if structure == "stratified":
            if not self.sampler.parts:
                raise UserError("design 'stratified' needs a sampler of classes (ClassSampler); this one has none")
            return stratified(self.sampler.parts, self.statistic, units, _CLASSES + 32 * away)
        levels = self.levels()
        if len(levels) < 2:
            raise UserError(
                f"design {structure!r} needs a sampler with a coarser one: a chain of an even number of steps"
            )
        if structure == "multilevel":
            return multilevel(
                levels[-(count or len(levels)) :], self.statistic, units, _LEVELS + away, RARE if discrete else None
            )
        if structure == "single-term":
            return single_term(levels, self.statistic, _SINGLE)
        coarse = levels[-2] if steps is None else next((s for s in levels[:-1] if s.nfe == steps), None)
        if coarse is None:
            raise UserError(f"few-step has samplers of {[s.nfe for s in levels[:-1]]} evaluations, not of {steps}")
        place = levels.index(coarse)
        return few_step(self.sampler, coarse, self.statistic, units, _FEW + away + 2 * place)
