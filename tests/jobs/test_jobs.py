"""What a newcomer does, by the documented commands alone: one script a job, in an empty folder, one after the other."""

from __future__ import annotations

import re

import pytest

from tests.jobs import transcript


STEPS = re.compile(r"\d{4}-\d\d-\d\d .*\bstep +#")
"""Progress, which is said by the clock."""


def fenced(text, language):
    """Lines of all blocks in a language."""
    return [
        line for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()
    ]


def masked(line):
    """A line without its numbers, units of time and widths of columns."""
    return " ".join(re.sub(r"\d[\d.,]*(e[+-]\d+|[kMs%]|m\d*s)?", "#", line).split())


@pytest.mark.parametrize("script", transcript.scripts(), ids=lambda script: script.stem)
def test_the_page_of_a_job_has_its_commands(script):
    page = (transcript.PAGES / f"{script.stem[2:]}.md").read_text(encoding="utf-8")
    lines = transcript.shown(transcript.commands(script))
    typed = fenced(page, "bash")
    assert [line for line in lines if line in typed or not line.startswith("#")] == typed, (
        "run python tests/jobs/transcript.py"
    )
    assert transcript.sizes() in page
    assert fenced(page, "text")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_job_ends_well_and_prints_what_its_page_says(tmp_path):
    assert len(transcript.scripts()) == 6
    work = tmp_path / "work"
    work.mkdir()
    for script in transcript.scripts():
        printed = {masked(line) for one in transcript.run(script, work, timeout=280) for line in one.output}
        page = (transcript.PAGES / f"{script.stem[2:]}.md").read_text(encoding="utf-8")
        said = [line for line in map(masked, fenced(page, "text")) if line and not STEPS.search(line)]
        missing = [line for line in said if line not in printed]
        # Another machine has other bits, engines and cores to speak of.
        assert len(missing) <= 0.2 * len(said), f"{script.name}: run python tests/jobs/transcript.py\n" + "\n".join(
            missing
        )
