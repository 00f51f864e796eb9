"""What all tests share: on machines that others use too, how long an example takes says nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
