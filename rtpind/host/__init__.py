# SPDX-License-Identifier: GPL-2.0-or-later
"""The outside, one module for one thing. Each is the only owner of its piece; roots are parameters, for tests."""
