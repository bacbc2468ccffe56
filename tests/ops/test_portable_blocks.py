"""The portable forms in blocks so small that every pass has several: borders of blocks, not sizes.

Real blocks hold more tokens than any case of the tests.
"""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops import _blocks
from nemotron_v3.ops.causal_conv1d import cases as conv_cases
from nemotron_v3.ops.causal_conv1d import reference as conv
from nemotron_v3.ops.cross_entropy import cases as loss_cases
from nemotron_v3.ops.cross_entropy import reference as loss
from nemotron_v3.ops.gated_rms_norm import cases as gated_cases
from nemotron_v3.ops.gated_rms_norm import reference as gated
from nemotron_v3.ops.rms_norm import cases as norm_cases
from nemotron_v3.ops.rms_norm import reference as norm
from nemotron_v3.ops.ssd import cases as ssd_cases
from nemotron_v3.ops.ssd import reference as scan
from nemotron_v3.ops.ssd.tiles import Tiles, take
from tests.accuracy import check

WORK = [
    (ops.causal_conv1d, conv.causal_conv1d, conv_cases, "pack"),
    (ops.causal_conv1d, conv.causal_conv1d, conv_cases, "pack-wide"),
    (ops.causal_conv1d, conv.causal_conv1d, conv_cases, "above-chunk"),
    (ops.ssd, scan.ssd, ssd_cases, "pack"),
    (ops.ssd, scan.ssd, ssd_cases, "small-chunks"),
    (ops.gated_rms_norm, gated.gated_rms_norm, gated_cases, "odd-groups"),
    (ops.gated_rms_norm, gated.gated_rms_norm, gated_cases, "no-gate"),
    (ops.rms_norm, norm.rms_norm, norm_cases, None),
    (ops.cross_entropy, loss.cross_entropy, loss_cases, "some-ignored"),
]


@pytest.mark.parametrize("elements", [1, 1000])
@pytest.mark.parametrize(
    ("op", "reference", "cases", "name"), WORK, ids=lambda value: getattr(value, "__name__", value)
)
def test_small_blocks_meet_the_rule(monkeypatch, op, reference, cases, name, elements):
    monkeypatch.setattr(_blocks, "CPU_ELEMENTS", elements)
    case = next(case for case in cases.CASES if name in (None, case.name))

    def portable(**arguments):
        return op(**arguments, impl="portable")

    def make_inputs(generator):
        return cases.make_inputs(case, torch.float32, "cpu", generator)

    check(portable, reference, make_inputs, dtype=torch.float32)


@pytest.mark.parametrize("slab_tokens", [1, 40, 10**6])
@pytest.mark.parametrize("lengths", [(100,), (1, 0, 37, 16, 5), (32, 32, 32), (0, 0)])
def test_slabs_hold_every_token_once_in_its_own_document(lengths, slab_tokens):
    layout = SequenceLayout.from_lengths(lengths)
    tiles = Tiles.of(layout, 16, slab_tokens)
    tokens, documents = torch.arange(layout.num_tokens), layout.seq_idx
    seen = [torch.empty(0, dtype=torch.int64)]
    for slab in tiles.slabs:
        assert slab.count == 1 or slab.count * slab.size <= slab_tokens
        assert all(len(row.unique()) == 1 for row in slab.take(documents))
        seen.append(slab.take(tokens)[... if slab.valid is None else slab.valid].flatten())
    assert torch.equal(torch.cat(seen).sort().values, tokens)


@pytest.mark.parametrize("lengths", [(100,), (1, 0, 37, 16, 5), (32, 32, 32), (0, 0)])
def test_a_state_passes_through_the_tiles_of_its_document_in_order(lengths):
    """With a decay of 1 and a contribution of 1 a tile, the final state counts the tiles."""
    layout = SequenceLayout.from_lengths(lengths)
    tiles = Tiles.of(layout, 16, 10**6)
    states = torch.full((tiles.state_rows,), float("nan"))
    states[tiles.initial] = 0.0
    for slab in tiles.slabs:
        states[slab.after] = 1.0
    for _, before, after in tiles.steps:
        states[after] = take(states, after) + take(states, before)
    assert take(states, tiles.final).tolist() == [-(-length // 16) for length in lengths]
