"""Lists and tables follow from the packages; what does not follow is found and told."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from generate import GenerateError, fill, own_fields, settings_table
from packages import lib_range

from external_storage import Settings

Passes = Callable[[subprocess.CompletedProcess[str]], None]


class Base(Settings):
    size: int = 1
    """How large."""


class Own(Base):
    leader_elect: bool = False
    """Not here."""

    place: str = ""
    """One of `a|b`, on
    two lines."""


def test_own_fields_are_those_added_and_those_written_again() -> None:
    assert settings_table(own_fields(Own, Settings)) == [
        "| flag | environment | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `--leader-elect` | `LEADER_ELECT` | `false` | Not here. |",
        "| `--size` | `SIZE` | `1` | How large. |",
        r"| `--place` | `PLACE` |  | One of `a\|b`, on two lines. |",
    ]


def test_what_is_between_the_markers_is_replaced_and_nothing_else() -> None:
    text = "one\n# generated: names\nold\n# end generated\ntwo\n"
    filled = fill("x.toml", text, {"names": ["new"]})
    assert filled == "one\n# generated: names\nnew\n# end generated\ntwo\n"
    assert fill("x.toml", filled, {"names": ["new"]}) == filled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "<!-- generated: names -->\n<!-- end generated -->"),
        ("<!-- generated: nmaes -->\n<!-- end generated -->", "x.md:1: the marker 'nmaes'"),
        ("<!-- generated: names -->\nold", "has no end"),
        ("<!-- generated: names -->\n<!-- end generated -->\n" * 2, "given twice"),
    ],
)
def test_markers_that_do_not_fit_are_told(text: str, words: str) -> None:
    with pytest.raises(GenerateError, match=words):
        fill("x.md", text, {"names": ["new"]})


def test_check_shows_what_is_out_of_date_and_the_command_that_helps(
    copy: Any, passes: Passes
) -> None:
    settings = "nfs/src/nfs_provisioner/settings.py"
    copy.change(settings, '"""Address NFS listens on."""', '"""Where NFS listens."""')
    before = copy.read("nfs/README.md")
    done = copy.script("generate", "--check")
    assert done.returncode == 1
    assert "+| `--bind-address` | `BIND_ADDRESS` | `0.0.0.0` | Where NFS listens. |" in done.stdout
    assert "run: hack/generate" in done.stderr
    assert copy.read("nfs/README.md") == before
    passes(copy.script("generate"))
    assert "Where NFS listens." in copy.read("nfs/README.md")
    passes(copy.script("generate", "--check"))


def test_a_package_out_of_step_is_told(copy: Any) -> None:
    copy.change("nfs/pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    done = copy.script("generate", "--check")
    assert done.returncode == 2
    assert "nfs/pyproject.toml: version '0.2.0'" in done.stderr


def test_a_package_that_says_nothing_about_itself_is_told(copy: Any) -> None:
    copy.change("nfs/pyproject.toml", "[tool.external-storage]", "[tool.something-else]")
    done = copy.script("generate", "--check")
    assert done.returncode == 2
    assert "nfs/pyproject.toml: provisioner, volumes, status missing" in done.stderr


def test_a_provisioner_depends_on_every_lib_that_fits_it() -> None:
    assert lib_range("0.3.1") == "external-storage-lib>=0.3,<0.4"
    assert lib_range("2.3.1") == "external-storage-lib>=2.3,<3"
