import pytest
import torch

from nemotron_v3.checkpoint.names import is_stack, majority_dtype, to_disk, to_memory
from nemotron_v3.checkpoint.plan import tensors_of
from tests.checkpoint.files import fused, released_tensors, with_model_prefix
from tests.models import tiny_config, tiny_model

PAIRS = [
    ("backbone.embeddings.weight", "model.embeddings.weight", None),
    ("model.embeddings.weight", "model.embeddings.weight", None),
    ("backbone.norm_f.weight", "model.norm_f.weight", None),
    ("lm_head.weight", "lm_head.weight", None),
    ("backbone.layers.10.norm.weight", "model.layers.10.norm.weight", None),
    ("backbone.layers.0.mixer.A_log", "model.layers.0.mixer.A_log", None),
    (
        "backbone.layers.1.mixer.experts.127.up_proj.weight",
        "model.layers.1.mixer.experts.up_proj",
        127,
    ),
    (
        "model.layers.1.mixer.experts.0.down_proj.weight",
        "model.layers.1.mixer.experts.down_proj",
        0,
    ),
    ("backbone.layers.1.mixer.experts.up_proj", "model.layers.1.mixer.experts.up_proj", None),
    (
        "backbone.layers.1.mixer.shared_experts.up_proj.weight",
        "model.layers.1.mixer.shared_experts.up_proj.weight",
        None,
    ),
    ("mtp.layers.0.mixer.experts.3.up_proj.weight",) * 2 + (None,),
]


@pytest.mark.parametrize(("disk", "memory", "expert"), PAIRS)
def test_a_name_on_disk_and_its_name_in_memory_lead_to_each_other(disk, memory, expert):
    place = to_memory(disk)
    assert (place.memory, place.expert) == (memory, expert)
    assert to_disk(memory, place.prefix or "backbone.", expert) == disk


def test_the_misspelt_embeddings_are_understood_and_never_written():
    place = to_memory("backbone.embedding.weight")
    assert place.memory == "model.embeddings.weight"
    assert to_disk(place.memory, "backbone.") == "backbone.embeddings.weight"


@pytest.mark.parametrize(
    "name",
    ["", "weight", "backbone.", "transformer.h.0.weight", "lm_head.bias", "mtp."],
)
def test_a_name_that_no_row_fits_has_no_place(name):
    assert to_memory(name) is None


def test_numbers_are_numbers_only_without_leading_zeros_and_of_sane_length():
    assert to_memory("backbone.layers.01.norm.weight").layer is None
    assert to_memory(f"backbone.layers.{'9' * 5000}.norm.weight").layer is None


def test_layers_are_renumbered_and_keep_their_number_in_the_file():
    place = to_memory("backbone.layers.7.mixer.experts.2.up_proj.weight", {3: 0, 7: 1})
    assert (place.memory, place.layer) == ("model.layers.1.mixer.experts.up_proj", 7)


@pytest.mark.parametrize("latent", [None, 20])
@pytest.mark.parametrize("respell", [dict, fused, with_model_prefix])
def test_the_table_maps_a_released_file_onto_the_model(respell, latent):
    names = respell(released_tensors(tiny_config(moe_latent_size=latent)))
    expected = {n: t.shape for n, t in tensors_of(tiny_model(moe_latent_size=latent)).items()}
    assert {to_memory(name).memory for name in names} == expected.keys()
    assert {n for n in expected if is_stack(n)} == {n for n in expected if ".experts." in n}


def test_the_majority_counts_elements():
    counts = [(torch.float32, 5), (torch.bfloat16, 4), (torch.bfloat16, 4)]
    assert majority_dtype(counts) == torch.bfloat16
