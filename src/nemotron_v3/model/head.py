"""The language-model head: one that shares the embeddings' matrix, and the matrix of a plain one.

Letters: D hidden size, V vocabulary.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_v3.layers.hooks import must_call


class HasEmbeddings(Protocol):
    embeddings: nn.Embedding


class TiedHead(nn.Module):
    """A head that multiplies by the embedding matrix and holds no parameter of its own.

    A second registration of one parameter would come apart under `to_empty`, sharding or a load; a
    reference to the module that holds the embeddings cannot, nor when they are replaced.
    """

    def __init__(self, model: HasEmbeddings):
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule, so not a second owner

    @property
    def embeddings(self) -> nn.Embedding:
        return self._model[0].embeddings

    @property
    def weight(self) -> Tensor:
        return self.embeddings.weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight)


def plain_weight(head: nn.Module) -> Tensor | None:
    """The matrix `[V, D]` of a head that is nothing else, so that a loss may multiply by it itself.

    None where the head has to be called: adapters, quantised or sharded weights, hooks (those of
    all modules too), a bias, another backend's projection.
    """
    if must_call(head, nn.Linear, TiedHead):
        return None
    if isinstance(head, TiedHead) and must_call(head.embeddings, nn.Embedding):
        return None
    if getattr(head, "bias", None) is not None:
        return None
    weight = head.weight
    if type(weight) is Tensor or type(weight) is nn.Parameter:
        return weight
    return None
