"""From what an author returned to the PersistentVolume that is saved."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from external_storage.deadline import Deadline
from external_storage.kube.names import (
    ANN_BETA_STORAGE_CLASS,
    ANN_GID,
    ANN_PROVISIONED_BY,
    FINALIZER,
)
from external_storage.kube.types import (
    NodeSelector,
    NodeSelectorRequirement,
    NodeSelectorTerm,
    PersistentVolume,
    PersistentVolumeClaim,
    StorageClass,
    VolumeNodeAffinity,
    encode_new,
)
from external_storage.parameters import NoParameters, Parameters
from external_storage.persistent_volume import UnfitVolume, as_volume, build_volume
from external_storage.provisioner import ProvisionedVolume, ProvisionRequest
from external_storage.testing.builders import PROVISIONER, Clock, claim, storage_class

GI = 1024**3
SOURCE = {"nfs": {"server": "nfs.example", "path": "/export/a"}}


def request(
    made: PersistentVolumeClaim | None = None, its_class: StorageClass | None = None
) -> ProvisionRequest[Parameters]:
    made = made or claim()
    return ProvisionRequest(
        volume_name=f"pvc-{made.uid}",
        claim=made,
        storage_class=its_class or storage_class(),
        parameters=NoParameters(),
        capacity=GI,
        selected_node=None,
        deadline=Deadline(120.0, Clock(0.0)),
    )


def built(
    its_request: ProvisionRequest[Parameters] | None = None, **made: Any
) -> dict[str, dict[str, Any]]:
    return build_volume(its_request or request(), ProvisionedVolume(**{"source": SOURCE, **made}))


def test_the_volume_follows_from_claim_class_and_source() -> None:
    made = claim(resource_version="77")
    assert built(request(made)) == {
        "metadata": {
            "name": f"pvc-{made.uid}",
            "labels": {},
            "annotations": {ANN_PROVISIONED_BY: PROVISIONER},
            "finalizers": [FINALIZER],
        },
        "spec": {
            "nfs": {"server": "nfs.example", "path": "/export/a"},
            "accessModes": ["ReadWriteOnce"],
            "capacity": {"storage": "1Gi"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": "default",
                "name": "data",
                "uid": made.uid,
                "resourceVersion": "77",
            },
            "mountOptions": [],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "standard",
            "volumeMode": "Filesystem",
        },
    }


def test_a_retained_volume_has_no_finalizer_of_ours() -> None:
    fields = built(request(its_class=storage_class(reclaim_policy="Retain")))
    assert "finalizers" not in fields["metadata"]
    assert fields["spec"]["persistentVolumeReclaimPolicy"] == "Retain"


def test_the_authors_mount_options_come_before_those_of_the_class() -> None:
    fields = built(request(its_class=storage_class(mount_options=("b",))), mount_options=("a",))
    assert fields["spec"]["mountOptions"] == ["a", "b"]


def test_the_gid_becomes_the_annotation_that_the_kubelet_reads() -> None:
    assert built(gid=0)["metadata"]["annotations"][ANN_GID] == "0"
    assert ANN_GID not in built()["metadata"]["annotations"]


def test_labels_and_annotations_of_the_author_are_kept() -> None:
    metadata = built(labels={"zone": "a"}, annotations={"example.com/export": "7"})["metadata"]
    assert metadata["labels"] == {"zone": "a"}
    assert metadata["annotations"]["example.com/export"] == "7"


def test_an_author_cannot_disown_the_volume() -> None:
    metadata = built(annotations={ANN_PROVISIONED_BY: "example.com/other"})["metadata"]
    assert metadata["annotations"][ANN_PROVISIONED_BY] == PROVISIONER


def test_a_larger_volume_says_its_true_size() -> None:
    assert built(capacity=2 * GI)["spec"]["capacity"] == {"storage": "2Gi"}


def test_a_smaller_volume_is_refused() -> None:
    with pytest.raises(UnfitVolume, match=f"has {GI - 1} bytes, the claim asks for {GI}"):
        built(capacity=GI - 1)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ({}, "nothing"),
        ({"nfs": {}, "csi": {}}, "csi, nfs"),
        ({"claimRef": {}}, "claimRef"),
        ({"capacity": {"storage": "9Ei"}}, "capacity"),
        ({"persistentVolumeReclaimPolicy": "Retain"}, "persistentVolumeReclaimPolicy"),
    ],
)
def test_a_source_that_is_not_one_volume_type_is_refused(source: dict[str, Any], got: str) -> None:
    with pytest.raises(UnfitVolume, match=f"such as nfs or csi; got {got}"):
        built(source=source)


def test_modes_and_class_are_the_claims() -> None:
    made = claim(
        access_modes=("ReadWriteMany", "ReadOnlyMany"),
        volume_mode="Block",
        annotations={ANN_BETA_STORAGE_CLASS: "old"},
    )
    spec = built(request(made))["spec"]
    assert spec["accessModes"] == ["ReadWriteMany", "ReadOnlyMany"]
    assert spec["volumeMode"] == "Block"
    assert spec["storageClassName"] == "old"


def affinity(**requirement: Any) -> VolumeNodeAffinity:
    term = NodeSelectorTerm(match_expressions=(NodeSelectorRequirement(**requirement),))
    return VolumeNodeAffinity(required=NodeSelector(node_selector_terms=(term,)))


def requirement_in(fields: dict[str, Any]) -> dict[str, Any]:
    sent = msgspec.json.decode(encode_new(PersistentVolume, fields))
    [term] = sent["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    found: dict[str, Any] = term["matchExpressions"][0]
    return found


def test_node_affinity_is_sent_in_the_words_of_the_api() -> None:
    fields = built(node_affinity=affinity(key="zone", operator="NotIn", values=("a", "b")))
    assert requirement_in(fields) == {"key": "zone", "operator": "NotIn", "values": ["a", "b"]}


def test_unsaved_fields_can_be_read_as_a_volume() -> None:
    seen = as_volume(built(node_affinity=affinity(key="zone", values=("a",)), capacity=2 * GI))
    assert seen.name == request().volume_name
    assert seen.spec.claim_ref is not None
    assert seen.spec.claim_ref.uid == claim().uid
    assert seen.spec.nfs is not None
    assert seen.spec.nfs.path == "/export/a"
    assert seen.spec.node_affinity == affinity(key="zone", values=("a",))


def test_a_source_that_cannot_be_sent_is_refused() -> None:
    """``{"hostPath": {"path": path}}`` with a ``Path``: the slip that every author makes once."""
    with pytest.raises(UnfitVolume):
        built(source={"hostPath": {"path": Path("/srv/a")}})
