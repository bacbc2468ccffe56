"""Another dispatcher in a mixture of experts gives the same numbers."""

import pytest
import torch

from nemotron_v3.layers.moe import NemotronV3Experts
from nemotron_v3.layers.moe.dispatcher import Dispatched, LocalDispatcher
from tests.models import labels_of, tiny_model, tokens


class Halves:
    """Expert parallelism of two, in one process: each half of the experts computes the rows that
    would be sent to its process, and each token's rows are added up where it came from."""

    def __init__(self, experts: NemotronV3Experts):
        self.here = len(experts.up_proj) // 2  # experts of a process
        self.rows_of = []

    def dispatch(self, x, indices, weights):
        K = indices.shape[1]
        process = indices.flatten() // self.here
        order = process.argsort(stable=True)
        self.rows_of.append(torch.bincount(process, minlength=2).tolist())
        dispatched = Dispatched(
            x.repeat_interleave(K, dim=0)[order],
            indices.flatten()[order, None],
            weights.flatten()[order, None],
        )
        return dispatched, (order, K)

    def compute(self, dispatched, experts):
        """Each process's rows by a call of the experts' module, so that what is beside the stacks,
        adapters and hooks, acts."""
        rows = zip(*(t.split(self.rows_of[-1]) for t in dispatched), strict=True)
        return torch.cat([experts(*part) for part in rows])

    def combine(self, y, metadata):
        order, K = metadata
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
                layer.dispatcher = Halves(layer.experts)
        out = model(ids, mask, labels=labels_of(ids, mask))
        out.loss.backward()
        results.append([out.logits, out.loss, *(p.grad for p in model.parameters())])
    assert all(min(layer.dispatcher.rows_of[0]) > 0 for layer in layers)
    assert all(sum(layer.dispatcher.rows_of[0]) == 35 * 3 for layer in layers)
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("spread", [False, True])
def test_hooks_and_adapters_of_the_experts_act_through_a_dispatcher(spread):
    model, ids = tiny_model("E"), tokens(1, 7)
    layer = model.model.layers[0].mlp
    layer.experts.add_low_rank(2, alpha=4.0)
    with torch.no_grad():
        layer.experts.low_rank.up_b.normal_()
        layer.experts.low_rank.down_b.normal_()
        expected = model(ids).logits
    if spread:
        layer.dispatcher = Halves(layer.experts)
    rows = []
    layer.experts.register_forward_hook(lambda module, args, out: rows.append(len(args[1])))
    with torch.no_grad():
        logits = model(ids).logits
    assert rows == (layer.dispatcher.rows_of[0] if spread else [7])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


class Former:
    """A dispatcher that knows `dispatch` by its former name."""

    def permute(self, x, indices, weights):
        return Dispatched(x, indices, 2 * weights), None

    def compute(self, dispatched, experts):
        return experts(*dispatched)

    def combine(self, y, metadata):
        return y


def test_a_dispatcher_may_have_the_former_name_of_its_method():
    layer, x = tiny_model("E").model.layers[0].mlp, torch.randn(1, 3, 48)
    layer.shared_experts = None
    with torch.no_grad():
        plain = layer(x)
        layer.dispatcher = Former()
        assert torch.allclose(layer(x), 2 * plain)
