"""Damaged checkpoints in 8 and 4 bits: each loads, or is refused with one clear error."""

import json
import random

import torch
from safetensors.torch import save

from nemotron_v3.checkpoint import from_pretrained, open_checkpoint
from tests.checkpoint.narrow_files import narrow_tensors
from tests.checkpoint.test_fuzz import damage_bytes, damage_json, damage_value, exchange, loads
from tests.checkpoint.test_fuzz import watched as watched
from tests.checkpoint.test_narrow import HF_QUANT_CONFIG, QUANTISED, TWIN, write

HEADERS, TENSORS, SCALES, CLAIMS = 250, 80, 80, 240


def test_damaged_headers(tmp_path):
    chance = random.Random(1)
    directory = write(tmp_path, narrow_tensors()[0])
    content = save(narrow_tensors()[0], metadata={"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    survivors = 0
    for _ in range(HEADERS):
        damaged = damage_json(header.decode(), chance)
        exchange(
            directory / "model.safetensors", len(damaged).to_bytes(8, "little") + damaged + data
        )
        survivors += loads(lambda: from_pretrained(directory))
    assert survivors < HEADERS / 4


def test_damaged_names_dtypes_and_shapes(tmp_path):
    """Files that are whole, with tensors that are renamed, cast, cut or dropped."""
    chance = random.Random(2)
    tensors = narrow_tensors()[0]
    leaves = [*{n.rpartition(".")[2] for n in tensors}, "weight_packed", "weight_global_scale",
              "zero_point", "k_scale", "weight_scale_inv"]  # fmt: skip
    dtypes = [torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16]
    survivors = 0
    for _ in range(TENSORS):
        held = dict(tensors)
        for name in chance.sample([n for n in held if "scale" in n or "experts" in n], 2):
            tensor = held.pop(name)
            match chance.randrange(4):
                case 0:
                    held[f"{name.rpartition('.')[0]}.{chance.choice(leaves)}"] = tensor
                case 1:
                    held[name] = tensor.float().to(chance.choice(dtypes))
                case 2:
                    held[name] = tensor[: chance.randrange(3)] if tensor.dim() else tensor[None]
        write(tmp_path, held)
        survivors += loads(lambda: from_pretrained(tmp_path))
    assert 0 < survivors < TENSORS / 2


def test_damaged_scales(tmp_path):
    chance = random.Random(3)
    tensors = narrow_tensors()[0]
    scales = [name for name in tensors if name.endswith(("scale", "scale_2"))]
    survivors = 0
    for _ in range(SCALES):
        held = dict(tensors)
        for name in chance.sample(scales, 2):
            raw = bytearray(held[name].reshape(-1).view(torch.uint8).numpy().tobytes())
            raw[chance.randrange(len(raw))] = chance.choice([0, 1, 0x7E, 0x7F, 0x80, 0xFF])
            new = torch.frombuffer(raw, dtype=torch.uint8).view(held[name].dtype)
            held[name] = new.reshape(held[name].shape)
        write(tmp_path, held)
        checkpoint = open_checkpoint(tmp_path)
        survivors += loads(lambda opened=checkpoint: opened.check_scales(opened))
    assert SCALES / 8 < survivors < SCALES


def test_damaged_claims(tmp_path):
    chance = random.Random(4)
    survivors = 0
    for directory, quantised in ((tmp_path / "a", QUANTISED), (tmp_path / "b", TWIN)):
        write(directory, narrow_tensors(twin=quantised is TWIN)[0], quantised)
        config = json.loads((directory / "config.json").read_text())
        for _ in range(CLAIMS // 2):
            damaged = damage_value(quantised, chance)
            text = json.dumps(config | {"quantization_config": damaged})
            exchange(directory / "config.json", text.encode())
            beside = json.dumps(HF_QUANT_CONFIG).encode()
            if chance.random() < 0.5:
                beside = damage_bytes(beside, chance)
            (directory / "hf_quant_config.json").write_bytes(beside)
            survivors += loads(lambda path=directory: open_checkpoint(path))
    assert 0 < survivors < CLAIMS
