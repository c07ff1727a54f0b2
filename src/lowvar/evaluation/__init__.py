"""Samplers by name, ours and diffusers', run on one network with common noise and scored against held-out data."""

from __future__ import annotations

from lowvar.evaluation.cells import Cell, Drawn, check_cell, check_steps, deficit_of, draw, resolve, sampling_grid
from lowvar.evaluation.chains import chain_of, event_shape_of, sampler_of
from lowvar.evaluation.peers import PEERS, Peer, make_peer, peer_named, run_peer
from lowvar.evaluation.runs import MIXTURE_ALONE, TWIN_ALONE, Evaluation, evaluate, recommend, require_enough

__all__ = [
    "MIXTURE_ALONE",
    "PEERS",
    "TWIN_ALONE",
    "Cell",
    "Drawn",
    "Evaluation",
    "Peer",
    "chain_of",
    "check_cell",
    "check_steps",
    "deficit_of",
    "draw",
    "evaluate",
    "event_shape_of",
    "make_peer",
    "peer_named",
    "recommend",
    "require_enough",
    "resolve",
    "run_peer",
    "sampler_of",
    "sampling_grid",
]
