"""Decoding on a GPU: a step of the whole model on fixed buffers, as one CUDA graph.

`slots.py` holds the buffers of a batch, `plan.py` the calls of a step, `fits.py` says which models
a step knows, `graph.py` captures and keeps steps, `step.py` is what the engine of generation uses.
"""

from nemotron_v3.generation.graphs.fits import say_once, why_not
from nemotron_v3.generation.graphs.step import GraphStep

__all__ = ["GraphStep", "say_once", "why_not"]
