"""Everything a running provisioner is made of, started in order and stopped in reverse."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from external_storage.agent import Agent, AgentContext
from external_storage.controller import ProvisionController
from external_storage.errors import CannotStart
from external_storage.events import EventRecorder
from external_storage.health import Health, HealthServer
from external_storage.kube.auth import ClientConfig
from external_storage.kube.client import Client
from external_storage.kube.throttle import Throttle
from external_storage.leader import Lease, lease_name
from external_storage.logs import get_logger
from external_storage.metrics import Metrics
from external_storage.owner import OwnerFinder
from external_storage.provisioner import Context, Provisioner
from external_storage.settings import ProgramSettings, Settings

log = get_logger(__name__)

_EVENTS_FLUSH_S = 3.0
# Also when the work has used up all the time: the last events tell what was cut off.
_EVENTS_LEAST_S = 1.0
# Else the others would wait for the lease to run out.
_RELEASE_LEAST_S = 1.0


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    start: Callable[[], None]
    stop: Callable[[float], object]


class Manager:
    """Starts and stops parts together; use it as a context manager, or ``start`` and ``stop``.

    ``stop`` is given the seconds it may take, and shares them out as it goes.
    """

    def __init__(self, *, stop_timeout_s: float = 25.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._parts: list[_Part] = []
        self._started: list[_Part] = []

    @classmethod
    def for_provisioner(
        cls,
        provisioner_type: type[Provisioner[Any, Any]],
        settings: Settings,
        config: ClientConfig,
    ) -> Self:
        """A controller for one provisioner with its client, events, health and metrics.

        Raises:
            CannotStart: the HTTP endpoint's address cannot be had.
        """
        manager = cls(stop_timeout_s=settings.shutdown_timeout)
        metrics = Metrics()
        throttle = _throttle(settings)
        name = settings.provisioner_name
        client = _client(config, name, metrics, throttle)
        events = EventRecorder(client, name, on_drop=metrics.events_dropped.inc)
        controllers: list[ProvisionController] = []
        context = Context(
            name=name,
            namespace=config.namespace,
            client=client,
            events=events,
            metrics=metrics,
            owner=OwnerFinder(client, settings.names),
            add_part=manager.add,
            **_of_controller(controllers),
        )
        provisioner = provisioner_type(settings, context)
        # Its own: work that waits for its turn, or for an answer, must not make the lease late.
        lease_client = _client(config, name, metrics)
        lease = _lease(lease_client, settings, events, controllers)
        controller = ProvisionController(
            client,
            provisioner,
            settings,
            events=events,
            metrics=metrics,
            is_leader=lease.is_held if lease is not None else None,
        )
        controllers.append(controller)
        manager._add_health(settings, _health(provisioner, controller, lease), metrics)
        manager.add("client", _nothing, lambda _: client.close())
        manager.add("provisioner", provisioner.start, lambda _: provisioner.stop())
        manager._add_events(events)
        if lease is not None:
            manager._add_lease(lease, lease_client, controller, metrics)
        manager.add("controller", controller.start, controller.stop)
        manager._add_throttle(throttle)
        return manager

    @classmethod
    def for_agent(
        cls,
        agent_type: type[Agent[Any]],
        settings: ProgramSettings,
        config: ClientConfig,
        name: str,
    ) -> Self:
        """An agent with its client, events, health and metrics. ``CannotStart`` as above."""
        manager = cls(stop_timeout_s=settings.shutdown_timeout)
        metrics = Metrics()
        throttle = _throttle(settings)
        client = _client(config, name, metrics, throttle)
        events = EventRecorder(client, name, on_drop=metrics.events_dropped.inc)
        context = AgentContext(
            name=name, namespace=config.namespace, client=client, events=events, metrics=metrics
        )
        agent = agent_type(settings, context)
        manager._add_health(settings, agent.health(), metrics, agent.pages())
        manager.add("client", _nothing, lambda _: client.close())
        manager._add_events(events)
        manager.add("agent", agent.start, agent.stop)
        manager._add_throttle(throttle)
        return manager

    def _add_throttle(self, throttle: Throttle | None) -> None:
        if throttle is not None:
            # Stopped first: whoever waits for a turn would hold up the end.
            self.add("throttle", _nothing, lambda _: throttle.close())

    def _add_events(self, events: EventRecorder) -> None:
        def stop(left: float) -> None:
            events.stop(max(min(left, _EVENTS_FLUSH_S), _EVENTS_LEAST_S))

        self.add("events", events.start, stop)

    def _add_lease(
        self, lease: Lease, client: Client, controller: ProvisionController, metrics: Metrics
    ) -> None:
        """Before the controller, and so stopped after it: let go of when the work has ended."""
        metrics.gauge("external_storage_leader", "1 while this replica leads", lease.is_held)
        self.add("lease client", _nothing, lambda _: client.close())

        def stop(left: float) -> None:
            # Work that was cut off may go on until we exit: nobody is to begin before that.
            lease.stop(max(left, _RELEASE_LEAST_S), release=controller.has_drained)

        self.add("lease", lease.start, stop)

    def _add_health(
        self,
        settings: ProgramSettings,
        health: Health,
        metrics: Metrics,
        pages: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        address = settings.http_address()
        if address is None:
            return
        try:
            server = HealthServer(
                address,
                health,
                metrics=metrics.render,
                metrics_path=settings.metrics_path,
                pages=pages,
            )
        except OSError as error:
            why = f"--http-endpoint {settings.http_endpoint}: {error.strerror or error}"
            raise CannotStart(why) from error
        self.add("health", server.start, lambda _: server.stop())

    def add(self, name: str, start: Callable[[], None], stop: Callable[[float], object]) -> None:
        """Add a part; it is started after, and stopped before, those added earlier.

        ``stop`` is called with the seconds left; False from it says that work was cut off.
        """
        self._parts.append(_Part(name, start, stop))

    def start(self) -> None:
        """Start all parts; if one fails, stop it and those before it and raise its error."""
        for part in self._parts:
            self._started.append(part)
            try:
                part.start()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> bool:
        """Stop what was started, the last first; False if some work was cut off."""
        deadline = time.monotonic() + self._stop_timeout_s
        clean = True
        while self._started:
            part = self._started.pop()
            try:
                result = part.stop(max(deadline - time.monotonic(), 0.0))
            except Exception:
                log.exception("stopping a part failed", part=part.name)
                result = False
            clean = clean and result is not False
        return clean

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def _of_controller(controllers: Sequence[ProvisionController]) -> dict[str, Any]:
    """What a context offers of the controller that is in ``controllers`` by the time of a start."""
    return {
        "reconcile_soon": lambda: controllers[0].reconcile_soon(),
        "watch_volumes": lambda handler: controllers[0].watch_volumes(handler),
    }


def _throttle(settings: ProgramSettings) -> Throttle | None:
    if not settings.kube_api_qps:
        return None
    return Throttle(settings.kube_api_qps, settings.kube_api_burst)


def _client(
    config: ClientConfig, name: str, metrics: Metrics, throttle: Throttle | None = None
) -> Client:
    return Client(
        config,
        user_agent=f"external-storage/{name}",
        observer=metrics.observe_request,
        pause=throttle.wait if throttle is not None else None,
    )


def _lease(
    client: Client,
    settings: Settings,
    events: EventRecorder,
    controllers: Sequence[ProvisionController],
) -> Lease | None:
    """For the controller that is in ``controllers`` by the time it starts."""
    if not settings.leader_elect:
        return None
    return Lease(
        client,
        name=settings.leader_elect_resource_name or lease_name(settings.provisioner_name),
        namespace=settings.leader_elect_resource_namespace or client.namespace,
        identity=f"{socket.gethostname()}_{uuid.uuid4()}",
        duration_s=settings.leader_elect_lease_duration,
        renew_deadline_s=settings.leader_elect_renew_deadline,
        retry_period_s=settings.leader_elect_retry_period,
        on_acquired=lambda: controllers[0].lead(),
        on_lost=lambda: controllers[0].follow(),
        events=events,
    )


def _nothing() -> None:
    return None


def _health(
    provisioner: Provisioner[Any, Any], controller: ProvisionController, lease: Lease | None
) -> Health:
    """Readiness follows the data path where there is one, else the first sync."""
    has_data_path = type(provisioner).data_path is not Provisioner.data_path
    syncing = {"sync": controller.syncing}
    return Health(
        alive={"informers": controller.dead, **({"lease": lease.dead} if lease else {})},
        ready={"data-path": provisioner.data_path} if has_data_path else syncing,
        notes={
            **syncing,
            "api": controller.disconnected,
            **({"leader": lease.waiting} if lease else {}),
            "backend": controller.paused,
            "backend-parts": provisioner.trouble,
            "calls": controller.stuck,
        },
    )
