"""Configuration of distillation from a teacher's logits. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepRule
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig
from leanmill.distill.logits.kinds import Kind


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Distill(TechniqueConfig):
    """Match a frozen teacher's next-token distribution (Hinton et al. 2015, arXiv:1503.02531)."""

    type: Literal["distill"] = "distill"
    """Name of the technique."""
    teacher: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = None
    """Folder or hub name of the teacher, a causal LM with the student's vocabulary; or a list of several, whose
    probabilities are averaged (for `mse`, whose logits are). None if `cache_dir` has all."""
    teacher_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """Weight of each of several teachers in the average, of any sum; None weighs all alike."""
    divergence: Literal[Kind, "sinkhorn"] = "forward_kl"
    """`forward_kl`: KL(teacher || student). `reverse_kl`: KL(student || teacher). `js`: generalised
    Jensen-Shannon (Agarwal et al. 2023, arXiv:2306.13649). `skew_forward_kl`, `skew_reverse_kl`: from the teacher,
    or from the student, to a mixture of both (Ko et al. 2024, arXiv:2402.03898). `total_variation`: half the sum
    of absolute differences. `mse`: mean squared difference of logits (Ba and Caruana 2014, arXiv:1312.6184).
    `cakld`: reverse and forward KL weighed by how sure the teacher is (Du et al. 2024, arXiv:2402.10631).
    `deviation_aware`: forward KL, the more the less sure teacher and student are (DB-LLM, arXiv:2402.11960).
    `sinkhorn`: the cost of moving the student's distributions of a batch of tokens to the teacher's (Cui et al. 2024,
    arXiv:2402.17110)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `js`; not used by the others."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Weight that `skew_forward_kl` gives the teacher, and `skew_reverse_kl` the student, in the mixture; not used by
    the others."""
    confidence: Literal["measured"] | Annotated[float, Field(gt=0, lt=1)] = "measured"
    """Weight of the reverse KL in `cakld`; the forward KL has the rest. `measured` is the teacher's mean probability
    of the next token, over the tokens of the run's first step. Not used by the others."""
    focus: float = Field(default=1.0, gt=0)
    """Exponent of a token's cross-entropy between teacher and student, its weight in `deviation_aware`; not used by the
    others."""
    batch_tokens: int = Field(default=32, ge=1)
    """Neighbouring positions of a row that `sinkhorn` compares with each other, a divisor of `data.sequence_length`;
    what it takes grows with their number. Not used by the others."""
    entropy: float = Field(default=0.1, gt=0)
    """Weight of the entropy in the transport of `sinkhorn`; not used by the others."""
    iterations: int = Field(default=20, ge=1)
    """How often `sinkhorn` normalises rows and columns of the transport; not used by the others."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare the teacher's so many largest probabilities, and what they leave as one more; None compares all.
    What `cache_dir` keeps of a teacher."""
    cache_dir: str | None = Field(default=None, min_length=1)
    """Folder where the teacher's `top_k` probabilities of every row are kept: read where they are there, computed and
    written where not. A later run on the same data needs no teacher."""
    temperature: float = Field(default=1.0, gt=0)
    """T that divides both models' logits; the loss is multiplied by T^2, which keeps the size of
    its gradient."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the loss beside cross-entropy (`train.cross_entropy_weight`)."""

    def holds_where_matmuls_are_shared(self) -> bool:
        """Return True: it compares whole logits, gathered where ranks share the vocabulary."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the loss term; the teacher is loaded when training starts."""
        from leanmill.distill.logits.confidence import ConfidenceRule
        from leanmill.distill.logits.sinkhorn import SinkhornTerm
        from leanmill.distill.logits.teachers import Teachers
        from leanmill.distill.logits.term import DistillTerm, cached_teacher

        paths = self._teachers()
        teachers = Teachers(context, paths, self.teacher_weights, self.temperature, of_logits=self.divergence == "mse")
        if self.divergence == "sinkhorn":
            of_batches = SinkhornTerm(
                teachers,
                group_tokens=self.batch_tokens,
                entropy=self.entropy,
                iterations=self.iterations,
                temperature=self.temperature,
                weight=self.weight,
            )
            return Installation(loss_terms=(of_batches,))
        term = DistillTerm(
            teachers if paths else None,
            kind=self.divergence,
            beta=self._beta(),
            temperature=self.temperature,
            top_k=self.top_k,
            weight=self.weight,
        )
        rules: list[StepRule] = []
        if self.cache_dir is not None:
            rules.append(cached_teacher(term, context, self.cache_dir))
        if self.divergence == "cakld" and self.confidence == "measured":
            rules.append(ConfidenceRule(term))
        return Installation(loss_terms=(term,), step_rules=tuple(rules))

    def _teachers(self) -> list[str]:
        if self.teacher is None:
            return []
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher

    def _beta(self) -> float:
        """The number that the divergence takes."""
        if self.divergence == "cakld":
            return 0.5 if self.confidence == "measured" else self.confidence
        if self.divergence == "deviation_aware":
            return self.focus
        return self.skew if self.divergence.startswith("skew") else self.beta

    @model_validator(mode="after")
    def _compares_probabilities(self) -> Distill:
        compared = {"mse": "logits", "sinkhorn": "whole distributions"}.get(self.divergence)
        if compared is not None and self.top_k is not None:
            raise ConfigError(
                f"distill.top_k {self.top_k} keeps some probabilities, and divergence: {self.divergence} compares "
                f"{compared}; remove top_k, or set divergence: forward_kl"
            )
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Distill:
        if self.teacher is None and self.cache_dir is None:
            raise ConfigError("distill needs a teacher; set distill.teacher to a model folder or hub name")
        if self.cache_dir is not None and self.top_k is None:
            raise ConfigError("distill.cache_dir keeps a teacher's largest probabilities; set distill.top_k, e.g. 64")
        if self.teacher is None and self.divergence == "cakld" and self.confidence == "measured":
            raise ConfigError(
                "distill.confidence: measured asks the teacher; set distill.teacher, or a number, e.g. 0.5"
            )
        return self

    @model_validator(mode="after")
    def _weighs_its_teachers(self) -> Distill:
        if self.teacher_weights is not None and not isinstance(self.teacher, list):
            raise ConfigError("distill.teacher_weights weighs several teachers; list them: teacher: [one, another]")
        teachers = self._teachers()
        if self.teacher_weights is not None and len(self.teacher_weights) != len(teachers):
            raise ConfigError(
                f"distill.teacher_weights has {len(self.teacher_weights)} numbers and distill.teacher {len(teachers)} "
                f"teachers; give one number a teacher"
            )
        twice = [path for path in teachers if teachers.count(path) > 1]
        if twice or "" in teachers:
            raise ConfigError(
                f"distill.teacher lists {twice[0] if twice else ''!r}{' twice' if twice else ''}; name each teacher "
                f"once, and weigh it with teacher_weights"
            )
        return self

    def problems_with_rows_of(self, num_tokens: int) -> Iterable[str]:
        """Yield batches of `sinkhorn` that do not fill a row."""
        if self.divergence == "sinkhorn" and num_tokens % self.batch_tokens:
            near = max(n for n in range(1, self.batch_tokens + 1) if num_tokens % n == 0)
            yield (
                f"distill.batch_tokens={self.batch_tokens} must divide data.sequence_length={num_tokens}; set "
                f"distill.batch_tokens={near}"
            )

    def frozen_models(self) -> Mapping[str, str]:
        """Return the teachers that are named."""
        if isinstance(self.teacher, list):
            return {f"teacher.{index}": path for index, path in enumerate(self.teacher)}
        return {} if self.teacher is None else {"teacher": self.teacher}

    def knows_rows_by_number(self) -> bool:
        """A cache does."""
        return self.cache_dir is not None

    def num_frozen_logits(self) -> int:
        """One for each teacher that may have to compute them."""
        return len(self._teachers())
