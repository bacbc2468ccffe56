"""Another dispatcher in a mixture of experts gives the same numbers."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layers.moe.dispatcher import LocalDispatcher, Sent
from tests.models import labels_of, tiny_model, tokens


class Halves:
    """Expert parallelism of two, in one process: each half of the experts computes the rows that
    would be sent to its process, and each token's rows are added up where it came from."""

    def __init__(self, experts: int):
        self.each = experts // 2
        self.rows_of = []

    def permute(self, x, indices, weights):
        K = indices.shape[1]
        process = indices.flatten() // self.each
        order = process.argsort(stable=True)
        self.rows_of.append(torch.bincount(process, minlength=2).tolist())
        sent = Sent(
            x.repeat_interleave(K, dim=0)[order],
            indices.flatten()[order, None] % self.each,
            weights.flatten()[order, None],
        )
        return sent, (order, K)

    def compute(self, sent, experts):
        stacks = (t.split(self.each) for t in (experts.up_proj, experts.down_proj))
        parts = zip(*(t.split(self.rows_of[-1]) for t in sent), *stacks, strict=True)
        return torch.cat([ops.experts(*part, impl=experts.impl) for part in parts])

    def combine(self, y, way_back):
        order, K = way_back
        return torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, K)).sum(1)


@pytest.mark.parametrize("latent", [None, 28])
def test_experts_in_two_places_give_the_local_result(latent):
    """Output and every gradient, in fp64 to the last digits; with a latent projection around."""
    ids, mask = tokens(2, 20), torch.ones(2, 20)
    mask[0, :5] = 0
    results = []
    for spread in (False, True):
        model = tiny_model(moe_latent_size=latent).double()
        layers = [block.mlp for block in model.model.layers if block.mlp is not None]
        assert all(isinstance(layer.dispatcher, LocalDispatcher) for layer in layers)
        if spread:
            for layer in layers:
                layer.dispatcher = Halves(8)
        out = model(ids, mask, labels=labels_of(ids, mask))
        out.loss.backward()
        results.append([out.logits, out.loss, *(p.grad for p in model.parameters())])
    assert all(min(layer.dispatcher.rows_of[0]) > 0 for layer in layers)
    assert all(sum(layer.dispatcher.rows_of[0]) == 35 * 3 for layer in layers)
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_hooks_on_the_experts_act_through_a_dispatcher():
    model = tiny_model("E")
    layer = model.model.layers[0].mlp
    seen = []
    layer.experts.register_forward_hook(lambda module, args, out: seen.append(args[1].shape))
    model(tokens(1, 7))
    assert seen == [(7, 3)]
