"""The agent's configuration: the keys of the reference's ConfigMap and a few more, read strictly.

The ConfigMap is mounted as a directory: each file is a key, its content the value as YAML. All that
is wrong is found before any of it is told. Key names may be in any letter case, as with the
reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from external_storage import Problems
from local_volume_provisioner import yamltext
from local_volume_provisioner.config_reader import Reader
from local_volume_provisioner.globs import Globs
from local_volume_provisioner.methods import Method, MethodKind

ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
_CLASS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)


_ZERO = Method(MethodKind.ZERO)


class VolumeMode(StrEnum):
    """How pods get a volume."""

    FILESYSTEM = "Filesystem"
    BLOCK = "Block"


class CleanPolicy(StrEnum):
    """Who decides that a released volume is cleaned."""

    AUTO = "auto"
    MANUAL = "manual"
    NEVER = "never"


class RequiredIdentity(StrEnum):
    """Which ids must agree before a device is cleaned without being asked for."""

    HARDWARE = "hardware"
    PLACEMENT = "placement"


class NameFormat(StrEnum):
    """How volumes are named."""

    COMPATIBLE = "compatible"
    SAFE = "safe"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassConfig:
    """One class: where its disks are, and what becomes of them."""

    name: str
    host_dir: str
    """On the host; in the volumes."""
    mount_dir: str
    """The same directory in our container."""
    mode: VolumeMode = VolumeMode.FILESYSTEM
    access_mode: str = "ReadWriteOnce"
    fs_type: str = ""
    globs: Globs = field(default_factory=lambda: Globs.parse("*"))
    selector: tuple[Mapping[str, Any], ...] = ()
    method: Method = _ZERO
    clean_policy: CleanPolicy = CleanPolicy.AUTO
    required_identity: RequiredIdentity = RequiredIdentity.HARDWARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the ConfigMap says."""

    classes: Mapping[str, ClassConfig] = field(default_factory=dict)
    node_labels: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    use_job_for_cleaning: bool = False
    resync_s: float = 300.0
    use_node_name_only: bool = False
    set_owner_reference: bool = False
    remove_taint: bool = False
    taint_key: str = ""
    name_format: NameFormat = NameFormat.COMPATIBLE


def read_directory(directory: Path) -> Config:
    """The configuration in a mounted ConfigMap.

    Raises:
        Problems: with everything that is wrong.
        OSError: the directory cannot be read.
    """
    return parse(read_texts(directory))


def read_texts(directory: Path) -> dict[str, str]:
    """The files of a mounted ConfigMap by key. Raises OSError."""
    texts = {}
    for path in sorted(directory.iterdir()):
        # The kubelet's own links and directories begin with two dots.
        if not path.name.startswith("..") and path.is_file():
            texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def parse(texts: Mapping[str, str]) -> Config:
    """The configuration from the texts by key. Raises Problems with everything that is wrong."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, text in texts.items():
        try:
            values[key] = yamltext.load(text)
        except yamltext.YamlError as error:
            problems.append(f"{key}: {error}")
    reader = Reader(values, "", problems)
    config = _read(reader)
    reader.finish(ignored=("jobTolerations",), unreadable=texts.keys() - values.keys())
    problems += _overlaps(list(config.classes.values()))
    if problems:
        raise Problems(problems)
    return config


def _read(reader: Reader) -> Config:
    if reader.boolean("useAlphaAPI"):
        reader.problem("useAlphaAPI: Kubernetes has had no such API since 1.10; remove the key")
    config = Config(
        classes=_classes(reader),
        node_labels=reader.texts("nodeLabelsForPV"),
        labels=reader.labels("labelsForPV"),
        use_job_for_cleaning=reader.boolean("useJobForCleaning"),
        resync_s=reader.seconds("minResyncPeriod", 300.0),
        use_node_name_only=reader.boolean("useNodeNameOnly"),
        set_owner_reference=reader.boolean("setPVOwnerRef"),
        remove_taint=reader.boolean("removeNodeNotReadyTaint"),
        taint_key=reader.text("provisionerNotReadyNodeTaintKey"),
        name_format=reader.member("volumeNames", NameFormat, NameFormat.COMPATIBLE),
    )
    if config.remove_taint and not config.taint_key:
        reader.problem(
            "provisionerNotReadyNodeTaintKey: must be given with removeNodeNotReadyTaint"
        )
    if config.resync_s < 1:
        reader.problem("minResyncPeriod: must be at least 1s")
    return config


def _classes(reader: Reader) -> dict[str, ClassConfig]:
    classes = {}
    for name, inner in reader.children("storageClassMap").items():
        if not _CLASS_NAME.fullmatch(name):
            inner.problem("is not the name of a StorageClass")
        classes[name] = _class(name, inner)
        inner.finish()
    return classes


def _class(name: str, reader: Reader) -> ClassConfig:
    mode = reader.member("volumeMode", VolumeMode, VolumeMode.FILESYSTEM)
    access_mode = reader.text("accessMode") or "ReadWriteOnce"
    if access_mode not in ACCESS_MODES:
        reader.problem(f"accessMode: {access_mode!r} is not one of: {', '.join(ACCESS_MODES)}")
    try:
        globs = Globs.parse(reader.text("namePattern") or "*")
    except ValueError as error:
        reader.problem(f"namePattern: {error}")
        globs = Globs.parse("*")
    return ClassConfig(
        name=name,
        host_dir=_directory(reader, "hostDir"),
        mount_dir=_directory(reader, "mountDir"),
        mode=mode,
        access_mode=access_mode,
        fs_type=reader.text("fsType"),
        globs=globs,
        selector=reader.node_selector_terms("selector"),
        method=_method(reader),
        clean_policy=reader.member("cleanPolicy", CleanPolicy, CleanPolicy.AUTO),
        required_identity=reader.member("identity", RequiredIdentity, RequiredIdentity.HARDWARE),
    )


def _directory(reader: Reader, key: str) -> str:
    text = reader.text(key)
    if not text:
        reader.problem(f"{key}: must be given")
    elif not text.startswith("/") or ".." in text.split("/"):
        reader.problem(f"{key}: {text!r} is not an absolute path without '..'")
    elif text.strip("/") == "":
        reader.problem(f"{key}: the root directory holds no disks of ours")
    return "/" + "/".join(part for part in text.split("/") if part not in ("", "."))


def _method(reader: Reader) -> Method:
    """``cleanMethod`` wins; else the reference's ``blockCleanerCommand``; else zeroes."""
    command = reader.texts("blockCleanerCommand", may_be_empty=False)
    text = reader.text("cleanMethod")
    try:
        if text:
            return Method.parse(text, command, fs_type=reader.text("fsType"))
        return Method.of_command(command) if command else Method(MethodKind.ZERO)
    except ValueError as error:
        reader.problem(f"{'cleanMethod' if text else 'blockCleanerCommand'}: {error}")
        return Method(MethodKind.ZERO)


def _overlaps(classes: list[ClassConfig]) -> list[str]:
    """Directories that two classes would both look into."""
    found = []
    for index, one in enumerate(classes):
        for other in classes[index + 1 :]:
            found += _overlap(one, other)
    return found


def _overlap(one: ClassConfig, other: ClassConfig) -> list[str]:
    names = f"storageClassMap.{one.name} and .{other.name}"
    for key, mine, theirs in (
        ("hostDir", one.host_dir, other.host_dir),
        ("mountDir", one.mount_dir, other.mount_dir),
    ):
        if mine != theirs and (_is_below(mine, theirs) or _is_below(theirs, mine)):
            return [f"{names}: {key} {mine} and {theirs} lie in one another"]
    if (one.host_dir == other.host_dir) != (one.mount_dir == other.mount_dir):
        return [f"{names}: one hostDir needs one mountDir, and two need two"]
    if one.host_dir == other.host_dir and one.globs.text == other.globs.text:
        # With patterns that differ, one directory may serve several classes, as in the reference;
        # an entry that two of them want is found when it is there.
        return [f"{names}: hostDir {one.host_dir} is the same, and namePattern too"]
    return []


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory + "/")
