"""Telephone numbers with their country: how else the same number is written.

Covered: numbers that begin with a plus or ``00`` and are possible in their country, in any script's digits. Not covered: numbers
without a country, which could be any country's.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Telephone:
    country: str  # its code, digits
    number: str  # within the country, digits, without what is dialled before it there
    national: str  # as it is written in the country

    @property
    def dialled(self) -> str:
        """Digits as they are dialled within the country."""
        return "".join(filter(str.isdigit, self.national))


def telephone_of(text: str) -> Telephone | None:
    """The number that a text is; None if it is none."""
    text = unicodedata.normalize("NFKC", text).strip()
    if text.startswith("00"):
        text = f"+{text[2:]}"
    if not text.startswith("+"):
        return None
    import phonenumbers  # metadata of every country: only where a set holds such a number

    try:
        number = phonenumbers.parse(text)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_possible_number(number):
        return None
    national = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
    return Telephone(str(number.country_code), phonenumbers.national_significant_number(number), national)
