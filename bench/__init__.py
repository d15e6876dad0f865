# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks: what rtpind costs, and what it does beside others; see docs/benchmarks.md."""
