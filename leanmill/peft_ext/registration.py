"""Making our tuners methods of PEFT, now or as soon as somebody imports PEFT. Imports neither PEFT nor torch.

PEFT has no way to add a method from outside: `register_peft_method` wants the name in a closed enumeration. The name
is put there first; everything else goes through PEFT's own registration.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


TUNERS: dict[str, str] = {
    "bottleneck": "leanmill.peft_ext.tuners.bottleneck",
    "core_lora": "leanmill.peft_ext.tuners.core_lora",
    "moe_lora": "leanmill.peft_ext.tuners.moe_lora",
    "mos": "leanmill.peft_ext.tuners.mos",
    "nola": "leanmill.peft_ext.tuners.nola",
    "rank_lora": "leanmill.peft_ext.tuners.rank_lora",
}
"""Name of the method -> module with its `Config` and `Model`."""


def register_with_peft() -> None:
    """Add the tuners to PEFT: at once if it is imported, else when it is. May be called again."""
    if "peft" in sys.modules:
        _register_all()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register_all() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    for name, module_name in TUNERS.items():
        member = _enum_member(name)
        if member in PEFT_TYPE_TO_CONFIG_MAPPING:
            continue
        module: Any = importlib.import_module(module_name)
        register_peft_method(name=name, config_cls=module.Config, model_cls=module.Model)


def _enum_member(name: str) -> Any:
    """Return the member of PEFT's enumeration of methods for `name`, which is made where there is none."""
    from peft.utils.peft_types import PeftType

    kind: Any = PeftType
    key = name.upper()
    if key not in kind.__members__:
        member = str.__new__(kind, key)
        member._name_, member._value_, member.__objclass__ = key, key, kind
        member._sort_order_ = len(kind._member_names_)
        kind._member_names_.append(key)
        kind._member_map_[key] = member
        kind._value2member_map_[key] = member
        type.__setattr__(kind, key, member)
    return kind.__members__[key]


class _AfterPeft(MetaPathFinder):
    """Waits for the import of PEFT, lets the usual finder do it, and registers the tuners behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        # Some only ask whether PEFT is there, so this stays until it is imported.
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Any, finder: _AfterPeft) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register_all()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # resources, source: whoever asks means the real loader
