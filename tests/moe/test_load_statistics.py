"""What loads say, against cases whose answer is known, and the divergence against its definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leanmill.moe.load_statistics import load_entropy, max_violation, num_dead, silent_domains, specialisation


def test_equal_loads_violate_nothing():
    assert max_violation([7, 7, 7]) == 0
    assert load_entropy([7, 7, 7]) == pytest.approx(1)
    assert num_dead([7, 7, 7]) == 0


def test_one_expert_with_everything():
    assert max_violation([0, 12, 0, 0]) == 3
    assert load_entropy([0, 12, 0, 0]) == 0
    assert num_dead([0, 12, 0, 0]) == 3


def test_uneven_loads_by_hand():
    assert max_violation([1, 2, 5]) == pytest.approx(5 / (8 / 3) - 1)
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert load_entropy([1, 2, 5]) == pytest.approx(entropy / math.log(3))


def test_without_tokens_and_with_one_expert():
    assert (max_violation([0, 0]), load_entropy([0, 0]), num_dead([0, 0])) == (0, 1, 2)
    assert (max_violation([5]), load_entropy([5])) == (0, 1)


def test_domains_that_share_no_expert_are_told_apart():
    assert specialisation({"a": [3, 1, 0, 0, 0], "b": [0, 0, 9, 0, 0], "c": [0, 0, 0, 2, 2]}) == pytest.approx(1)


def test_domains_that_are_alike_are_not():
    assert specialisation({"a": [1, 2, 3], "b": [10, 20, 30], "c": [2, 4, 6]}) == pytest.approx(0, abs=1e-12)


def test_is_the_share_of_a_token_s_domain_that_its_expert_gives_away():
    counts = np.random.default_rng(0).integers(0, 50, (3, 5))
    joint = counts / counts.sum(1, keepdims=True) / 3  # a domain at random, then a token of it
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = sum(p * math.log(p / q) for p, q in zip(joint.ravel(), product.ravel(), strict=True) if p > 0)
    found = specialisation(dict(zip("abc", counts.tolist(), strict=True)))
    assert found == pytest.approx(information / math.log(3))


def test_how_much_text_a_domain_has_does_not_matter():
    one = {"a": [3, 1, 2], "b": [1, 5, 1]}
    assert specialisation(one) == pytest.approx(specialisation({**one, "b": [100, 500, 100]}))


def test_a_domain_without_tokens_is_left_out():
    two = {"a": [3, 1, 2], "b": [1, 5, 1]}
    assert specialisation({**two, "none": [0, 0, 0]}) == pytest.approx(specialisation(two))
    assert specialisation({"a": [3, 1, 2], "none": [0, 0, 0]}) is None
    assert silent_domains({"a": [[0, 0], [1, 0]], "none": [[0, 0], [0, 0]]}) == ["none"]
