"""The configuration in force: a bad new one changes nothing but is told."""

from __future__ import annotations

from pathlib import Path

from external_storage import CannotStart, Problems, get_logger
from local_volume_provisioner import config
from local_volume_provisioner.config import Config

log = get_logger(__name__)


class Configuration:
    """Read at the start, and again before each look at the disks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.current = Config()
        self._texts: dict[str, str] = {}
        self.problems: list[str] = []
        """Why what is in the directory now is not in force."""

    def load(self) -> None:
        """The first time; raises CannotStart with all that is wrong."""
        try:
            self._texts = config.read_texts(self._directory)
            self.current = config.parse(self._texts)
        except Problems as error:
            text = "; ".join(error.problems)
            raise CannotStart(f"--config-dir {self._directory}: {text}") from error
        except OSError as error:
            raise CannotStart(f"--config-dir {self._directory}: {error.strerror}") from error
        self._log()

    def refresh(self) -> bool:
        """Take over what has changed; False when there are problems that were not there before."""
        try:
            texts = config.read_texts(self._directory)
            if texts == self._texts:
                return True
            self._texts = texts
            fresh = config.parse(texts)
        except (Problems, OSError) as error:
            problems = error.problems if isinstance(error, Problems) else [str(error)]
            is_new = problems != self.problems
            self.problems = problems
            if is_new:
                for problem in problems:
                    log.error("the new configuration is refused", problem=problem)
            return not is_new
        self.problems = []
        if fresh != self.current:
            gone = sorted(self.current.classes.keys() - fresh.classes.keys())
            self.current = fresh
            log.info("configuration taken over", classes_removed=", ".join(gone) or "none")
            self._log()
        return True

    def _log(self) -> None:
        for name, kind in self.current.classes.items():
            log.info(
                "class", class_name=name, host_dir=kind.host_dir, method=str(kind.method),
                leaves=kind.method.leaves,
            )  # fmt: skip
        if self.current.use_job_for_cleaning:
            log.info("useJobForCleaning: disks are cleaned in processes of their own, not in Jobs")
