"""From the command line to a running provisioner, and to its exit code."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import yaml
from click.testing import CliRunner

from external_storage import cli, main
from external_storage.kube.types import PersistentVolume
from external_storage.logs import LogFormat
from external_storage.parameters import NoParameters
from external_storage.provisioner import ProvisionedVolume, Provisioner, ProvisionRequest
from external_storage.settings import Settings

PATIENCE_S = 60.0

PROGRAM = '''
import sys, time
from pathlib import Path
from external_storage import NoParameters, Provisioner, Settings, run


class MySettings(Settings):
    root: Path = Path("/srv")
    """Directory that holds the volumes; absolute."""

    def validate(self):
        yield from super().validate()
        if not self.root.is_absolute():
            yield f"--root: {self.root} is not absolute"


class Mine(Provisioner[MySettings, NoParameters]):
    """Makes volumes for a test."""

    def provision(self, request):
        raise NotImplementedError

    def delete(self, volume):
        raise NotImplementedError

    def start(self):
        if str(self.settings.root) == "/fails":
            raise RuntimeError("a defect in start")

    def stop(self):
        if str(self.settings.root) == "/hangs":
            print("hanging", file=sys.stderr, flush=True)
            time.sleep(600)


run(Mine, name="example.com/mine")
'''


class Plain(Provisioner[Settings, NoParameters]):
    """Makes volumes."""

    def provision(self, request: ProvisionRequest[NoParameters]) -> ProvisionedVolume:
        raise NotImplementedError

    def delete(self, volume: PersistentVolume) -> None:
        raise NotImplementedError


# -- the command, without serving


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that ``serve`` was called with, in place of serving."""
    settings: list[Settings] = []

    def serve(_kind: object, given: Settings) -> int:
        settings.append(given)
        return 0

    monkeypatch.setattr(main, "serve", serve)
    monkeypatch.setattr("external_storage.logs.configure", lambda **_: None)
    for info in Settings.fields():
        monkeypatch.delenv(info.env, raising=False)
    return settings


def call(*argv: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    command = main.build_command(Plain, name="example.com/plain")
    result = CliRunner().invoke(command, list(argv), env=env, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def test_without_arguments_the_defaults_are_used(served: list[Settings]) -> None:
    assert call()[0] == 0
    assert served == [Settings(provisioner_name="example.com/plain")]


def test_flags_become_settings(served: list[Settings]) -> None:
    call("--worker-threads", "9", "--log-format=json", "--timeout=1m", "--provisioner-name=a/b")
    [settings] = served
    assert (settings.worker_threads, settings.timeout) == (9, 60.0)
    assert settings.log_format is LogFormat.JSON
    assert settings.provisioner_name == "a/b"


def test_a_variable_sets_what_no_flag_sets(served: list[Settings]) -> None:
    env = {"WORKER_THREADS": "9", "TIMEOUT": "1m"}
    call("--worker-threads=2", env=env)
    assert (served[0].worker_threads, served[0].timeout) == (2, 60.0)


def test_an_empty_variable_is_no_setting(served: list[Settings]) -> None:
    call(env={"WORKER_THREADS": ""})
    assert served[0].worker_threads == 4


def test_the_variable_kubeconfig_is_as_good_as_the_flag(served: list[Settings]) -> None:
    call(env={"KUBECONFIG": "/somewhere"})
    assert served[0].kubeconfig == "/somewhere"


def test_help_tells_every_flag_its_variable_its_default_and_its_text(
    served: list[Settings],
) -> None:
    command = main.build_command(Plain, name="example.com/plain")
    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=400).output.split())
    assert "Makes volumes." in text
    for info in Settings.fields():
        assert f"{info.flag} " in text
        assert f"[{info.env}; " in text
        assert " ".join(info.doc.split()) in text
    for default in ("25s", "example.com/plain", "none"):
        assert f"; {default}]" in text
    assert "--log-format text|json" in text
    assert served == []


def test_all_problems_are_told_at_once_and_nothing_is_served(served: list[Settings]) -> None:
    code, output = call("--timeout=soon", "--worker-threads=0", "--log-level=loud")
    assert code == cli.EXIT_USAGE
    assert [line.split(": ")[:2] for line in output.splitlines()] == [
        ["error", "--timeout"],
        ["error", "--worker-threads"],
        ["error", "--log-level"],
    ]
    assert served == []


# -- the process


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """A kubeconfig of an API server that is not there."""
    config = {
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "x", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG")}
    return kept | {"HOME": str(tmp_path)}


def execute(program: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *argv],
        env=environment(program.parent),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@contextmanager
def started(program: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process that logs ``starting`` and then serves; it is killed if it is still there."""
    process = subprocess.Popen(
        [sys.executable, str(program), *argv],
        env=environment(program.parent),
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(stream: IO[str] | None, pattern: str) -> str:
    assert stream is not None
    for line in stream:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no line with {pattern!r}")


def test_help_exits_with_0(program: Path) -> None:
    result = execute(program, "--help")
    assert result.returncode == 0
    assert "--root PATH" in result.stdout
    assert "Directory that holds the volumes; absolute." in result.stdout


def test_bad_settings_exit_with_2_and_name_every_flag(program: Path) -> None:
    result = execute(program, "--root=srv", "--timeout=soon", "--http-endpoint=8080")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: --timeout: 'soon' is not a duration: want 30s, 5m, 1h30m or seconds, from 0",
        "error: --http-endpoint: '8080' is not HOST:PORT or :PORT",
        "error: --root: srv is not absolute",
    ]


def test_an_unknown_flag_exits_with_2(program: Path) -> None:
    result = execute(program, "--rot=/srv")
    assert result.returncode == 2
    assert "--rot" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_api_server_exits_with_1_and_one_line(program: Path) -> None:
    result = execute(program)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert "cannot start" in line
    assert "--kubeconfig" in line


def test_a_defect_in_start_exits_with_1_and_its_traceback(program: Path, nowhere: str) -> None:
    result = execute(program, "--kubeconfig", nowhere, "--root=/fails")
    assert result.returncode == 1
    assert "RuntimeError: a defect in start" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(program: Path, nowhere: str, number: signal.Signals) -> None:
    with started(program, "--kubeconfig", nowhere) as process:
        read_until(process.stderr, "list or watch failed")
        process.send_signal(number)
        assert "clean=True" in read_until(process.stderr, " stopped ")
        assert process.wait(PATIENCE_S) == 0


def test_a_second_ctrl_c_ends_it_at_once_but_no_second_sigterm(program: Path, nowhere: str) -> None:
    with started(program, "--kubeconfig", nowhere, "--root=/hangs") as process:
        read_until(process.stderr, "list or watch failed")
        process.terminate()
        read_until(process.stderr, "hanging")
        process.terminate()
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGINT


def test_a_bad_variable_is_called_by_its_name() -> None:
    code, output = call(env={"WORKER_THREADS": "x", "LOG_LEVEL": "loud"})
    assert code == cli.EXIT_USAGE
    assert "error: WORKER_THREADS: 'x' is not a whole number" in output
