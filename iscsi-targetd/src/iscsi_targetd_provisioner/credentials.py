"""Which CHAP credentials a class or a volume means, and where they are read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from external_storage import PersistentVolume, ProvisioningFailed, Unchanged
from external_storage.kube.client import Client
from external_storage.kube.errors import Forbidden, KubeError
from external_storage.kube.types import Secret
from iscsi_targetd_provisioner.chap import Chap, ChapError, SecretName
from iscsi_targetd_provisioner.settings import IscsiTargetdParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Reads Secrets that an admin has named in our Role, and the original's file."""

    client: Client
    namespace: str
    file: Path
    _read_before: dict[SecretName, Chap] = field(default_factory=dict, repr=False)

    def forget(self) -> None:
        """Begin a round of ``of_volume``: each Secret is read once in it."""
        self._read_before.clear()

    def of_class(self, asked: IscsiTargetdParameters) -> Chap | None:
        """What a volume of the class is to be guarded with; None: by nothing.

        Raises ``ProvisioningFailed``: they are not there, or cannot be used; ``Unchanged``: the API
        server does not say.
        """
        if not asked.chap_auth_session:
            return None
        if asked.chap_secret_name:
            return self._read(self.secret_of_class(asked))
        try:
            return Chap.from_properties(self.file)
        except ChapError as error:
            text = f"chapAuthSession without chapSecretName: {error}"
            raise ProvisioningFailed(text) from error

    def secret_of_class(self, asked: IscsiTargetdParameters) -> SecretName:
        return SecretName(asked.chap_secret_namespace or self.namespace, asked.chap_secret_name)

    def of_volume(self, volume: PersistentVolume) -> Chap | None:
        """As ``of_class``, for a volume that is there; the Secret may have changed since."""
        source = volume.spec.iscsi
        if source is None or not source.chap_auth_session:
            return None
        name, namespace = source.secret_ref.get("name"), source.secret_ref.get("namespace")
        if name and namespace:
            secret = SecretName(namespace, name)
            if secret not in self._read_before:
                self._read_before[secret] = self._read(secret)
            return self._read_before[secret]
        try:
            return Chap.from_properties(self.file)
        except ChapError as error:
            raise ProvisioningFailed(str(error)) from error

    def _read(self, name: SecretName) -> Chap:
        try:
            secret = self.client.find(Secret, name.name, namespace=name.namespace)
        except Forbidden as error:
            text = f"Secret {name} must not be read by us: name it in a Role (see deploy/chap.yaml)"
            raise ProvisioningFailed(text) from error
        except KubeError as error:
            raise Unchanged(f"Secret {name} cannot be read: {error}") from error
        if secret is None:
            raise ProvisioningFailed(f"Secret {name} with the CHAP credentials does not exist")
        try:
            return Chap.from_secret(secret.data, source=f"Secret {name}")
        except ChapError as error:
            raise ProvisioningFailed(str(error)) from error
