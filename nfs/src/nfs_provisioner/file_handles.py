"""Whether files can be opened by handle, which is how an NFS server finds what a client names."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_MAX_HANDLE_BYTES = 128
_WHY = {
    errno.EOPNOTSUPP: "its file system has no handles (overlay has none; ext4 and xfs have)",
    errno.EPERM: "it is not permitted: the capability DAC_READ_SEARCH is missing, or the seccomp "
    "profile of the container refuses name_to_handle_at (containerd's does before 1.6.22 and "
    "1.7.3: there, set seccompProfile to Unconfined)",
    errno.ENOSYS: "this kernel cannot do it",
}


class _Handle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES),
    )


def problem(directory: Path) -> str | None:
    """Why nothing in ``directory`` could be served, in words for an admin; None if it can be.

    OSError when the directory cannot be opened at all.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handle = _Handle(handle_bytes=_MAX_HANDLE_BYTES)
    where, mount = os.fsencode(directory), ctypes.c_int()
    mounted = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        asked = ctypes.byref(handle)
        if libc.name_to_handle_at(_AT_FDCWD, where, asked, ctypes.byref(mount), 0):
            return _told(directory, ctypes.get_errno())
        opened = libc.open_by_handle_at(mounted, asked, os.O_RDONLY | os.O_CLOEXEC)
        if opened < 0:
            return _told(directory, ctypes.get_errno())
        os.close(opened)
    finally:
        os.close(mounted)
    return None


def _told(directory: Path, number: int) -> str:
    why = _WHY.get(number, os.strerror(number))
    return f"{directory}: files cannot be opened by handle, so NFS cannot serve them: {why}"
