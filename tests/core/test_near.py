"""What a number that does not divide may have meant."""

from leanmill.core.near import near_divisors


def test_divisors_on_both_sides():
    assert near_divisors(3, 8) == "2 or 4"
    assert near_divisors(5, 6) == "3 or 6"
    assert near_divisors(16, 8) == "8"
    assert near_divisors(4, 12, 18) == "3 or 6"
    assert near_divisors(2, 1) == "1"
