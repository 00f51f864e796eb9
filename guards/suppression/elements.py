"""A text as elements: its complete characters, and ``RAW + byte`` for each byte that is not part of one.

Such bytes are half a character at either end of a token, or garbage.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RAW = 0x110000
"""Elements from here on are single bytes that are not part of a complete character."""
ELEMENTS = RAW + 256
ABSENT = -1
"""Marks positions without an element in a padded matrix."""
BREAK = RAW + 0xFF
"""A byte that no text has: nothing is read across it."""


def code_points(text: str) -> np.ndarray:
    """[N] uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def join_bytes(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Put the bytes of characters together that were cut into pieces, tolerating anything.

    Args:
        elements: [N, L] int64, ``RAW + byte`` for single bytes, ``ABSENT`` where a row has nothing (padding at either end).

    Returns:
        ``elements`` [N, L] int64 and ``there`` [N, L] bool, True where an element starts. Bytes that are part of no complete,
        valid UTF-8 character stay elements of their own.
    """
    raw = elements >= RAW
    length = elements.shape[1]
    byte = torch.where(raw, elements - RAW, ABSENT)
    padded = torch.nn.functional.pad(byte, (0, 3), value=ABSENT)
    second, third, fourth = (padded[:, i : i + length] for i in (1, 2, 3))

    def continues(each: Tensor) -> Tensor:
        return (each >= 0x80) & (each < 0xC0)

    two = (byte >= 0xC2) & (byte < 0xE0) & continues(second)
    three_value = ((byte & 0x0F) << 12) | ((second & 0x3F) << 6) | (third & 0x3F)
    three = (byte >= 0xE0) & (byte < 0xF0) & continues(second) & continues(third)
    three &= (three_value >= 0x800) & ~((three_value >= 0xD800) & (three_value < 0xE000))
    four_value = ((byte & 0x07) << 18) | ((second & 0x3F) << 12) | ((third & 0x3F) << 6) | (fourth & 0x3F)
    four = (byte >= 0xF0) & (byte < 0xF5) & continues(second) & continues(third) & continues(fourth)
    four &= (four_value >= 0x10000) & (four_value < RAW)

    joined = torch.where(two, ((byte & 0x1F) << 6) | (second & 0x3F), elements)
    joined = torch.where(three, three_value, joined)
    joined = torch.where(four, four_value, joined)

    covered = torch.zeros_like(two)
    covered[:, 1:] |= (two | three | four)[:, :-1]
    covered[:, 2:] |= (three | four)[:, :-2]
    covered[:, 3:] |= four[:, :-3]
    return joined, (elements != ABSENT) & ~covered


def elements_of_bytes(text: Tensor) -> Tensor:
    """[N, L] int64 elements of [N, L] byte values (``ABSENT`` where there is none), not joined: see `join_bytes`."""
    return torch.where(text >= 0x80, text + RAW, text)


def waiting_bytes(raw: list[int]) -> bytes:
    """The end of some byte values that is the beginning of a character, as long as the next bytes may complete it."""
    for size in (1, 2, 3):
        end = bytes(raw[-size:])
        if len(end) == size and end[0] >= 0xC2:
            needed = 2 if end[0] < 0xE0 else 3 if end[0] < 0xF0 else 4 if end[0] < 0xF5 else 0
            if needed > size and all(0x80 <= byte < 0xC0 for byte in end[1:]):
                return end
    return b""
