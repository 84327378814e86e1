"""A queue of keys for level-based work; knows nothing of Kubernetes."""

from external_storage.workqueue.queue import WorkQueue
from external_storage.workqueue.ratelimit import Backoff, RateLimiter
from external_storage.workqueue.workers import Workers

__all__ = ["Backoff", "RateLimiter", "WorkQueue", "Workers"]
