"""Triton's interpreter in bf16, which it holds as 16-bit integers.

It multiplies those in `tl.dot`, and cuts digits off where a GPU rounds to the nearest.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Products and casts of bf16 as on a GPU, for as long as `patch` lasts."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *options):
        if a.dtype.is_bf16():
            product = np.matmul(_wide(a.data), _wide(b.data))
            return TensorHandle(product + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_narrow(src.data), dst_type.scalar)
        return cast(self, src, dst_type)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def mend_products(patch: pytest.MonkeyPatch) -> None:
    """Products of fp16 whose sums do not depend on a row's place in its tile, while `patch` lasts.

    On some processors the interpreter's BLAS takes other steps for other places.
    """
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype == np.float16:
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)
        return dot(self, a, b, d, *options)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _wide(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
