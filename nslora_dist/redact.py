"""Keeps secrets out of what is shown or written: values from the environment, hub tokens, passwords in addresses."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "(redacted)"
"""Plain text in Markdown, YAML and an address alike."""
SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "CREDENTIAL")
SHORTEST = 8
"""Of a value that is masked: a shorter one would be found inside other words."""
HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@:'\"]*:[^\s/'\"]+@")


def redact(text: str) -> str:
    """``text`` with every secret in it masked.

    Masked are the values of environment variables whose names say that they are secret, what looks like a token of the
    hub, and user and password in an address.
    """
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return LOGIN.sub(rf"\1{MASK}@", HUB_TOKEN.sub(MASK, text))


def redact_all(value: Any) -> Any:
    """``value`` with every text in it redacted, the keys of mappings too; what is no text stays as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def _secrets() -> list[str]:
    """The longest first: one may be a part of another."""
    found = set()
    for name, value in os.environ.items():
        says_so = any(word in name.upper().replace("TOKENIZER", "") for word in SECRET_NAMES)
        # A folder of credentials is no secret, and masking it would spoil every path below it.
        if says_so and len(value) >= SHORTEST and not (os.path.isabs(value) and Path(value).exists()):
            found.add(value)
    return sorted(found, key=len, reverse=True)
