"""The state of each entry, as people see it."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """One word for each entry; the reason goes with it."""

    AVAILABLE = "Available"
    BOUND = "Bound"
    RELEASED = "Released"
    """Kept, because its reclaim policy or its class says so."""
    CLEANING = "Cleaning"
    CLEANED = "Cleaned"
    """Its volume is being removed, and it will be offered again."""
    OFFERING = "Offering"
    DIRTY = "Dirty"
    """It has no volume and holds somebody's data; kept, because its class says so."""
    NEEDS_APPROVAL = "NeedsApproval"
    """Cleaned once somebody says so: ``local-volume clean``."""
    NEEDS_ATTENTION = "NeedsAttention"
    HELD = "Held"
    """The brake: many volumes were released at once."""
    WOULD_CLEAN = "WouldClean"
    """Only ``--dry-run`` keeps it from being cleaned."""
    MISSING = "Missing"
    BUSY = "Busy"
    DUPLICATE = "Duplicate"
    IDENTITY_MISMATCH = "IdentityMismatch"
    RETIRED = "Retired"
    INVALID = "Invalid"
    IGNORED = "Ignored"


WARNINGS = frozenset(
    {
        State.NEEDS_APPROVAL,
        State.NEEDS_ATTENTION,
        State.HELD,
        State.MISSING,
        State.BUSY,
        State.DUPLICATE,
        State.IDENTITY_MISMATCH,
        State.INVALID,
    }
)
"""States that get a Warning event on their volume when they begin."""
