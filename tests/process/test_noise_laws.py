"""Noise sources keep the laws."""

from __future__ import annotations

import pytest
import torch

from lowvar.process.noise import Antithetic, Common, Independent, NoiseSource, TorchGenerators, philox
from lowvar.testing.laws.noise import NoiseLaws, check_known_answers, check_mirrored

SOURCES: dict[str, tuple[NoiseSource, int]] = {
    "independent": (Independent(0), 1),
    "independent, large seed": (Independent(2**63 + 5), 1),
    "antithetic": (Antithetic(Independent(1)), 2),
    "common 3": (Common(Independent(2), size=3), 3),
}


class TestSources(NoiseLaws):
    @pytest.fixture(params=SOURCES.values(), ids=list(SOURCES))
    def case(self, request: pytest.FixtureRequest) -> tuple[NoiseSource, int]:
        return request.param

    @pytest.fixture
    def source(self, case: tuple[NoiseSource, int]) -> NoiseSource:
        self.groups = case[1]
        return case[0]


def test_philox_is_the_published_one() -> None:
    check_known_answers(philox)


def test_antithetic_pairs_are_mirrored() -> None:
    check_mirrored(Antithetic(Independent(3)))


def test_common_shares_within_a_group() -> None:
    z = Common(Independent(3), size=2).normal(range(6), (4,))
    assert torch.equal(z[0::2], z[1::2])
    assert not bool((z[0] == z[2]).any())
    everything = Common(Independent(3)).normal(range(6), (4,))
    assert torch.equal(everything, everything[:1].expand(6, 4))
    with pytest.raises(ValueError, match="at least 1"):
        Common(size=0)


def test_seeds_and_elements_differ() -> None:
    z = Independent(0).normal(range(4), (1000,), dtype=torch.float64)
    assert len(z.unique()) == z.numel()
    assert not bool((z == Independent(1).normal(range(4), (1000,), dtype=torch.float64)).any())
    assert torch.equal(z[:, :7], Independent(0).normal(range(4), (7,), dtype=torch.float64))


def test_tails_are_there_and_bounded() -> None:
    """32-bit words reach |z| = sqrt(2 log 2^33) = 6.76 and no further; the sixth moment of a million is 15 +- 0.5."""
    z = Independent(9).normal(range(1000), (1000,), dtype=torch.float64)
    assert 4.5 < float(z.abs().max()) < 6.77
    assert abs(float((z**4).mean()) - 3) < 0.05
    assert abs(float((z**6).mean()) - 15) < 0.5


def test_torch_generators_follow_call_order() -> None:
    one = TorchGenerators([torch.Generator().manual_seed(i) for i in range(3)]).normal(range(3), (2,))
    two = TorchGenerators([torch.Generator().manual_seed(i) for i in (1,)]).normal(range(1), (2,))
    assert torch.equal(one[1], two[0])
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        TorchGenerators([torch.Generator(), torch.Generator()]).normal(range(3), (2,))
