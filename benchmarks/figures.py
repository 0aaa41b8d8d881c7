"""Write docs/reference/figures.md from benchmarks/results, so that the page says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "perf"))

from options import DEFAULTS  # noqa: E402


HEAD = """# Figures

Each number is a ratio taken side by side in one run, or a whole-process time. `make bench` runs every benchmark in
`benchmarks/perf` in the precision that the processor computes natively (`--precision` takes the other) and writes this
page; `benchmarks/results/` has what was measured, and [Conditions](#conditions) what it was measured under, repetitions
included. Targets are what the project set itself; a missed one is shown as missed.

Memory kept for backward is that of the technique less that of the dense model, over the fp32 weights: below 0 the
technique keeps less. Under autocast a dense linear layer keeps a bf16 copy of its weight, together 0.41 of this model's
fp32 weights, and each block one bf16 activation more (4,096 tokens x 320), together 0.44; a staged layer makes both
again.

"""


def load(name: str) -> dict[str, Any] | None:
    """One benchmark's result, None where it has not been run."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def row(what: str, value: float, target: float, unit: str = "") -> str:
    """A line of the table; smaller is better."""
    verdict = "met" if value <= target else "**missed**"
    return f"| {what} | {value:.3g}{unit} | <= {target:g}{unit} | {verdict} |"


def rows() -> list[str]:
    """Every figure with a target, of the results that exist."""
    found: list[str] = []
    for precision in ("fp32", "bf16"):
        if result := load(f"step_time_{precision}"):
            figures = result["figures"]
            found.append(
                row(
                    f"step time over a bare PyTorch loop, 15M Llama, {precision}",
                    figures["leanmill_over_bare_loop"],
                    1.03,
                )
            )
            over_trainer = figures["leanmill_over_transformers_trainer"]
            found.append(row(f"step time over transformers' Trainer, {precision}", over_trainer, 1.00))
        if result := load(f"techniques_{precision}"):
            for name in ("nm_sparsity_2_4", "ternary"):
                figures = result["figures"]
                found.append(row(f"`{name}` step time over dense, {precision}", figures[f"{name}_over_dense"], 1.15))
                kept = figures[f"{name}_kept_for_backward_over_weights"]
                found.append(row(f"`{name}` memory kept for backward over the weights, {precision}", kept, 0.1))
    if result := load("command_line"):
        found.append(row("`leanmill --help`", result["figures"]["help_seconds_median"], 0.6, " s"))
        found.append(row("`leanmill check`", result["figures"]["check_seconds_median"], 1.5, " s"))
    if result := load("checkpoint_stall"):
        stall = result["figures"]["asynchronous_stall_over_synchronous"]
        found.append(row("stall of an asynchronous save over a synchronous one", stall, 0.1))
    if result := load("plan_memory"):
        for name, figures in result["figures"].items():
            found.append(row(f"`plan` memory off the measured, {name}", abs(figures["ratio"] - 1), 0.1))
    if result := load("quickstart"):
        for domain, share in result["figures"]["share_of_order0"].items():
            found.append(row(f"quick start, bits per byte over an order-0 byte model, {domain}", share, 0.45))
    return found


def kernel_rows() -> list[str]:
    """Every measured kernel against its peer."""
    found: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("kernels_*.json")):
        for name, figures in json.loads(path.read_text(encoding="utf-8"))["figures"].items():
            if "ours_ms" in figures:
                ours, peer = f"{figures['ours_ms']:.3g} ms", f"{figures['peer_ms']:.3g} ms"
            else:
                ours, peer = f"{figures['ours_mib']:.3g} MiB", f"{figures['peer_mib']:.3g} MiB"
            verdict = "met" if figures["ratio"] <= figures["limit"] else "**missed**"
            found.append(
                f"| {name} | {figures['conditions']} | {ours} | {figures['peer']}: {peer} | "
                f"{figures['ratio']:.3g} | <= {figures['limit']:g} | {verdict} |"
            )
    return found


def write_kernels() -> None:
    """Write the table that the kernels page includes."""
    head = ["| operation | conditions | ours | peer | ratio | target | |", "|---|---|---|---|---|---|---|"]
    text = "\n".join([*head, *kernel_rows()]) + "\n"
    (ROOT / "docs" / "kernels" / "figures.md").write_text(text, encoding="utf-8")


def repetitions(path: Path) -> str:
    """How often a result was measured, and how often `make bench` does where that is another number."""
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    options = DEFAULTS.get(path.stem.removesuffix("_fp32").removesuffix("_bf16"), {})
    said = ""
    for name, usual in options.items():
        other = "" if figures[name] == usual else f" (`make bench`: {usual})"
        said += f", {figures[name]} {name.replace('_', ' ')}{other}"
    return said


def conditions() -> list[str]:
    """One line a result: date, processor, versions, load."""
    lines = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        under = json.loads(path.read_text(encoding="utf-8")).get("conditions")
        if under:
            versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items() if version)
            lines.append(
                f"- `{path.stem}`: {under['date']}, {under['processor']}, {under['num_cores']} cores, "
                f"{under['torch_threads']} threads, load {under['load_average_at_start']:.1f} at start"
                f"{repetitions(path)}; {versions}"
            )
    return lines


def main() -> None:
    """Write the page."""
    table = ["| what | measured | target | |", "|---|---|---|---|", *rows()]
    text = HEAD + "\n".join(table) + "\n\n## Conditions\n\n" + "\n".join(conditions()) + "\n"
    (ROOT / "docs" / "reference" / "figures.md").write_text(text, encoding="utf-8")
    write_kernels()
    print(text)


if __name__ == "__main__":
    main()
