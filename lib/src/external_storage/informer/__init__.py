"""A local copy of one kind of object, kept up to date by list and watch."""

from external_storage.informer.informer import Handler, Informer
from external_storage.informer.reflector import Reflector
from external_storage.informer.store import Change, Lister, Store

__all__ = ["Change", "Handler", "Informer", "Lister", "Reflector", "Store"]
