"""Commands of a program for its operator."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

from external_storage import NoParameters, ProvisioningFailed, Settings, run
from external_storage.cli import (
    EXIT_FAILED,
    EXIT_OK,
    Command,
    Commands,
    connected,
    print_found,
    print_table,
)
from external_storage.kube.types import PersistentVolume
from external_storage.provisioner import ProvisionedVolume, Provisioner, ProvisionRequest
from external_storage.testing import ControlPlane


class MySettings(Settings):
    root: Path = Path("/srv")
    """Directory that holds the volumes."""


class Mine(Provisioner[MySettings, NoParameters]):
    """Makes volumes."""

    def provision(self, request: ProvisionRequest[NoParameters]) -> ProvisionedVolume:
        raise NotImplementedError

    def delete(self, volume: PersistentVolume) -> None:
        raise NotImplementedError


def orphans(settings: MySettings, forget: bool) -> int:
    print_table(
        ("name", "root", "forget"), [(settings.provisioner_name, str(settings.root), str(forget))]
    )
    if settings.root == Path("/bad"):
        raise ProvisioningFailed("the backend does not answer")
    return EXIT_FAILED


def volumes(settings: MySettings) -> int:
    with connected(settings) as client:
        click.echo(f"{len(client.list_all(PersistentVolume))} volumes")
    return EXIT_OK


@click.command("version")
def version() -> None:
    """Print the version."""
    click.echo("1.2.3")


COMMANDS: Commands = {
    "orphans": Command(
        "List what is left.\n\nAll of it.",
        orphans,
        options=[click.Option(["--forget"], is_flag=True)],
    ),
    "volumes": Command("Count volumes.", volumes),
    "version": version,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for info in MySettings.fields():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mine"])


def called(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        run(Mine, name="example.com/mine", argv=argv, commands=COMMANDS)
    said = capsys.readouterr()
    return int(str(ended.value.code)), said.out, said.err


def test_a_command_gets_the_settings_and_its_own_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOT", "/from-the-environment")
    code, output, _ = called(capsys, "orphans", "--forget")
    assert code == EXIT_FAILED
    assert output.splitlines() == [
        "name              root                   forget",
        "example.com/mine  /from-the-environment  True",
    ]
    _, output, _ = called(capsys, "orphans", "--root=/given", "--provisioner-name=a/b")
    assert output.splitlines()[1].split() == ["a/b", "/given", "False"]


def test_what_fails_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = called(capsys, "orphans", "--root=/bad")
    assert (code, errors) == (1, "error: the backend does not answer\n")
    code, _, errors = called(capsys, "volumes", "--kubeconfig=/nowhere")
    assert code == 1
    assert errors.startswith("error: ")
    assert "/nowhere" in errors


def test_bad_settings_are_told_by_name_all_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMEOUT", "soon")
    code, output, errors = called(capsys, "orphans", "--worker-threads=0")
    assert (code, output) == (2, "")
    assert [line.split(": ")[1] for line in errors.splitlines()] == ["TIMEOUT", "--worker-threads"]


def test_a_bad_option_is_told_with_the_usage_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, errors = called(capsys, "orphans", "--destroy")
    assert code == 2
    assert "Usage: mine orphans" in errors
    assert "No such option" in errors
    assert "--destroy" in errors


def test_one_that_needs_no_settings_is_a_click_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMEOUT", "soon")
    assert called(capsys, "version") == (0, "1.2.3\n", "")


def test_help_lists_the_commands_and_each_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = called(capsys, "--help")
    assert "\n    orphans: List what is left.\n    volumes: Count volumes.\n" in text
    assert "    version: Print the version." in text
    _, text, _ = called(capsys, "orphans", "--help")
    assert "List what is left.\n\n  All of it." in text
    assert "--forget" in text
    assert "--root" in text
    with pytest.raises(SystemExit):
        run(Mine, name="example.com/mine", argv=["--help"])
    assert "command" not in capsys.readouterr().out


def test_a_word_that_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = called(capsys, "orphan")
    assert code == 2
    assert "unexpected extra argument (orphan)" in errors
    assert "--help" in errors


def test_what_was_found_is_shown_and_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_found("left behind", ("name",), []) == EXIT_OK
    assert capsys.readouterr().out == "nothing found\n"
    assert print_found("left behind", ("name",), [("one",)]) == EXIT_FAILED
    assert capsys.readouterr().out == "left behind:\nname\none\n"


def test_a_client_is_given_by_the_settings(
    capsys: pytest.CaptureFixture[str], control_plane: ControlPlane
) -> None:
    code, output, _ = called(capsys, "volumes", f"--kubeconfig={control_plane.kubeconfig}")
    assert code == EXIT_OK
    assert output.endswith(" volumes\n")
