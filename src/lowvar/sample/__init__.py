"""Running the reverse process: trajectories, samples, likelihood."""

from lowvar.sample.trajectory import generate, initial_state, trajectory

__all__ = ["generate", "initial_state", "trajectory"]
