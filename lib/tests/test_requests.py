"""What a claim may ask for, and what it gets, on the real control plane."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from external_storage import (
    ProvisionedVolume,
    ProvisioningInBackground,
    Unchanged,
)

Until = Callable[..., Any]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"volumeMode": "Block"}, "volumeMode Block is not supported"),
        ({"selector": {"matchLabels": {"a": "b"}}}, "spec.selector is not supported"),
        ({"accessModes": ["ReadWriteOncePod"]}, "use ReadWriteMany, ReadWriteOnce"),
        ({"volumeAttributesClassName": "gold"}, "volumeAttributesClassName is not supported"),
        (
            {"dataSource": {"kind": "PersistentVolumeClaim", "name": "other"}},
            "cloning is not supported",
        ),
    ],
)
def test_what_the_provisioner_cannot_give_is_refused_with_an_event(
    rig: Any, spec: dict[str, Any], text: str
) -> None:
    modes = frozenset({"ReadWriteOnce", "ReadWriteMany"})
    provisioner = rig.start(declare={"access_modes": modes})
    rig.claim("data", rig.storage_class(), **spec)
    event = rig.wait_event("data", "ProvisioningFailed")
    assert event.type == "Warning"
    assert text in event.message
    assert provisioner.provisioned == []


def test_block_and_read_write_once_pod_are_given_where_they_are_supported(rig: Any) -> None:
    rig.start(declare={"supports_block": True})
    spec = {"volumeMode": "Block", "accessModes": ["ReadWriteOncePod"]}
    rig.claim("data", rig.storage_class(), **spec)
    volume = rig.bound("data")
    assert (volume.spec.volume_mode, volume.spec.access_modes) == ("Block", ("ReadWriteOncePod",))


def test_unknown_parameters_are_only_warned_of_where_classes_exist_already(rig: Any) -> None:
    rig.start(lenient_parameters="true")
    rig.claim("data", rig.storage_class(parameters={"archiveOnDelete": "true", "mode": "0o700"}))
    rig.bound("data")
    event = rig.wait_event("data", "UnknownParameters")
    assert event.type == "Warning"
    assert "'archiveOnDelete'" in event.message


def test_allowed_topologies_bind_a_volume_that_says_nothing_of_nodes(rig: Any) -> None:
    rig.start()
    terms = [
        {"matchLabelExpressions": [{"key": "topology.kubernetes.io/zone", "values": ["a", "b"]}]},
        {"matchLabelExpressions": [{"key": "topology.kubernetes.io/zone", "values": ["c"]}]},
    ]
    rig.claim("data", rig.storage_class(allowedTopologies=terms))
    affinity = rig.bound("data").spec.node_affinity
    assert affinity is not None
    assert affinity.required is not None
    found = [term.match_expressions[0] for term in affinity.required.node_selector_terms]
    assert [(one.operator, one.values) for one in found] == [("In", ("a", "b")), ("In", ("c",))]


def test_names_follow_the_template(rig: Any) -> None:
    template = "${.PVC.namespace}-${.PVC.name}-${.PVC.uid}"
    provisioner = rig.start(volume_name_template=template)
    claim = rig.claim("data", rig.storage_class())
    assert rig.bound("data").name == f"{rig.namespace}-data-{claim.uid}"
    long_name = "x" * 230
    rig.claim(long_name, provisioner.requests[0].storage_class.name)
    event = rig.wait_event(long_name, "ProvisioningFailed")
    assert "253 are allowed" in event.message


def test_an_author_whose_source_is_a_clone_gets_the_volume(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    rig.bound("clone")
    assert provisioner.requests[-1].source_volume.name == original.name
    small = {"resources": {"requests": {"storage": "1Mi"}}}
    rig.claim("small", storage_class, dataSource=source, **small)
    assert "cannot be smaller" in rig.wait_event("small", "ProvisioningFailed").message
    missing = {"kind": "PersistentVolumeClaim", "name": "missing"}
    rig.claim("early", storage_class, dataSource=missing)
    text = "the source claim missing does not exist"
    assert text in rig.wait_event("early", "ProvisioningFailed").message
    rig.claim("missing", storage_class)
    rig.bound("early")


def test_the_source_of_a_clone_is_not_deleted_under_it(
    rig: Any, until: Until, release: threading.Event
) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    copying = threading.Event()

    def copy(request: Any) -> ProvisionedVolume | None:
        copying.set()
        release.wait(60)
        return None

    provisioner.on_provision = copy
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    assert copying.wait(60)
    rig.delete_claim("original")
    rig.wait_event(original.name, "VolumeInUse")
    assert provisioner.deleted == []
    release.set()
    rig.bound("clone")
    until(lambda: provisioner.deleted == [original.name], "then it is deleted")


def test_a_volume_from_another_source_is_left_to_a_populator(rig: Any) -> None:
    provisioner = rig.start()
    storage_class = rig.storage_class()
    source = {"apiGroup": "example.com", "kind": "Backup", "name": "monday"}
    rig.claim("data", storage_class, dataSourceRef=source)
    event = rig.wait_event("data", "LeftToPopulator")
    assert (event.type, event.count) == ("Normal", 1)
    assert "Backup.example.com" in event.message
    rig.claim("plain", storage_class)
    rig.bound("plain")
    assert provisioner.provisioned == ["plain"]


def test_the_source_of_a_clone_in_the_background_is_not_deleted(rig: Any, until: Until) -> None:
    provisioner = rig.start(declare={"supports_clone": True})
    storage_class = rig.storage_class()
    rig.claim("original", storage_class)
    original = rig.bound("original")
    provisioner.play(ProvisioningInBackground("copying"), Unchanged("no answer"))
    source = {"kind": "PersistentVolumeClaim", "name": "original"}
    rig.claim("clone", storage_class, dataSource=source)
    until(lambda: provisioner.provisioned.count("clone") >= 2, "it is asked again")
    rig.delete_claim("original")
    rig.wait_event(original.name, "VolumeInUse")
    assert provisioner.deleted == []
    provisioner.play(None)
    rig.bound("clone")
    until(lambda: provisioner.deleted == [original.name], "then it is deleted")
