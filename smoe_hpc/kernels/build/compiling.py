"""Running a compiler over many sources, a few at a time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from smoe_hpc.errors import ConfigError, RunError

_MOST_JOBS = 8  # compilers at a time; one of CUDA takes a gigabyte
_LAST_LINES = 12  # of a compiler's errors
Progress = Callable[[int, int, str], None]  # called with files done, of how many, and the one that was done last


def compile_library(
    jobs: Mapping[Path, Sequence[str]], link: Sequence[str], library: Path, progress: Progress | None = None
) -> None:
    """Compile every source into an object file, in the library's folder, and link them.

    Args:
        jobs: for each source, in one folder or below it, the compiler's command and flags.
        link: the command that links, without its files.
        library: the file to make, in a folder of this process alone. Compilers put their temporary files there as well:
            under ``/tmp`` other users could guess their names.
        progress: called for each file, with its path below that folder; the link comes last.

    Raises:
        RunError: a compiler fails.
        ConfigError: there is no space.
    """
    work, total = library.parent, len(jobs) + 1
    folder = Path(os.path.commonpath([source.parent for source in jobs]))
    names = {source: source.relative_to(folder).as_posix() for source in jobs}
    if progress is not None:
        progress(0, total, "")
    with ThreadPoolExecutor(max_workers=min(_MOST_JOBS, cores())) as pool:
        running = {
            pool.submit(_run, [*command, "-c", "-o", str(work / _object_name(names[source])), str(source)], work): names[source]
            for source, command in jobs.items()
        }
        try:
            for done, one in enumerate(as_completed(running), 1):
                one.result()
                if progress is not None:
                    progress(done, total, running[one])
        finally:
            pool.shutdown(cancel_futures=True)  # those that have not begun, if one failed
    _run([*link, "-o", str(library), *map(str, sorted(work.glob("*.o")))], work)
    if progress is not None:
        progress(total, total, library.name)


def _object_name(source: str) -> str:
    return f"{source.replace('/', '-').rpartition('.')[0]}.o"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str], temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:]
        if any("No space left on device" in line for line in said):
            raise ConfigError(f"no space is left in {temporary.parent}; free some, or set SMOE_CACHE to another folder")
        raise RunError(" | ".join([f"{command[0]} ended with status {done.returncode} on {command[-1]}:", *said]))
