"""Packing against a naive reference, and its invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.data.orders import permutation
from leanmill.data.packing import NONE, ShuffledRows, SplitPacker, WholePacker, best_fit


LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=20)


def offsets_of(lengths):
    return np.cumsum([0, *lengths], dtype=np.int64)


def whole_packer(lengths, size, *, document_mask=True, seed=0):
    offsets = offsets_of(lengths)
    return WholePacker(offsets[:-1], np.minimum(np.diff(offsets), size), size, document_mask=document_mask, seed=seed)


def naive_stream(lengths, seed, num_tokens):
    """(flat token index, starts a document) of the endless concatenation, one token at a time."""
    offsets, found, epoch = offsets_of(lengths), [], 0
    while len(found) < num_tokens:
        for document in permutation(len(lengths), seed, epoch):
            found += [(i, i == offsets[document]) for i in range(offsets[document], offsets[document + 1])]
        epoch += 1
    return found


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 17), st.integers(0, 5), st.booleans())
def test_split_packer_equals_token_by_token_packing(lengths, size, seed, document_mask):
    packer = SplitPacker(offsets_of(lengths), size, document_mask=document_mask, seed=seed)
    num_rows = 7
    stream = naive_stream(lengths, seed, num_rows * size + 1)
    for number in reversed(range(num_rows)):  # random access: no row needs the one before it
        plan = packer.row(number)
        position = 0
        for t in range(size):
            index, starts = stream[number * size + t]
            following, next_starts = stream[number * size + t + 1]
            position = 0 if t == 0 or (starts and document_mask) else position + 1
            assert plan.inputs[t] == index
            assert plan.targets[t] == (NONE if document_mask and next_starts else following)
            assert plan.positions[t] == position


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(2, 17), st.integers(0, 5))
def test_split_packer_trains_every_token_once_an_epoch(lengths, size, seed):
    packer = SplitPacker(offsets_of(lengths), size, document_mask=True, seed=seed)
    total = sum(lengths)
    num_epochs = 2
    rows = [packer.row(number) for number in range(-(-num_epochs * total // size))]
    inputs = np.concatenate([row.inputs for row in rows])[: num_epochs * total]
    targets = np.concatenate([row.targets for row in rows])[: num_epochs * total]
    for epoch in range(num_epochs):
        assert sorted(inputs[epoch * total : (epoch + 1) * total]) == list(range(total))
        first_tokens = set(offsets_of(lengths)[:-1].tolist())
        predicted = [t for t in targets[epoch * total : (epoch + 1) * total] if t != NONE]
        assert sorted(predicted) == sorted(set(range(total)) - first_tokens)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 23), st.integers(0, 5), st.integers(0, 3))
def test_whole_packer_keeps_every_document_whole_once_an_epoch(lengths, size, seed, epoch):
    packer, offsets = whole_packer(lengths, size, seed=seed), offsets_of(lengths)
    seen = []
    for number in range(epoch * packer.rows_per_epoch, (epoch + 1) * packer.rows_per_epoch):
        plan = packer.row(number)
        starts = [t for t in range(size) if plan.positions[t] == 0]
        for start, stop in zip(starts, [*starts[1:], size], strict=True):
            piece = plan.inputs[start:stop]
            if piece[0] == NONE:
                assert (piece == NONE).all()
                assert (plan.targets[start:stop] == NONE).all()
                assert stop == size
                continue
            document = int(np.searchsorted(offsets, piece[0], side="right")) - 1
            kept = min(lengths[document], size)
            assert piece.tolist() == list(range(offsets[document], offsets[document] + kept))
            assert plan.targets[start:stop].tolist() == [*piece[1:].tolist(), NONE]
            assert plan.positions[start:stop].tolist() == list(range(kept))
            seen.append(document)
    assert sorted(seen) == list(range(len(lengths)))


def test_whole_packer_without_a_mask_predicts_across_documents_but_not_padding():
    plan = whole_packer([3, 2], 7, document_mask=False).row(0)
    assert plan.inputs.tolist() == [0, 1, 2, 3, 4, NONE, NONE]
    assert plan.targets.tolist() == [1, 2, 3, 4, NONE, NONE, NONE]
    assert plan.positions.tolist() == list(range(7))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_best_fit_overfills_no_row_and_wastes_little(lengths):
    lengths = np.asarray(lengths)
    rows = best_fit(lengths, permutation(len(lengths), 0, 0), 40)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= 40
    # No two rows could have been one: the guarantee of every any-fit rule.
    assert all(a + b > 40 for i, a in enumerate(filled) for b in filled[:i] if len(filled) > 1)


def test_order_differs_by_epoch_and_seed_and_is_a_permutation():
    orders = [permutation(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_order_never_changes_between_versions():
    assert permutation(10, 1234, 3).tolist() == GOLDEN


GOLDEN = [0, 1, 8, 4, 3, 5, 2, 6, 7, 9]


@pytest.mark.parametrize("size", [2, 3, 64])
def test_a_document_longer_than_a_row_continues_in_the_next(size):
    packer = SplitPacker(offsets_of([200]), size, document_mask=True, seed=0)
    first, second = packer.row(0), packer.row(1)
    assert first.targets[-1] == size == second.inputs[0]
    assert second.positions[0] == 0


def test_shuffled_rows_are_the_same_rows_in_an_order_of_each_block():
    packer = SplitPacker(np.array([0, 7, 30, 41, 90, 101]), 8, document_mask=True, seed=3)
    shuffled, size = ShuffledRows(packer, seed=3), packer.rows_per_epoch
    orders = []
    for block in range(2):
        numbers = range(block * size, (block + 1) * size)
        plain = [tuple(packer.row(number).targets) for number in numbers]
        mixed = [tuple(shuffled.row(number).targets) for number in numbers]
        assert sorted(mixed) == sorted(plain)
        orders.append([plain.index(row) for row in mixed])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    other = ShuffledRows(packer, seed=4)
    assert [tuple(other.row(n).targets) for n in range(size)] != [tuple(shuffled.row(n).targets) for n in range(size)]
    assert tuple(shuffled.row(5).targets) == tuple(shuffled.row(5).targets)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 17), st.booleans())
def test_many_documents_are_cut_where_they_lie(lengths, size, document_mask):
    packer = SplitPacker(offsets_of(lengths), size, document_mask=document_mask, seed=1, max_shuffled=0)
    total = sum(lengths)
    starts = set(np.cumsum([0, *lengths]).tolist())
    for number in reversed(range(5)):
        plan = packer.row(number)
        position = 0
        for t in range(size):
            index = (number * size + t) % total
            following = (index + 1) % total
            position = 0 if t == 0 or (index in starts and document_mask) else position + 1
            assert plan.inputs[t] == index
            assert plan.targets[t] == (NONE if document_mask and following in starts else following)
            assert plan.positions[t] == position


def test_rows_of_many_are_each_read_once():
    packer = SplitPacker(np.array([0, 7, 30, 41, 90, 101]), 8, document_mask=True, seed=3, max_shuffled=0)
    shuffled, size = ShuffledRows(packer, seed=3, table_size=0), packer.rows_per_epoch
    for block in range(3):
        found = sorted(shuffled.row(block * size + place).inputs.tolist() for place in range(size))
        assert found == sorted(packer.row(block * size + place).inputs.tolist() for place in range(size))
    assert [shuffled.row(place).inputs[0] for place in range(size)] != [
        packer.row(place).inputs[0] for place in range(size)
    ]
