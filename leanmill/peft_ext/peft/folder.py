"""What a folder with an adapter of PEFT's says of it: method, options, layers and base. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.peft_ext.peft.methods import NOT_OPTIONS
from leanmill.peft_ext.peft.options import check_method, defaults, option_names


CONFIG = "adapter_config.json"
_LAYERS = ("target_modules", "exclude_modules", "fan_in_fan_out")
"""What a recipe says in other words, or PEFT by the layers themselves."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """An adapter as its folder describes it."""

    method: str
    options: Mapping[str, Any]
    """Those that differ from the method's defaults."""
    targets: list[str] | None
    """Patterns of the wrapped layers; None for all linear layers but the head."""
    base: str | None
    """Name or folder of the model it belongs to, where the folder says."""

    @classmethod
    def read(cls, path: str) -> AdapterFolder:
        """Read `path`/adapter_config.json.

        Raises:
            ConfigError: There is none, or the adapter is of a kind that does not train here.
        """
        raw = _read(path)
        method = str(raw.get("peft_type", "")).lower()
        check_method(method)
        known, allowed = defaults(method), option_names(method)
        given = {key: value for key, value in raw.items() if key in known and value != known[key] and value is not None}
        others = [key for key, value in given.items() if key not in allowed and key not in _LAYERS and value]
        if others:
            reason = NOT_OPTIONS.get(others[0], "it does not train here")
            raise ConfigError(f"peft.path={path} has {others[0]}={given[others[0]]!r}: {reason}; use another adapter")
        return cls(
            method=method,
            options={key: value for key, value in given.items() if key in allowed},
            targets=_targets(path, raw),
            base=raw.get("base_model_name_or_path"),
        )

    def check(self, path: str, method: str, options: Mapping[str, Any]) -> None:
        """Refuse a method or options that the adapter has not.

        Raises:
            ConfigError: With both values.
        """
        if method != self.method:
            raise ConfigError(f"peft.method={method}, and peft.path={path} is of method {self.method}; leave it out")
        known = defaults(method)
        for key in sorted(self.options.keys() | options.keys()):
            own, wanted = self.options.get(key, known[key]), options.get(key, known[key])
            if own != wanted:
                raise ConfigError(f"peft.{key}={wanted!r}, and the adapter in {path} has {own!r}; leave it out")


def _read(path: str) -> dict[str, Any]:
    file = expand_user(path) / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"peft.path={path} has no {CONFIG}; name a folder that PEFT or `leanmill export --to adapter` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"peft.path={path}: {file.name} cannot be read ({error}); write the folder again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"peft.path={path}: {file.name} is no table of options; write the folder again")
    return raw


def _targets(path: str, raw: Mapping[str, Any]) -> list[str] | None:
    targets = raw.get("target_modules")
    if raw.get("exclude_modules") or isinstance(targets, str) and targets != "all-linear":
        raise ConfigError(
            f"peft.path={path} chooses layers by a regular expression or by leaving some out; give peft.targets"
        )
    return sorted(targets) if isinstance(targets, list) else None
