"""What the model added to the recipe's prompts, evaluation by evaluation."""

from __future__ import annotations

from html import escape

from leanmill.core.redact import redact
from leanmill.report.page.data import Record, RunData
from leanmill.report.page.section import Section


def samples_section(run: RunData) -> Section | None:
    """Return the section: the newest samples, and all earlier ones to be opened; None without any."""
    records = [record for record in reversed(run.evals) if record.get("samples")]
    if not records:
        return None
    newest, *earlier = records
    older = "".join(f"<h3>Step {record['step']:,}</h3>{_samples(record)}" for record in earlier)
    folded = f"<details><summary>Earlier samples</summary>{older}</details>" if older else ""
    return Section(title=f"Samples at step {newest['step']:,}", content=_samples(newest) + folded)


def _samples(record: Record) -> str:
    return "".join(
        f'<p class="sample"><b>{escape(redact(str(sample["prompt"])))}</b>{escape(redact(str(sample["text"])))}</p>'
        for sample in record["samples"]
    )
