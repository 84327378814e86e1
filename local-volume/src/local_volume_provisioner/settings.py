"""What an admin sets on the agent's command line; what is discovered is in the ConfigMap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from external_storage import ProgramSettings, Seconds


class LocalVolumeSettings(ProgramSettings):
    """Flags and environment of the agent."""

    node_name: str = ""
    """Name of the node that we are on; from `spec.nodeName`."""

    config_dir: Path = Path("/etc/provisioner/config")
    """Directory that the ConfigMap is mounted at."""

    state_dir: Path = Path("/var/lib/local-volume-provisioner")
    """Directory on the node, of ours alone, for what must be remembered about its disks."""

    run_dir: Path = Path("/run/local-volume-provisioner")
    """Directory for the device nodes that cleaning commands are given."""

    parallel_wipes: int = 2
    """Volumes cleaned at the same time."""

    brake_volumes: int = 10
    """When more volumes than this are released within `--brake-pause`, none is cleaned until that
    time has passed without another one, or somebody says `local-volume clean`; 0: no brake."""

    brake_pause: Seconds = Seconds(600.0)
    """How long the brake holds."""

    step_timeout: Seconds = Seconds(1800.0)
    """How long one step of a wipe (half a GiB or so) may take before the disk counts as hanging."""

    command_timeout: Seconds = Seconds(7 * 86400.0)
    """How long a cleaning command may take."""

    dry_run: bool = False
    """Discover, offer and tell, but clean nothing."""

    def validate(self) -> Iterable[str]:
        yield from super().validate()
        if not self.node_name:
            yield "--node-name: must be given"
        if not 1 <= self.parallel_wipes <= 64:
            yield f"--parallel-wipes: {self.parallel_wipes} is not between 1 and 64"
        if self.brake_volumes < 0:
            yield "--brake-volumes: is below 0"
        for name in ("config_dir", "state_dir", "run_dir"):
            if not getattr(self, name).is_absolute():
                yield f"--{name.replace('_', '-')}: is not an absolute path"
        for name in ("step_timeout", "command_timeout"):
            if getattr(self, name) <= 0:
                yield f"--{name.replace('_', '-')}: must be above 0"
