import pytest

from demo.run import wilson_lower_bound


def test_lower_bound_of_a_known_case():
    # Newcombe (1998), table I, 95 % Wilson interval without continuity correction: 81 of 263 is 0.2553 to 0.3662.
    assert wilson_lower_bound(81 / 263, 263) == pytest.approx(0.2553, abs=5e-5)


def test_more_trials_narrow_the_interval():
    assert wilson_lower_bound(0.6, 100) < wilson_lower_bound(0.6, 1000) < 0.6
