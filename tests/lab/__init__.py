# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole realtime host in a virtual machine: built from Debian packages, booted under QEMU's TCG, driven by tests."""
