"""Products of tiles that are added to a sum."""

import triton
import triton.language as tl


@triton.jit
def add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """`b_sum + b_left b_right`, in fp32 each product by itself.

    `tl.dot` with an accumulator chains its additions to it: over many products such a chain loses
    digits. The product is subtracted, because Triton turns a sum with a product into one chain
    again. Negating an operand changes no digit.
    """
    if b_left.dtype == tl.float32:
        b_sum -= tl.dot(-b_left, b_right, input_precision=PRECISION)
    else:
        b_sum = tl.dot(b_left, b_right, acc=b_sum, input_precision=PRECISION)
    return b_sum
