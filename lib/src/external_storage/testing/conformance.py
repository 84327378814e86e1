"""The conformance suite: what every provisioner promises, tested on the real control plane.

    class TestHostPath(Conformance):
        def program(self, directory: Path) -> Program:
            return Program(argv=(sys.executable, "hostpath.py", f"--root={directory}"))

        def assets(self, directory: Path) -> set[str]:
            return {path.name for path in directory.iterdir() if path.name[0] != "."}

``UnderTest`` says what else there is to tell. A test that fails names the promise that is broken
and what the author can do about it. ``crashes.CrashSweep`` takes the same methods and goes deeper.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from external_storage.claims import has_intent
from external_storage.kube.names import ANN_PROVISIONED_BY, ANN_SELECTED_NODE, FINALIZER
from external_storage.kube.quantity import to_bytes
from external_storage.kube.types import Node, PersistentVolume, PersistentVolumeClaim, StorageClass
from external_storage.testing.program import GRACE_S
from external_storage.testing.undertest import Bench, UnderTest

__all__ = ["Conformance"]

MANY = 20


def promise(text: str, *, kept: object, found: object = "", do: str) -> None:
    """Fail the test unless ``kept``: say what was promised, what was found and what to do."""
    __tracebackhide__ = True
    if not kept:
        pytest.fail(
            f"a promise of the contract is broken: {text}\n"
            f"  found: {found or 'nothing'}\n  what to do: {do}"
        )


def expect_nothing_left(bench: Bench, *, when: str, do: str) -> None:
    """Wait until volumes, assets and traces are gone, or say which promise that breaks."""
    __tracebackhide__ = True
    try:
        bench.wait(lambda: not bench.left(), "nothing is left")
    except pytest.fail.Exception as error:
        do = f"{do}\n{error}"
    promise(f"nothing is left {when}", kept=not bench.left(), found=bench.left(), do=do)


def expect_bound_once(bench: Bench, *names: str, when: str, do: str) -> list[PersistentVolume]:
    """Wait until the claims are Bound, and be sure that each has one volume and one asset."""
    __tracebackhide__ = True
    try:
        volumes = bench.wait_bound(*names)
    except pytest.fail.Exception as error:
        promise(f"every claim is Bound {when}", kept=False, found=error, do=do)
    found = {"volumes": sorted(v.name for v in bench.volumes()), "assets": sorted(bench.assets())}
    once = all(len(there) == len(names) for there in found.values())
    promise(f"every claim has one volume and one asset {when}", kept=once, found=found, do=do)
    return volumes


_FIND_AGAIN = (
    "provision() is called again after a crash: let it find its own work by request.volume_name, "
    "and make nothing beside it"
)
_REMEMBER = "keep AssetRecords (begin() comes first, discard() removes) or declare durable_intent"


class _Provisioning(UnderTest):
    """A claim becomes a volume that is what it asked for."""

    def test_a_volume_is_what_its_claim_and_its_class_ask_for(self, bench: Bench) -> None:
        storage_class = bench.good_class(mountOptions=["noatime"], reclaimPolicy="Delete")
        claim = bench.claim("data", storage_class)
        [volume] = expect_bound_once(bench, "data", when="after provisioning", do=_FIND_AGAIN)
        spec, reference = volume.spec, volume.spec.claim_ref
        assert reference is not None
        found: dict[str, Any] = {
            "uid in claimRef": reference.uid,
            "class": spec.storage_class_name,
            "reclaim policy": spec.persistent_volume_reclaim_policy,
            "access modes": list(spec.access_modes),
            "volume mode": spec.volume_mode,
            "the class's mount option": "noatime" in spec.mount_options,
            "finalizer": FINALIZER in volume.metadata.finalizers,
            ANN_PROVISIONED_BY: volume.metadata.annotations.get(ANN_PROVISIONED_BY),
            "capacity suffices": to_bytes(spec.capacity["storage"]) >= to_bytes("1Mi"),
        }
        wanted = {
            "uid in claimRef": claim.uid,
            "class": storage_class.name,
            "reclaim policy": "Delete",
            "access modes": ["ReadWriteOnce"],
            "volume mode": "Filesystem",
            "the class's mount option": True,
            "finalizer": True,
            ANN_PROVISIONED_BY: bench.provisioner,
            "capacity suffices": True,
        }
        wrong = {key: found[key] for key in wanted if found[key] != wanted[key]}
        promise(
            "a volume matches its claim and its class",
            kept=not wrong,
            found=wrong,
            do="return a ProvisionedVolume and leave all else to the library",
        )

    def test_many_claims_at_once_get_an_asset_each(self, bench: Bench) -> None:
        names = [f"claim-{number}" for number in range(MANY)]
        bench.claims_at_once(names, bench.good_class())
        expect_bound_once(bench, *names, when="with many at once", do="name assets by volume_name")
        bench.delete_claims()
        expect_nothing_left(bench, when="when all are deleted", do="make delete() thread-safe")

    def test_every_declared_access_mode_is_served(self, bench: Bench) -> None:
        storage_class = bench.good_class()
        for mode in self.access_modes:
            bench.claim(mode.lower(), storage_class, accessModes=[mode])
        names = [mode.lower() for mode in self.access_modes]
        do = "declare only what can be served in access_modes"
        volumes = expect_bound_once(bench, *names, when="whatever its access mode", do=do)
        found = [list(volume.spec.access_modes) for volume in volumes]
        assert found == [[mode] for mode in self.access_modes]

    def test_a_raw_block_claim_is_served_or_refused(self, bench: Bench) -> None:
        bench.claim("block", bench.good_class(), volumeMode="Block")
        if self.supports_block:
            do = "serve volumeMode Block, or set supports_block to False"
            [volume] = expect_bound_once(bench, "block", when="that wants a block device", do=do)
            assert volume.spec.volume_mode == "Block"
        else:
            event = bench.wait_event("block", "ProvisioningFailed")
            assert "Block" in event.message
            promise(
                "what is refused makes nothing",
                kept=not bench.left(),
                found=bench.left(),
                do="leave supports_block alone: the library refuses such claims",
            )

    def test_bad_class_parameters_are_told_and_make_nothing(self, bench: Bench) -> None:
        bad = {"noSuchParameter": "1", **self.bad_parameters}
        for number, (key, value) in enumerate(bad.items()):
            parameters = {**self.class_parameters, key: value}
            storage_class = bench.storage_class(f"-{number}", parameters=parameters)
            bench.claim(f"bad-{number}", storage_class)
        for number, key in enumerate(bad):
            event = bench.wait_event(f"bad-{number}", "ProvisioningFailed")
            promise(
                f"the event about a bad parameter names it: {key}",
                kept=event.type == "Warning" and key in event.message,
                found=f"{event.type} {event.message!r}",
                do="declare parameters as fields of a Parameters class, and check in validate()",
            )
        # A whole life of another claim later, nothing more has been said or done.
        live_and_die(bench, "good")
        events = [bench.events(f"bad-{n}", "ProvisioningFailed") for n in range(len(bad))]
        promise(
            "a bad parameter is told once and makes nothing",
            kept=all([e.count for e in told] == [1] for told in events) and not bench.left(),
            found=bench.describe(),
            do="raise Infeasible for what cannot succeed until the class changes",
        )

    def test_a_claim_that_waits_for_its_consumer_waits_for_the_node(self, bench: Bench) -> None:
        node = f"node-{uuid.uuid4().hex[:8]}"
        labels = {"kubernetes.io/hostname": node}
        bench.make(Node, {"metadata": {"name": node, "labels": labels}})
        late = bench.good_class("-late", volumeBindingMode="WaitForFirstConsumer")
        bench.claim("waiting", late)
        live_and_die(bench, "other")
        promise(
            "a class that waits for the first consumer gets no volume before there is a node",
            kept=not bench.left(),
            found=bench.left(),
            do="make nothing outside of provision()",
        )
        patch = {"metadata": {"annotations": {ANN_SELECTED_NODE: node}}}
        bench.api.patch(PersistentVolumeClaim, "waiting", patch, namespace=bench.namespace)
        expect_bound_once(bench, "waiting", when="once its node is selected", do=_FIND_AGAIN)


class _Deletion(UnderTest):
    """A volume goes when it should, and only then."""

    def test_a_deleted_claim_leaves_nothing(self, bench: Bench) -> None:
        bench.claim("data", bench.good_class())
        expect_bound_once(bench, "data", when="after provisioning", do=_FIND_AGAIN)
        bench.delete_claims("data")
        expect_nothing_left(bench, when="when a claim is deleted", do="remove all in delete()")

    def test_retain_keeps_the_asset_until_an_admin_decides_otherwise(self, bench: Bench) -> None:
        bench.claim("data", bench.good_class("-kept", reclaimPolicy="Retain"))
        [volume] = expect_bound_once(bench, "data", when="after provisioning", do=_FIND_AGAIN)
        kept = bench.assets()
        bench.delete_claims("data")
        bench.wait_phase(volume.name, "Released")
        live_and_die(bench, "other")
        promise(
            "Retain keeps the asset",
            kept=bench.assets() == kept and bench.get_volume(volume.name) is not None,
            found=bench.left(),
            do="remove assets in delete() and discard() only",
        )
        patch = {"spec": {"persistentVolumeReclaimPolicy": "Delete"}}
        bench.api.patch(PersistentVolume, volume.name, patch)
        expect_nothing_left(
            bench, when="once the policy is Delete", do="decide nothing in delete()"
        )

    def test_what_belongs_to_others_is_left_alone(self, bench: Bench) -> None:
        foreign = f"{bench.provisioner}-other"
        fields = {"metadata": {"name": f"{bench.namespace}-other"}, "provisioner": foreign}
        bench.claim("foreign", bench.make(StorageClass, fields))
        bench.claim("ours", bench.good_class())
        [ours] = expect_bound_once(bench, "ours", when="beside a foreign one", do=_FIND_AGAIN)
        copy = copy_of(bench, ours, foreign)
        live_and_die(bench, "another")
        promise(
            "claims and volumes of another provisioner are left alone",
            kept=bench.get_volume(copy.name) is not None
            and not bench.get_claim("foreign").spec.volume_name
            and len(bench.assets()) == 1,
            found=bench.describe(),
            do="act on what provision() and delete() are called for, and on nothing else",
        )

    def test_a_forged_volume_removes_nothing_of_others(self, bench: Bench) -> None:
        bench.claim("victim", bench.good_class())
        [victim] = expect_bound_once(bench, "victim", when="after provisioning", do=_FIND_AGAIN)
        before = bench.assets()
        copy_of(bench, victim, bench.provisioner)
        live_and_die(bench, "other")
        promise(
            "a volume that only says to be ours, with the source of another, removes nothing",
            kept=bench.assets() == before,
            found=bench.describe(),
            do="remove what the volume's name and a mark of yours lead to, not what its source "
            "says: look into your records",
        )


class _Interrupted(UnderTest):
    """Whatever is lost or killed in the middle, in the end there is one of everything, or none."""

    def test_a_second_try_finds_the_asset_of_the_first(self, bench: Bench) -> None:
        bench.proxy.on("create", "persistentvolumes").kill(bench.program.pid, when="before")
        bench.claim("data", bench.good_class())
        bench.program.wait_ended()
        promise("assets() shows what provision() has made", kept=bench.assets(), do="see assets()")
        bench.restart()
        expect_bound_once(bench, "data", when="after a crash before it was saved", do=_FIND_AGAIN)

    def test_deleting_what_is_gone_is_a_success(self, bench: Bench) -> None:
        bench.claim("data", bench.good_class())
        expect_bound_once(bench, "data", when="after provisioning", do=_FIND_AGAIN)
        bench.proxy.on("delete", "persistentvolumes").kill(bench.program.pid, when="before")
        bench.delete_claims("data")
        bench.program.wait_ended()
        bench.restart()
        do = "delete() is called again after a crash: what is gone is a success"
        expect_nothing_left(bench, when="after a crash in a deletion", do=do)

    def test_a_claim_deleted_before_its_volume_was_saved_leaves_nothing(self, bench: Bench) -> None:
        bench.proxy.on("create", "persistentvolumes").kill(bench.program.pid, when="before")
        bench.claim("data", bench.good_class())
        bench.program.wait_ended()
        delete_while_down(bench, "data")
        bench.restart()
        expect_nothing_left(bench, when="when its claim was deleted meanwhile", do=_REMEMBER)

    def test_a_claim_deleted_while_the_program_is_down_leaves_nothing(self, bench: Bench) -> None:
        bench.claim("data", bench.good_class())
        [volume] = expect_bound_once(bench, "data", when="after provisioning", do=_FIND_AGAIN)
        # Until a finalizer of ours is off, the claim would outlive the program.
        bench.wait(lambda: not any(map(has_intent, bench.claims())), "the claim is let go of")
        bench.program.kill()
        bench.delete_claims("data")
        bench.wait_phase(volume.name, "Released")
        bench.restart()
        expect_nothing_left(bench, when="when it was released meanwhile", do="see delete()")

    def test_lost_answers_of_the_api_server_make_no_doubles(self, bench: Bench) -> None:
        saves = bench.proxy.on("create", "persistentvolumes", times=2).fail_after(500)
        bench.claim("data", bench.good_class())
        # Bound comes before that: the server has the volume, the program does not know it.
        bench.wait_event("data", "ProvisioningSucceeded")
        expect_bound_once(bench, "data", when="when answers are lost", do=_FIND_AGAIN)
        deletes = bench.proxy.on("delete", "persistentvolumes").fail_after(500)
        bench.delete_claims("data")
        expect_nothing_left(bench, when="when answers are lost", do="see delete()")
        assert (saves.applied, deletes.applied) == (2, 1)

    def test_sigterm_amid_many_claims_ends_in_order_and_loses_nothing(self, bench: Bench) -> None:
        names = [f"claim-{number}" for number in range(MANY)]
        bench.claims_at_once(names, bench.good_class())
        bench.wait(bench.assets, "the first asset")
        code = bench.program.stop()
        promise(
            f"SIGTERM ends the program with exit code 0 within {GRACE_S:.0f} s",
            kept=code == 0,
            found=f"exit code {code}",
            do="keep to self.deadline, and do not catch signals",
        )
        bench.restart()
        expect_bound_once(bench, *names, when="after a restart", do=_FIND_AGAIN)


class _Operations(UnderTest):
    """What an admin can rely on."""

    def test_bad_settings_are_told_all_at_once_with_exit_code_2(self, bench: Bench) -> None:
        code, text = bench.program.refuses("--worker-threads=none", "--log-level=loud")
        promise(
            "bad settings are all told, by the flag, and end the program with 2",
            kept=code == 2 and "--worker-threads" in text and "--log-level" in text,
            found=f"exit code {code}: {text}",
            do="call run() and leave argv and the exit code to it",
        )

    def test_health_readiness_and_metrics_answer(self, bench: Bench) -> None:
        made = bench.program.metric("controller_persistentvolumeclaim_provision_total")
        deleted = bench.program.metric("controller_persistentvolume_delete_total")
        live_and_die(bench, "data")
        codes = {path: bench.program.get(path)[0] for path in ("/healthz", "/readyz", "/metrics")}
        promise(
            "/healthz, /readyz and /metrics answer",
            kept=set(codes.values()) == {200},
            found=codes,
            do="return None from data_path() and check() when all is well",
        )
        bench.wait(
            lambda: bench.program.metric("controller_persistentvolume_delete_total") > deleted,
            "the deletion is counted",
        )
        assert bench.program.metric("controller_persistentvolumeclaim_provision_total") > made

    def test_its_manifests_give_the_rights_that_it_needs(self, bench: Bench) -> None:
        if not self.manifests:
            pytest.skip("no manifests are named: set UnderTest.manifests")
        live_and_die(bench, "data")
        refused = bench.program.metric(r'external_storage_api_requests_total\{code="403"')
        asked = [r for r in bench.proxy.requests if r.status == 403]
        promise(
            "the manifests give the rights that the program needs",
            kept=not refused and not asked,
            found=sorted({f"{r.verb} {r.resource}" for r in asked}) or refused,
            do="add them to the rules of its ClusterRole or Role",
        )


class Conformance(_Provisioning, _Deletion, _Interrupted, _Operations):
    """Subclass it once, in a test file, and say how the provisioner is run (``UnderTest``)."""


# -- what several tests do


def live_and_die(bench: Bench, name: str) -> None:
    """The whole life of another claim: whatever the program was to do before, it has done since."""
    before = bench.assets() | bench.traces()
    suffix = f"-{name}-{uuid.uuid4().hex[:4]}"
    bench.claim(name, bench.good_class(suffix))
    [volume] = bench.wait_bound(name)
    bench.delete_claims(name)
    bench.wait(lambda: bench.get_volume(volume.name) is None, f"volume {volume.name} is gone")
    bench.wait(
        lambda: (bench.assets() | bench.traces()) <= before, f"nothing is left of claim {name}"
    )


def delete_while_down(bench: Bench, name: str) -> None:
    """Delete a claim while the program is down; only a finalizer of ours may keep it."""
    bench.delete_claims(name)
    bench.wait(
        lambda: all(map(has_intent, bench.claims())),
        f"claim {name} is gone",
    )


def copy_of(bench: Bench, volume: PersistentVolume, provisioned_by: str) -> PersistentVolume:
    """A volume that leads to the same asset, and has no annotation but this one.

    It is Released when this returns, or gone already: a program that takes it for its own is fast.
    """
    spec = bench.plane.request("GET", f"/api/v1/persistentvolumes/{volume.name}")["spec"]
    # Its claim has never been: the controller manager finds it released.
    spec["claimRef"] |= {"namespace": "default", "uid": str(uuid.uuid4())}
    metadata = {"name": f"{volume.name}-copy", "annotations": {ANN_PROVISIONED_BY: provisioned_by}}
    copy = bench.make(PersistentVolume, {"metadata": metadata, "spec": spec})
    bench.wait(
        lambda: (now := bench.get_volume(copy.name)) is None or now.status.phase == "Released",
        f"volume {copy.name} is Released or gone",
    )
    return copy
