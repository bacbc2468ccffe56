"""Kernels that are compiled once for all numbers of tokens.

Triton compiles a kernel anew where an integer is 1, or a multiple of 16, and the last one was not.
For a number that comes with the data that is a pause of seconds in the middle of training.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton

# What differs from batch to batch, by its name in all kernels: T tokens, R rows of experts, and
# sizes that follow from them.
DATA_SIZES = (
    *(
        "T",
        "R",
        "n",
        "size",
        "tiles",
        "blocks",
        "passing_programs",
        "parts",
        "places",
        "places_out",
        "level",
    ),
)


def kernel(function: Callable) -> Any:
    """`triton.jit`, of numbers named in `DATA_SIZES` by their type alone."""
    named = [name for name in inspect.signature(function).parameters if name in DATA_SIZES]
    return triton.jit(function, do_not_specialize=named)
