"""The mixer's core in Triton where a document goes on elsewhere: cut in two, it is the whole."""

import pytest
import torch
from torch import Tensor

from nemotron_v3 import SequenceLayout, ops

HEADS, P, GROUPS, N, TAPS = 2, 8, 1, 16, 4
CHANNELS = HEADS * P + 2 * GROUPS * N
CUT = (70, 65)  # tokens; a chunk has 64


class BothHere:
    """An exchange between two pieces of one document that one process has."""

    def before(self, ends: Tensor, decays: Tensor) -> Tensor:
        assert decays.shape == ends.shape[:2]
        self.decay = decays[1, :, None, None]
        self.end = ends[1] + self.decay * ends[0]
        return torch.stack([torch.zeros_like(ends[0]), ends[0]])

    def behind(self, starts: Tensor) -> Tensor:
        return torch.stack([starts[1], torch.zeros_like(starts[0])])


def drawn() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    width = 2 * HEADS * P + 2 * GROUPS * N + HEADS
    shapes = [(sum(CUT), width), (CHANNELS, TAPS), (CHANNELS,), (HEADS,), (HEADS,), (HEADS,)]
    tensors = [torch.randn(*shape, generator=random) for shape in [*shapes, (HEADS * P,)]]
    return [t * 0.5 for t in tensors]


def run(tensors: list[Tensor], impl: str, cut: bool) -> tuple[list[Tensor], BothHere]:
    """The output and the gradients of all tensors; the inputs of the convolution are given too."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    exchange, options = BothHere(), {}
    if cut:
        inputs = leaves[0][CUT[0] - TAPS + 1 : CUT[0], HEADS * P : HEADS * P + CHANNELS]
        given = torch.nn.functional.pad(inputs.T, (1, 0))  # the oldest column is of no tap
        options["conv_states"] = torch.stack([torch.zeros_like(given), given])
        options["exchange"] = exchange
    y, _, state = ops.mamba2(
        *leaves,
        n_groups=GROUPS,
        head_dim=P,
        state_size=N,
        layout=SequenceLayout.from_lengths(CUT if cut else [sum(CUT)]),
        impl=impl,
        **options,
    )
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = [y.detach(), *torch.autograd.grad(y, leaves, weights)]
    return [*found, exchange.end if cut else state[0].detach()], exchange


@pytest.mark.parametrize("impl", ["portable", pytest.param("triton", marks=pytest.mark.heavy)])
def test_pieces_that_exchange_their_states_are_the_whole(impl):
    exact = [t.double() for t in drawn()]
    wanted, _ = run(exact, "portable", cut=False)
    found, _ = run(exact if impl == "portable" else drawn(), impl, cut=True)
    allowed = 1e-13 if impl == "portable" else 5e-6
    for n, (ours, true) in enumerate(zip(found, wanted, strict=True)):
        error = (ours.double() - true).norm() / true.norm()
        assert error <= allowed, f"{n}: {float(error):.1e}"


def test_a_state_that_is_given_and_exchanged_is_refused():
    x = torch.randn(4, HEADS, P)
    B = torch.randn(4, GROUPS, N)
    with pytest.raises(ValueError, match="leave one of them out"):
        ops.ssd(
            *(x, torch.randn(4, HEADS), -torch.ones(HEADS), B, B),
            layout=SequenceLayout.from_lengths([4]),
            initial_states=torch.zeros(1, HEADS, P, N),
            exchange=BothHere(),
        )
