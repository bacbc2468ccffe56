"""What forward and backward of the portable convolution share.

Letters: T packed tokens, n_docs documents, C channels, W taps; n outputs, which need n + W - 1
inputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nemotron_v3.ops.causal_conv1d.portable_borders import Borders, Places
from nemotron_v3.ops.common.blocks import row_blocks


def sum_of_taps(
    inputs: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """`u_i = bias + sum_j taps[j] inputs[i + j]`: `[..., n + W - 1, C]` -> `[..., n, C]`."""
    n = inputs.shape[-2] - len(taps) + 1
    first = inputs.narrow(-2, 0, n)
    if bias is None:
        u = torch.mul(first, taps[0], out=out)
    else:
        u = torch.addcmul(bias, first, taps[0], out=out)
    for j in range(1, len(taps)):
        u.addcmul_(inputs.narrow(-2, j, n), taps[j])
    return u


def head_inputs(
    x: Tensor, states: Tensor | None, borders: Borders, W: int
) -> Iterator[tuple[slice, Places, Tensor]]:
    """For each block of documents: which, its heads, and their inputs `[d, 2 (W - 1), C]`.

    The inputs are the state without its oldest entry, which no tap of this document reaches, and
    the first W - 1 tokens, with zeros where the document is shorter.
    """
    D, C = len(borders.head_counts) - 1, x.shape[1]
    if W == 1:
        return
    dtype = torch.promote_types(x.dtype, torch.float32)
    for first, last in row_blocks(D, 2 * (W - 1) * C, x.device):
        heads = borders.heads_of_documents(first, last, W)
        if not heads.places.numel():
            continue
        inputs = x.new_zeros(last - first, 2 * (W - 1), C, dtype=dtype)
        if states is not None:
            # A state is rounded to the stream's dtype, as the inputs it is made of were.
            inputs[:, : W - 1] = states[first:last, :, 1:].to(x.dtype).transpose(1, 2)
        tokens = x.new_zeros((last - first) * (W - 1), C)
        tokens.index_copy_(0, heads.places, x.index_select(0, heads.sources))
        inputs[:, W - 1 :] = tokens.unflatten(0, (last - first, W - 1))
        yield slice(first, last), heads, inputs
