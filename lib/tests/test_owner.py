"""Who we are, among clusters and provisioners that reach the same back end."""

from __future__ import annotations

from typing import Any, cast

import pytest

from external_storage import Owner, OwnerUnknown, Unchanged
from external_storage.kube import auth
from external_storage.kube.client import Client
from external_storage.kube.errors import Unavailable
from external_storage.owner import OwnerFinder
from external_storage.testing import ControlPlane

NAMES = ("example.com/ours", "example.com/formerly")


def test_it_owns_what_it_has_made_under_any_of_its_names_in_this_cluster_only() -> None:
    owner = Owner("cluster-1", NAMES)
    assert str(owner) == "cluster-1/example.com/ours"
    assert owner.owns(str(owner))
    assert owner.owns("cluster-1/example.com/formerly")
    for other in ("", "cluster-1", "cluster-1/", "cluster-1/example.com/other", "example.com/ours"):
        assert not owner.owns(other)
    assert not owner.owns(str(Owner("cluster-2", NAMES)))


def test_the_cluster_is_asked_once_and_again_only_after_a_failure(
    control_plane: ControlPlane,
) -> None:
    client = Client(auth.load(kubeconfig=str(control_plane.kubeconfig)))
    asked: list[str] = []

    class Counting:
        def get(self, kind: Any, name: str) -> Any:
            asked.append(name)
            if len(asked) == 1:
                raise Unavailable("no answer")
            return client.get(kind, name)

    finder = OwnerFinder(cast(Any, Counting()), NAMES)
    try:
        with pytest.raises(OwnerUnknown, match="kube-system, cannot be read: no answer"):
            finder()
        assert finder() == finder()
        assert asked == ["kube-system"] * 2
        namespace = ("get", "namespace", "kube-system", "-o=jsonpath={.metadata.uid}")
        uid = control_plane.kubectl(*namespace)
        assert finder() == Owner(uid, NAMES)
    finally:
        client.close()


def test_while_it_is_unknown_nothing_has_changed() -> None:
    assert issubclass(OwnerUnknown, Unchanged)
