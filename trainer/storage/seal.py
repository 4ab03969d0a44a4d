"""A checksum inside a JSON file, so that a byte flipped in it is found before it is believed."""

import hashlib
import json
from typing import Any

_FIELD = "sha256"


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with the SHA-256 of what they say, whatever their layout in a file."""
    return values | {_FIELD: _digest(values)}


def unseal(values: dict[str, Any]) -> dict[str, Any]:
    """What was sealed.

    Raises:
      ValueError: if the values are not those that were sealed.
    """
    content = {name: value for name, value in values.items() if name != _FIELD}
    if values.get(_FIELD) != _digest(content):
        raise ValueError(f"its content does not match its own {_FIELD}")
    return content


def _digest(values: dict[str, Any]) -> str:
    # Read back first, for JSON has neither tuples nor keys that are numbers.
    content = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
