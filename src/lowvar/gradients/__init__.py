"""Gradient estimators: control variates whose coefficients do not bias what they control."""

from lowvar.gradients.controlled import Controlled, ControlState, controlled, lagged

__all__ = ["ControlState", "Controlled", "controlled", "lagged"]
