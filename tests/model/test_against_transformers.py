"""The whole model beside transformers on the same weights, both against our fp64 reference.

transformers' own distance from the truth takes the place of plain PyTorch's in the accuracy rule.
Its dt floor is put out of the way: it clamps dt at `time_step_min`, ours at `time_step_limit`.
"""

from collections import defaultdict

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_v3 import BackendConfig, NemotronV3ForCausalLM
from tests.accuracy import relative_error
from tests.models import disturb, tokens

LATENT = {"moe_latent_size": 28, "n_group": 4, "topk_group": 2, "mlp_bias": True, "use_bias": True}
CASES = {
    "all blocks": {},
    "latent, expert groups, biases": LATENT,
    "one group, wide state, head width 20": {
        "n_groups": 1, "mamba_num_heads": 5, "mamba_head_dim": 20, "ssm_state_size": 40,
    },
    "no conv bias, short taps, chunk 128": {
        "use_conv_bias": False, "conv_kernel": 2, "chunk_size": 128, "norm_topk_prob": False,
    },
    "tied, three groups": {"tie_word_embeddings": True, "n_groups": 3, "num_key_value_heads": 1},
}  # fmt: skip


def transformers_model(**changes) -> NemotronHForCausalLM:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 32,
        "intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
        "time_step_min": 1e-9,
    }
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**(sizes | changes))).eval()
    if model.config.tie_word_embeddings:  # theirs reads the flag and does not act on it
        model.lm_head.weight = model.model.embeddings.weight
    generator = torch.Generator().manual_seed(0)
    disturb(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # So that states matter, which a fresh model's hardly do: softplus of it is 0.05 to 0.7,
            if name.endswith("dt_bias"):
                parameter.uniform_(-3, 0, generator=generator)
            if name.endswith("conv1d.weight"):  # and the state is a product of x, B and C
                parameter.mul_(4)
    return model


def ours_of(theirs: NemotronHForCausalLM, backend: BackendConfig | None = None):
    ours = NemotronV3ForCausalLM(theirs.config, backend)
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return ours


def results(model: torch.nn.Module, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def kind(name: str) -> str:
    """A name without its numbers: small tensors of all layers are measured together."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_over_300_tokens_and_every_gradient(changes):
    theirs = transformers_model(**changes)
    models = {
        "ours": ours_of(theirs),
        "theirs": theirs,
        "truth": ours_of(theirs, BackendConfig(impl="reference")).double(),
    }
    assert dict(models["ours"].named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    pooled = defaultdict(lambda: defaultdict(list))  # kind of tensor -> model -> values
    for draw in range(4):
        ids = tokens(1, 300, seed=draw)
        drawn = {who: results(model, input_ids=ids, labels=ids) for who, model in models.items()}
        ours, peer = drawn["ours"]["logits"], drawn["theirs"]["logits"]
        assert (ours - peer).abs().max() <= 2e-5 * peer.abs().max()
        for name in drawn["truth"]:
            for who in models:
                pooled[kind(name)][who].append(drawn[who][name].flatten())
    failures = []
    for name, values in pooled.items():
        measured, peer, true = (torch.cat(values[who]) for who in models)
        error = relative_error(measured, true)
        allowed = 2 * relative_error(peer, true) + torch.finfo(torch.float32).eps / 2
        if not error <= allowed:
            failures.append(f"{name} {tuple(true.shape)}: {error:.2e} > {allowed:.2e}")
    assert not failures, "\n".join(failures)


def test_padded_batches_agree_at_real_tokens():
    # Without in_proj's bias: theirs lets it into the convolution from the left padding.
    theirs = transformers_model(**(LATENT | {"use_bias": False}))
    ids = tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[1, :13] = 0
    mask[2, 25:] = 0
    a = ours_of(theirs)(ids, attention_mask=mask).logits
    b = theirs(ids, attention_mask=mask).logits
    real = mask == 1
    assert (a - b)[real].abs().max() <= 2e-5 * b[real].abs().max()


def test_hidden_states_are_numbered_like_theirs():
    theirs = transformers_model()
    ids = tokens(1, 20)
    a = ours_of(theirs)(ids, output_hidden_states=True).hidden_states
    b = theirs(ids, output_hidden_states=True).hidden_states
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()
