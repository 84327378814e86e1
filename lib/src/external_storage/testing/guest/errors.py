"""What can go wrong with a guest."""

from __future__ import annotations


class GuestError(Exception):
    """The guest cannot be built, started, reached, or does not do what it was told."""


class ConnectionLost(GuestError):
    """The guest has ended, or its sshd has."""


class CommandFailed(GuestError):
    """A command in the guest ended with another exit code than 0."""

    def __init__(self, command: str, *, exit_code: int, output: str, error: str) -> None:
        words = "\n".join(part.strip() for part in (error, output) if part.strip())
        super().__init__(f"in the guest, `{command}` exited with {exit_code}: {words[-4096:]}")
        self.exit_code = exit_code
        self.output = output
        """Its standard output."""
        self.error = error
        """Its standard error."""
