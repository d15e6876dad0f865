# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop: observe → place → plan → apply → audit, woken by events and by a timer."""
