"""A frozen causal LM whose logits are made of its last hidden states, where and as many as they are asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.head import head_extras
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary


class FrozenHead:
    """One frozen model: its last hidden states by the micro-batch, and the head that makes logits of them.

    Args:
        context: Loads it, and knows the student's vocabulary.
        path: Folder or hub name.
        technique: Who asks, for messages.
        role: What that calls it, for messages.
    """

    def __init__(self, context: InstallContext, path: str, *, technique: str, role: str) -> None:
        self.path = path
        self._context, self._taps = context, context.taps(path)
        self._technique, self._role = technique, role
        self._is_checked = False

    @property
    def model(self) -> Any:
        """The frozen causal LM, loaded when first asked for.

        Raises:
            ConfigError: Its vocabulary is not the student's, or it changes its logits after the head.
        """
        model = self._taps.model
        if not self._is_checked:
            self._check(model.config)
            self._is_checked = True
        return model

    @property
    def head(self) -> nn.Module:
        """Its output head."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def last_of(self, batch: Batch) -> Tensor:
        """Return its last hidden states [B, S, H] of a micro-batch; a collective where it is sharded."""
        assert self.model is not None  # checked before it runs
        return self._taps.read(batch).last

    def _check(self, config: Any) -> None:
        extras = head_extras(config)
        if extras:
            raise ConfigError(
                f"{self._role} {self.path} changes its logits after the head ({', '.join(extras)}), which "
                f"{self._technique} does not cover; choose a {self._role} of another family"
            )
        check_vocabulary(self._context, self.path, config.vocab_size, role=self._role)
