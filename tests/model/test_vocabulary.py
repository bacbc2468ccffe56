"""Another number of tokens: what stays, what is new, and who follows."""

import pytest
import torch

from nemotron_v3.checkpoint import from_pretrained, save_pretrained
from tests.models import tiny_model, tokens

GREEDY = {"max_new_tokens": 3, "eos_token_id": []}


def grown(size, **settings):
    model = tiny_model("M*-E", **settings)
    ids = tokens(2, 9, vocab=model.config.vocab_size)
    with torch.no_grad():
        before = model(ids).logits
    return model, ids, before, model.resize_token_embeddings(size)


@pytest.mark.parametrize("tied", [False, True])
def test_old_tokens_keep_their_rows_and_new_ones_are_the_mean(tmp_path, tied):
    old = tiny_model("M*-E", tie_word_embeddings=tied).config.vocab_size
    size = old + 12
    model, ids, before, embeddings = grown(size, tie_word_embeddings=tied)
    assert embeddings is model.model.embeddings is model.get_input_embeddings()
    assert (embeddings.num_embeddings, model.get_output_embeddings().weight.shape[0]) == (
        size,
        size,
    )
    assert model.config.vocab_size == model.model.config.vocab_size == size
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.equal(logits[..., :old], before)
    rows = embeddings.weight.detach()
    assert torch.allclose(rows[old:], rows[:old].mean(0).expand(12, -1))
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied
    new = torch.arange(old, size)[None]
    model(new, labels=new).loss.backward()
    assert embeddings.weight.grad[old:].norm() > 0
    drawn = model.generate(new, **GREEDY).new_tokens
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config.vocab_size == size
    assert again.generate(new, **GREEDY).new_tokens == drawn
    save_pretrained(again, tmp_path)  # by its own spelling, too
    again.resize_token_embeddings(size + 1)
    save_pretrained(again, tmp_path)
    assert from_pretrained(tmp_path).lm_head.weight.shape[0] == size + 1


def test_sizes_are_rounded_kept_drawn_and_shrunk():
    model, ids, before, _ = grown(None)
    old = before.shape[-1]
    assert model.config.vocab_size == old
    assert model.resize_token_embeddings(old + 1, pad_to_multiple_of=64).num_embeddings % 64 == 0
    model.resize_token_embeddings(old)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    torch.manual_seed(0)
    rows = model.resize_token_embeddings(old + 400, mean_resizing=False).weight[old:].detach()
    assert rows.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    model.lm_head.weight.requires_grad_(False)
    model.resize_token_embeddings(old + 2)
    assert not model.lm_head.weight.requires_grad
    assert model.model.embeddings.weight.requires_grad


def test_what_cannot_be_resized_is_refused_and_stays():
    model = tiny_model("M*-E", eos_token_id=40)
    old = model.config.vocab_size
    for size, message in (
        (0, "new_num_tokens is 0"),
        (True, "new_num_tokens is True"),
        (2**70, "new_num_tokens is 1180591620717411303424"),
        (40.0, "new_num_tokens is 40.0"),
        (40, "eos_token_id of the config is 40"),
    ):
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(size)
    with pytest.raises(ValueError, match="pad_to_multiple_of is -8"):
        model.resize_token_embeddings(50, pad_to_multiple_of=-8)
    model.mtp = {"mtp.embeddings.weight": torch.zeros(old, 4)}
    with pytest.raises(ValueError, match=r"mtp\.embeddings\.weight"):
        model.resize_token_embeddings(old + 1)
    model.mtp = None
    head, model.lm_head = model.lm_head, torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="Sequential"):
        model.resize_token_embeddings(old + 1)
    model.lm_head = head
    assert model.config.vocab_size == model.model.embeddings.weight.shape[0] == old
    assert model.lm_head.weight.shape[0] == old


def test_generation_goes_by_the_matrices():
    model = tiny_model("M*-E")
    width, size = model.config.hidden_size, model.config.vocab_size + 8
    model.set_input_embeddings(torch.nn.Embedding(size, width))
    new = torch.tensor([[size - 1, size - 2]])
    with pytest.raises(ValueError, match=f"embeddings hold {size} tokens and the head {size - 8}"):
        model.generate(new, **GREEDY)
    model.lm_head = torch.nn.Linear(width, size, bias=False)
    drawn = model.generate(new, **GREEDY).new_tokens[0]
    grid = new
    for token in drawn:
        with torch.no_grad():
            assert model(grid).logits[0, -1].argmax() == token
        grid = torch.cat([grid, torch.tensor([[token]])], 1)
    stopped = model.generate(new, max_new_tokens=3, eos_token_id=size - 3)
    assert len(stopped.new_tokens[0]) >= 1
