"""What other rooms ask of a language model, without knowing its class."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nemotron_v3.config import NemotronV3Config


class CausalLM(Protocol):
    """A backbone and its head; `NemotronV3ForCausalLM` is one."""

    config: NemotronV3Config
    generation_config: dict[str, Any] | None
    lm_head: Any
    model: Any  # with backend, embeddings, layers and norm_f
    mtp: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Any: ...

    def buffers(self) -> Any: ...

    def modules(self) -> Any: ...

    def named_modules(self) -> Any: ...

    def named_parameters(self) -> Any: ...


class Trained(Protocol):
    """A source of trained tensors: a model, or whole tensors gathered from a sharded one."""

    config: NemotronV3Config

    def state_dict(self) -> Mapping[str, Tensor]: ...
