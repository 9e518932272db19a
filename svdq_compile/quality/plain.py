"""Numbers for JSON, which knows neither NaN nor infinity."""

from __future__ import annotations

import math
from typing import Any


def finite_or_none(data: dict[str, Any]) -> dict[str, Any]:
    """The same mapping with None for every float that is NaN or infinite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
