"""Finding the weights of a model and turning the asked-for ones into sites."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from leanmill.core.around import arounds, put_around
from leanmill.core.branches import branched_layers, plain_modules
from leanmill.core.errors import ConfigError
from leanmill.core.experts import attach_expert_site, is_stacked_experts, stacked_parameters
from leanmill.core.names import clean_name
from leanmill.core.places import Kind, Place, find_modules
from leanmill.core.site import EmbeddingSite, LinearSite, Site
from leanmill.core.stage import Slot, Stage


AnyStage = TypeVar("AnyStage", bound=Stage)


@dataclass(frozen=True)
class Candidate:
    """A weight that can become a site."""

    name: str
    kind: str
    """`linear`, `expert`, `embedding` or `head` (the output projection)."""
    module_path: str
    """Where the owning module sits now."""
    parameter_name: str


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names `name`: a glob over the whole dotted name, or over its last parts.

    `q_proj`, `mlp.*_proj`, `model.layers.0.*` and `*` are all patterns.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def iter_sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Yield every site of `model` with its plain name, in module order, each once."""
    for _, module in model.named_modules():
        if isinstance(module, Site):
            yield module.site_name, module


def iter_stages(model: nn.Module, kind: type[AnyStage]) -> Iterator[tuple[Site, AnyStage]]:
    """Yield each stage of a kind once, with its (first) site: tied weights share theirs."""
    seen: set[int] = set()
    for _, site in iter_sites(model):
        for stage in site.weight_stages():
            if isinstance(stage, kind) and id(stage) not in seen:
                seen.add(id(stage))
                yield site, stage


def changed_before(site: Site, slot: Slot) -> str | None:
    """Return the technique that changes the weight of a site before a slot, None where it comes there as it is."""
    return next((stage.technique for stage in site.weight_stages() if stage.slot < slot), None)


def staged_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what staged weights are computed from: each such weight and its stages' own parameters.

    Tied weights are yielded once a site.
    """
    for _, site in iter_sites(model):
        if site.is_staged:
            yield site.raw_weight  # type: ignore[misc]
            yield from site.stage_parameters()


class Sites:
    """The sites of one model: what can be one, and what has become one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.candidates = {candidate.name: candidate for candidate in _discover(model)}

    def select(self, targets: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> list[Site]:
        """Return the matching weights as sites, converting them in place where they are not yet.

        Args:
            targets: Patterns (see `matches`); None takes every linear and expert weight except
                the output head. Embeddings and the head are taken only when a pattern names them.
            exclude: Patterns to leave out again.

        Raises:
            ConfigError: A pattern matches nothing, nothing is left, or only one of two tied
                weights is taken.
        """
        return [self.site_of(candidate) for candidate in self.find(targets, exclude)]

    def find(self, targets: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> list[Candidate]:
        """Return the weights that `select` would convert, for what wraps layers and owns no matmul.

        Raises:
            ConfigError: See `select`.
        """
        if targets is None:
            taken = {name for name, c in self.candidates.items() if c.kind in ("linear", "expert")}
        else:
            taken = {name for pattern in targets for name in self._matching("targets", pattern)}
        for pattern in exclude:
            taken -= self._matching("exclude", pattern)
        if not taken:
            raise ConfigError(self._nothing_taken(targets, exclude))
        self._check_ties(taken)
        return [self.candidates[name] for name in self.candidates if name in taken]

    def put(self, selected: Sequence[Site], make: Callable[[Site], Stage]) -> None:
        """Give every selected site a stage of its own; sites that share a parameter share one.

        What a stage learns then stays one for both uses of a tied weight, and their export stays tied.

        Args:
            selected: What `select` returned.
            make: Builds the stage of a site, on the device of its weight.

        Raises:
            ConfigError: A slot is taken.
        """
        made: dict[int, Stage] = {}
        for site in selected:
            key = id(site.raw_weight)
            if key not in made:
                made[key] = make(site)
            site.put(made[key])

    def _nothing_taken(self, targets: Sequence[str] | None, exclude: Sequence[str]) -> str:
        if targets is not None and not targets:
            return "targets=[] takes no weight; remove it to take all, or give patterns such as 'q_proj'"
        if exclude:
            return (
                f"targets {list(targets or ['*'])} less exclude {list(exclude)} leave no weight of the "
                f"{len(self.candidates)} in the model; remove patterns from `exclude`"
            )
        return (
            "this model family has no linear or expert weights, which is what a technique takes unless told; "
            "choose another model.config.model_type, e.g. llama, or name other weights in `targets`"
        )

    def tied_to(self, site: Site | Candidate) -> list[str]:
        """Names of the other candidates that share `site`'s parameter."""
        name = site.site_name if isinstance(site, Site) else site.name
        group = next((names for names in self._tie_groups().values() if name in names), [])
        return [other for other in group if other != name]

    def modules(self, kind: Kind) -> list[Place]:
        """Return the modules of a kind as places that techniques may stand around, see `find_modules`.

        Raises:
            ConfigError: The model has none.
        """
        found = [Place(clean_name(path), layer, module) for path, layer, module in find_modules(self.model, kind)]
        if not found:
            raise ConfigError(
                f"this model family has no {kind} that could be told apart; choose another model.config.model_type, "
                f"e.g. {'mixtral' if kind == 'router' else 'llama'}"
            )
        return found

    def report(self) -> str:
        """One line: n of N weights carry stages or adapters beside them, by kind, and which are left plain."""
        staged = {name for name, site in iter_sites(self.model) if _does_more_than_decode(site)}
        branched = {clean_name(path) for path, _ in branched_layers(self.model)} & self.candidates.keys()
        if not staged and not branched:
            return "no weight is converted: what the techniques do stands beside the weights"
        parts = [f"converted {self._shares(staged)} weights"] if staged else []
        if branched:
            kinds = {self.candidates[name].kind for name in branched}
            parts.append(f"{self._shares(branched, kinds)} weights with an adapter beside them")
        plain = [name for name in self.candidates if name not in staged | branched]
        if plain:
            parts.append(f"left plain: {', '.join(plain[:6])}{' ...' if len(plain) > 6 else ''}")
        return "; ".join(parts)

    def _shares(self, names: set[str], kinds: set[str] | None = None) -> str:
        """Say how many weights of each kind `names` are: `28 of 28 linear`."""
        all_names = {kind: [n for n, c in self.candidates.items() if c.kind == kind] for kind in sorted(self._kinds)}
        shown = {kind: found for kind, found in all_names.items() if kinds is None or kind in kinds}
        return ", ".join(f"{sum(n in names for n in found)} of {len(found)} {kind}" for kind, found in shown.items())

    @property
    def _kinds(self) -> set[str]:
        return {candidate.kind for candidate in self.candidates.values()}

    def _matching(self, field: str, pattern: str) -> set[str]:
        found = {name for name in self.candidates if matches(pattern, name)}
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in self.candidates})
            near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, n=3, cutoff=0.3)
            raise ConfigError(
                f"{field} pattern {pattern!r} matches no weight of this model; "
                f"near names: {', '.join(near or leaves[:6])}; patterns are globs such as "
                f"'q_proj', 'mlp.*_proj' or 'model.layers.0.*'"
            )
        return found

    def _tie_groups(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for name, candidate in self.candidates.items():
            module = self.model.get_submodule(candidate.module_path)
            groups.setdefault(id(getattr(module, candidate.parameter_name)), []).append(name)
        return groups

    def _check_ties(self, taken: set[str]) -> None:
        for group in self._tie_groups().values():
            inside = [name for name in group if name in taken]
            if inside and len(inside) != len(group):
                outside = [name for name in group if name not in taken]
                raise ConfigError(
                    f"{inside} and {outside} are tied (one parameter), so a technique must take both or "
                    f"neither; target both, exclude {inside}, or set model.config.tie_word_embeddings: false"
                )

    def site_of(self, candidate: Candidate) -> Site:
        """Return a weight as a site, converting it in place where it is none yet."""
        module = self.model.get_submodule(candidate.module_path)
        if candidate.kind == "expert":
            return attach_expert_site(module, candidate.parameter_name, candidate.name)
        if isinstance(module, Site):
            return module
        kind = EmbeddingSite if isinstance(module, nn.Embedding) else LinearSite
        site = kind.adopt(module, candidate.name)  # type: ignore[arg-type]
        parent_path, _, leaf = candidate.module_path.rpartition(".")
        setattr(self.model.get_submodule(parent_path), leaf, site)
        for around in list(arounds(module)):
            put_around(site, around)
        return site


def _does_more_than_decode(site: Site) -> bool:
    return site.is_reshaped or any(parameter.requires_grad for parameter in site.stage_parameters())


def _discover(model: nn.Module) -> Iterator[Candidate]:
    head = _output_head(model)
    for path, module in plain_modules(model):
        name = clean_name(path)
        if isinstance(module, nn.Linear):
            yield Candidate(name, "head" if module is head else "linear", path, "weight")
        elif isinstance(module, nn.Embedding):
            yield Candidate(name, "embedding", path, "weight")
        elif is_stacked_experts(module):
            for parameter_name in stacked_parameters(module):
                yield Candidate(f"{name}.{parameter_name}", "expert", path, parameter_name)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
