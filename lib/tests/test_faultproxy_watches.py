"""Watches through the proxy, the death of a client, and the proxy's own end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from external_storage import PersistentVolumeClaim
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import (
    Gone,
    KubeError,
    ServerError,
    Unavailable,
)
from external_storage.kube.transport import Stream
from external_storage.testing import ControlPlane, FaultProxy

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


class Watching:
    """A watch of the namespace's claims in a thread of its own, from now on."""

    def __init__(self, proxy: FaultProxy, client: Client, namespace: str) -> None:
        version = ""
        for page in client.pages(PersistentVolumeClaim, namespace=namespace):
            version = page.metadata.resource_version
        self.names: list[str] = []
        self.error: KubeError | None = None
        self._condition = threading.Condition()
        running = proxy.watching(CLAIMS)
        self._stream: Stream = client.watch(
            PersistentVolumeClaim, resource_version=version, timeout_s=300, namespace=namespace
        )
        self._thread = threading.Thread(target=self._run, name="watching")
        self._thread.start()
        proxy.wait_for(lambda r: r.verb == "watch" and r.status != 0, running + 1)

    def _run(self) -> None:
        try:
            self._stream.run(self._on_line)
        except KubeError as error:
            self.error = error

    def _on_line(self, line: bytes) -> None:
        event = msgspec.json.decode(line)
        if event["type"] == "ADDED":
            with self._condition:
                self.names.append(event["object"]["metadata"]["name"])
                self._condition.notify_all()

    def wait(self, count: int) -> list[str]:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.names) >= count, LIMIT_S)
            return list(self.names)

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self._stream.close()
        self.join()


@pytest.fixture
def watching(proxy: FaultProxy, client: Client, namespace: str) -> Iterator[Watching]:
    made = Watching(proxy, client, namespace)
    yield made
    made.stop()


# -- watches


def test_a_watch_is_passed_on_at_once(watching: Watching, api: Client, namespace: str) -> None:
    for number in range(3):
        create(api, namespace, f"n{number}")
        # The next is made only when this one has arrived: nothing is waited for on the way.
        assert watching.wait(number + 1)[-1] == f"n{number}"


def test_a_lagging_watch_delivers_later_and_in_order(
    proxy: FaultProxy, watching: Watching, api: Client, namespace: str, until: Until
) -> None:
    release = threading.Event()
    proxy.lag(CLAIMS, release)
    expected = [f"n{number}" for number in range(10)]
    for name in expected:
        create(api, namespace, name)
    until(lambda: proxy.held(CLAIMS) >= 10, "the events are held")
    assert watching.names == []
    release.set()
    assert watching.wait(10) == expected
    until(lambda: proxy.held() == 0, "nothing is held")


@pytest.mark.parametrize("reset", [False, True])
def test_cut_watches_ends_them_in_good_order_or_not(
    proxy: FaultProxy, client: Client, namespace: str, reset: bool
) -> None:
    watching = Watching(proxy, client, namespace)
    assert proxy.cut_watches("persistentvolumes") == 0
    assert proxy.cut_watches(CLAIMS, reset=reset) == 1
    watching.join()
    assert isinstance(watching.error, Unavailable) if reset else watching.error is None
    assert proxy.watching() == 0


def test_a_watch_whose_client_is_gone_ends(proxy: FaultProxy, watching: Watching) -> None:
    watching.stop()
    proxy.wait_for(lambda r: r.verb == "watch" and r.done)
    assert proxy.watching() == 0


@pytest.mark.parametrize("as_status", [False, True])
def test_410_on_every_second_watch(
    proxy: FaultProxy, client: Client, as_status: bool, namespace: str
) -> None:
    proxy.gone_on_watch(CLAIMS, as_status=as_status)
    lines: list[bytes] = []
    good = Watching(proxy, client, namespace)
    stream = client.watch(PersistentVolumeClaim, resource_version="1", timeout_s=60)
    with pytest.raises(Gone) if as_status else contextlib.nullcontext():
        stream.run(lines.append)
    good.stop()
    if not as_status:
        (event,) = [msgspec.json.decode(line) for line in lines]
        assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
    assert [r.fault for r in proxy.requests if r.verb == "watch"] == ["", "gone"]


def test_a_watch_can_be_refused_and_cut(proxy: FaultProxy, client: Client, namespace: str) -> None:
    proxy.on("watch", CLAIMS).fail_after(503)
    refused = Watching(proxy, client, namespace)
    refused.join()
    assert isinstance(refused.error, ServerError)
    proxy.on("watch", CLAIMS).cut(half=True)
    stream = client.watch(PersistentVolumeClaim, resource_version="1", timeout_s=60)
    with pytest.raises(Unavailable):
        stream.run(lambda _line: None)


# -- the client's death, the server's absence

_CREATE_TWO = """
import sys
from external_storage import PersistentVolumeClaim
from external_storage.kube import auth
from external_storage.kube.client import Client

kubeconfig, namespace = sys.argv[1:]
client = Client(auth.load(kubeconfig=kubeconfig))
for name in ("one", "two"):
    client.create(PersistentVolumeClaim, {
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "none",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }, namespace=namespace)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_client_is_killed_at_its_second_request(
    proxy: FaultProxy, api: Client, namespace: str, tmp_path: Path, when: Any
) -> None:
    go = threading.Event()
    proxy.on("create", CLAIMS, after=0).delay(go)
    script = tmp_path / "client.py"
    script.write_text(_CREATE_TWO, encoding="ascii")
    argv = [sys.executable, str(script), str(proxy.kubeconfig()), namespace]
    with subprocess.Popen(argv) as process:
        proxy.wait_for(lambda r: r.fault == "delay")
        # The first is on its way already, so that its next one is the first from now on.
        proxy.kill_after(1, process.pid, when=when)
        go.set()
        assert process.wait(LIMIT_S) == -9
    assert names(api, namespace) == (["one"] if when == "before" else ["one", "two"])
    assert [r.fault for r in proxy.requests] == ["delay", "kill"]


def test_a_callback_in_place_of_a_kill(proxy: FaultProxy, client: Client, namespace: str) -> None:
    called = threading.Event()
    proxy.kill_after(2, called.set)
    names(client, namespace)
    assert not called.is_set()
    fresh = Client(client.config)
    with pytest.raises(Unavailable):
        create(fresh, namespace)
    fresh.close()
    assert called.is_set()


def test_down_refuses_and_up_serves_on_the_same_port(
    proxy: FaultProxy, client: Client, watching: Watching, namespace: str
) -> None:
    url = proxy.url
    proxy.down()
    watching.join()
    assert isinstance(watching.error, Unavailable)
    with pytest.raises(Unavailable):
        names(client, namespace)
    proxy.up()
    assert proxy.url == url
    assert names(client, namespace) == []


def test_stop_ends_what_is_held(control_plane: ControlPlane, namespace: str) -> None:
    with FaultProxy(control_plane) as proxy, ThreadPoolExecutor(1) as pool:
        client = Client(auth.load(kubeconfig=str(proxy.kubeconfig())))
        never = threading.Event()
        proxy.lag(CLAIMS, never)
        watching = Watching(proxy, client, namespace)
        proxy.on("create", CLAIMS).delay(never)
        made = pool.submit(create, client, namespace)
        proxy.wait_for(lambda r: r.fault == "delay")
        proxy.stop()
        with pytest.raises(Unavailable):
            made.result(LIMIT_S)
        watching.join()
        client.close()
