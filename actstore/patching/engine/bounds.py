"""How much is computed at once by packed rows: cells, variants, and what arrives along paths."""

from typing import Final

TOKENS_AT_ONCE: Final = 2048
"""Tokens that go through a layer in one call. More need memory for values within the layer, and are no faster."""
LOGITS_BYTES: Final = 64 << 20
"""Bytes of logits that are made at once; at least those of one cell."""
