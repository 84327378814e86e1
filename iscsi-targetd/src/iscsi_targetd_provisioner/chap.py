"""CHAP credentials: read from a Secret or a file, never shown."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SESSION = "node.session.auth."

# What LIO keeps (255), and what it takes for "none".
_MAX_LENGTH = 255
_RESERVED = "NULL"


class ChapError(ValueError):
    """What is wrong with credentials; never contains them."""


@dataclass(frozen=True, slots=True, repr=False)
class Chap:
    """What an initiator shows to a target, and with mutual CHAP the target to the initiator."""

    user: str
    password: str
    mutual_user: str = ""
    mutual_password: str = ""

    def __repr__(self) -> str:
        return f"Chap({'mutual' if self.mutual else 'one-way'})"

    @property
    def mutual(self) -> bool:
        return bool(self.mutual_user)

    @property
    def fingerprint(self) -> str:
        """To notice a change by."""
        fields = (self.user, self.password, self.mutual_user, self.mutual_password)
        return hashlib.sha256("\0".join(fields).encode()).hexdigest()

    @classmethod
    def from_keys(cls, keys: Mapping[str, str], *, source: str) -> Chap:
        """From the keys of a Secret of type ``kubernetes.io/iscsi-chap``, decoded.

        Those of the session count; what is for discovery is the kubelet's alone.

        Args:
            source: where they are from, for the error.

        Raises:
            ChapError: names the keys that are missing or cannot be used.
        """
        names = ("username", "password", "username_in", "password_in")
        values = {name: keys.get(SESSION + name, "") for name in names}
        for name in ("username", "password"):
            if not values[name]:
                raise ChapError(f"{source} has no key {SESSION}{name}")
        if bool(values["username_in"]) != bool(values["password_in"]):
            raise ChapError(
                f"{source} has only one of {SESSION}username_in and {SESSION}password_in: mutual "
                "CHAP needs both, one-way CHAP neither"
            )
        for name, value in values.items():
            if len(value.encode()) > _MAX_LENGTH or value == _RESERVED or not value.isprintable():
                raise ChapError(
                    f"{source}: key {SESSION}{name} is not printable text of at most "
                    f"{_MAX_LENGTH} bytes"
                )
        if values["password"] == values["password_in"]:
            # Initiators refuse it: a target could be asked to solve its own challenge.
            raise ChapError(f"{source}: the two passwords of mutual CHAP are the same")
        return cls(
            values["username"], values["password"], values["username_in"], values["password_in"]
        )

    @classmethod
    def from_secret(cls, data: Mapping[str, str], *, source: str) -> Chap:
        """From the ``data`` of a Secret: base64."""
        try:
            keys = {
                key: base64.b64decode(value, validate=True).decode() for key, value in data.items()
            }
        except (binascii.Error, UnicodeDecodeError):
            raise ChapError(f"{source} holds what is not text") from None
        return cls.from_keys(keys, source=source)

    @classmethod
    def from_properties(cls, path: Path) -> Chap:
        """From the file of the original provisioner: ``key=value`` lines, ``#`` for comments."""
        source = f"file {path}"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ChapError(f"{source} cannot be read: {reason}") from None
        keys: dict[str, str] = {}
        for line in lines:
            text = line.strip()
            if text and text[0] not in "#!":
                key, _, value = text.partition("=")
                keys[key.strip()] = value.strip()
        return cls.from_keys(keys, source=source)


@dataclass(frozen=True, slots=True)
class SecretName:
    """Where credentials are; they are looked up again whenever they are needed."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(slots=True)
class AppliedChap:
    """By volume: which credentials we know to be on the host, so that a change is noticed."""

    _fingerprints: dict[str, str] = field(default_factory=dict)

    def is_applied(self, volume: str, chap: Chap) -> bool:
        return self._fingerprints.get(volume) == chap.fingerprint

    def note(self, volume: str, chap: Chap) -> None:
        self._fingerprints[volume] = chap.fingerprint

    def forget(self, volume: str) -> None:
        self._fingerprints.pop(volume, None)
