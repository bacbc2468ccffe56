"""Whether a model is still what a step has read of it.

A step keeps weights in copies and layouts of its own. Between two tokens of a stream the caller's
code runs, and may train the model, load other weights, exchange a module or put a hook on it.
"""

import torch
from torch import Tensor, nn

from nemotron_v3.layers.hooks import is_observed
from nemotron_v3.model.protocol import CausalLM

# Elements of a tensor that are compared by value: a write through `.data` leaves no other trace.
PROBES = 4


class Reading:
    """A model's modules, hooks and tensors at one moment.

    Args:
        model: whose tensors are of one dtype.
    """

    def __init__(self, model: CausalLM):
        self._modules: list[nn.Module] = list(model.modules())
        self._tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._probes = [_probe(tensor.detach()) for tensor in self._tensors]
        self._values = torch.cat(self._probes)
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether nothing has changed since.

        Of a write that autograd does not count, such as `parameter.data[5] = 0`, some elements of
        each tensor tell; one that leaves these as they are is not seen.
        """
        if self._look() != self._seen:
            return False
        values = torch.cat(self._probes)  # bits, since a NaN is not equal to itself
        return torch.equal(values.view(torch.uint8), self._values.view(torch.uint8))

    def _look(self) -> tuple[object, ...]:
        held = [(m._modules, m._parameters, m._buffers) for m in self._modules]
        return (
            torch.is_autocast_enabled("cpu"),
            [id(part) for tables in held for table in tables for part in table.values()],
            [is_observed(module) for module in self._modules],
            [tensor.data_ptr() for tensor in self._tensors],
            [tensor._version for tensor in self._counted],
        )


def _probe(tensor: Tensor) -> Tensor:
    """A view of a few elements, spread over the tensor."""
    while tensor.dim() > 1:
        tensor = tensor[len(tensor) // 2]
    return tensor.reshape(-1)[:: max(1, tensor.numel() // PROBES)]
