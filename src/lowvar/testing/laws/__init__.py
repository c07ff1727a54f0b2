"""The laws every object of the process must keep, as functions and as test classes that an object's test inherits.

A new schedule, covariance, kernel or noise source gets its tests by supplying itself (and its dense truth) as fixtures:

    class TestMySchedule(ScheduleLaws):
        @pytest.fixture
        def schedule(self):
            return MySchedule()

Each law is also a plain function `check_...` that raises `AssertionError`, so that it can be applied to a wrong object
and be shown to fail. pytest is not imported here.
"""

from lowvar.testing.laws.covariance import CovarianceLaws
from lowvar.testing.laws.kernel import KernelLaws
from lowvar.testing.laws.noise import NoiseLaws
from lowvar.testing.laws.schedule import ScheduleLaws

__all__ = ["CovarianceLaws", "KernelLaws", "NoiseLaws", "ScheduleLaws"]
