# SPDX-License-Identifier: GPL-2.0-or-later
"""What decides. Pure: values in, values out; no module here may import the outside (import-linter checks)."""
