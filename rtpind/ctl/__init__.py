# SPDX-License-Identifier: GPL-2.0-or-later
"""rtpinctl: one module for one command, over what the daemon says or, without one, over a look of its own."""
