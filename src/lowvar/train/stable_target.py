r"""Stable targets: the mean of the posterior over a few data instead of the one datum that was drawn.

With reference data x^1 .. x^n,

    T = sum_j w_j x^j,      w_j propto p(x_t | x^j) propto exp(-||x_t - alpha x^j||^2 / (2 sigma^2)).

If the source x_0 of x_t is one of the references and they are exchangeable, T is E[x_0 | x_t, the set]: a conditional
mean of the plain target given more than x_t, so E[T | x_t] = D*(x_t) exactly and its variance is no larger
(Rao-Blackwell). It costs no network evaluation. Sources and labels:

    added      n independent draws of the data, and the source beside them       unbiased
    among      the references hold the source already (all data)                 unbiased
    left out   n independent draws without it                                    biased, by O(1 / n)

`added` wants references drawn *with* replacement, independently of the source: of a random subset that holds the source
by chance and gets it once more the source would weigh double.

With labels the network is asked for E[x_0 | x_t, label], so only references of the source's class count; a source whose
class was dropped (a negative label) is one of E[x_0 | x_t], and all references count. Which class it is and whether it
was dropped is known to the network, so all stays unbiased.

With k neighbours only A counts, the members that are likelier than the (k + 1)-th (k of them where there are no ties),
and where the source is not in A the target is x_0: T = E[x_0 | x_t, set, whether the source is in A, and it if not],
still a conditional mean and unbiased. (Left out, the k likeliest are taken as they are.) All distances are needed all
the same; saved are the mean over many references and the memory for B n weights: pages of references leave k + 1 each.

Effective sample size 1 / sum w_j^2: near 1 at little noise, where T = x_0, near n + 1 at much. With *all* data as
references T is the optimal denoiser of the training set, without noise: the network is shown nothing but the minimiser
that memorises. It is the plain target's minimiser too, but less noise hides it: watch the held-out loss.

The weights are those of noise that is independent of x_0. Pairs +-eps and any plan of times keep that for every sample
alone; couplings that choose the noise by the datum (minibatch transport, immiscible noise) do not, and have no stable
target of this form.

Distances and weights are float64 throughout, because the snr multiplies the rounding of a distance. What costs is not
that arithmetic but fresh float64 copies of the references, so they pass in blocks, twice; the second pass, the mean, is
of the draws with more than one likely reference only.

Which references an update has is a function of its number, the same on all processes.

Source: Y. Xu, S. Tong, T. Jaakkola, "Stable target field for reduced variance score estimation in diffusion models",
ICLR 2023 (there the references are a batch that holds the sources). For flows, whose target is linear in x_0 as well,
the same rule is StableVM (2026).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level
from lowvar.train.targets import Target

if TYPE_CHECKING:
    from lowvar.train.draws import ImageSource
    from lowvar.train.objectives import Label

__all__ = ["ReferencePlan", "Source", "StableInfo", "StableTarget", "memorisation", "reference_noise"]

Source = Literal["added", "among", "left out"]
_STREAM = 0x53544142 << 32  # the references' random numbers are no other ones of the same seed
_BLOCK = 2**18  # numbers of references that are float64 at a time: what a core's cache holds
_PAGE = 2**23  # numbers of references on a GPU, or of distances, at a time
_ROUNDING = 1e-12  # a weight this near to 1 is 1
_ONE = 1.5  # an effective sample size below this is that of one datum


@dataclass(frozen=True)
class StableInfo:
    """What the weights of a batch were like.

    Attributes:
        ess: effective sample size 1 / sum w_j^2, (B,) float64; 1 where the target is one datum.
        references: how many data could count, (B,) int64, the source included.
        fallback: whether the source was not among the k neighbours, so that T = x_0, (B,) bool.
    """

    ess: Tensor
    references: Tensor
    fallback: Tensor

    @property
    def alone(self) -> Tensor:
        """Whether a target is one datum, or next to it (ess < 1.5), (B,) bool."""
        return self.ess < _ONE


def memorisation(alone: float, source: Source, noun: str = "image") -> str | None:
    """A sentence where the references are all data and most targets are one datum; None elsewhere.

    Args:
        alone: share of such targets, in [0, 1].
        source: how the source stands to the references.
        noun: what a datum is called.

    Example:
        >>> print(memorisation(0.71, "among"))
        71% of the targets are one training image: with all data as references the network is shown the denoiser that \
memorises them; watch the validation loss, and give fewer references if it rises
    """
    if source != "among" or alone <= 0.5:
        return None
    return (
        f"{alone:.0%} of the targets are one training {noun}: with all data as references the network is shown the "
        "denoiser that memorises them; watch the validation loss, and give fewer references if it rises"
    )


@dataclass(frozen=True, eq=False)
class StableTarget(Target):
    """The softmax-weighted mean of a reference set.

    Args:
        references: x^j, (n, *event_shape).
        source: how the source stands to them (see the module).
        labels: classes of the references, (n,) int64; then `source_labels` are needed.
        source_labels: classes of the draws, (B,) int64; a negative one: no class, so all references count.
        neighbours: k, or None for all.

    Raises:
        ValueError: if there is no reference, a setting is unknown, or labels do not fit.

    Example:
        >>> from lowvar.process import CosineVP
        >>> target = StableTarget(torch.tensor([[-1.0], [1.0]]), "among")
        >>> level = CosineVP().at([0.02, 0.999])
        >>> [round(v, 2) for v in target.clean(torch.ones(2, 1), torch.zeros(2, 1), level)[:, 0].tolist()]
        [1.0, 0.0]
    """

    references: Tensor
    source: Source = "added"
    labels: Tensor | None = None
    source_labels: Tensor | None = None
    neighbours: int | None = None

    def __post_init__(self) -> None:
        """Checks settings."""
        if self.source not in get_args(Source):
            raise ValueError(f"source is {self.source!r}; allowed: {', '.join(get_args(Source))}")
        if len(self.references) < 1:
            raise ValueError("there is no reference; give at least 1, or use PlainTarget")
        if self.neighbours is not None and self.neighbours < 1:
            raise ValueError(f"neighbours is {self.neighbours}; give at least 1, or None for all references")
        if (self.labels is None) != (self.source_labels is None):
            raise ValueError("labels and source_labels go together: a reference counts if its class is the source's")
        if self.labels is not None and self.labels.shape != self.references.shape[:1]:
            raise ValueError(f"labels have shape {tuple(self.labels.shape)} for {len(self.references)} references")

    @property
    def label(self) -> Label:
        """See the base class: biased if the source is left out."""
        return "biased" if self.source == "left out" else "unbiased"

    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """See the base class."""
        return self.weighted(x0, eps, level)[0]

    def weighted(self, x0: Tensor, eps: Tensor, level: Level) -> tuple[Tensor, StableInfo]:
        """T as of `clean`, and what the weights were like.

        Raises:
            ValueError: if the shapes of draws and references differ, or source labels do not fit.
        """
        if x0.shape[1:] != self.references.shape[1:]:
            raise ValueError(f"draws are {tuple(x0.shape[1:])}, references {tuple(self.references.shape[1:])}")
        if self.source_labels is not None and self.source_labels.shape != x0.shape[:1]:
            raise ValueError(f"source_labels have shape {tuple(self.source_labels.shape)} for {len(x0)} draws")
        with torch.no_grad():
            y = x0.flatten(1).double()
            own = -0.5 * (eps.flatten(1).double() ** 2).sum(1, keepdim=True)  # log p(x_t | x_0), (B, 1)
            log_p, rows, counted = self._likeliest(y, eps.flatten(1).double(), level)
            k = self.neighbours
            if self.source == "added":
                log_p, rows = torch.cat([log_p, own], 1), torch.cat([rows, torch.full_like(rows[:, :1], -1)], 1)
                counted = counted + 1
            log_p, rows = _top(log_p, rows, k)
            if k is not None and log_p.shape[1] > k:
                log_p, at = log_p.sort(1, descending=True)
                rows = rows.gather(1, at)
                if self.source == "left out":
                    log_p, rows = log_p[:, :k], rows[:, :k]
                else:
                    bound = log_p[:, k:].clamp_min(-1e300)
                    bound = bound + 1e-9 * (1 + bound.abs())  # rounding does not break a tie
                    log_p = torch.where((log_p > bound) & (own > bound), log_p, -torch.inf)
            fallback = torch.isneginf(log_p.amax(1))  # the source is not near, or no reference of its class
            w = torch.softmax(torch.where(fallback[:, None], 0.0, log_p), 1)
            mean = torch.where(fallback[:, None], y, self._mean(w, rows, y))
            ess = torch.where(fallback, 1.0, 1 / (w**2).sum(1))
        return mean.to(x0).reshape(x0.shape), StableInfo(ess, counted, fallback)

    def _likeliest(self, y: Tensor, e: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Log p(x_t | x^j) up to a constant of sources y, noise e (B, d), and the references' numbers, (B, m) each.

        All references in order, or the k + 1 likeliest; -inf for other classes. Also how many count, (B,).

        With r = alpha / sigma and s = e + r (y - c), c any centre, ||x_t - alpha x^j||^2 / sigma^2 is
        ||s||^2 - 2 r s . (x^j - c) + r^2 ||x^j - c||^2: nothing is divided, so alpha = 0 needs no care.
        """
        r = torch.exp(0.5 * level.logsnr.to(y)).expand(len(y))[:, None]
        centre = y.mean(0)
        s = e + r * (y - centre)
        rs, r2 = r * s, r[:, 0] ** 2
        constant = 0.5 * (s**2).sum(1, keepdim=True)
        page = max(1, _PAGE // len(y))
        parts: list[tuple[Tensor, Tensor]] = []
        counted = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        for first in range(0, len(self.references), page):
            rows = torch.arange(first, min(first + page, len(self.references)), device=y.device)
            log_p = torch.empty(len(y), len(rows), dtype=y.dtype, device=y.device)
            for at, x in self._blocks(first, len(rows), y):
                z = x.sub_(centre)
                square = 0.5 * torch.linalg.vector_norm(z, dim=1) ** 2
                log_p[:, at : at + len(z)] = (rs @ z.mT).addr_(r2, square, alpha=-1).sub_(constant)
            if self.labels is not None and self.source_labels is not None:
                wanted = self.source_labels[:, None].to(y.device)
                counts = (wanted < 0) | (wanted == self.labels[rows.to(self.labels.device)].to(y.device))
                log_p = torch.where(counts, log_p, -torch.inf)
            counted += (~torch.isneginf(log_p)).sum(1)
            parts.append(_top(log_p, rows.expand(len(y), -1), self.neighbours))
        log_p, rows = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
        return *_top(log_p, rows, self.neighbours), counted

    def _blocks(self, first: int, count: int, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Float64 (m, d) blocks of `count` references from `first` on, each with its place among these.

        They share one memory: on a processor it fits the cache, and fresh copies of all references would cost several
        times the arithmetic.
        """
        z = self.references.flatten(1)
        step = min(count, max(1, (_BLOCK if y.device.type == "cpu" else _PAGE) // y.shape[1]))
        memory = torch.empty(step, y.shape[1], dtype=y.dtype, device=y.device)
        for at in range(0, count, step):
            part = z[first + at : first + min(at + step, count)]
            yield at, memory[: len(part)].copy_(part)

    def _mean(self, w: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        """Sum of weights times data, (B, d) float64; row -1 is the source."""
        most, best = w.max(1)
        picked = rows.gather(1, best[:, None])[:, 0]
        z = self.references.flatten(1)
        mean = torch.where((picked == -1)[:, None], y, z[picked.clamp_min(0).to(z.device)].to(y.device).to(y.dtype))
        several = (most < 1 - _ROUNDING).nonzero()[:, 0]  # few at little noise, and the others have their mean
        if not len(several):
            return mean
        w, rows = w[several], rows[several]
        sums = torch.where(rows == -1, w, 0.0).sum(1, keepdim=True) * y[several]
        if self.neighbours is None:
            for at, x in self._blocks(0, len(z), y):
                sums.addmm_(w[:, at : at + len(x)], x)
        else:
            w = torch.where(rows == -1, 0.0, w)
            step = max(1, _PAGE // (rows.shape[1] * y.shape[1]))
            for part in torch.arange(len(several), device=y.device).split(step):
                near = z[rows[part].clamp_min(0).to(z.device)].to(y.device).to(y.dtype)
                sums[part] += torch.einsum("bk,bkd->bd", w[part], near)
        return mean.index_copy(0, several, sums)


def _top(log_p: Tensor, rows: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """The k + 1 likeliest columns, the likeliest first, or all as they are if there are no more."""
    if k is None or log_p.shape[1] <= k + 1:
        return log_p, rows
    log_p, at = torch.topk(log_p, k + 1, 1)
    return log_p, rows.gather(1, at)


class ReferencePlan:
    """The reference set of every update.

    Args:
        images: the training split.
        count: n; as many as there are data or more: all data, which hold the source (unless it is to be left out).
        noise: source of the references' numbers.
        include_source: whether the source counts (unbiased) or not (biased).
        labels: classes of the data, (N,) int64, to use references of the source's class only.
        neighbours: see `StableTarget`.

    Raises:
        ValueError: if `count` is below 1 or labels do not fit.

    Example:
        >>> from lowvar.data import load
        >>> plan = ReferencePlan(load("digits").train, 8)
        >>> plan.target(3).references.shape, bool((plan.rows(3) == plan.rows(4)).all())
        (torch.Size([8, 1, 8, 8]), False)
    """

    def __init__(
        self,
        images: ImageSource,
        count: int,
        noise: NoiseSource | None = None,
        *,
        include_source: bool = True,
        labels: Tensor | None = None,
        neighbours: int | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; give at least 1 reference")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"labels have shape {tuple(labels.shape)} for {len(images)} images; give one an image")
        self.images, self.count, self.labels, self.neighbours = images, count, labels, neighbours
        self.noise = reference_noise(0) if noise is None else noise
        self.source: Source = "left out" if not include_source else "among" if count >= len(images) else "added"
        self._all: Tensor | None = None  # a memo of all data, where they are the references

    def rows(self, update: int) -> Tensor:
        """Numbers of the images that an update refers to, int64 (n,): independent draws, or all."""
        size = len(self.images)
        if self.source == "among":
            return torch.arange(size)
        u = self.noise.uniform([update], (self.count,), dtype=torch.float64)[0]
        return (u * size).long().clamp_max(size - 1)

    def target(
        self, update: int, device: torch.device | str = "cpu", source_labels: Tensor | None = None
    ) -> StableTarget:
        """The target of an update; `source_labels` (B,) are the classes of its draws, where the plan has labels.

        A negative one stands for a draw whose class was dropped.
        """
        rows = self.rows(update)
        if self.source == "among":
            self._all = self.images.images(rows).to(device) if self._all is None else self._all.to(device)
        references = self.images.images(rows).to(device) if self._all is None else self._all
        labels = None if self.labels is None else self.labels[rows]
        return StableTarget(references, self.source, labels, source_labels, self.neighbours)


def reference_noise(seed: int) -> NoiseSource:
    """The source of the references' numbers in a run of this seed: none of the draws' own numbers."""
    return Independent(seed ^ _STREAM)
