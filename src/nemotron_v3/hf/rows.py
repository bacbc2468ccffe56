"""Projections of packed tokens that are still called as transformers calls them.

Letters: B batch, S sequence, T packed tokens, D width in, E width out.
"""

from torch import Tensor, nn

from nemotron_v3.layers.hooks import is_observed, must_call
from nemotron_v3.layers.linear import project
from nemotron_v3.layout import SequenceLayout


def project_rows(layer: nn.Module, x: Tensor, layout: SequenceLayout) -> Tensor:
    """`layer` of the packed tokens `[T, D]`: `[T, E]`.

    A plain linear layer is called with them. Anything else, such as a layer with an adapter or a
    hook, may use the row of a token in the batch (PEFT's `adapter_names` and activated LoRA do), so
    it is called with the grid `[B, S, D]`: without padding always; with padding (filled with zeros)
    only if the module has hooks or adapters. `layer` may be a module of several projections.
    """
    if not must_call(layer, nn.Linear):
        return project(layer, x)
    if layout.token_index is not None and not any(map(is_observed, layer.modules())):
        return layer(x)
    return layout.pack(layer(layout.unpack(x)))
