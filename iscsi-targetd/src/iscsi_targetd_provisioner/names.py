"""iSCSI names and portals, checked before a storage host is asked for anything."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

DEFAULT_PORT = 3260
MAX_NAME = 223
"""Bytes of an iSCSI name (RFC 7143)."""

# Kubernetes, open-iscsi and LIO each have rules of their own: this is what all three take.
_IQN = re.compile(
    r"iqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[a-z0-9][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+(:[a-zA-Z0-9.:-]+)?"
)
_EUI = re.compile(r"eui\.[0-9a-fA-F]{16}")
_NAA = re.compile(r"naa\.[125][0-9a-fA-F]{15}")
_HOST = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?")
_PORTAL = re.compile(r"(?P<v6>\[[0-9a-fA-F:.]+\])?(?P<rest>[^:\[\]]*)(:(?P<port>[0-9]{1,5}))?")
_VOLUME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,125}[a-zA-Z0-9])?")
_POOL = re.compile(r"[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126}(/[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126})?")


@dataclass(frozen=True, slots=True, order=True)
class Portal:
    """An address that a target listens on, or that nodes reach it by."""

    host: str
    """A name or an address; IPv6 without brackets."""
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> Portal:
        """``10.0.0.5``, ``10.0.0.5:3261``, ``[fd00::5]:3260``, ``fd00::5``, ``storage.example``.

        Raises:
            ValueError: says what is allowed.
        """
        plain = text.strip()
        if plain.count(":") > 1 and not plain.startswith("["):
            plain = f"[{plain}]"
        match = _PORTAL.fullmatch(plain)
        if match is None or bool(match["v6"]) == bool(match["rest"]):
            raise ValueError(_not_a_portal(text))
        port = int(match["port"] or DEFAULT_PORT)
        if not 0 < port < 65536:
            raise ValueError(_not_a_portal(text))
        if match["v6"]:
            try:
                return cls(str(ipaddress.IPv6Address(match["v6"][1:-1])), port)
            except ValueError:
                raise ValueError(_not_a_portal(text)) from None
        if not _HOST.fullmatch(match["rest"]):
            raise ValueError(_not_a_portal(text))
        return cls(match["rest"], port)

    @property
    def is_address(self) -> bool:
        """Whether a target can listen on it."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _not_a_portal(text: str) -> str:
    return f"{text!r} is not a portal: want HOST, HOST:PORT or [IPV6]:PORT"


def iqn_problem(text: str) -> str | None:
    """What is wrong with the name of an initiator or a target, or None."""
    good = _IQN.fullmatch(text) or _EUI.fullmatch(text) or _NAA.fullmatch(text)
    if good and len(text.encode()) <= MAX_NAME:
        return None
    return (
        f"{text!r} is not an iSCSI name: want iqn.YYYY-MM.org.example:name without blanks and "
        "underscores, eui.… or naa.…"
    )


def is_volume_name(text: str) -> bool:
    """Whether LVM, LIO and an IQN can all have it as (a part of) a name."""
    return _VOLUME.fullmatch(text) is not None


def is_pool_name(text: str) -> bool:
    """A volume group, or ``group/thin-pool``."""
    return _POOL.fullmatch(text) is not None
