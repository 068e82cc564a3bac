"""A real ComfyUI, started for tests in a folder of its own with this pack linked in as a user would have it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "comfyui-concept-nodes"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 10


class HostProcess:
    """A running host: `url`, its private `base` folder (models, input, output, user) and its `log`."""

    def __init__(self, base: Path, device: str = "cpu"):
        self.base = base
        self.device = device
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "host.log"
        self._process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras"

    def start(self) -> "HostProcess":
        """Return when the host answers; raise RuntimeError with the end of its log when it ends or stays silent."""
        link_pack(self.base / "custom_nodes" / PACK_NAME)
        self.loras.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(self._command(), cwd=self.base, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(f"{self.url}/system_stats"):
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting (exit {self._process.returncode}):\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"ComfyUI did not answer within {START_TIMEOUT_S} s:\n{self.log[-4000:]}")
            time.sleep(0.2)
        return self

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _command(self) -> list[str]:
        return [
            sys.executable,
            str(comfyui_path() / "main.py"),
            *(["--cpu"] if self.device == "cpu" else []),
            "--base-directory",
            str(self.base),
            "--port",
            str(self.port),
            "--listen",
            "127.0.0.1",
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            PACK_NAME,
        ]


def comfyui_path() -> Path:
    """The ComfyUI under test, from COMFYUI_PATH."""
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").is_file():
        raise RuntimeError(f"COMFYUI_PATH must name a ComfyUI folder (one with main.py), it is {path!r}; `python run.py test` sets it")
    return Path(path)


def link_pack(link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(PACK, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
