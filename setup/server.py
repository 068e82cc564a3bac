"""A running ComfyUI with this pack alone, in a folder of ours, and what a client needs of its HTTP interface."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from . import SetupError
from .hosts import ROOT, Host
from .install import tail

PACK = "comfyui-concept-nodes"
START_SECONDS = 180
STOP_SECONDS = 10


class Server:
    """`with Server(host, base, variables) as server:` runs `host` on `server.url` until the block ends.

    `base` takes the place of the host's own folder for input, output, temp, user and custom_nodes, so nothing is written into the host;
    the pack is shown as a link in `base`/custom_nodes. The models of a host that is not ours stay visible. Without a `log` the host speaks
    to the terminal.
    """

    def __init__(self, host: Host, base: Path, variables: dict[str, str], device="cpu", port=None, log: Path | None = None):
        self.host, self.base, self.variables, self.device, self.log = host, base, variables, device, log
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = None

    def __enter__(self):
        link_pack(self.base / "custom_nodes" / PACK)
        output = self.log.open("wb") if self.log else None
        try:
            self._process = subprocess.Popen(
                self.command(), cwd=self.base, env=self.variables, stdout=output, stderr=subprocess.STDOUT if output else None
            )
        finally:
            if output:
                output.close()
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def command(self) -> list[str]:
        models = [] if self.host.private else ["--models-directory", str(self.host.path / "models")]
        database = "sqlite:///" + (self.base / "comfyui.db").as_posix()
        return [
            *(str(self.host.python), str(self.host.path / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", str(self.base), "--database-url", database, *models),
            *("--disable-api-nodes", "--disable-auto-launch", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK),
            *(["--cpu"] if self.device == "cpu" else []),
        ]

    def stop(self):
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self) -> int:
        """Block until the host ends by itself; its exit status."""
        return self._process.wait()

    def queue(self, prompt: dict) -> str:
        """Queue a workflow in its API form; its prompt id. Raises SetupError with the host's reasons when it is refused."""
        try:
            return self._json("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise SetupError(f"The server refused the workflow: {refusal(error.read(), prompt)}.", self._tail()) from error

    def result(self, prompt_id: str, seconds=300) -> dict:
        """Wait until a queued prompt has run; its outputs by node id, as in /history. Raises SetupError when it failed or took too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self._json(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["status_str"] == "error":
                raise SetupError(f"The workflow failed: {failure(entry['status']['messages'])}.", self._tail())
            if entry and entry["status"]["completed"]:
                return entry["outputs"]
            self._check_alive()
            time.sleep(0.1)
        raise SetupError(f"The workflow did not end within {seconds} s.", self._tail())

    def picture(self, image: dict) -> bytes:
        """The file that an output's `images` entry names."""
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(image)}", timeout=60) as response:
            return response.read()

    def _wait_until_up(self):
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._check_alive()
            try:
                self._json("/system_stats")
            except OSError:
                if time.monotonic() > deadline:
                    raise SetupError(f"ComfyUI did not answer on {self.url} within {START_SECONDS} s.", self._tail()) from None
                time.sleep(0.2)
            else:
                return

    def _check_alive(self):
        if self._process.poll() is not None:
            raise SetupError(f"ComfyUI ended (exit {self._process.returncode}): the lines above say why.", self._tail())

    def _json(self, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def _tail(self) -> str:
        return tail(self.log, 25) if self.log else ""


def link_pack(link: Path):
    """Show the pack to a host as a folder of that name: a link, on Windows a junction, which needs no rights."""
    if link.exists() and link.samefile(ROOT):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        drop_link(link)
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    except OSError as error:
        raise SetupError(
            f"Cannot link the pack to {link} ({error.strerror}): set CONCEPT_NODES_HOME to a folder on a disk that has links."
        ) from error


def drop_link(link: Path):
    if os.path.lexists(link):
        os.rmdir(link) if os.name == "nt" else link.unlink()  # to Windows a junction is a folder


def remove_base(base: Path):
    """Delete a server's folder; the link to the pack goes first, so that no deletion can follow it."""
    drop_link(base / "custom_nodes" / PACK)
    shutil.rmtree(base, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def refusal(body: bytes, prompt: dict) -> str:
    """Why /prompt answered 400, in one line."""
    answer = json.loads(body)
    reasons = [
        f"{prompt[node]['class_type']} (node {node}): {error['message']}, {error['details']}"
        for node, found in answer.get("node_errors", {}).items()
        for error in found["errors"]
    ]
    return "; ".join(reasons) or answer["error"]["message"]


def failure(messages: list) -> str:
    """Why a prompt ended in an error, from its /history messages, in one line."""
    for kind, data in messages:
        if kind == "execution_error":
            return f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}"
    return "it was interrupted"
