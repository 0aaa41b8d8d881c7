"""The report's section about weights: sparsity of every site, levels and histogram of one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from leanmill.report.units import count, number, percent


_MANY_LEVELS = 256
"""Where the site statistics stop counting."""
_HEADINGS = (
    '<th scope="col">Site</th><th scope="col">Techniques</th><th scope="col" class="num">Shape</th>'
    '<th scope="col">Zeros</th><th scope="col" class="num">2 of 4</th><th scope="col" class="num">Levels</th>'
    '<th scope="col" class="num">PQ index</th>'
)


def draw_sites(document: dict[str, Any]) -> str:
    """Return the section's content: a table with bars, and the first site's histogram."""
    sites = document.get("sites") or []
    if not sites:
        return '<p class="empty">No weight carries a stage, or no evaluation has run yet.</p>'
    rows = "".join(_row(index, site) for index, site in enumerate(sites))
    options = "".join(f'<option value="{i}">{escape(site["name"])}</option>' for i, site in enumerate(sites))
    return (
        f'<p class="note">Effective weights (what the matmul sees) of {len(sites)} sites after step '
        f"{document.get('step', 0):,}. {escape(_overall(sites))}</p>"
        f'<div class="sites"><div class="scroll site-table" tabindex="0" role="region" aria-label="Sites">'
        f"<table><thead><tr>{_HEADINGS}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        f'<figure class="chart histogram"><figcaption><h3>Weight histogram</h3></figcaption>'
        f'<p class="controls"><label for="site">Site</label> <select id="site">{options}</select> '
        f'<label class="check"><input type="checkbox" id="log-counts"> log counts</label></p>'
        f"{draw_histogram(sites[0])}</figure></div>"
        '<p class="note">Zeros: share of exact zeros. 2 of 4: share of groups of four along the contraction '
        "dimension with at least two zeros. Levels: distinct values in the weight, and at most in one row. "
        "PQ index: how unequal the magnitudes of what is not zero are, from 0 (all equal) towards 1 (a few hold "
        "everything, so that most of the others can go).</p>"
        f"{_path_norms(document.get('path_norms') or {})}"
    )


def site_values(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What page.js needs to redraw the histogram."""
    return [
        {key: site[key] for key in ("name", "histogram", "low", "high")} | {"text": describe(site)}
        for site in document.get("sites") or []
    ]


def draw_histogram(site: dict[str, Any]) -> str:
    """Return the bars of one site's histogram with its axis and a line of text."""
    counts, low, high = site["histogram"], site["low"], site["high"]
    labels = "".join(
        f'<span style="left:{place}%">{escape(number(value))}</span>'
        for place, value in ((0, low), (50, (low + high) / 2), (100, high))
    )
    return (
        f'<div class="frame"><div class="y-labels" aria-hidden="true"></div>'
        f'<div class="plot" id="histogram" role="img" aria-label="{escape(describe(site), quote=True)}">'
        f'<svg viewBox="0 0 {len(counts)} 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="bars" d="{bars_path(counts)}"/></svg></div>'
        f'<div class="x-labels" id="histogram-axis" aria-hidden="true">{labels}</div></div>'
        f'<p class="note" id="histogram-text" aria-live="polite">{escape(describe(site))}</p>'
    )


def bars_path(counts: Sequence[int]) -> str:
    """SVG path of bars one unit wide, 1000 units high at the largest count."""
    top = max([*counts, 1])
    return "".join(f"M{i + 0.08:.2f} 1000V{1000 - 1000 * n / top:.1f}h0.84V1000Z" for i, n in enumerate(counts) if n)


def describe(site: dict[str, Any]) -> str:
    """One line about a site."""
    parts = [
        site["name"],
        " x ".join(str(n) for n in site["shape"]),
        f"{percent(site['zero_fraction'])} zeros",
        f"{_levels(site['num_levels'])} levels ({_levels(site['num_levels_per_row'])} a row)",
        f"largest magnitude {number(site['high'])}",
    ]
    if site.get("num_non_finite"):
        parts.append(f"{site['num_non_finite']:,} NOT FINITE")
    return ", ".join(parts)


def _row(index: int, site: dict[str, Any]) -> str:
    zeros = site["zero_fraction"]
    two_of_four = "" if site["two_of_four"] is None else percent(site["two_of_four"])
    levels = f"{_levels(site['num_levels'])} / {_levels(site['num_levels_per_row'])}"
    return (
        f'<tr data-site="{index}"><th scope="row"><code>{escape(_breakable(site["name"]))}</code></th>'
        f"<td>{escape(' + '.join(site['techniques']) or 'none')}</td>"
        f'<td class="num">{escape(" × ".join(f"{n:,}" for n in site["shape"]))}</td>'
        f'<td class="bar-cell"><span class="bar" aria-hidden="true"><i style="width:{100 * zeros:.1f}%"></i></span>'
        f'<span class="bar-value">{escape(percent(zeros))}</span></td>'
        f'<td class="num">{escape(two_of_four)}</td><td class="num">{escape(levels)}</td>'
        f'<td class="num">{"" if site.get("pq_index") is None else number(site["pq_index"])}</td></tr>'
    )


def _path_norms(norms: dict[str, float]) -> str:
    """A table of the MLPs' path norms."""
    if not norms:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(_breakable(name))}</code></th><td class="num">{number(value)}</td></tr>'
        for name, value in norms.items()
    )
    head = '<tr><th scope="col">MLP</th><th scope="col" class="num">Path norm</th></tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Path norms">'
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Path norm: sum over all paths through the MLP of the products of magnitudes along them. '
        "It bounds how much the MLP can put out, and falls as paths are pruned.</p>"
    )


def _breakable(name: str) -> str:
    """Let a dotted name wrap after its dots."""
    return name.replace(".", ".\u200b")


def _levels(number_of: int) -> str:
    return f"≥{_MANY_LEVELS}" if number_of >= _MANY_LEVELS else str(number_of)


def _overall(sites: Sequence[dict[str, Any]]) -> str:
    sizes = [_size(site["shape"]) for site in sites]
    zeros = sum(size * site["zero_fraction"] for size, site in zip(sizes, sites, strict=True))
    total = max(sum(sizes), 1)
    return f"Of their {count(total)} weights {percent(zeros / total)} are zero."


def _size(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
