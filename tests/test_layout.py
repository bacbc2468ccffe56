"""SequenceLayout: every way of saying how tokens lie says the same, and nonsense is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree

from nemotron_v3 import SequenceLayout
from nemotron_v3.layout import modes, sequence

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_a_padding_mask_gives_one_document_a_row():
    layout = SequenceLayout.from_padding_mask(MASK)
    assert layout.lengths == (3, 2, 2, 0)
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 7, 7]
    assert layout.token_index.tolist() == [2, 3, 4, 5, 6, 11, 13]
    assert layout.seq_idx.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert layout.last_tokens.tolist() == [2, 4, 6]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_a_mask_may_have_any_numeric_dtype(dtype):
    layout = SequenceLayout.from_padding_mask(MASK.to(dtype))
    assert layout.same_as(SequenceLayout.from_padding_mask(MASK))


def test_a_full_mask_is_a_plain_batch():
    layout = SequenceLayout.from_padding_mask(torch.ones(2, 3))
    assert layout.token_index is None
    assert layout.same_as(SequenceLayout.plain(2, 3))


def test_seq_idx_starts_a_document_at_each_change_and_each_row():
    layout = SequenceLayout.from_seq_idx(torch.tensor([[0, 0, 1, -1], [1, 1, 0, 1]]))
    assert layout.lengths == (2, 1, 2, 1, 1)
    assert layout.token_index.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_padding_inside_a_document_is_skipped():
    layout = SequenceLayout.from_seq_idx(torch.tensor([[3, -1, 3, 4]]))
    assert layout.lengths == (2, 1)


def test_cu_seqlens_padded_places_documents_apart():
    layout = SequenceLayout.from_cu_seqlens(
        torch.tensor([0, 2, 3]), cu_seqlens_padded=torch.tensor([0, 4, 8])
    )
    assert layout.shape == (8,)
    assert layout.lengths == (2, 1)
    assert layout.token_index.tolist() == [0, 1, 4]


def test_cu_seqlens_over_a_batch_keep_rows_apart():
    layout = SequenceLayout.from_cu_seqlens(torch.tensor([0, 2, 4, 8]), shape=(2, 4))
    assert layout.lengths == (2, 2, 4)
    with pytest.raises(ValueError, match="row border 4"):
        SequenceLayout.from_cu_seqlens(torch.tensor([0, 3, 8]), shape=(2, 4))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_three_spellings_agree_and_pack_undoes_unpack(lengths, spare):
    width = max(lengths) + spare
    if width == 0:
        return
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    number = torch.arange(len(lengths))[:, None].expand_as(mask)
    starts = torch.arange(len(lengths) + 1) * width
    by_mask = SequenceLayout.from_padding_mask(mask)
    by_number = SequenceLayout.from_seq_idx(number.masked_fill(mask == 0, -1))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    by_offset = SequenceLayout.from_cu_seqlens(offsets, tuple(mask.shape), starts)
    assert by_mask.same_as(by_number) and by_mask.same_as(by_offset)
    x = torch.randn(*mask.shape, 2)
    packed = by_mask.pack(x)
    rows = [row[:n] for row, n in zip(x, lengths, strict=True)]
    assert torch.equal(packed, torch.cat(rows))
    assert torch.equal(by_mask.unpack(packed), x * mask[..., None])


def test_unpack_and_pack_are_differentiable():
    layout = SequenceLayout.from_padding_mask(MASK)
    x = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    layout.unpack(layout.pack(x).square()).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * MASK[..., None])


def test_it_is_a_pytree():
    layout = SequenceLayout.from_padding_mask(MASK)
    leaves, spec = pytree.tree_flatten(layout)
    assert len(leaves) == 2
    assert pytree.tree_unflatten(leaves, spec) is layout
    copies = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    assert copies is not layout and copies.same_as(layout)
    assert pytree.tree_map(type, layout).cu_seqlens is torch.Tensor  # no tensors: let through
    text = pytree.treespec_dumps(spec)
    assert pytree.tree_unflatten(leaves, pytree.treespec_loads(text)).same_as(layout)
    assert copy.deepcopy(spec) == spec


def test_what_takes_dataclasses_apart_leaves_it_alone():
    layout = SequenceLayout.from_lengths([5, 11])
    table = layout.derived("a table", lambda _: object())
    # As FSDP casts the arguments of each of its groups.
    seen = _apply_to_tensors(lambda t: t.clone(), {"layout": layout})["layout"]
    assert seen.derived("a table", lambda _: object()) is table
    with pytest.raises(AttributeError, match="does not change"):
        layout.lengths = (16,)


CUT = {
    "a pack": SequenceLayout.from_lengths([3, 2, 2, 3]),
    "a batch": SequenceLayout.plain(2, 5),
    "a padded batch": SequenceLayout.from_padding_mask(MASK),
}


@pytest.mark.parametrize("layout", CUT.values(), ids=CUT)
def test_a_layout_that_is_cut_into_micro_batches_is_refused(layout):
    with pytest.raises(ValueError, match="make one layout a micro-batch"):
        split_args_kwargs_into_chunks((torch.zeros(4, 3),), {"layout": layout}, 2)


def test_a_mask_and_numbers_are_cut_into_the_layouts_of_micro_batches():
    numbers = torch.arange(4)[:, None].expand_as(MASK)
    said = {"attention_mask": MASK, "seq_idx": numbers}
    _, parts = split_args_kwargs_into_chunks((MASK,), said, 2)
    found = [resolve((2, 5), part["attention_mask"], seq_idx=part["seq_idx"]) for part in parts]
    expected = [SequenceLayout.from_padding_mask(half) for half in MASK.chunk(2)]
    assert all(a.same_as(b) for a, b in zip(found, expected, strict=True))


BAD_OFFSETS = [
    ([1, 4], "start at 0"),
    ([0, 3, 2, 4], "never decrease"),
    ([0, 3], "ends at 3 but the input holds 4"),
    ([0, 5], "ends at 5 but the input holds 4"),
]


@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS)
def test_bad_cu_seqlens_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_cu_seqlens(torch.tensor(offsets), shape=(4,))


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="got 2: give document numbers as seq_idx"):
        SequenceLayout.from_padding_mask(torch.tensor([[1, 2, 0]]))
    with pytest.raises(ValueError, match="nan"):
        SequenceLayout.from_padding_mask(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="must be integers"):
        SequenceLayout.from_seq_idx(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="document 0 has 3 tokens"):
        SequenceLayout.from_cu_seqlens(
            torch.tensor([0, 3, 4]), cu_seqlens_padded=torch.tensor([0, 2, 6])
        )
    with pytest.raises(ValueError, match="hold no document"):
        SequenceLayout.plain(0, 4)


# --- resolving the arguments of a call ----------------------------------------------------------


def resolve(shape, mask=None, **kwargs):
    return SequenceLayout.resolve(shape, torch.device("cpu"), mask, **kwargs)


def test_nothing_said_is_a_plain_batch():
    assert resolve((2, 3)).lengths == (3, 3)
    assert resolve((3,)).lengths == (3,)


def test_arguments_that_agree_may_stand_together():
    layout = SequenceLayout.from_lengths([2, 1])
    offsets, numbers = torch.tensor([0, 2, 3]), torch.tensor([7, 7, 9])
    both = resolve((3,), layout=layout, cu_seqlens=offsets, seq_idx=numbers, max_seqlen=2)
    assert both.lengths == (2, 1)


def test_a_mask_takes_tokens_out_of_seq_idx():
    layout = resolve((1, 4), torch.tensor([[0, 1, 1, 1]]), seq_idx=torch.tensor([[0, 0, 0, 1]]))
    assert layout.lengths == (2, 1)
    assert layout.token_index.tolist() == [1, 2, 3]


CONTRADICTIONS = [
    ({"cu_seqlens": [0, 1, 3], "seq_idx": [0, 0, 1]}, "cu_seqlens and seq_idx contradict"),
    ({"layout": [2, 1], "cu_seqlens": [0, 1, 3]}, "layout and cu_seqlens contradict"),
    ({"layout": [2, 2]}, r"describes tokens of shape \(4,\), the input holds \(3,\)"),
    ({"cu_seqlens": [0, 1, 3], "max_seqlen": 1}, "longest document has 2"),
    ({"cu_seqlens_padded": [0, 3]}, "needs cu_seqlens"),
    ({"cu_seqlens": [0, 3], "cp_size": 2}, "no context-parallel group"),
    ({"qkv_format": "bshd"}, "without a batch dimension"),
    ({"qkv_format": "sbhd"}, "'thd' or 'bshd'"),
    ({"layout": [3], "attention_mask": [1, 1, 0]}, "layout and attention_mask contradict"),
    ({"attention_mask": [1, 1]}, r"shape \(2,\), the tokens \(3,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(arguments, message):
    arguments = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if "layout" in arguments:
        arguments["layout"] = SequenceLayout.from_lengths(arguments["layout"].tolist())
    mask = arguments.pop("attention_mask", None)
    with pytest.raises(ValueError, match=message):
        resolve((3,), mask, **arguments)


def test_an_unknown_argument_is_a_type_error_with_its_name():
    with pytest.raises(TypeError, match="sequence_ids"):
        resolve((3,), sequence_ids=1)


def test_layouts_of_host_values_under_another_default_device():
    numbers = torch.tensor([[0, 0, 1, -1], [2, 3, 3, 3]])
    slots = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 8])
    expected = (
        SequenceLayout.from_seq_idx(numbers),
        SequenceLayout.from_cu_seqlens(slots[0], (8,), slots[1]),
    )
    with torch.device("meta"):
        found = (
            SequenceLayout.from_seq_idx(numbers),
            SequenceLayout.from_cu_seqlens(slots[0], (8,), slots[1]),
        )
    assert all(a.same_as(b) for a, b in zip(found, expected, strict=True))


# --- tables that are worked out once ------------------------------------------------------------


def tables(layout):
    """Everything that a layout keeps: an op's tables and its own tensors."""
    built = layout.derived("places", lambda it: torch.arange(it.num_tokens) + it.cu_seqlens[-1])
    return built, layout.seq_idx, layout.last_tokens, layout.packed.seq_idx


def test_tables_are_built_once():
    layout = SequenceLayout.from_padding_mask(MASK)
    assert all(a is b for a, b in zip(tables(layout), tables(layout), strict=True))


def test_tables_built_in_a_graph_capture_serve_that_capture_alone(monkeypatch):
    """There they hold nothing before the first replay: zeros stand for that here."""
    layout = SequenceLayout.from_padding_mask(MASK)
    expected = [table.clone() for table in tables(SequenceLayout.from_padding_mask(MASK))]
    for module in (modes, sequence):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    for table in tables(layout):
        table.zero_()
    monkeypatch.undo()
    assert all(map(torch.equal, tables(layout), expected))
    for module in (modes, sequence):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    kept = tables(layout)  # built before the capture: they are taken, and stay
    monkeypatch.undo()
    assert all(a is b for a, b in zip(kept, tables(layout), strict=True))


@pytest.mark.parametrize("capture", [False, True])
def test_a_capture_is_looked_for_on_a_gpu_only(monkeypatch, capture):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture)
    assert modes.capturing(torch.device("cuda", 0)) is capture
    assert not modes.capturing(torch.device("cpu"))


MADE = {
    "plain": lambda: SequenceLayout.plain(2, 3),
    "mask": lambda: SequenceLayout.from_padding_mask(MASK),
    "seq_idx": lambda: SequenceLayout.from_seq_idx(torch.tensor([[0, 0, 1, -1], [2, 3, 3, 3]])),
    "cu_seqlens": lambda: SequenceLayout.from_cu_seqlens(
        torch.tensor([0, 2, 5]), (8,), torch.tensor([0, 3, 8])
    ),
    "resolved": lambda: resolve((4, 5), MASK),
}


@pytest.mark.parametrize("name", MADE)
def test_a_layout_made_in_inference_mode_serves_training(name):
    with torch.inference_mode():
        layout = MADE[name]()
        made = [layout.cu_seqlens, layout.token_index, *tables(layout)]
    assert not any(t.is_inference() for t in made if t is not None)
    weight = torch.ones(layout.num_tokens, requires_grad=True)
    (weight * tables(layout)[0]).sum().backward()  # saved for the backward pass
    assert torch.equal(weight.grad, tables(layout)[0].float())


# --- position ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "mask", "lengths"),
    [
        ([[0, 1, 2, 0, 1, 0]], None, (3, 2, 1)),
        ([[7, 8, 0, 1, 2, 3]], None, (2, 4)),  # a piece of a pack
        ([[1, 2, 3, 1, 2, 3]], None, (3, 3)),  # counted from 1
        ([[0, 1, 2, 3, 4, 5]], None, (6,)),
        ([[0, 1, 2, 0, 1, 0]], [[1, 1, 1, 1, 1, 1]], (3, 2, 1)),
        ([[0, 1, 2, 0, 0, 0]], [[1, 1, 1, 1, 0, 0]], (3, 1)),
        ([[0, 1, 2, 3, 0, 0]], [[1, 1, 1, 1, 0, 0]], (4,)),
        ([[1, 1, 0, 1, 2, 3]], [[0, 0, 1, 1, 1, 1]], (4,)),  # left padding, counted
        ([[0, 0, 0, 1, 2, 3]], [[0, 0, 1, 1, 1, 1]], (4,)),
        ([[0, 1, 2, 3, 4, 5]], [[0, 0, 1, 1, 1, 1]], (4,)),
        ([[0, 1, 2, 3, 4, 5]], [[1, 1, 0, 0, 1, 1]], (4,)),  # places
        ([[0, 1, 1, 1, 2, 3]], [[1, 1, 0, 0, 1, 1]], (4,)),  # real tokens
        ([[0, 1, 0, 0, 0, 1]], [[1, 1, 0, 0, 1, 1]], (2, 2)),
        ([[5, 17, 3, 0, 99, 2]], None, (6,)),  # no count of documents
    ],
)
def test_documents_start_where_positions_start_anew(positions, mask, lengths):
    mask = None if mask is None else torch.tensor(mask)
    found = resolve((1, 6), mask, position_ids=torch.tensor(positions))
    assert found.lengths == lengths
    if mask is not None:
        assert torch.equal(found.unpack(torch.ones(found.num_tokens)), mask[0:1].float())


def test_positions_of_one_row_hold_for_all_and_rows_stay_apart():
    one = torch.tensor([0, 1, 0, 1, 2])
    assert resolve((2, 5), position_ids=one).lengths == (2, 3, 2, 3)
    assert resolve((2, 5), position_ids=one[None]).lengths == (2, 3, 2, 3)
    assert resolve((5,), position_ids=one).lengths == (2, 3)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert resolve((2, 5), mask, position_ids=one).lengths == (2, 2, 0)


def test_positions_that_contradict_documents_are_refused():
    positions = torch.tensor([0, 1, 2, 0, 1])
    agreeing, other = torch.tensor([0, 3, 5]), torch.tensor([0, 5])
    assert resolve((5,), cu_seqlens=agreeing, position_ids=positions).lengths == (3, 2)
    assert resolve((5,), cu_seqlens=agreeing, position_ids=torch.arange(5)).lengths == (3, 2)
    for said in ({"cu_seqlens": other}, {"layout": SequenceLayout.from_cu_seqlens(other)}):
        with pytest.raises(ValueError, match="position_ids contradict each other"):
            resolve((5,), position_ids=positions, **said)
    with pytest.raises(ValueError, match=r"position_ids have shape \(4,\)"):
        resolve((5,), position_ids=torch.arange(4))
    with pytest.raises(TypeError, match="position_ids are a list"):
        resolve((5,), position_ids=[0, 1, 2, 3, 4])
