# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schemas that rtpind promises: of the policy file, and of each command's ``--json``."""

import json
from importlib import resources
from typing import Any


def load(name: str) -> dict[str, Any]:
    """Return the schema ``NAME.json`` of this folder; FileNotFoundError if there is none."""
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
