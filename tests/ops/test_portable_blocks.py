"""The portable forms in blocks so small that every pass has several: borders of blocks, not sizes.

Real blocks hold more tokens than any case of the tests.
"""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.causal_conv1d import cases as conv_cases
from nemotron_v3.ops.causal_conv1d import reference as conv
from nemotron_v3.ops.common import blocks
from nemotron_v3.ops.cross_entropy import cases as loss_cases
from nemotron_v3.ops.cross_entropy import reference as loss
from nemotron_v3.ops.gated_rms_norm import cases as gated_cases
from nemotron_v3.ops.gated_rms_norm import reference as gated
from nemotron_v3.ops.rms_norm import cases as norm_cases
from nemotron_v3.ops.rms_norm import reference as norm
from nemotron_v3.ops.ssd import cases as ssd_cases
from nemotron_v3.ops.ssd import reference as scan
from nemotron_v3.ops.ssd.slab import pass_on
from nemotron_v3.ops.ssd.tiles import Tiles
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
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
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
    for run in tiles.runs:
        parts = []
        for some, slab in run.slabs:
            assert slab.count == 1 or slab.count * slab.size <= slab_tokens
            assert all(len(row.unique()) == 1 for row in slab.take(documents))
            assert torch.equal(slab.take(tokens), run.whole.take(tokens)[some])
            parts.append(slab.take(tokens)[... if slab.valid is None else slab.valid].flatten())
        whole = run.whole.take(tokens)[... if run.whole.valid is None else run.whole.valid]
        assert torch.equal(torch.cat(parts), whole.flatten())
        seen += parts
    assert torch.equal(torch.cat(seen).sort().values, tokens)


@pytest.mark.parametrize("slab_tokens", [1, 40, 10**6])
@pytest.mark.parametrize("lengths", [(100,), (1, 0, 37, 16, 5), (32, 32, 32), (0, 0)])
def test_a_state_passes_through_the_tiles_of_its_document_in_order(lengths, slab_tokens):
    """With a decay of 1 and the number of a tile's first token added, a tile meets the sum of the
    tiles of its document before it."""
    layout = SequenceLayout.from_lengths(lengths)
    tokens = torch.arange(layout.num_tokens, dtype=torch.float32)
    state = torch.zeros(len(lengths), 1, 1, 1)
    for run in Tiles.of(layout, 16, slab_tokens).runs:
        for _, slab in run.slabs:
            first = slab.take(tokens)[:, 0]
            added = first[:, None, None, None]
            seen = torch.full_like(added, float("nan"))
            pass_on(state, added, torch.ones(slab.count, 1), seen, slab.steps)
            documents = layout.seq_idx[first.long()].tolist()
            starts = [layout.offsets[document] for document in documents]
            expected = [
                sum(range(start, int(token), 16))
                for start, token in zip(starts, first, strict=True)
            ]
            assert seen.flatten().tolist() == expected
    totals = [
        sum(range(start, start + length, 16))
        for start, length in zip(layout.offsets[:-1], lengths, strict=True)
    ]
    assert state.flatten().tolist() == totals
