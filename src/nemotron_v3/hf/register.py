"""Let every way of building a Nemotron-H model of transformers build an accelerated one.

Two things are changed, and given back exactly. The auto classes learn classes of this package, so
that a checkpoint's own code is never run and heads are there that transformers lacks. And the
constructors of transformers' own classes build accelerated models, so that it makes no difference
by which name, and since when, somebody holds such a class.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, cast

import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.nemotron_h import configuration_nemotron_h as their_config
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.config import BackendConfig
from nemotron_v3.hf import heads
from nemotron_v3.hf import model as models
from nemotron_v3.hf.classes import accelerated_class
from nemotron_v3.hf.exemption import exempt_if_loaded
from nemotron_v3.hf.settings import AS_BUILT, Accelerated, Options
from nemotron_v3.hf.swap import check_options, install_as_built
from nemotron_v3.hf.versions import check_version

# The auto classes run a checkpoint's own code, if they are let, only where the class that they know
# is transformers' own; one that says it is defined elsewhere comes first. Hence classes of the same
# names here.


class NemotronHConfig(their_config.NemotronHConfig):
    """transformers' config, defined here."""


class NemotronHModel(models.NemotronHModel):
    """The backbone for the auto classes; the class of what they build is `hf.NemotronHModel`."""

    __module__ = __name__

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        cast(Any, self).__class__ = models.NemotronHModel
        models.NemotronHModel.__init__(self, config, *args, **kwargs)


class NemotronHForCausalLM(models.NemotronHForCausalLM):
    """The language model for the auto classes."""

    __module__ = __name__

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        cast(Any, self).__class__ = models.NemotronHForCausalLM
        models.NemotronHForCausalLM.__init__(self, config, *args, **kwargs)


_AUTO_CLASSES = {
    AutoModel: NemotronHModel,
    AutoModelForCausalLM: NemotronHForCausalLM,
    AutoModelForSequenceClassification: heads.NemotronHForSequenceClassification,
    AutoModelForTokenClassification: heads.NemotronHForTokenClassification,
}
_MODEL_TYPE = their_config.NemotronHConfig.model_type
_MISSING = object()
_undo_stack: list[Callable[[], None]] = []  # called by `unregister`, from the last to the first


def register(*, backend: BackendConfig | None = None, loss: str = "logits") -> None:
    """Let every Nemotron-H model of transformers that is built from now on be an accelerated one.

    `AutoModel`, `AutoModelForCausalLM`, `AutoModelForSequenceClassification` and
    `AutoModelForTokenClassification` build accelerated models, and a checkpoint's own code
    (`auto_map`) is never run, not even with `trust_remote_code=True`. So do transformers' classes
    themselves, wherever they were imported, which reaches the reference, teacher and reward
    models that trainers make; and PEFT adds and loads adapters of an accelerated `out_proj`.
    Calling it again changes the options alone.

    Args:
        backend, loss: as for `nemotron_v3.hf.accelerate`, of the models that are built.

    Raises:
        ImportError: a transformers outside the supported versions.
        ValueError: an option that is not offered.
    """
    check_version()
    AS_BUILT.backend, AS_BUILT.loss = check_options(backend, loss), loss
    if _undo_stack:
        return
    _put(CONFIG_MAPPING._extra_content, _MODEL_TYPE, NemotronHConfig)
    for auto_class, kind in _AUTO_CLASSES.items():
        for config in (NemotronHConfig, their_config.NemotronHConfig):
            _put(auto_class._model_mapping._extra_content, config, kind)
    for kind in (theirs.NemotronHModel, theirs.NemotronHForCausalLM):
        _set(kind, "__init__", _building_accelerated(kind.__init__))
    for kind in (heads.NemotronHForSequenceClassification, heads.NemotronHForTokenClassification):
        for module in (*_packages(), theirs):  # a head's name stands in the config that it saves
            _set(module, kind.__name__, kind)
    _let_peft_adapt_out_proj()


def unregister() -> None:
    """Let transformers' models be built as its own again; models built before stay.

    What `register` changed is the object that it was before, unless something else has changed it
    since, which stays.
    """
    while _undo_stack:
        _undo_stack.pop()()
    AS_BUILT.backend, AS_BUILT.loss = Options().backend, Options().loss


def _packages() -> list[ModuleType]:
    """All module objects of transformers in this process.

    Importing a model may replace the one in `sys.modules`; code that imported it before, such as a
    trainer, keeps the first.
    """
    kind, name = type(transformers), transformers.__name__
    found = [transformers]
    for module in list(sys.modules.values()):
        held = vars(module).values() if isinstance(module, ModuleType) else ()
        found += [each for each in list(held) if type(each) is kind and each.__name__ == name]
    return list({id(each): each for each in found}.values())


def _put(mapping: dict, key: Any, value: Any) -> None:
    """Set an item, until `unregister`."""
    before = mapping.get(key, _MISSING)
    mapping[key] = value

    def undo() -> None:
        if mapping.get(key) is not value:
            return
        if before is _MISSING:
            del mapping[key]
        else:
            mapping[key] = before

    _undo_stack.append(undo)


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, until `unregister`."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    _undo_stack.append(undo)


def _building_accelerated(original: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose object is accelerated, that of a subclass too if it can be."""

    @wraps(original)
    def __init__(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not _undo_stack:  # something else has wrapped this one, so that it stayed
            return original(self, config, *args, **kwargs)
        if not isinstance(self, Accelerated):
            _become_accelerated(self)
        original(self, config, *args, **kwargs)
        if isinstance(self, Accelerated):
            install_as_built(self)

    return __init__


def _become_accelerated(model: nn.Module) -> None:
    try:
        model.__class__ = accelerated_class(type(model))
    except TypeError as error:
        if isinstance(model, theirs.NemotronHModel):  # the backbone in another model is one of ours
            warnings.warn(f"it stays transformers' own: {error}", stacklevel=4)


def _let_peft_adapt_out_proj() -> None:
    """It affects accelerated models only, so `unregister` need not undo it."""
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401
    exempt_if_loaded()
