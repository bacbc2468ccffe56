"""The core of a Mamba-2 mixer for one token a row: `mamba2`'s reference on one-token documents."""

from typing import Any

from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.mamba2.op import mamba2


def mamba2_step(zxbcdt: Tensor, *weights: Any, **sizes: Any) -> Tensor:
    """The reference, in float64; the states are updated in place, rounded to their own dtype."""
    conv_state, ssm_state = sizes.pop("conv_state"), sizes.pop("ssm_state")
    y, new_conv, new_ssm = mamba2(
        zxbcdt,
        *weights,
        layout=SequenceLayout.plain(zxbcdt.shape[0], 1, zxbcdt.device),
        conv_states=conv_state,
        ssm_states=ssm_state,
        impl="reference",
        **sizes,
    )
    conv_state.copy_(new_conv)
    ssm_state.copy_(new_ssm)
    return y
