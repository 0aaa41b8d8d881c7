"""The family `side_network`: a causal LM of any family, and a network that reads its blocks.

Imports nothing of Leanmill, so that it can travel with its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_side_network import SideNetworkConfig
from .network import NETWORKS, Seen, SideNetwork, Stream


class SideNetworkForCausalLM(PreTrainedModel, GenerationMixin):
    """`base` with `network` beside its blocks; called, and continued with `generate`, as `base` is."""

    config_class = SideNetworkConfig
    base_model_prefix = "base"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: SideNetworkConfig) -> None:
        super().__init__(config)
        inner = config.base_config()
        self.base = AutoModelForCausalLM.from_config(inner)
        hidden_size = inner.get_text_config().hidden_size
        self.network = NETWORKS[config.method](hidden_size, len(config.read) + 1, config.size, config.keeps_base)
        self.post_init()
        self.connect()

    def connect(self) -> None:
        """Let the network read and change what goes through the blocks of `base`."""
        config, stream = self.config, Stream()
        blocks = self.base.get_submodule(config.blocks)
        for index in config.read:
            blocks[index].register_forward_pre_hook(_reader(stream, is_first=index == 0), with_kwargs=True)
        place = blocks[config.where]
        if config.method == "sherl":
            place.register_forward_pre_hook(_before(self, stream), with_kwargs=True)
        else:
            place.register_forward_hook(_behind(self, stream), with_kwargs=True)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SideNetwork):
            module.reset_parameters()

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the causal LM's own."""
        return self.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See the causal LM's own."""
        kwargs.setdefault("generation_config", self.generation_config)
        return self.base.generate(*args, **kwargs)


def _reader(stream: Stream, *, is_first: bool) -> Any:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.see(args[0], kwargs, is_first=is_first)

    return read


def _before(owner: SideNetworkForCausalLM, stream: Stream) -> Any:
    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = [*stream.take(), args[0]]
        return (owner.network(states, Seen(kwargs, stream.num_past)), *args[1:]), kwargs

    return change


def _behind(owner: SideNetworkForCausalLM, stream: Stream) -> Any:
    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return owner.network([*stream.take(), output], Seen(kwargs, stream.num_past))

    return change


def with_base(base: Any, network: SideNetwork, settings: dict[str, Any]) -> SideNetworkForCausalLM:
    """Return a causal LM with a network beside it as one model, which takes both over.

    Args:
        base: The causal LM.
        network: The network, trained.
        settings: Of it, as `SideNetworkConfig` names them.
    """
    config = SideNetworkConfig(base=base.config.to_dict(), **settings)
    with torch.device("meta"):
        model = SideNetworkForCausalLM(config)
    model.base, model.network = base, network.float()
    model.connect()
    model.config.tie_word_embeddings = base.config.tie_word_embeddings
    return model.eval()  # type: ignore[no-any-return]


__all__ = ["SideNetworkForCausalLM"]
