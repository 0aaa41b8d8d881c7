"""Routers whose rule is known: by token, by the token before, by position, by something of the context, by chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from leanmill.study.dependence import Dependence, dependence
from leanmill.study.routed import Ids, Routed


NUM_EXPERTS, TOP_K, VOCAB, ROWS, LENGTH = 8, 2, 40, 60, 64


def tokens(seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH))


def routed(expert_of: Callable[[Ids], Ids], **changes) -> Routed:
    """Two experts a token: the rule's, and the next one."""
    ids = tokens()
    first = expert_of(ids) % NUM_EXPERTS
    experts = np.stack([first, (first + 1) % NUM_EXPERTS], axis=-1)
    fields = {"tokens": ids, "experts": experts, "is_real": np.ones_like(ids, dtype=bool), "num_experts": NUM_EXPERTS}
    return Routed(**{**fields, **changes})


def found(one: Routed) -> Dependence:
    result = dependence(one)
    assert result is not None
    return result


def previous(ids: Ids) -> Ids:
    return np.roll(ids, 1, axis=1)


def test_by_token():
    result = found(routed(lambda ids: ids * 7))
    assert result.token > 0.6  # two experts a token, each with half: ln 2 of ln 8 is left
    assert result.token == pytest.approx(1 - np.log(2) / np.log(8), abs=0.02)
    assert result.agreement == 1
    assert result.previous_token < 0.02
    assert result.position < 0.02


def test_by_the_token_before():
    result = found(routed(lambda ids: previous(ids) * 7))
    assert result.previous_token == pytest.approx(1 - np.log(2) / np.log(8), abs=0.02)
    assert result.token < 0.02
    assert result.agreement < 0.35  # chance is 1/8, favourites of few occurrences


def test_by_position():
    result = found(routed(lambda ids: np.broadcast_to(np.arange(LENGTH) // 8, ids.shape)))
    assert result.position == pytest.approx(1 - np.log(2) / np.log(8), abs=0.02)
    assert result.token < 0.02


def test_one_expert_a_token_is_explained_whole():
    ids = tokens()
    result = found(routed(lambda ids: ids, experts=(ids % NUM_EXPERTS)[..., None]))
    assert result.token > 0.95
    assert result.agreement == 1


def test_by_context_or_chance_nothing_is_explained():
    noise = np.random.default_rng(1).integers(0, NUM_EXPERTS, (ROWS, LENGTH))
    result = found(routed(lambda ids: noise))
    assert max(result.token, result.previous_token, result.position) < 0.01


def test_rare_ids_do_not_look_predictable():
    """Every id twice: in one sample alone counts would explain almost everything."""
    ids = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) // 2
    ids = np.random.default_rng(2).permutation(ids.ravel()).reshape(ROWS, LENGTH)
    noise = np.random.default_rng(3).integers(0, NUM_EXPERTS, (ROWS, LENGTH, TOP_K))
    assert found(routed(lambda _: noise[..., 0], tokens=ids, experts=noise)).token < 0.01


def test_half_by_token_lies_between():
    noise = np.random.default_rng(1)
    by_token = noise.random((ROWS, LENGTH)) < 0.5
    result = found(routed(lambda ids: np.where(by_token, ids, noise.integers(0, NUM_EXPERTS, ids.shape))))
    assert 0.05 < result.token < 0.5
    assert result.agreement == pytest.approx(0.5 + 0.5 / NUM_EXPERTS, abs=0.05)
    assert result.agreement_by_chance == pytest.approx(1 / NUM_EXPERTS, abs=0.05)


def test_padding_and_dropped_choices_do_not_count():
    clean = routed(lambda ids: ids * 7)
    is_real = np.ones((ROWS, LENGTH), dtype=bool)
    is_real[:, LENGTH // 2 :] = False
    garbage = clean.experts.copy()
    garbage[:, LENGTH // 2 :] = np.random.default_rng(5).integers(0, NUM_EXPERTS, garbage[:, LENGTH // 2 :].shape)
    garbage[::3, 5, 1] = NUM_EXPERTS  # dropped second choices
    result = found(routed(lambda ids: ids, experts=garbage, is_real=is_real))
    assert result.token == pytest.approx(1 - np.log(2) / np.log(8), abs=0.03)
    assert result.agreement == 1
    assert result.num_tokens <= ROWS // 2 * LENGTH // 2


def test_all_to_one_expert_leaves_nothing_to_explain():
    result = found(routed(lambda ids: np.zeros_like(ids), experts=np.zeros((ROWS, LENGTH, 1), dtype=np.int64)))
    assert (result.token, result.previous_token, result.position) == (0, 0, 0)
    assert result.agreement == result.agreement_by_chance == 1


def test_too_little_text_says_nothing():
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH)
    few = Routed(
        tokens=ids,
        experts=np.zeros((2, LENGTH, 1), dtype=np.int64),
        is_real=np.ones_like(ids, dtype=bool),
        num_experts=NUM_EXPERTS,
    )
    assert dependence(few) is None
