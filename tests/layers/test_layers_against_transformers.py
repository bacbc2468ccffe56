"""Each layer alone, in fp32 and bf16: outputs and every gradient against the fp64 reference.

transformers' layer on the same weights and input takes the place of plain PyTorch in the accuracy
rule: ours may be at most twice as far from the truth.
"""

from collections import defaultdict

import pytest
import torch

from nemotron_v3 import BackendConfig
from tests.accuracy import relative_error
from tests.model.test_against_transformers import LATENT, ours_of, transformers_model

MIXERS = {"mamba": 0, "moe": 1, "attention": 2, "mlp": 3}
WIDE_LATENT = LATENT | {"moe_latent_size": 32}  # theirs needs rows of 16 bytes in bf16
DRAWS, LENGTH = 4, 150


def run(mixer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    mixer.zero_grad()
    x = x.clone().requires_grad_()
    y = mixer(x, attention_mask=None) if hasattr(mixer, "q_proj") else mixer(x)
    y = y[0] if isinstance(y, tuple) else y  # theirs returns attention weights too
    y.backward(dy.to(y.dtype))
    gradients = {f"grad {name}": p.grad for name, p in mixer.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, WIDE_LATENT], ids=["plain", "latent and biases"])
@pytest.mark.parametrize(("block_type", "layer"), MIXERS.items())
def test_a_layer_is_as_exact_as_theirs(block_type, layer, changes, dtype):
    theirs = transformers_model(**changes).to(dtype)
    models = {
        "ours": ours_of(theirs).to(dtype),
        "theirs": theirs,
        "truth": ours_of(theirs, BackendConfig(impl="reference")).double(),
    }
    generator = torch.Generator().manual_seed(0)
    pooled = defaultdict(lambda: defaultdict(list))
    for _ in range(DRAWS):
        x, dy = (torch.randn(2, LENGTH, 48, generator=generator).to(dtype) for _ in range(2))
        for who, model in models.items():
            kind = torch.float64 if who == "truth" else dtype
            mixer = model.model.layers[layer].mixer
            for name, tensor in run(mixer, x.to(kind), dy.to(kind)).items():
                pooled[name][who].append(tensor.flatten())
    failures = []
    for name, values in pooled.items():
        ours, peer, true = (torch.cat(values[who]) for who in models)
        error = relative_error(ours, true)
        allowed = 2 * relative_error(peer, true) + torch.finfo(dtype).eps / 2
        if not error <= allowed:
            failures.append(f"{name} {tuple(true.shape)}: {error:.2e} > {allowed:.2e}")
    assert not failures, "\n".join(failures)
