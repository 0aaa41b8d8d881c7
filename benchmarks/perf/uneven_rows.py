"""Uneven documents over ranks: what padding, packing, even cuts and cuts by document leave idle or send.

Lengths are those of the local corpus (the standard library's Python sources, tokenised), packed by the run's own code.
Work is counted, not timed: a token's own, and its pairs with what it sees (`leanmill.parallel.context_shares`), of a
Llama of 1B parameters. A micro-batch has 8,192 tokens a rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

from machine import conditions, write_result

from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, LocalCorpus
from leanmill.parallel.context_rows import documents
from leanmill.parallel.context_shares import balance_of, choose_shares, work


TOKENS_OF_RANK, NUM_RANKS = 8192, (4, 8, 32)
LAYERS, HIDDEN, VOCAB_SIZE, NUM_WEIGHTS = 16, 2048, 128_256, 973e6
PAIR_COST = 2.0 * HIDDEN * LAYERS / (NUM_WEIGHTS + VOCAB_SIZE * HIDDEN)


def batches(sequence_length: int, num_batches: int) -> Iterator[list[int]]:
    """Lengths of the documents of one row each."""
    config = DataConfig(source=LocalCorpus(domains={"python": 1.0}), sequence_length=sequence_length)
    data = build_train_data(config, build_tokenizer(config), seed=0)
    for _ in range(num_batches):
        yield [length for _, length in documents(data.next_rows(1))]


def padded(lengths: list[int]) -> tuple[int, int]:
    """Tokens, and places of rows of 8,192 with one document each, longer ones cut."""
    pieces = [min(TOKENS_OF_RANK, length - first) for length in lengths for first in range(0, length, TOKENS_OF_RANK)]
    return sum(pieces), len(pieces) * TOKENS_OF_RANK


def packed(lengths: list[int]) -> tuple[float, float]:
    """Idle share of ranks with a row of 8,192 each of one long stream, and share of tokens in documents cut by rows."""
    loads, cut, room, load = [], 0, TOKENS_OF_RANK, 0.0
    for length in lengths:
        left = length
        while left:
            taken = min(left, room)
            load += work(taken, PAIR_COST)
            left, room = left - taken, room - taken
            if not room:
                loads.append(load)
                room, load = TOKENS_OF_RANK, 0.0
        cut += length * (length > TOKENS_OF_RANK)
    return 1 - sum(loads) / (len(loads) * max(loads)), cut / sum(lengths)


def measure(num_ranks: int, num_batches: int) -> dict[str, Any]:
    """Shares of a micro-batch, means over several."""
    real = places = 0
    rows: dict[str, list[float]] = {
        name: [] for name in ("packed_idle", "packed_cut", "idle", "travelling", "bound", "cut", "solver_ms")
    }
    for lengths in batches(num_ranks * TOKENS_OF_RANK, num_batches):
        tokens, padded_places = padded(lengths)
        real, places = real + tokens, places + padded_places
        idle, cut = packed(lengths)
        began = time.perf_counter()
        shares = choose_shares(lengths, num_ranks, PAIR_COST)
        seconds = time.perf_counter() - began
        found = balance_of(lengths, shares, num_ranks, PAIR_COST)
        is_cut = sum(share.degree > 1 for share in shares) / len(shares)
        values = (idle, cut, found.idle, found.travelling, found.bound, is_cut, 1e3 * seconds)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    means = {name: statistics.mean(values) for name, values in rows.items()}
    return {
        "padding_share": 1 - real / places,
        "packing_idle_share": means["packed_idle"],
        "packing_tokens_of_documents_cut_by_rows": means["packed_cut"],
        "even_travelling_share": 1 - 1 / num_ranks,
        "by_document_travelling_share": means["travelling"],
        "by_document_travelling_over_even": means["travelling"] / (1 - 1 / num_ranks),
        "by_document_idle_share": means["idle"],
        "by_document_last_rank_over_best_possible": max(rows["bound"]),
        "documents_cut_share": means["cut"],
        "choosing_ms": means["solver_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=50, help="micro-batches of each number of ranks")
    args = parser.parse_args()
    measured_under = conditions()
    figures = {f"{num_ranks} ranks": measure(num_ranks, args.batches) for num_ranks in NUM_RANKS}
    write_result("uneven_rows", figures, measured_under)


if __name__ == "__main__":
    main()
