"""Write the pages of figures from benchmarks/results, so that they say what was measured, a column a processor."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "benchmarks" / "perf"), str(ROOT / "benchmarks" / "claims")]

from claims import CLAIMS  # noqa: E402
from options import DEFAULTS  # noqa: E402


KINDS = {
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512 with bf16",
    "amx": "AVX-512 with AMX",
}
"""Kinds of processor that have a folder of results, by name; others are named like their folder."""
DPO_CASES = {
    "cached": "reference kept before, ragged pairs",
    "asked": "reference asked at every step, ragged pairs",
    "cached_equal": "reference kept before, pairs of one length",
}
"""What the cases of `dpo_step` are."""
HEAD = """# Figures

Each number is a ratio taken side by side in one run, or a whole-process time. `make bench` runs every benchmark in
`benchmarks/perf` in the precision that the processor computes natively (`--precision` takes the other) and writes this
page; `benchmarks/results/` has what was measured, a folder a kind of processor, and the conditions below say what it
was measured under, repetitions included. Columns come from different machines: only numbers of one column compare.
Targets are what the project set itself; a missed one is bold.

Memory kept for backward is that of the technique less that of the dense model, over the fp32 weights: below 0 the
technique keeps less. Under autocast a dense linear layer keeps a bf16 copy of its weight, together 0.41 of this model's
fp32 weights, and each block one bf16 activation more (4,096 tokens x 320), together 0.44; a staged layer makes both
again.

"""

CLAIMS_HEAD = """# Claims

What papers say of their methods, asked of small models that read a small corpus once, three seeds a variant: a Llama
of 1.1M parameters on Python source, and mixtures of experts on Python, C++ and English. `make claims` trains all of
it; `benchmarks/claims/` has the recipes and the settings. Losses are held-out nats a token, lower is better. Runs of
one seed start from the same weights and read the same rows, so variants are compared seed by seed: an order *holds*
where the one is below the other in every seed, by more on average than that lead differs between seeds, *fails* where
it is above so, and is *unresolved* else: at this size an effect may be smaller than what seeds differ by, and then
nothing is said for or against the paper.
"""


@dataclass(frozen=True)
class Figure:
    """One number with the target it should stay at or below."""

    what: str
    value: float
    target: float
    unit: str = ""

    @property
    def cell(self) -> str:
        """The number, bold where it misses its target."""
        text = f"{self.value:.3g}{self.unit}"
        return text if self.value <= self.target else f"**{text}**"


def kinds() -> list[str]:
    """Kinds of processor with results, from the oldest instructions to the newest."""
    found = {path.name for path in RESULTS.iterdir() if any(path.glob("*.json"))}
    return [*(kind for kind in KINDS if kind in found), *sorted(found - set(KINDS))]


def load(kind: str, name: str) -> dict[str, Any] | None:
    """One benchmark's result, None where it has not been run."""
    path = RESULTS / kind / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def figures(kind: str) -> Iterator[Figure]:
    """Every figure with a target, of the results that exist."""
    yield from step_figures(kind)
    yield from command_figures(kind)
    yield from memory_figures(kind)
    yield from exchange_figures(kind)
    yield from model_figures(kind)


def step_figures(kind: str) -> Iterator[Figure]:
    """Of training steps, beside others' and beside dense ones."""
    for precision in ("fp32", "bf16"):
        if result := load(kind, f"step_time_{precision}"):
            found, bare = result["figures"], f"step time over a bare PyTorch loop, 15M Llama, {precision}"
            yield Figure(bare, found["leanmill_over_bare_loop"], 1.03)
            over_trainer = found["leanmill_over_transformers_trainer"]
            yield Figure(f"step time over transformers' Trainer, {precision}", over_trainer, 1.00)
        for num_micro_batches, target in ((1, 1.10), (2, 1.06)):
            yield from technique_figures(kind, precision, num_micro_batches, target)
        if result := load(kind, f"weight_stages_{precision}"):
            for name, over_dense in result["figures"]["over_dense"].items():
                bare = f"step time over dense, 2 micro-batches, {precision}, all in one run: `{name}`"
                yield Figure(bare, over_dense, 1.40 if name == "quest_w4a4" else 1.06)
    if result := load(kind, "callback_step"):
        over = result["figures"]["callback_over_trainer_and_technique"]
        yield Figure("transformers' Trainer with our callback, over it and the technique's own cost", over, 1.05)
    if result := load(kind, "distill_step"):
        for name in ("forward_kl", "js"):
            if over := result["figures"].get(f"{name}_over_student_and_teacher"):
                bare = f"step with distillation over the student's own and the teacher's forward, `{name}`"
                yield Figure(bare, over, 1.6)
    if result := load(kind, "dpo_step"):
        for name, what in DPO_CASES.items():
            if found := result["figures"].get(name):
                yield Figure(f"DPO step over TRL's DPOTrainer, {what}", found["leanmill_over_trl"], 0.9)
                apart = found["largest_difference_of_losses"]
                yield Figure(f"DPO loss off TRL's, {what}", apart, 1e-5)


def command_figures(kind: str) -> Iterator[Figure]:
    """Of commands, checkpoints and data."""
    if result := load(kind, "command_line"):
        yield Figure("`leanmill --help`", result["figures"]["help_seconds_median"], 0.6, " s")
        yield Figure("`leanmill check`", result["figures"]["check_seconds_median"], 1.5, " s")
    if result := load(kind, "checkpoint_stall"):
        stall = result["figures"]["asynchronous_stall_over_synchronous"]
        yield Figure("stall of an asynchronous save over a synchronous one", stall, 0.1)
    if result := load(kind, "data_prepare"):
        found = result["figures"]
        yield Figure("tokenising data to a folder, rate of the library alone over ours", 1 / found["ratio"], 1 / 0.8)
        yield Figure("first batch of a prepared run of 100M tokens", found["first_batch_seconds"], 2.0, " s")
    if result := load(kind, "data_scale"):
        largest, found = list(result["figures"]["rows"].items())[-1]
        yield Figure(f"memory of the order of {float(largest):,.0f} rows", found["memory_mib"], 16, " MiB")
        yield Figure(f"first row of {float(largest):,.0f}", found["first_row_seconds"], 0.1, " s")


def memory_figures(kind: str) -> Iterator[Figure]:
    """Of memory, measured beside what `plan` and formulas say."""
    if result := load(kind, "plan_memory"):
        for name, found in result["figures"].items():
            yield Figure(f"`plan` memory off the measured, {name}", abs(found["ratio"] - 1), 0.1)
    if result := load(kind, "adapter_memory"):
        found = result["figures"]
        lora, l4q = (found[name]["measured_bytes"] for name in ("lora", "l4q"))
        yield Figure("L4Q over LoRA, peak memory less that of a layer", (l4q - found["layer_bytes"]) / lora, 1.1)
        for name in ("lisa", "lisa, layers alone"):
            bare = f"{name}: peak memory off weights and what trains at once, times three"
            yield Figure(bare, abs(found[name]["ratio"] - 1), 0.1)
            off = found[name]["predicted_peak_bytes"] / found[name]["measured_bytes"] - 1
            yield Figure(f"{name}: `plan`'s peak off the measured", abs(off), 0.1)
    if result := load(kind, "compress_memory"):
        sizes = result["figures"]
        # Of two blocks, and of what goes into one and comes out of it.
        target = 2 + 2 * sizes["hidden_states_bytes"] / sizes["block_bytes"]
        for name, found in ((name, found) for name, found in sizes.items() if isinstance(found, dict)):
            bare = (
                f"`leanmill compress` of a model 4 times larger than its memory, {name}, most beyond the start, blocks"
            )
            yield Figure(bare, found["blocks_above_start"], target)


def exchange_figures(kind: str) -> Iterator[Figure]:
    """Of what ranks send each other."""
    if result := load(kind, "uneven_rows"):
        for name, found in result["figures"].items():
            bare = f"rows cut by document over even cuts, tokens that travel, {name}"
            yield Figure(bare, found["by_document_travelling_over_even"], 0.5)
            yield Figure(f"rows cut by document, idle share of {name}", found["by_document_idle_share"], 0.05)
    if result := load(kind, "router_balance"):
        for name, found in result["figures"].items():
            bare = f"synchronising the loads of experts over 4 ranks, share of a step, {name}"
            yield Figure(bare, found["extra_share_of_a_step"], 0.01)
    if result := load(kind, "low_comm_bytes"):
        found, streaming = result["figures"], "streaming_diloco e3m0"
        bare = (
            f"bytes a step over an all-reduce in every step, 4 workers, every {found['every_steps']} steps, {streaming}"
        )
        yield Figure(bare, found[streaming]["over_all_reduce"], 0.01)


def model_figures(kind: str) -> Iterator[Figure]:
    """Of layers, exports and what a model has learned."""
    if result := load(kind, "moe_layer"):
        for name, found in result["figures"].items():
            family, _, precision = name.rpartition("_")
            layer = f"{family} decoder layer over transformers' fastest backend"
            yield Figure(f"{layer}, step time, {precision}", found["ratio"], found["limit"])
            yield Figure(f"{layer}, peak memory, {precision}", found["memory_ratio"], 1.0)
    if result := load(kind, "packed_generation"):
        for packing, limit in (("ternary", 0.13), ("int4", 0.27)):
            found = result["figures"][packing]
            model = f"98M Llama, {packing} over bf16"
            yield Figure(f"{model}, time a token, one prompt, the same loop", 1 / found["speed_over_bf16"], 0.5)
            over_generate = 1 / found["speed_over_transformers_bf16"]
            yield Figure(f"{model}, time a token, one prompt, bf16 by transformers' generate", over_generate, 0.5)
            yield Figure(f"{model}, file", found["file_over_bf16"], limit)
    if result := load(kind, "quickstart"):
        for domain, share in result["figures"]["share_of_order0"].items():
            yield Figure(f"quick start, bits per byte over an order-0 byte model, {domain}", share, 0.45)


def technique_figures(kind: str, precision: str, num_micro_batches: int, target: float) -> Iterator[Figure]:
    """Step time of techniques over dense, and what they keep alive for backward."""
    several = num_micro_batches > 1
    result = load(kind, f"techniques_{precision}" + (f"_{num_micro_batches}_micro_batches" if several else ""))
    found = result["figures"] if result else {}
    of = f", {num_micro_batches} micro-batches a step" if several else ""
    for name in ("nm_sparsity_2_4", "ternary", "lsq"):
        if f"{name}_over_dense" in found:
            yield Figure(f"`{name}` step time over dense, {precision}{of}", found[f"{name}_over_dense"], target)
        if f"{name}_kept_for_backward_over_weights" in found and not several:
            kept = found[f"{name}_kept_for_backward_over_weights"]
            yield Figure(f"`{name}` memory kept for backward over the weights, {precision}", kept, 0.1)


def table(lead: list[str], rows: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """A markdown table of the leading cells of each row and a cell a kind of processor."""
    heads = [*lead, *(KINDS.get(kind, kind) for kind in kinds())]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for first, cells in rows.items():
        lines.append(f"| {' | '.join([*first, *(cells.get(kind, '') for kind in kinds())])} |")
    return lines


def figure_table() -> list[str]:
    """The table of all but the kernels."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for kind in kinds():
        for figure in figures(kind):
            rows.setdefault((figure.what, f"<= {figure.target:g}{figure.unit}"), {})[kind] = figure.cell
    return table(["what", "target"], rows)


def kernel_cell(found: dict[str, Any]) -> str:
    """Ratio, both times or sizes, and the ratio to the compiled definition."""
    unit = "ms" if "ours_ms" in found else "MiB"
    ratio = f"{found['ratio']:.3g}" if found["ratio"] <= found["limit"] else f"**{found['ratio']:.3g}**"
    text = f"{ratio} ({found[f'ours_{unit.lower()}']:.3g} / {found[f'peer_{unit.lower()}']:.3g} {unit})"
    return f"{text}; {found['ratio_to_compiled']:.3g}" if "ratio_to_compiled" in found else text


def kernel_table() -> list[str]:
    """Every measured kernel against its peers."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    measured = {
        kind: {
            name: found
            for path in sorted((RESULTS / kind).glob("kernels_*.json"))
            for name, found in json.loads(path.read_text(encoding="utf-8"))["figures"].items()
        }
        for kind in kinds()
    }
    # Conditions, peer and target as the newest kind has them.
    described = {name: found for by_name in measured.values() for name, found in by_name.items()}
    for name, last in described.items():
        lead = (name, last["conditions"], last["peer"], f"<= {last['limit']:g}")
        rows[lead] = {
            kind: kernel_cell(by_name[name] | {"limit": last["limit"]})
            for kind, by_name in measured.items()
            if name in by_name
        }
    return table(["operation", "conditions", "peer", "target"], rows)


def repetitions(path: Path) -> str:
    """How often a result was measured, and how often `make bench` does where that is another number."""
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    found = next(iter(found.values())) if path.stem == "router_balance" else found
    options = DEFAULTS.get(path.stem.removesuffix("_2_micro_batches").removesuffix("_fp32").removesuffix("_bf16"), {})
    said = ""
    for name, usual in options.items():
        other = "" if found[name] == usual else f" (`make bench`: {usual})"
        said += f", {found[name]} {name.replace('_', ' ')}{other}"
    return said


def conditions(kind: str) -> list[str]:
    """One line a result: date, processor, versions, load and command."""
    lines = []
    for path in sorted((RESULTS / kind).glob("*.json")):
        if path.stem.startswith("claims_"):
            continue
        if under := json.loads(path.read_text(encoding="utf-8")).get("conditions"):
            versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items() if version)
            parts = [
                under["date"],
                f"{under['processor']}, {under['num_cores']} cores, {under['torch_threads']} threads",
                f"load {under['load_average_at_start']:.1f} at start{repetitions(path)}; {versions}",
            ]
            if "command" in under:
                flags = " ".join(under["processor_flags"])
                parts.append(f"`{flags}`, torch uses {under['torch_cpu_capability']}; `{under['command']}`")
            lines.append(f"- `{path.stem}`: {', '.join(parts)}")
    return lines


def claims_page() -> str:
    """Every claim that was put to the test, a section a kind of processor."""
    text = CLAIMS_HEAD
    for kind in kinds():
        measured = [(name, found) for name in CLAIMS if (found := load(kind, f"claims_{name}"))]
        if measured:
            text += f"\n## {KINDS.get(kind, kind)}\n" + "".join(claim_section(*one) for one in measured)
    waiting = [
        claim.says for name, claim in CLAIMS.items() if not any(load(kind, f"claims_{name}") for kind in kinds())
    ]
    return text + "".join(["\n## Not measured yet\n\n", *(f"- {says}\n" for says in waiting)] if waiting else [])


def claim_section(name: str, result: dict[str, Any]) -> str:
    """One claim: losses of its variants by seed, and what they say of each neighbour in the claimed order."""
    claim, found, under = CLAIMS[name], result["figures"], result["conditions"]
    lines = [
        f"\n### {claim.says}\n",
        f"{claim.source}. {found['steps']} steps; {under['date']}, {under['processor']}.\n",
    ]
    also = found.get("also", {})
    read = {"loss": "losses of seeds ", "rejected": "share rejected, of seeds "}[claim.reads]
    lines += ["| ".join(["| variant ", read, "mean ", *(f"{what} " for what in also)]) + "|"]
    lines += ["|---" * (3 + len(also)) + "|"]
    for variant, losses in found["losses"].items():
        means = [sum(values) / len(values) for values in (losses, *(of[variant] for of in also.values()))]
        cells = [variant, ", ".join(f"{loss:.3f}" for loss in losses), *(f"{mean:.3f}" for mean in means)]
        lines.append(f"| {' | '.join(cells)} |")
    said = []
    for order in found["orders"]:
        side = "below" if order["gap"] >= 0 else "above"
        lead = f"{order['better']} {side} {order['worse']} by {abs(order['gap']):.3f}"
        said.append(f"{lead}, which seeds differ in by {order['spread']:.3f}: **{order['verdict']}**")
    for bound in found.get("bounds", []):
        verdict = "holds" if bound["holds"] else "fails"
        reached = f"{bound['variant']}: {bound['what']} {bound['most']:.3f} at most, allowed {bound['limit']:g}"
        said.append(f"{reached}: **{verdict}**")
    why = ["", claim.remark] if claim.remark else []
    return "\n".join([*lines, "", "; ".join(said) + ".", *why, ""])


def main() -> None:
    """Write all pages."""
    text = HEAD + "\n".join(figure_table()) + "\n"
    for kind in kinds():
        text += f"\n## Conditions, {KINDS.get(kind, kind)}\n\n" + "\n".join(conditions(kind)) + "\n"
    (ROOT / "docs" / "reference" / "figures.md").write_text(text, encoding="utf-8")
    kernels = "\n".join(kernel_table()) + "\n"
    (ROOT / "docs" / "kernels" / "figures.md").write_text(kernels, encoding="utf-8")
    (ROOT / "docs" / "reference" / "claims.md").write_text(claims_page(), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
