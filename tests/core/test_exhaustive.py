# SPDX-License-Identifier: GPL-2.0-or-later
"""A slice of the exhaustive check: policies of a small grammar, guests that come and go in every order."""

import exhaustive


def test_no_order_of_arrivals_and_departures_breaks_a_promise():
    """Whatever the policy, and whoever comes or goes: no violation, nobody loses a place, and all comes to rest."""
    policies, decisions, wrong = exhaustive.run(["2 cores x 2", "4 cores"], [(1, 2, 1)], step=211)

    assert wrong == []
    assert policies >= 6
    assert decisions > 100
