"""What a caller of a transformers model says about its tokens, as a layout."""

import pytest
import torch

from nemotron_v3.hf.context import TheirContext

CPU = torch.device("cpu")


def layout(shape=(1, 6), **said):
    return TheirContext.read(shape, CPU, **said).layout


def test_nothing_said_is_one_document_a_row():
    assert layout((2, 5)).lengths == (5, 5)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([[0, 1, 2, 0, 1, 0]], (3, 2, 1)),
        ([[0, 1, 2, 3, 4, 5]], (6,)),
        ([[7, 8, 9, 10, 11, 12]], (6,)),  # a piece of a longer document
        ([[0, 0, 0, 1, 2, 2]], (1, 1, 3, 1)),
    ],
)
def test_a_document_starts_where_positions_do_not_go_on(positions, lengths):
    assert layout(position_ids=torch.tensor(positions)).lengths == lengths


def test_positions_of_one_row_hold_for_all():
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    assert layout((2, 6), position_ids=positions).lengths == (2, 4, 2, 4)
    rows = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    assert layout((2, 6), position_ids=rows).lengths == (2, 4, 6)


@pytest.mark.parametrize("at_padding", [0, 1])
def test_positions_of_left_padded_rows_are_one_document(at_padding):
    """generate() counts their real tokens."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    for positions in ([[at_padding, at_padding, 0, 1, 2, 3]], [[0, 1, 2, 3, 4, 5]]):
        found = layout(attention_mask=mask, position_ids=torch.tensor(positions))
        assert found.lengths == (4,) and found.token_index.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("tail", [0, 2])
def test_positions_that_start_anew_beside_a_mask_are_borders(tail):
    mask = torch.tensor([[1] * 6 + [0] * tail])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0] + [0] * tail])
    said = {"attention_mask": mask, "position_ids": positions}
    assert layout((1, 6 + tail), **said).lengths == (3, 2, 1)
    kinds = {"full_attention": None, "linear_attention": mask}
    assert layout((1, 6 + tail), **said | {"attention_mask": kinds}).lengths == (3, 2, 1)
    with pytest.raises(ValueError, match="3 documents in a batch of 1 rows and a cache"):
        layout((1, 6 + tail), **said, cached=True)


def test_positions_beside_a_4d_mask_say_where_scans_start():
    said = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
        "attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(),
    }
    assert layout(**said).lengths == (3, 2, 1)
    assert layout(**said, cached=True).lengths == (6,)  # it holds one sequence a row


def test_nor_once_a_cache_holds_tokens():
    said = {"position_ids": torch.tensor([[4, 5, 6, 0, 1, 2]]), "follows": True, "cached": True}
    assert layout(**said).lengths == (6,)


@pytest.mark.parametrize(
    "packing",
    [
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6])},
        {"cu_seq_lens_k": torch.tensor([0, 3, 5, 6]), "max_length_k": 3},
        {
            "cu_seq_lens_q": torch.tensor([0, 3, 5, 6]),
            "cu_seq_lens_k": torch.tensor([0, 3, 5, 6]),
            "max_length_q": torch.tensor(3),
            "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]]),
        },
    ],
    ids=["seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "all"],
)
def test_packing_arguments_of_the_collators(packing):
    assert layout(packing=packing).lengths == (3, 2, 1)


def test_with_a_cache_the_last_columns_of_a_mask_are_the_new_tokens():
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    context = TheirContext.read((2, 2), CPU, attention_mask=mask, follows=True, cached=True)
    assert context.layout.lengths == (1, 2)
    seen = context.allowed(4, 6, CPU)[:, 0].int().tolist()
    assert seen == [
        [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]],
        [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    ]


def test_a_mask_of_the_new_tokens_alone_leaves_what_came_before():
    mask = torch.tensor([[1, 1], [0, 1]])
    context = TheirContext.read((2, 2), CPU, attention_mask=mask, follows=True, cached=True)
    seen = context.allowed(3, 8, CPU)[:, 0].int().tolist()
    assert seen == [
        [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
        [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]],
    ]


def test_masks_by_kind_of_layer():
    full = torch.ones(1, 1, 6, 9, dtype=torch.bool)
    linear = torch.tensor([[0, 1, 1, 1, 1, 1]])
    context = TheirContext.read(
        (1, 6), CPU, attention_mask={"full_attention": full, "linear_attention": linear}
    )
    assert context.mask is full and context.layout.lengths == (5,)


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ({"attention_mask": torch.ones(1, 5)}, ValueError, r"shape \(1, 5\), the tokens \(1, 6\)"),
        ({"attention_mask": torch.ones(2, 6)}, ValueError, r"shape \(2, 6\), the tokens \(1, 6\)"),
        ({"attention_mask": torch.ones(6)}, ValueError, "shape"),
        ({"attention_mask": [1] * 6}, TypeError, "attention_mask is a list"),
        ({"attention_mask": torch.full((1, 6), 2)}, ValueError, "got 2"),
        ({"position_ids": torch.arange(5)[None]}, ValueError, r"position_ids have shape \(1, 5\)"),
        ({"packing": {"cu_seq_lens_q": torch.tensor([0, 3, 5])}}, ValueError, "ends at 5"),
        (
            {"packing": {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 5}},
            ValueError,
            "max_seqlen is 5",
        ),
        (
            {
                "packing": {
                    "cu_seq_lens_q": torch.tensor([0, 6]),
                    "cu_seq_lens_k": torch.tensor([0, 2, 6]),
                }
            },
            ValueError,
            "differ",
        ),
        (
            {
                "packing": {
                    "cu_seq_lens_q": torch.tensor([0, 6]),
                    "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]]),
                }
            },
            ValueError,
            "contradict",
        ),
        (
            {"packing": {"cu_seq_lens_q": torch.tensor([0, 2, 6])}, "cached": True},
            ValueError,
            "2 documents in a batch of 1 rows and a cache",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(said, kind, message):
    with pytest.raises(kind, match=message):
        layout(**said)
