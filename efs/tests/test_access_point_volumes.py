"""Access points as volumes: what making them does in EFS, without a control plane."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from tests.access_points import Rig, request, saved

from efs_provisioner.stored import ON_DELETE, PATH
from external_storage import (
    Infeasible,
    ProvisioningFailed,
    ProvisioningInBackground,
    Unchanged,
)
from external_storage.testing import builders

if TYPE_CHECKING:
    from tests.faulty_efs import FaultyEfs


# -- what is made


def test_the_volume_is_what_the_csi_driver_mounts(rig: Rig, file_system: str) -> None:
    asked = request()
    volume = rig.provision(asked)
    made = rig.made()
    handle = f"{file_system}::{made['AccessPointId']}"
    assert volume.source == {"csi": {"driver": "efs.csi.aws.com", "volumeHandle": handle}}
    assert made["RootDirectory"] == {
        "Path": f"/{asked.volume_name}",
        "CreationInfo": {"OwnerUid": 50_000, "OwnerGid": 50_000, "Permissions": "700"},
    }
    assert made["PosixUser"] == {"Uid": 50_000, "Gid": 50_000}
    assert volume.gid == 50_000
    assert volume.annotations[PATH] == f"/{asked.volume_name}"
    assert volume.annotations[ON_DELETE] == "retain"


def test_its_tags_say_whose_it_is_and_what_the_admin_wants(rig: Rig) -> None:
    asked = request(tags=r"cost\ centre:a\:b")
    rig.provision(asked)
    tags = {tag["Key"]: tag["Value"] for tag in rig.made()["Tags"]}
    assert tags == {
        "Name": asked.volume_name,
        "external-storage/cluster": "one",
        "external-storage/provisioner": builders.PROVISIONER,
        "external-storage/volume": asked.volume_name,
        "external-storage/claim": "team/data",
        "external-storage/claim-uid": asked.claim.uid,
        "team": "storage",
        "cost centre": "a:b",
    }


def test_a_class_chooses_owner_mode_and_path(rig: Rig) -> None:
    asked = request(
        claim_uid="7e0e0a0c-0000-4000-8000-000000000001",
        basePath="/tenants/",
        subPathPattern="${.PVC.namespace}/${.PVC.name}",
        directoryPerms="0750",
        gidRangeStart="70000",
        gidRangeEnd="70001",
    )
    rig.provision(asked)
    root = rig.made()["RootDirectory"]
    assert root["Path"] == "/tenants/team/data-7e0e0a0c-0000-4000-8000-000000000001"
    assert root["CreationInfo"] == {"OwnerUid": 70000, "OwnerGid": 70000, "Permissions": "0750"}


def test_a_fixed_owner_is_taken_and_not_told_to_pods(rig: Rig) -> None:
    volume = rig.provision(request(uid="1", gid="2"))
    assert rig.made()["PosixUser"] == {"Uid": 1, "Gid": 2}
    assert volume.gid is None


def test_a_predictable_path_is_what_the_pattern_says(rig: Rig) -> None:
    rig.provision(request(subPathPattern="${.PVC.name}", ensureUniqueDirectory="false"))
    assert rig.made()["RootDirectory"]["Path"] == "/data"


def test_a_zone_gives_the_address_of_its_mount_target(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    zone, address = next(iter(efs.targets(file_system).items()))
    volume = rig.provision(request(az=zone))
    assert volume.source["csi"]["volumeAttributes"] == {"mounttargetip": address}
    with pytest.raises(
        Infeasible, match=f"no mount target in eu-west-1a: there are some in.*{zone}"
    ):
        rig.provision(request("other", az="eu-west-1a"))
    assert len(efs.access_points()) == 1


def test_a_one_zone_file_system_keeps_its_volumes_to_its_zone(efs: FaultyEfs) -> None:
    rig = Rig(efs, efs.make_file_system(zone="us-east-1c"))
    affinity = rig.provision(request(enforceZoneAffinity="true")).node_affinity
    assert affinity is not None
    assert affinity.required is not None
    [term] = affinity.required.node_selector_terms
    assert [(e.key, e.operator, e.values) for e in term.match_expressions] == [
        ("topology.kubernetes.io/zone", "In", ("us-east-1c",))
    ]


def test_a_regional_file_system_binds_nobody(rig: Rig) -> None:
    assert rig.provision(request(enforceZoneAffinity="true")).node_affinity is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"basePath": "/a/b/c/d"}, "5 levels"),
        ({"subPathPattern": "x" * 99, "basePath": "/b"}, "139 characters"),
        ({"subPathPattern": "${.PVC.labels.team:-.hidden}"}, "begins with a dot"),
        ({"subPathPattern": "a&b"}, "takes none of"),
        ({"subPathPattern": "${.PVC.labels.team}"}, "no label 'team'"),
        ({"fileSystemId": "fs-0123456789abcdef0"}, "none of this provisioner's"),
        ({"onDelete": "delete"}, "not mounted in the provisioner's pod"),
    ],
)
def test_what_cannot_be_made_is_told_before_aws_is_asked(
    rig: Rig, efs: FaultyEfs, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(Infeasible, match=told):
        rig.provision(request(**given))
    assert "CreateAccessPoint" not in efs.operations()


# -- calls


def test_a_volume_costs_one_call_to_make_and_one_to_delete(rig: Rig, efs: FaultyEfs) -> None:
    count = 20
    asked = [request(f"data-{number}") for number in range(count)]
    volumes = [saved(each.volume_name, rig.provision(each)) for each in asked]
    for volume in volumes:
        rig.volumes.delete(volume)
    assert efs.operations() == {
        "CreateAccessPoint": count,
        "DeleteAccessPoint": count,
        # Once a file system and process.
        "DescribeAccessPoints": 1,
    }
    assert efs.access_points() == []


# -- once and only once


def test_called_again_it_finds_its_own_work(rig: Rig, efs: FaultyEfs) -> None:
    asked = request()
    assert rig.provision(asked) == rig.provision(asked)
    assert len(efs.access_points()) == 1


@pytest.mark.parametrize("fault", ["lost", "failing"])
def test_an_answer_that_is_lost_is_asked_for_again(rig: Rig, efs: FaultyEfs, fault: str) -> None:
    getattr(efs, fault)["CreateAccessPoint"] = 1
    asked = request()
    with pytest.raises(ProvisioningInBackground):
        rig.provision(asked)
    volume = rig.provision(asked)
    assert volume.source["csi"]["volumeHandle"].endswith(rig.made()["AccessPointId"])
    assert volume.gid == rig.made()["PosixUser"]["Gid"]


def test_after_a_restart_what_was_made_is_adopted(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    before = rig.provision(request())
    after = Rig(efs, file_system).provision(request(after_restart=True))
    assert after == before
    assert len(efs.access_points()) == 1


def test_a_refusal_after_a_restart_ends_nothing(rig: Rig, efs: FaultyEfs, file_system: str) -> None:
    """The finalizer of the claim must stay: the process before has made an access point."""
    rig.provision(request())
    efs.denied.add("CreateAccessPoint")
    with pytest.raises(Unchanged, match="denies"):
        Rig(efs, file_system).provision(request(after_restart=True))
    gone = Rig(efs, file_system, "fs-0123456789abcdef0")
    efs.clear_faults()
    with pytest.raises(Unchanged, match="none of this provisioner's"):
        gone.provision(request(after_restart=True, fileSystemId="fs-00000000000000000"))


@pytest.mark.parametrize("given", [{}, {"subPathPattern": "${.PVC.labels.team}"}])
def test_a_refusal_after_a_restart_that_has_left_nothing_is_told_as_one(
    rig: Rig, efs: FaultyEfs, given: dict[str, Any]
) -> None:
    """Else its claim could neither be changed nor go."""
    efs.denied.add("CreateAccessPoint")
    asked = request(after_restart=True, **given)
    with pytest.raises((ProvisioningFailed, Infeasible), match=r"denies|no label 'team'"):
        rig.provision(asked)
    assert len(rig.known.gids(rig.points.file_systems[0])) == 0
    before = efs.operations()["DescribeAccessPoints"]
    with pytest.raises((ProvisioningFailed, Infeasible), match=r"denies|no label 'team'"):
        rig.provision(asked)
    # It is looked for once.
    assert efs.operations()["DescribeAccessPoints"] == before


def test_a_refusal_after_a_restart_ends_nothing_while_aws_cannot_be_asked(
    rig: Rig, efs: FaultyEfs
) -> None:
    asked = request(after_restart=True, subPathPattern="${.PVC.labels.team}")
    efs.throttled["DescribeAccessPoints"] = 1
    with pytest.raises(Unchanged, match=r"no label 'team'.*is not known: AWS throttles"):
        rig.provision(asked)
    with pytest.raises(Infeasible, match="no label 'team'"):
        rig.provision(asked)


@pytest.mark.parametrize("fault", ["denied", "throttled"])
def test_what_an_uncertain_call_has_left_is_not_forgotten_by_a_refusal_after_it(
    rig: Rig, efs: FaultyEfs, fault: str
) -> None:
    """In one process, whose first try had no intent yet."""
    efs.lost["CreateAccessPoint"] = 1
    with pytest.raises(ProvisioningInBackground):
        rig.provision(request())
    if fault == "denied":
        efs.denied.add("CreateAccessPoint")
    else:
        efs.throttled["CreateAccessPoint"] = 1
    with pytest.raises(Unchanged, match=rig.made()["AccessPointId"]):
        rig.provision(request())
    efs.clear_faults()
    rig.provision(request())
    assert len(efs.access_points()) == 1


def test_what_was_made_is_not_forgotten_when_the_facts_are_asked_for_in_vain(
    rig: Rig, efs: FaultyEfs, file_system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = next(iter(efs.targets(file_system)))
    monkeypatch.setattr("efs_provisioner.facts.KEEP_S", -1.0)
    create = rig.volumes._maker.aws.create_access_point

    def made_and_then_denied(**given: Any) -> Any:
        made = create(**given)
        rig.volumes._facts._targets._known.clear()
        efs.denied.add("DescribeMountTargets")
        return made

    monkeypatch.setattr(rig.volumes._maker.aws, "create_access_point", made_and_then_denied)
    with pytest.raises(ProvisioningInBackground, match="is made; AWS denies"):
        rig.provision(request(az=zone))
    with pytest.raises(Unchanged, match="denies"):
        rig.provision(request(az=zone))
    efs.clear_faults()
    assert (
        rig.provision(request(az=zone))
        .source["csi"]["volumeHandle"]
        .endswith(rig.made()["AccessPointId"])
    )


def test_what_had_ended_may_have_been_begun_again_by_another_replica(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    efs.denied.add("CreateAccessPoint")
    with pytest.raises(ProvisioningFailed):
        rig.provision(request())
    efs.clear_faults()
    Rig(efs, file_system).provision(request())
    rig.points.lead()
    rig.volumes.lead()
    efs.denied.add("CreateAccessPoint")
    with pytest.raises(Unchanged, match="denies"):
        rig.provision(request(after_restart=True))


def test_a_refusal_of_a_new_claim_is_told_as_one(rig: Rig, efs: FaultyEfs) -> None:
    efs.denied.add("CreateAccessPoint")
    for again in (False, True):
        with pytest.raises(ProvisioningFailed, match="denies"):
            rig.provision(request(after_restart=again))


def test_an_access_point_of_the_same_token_and_other_tags_is_not_touched(
    rig: Rig, efs: FaultyEfs
) -> None:
    rig.provision(request())
    efs.retag(rig.made()["AccessPointId"], "external-storage/volume", "another")
    with pytest.raises(Infeasible, match="not its tags: it is not touched"):
        rig.provision(request())
    assert len(efs.access_points()) == 1


def test_another_cluster_with_the_same_claim_gets_its_own_and_not_the_same_directory(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    """A cluster that was restored from a backup has the same UIDs."""
    rig.provision(request())
    other = Rig(efs, file_system, cluster="two")
    with pytest.raises(ProvisioningFailed, match=f"{rig.made()['AccessPointId']}.*another path"):
        other.provision(request())
    other.provision(request(basePath="/two"))
    assert len(efs.access_points()) == 2


def test_a_gid_that_another_volume_got_meanwhile_is_not_used_twice(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    """The leader before us has made it and not saved it; we have given its gid away since."""
    other = Rig(efs, file_system)
    first = other.provision(request("first"))
    rig.points.of(file_system).listed = True  # before that, as a standby that led once
    second = rig.provision(request("second"))
    assert first.gid == second.gid
    with pytest.raises(ProvisioningFailed, match="did not fit and is deleted"):
        rig.provision(request("first", after_restart=True))
    again = rig.provision(request("first", after_restart=True))
    assert again.gid != second.gid
    gids = [point["PosixUser"]["Gid"] for point in efs.access_points()]
    assert set(gids) == {again.gid, second.gid}


def test_what_does_not_fit_is_never_deleted_when_a_volume_leads_to_it(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    asked = request("first")
    Rig(efs, file_system).provision(asked)
    rig.points.of(file_system).listed = True
    rig.provision(request("second"))
    rig.cluster.saved.add(asked.volume_name)
    with pytest.raises(Unchanged, match="is there already"):
        rig.provision(asked)
    assert len(efs.access_points()) == 2


def test_gids_of_others_on_the_file_system_are_left_to_them(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    efs.add_access_points(file_system, 5, first_gid=50_000)
    assert rig.provision(request()).gid == 50_005


def test_no_gid_is_given_twice_in_200_claims_at_once(rig: Rig, efs: FaultyEfs) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: rig.provision(request(f"data-{n}")), range(200)))
    gids = [point["PosixUser"]["Gid"] for point in efs.access_points()]
    assert len(set(gids)) == len(gids) == 200


def test_the_fixed_group_of_a_class_is_never_one_volumes_own(rig: Rig) -> None:
    fixed: dict[str, Any] = {"gid": "50000"}
    volumes = {}
    for name in ("one", "two"):
        asked = request(name, **fixed)
        volumes[name] = saved(asked.volume_name, rig.provision(asked))
        rig.known.observe(None, volumes[name])
    assert rig.provision(request("own")).gid == 50_001
    # The first of them goes, and the lists are read again.
    rig.volumes.delete(volumes["one"])
    rig.known.observe(volumes["one"], None)
    rig.points.refresh()
    narrow: dict[str, Any] = {"gidRangeStart": "50000", "gidRangeEnd": "50002"}
    assert rig.provision(request("next", **narrow)).gid == 50_002
    with pytest.raises(ProvisioningFailed, match="every group from 50000 to 50002"):
        rig.provision(request("last", **narrow))


def test_after_a_restart_the_fixed_group_of_a_class_is_known_by_its_volumes(
    rig: Rig, efs: FaultyEfs, file_system: str
) -> None:
    asked = request(gid="2000")
    volume = saved(asked.volume_name, rig.provision(asked))
    after = Rig(efs, file_system)
    after.known.observe(None, volume)
    # Of a directory, for which no access points are listed.
    assert after.known.gids(file_system).allocate("a directory", minimum=2000) == 2001


def test_a_full_range_names_the_parameters(rig: Rig) -> None:
    narrow: dict[str, Any] = {"gidRangeStart": "60000", "gidRangeEnd": "60000"}
    rig.provision(request("one", **narrow))
    with pytest.raises(ProvisioningFailed, match=r"60000 to 60000.*widen gidRangeStart"):
        rig.provision(request("two", **narrow))


def test_what_the_node_plugin_does_not_mount_is_refused(rig: Rig, efs: FaultyEfs) -> None:
    with pytest.raises(Infeasible, match="does not mount ReadOnlyMany"):
        rig.provision(request(access_modes=("ReadWriteMany", "ReadOnlyMany")))
    assert efs.operations() == {}


def test_tags_of_the_admin_and_of_the_class_together_are_not_too_many(rig: Rig) -> None:
    many = " ".join(f"key{number}" for number in range(44))
    with pytest.raises(Infeasible, match="51 tags"):
        rig.provision(request(tags=many))
