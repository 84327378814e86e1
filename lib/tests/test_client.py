"""The client: typed objects and errors on a real API server, odd answers from a scripted one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from external_storage import PersistentVolumeClaim, Service, StorageClass
from external_storage.kube import auth
from external_storage.kube.auth import ClientConfig, FileToken, NoToken
from external_storage.kube.client import PAGE_SIZE, Client
from external_storage.kube.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NotAllowed,
    NotFound,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from external_storage.testing import ControlPlane

CLAIM = {
    "metadata": {"name": "data"},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "none",
        "resources": {"requests": {"storage": "1Gi"}},
    },
}


class Scripted:
    """An HTTP server that gives the next answer of a list to each request."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[tuple[str, str, str]] = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_GET(self) -> None:
                token = self.headers.get("Authorization", "")
                outer.requests.append((self.command, self.path, token))
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                code, headers, body = outer.answers.pop(0)
                self.send_response(code)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PATCH = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        self.answers.append((code, names, body))

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(config: ClientConfig, **kwargs: Any) -> Client:
        made.append(Client(config, **kwargs))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_objects_are_created_read_patched_and_deleted(api: Client, namespace: str) -> None:
    made = api.create(PersistentVolumeClaim, CLAIM, namespace=namespace)
    assert made.spec.resources.requests == {"storage": "1Gi"}
    patch = {"metadata": {"uid": made.uid, "labels": {"a": "b"}}}
    assert api.patch(PersistentVolumeClaim, "data", patch, namespace=namespace).metadata.labels == {
        "a": "b"
    }
    read = api.get(PersistentVolumeClaim, "data", namespace=namespace)
    assert (read.uid, read.key) == (made.uid, f"{namespace}/data")
    api.delete(PersistentVolumeClaim, "data", uid=made.uid, namespace=namespace)


def test_errors_have_types(api: Client, namespace: str) -> None:
    made = api.create(PersistentVolumeClaim, CLAIM, namespace=namespace)
    with pytest.raises(AlreadyExists):
        api.create(PersistentVolumeClaim, CLAIM, namespace=namespace)
    with pytest.raises(NotFound):
        api.get(PersistentVolumeClaim, "other", namespace=namespace)
    with pytest.raises(Conflict):
        api.delete(PersistentVolumeClaim, "data", uid="wrong", namespace=namespace)
    with pytest.raises(Conflict):
        api.patch(
            PersistentVolumeClaim, "data", {"metadata": {"uid": "wrong"}}, namespace=namespace
        )
    with pytest.raises(Invalid) as caught:
        api.create(StorageClass, {"metadata": {"name": "UPPER"}, "provisioner": "x" * 2000})
    assert len(str(caught.value)) <= 256
    api.delete(PersistentVolumeClaim, "data", uid=made.uid, namespace=namespace)


def test_a_service_account_without_rights_is_forbidden(
    control_plane: ControlPlane, connect: Callable[..., Client], namespace: str
) -> None:
    control_plane.kubectl("create", "serviceaccount", "nobody", "-n", namespace)
    path = control_plane.service_account_kubeconfig(namespace, "nobody")
    client = connect(auth.load(kubeconfig=str(path)))
    with pytest.raises(Forbidden, match="nobody"):
        client.list_all(PersistentVolumeClaim)


def test_long_lists_come_in_pages(
    control_plane: ControlPlane, api: Client, connect: Callable[..., Client], namespace: str
) -> None:
    label = {"page-test": namespace}
    for number in range(PAGE_SIZE + 1):
        body = {
            "metadata": {"name": f"{namespace}-{number}", "labels": label},
            "provisioner": "example.com/none",
        }
        api.create(StorageClass, body)
    lists = []
    client = connect(
        auth.load(kubeconfig=str(control_plane.kubeconfig)),
        observer=lambda verb, *_: lists.append(verb),
    )
    selector = f"page-test={namespace}"
    found = client.list_all(StorageClass, label_selector=selector)
    assert len({item.name for item in found}) == PAGE_SIZE + 1
    assert lists == ["list", "list"]
    control_plane.kubectl("delete", "storageclass", "-l", selector, "--wait=false")


def test_in_cluster_credentials_are_read_from_the_pod(
    control_plane: ControlPlane, connect: Callable[..., Client], namespace: str, tmp_path: Path
) -> None:
    control_plane.kubectl("create", "serviceaccount", "app", "-n", namespace)
    (tmp_path / "token").write_text(control_plane.service_account_token(namespace, "app"))
    (tmp_path / "ca.crt").write_bytes(control_plane.ca_file.read_bytes())
    (tmp_path / "namespace").write_text(namespace)
    environ = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(control_plane.port),
    }
    config = auth.load(environ=environ, service_account_dir=tmp_path)
    assert config.namespace == namespace
    with pytest.raises(Forbidden, match=f"system:serviceaccount:{namespace}:app"):
        connect(config).list_all(PersistentVolumeClaim)


def test_a_server_with_another_ca_is_not_talked_to(
    control_plane: ControlPlane, connect: Callable[..., Client]
) -> None:
    config = ClientConfig(server=control_plane.url, tokens=NoToken())
    with pytest.raises(Unavailable, match=r"(?i)certificate"):
        connect(config).list_all(StorageClass)


def test_one_connection_serves_many_requests(
    scripted: Scripted, connect: Callable[..., Client]
) -> None:
    client = connect(ClientConfig(server=scripted.url, tokens=NoToken()))
    for _ in range(5):
        scripted.answer(200)
        client.get(StorageClass, "x")
    assert scripted.connections == 1


def test_a_request_waits_as_long_as_the_server_says(
    scripted: Scripted, connect: Callable[..., Client]
) -> None:
    client = connect(ClientConfig(server=scripted.url, tokens=NoToken()))
    scripted.answer(429, Retry_After="1")
    scripted.answer(200)
    client.get(StorageClass, "x")
    assert len(scripted.requests) == 2


def test_closing_ends_the_wait_of_a_throttled_request(
    scripted: Scripted, connect: Callable[..., Client]
) -> None:
    client = connect(ClientConfig(server=scripted.url, tokens=NoToken()))
    scripted.answer(429, Retry_After="3600")
    threading.Timer(0.2, client.close).start()
    with pytest.raises(TooManyRequests) as caught:
        client.get(StorageClass, "x")
    assert caught.value.retry_after_s == 3600


def test_a_refused_token_is_read_again_once(
    scripted: Scripted, connect: Callable[..., Client], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    client = connect(ClientConfig(server=scripted.url, tokens=FileToken(file)))
    scripted.answer(200)
    client.get(StorageClass, "x")
    file.write_text("new")
    scripted.answer(401)
    scripted.answer(200)
    client.get(StorageClass, "x")
    assert [token for _, _, token in scripted.requests] == [
        "Bearer old",
        "Bearer old",
        "Bearer new",
    ]
    scripted.answer(401)
    scripted.answer(401)
    with pytest.raises(Unauthorized):
        client.get(StorageClass, "x")


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b"{", {}), (b"", {}), (b"{}", {"Content_Length": "100", "Connection": "close"})],
    ids=["half an object", "nothing", "cut short"],
)
def test_a_broken_answer_is_unavailable(
    scripted: Scripted, connect: Callable[..., Client], body: bytes, headers: dict[str, str]
) -> None:
    client = connect(ClientConfig(server=scripted.url, tokens=NoToken()))
    scripted.answer(200, body, **headers)
    with pytest.raises(Unavailable):
        client.get(StorageClass, "x")


def test_an_error_page_of_a_proxy_is_cut(
    scripted: Scripted, connect: Callable[..., Client]
) -> None:
    client = connect(ClientConfig(server=scripted.url, tokens=NoToken()))
    scripted.answer(502, b"<html>" + b"bad gateway " * 1000)
    with pytest.raises(ServerError) as caught:
        client.get(StorageClass, "x")
    assert caught.value.code == 502
    assert len(str(caught.value)) <= 256


def test_nobody_there_is_unavailable(connect: Callable[..., Client]) -> None:
    client = connect(ClientConfig(server="http://127.0.0.1:1", tokens=NoToken()))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        client.get(StorageClass, "x")


def test_the_observer_is_told_of_every_request(
    scripted: Scripted, connect: Callable[..., Client]
) -> None:
    seen: list[tuple[str, str, str]] = []
    client = connect(
        ClientConfig(server=scripted.url, tokens=NoToken()),
        observer=lambda verb, resource, code, _seconds: seen.append((verb, resource, code)),
    )
    scripted.answer(200)
    client.get(StorageClass, "x")
    scripted.answer(404)
    with pytest.raises(NotFound):
        client.patch(StorageClass, "x", {})
    scripted.stop()
    with pytest.raises(Unavailable):
        client.create(StorageClass, {})
    assert seen == [
        ("get", "storageclasses", "200"),
        ("patch", "storageclasses", "404"),
        ("create", "storageclasses", "error"),
    ]


def test_a_guarded_view_reads_always_and_writes_only_while_it_may(
    api: Client, namespace: str
) -> None:
    may = [False]
    view = api.guarded(lambda: may[0])
    body = {"metadata": {"name": "guarded"}, "spec": {"ports": [{"port": 80}]}}
    with pytest.raises(NotAllowed):
        view.create(Service, body, namespace=namespace)
    assert view.list_all(Service, namespace=namespace) == []
    may[0] = True
    made = view.create(Service, body, namespace=namespace)
    may[0] = False
    with pytest.raises(NotAllowed):
        view.delete(Service, made.name, uid=made.uid, namespace=namespace)
    api.delete(Service, made.name, uid=made.uid, namespace=namespace)
