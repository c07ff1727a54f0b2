r"""How much of the posterior covariance C(x_t) each family of covariances catches, by noise level.

What a step loses with noise of a family F instead of C is, locally, (1/4) dsnr^2 ||C - P_F C||_F^2 (`process.cost`),
P_F the orthogonal projection onto the family. So the share

    ||P_F C||_F^2 / ||C||_F^2,      E over x_t above and below,

is what the family takes off the cost of steps without any covariance. With b_i the directions of a basis,

    isotropic   (tr C)^2 / d                          pixel, dct, pca    sum_i (b_i^T C b_i)^2
    low-rank    ||Q^T C Q||_F^2 + tr(P C)^2 / (d - r),   P = I - Q Q^T,  Q an orthonormal basis of the span of C V

(V: r random directions; a multiple of the identity beside r directions of every state's own). Each of the first four
has two shares: that of *every state's own* covariance, which only a head can know, and that of *a table*, one
covariance for all states of the level, ||P_F E C||_F^2.

Products C v = (sigma^2 / alpha) J v come from the network's Jacobian, symmetrised. For a standard normal probe z

    E ||C z||^2 = ||C||_F^2,    E z^T P C z = tr(P C),    E (b_i^T z)(b_i^T C z) = b_i^T C b_i,

and *a square of a mean is never the mean of a square*: squares are products of two independent probes of a state, those
of a table products of two states. So every numerator and denominator is unbiased; shares are ratios of means with the
jackknife's interval over states, and may leave [0, 1] by noise.

Sources: M. Hutchinson 1990 (probes); Bao et al. 2022 (diagonal) and Ou et al. 2024 (of every state) are families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.metrics.intervals import MIN_BLOCKS, Interval, Replicates
from lowvar.process.basis import Basis, DCTBasis, PixelBasis
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.jacobian import JacobianCovariance
from lowvar.process.noise import NoiseSource
from lowvar.process.schedule import Level
from lowvar.train.draws import ImageSource

__all__ = ["STRUCTURES", "Structure", "StructureBlocks", "bases_of", "structure_blocks"]

STRUCTURES: tuple[str, ...] = ("isotropic", "pixel", "dct", "pca", "low-rank")
_GROUPS = 512  # of the jackknife, at most
_PROBES = 2
_EPS, _PROBE, _RANGE = 0, 1, 3  # draws: the state's noise, the two probes, the directions of the range


def bases_of(event_shape: Sequence[int], pca: Basis) -> dict[str, Basis]:
    """The bases whose diagonals are measured; a table of numbers has no cosine transform.

    Args:
        event_shape: of an event.
        pca: principal components of the data, or what stands for them (`GaussianTwin.basis`).

    Example:
        >>> list(bases_of((3,), PixelBasis((3,)))), list(bases_of((1, 4, 4), PixelBasis((1, 4, 4))))
        (['pixel', 'pca'], ['pixel', 'dct', 'pca'])
    """
    shape = tuple(event_shape)
    cosine: dict[str, Basis] = {"dct": DCTBasis(shape)} if len(shape) == 3 else {}
    return {"pixel": PixelBasis(shape), **cosine, "pca": pca}


@dataclass(frozen=True)
class Structure:
    """Shares of a noise level.

    Attributes:
        logsnr: the level.
        states: that they were measured on.
        norm: E ||C||_F^2 / d.
        state: by family, the share of every state's own covariance.
        table: likewise, of one covariance for all states; low-rank has none.
    """

    logsnr: float
    states: int
    norm: Interval
    state: Mapping[str, Interval]
    table: Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class StructureBlocks:
    """What states of one level have said so far.

    Attributes:
        logsnr: the level.
        whole: ||C||_F^2 of every state, (n,) float64.
        caught: ||P_F C||_F^2 of every state by family, (n,).
        features: what a table of the family has the mean of, (n, m): ||P_F E C||_F^2 is the square of its mean.
        d: numbers in an event.
    """

    logsnr: float
    whole: Tensor
    caught: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    d: int

    def __len__(self) -> int:
        """Number of states."""
        return len(self.whole)

    @classmethod
    def joined(cls, parts: Sequence[StructureBlocks]) -> StructureBlocks:
        """The states of all parts of a level."""
        one = parts[0]
        caught = {k: torch.cat([p.caught[k] for p in parts]) for k in one.caught}
        features = {k: torch.cat([p.features[k] for p in parts]) for k in one.features}
        return cls(one.logsnr, torch.cat([p.whole for p in parts]), caught, features, one.d)

    def shares(self) -> Structure:
        """Shares with 95% intervals.

        Raises:
            ValueError: for fewer than 16 states: there is no interval.
        """
        n = len(self)
        if n < MIN_BLOCKS:
            raise ValueError(f"{n} states; an interval needs at least {MIN_BLOCKS}")
        groups = min(n, _GROUPS)
        place = torch.arange(n) * groups // n
        sizes = torch.bincount(place, minlength=groups)

        def summed(values: Tensor) -> Tensor:
            out = torch.zeros(groups, *values.shape[1:], dtype=torch.float64)
            return out.index_add_(0, place, values.double())

        whole = summed(self.whole)
        left = n - sizes
        below, below_left = float(whole.sum()) / n, (whole.sum() - whole) / left

        def ratio(value: float, without: Tensor) -> Interval:
            return Replicates(value / below, without / below_left, sizes).interval()

        def of_states(values: Tensor) -> Interval:
            part = summed(values)
            return ratio(float(part.sum()) / n, (part.sum() - part) / left)

        def of_table(f: Tensor) -> Interval:
            f = f.double()
            sums, squares = summed(f), summed(f.square().sum(1))
            S, Q = sums.sum(0), squares.sum()
            value = (S.square().sum() - Q) / (n * (n - 1))  # over pairs of different states
            without = ((S - sums).square().sum(1) - (Q - squares)) / (left * (left - 1))
            return ratio(float(value), without)

        norm = Replicates(below / self.d, below_left / self.d, sizes).interval()
        return Structure(
            self.logsnr,
            n,
            norm,
            {k: of_states(v) for k, v in self.caught.items()},
            {k: of_table(f) for k, f in self.features.items()},
        )


def structure_blocks(
    denoiser: Denoiser,
    images: ImageSource,
    levels: Level,
    pca: Basis,
    noise: NoiseSource,
    *,
    rank: int = 4,
    size: int = 8,
    begin: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[StructureBlocks, ...]]:
    """Rounds of `size` states at every level, without end (images go round).

    A state costs 2 + 2 r products with the symmetrised Jacobian, three evaluations each.

    Args:
        denoiser: differentiable; samples of a batch do not depend on each other.
        images: clean data.
        levels: noise levels, (L,), sigma > 0.
        pca: see `bases_of`.
        noise: source; state i has number i.
        rank: r, at most d / 2.
        size: states of a round.
        begin: number of the first state.
        device: of the network.

    Yields:
        One `StructureBlocks` a level; join those of rounds.

    Example:
        >>> from itertools import islice
        >>> from lowvar.data import TensorImages
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 1.0])), CosineVP()
        >>> images = TensorImages(twin.sample(Independent(0).normal(range(64), (2,))).clamp(-1, 1))
        >>> level = schedule.at(torch.tensor([0.5]))
        >>> rounds = structure_blocks(twin.denoiser(schedule), images, level, twin.basis, Independent(1), size=32)
        >>> shares = StructureBlocks.joined([of_level for (of_level,) in islice(rounds, 4)]).shares()
        >>> shares.state["isotropic"].low < 1 < shares.state["isotropic"].high
        True
    """
    known: JacobianCovariance | None = None
    while True:
        index = torch.arange(begin, begin + size)
        x0 = images.images(index % len(images)).to(device)
        known = JacobianCovariance(denoiser) if known is None else known
        yield tuple(_of_level(known, x0, index, levels[k], k, pca, noise, rank) for k in range(len(levels)))
        begin += size


def _of_level(
    denoiser: JacobianCovariance,
    x0: Tensor,
    index: Tensor,
    level: Level,
    number: int,
    pca: Basis,
    noise: NoiseSource,
    rank: int,
) -> StructureBlocks:
    shape, d, n = x0.shape[1:], x0[0].numel(), len(x0)
    r = max(1, min(rank, d // 2))
    stride = _RANGE + r

    def drawn(k: int) -> Tensor:
        return noise.normal(index, shape, draw=number * stride + k, dtype=x0.dtype, device=x0.device)

    level = level.to(x0.device)
    x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * drawn(_EPS)
    C = denoiser(x, level).covariance
    assert C is not None
    z = [drawn(_PROBE + k) for k in range(_PROBES)]
    Cz = [C.matvec(v) for v in z]
    whole = torch.stack([y.flatten(1).double().square().sum(1) for y in Cz]).mean(0)
    caught, features = {}, {}
    traces = [(a * b).flatten(1).double().sum(1) for a, b in zip(z, Cz, strict=True)]
    caught["isotropic"] = traces[0] * traces[1] / d
    features["isotropic"] = (traces[0] + traces[1])[:, None] / (2 * d**0.5)
    for name, basis in bases_of(shape, pca).items():
        f = [(basis.forward(a) * basis.forward(b)).flatten(1).double() for a, b in zip(z, Cz, strict=True)]
        caught[name] = (f[0] * f[1]).sum(1)
        features[name] = ((f[0] + f[1]) / 2).float()
    rows = torch.stack([C.matvec(drawn(_RANGE + k)).flatten(1) for k in range(r)], 2)  # C V, (n, d, r)
    Q = torch.linalg.qr(rows.double())[0]
    CQ = torch.stack([C.matvec(Q[..., k].reshape(n, *shape).to(x0)).flatten(1) for k in range(r)], 2).double()
    block = torch.einsum("nda,ndb->nab", Q, CQ).square().sum((1, 2))
    rest = []
    for a, b in zip(z, Cz, strict=True):
        v, y = a.flatten(1).double(), b.flatten(1).double()
        inside = (torch.einsum("nda,nd->na", Q, v) * torch.einsum("nda,nd->na", Q, y)).sum(1)
        rest.append((v * y).sum(1) - inside)
    caught["low-rank"] = block + rest[0] * rest[1] / max(d - r, 1)
    place = {k: v.cpu() for k, v in caught.items()}
    return StructureBlocks(float(level.logsnr), whole.cpu(), place, {k: v.cpu() for k, v in features.items()}, d)
