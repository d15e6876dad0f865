# SPDX-License-Identifier: GPL-2.0-or-later
"""rtpind keeps every thread of realtime KVM guests on its pCPUs and at its priority."""

from pathlib import Path

__version__ = "0.1.0"

#: Where the host's policy is.
POLICY_FILE = Path("/etc/rtpind.yaml")

#: The exit code for a policy with problems: sysexits.h. systemd does not restart after it (RestartPreventExitStatus=).
EXIT_CONFIG = 78
