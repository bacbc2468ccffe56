"""200 greedy tokens beside transformers on the same weights."""

import torch

from nemotron_v3.generation import generate
from tests.generation.samples import padded
from tests.model.test_against_transformers import LATENT, ours_of, transformers_model
from tests.models import tokens

NEW = 200


def compare(ours, theirs, rows):
    """Steps compared in each row: until the choice between the two best tokens is noise."""
    ids, mask = padded(rows, "left")
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    out = generate(ours, ids, mask, max_new_tokens=NEW, eos_token_id=[])
    logits = torch.stack(expected.logits, dim=1)  # [rows, NEW, vocabulary]
    best = logits.topk(2).values
    noise = best[..., 0] - best[..., 1] < 1e-3 * logits.abs().amax(-1)
    compared = []
    for row, new in enumerate(out.new_tokens):
        steps = noise[row].nonzero().flatten().tolist()
        compared.append(steps[0] if steps else NEW)
        theirs_new = expected.sequences[row, ids.shape[1] :].tolist()
        assert new[: compared[-1]] == theirs_new[: compared[-1]]
    return compared


# The prompts are such that the model is never undecided.


def test_200_greedy_tokens_of_one_row():
    theirs = transformers_model(**LATENT)
    assert compare(ours_of(theirs), theirs, [tokens(12, seed=1)]) == [NEW]


def test_200_greedy_tokens_of_a_left_padded_batch():
    # Without in_proj's bias: theirs lets it into the convolution from the left padding.
    theirs = transformers_model(**(LATENT | {"use_bias": False}))
    rows = [tokens(12, seed=0), tokens(5, seed=19), tokens(20, seed=2)]
    assert compare(ours_of(theirs), theirs, rows) == [NEW] * 3
