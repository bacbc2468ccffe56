"""What the accelerated modules of one model share, and what models are built with."""

from dataclasses import dataclass, field

from torch import nn

from nemotron_v3.config import BackendConfig, NemotronV3Config

SETTINGS = "nemotron_v3_settings"  # the attribute of a module that holds its `Settings`


@dataclass(frozen=True)
class Settings:
    """What the accelerated modules of one model share.

    Attributes:
        config: the model's, typed.
        backend: which form of each op runs.
        loss: `"logits"` or `"linear"`, see `accelerate`.
    """

    config: NemotronV3Config
    backend: BackendConfig
    loss: str = "logits"


class Accelerated(nn.Module):
    """A module that `accelerate` has given its settings."""

    @property
    def settings(self) -> Settings:
        return self.__dict__[SETTINGS]

    @property
    def impl(self) -> str:
        return self.settings.backend.impl


@dataclass
class Options:
    """The options of models that are built accelerated."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    loss: str = "logits"


AS_BUILT = Options()  # `register` changes it
