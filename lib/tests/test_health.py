"""The endpoints, over real HTTP on loopback."""

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from external_storage.health import Check, Health, HealthServer

PATIENCE_S = 20.0


def well() -> None:
    return None


def failing(text: str) -> Check:
    return lambda: text


def broken() -> str | None:
    raise RuntimeError("a defect")


@contextmanager
def serving(
    *,
    alive: Check = well,
    ready: Check = well,
    note: Check = well,
    metrics: Callable[[], bytes] = lambda: b"up 1\n",
    metrics_path: str = "/metrics",
    host: str = "127.0.0.1",
) -> Iterator[int]:
    health = Health(alive={"informers": alive}, ready={"data-path": ready}, notes={"api": note})
    server = HealthServer((host, 0), health, metrics=metrics, metrics_path=metrics_path)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


def get(port: int, path: str, *, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
def test_all_is_well(path: str) -> None:
    with serving() as port:
        assert get(port, path) == (200, "ok\n")


def test_an_unready_data_path_fails_readyz_alone() -> None:
    with serving(ready=failing("ganesha is down")) as port:
        assert get(port, "/readyz") == (503, "[-] data-path: ganesha is down\n")
        assert get(port, "/healthz")[0] == 200


def test_what_a_restart_helps_fails_healthz_alone() -> None:
    with serving(alive=failing("no longer watching")) as port:
        assert get(port, "/healthz") == (503, "[-] informers: no longer watching\n")
        assert get(port, "/livez")[0] == 503
        assert get(port, "/readyz")[0] == 200


def test_trouble_with_the_api_fails_neither_and_is_told_by_verbose() -> None:
    with serving(note=failing("cannot watch"), ready=failing("down")) as port:
        assert get(port, "/healthz") == (200, "ok\n")
        code, text = get(port, "/healthz?verbose")
    assert code == 200
    assert text.splitlines() == [
        "[+] informers: ok",
        "[-] data-path: down",
        "[-] api: cannot watch",
    ]


def test_verbose_readyz_tells_of_readiness_only() -> None:
    with serving(note=failing("cannot watch")) as port:
        assert get(port, "/readyz?verbose=true") == (200, "[+] data-path: ok\n")


def test_a_check_that_raises_has_failed_and_breaks_nothing() -> None:
    with serving(ready=broken) as port:
        assert get(port, "/readyz") == (503, "[-] data-path: check failed: a defect\n")
        assert get(port, "/healthz") == (200, "ok\n")


def test_the_metrics_are_under_their_path() -> None:
    with serving(metrics_path="/own") as port:
        assert get(port, "/own") == (200, "up 1\n")
        assert get(port, "/metrics")[0] == 404


@pytest.mark.parametrize("path", ["/", "/healthz/", "/healthzz", "/metrics/x", "/readyz/../x"])
def test_other_paths_are_not_found(path: str) -> None:
    with serving() as port:
        assert get(port, path) == (404, "not found\n")


def test_several_requests_go_over_one_connection() -> None:
    with serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        for _ in range(3):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok\n"
        connection.close()


def test_a_check_that_hangs_holds_up_no_other_request() -> None:
    asked, release = threading.Event(), threading.Event()

    def hang() -> str | None:
        asked.set()
        release.wait(PATIENCE_S)
        return None

    with serving(ready=hang) as port:
        thread = threading.Thread(target=get, args=(port, "/readyz"), daemon=True)
        thread.start()
        assert asked.wait(PATIENCE_S)
        assert get(port, "/healthz") == (200, "ok\n")
        release.set()
        thread.join(PATIENCE_S)


def test_an_address_that_is_taken_is_told_before_anything_starts() -> None:
    health = Health(alive={}, ready={}, notes={})
    with serving() as port, pytest.raises(OSError, match="in use"):
        HealthServer(("127.0.0.1", port), health, metrics=bytes)


def test_stop_frees_the_port_and_ends_the_thread() -> None:
    with serving() as port:
        assert "health" in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionRefusedError):
        get(port, "/healthz")
    assert "health" not in [thread.name for thread in threading.enumerate()]


def test_a_server_that_was_never_started_can_be_stopped() -> None:
    server = HealthServer(("127.0.0.1", 0), Health(alive={}, ready={}, notes={}), metrics=bytes)
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        get(server.port, "/healthz")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


@needs_ipv6
def test_an_ipv6_address_is_served() -> None:
    with serving(host="::1") as port:
        assert get(port, "/healthz", host="::1") == (200, "ok\n")


@needs_ipv6
def test_an_endpoint_without_a_host_is_served_on_every_address() -> None:
    """On an IPv6 cluster the kubelet probes the pod's IPv6 address."""
    with serving(host="") as port:
        assert get(port, "/healthz", host="127.0.0.1")[0] == 200
        assert get(port, "/healthz", host="::1")[0] == 200


def test_metrics_that_cannot_be_read_are_a_500_and_no_raw_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def cannot() -> bytes:
        raise RuntimeError("a gauge failed")

    with serving(metrics=cannot) as port:
        try:
            code = get(port, "/metrics")[0]
        except http.client.HTTPException:
            code = 0
    assert code == 500
    assert "Traceback" not in capfd.readouterr().err
