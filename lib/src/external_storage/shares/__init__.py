"""Volumes that are directories on file servers, which the kubelet has mounted into our pod.

In reading order:

- A **Share** is one such mount, a path of a file server. We never mount. Every call on it runs in a
  process of its own, killed at the deadline, and looks first whether what it works on is the
  expected mount; if not, or while the server hangs, it is **unavailable** and calls fail at once.
- **ShareDirectories** are the volumes on it: made, removed by way of a trash, archived. Each has a
  record in the share's private directory, ``.external-storage``, that no volume can be in.
- **JoinedRecords** are the records of all shares together: a provisioner's ``records``.
"""

from external_storage.shares.directories import ShareDirectories
from external_storage.shares.joined_records import JoinedRecords
from external_storage.shares.layout import PRIVATE, check_path
from external_storage.shares.location import Expected
from external_storage.shares.making import Ownership
from external_storage.shares.metrics import export_metrics
from external_storage.shares.records import PathTaken, ShareRecords
from external_storage.shares.results import DirectoryRefused, Ended, Ending, Made
from external_storage.shares.share import Share, ShareUnavailable, looked_at
from external_storage.shares.usage import Usage

__all__ = [
    "PRIVATE",
    "DirectoryRefused",
    "Ended",
    "Ending",
    "Expected",
    "JoinedRecords",
    "Made",
    "Ownership",
    "PathTaken",
    "Share",
    "ShareDirectories",
    "ShareRecords",
    "ShareUnavailable",
    "Usage",
    "check_path",
    "export_metrics",
    "looked_at",
]
