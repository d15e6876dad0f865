# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m rtpind`` is the daemon."""

import sys

from rtpind.daemon.main import main

sys.exit(main())
