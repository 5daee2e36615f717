"""The translations of the nodes, read for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW")


def read(path: Path) -> dict[str, Any]:
    """A file of translations."""
    return json.loads(path.read_text(encoding="utf-8"))


def leaves(found: Any, above: str = "") -> dict[str, Any]:
    """The texts of nested objects by their keys, joined by dots."""
    if not isinstance(found, dict):
        return {above: found}
    return {key: text for name, value in found.items() for key, text in leaves(value, f"{above}.{name}").items()}
