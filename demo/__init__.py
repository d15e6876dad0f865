# SPDX-License-Identifier: GPL-2.0-or-later
"""Throwaway guests on the real libvirt, for the demonstration and for the live tests."""
