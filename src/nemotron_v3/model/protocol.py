"""What other rooms ask of a language model, without knowing its class."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from nemotron_v3.config import BackendConfig, NemotronV3Config


class Backbone(Protocol):
    """Embeddings, blocks and the final norm."""

    backend: BackendConfig
    embeddings: nn.Embedding
    layers: nn.ModuleList
    norm_f: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class CausalLM(Protocol):
    """A backbone and its head; `NemotronV3ForCausalLM` is one."""

    config: NemotronV3Config
    generation_config: dict[str, Any] | None
    lm_head: Any
    model: Any  # a Backbone
    mtp: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Any: ...

    def buffers(self) -> Any: ...

    def modules(self) -> Any: ...

    def named_modules(self) -> Any: ...

    def named_parameters(self) -> Any: ...


class Trained(Protocol):
    """Who tells what was trained: a model, or whole tensors that were gathered of a sharded one."""

    config: NemotronV3Config

    def state_dict(self) -> Mapping[str, Tensor]: ...
