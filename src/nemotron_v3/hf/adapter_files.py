"""A saved adapter proven against a model before anything of the model is changed.

PEFT passes over tensors whose names match nothing and goes on without those that are missing, with
a warning at most. Here an adapter's names and shapes are first compared with those that its config
gives the model, which is put together without storage and taken apart again.
"""

import contextlib
import copy
import os
import pickle
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from nemotron_v3.checkpoint.adapter_config import config_problems
from nemotron_v3.checkpoint.adapter_names import plain_adapter_name
from nemotron_v3.checkpoint.header import WEIGHT_DTYPES, read_json
from nemotron_v3.checkpoint.reader import MAX_CONFIG_BYTES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.bin"  # of the two files that PEFT reads, the one that torch writes
_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
_WHOLE = ("model.embeddings", "lm_head")  # PEFT saves their weights of its own accord


def read_config(path: str | os.PathLike[str], options: Mapping[str, Any]) -> PeftConfig:
    """An adapter's config.

    Raises:
        ValueError: fields that cannot be, all of them named.
    """
    hub = {name: options[name] for name in _HUB if name in options}
    file = Path(path) / hub.get("subfolder", "") / CONFIG
    if file.is_file():
        _check(str(file), read_json(file, MAX_CONFIG_BYTES))
    try:
        kind = PeftConfig._get_peft_type(os.fspath(path), **hub)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    except KeyError as error:
        raise ValueError(
            f"{path}: peft_type {error} is none of PEFT's: give the config that it saved, of LoRA "
            "for example with the peft_type 'LORA'"
        ) from None
    config = config_class.from_pretrained(os.fspath(path), **hub)
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    _check(f"{path}", settings)
    return config


def _check(where: str, config: Mapping[str, Any]) -> None:
    if problems := config_problems(config):
        raise ValueError("\n  - ".join([f"{where} cannot be an adapter's:", *problems]))


@contextlib.contextmanager
def fitting(
    model: nn.Module, path: str | os.PathLike[str], config: PeftConfig, options: Mapping[str, Any]
) -> Iterator[str]:
    """The directory to load the adapter from: `path`, or one that holds its tensors by the names
    that PEFT reads.

    Raises:
        ValueError: tensors that match nothing, are missing, named twice, of another shape or not
            finite, all of them named. The model is as it was.
    """
    hub = {name: options[name] for name in _HUB if name in options}
    tensors = _read(path, hub)
    expected, base = _expected(model, config)
    by_plain = {plain_adapter_name(name): name for name in expected}
    found: dict[str, str] = {}
    problems = []
    for name, tensor in tensors.items():
        plain = _saved_whole(plain_adapter_name(name), by_plain)
        if plain in found:
            problems.append(f"{found[plain]} and {name} are one tensor")
            continue
        found[plain] = name
        shape = expected[by_plain[plain]] if plain in by_plain else base.get(plain)
        if shape is None:
            problems.append(f"{name} matches nothing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, the model has {shape}")
        elif tensor.dtype not in WEIGHT_DTYPES.values():
            problems.append(f"{name} is {tensor.dtype}, not one of {', '.join(WEIGHT_DTYPES)}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    problems += [f"{by_plain[plain]} is missing" for plain in by_plain.keys() - found.keys()]
    if problems:
        raise ValueError(
            "\n  - ".join([f"the adapter in {path} does not fit the model:", *sorted(problems)])
        )
    named = {by_plain.get(p, f"base_model.model.{p}"): tensors[name] for p, name in found.items()}
    if named.keys() == tensors.keys():
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory(prefix="adapter-") as directory:
        torch.save(named, Path(directory) / WEIGHTS)
        config.save_pretrained(directory)
        yield directory


def _read(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter's tensors by the names in its file."""
    try:
        return load_peft_weights(os.fspath(path), device="cpu", **hub)
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the tensors of the adapter in {path} cannot be read: {error}") from error


def _saved_whole(plain: str, adapted: Collection[str]) -> str:
    """The name of a tensor, of a whole matrix that PEFT saved of its own accord as the model with
    the adapter calls it: inside the layer that an adapter put around it, if one did."""
    for module in _WHOLE:
        if plain in (f"{module}.weight", f"{module}.base_layer.weight") and plain not in adapted:
            wrapped = any(name.startswith(f"{module}.lora_") for name in adapted)
            return f"{module}.base_layer.weight" if wrapped else f"{module}.weight"
    return plain


def _expected(
    model: nn.Module, config: PeftConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes that an adapter of `config` has for a model, by the names that PEFT saves; and
    those of the model's own matrices that may come with one."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some of them would change the model's own weights
    with as_it_was(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT repeats them when it loads
        probe = PeftModel(model, config, low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(probe, save_embedding_layers=False)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    own = {name: t.shape for name, t in model.state_dict().items()}
    whole = {
        f"{module}{inside}.weight": tuple(own[f"{module}.weight"])
        for module in _WHOLE
        for inside in ("", ".base_layer")
        if f"{module}.weight" in own
    }
    return shapes, whole


@contextlib.contextmanager
def as_it_was(model: nn.Module, *, on_error_only: bool = False) -> Iterator[None]:
    """Undo what PEFT does to a model's modules, hooks, flags and attributes."""
    modules = [
        (m, m.training, dict(m._modules), dict(m._parameters), dict(m._forward_hooks))
        for m in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = dict(vars(model))
    try:
        yield
        if on_error_only:
            return
    except BaseException:
        _put_back(model, modules, trained, own)
        raise
    _put_back(model, modules, trained, own)


def _put_back(
    model: nn.Module,
    modules: list[tuple[nn.Module, bool, dict, dict, dict]],
    trained: list[tuple[Tensor, bool]],
    own: dict[str, Any],
) -> None:
    vars(model).clear()
    vars(model).update(own)
    for module, training, *tables in modules:
        module.training = training
        held = (module._modules, module._parameters, module._forward_hooks)
        for table, before in zip(held, tables, strict=True):
            table.clear()
            table.update(before)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
