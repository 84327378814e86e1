"""Decoders are made once, however many threads come first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from external_storage.kube.decoding import decoder
from external_storage.kube.types import PersistentVolume

# In a process of its own: what goes wrong here is a segmentation fault.
_RACE = """
import sys, threading
from external_storage.kube.client import ObjectList
from external_storage.kube.decoding import decoder
from external_storage.kube.types import KubeObject
sys.setswitchinterval(1e-6)
start = threading.Barrier(8)
def decode():
    start.wait()
    for kind in KubeObject.__subclasses__():
        decoder(kind).decode(b'{"metadata": {"name": "a"}}')
        decoder(ObjectList[kind]).decode(b'{"items": [{"metadata": {"labels": {"a": "b"}}}]}')
threads = [threading.Thread(target=decode) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("_round", range(3))
def test_threads_that_decode_for_the_first_time_at_once(_round: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _RACE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_is_one_decoder_for_a_type() -> None:
    assert decoder(PersistentVolume) is decoder(PersistentVolume)
