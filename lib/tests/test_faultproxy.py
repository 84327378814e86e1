"""Each fault of the proxy, with our own client, in front of a real API server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from external_storage import PersistentVolumeClaim, StorageClass
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    KubeError,
    NotFound,
    ServerError,
    TooManyRequests,
    Unavailable,
)
from external_storage.testing import ControlPlane, FaultProxy
from external_storage.testing.requestlog import parse_request

CLAIMS = "persistentvolumeclaims"
LIMIT_S = 60.0
Until = Callable[..., Any]


def create(client: Client, namespace: str, name: str = "data") -> PersistentVolumeClaim:
    body = {
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "none",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    return client.create(PersistentVolumeClaim, body, namespace=namespace)


def names(api: Client, namespace: str) -> list[str]:
    found = api.list_all(PersistentVolumeClaim, namespace=namespace)
    return sorted(claim.name for claim in found)


# -- without a fault


def test_everything_passes_through_and_is_in_the_log(
    proxy: FaultProxy, client: Client, namespace: str
) -> None:
    made = create(client, namespace)
    assert client.get(PersistentVolumeClaim, "data", namespace=namespace).uid == made.uid
    patch = {"metadata": {"labels": {"a": "b"}}}
    client.patch(PersistentVolumeClaim, "data", patch, namespace=namespace)
    assert names(client, namespace) == ["data"]
    client.delete(PersistentVolumeClaim, "data", uid=made.uid, namespace=namespace)
    with pytest.raises(NotFound):
        client.get(StorageClass, "none-such")
    log = [(r.verb, r.resource, r.namespace, r.name, r.status) for r in proxy.requests]
    assert log == [
        ("create", CLAIMS, namespace, "", 201),
        ("get", CLAIMS, namespace, "data", 200),
        ("patch", CLAIMS, namespace, "data", 200),
        ("list", CLAIMS, namespace, "", 200),
        ("delete", CLAIMS, namespace, "data", 200),
        ("get", "storageclasses", "", "none-such", 404),
    ]
    assert {r.user_agent for r in proxy.requests} == {"under-test"}
    assert all(r.done and not r.fault for r in proxy.requests)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/api/v1/namespaces", ("list", "namespaces", "", "")),
        ("GET", "/api/v1/namespaces/a", ("get", "namespaces", "", "a")),
        ("PUT", "/api/v1/namespaces/a/finalize", ("update", "namespaces/finalize", "", "a")),
        ("DELETE", "/api/v1/namespaces/a/pods", ("deletecollection", "pods", "a", "")),
        ("PATCH", "/api/v1/namespaces/a/pods/b/status", ("patch", "pods/status", "a", "b")),
        ("GET", "/apis/x.io/v1/things?watch=1", ("watch", "things", "", "")),
        ("GET", "/apis/x.io/v1/things?watch=false", ("list", "things", "", "")),
        ("GET", "/readyz?verbose", ("get", "/readyz", "", "")),
    ],
)
def test_a_request_is_told_by_method_and_path(
    method: str, target: str, expected: tuple[str, ...]
) -> None:
    found = parse_request(method, target)
    assert (found.verb, found.resource, found.namespace, found.name) == expected


def test_a_service_account_stays_who_it_is(
    proxy: FaultProxy, control_plane: ControlPlane, namespace: str
) -> None:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    control_plane.request("POST", path, {"metadata": {"name": "weak"}})
    own = control_plane.service_account_kubeconfig(namespace, "weak")
    client = Client(auth.load(kubeconfig=str(proxy.kubeconfig(for_=own))))
    try:
        with pytest.raises(Forbidden, match=f"system:serviceaccount:{namespace}:weak"):
            client.get(PersistentVolumeClaim, "data", namespace=namespace)
    finally:
        client.close()


def test_a_certificate_stays_who_it_is_beside_another(
    proxy: FaultProxy, control_plane: ControlPlane, client: Client, namespace: str
) -> None:
    other = proxy.kubeconfig(for_=control_plane.directory / "kube-scheduler.kubeconfig")
    scheduler = Client(auth.load(kubeconfig=str(other)))
    try:
        with pytest.raises(Forbidden, match="system:kube-scheduler"):
            create(scheduler, namespace)
        assert create(client, namespace).name == "data"
    finally:
        scheduler.close()


def test_kubectl_passes_through(
    proxy: FaultProxy, control_plane: ControlPlane, namespace: str
) -> None:
    out = control_plane.kubectl("get", "namespace", namespace, kubeconfig=proxy.kubeconfig())
    assert namespace in out
    assert any(r.user_agent.startswith("kubectl/") for r in proxy.requests)


# -- errors


@pytest.mark.parametrize(
    ("status", "error"), [(409, AlreadyExists), (410, Gone), (500, ServerError), (503, ServerError)]
)
def test_fail_does_not_ask_the_server(
    proxy: FaultProxy,
    client: Client,
    namespace: str,
    status: int,
    error: type[KubeError],
) -> None:
    proxy.on("create", CLAIMS, namespace=namespace).fail(status)
    with pytest.raises(error):
        create(client, namespace)
    assert names(client, namespace) == []
    (seen, _) = proxy.requests
    assert (seen.status, seen.server_status, seen.fault) == (status, 0, "fail")


def test_429_tells_when_to_come_again(proxy: FaultProxy, client: Client, namespace: str) -> None:
    proxy.on("create", CLAIMS, times=2).fail(429, retry_after_s=1)
    create(client, namespace)
    assert [r.status for r in proxy.requests] == [429, 429, 201]
    proxy.on("list", CLAIMS).fail(429)
    with pytest.raises(TooManyRequests):
        names(client, namespace)


def test_fail_after_lets_the_server_carry_it_out(
    proxy: FaultProxy, client: Client, api: Client, namespace: str
) -> None:
    proxy.on("create", CLAIMS).fail_after(500)
    with pytest.raises(ServerError):
        create(client, namespace)
    assert names(api, namespace) == ["data"]
    (seen,) = proxy.requests
    assert (seen.status, seen.server_status, seen.fault) == (500, 201, "fail_after")


def test_rules_count_and_go_away(proxy: FaultProxy, client: Client, namespace: str) -> None:
    def outcomes(count: int) -> str:
        return "".join("-" if _fails(client, namespace) else "+" for _ in range(count))

    rule = proxy.on("list", CLAIMS, times=2, after=1, every=2).fail(500)
    assert outcomes(7) == "++-+-++"
    assert (rule.applied, proxy.rules()) == (2, [])
    proxy.on("list", CLAIMS).fail(500)
    proxy.on("list", CLAIMS).fail(503)
    assert outcomes(3) == "--+"
    proxy.on("list", CLAIMS, namespace="another").fail(500)
    proxy.on("list", "persistentvolumes").fail(500)
    proxy.on("get", CLAIMS).fail(500)
    assert outcomes(1) == "+"
    proxy.on(times=None).fail(500)
    assert outcomes(3) == "---"
    proxy.clear()
    assert outcomes(1) == "+"


def _fails(client: Client, namespace: str) -> bool:
    try:
        names(client, namespace)
    except ServerError:
        return True
    return False


def test_a_rule_for_one_name(proxy: FaultProxy, client: Client, namespace: str) -> None:
    for name in ("one", "two"):
        create(client, namespace, name)
    proxy.on("get", CLAIMS, name="two", times=None).fail(409)
    assert client.get(PersistentVolumeClaim, "one", namespace=namespace).name == "one"
    with pytest.raises(Conflict):
        client.get(PersistentVolumeClaim, "two", namespace=namespace)


# -- cuts and delays


@pytest.mark.parametrize("before", [True, False])
def test_cut_on_a_fresh_connection(
    proxy: FaultProxy, client: Client, api: Client, namespace: str, before: bool
) -> None:
    proxy.on("create", CLAIMS).cut(before=before)
    with pytest.raises(Unavailable):
        create(client, namespace)
    assert names(api, namespace) == ([] if before else ["data"])
    (seen,) = proxy.requests
    assert (seen.status, seen.server_status) == (0, 0 if before else 201)


def test_half_an_answer_is_none(
    proxy: FaultProxy, client: Client, api: Client, namespace: str
) -> None:
    names(client, namespace)
    proxy.on("create", CLAIMS).cut(half=True)
    with pytest.raises(Unavailable):
        create(client, namespace)
    assert names(api, namespace) == ["data"]
    assert [r.verb for r in proxy.requests] == ["list", "create"], "nothing is sent twice"


@pytest.mark.parametrize("before", [True, False])
def test_delay_holds_the_request_or_its_answer(
    proxy: FaultProxy, client: Client, api: Client, namespace: str, before: bool
) -> None:
    release = threading.Event()
    proxy.on("create", CLAIMS).delay(release, before=before)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(create, client, namespace)
        try:
            proxy.wait_for(lambda r: r.fault == "delay" and (before or r.server_status == 201))
            assert names(api, namespace) == ([] if before else ["data"])
            assert not made.done()
        finally:
            release.set()
        assert made.result(LIMIT_S).name == "data"


def test_delay_by_seconds(proxy: FaultProxy, client: Client, namespace: str) -> None:
    proxy.on("create", CLAIMS).delay(0.2)
    started = time.monotonic()
    create(client, namespace)
    assert time.monotonic() - started >= 0.2


# -- misuse


def test_wait_for_tells_what_there_was(proxy: FaultProxy, client: Client, namespace: str) -> None:
    names(client, namespace)
    with pytest.raises(TimeoutError, match=r"0 of 1 requests .*\n.*verb='list'"):
        proxy.wait_for(lambda r: r.verb == "create", limit_s=0.01)


def test_a_client_with_an_unknown_certificate_is_told_in_the_test(
    control_plane: ControlPlane,
) -> None:
    proxy = FaultProxy(control_plane)
    proxy.start()
    other = proxy.kubeconfig(for_=control_plane.directory / "kube-scheduler.kubeconfig")
    stranger = replace(
        auth.load(kubeconfig=str(control_plane.kubeconfig), master=proxy.url),
        ca_file=auth.load(kubeconfig=str(other)).ca_file,
    )
    client = Client(stranger)
    with pytest.raises(Unavailable):
        client.get(StorageClass, "any")
    client.close()
    with pytest.raises(ValueError, match="not known"):
        proxy.__exit__(None, None, None)
