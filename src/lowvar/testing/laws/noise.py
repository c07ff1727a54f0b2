r"""Laws of a noise source: numbers are a function of (sample, draw, element) and nothing else.

normal([i, j, ...])[k] = normal([k-th number]) bit for bit,  marginals N(0, 1),  uniforms in the open interval (0, 1),
antithetic pairs mirrored exactly,  Philox as its authors publish it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource

__all__ = [
    "NoiseLaws",
    "check_batches",
    "check_draws",
    "check_known_answers",
    "check_mirrored",
    "check_normal_marginal",
    "check_open_interval",
    "check_order",
    "check_uniform_marginal",
]

_Words = tuple[int, int, int, int]
_KNOWN: tuple[
    tuple[_Words, tuple[int, int], _Words], ...
] = (  # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        (2**32 - 1, 2**32 - 1),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def check_known_answers(philox: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
    """The three published test vectors of philox4x32-10."""
    for counter, key, answer in _KNOWN:
        got = philox(torch.tensor(counter, dtype=torch.int64)[:, None], key).flatten().tolist()
        if tuple(got) != answer:
            raise AssertionError(f"philox{counter} with key {key} is {[hex(w) for w in got]}")


def _draws(source: NoiseSource) -> tuple[Callable[..., Tensor], ...]:
    return source.normal, source.uniform


def check_batches(source: NoiseSource, n: int = 64, sizes: tuple[int, ...] = (1, 7, 64)) -> None:
    """Batches of any size give the same numbers, bit for bit."""
    for draw in _draws(source):
        for dtype in (torch.float32, torch.float64):
            whole = draw(range(n), (2, 3), draw=3, dtype=dtype)
            for size in sizes:
                parts = [draw(range(i, min(i + size, n)), (2, 3), draw=3, dtype=dtype) for i in range(0, n, size)]
                if not torch.equal(torch.cat(parts), whole):
                    raise AssertionError(f"numbers depend on the batch size ({size} against {n})")


def check_order(source: NoiseSource) -> None:
    """Samples in any order, and sample numbers beyond 2^32, keep their numbers."""
    index = [5, 2**40 + 1, 0, 17, 2**33]
    for draw in _draws(source):
        whole = draw(index, (3,))
        single = torch.cat([draw([i], (3,)) for i in index])
        if not torch.equal(whole, single):
            raise AssertionError("numbers depend on the order of the samples")


def check_draws(source: NoiseSource) -> None:
    """Draws differ from each other, repeat themselves, and normal and uniform numbers have streams of their own."""
    one, again, two = (source.normal(range(8), (5,), draw=k) for k in (1, 1, 2))
    if not torch.equal(one, again):
        raise AssertionError("a draw does not repeat itself")
    if bool((one == two).any()):
        raise AssertionError("two draws share numbers")
    prefix = source.normal(range(8), (3,), draw=1)
    if prefix.shape != (8, 3):
        raise AssertionError(f"asked for shape (3,), got {tuple(prefix.shape)}")


def _kolmogorov(u: Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of numbers from the uniform law."""
    u = u.double().flatten().sort().values
    n = len(u)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(grid - u, u - grid + 1 / n).max())


def check_normal_marginal(source: NoiseSource, groups: int = 1, n: int = 20_000) -> None:
    """Each element is N(0, 1) over independent samples: sqrt(n) KS below 1.95 (false alarm 1 in 1000, at a fixed seed).

    Args:
        source: the source.
        groups: distance of independent sample numbers (2 for antithetic pairs).
        n: samples.
    """
    z = source.normal(range(0, n * groups, groups), (3,), draw=2, dtype=torch.float64)
    for k in range(3):
        distance = _kolmogorov(torch.special.ndtr(z[:, k]))
        if distance > 1.95:
            raise AssertionError(f"element {k} is not standard normal: sqrt(n) KS = {distance:.3g}")
    correlation = (z.mT @ z / n - torch.eye(3, dtype=torch.float64)).abs().max() * math.sqrt(n)
    if float(correlation) > 5:
        raise AssertionError(
            f"elements are correlated or of the wrong variance: {float(correlation):.3g} standard errors"
        )


def check_uniform_marginal(source: NoiseSource, groups: int = 1, n: int = 20_000) -> None:
    """Each element is uniform over independent samples; as `check_normal_marginal`."""
    u = source.uniform(range(0, n * groups, groups), (2,), draw=2, dtype=torch.float64)
    for k in range(2):
        distance = _kolmogorov(u[:, k])
        if distance > 1.95:
            raise AssertionError(f"element {k} is not uniform: sqrt(n) KS = {distance:.3g}")


def check_open_interval(source: NoiseSource, n: int = 20_000) -> None:
    """Neither 0 nor 1 comes out, in any dtype."""
    for dtype in (torch.float32, torch.float64):
        u = source.uniform(range(n), (4,), dtype=dtype)
        if not (float(u.min()) > 0 and float(u.max()) < 1):
            raise AssertionError(f"{dtype}: the range is [{float(u.min())}, {float(u.max())}], must be inside (0, 1)")


def check_mirrored(source: NoiseSource) -> None:
    """Samples 2k and 2k + 1 have z and -z, u and 1 - u, exactly; pairs differ."""
    z, u = source.normal(range(8), (3,)), source.uniform(range(8), (3,), dtype=torch.float64)
    if not torch.equal(z[0::2], -z[1::2]) or not torch.equal(u[1::2], 1 - u[0::2]):
        raise AssertionError("pairs are not mirrored exactly")
    if bool((z[0] == z[2]).any()):
        raise AssertionError("pairs share their numbers")


class NoiseLaws:
    """Inherit, and supply the fixture `source`; `groups` is the distance of independent sample numbers."""

    groups: int = 1

    def test_batches(self, source: NoiseSource) -> None:
        """See `check_batches`."""
        check_batches(source)

    def test_order(self, source: NoiseSource) -> None:
        """See `check_order`."""
        check_order(source)

    def test_draws(self, source: NoiseSource) -> None:
        """See `check_draws`."""
        check_draws(source)

    def test_normal_marginal(self, source: NoiseSource) -> None:
        """See `check_normal_marginal`."""
        check_normal_marginal(source, self.groups)

    def test_uniform_marginal(self, source: NoiseSource) -> None:
        """See `check_uniform_marginal`."""
        check_uniform_marginal(source, self.groups)

    def test_open_interval(self, source: NoiseSource) -> None:
        """See `check_open_interval`."""
        check_open_interval(source)
