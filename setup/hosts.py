"""Which ComfyUI and which Python a command uses: the user's own, left untouched, or a private pinned one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from . import SetupError

ROOT = Path(__file__).resolve().parent.parent
# The pack may be a link in custom_nodes: where run.py was called counts as well as where it lies.
PLACES = (Path(sys.argv[0]).absolute().parent, ROOT)
OLDEST_HOST = (0, 30, 0)


class Host(NamedTuple):
    """A ComfyUI: its folder, the Python that runs it, and whether it is the private one that set-up made."""

    path: Path
    python: Path
    private: bool

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process of this host. Bytecode and caches of a host that is not ours go to `home`, never into it."""
        variables = dict(os.environ, COMFYUI_PATH=str(self.path))
        if self.private:
            for name in ("PYTHONPATH", "PYTHONHOME"):
                variables.pop(name, None)
            variables["PYTHONNOUSERSITE"] = "1"
        else:
            variables["PYTHONPYCACHEPREFIX"] = str(home / "pycache")
        return variables


def given_host(places=PLACES) -> Host | None:
    """The ComfyUI named by COMFYUI_PATH, or the one whose custom_nodes folder holds the pack; None when there is neither."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().absolute()
        if not is_comfyui(path):
            raise SetupError(
                f"COMFYUI_PATH is {path}, which is no ComfyUI folder (it has no main.py beside comfy/): name the right one or unset it."
            )
        return Host(path, python_of(path), private=False)
    for pack in places:
        path = pack.parent.parent
        if pack.parent.name == "custom_nodes" and is_comfyui(path):
            return Host(path, python_of(path), private=False)
    return None


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def python_of(host: Path) -> Path:
    """The Python that runs `host`: a venv or .venv in or beside it, the portable build's python_embeded, else the one running now."""
    for folder in (host, host.parent):
        for name in ("venv", ".venv"):
            python = venv_python(folder / name)
            if python.is_file():
                return python
    embedded = host.parent / "python_embeded" / "python.exe"
    return embedded if embedded.is_file() else Path(sys.executable)


def venv_python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def check_given(host: Host) -> None:
    """Raise SetupError where a host that is not ours is too old or its Python cannot run it."""
    version = host_version(host.path)
    if version and version < OLDEST_HOST:
        raise SetupError(
            f"The ComfyUI in {host.path} is {dotted(version)}, older than the {dotted(OLDEST_HOST)} that this pack needs: "
            "update it, or unset COMFYUI_PATH."
        )
    probe = subprocess.run(
        [str(host.python), "-c", "import sys, torch, safetensors, aiohttp; sys.exit(sys.version_info < (3, 10))"],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else "it is older than Python 3.10"
        raise SetupError(
            f"{host.python} cannot run the ComfyUI in {host.path} ({reason}): start run.py with the Python that runs your ComfyUI."
        )


def host_version(path: Path) -> tuple[int, ...] | None:
    """(0, 30, 0) from the host's comfyui_version.py; None where it does not say."""
    try:
        found = re.search(r"__version__\s*=\s*[\"'](\d+)\.(\d+)\.(\d+)", (path / "comfyui_version.py").read_text(encoding="utf-8"))
    except OSError:
        return None
    return tuple(int(part) for part in found.groups()) if found else None


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
