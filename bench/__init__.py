# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks: what rtpind costs. Figures are medians with min and max, from one run; see docs/benchmarks.md."""
