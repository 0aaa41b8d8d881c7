"""Experts of other ranks under activation checkpointing and in compiled code: same gradients, counted collectives."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from leanmill.models.activation_checkpointing import _received_contexts, _selective_contexts
from tests.distributed import run_ranks
from tests.parallel.dispatch_cases import Collectives, compare, experts_module, inputs, spread_module, together


GATHER, TRAVEL = "all_gather_into_tensor", "all_to_all_single"


def layers(module, function=None):
    """Two calls of the experts in a row, each recomputed."""
    options = {} if function is None else {"context_fn": function}

    def run(tokens, index, weights):
        for _ in range(2):
            tokens = tokens + checkpoint(module, tokens.tanh(), index, weights, use_reentrant=False, **options)
        return tokens

    return run


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("keeps", [None, _received_contexts, _selective_contexts], ids=["resend", "full", "selective"])
def test_recomputation_repeats_collectives_in_one_order_or_not_at_all(keeps, num_chunks):
    ranks = inputs([5, 2])

    def run():
        module = spread_module(num_chunks=num_chunks)
        with Collectives() as collectives:
            run = layers(module, keeps)
            found = ranks[dist.get_rank()].run_with(run, module)
        return found, collectives.names()

    (first, names), (second, others) = run_ranks(run, 2)
    assert names == others
    expected = together(ranks)
    plain = experts_module()
    compare([first, second], expected.run_with(layers(plain), plain), 1e-9)
    # A recomputation ends with the last tensor that backward needs, before the last chunk's results travel back.
    again = [] if keeps else [GATHER, *[TRAVEL] * (3 * num_chunks - 1)]
    forward, backward = [GATHER, *[TRAVEL] * 3 * num_chunks], [TRAVEL] * 3 * num_chunks
    assert sorted(names) == sorted(2 * (forward + again + backward))
    if num_chunks == 1:
        assert names == 2 * forward + 2 * [TRAVEL, *again, TRAVEL, TRAVEL]


@pytest.mark.slow
def test_a_compiled_caller_breaks_its_graph_at_the_exchange():
    ranks = inputs([5, 2])

    def run():
        module = spread_module()
        compiled = torch.compile(lambda *args: module(*args).tanh() * 2, backend="aot_eager")
        return ranks[dist.get_rank()].run_with(compiled, module)

    plain = experts_module()
    expected = together(ranks).run_with(lambda *args: plain(*args).tanh() * 2, plain)
    compare(run_ranks(run, 2), expected, 1e-9)
