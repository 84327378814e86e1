"""Our packages for the Python of the guest, which itself reaches no package index."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from external_storage.testing.binaries import cache_home
from external_storage.testing.guest.errors import GuestError
from external_storage.testing.guest.image import PYTHON, building, digest, do, need

SITE: Final = "/opt/site"
"""Where packages are in the guest; its sshd is configured for that."""

_PLATFORM: Final = "x86_64-manylinux_2_36"
_KEPT: Final = 8


def site_image(packages: Sequence[Path]) -> Path:
    """A file system, on the host, with ``packages``, source directories, and what they depend on.

    It is made by uv, which needs the package index or its own cache, once for each content of the
    packages. Raises ``GuestError`` when that fails.
    """
    names = [_name(package) for package in packages]
    content = b"".join(_content(package) for package in packages)
    target = cache_home() / "guest" / "site-packages" / f"{digest(content)}.ext4"
    if not target.exists():
        with building(target) as wanted:
            if wanted:
                _install(packages, names, target)
    return target


def mount(device: str) -> str:
    """The shell command that makes such a disk of the guest its ``SITE``.

    A disk, not a copy: that would take the guest a minute. Python's caches go to a layer above it.
    """
    below, above = "/run/site", "/var/lib/site"
    options = f"lowerdir={below},upperdir={above}/upper,workdir={above}/work"
    return (
        f"mkdir -p {SITE} {below} {above}/upper {above}/work && mount -o ro {device} {below} && "
        f"mount -t overlay -o {options} site {SITE}"
    )


UNMOUNT: Final = f"umount {SITE} /run/site && rm -rf /var/lib/site"
"""The shell command that undoes ``mount``."""


def _install(packages: Sequence[Path], names: Sequence[str], target: Path) -> None:
    need(("mke2fs",))
    if shutil.which("uv") is None:
        raise GuestError("uv is needed to install packages for a guest: pip install uv")
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # uv looks at pyproject.toml alone to tell whether a directory must be built again.
    again = [word for name in names for word in ("--reinstall-package", name)]
    do(
        [
            *("uv", "pip", "install", "--quiet", "--target", partial / "site"),
            *("--link-mode", "copy", "--python", sys.executable),
            *("--python-version", PYTHON, "--python-platform", _PLATFORM),
            *again,
            *(str(package.resolve()) for package in packages),
        ]
    )
    for script in (partial / "site/bin").glob("*"):
        _point_to_guest(script)
    sizes = [path.lstat().st_size for path in (partial / "site").rglob("*")]
    kib = 16 * 1024 + sum(size // 1024 + 8 for size in sizes)
    made = partial / "site.ext4"
    layout = ("-t", "ext4", "-O", "^has_journal", "-i", "4096", "-m", "0")
    do(["mke2fs", "-q", *layout, "-d", partial / "site", made, f"{kib}K"])
    made.rename(target)
    shutil.rmtree(partial)
    kept = sorted(target.parent.glob("*.ext4"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-_KEPT]:
        path.unlink(missing_ok=True)


def _point_to_guest(script: Path) -> None:
    """Have a command run by the guest's Python; uv has written the host's into it."""
    content = script.read_bytes()
    if content.startswith(b"#!") and b"python" in content.partition(b"\n")[0]:
        script.write_bytes(b"#!/usr/bin/python3\n" + content.partition(b"\n")[2])


def _name(package: Path) -> str:
    try:
        text = (package / "pyproject.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise GuestError(f"{package} is no source directory of a package: {error}") from None
    name: str = tomllib.loads(text)["project"]["name"]
    return name


def _content(package: Path) -> bytes:
    """What its wheel is made of."""
    files = sorted(path for path in (package / "src").rglob("*") if path.is_file())
    parts = [str(package.resolve()).encode(), (package / "pyproject.toml").read_bytes()]
    for path in files:
        if path.suffix != ".pyc":
            parts += [str(path.relative_to(package)).encode(), path.read_bytes()]
    return b"\0".join(parts)
