"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no failure: no property has a time limit of its own.
settings.register_profile("diptych", deadline=None)
settings.load_profile("diptych")
