"""Every form of an op gives the dtypes that the op states, and the numbers that the others give."""

import pytest
import torch

from nemotron_v3 import BackendConfig, NemotronHybridCache
from tests.accuracy import relative_error
from tests.models import tiny_model, tokens

REFERENCE = BackendConfig(impl="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_references_keeps_its_dtype_and_is_nearer_to_the_truth(dtype):
    ids = tokens(2, 24)
    truth = tiny_model(backend=REFERENCE).to(dtype).double()(ids).logits
    errors = {}
    for name, backend in {"reference": REFERENCE, "portable": None}.items():
        out = tiny_model(backend=backend).to(dtype)(ids, labels=ids)
        assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
        out.loss.backward()
        errors[name] = relative_error(out.logits, truth)
    assert errors["reference"] <= 1.2 * errors["portable"] + torch.finfo(dtype).eps


def test_a_model_of_references_decodes():
    model, ids = tiny_model(backend=REFERENCE), tokens(2, 10)
    cache = NemotronHybridCache(model.config, 2)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 2], dim=1)]
        whole = tiny_model()(ids).logits
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
