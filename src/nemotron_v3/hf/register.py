"""Have transformers' auto classes build accelerated models, from this package's code alone."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.nemotron_h import configuration_nemotron_h as their_config
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.hf import model as models
from nemotron_v3.hf.accelerate import swap_in
from nemotron_v3.hf.versions import check_version

# The auto classes run a checkpoint's own code, if they are let, only where the class that they know
# is transformers' own; one that says it is defined elsewhere comes first. Hence the two classes.


class NemotronHConfig(their_config.NemotronHConfig):
    """transformers' config, defined here."""


class NemotronHForCausalLM(models.NemotronHForCausalLM):
    """The accelerated model for the auto classes; what they build is the plain accelerated one."""

    __module__ = __name__

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        theirs.NemotronHForCausalLM.__init__(self, config, *args, **kwargs)
        self.__class__ = models.NemotronHForCausalLM
        swap_in(self)


def register() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` build accelerated Nemotron-H models.

    From then on `AutoModelForCausalLM.from_pretrained(path)` gives a
    `nemotron_v3.hf.NemotronHForCausalLM`; a checkpoint's own code (`auto_map`) is never run, not
    even with `trust_remote_code=True`. Calling it again changes nothing.

    Raises:
        ImportError: a transformers outside the supported versions.
    """
    check_version()
    AutoConfig.register(_MODEL_TYPE, NemotronHConfig, exist_ok=True)
    for config in (NemotronHConfig, their_config.NemotronHConfig):
        AutoModelForCausalLM.register(config, NemotronHForCausalLM, exist_ok=True)


def unregister() -> None:
    """Let the auto classes build transformers' own models again; models built before stay."""
    AutoConfig.register(_MODEL_TYPE, their_config.NemotronHConfig, exist_ok=True)
    for config in (NemotronHConfig, their_config.NemotronHConfig):
        AutoModelForCausalLM.register(config, theirs.NemotronHForCausalLM, exist_ok=True)


_MODEL_TYPE = their_config.NemotronHConfig.model_type
