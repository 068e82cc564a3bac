"""What a headless user does with a running host: queue a graph, follow it over the websocket, fetch texts and pictures."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any, NamedTuple

import websocket

Graph = dict[str, dict[str, Any]]
END_EVENTS = ("execution_success", "execution_error", "execution_interrupted")
HTTP_TIMEOUT_S = 60
JPEG = b"\xff\xd8"  # the first bytes of such a file


class PromptRefused(Exception):
    """The host answered /prompt with an error. `answer` is its JSON; the text holds every message in it."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer
        super().__init__(" | ".join(refusal_messages(answer)))


class Event(NamedTuple):
    type: str
    data: dict[str, Any]


class Run(NamedTuple):
    """A finished prompt: its websocket events in order and its entry in /history."""

    prompt_id: str
    events: list[Event]
    history: dict[str, Any]

    @property
    def end(self) -> str:
        return self.events[-1].type

    @property
    def error(self) -> str:
        """The message of the exception that ended the run, "" if none did."""
        return self.events[-1].data["exception_message"] if self.end == "execution_error" else ""

    def text(self, node_id: str) -> str:
        """The text that a node showed, as kept in /history."""
        return "\n".join(self.history["outputs"][node_id]["text"])


class Client:
    """One client of the host at `url`, with its websocket open from entering to leaving the context."""

    def __init__(self, url: str):
        self.url = url
        self.client_id = uuid.uuid4().hex
        self.previews: list[bytes] = []  # JPEG files, as they came

    def __enter__(self) -> "Client":
        self._socket = websocket.create_connection(f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}")
        return self

    def __exit__(self, *exc) -> None:
        self._socket.close()

    def queue(self, graph: Graph) -> str:
        """Queue a graph in API form and return its prompt id; PromptRefused if the host finds any fault in it."""
        answer = post_json(f"{self.url}/prompt", {"prompt": graph, "client_id": self.client_id})
        if answer.get("node_errors"):
            raise PromptRefused(answer)
        return answer["prompt_id"]

    def run(self, graph: Graph, timeout_s: float = 120) -> Run:
        """Queue a graph and wait for its end, whatever that is."""
        return self.wait(self.queue(graph), timeout_s)

    def wait(self, prompt_id: str, timeout_s: float = 120) -> Run:
        events = self.follow(prompt_id, END_EVENTS, timeout_s)
        return Run(prompt_id, events, self.history(prompt_id, timeout_s))

    def follow(self, prompt_id: str, until: tuple[str, ...], timeout_s: float = 120) -> list[Event]:
        """The events of a prompt up to the first whose type is in `until`; events of other prompts are dropped."""
        deadline = time.monotonic() + timeout_s
        events = []
        while not events or events[-1].type not in until:
            event = self._next_event(deadline)
            if event is not None and event.data.get("prompt_id") == prompt_id:
                events.append(event)
        return events

    def history(self, prompt_id: str, timeout_s: float = 10) -> dict[str, Any]:
        """The prompt's entry in /history; the host writes it a moment after the last event."""
        deadline = time.monotonic() + timeout_s
        while True:
            entry = get_json(f"{self.url}/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id} is not in /history after {timeout_s} s")
            time.sleep(0.02)

    def object_info(self) -> dict[str, Any]:
        return get_json(f"{self.url}/object_info")

    def interrupt(self) -> None:
        post_json(f"{self.url}/interrupt", {})

    def pictures(self, run: Run) -> list[bytes]:
        """The PNG files that a run saved, in the order of their nodes."""
        saved = [image for output in run.history["outputs"].values() for image in output.get("images", [])]
        return [get(f"{self.url}/view?{urllib.parse.urlencode(image)}") for image in saved]

    def _next_event(self, deadline: float) -> Event | None:
        """The next websocket message, None where it is a binary preview."""
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        message = self._socket.recv()
        if not isinstance(message, str):
            if (begins := message.find(JPEG)) >= 0:
                self.previews.append(message[begins:])
            return None
        content = json.loads(message)
        return Event(content["type"], content["data"])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as response:
        return response.read()


def get_json(url: str) -> Any:
    return json.loads(get(url))


def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a POST; a refusal (400) is raised as PromptRefused."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            return json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as failure:
        if failure.code != 400:
            raise
        raise PromptRefused(json.loads(failure.read())) from None


def refusal_messages(answer: dict[str, Any]) -> list[str]:
    """Every message in the host's refusal, the general one first."""
    errors = [answer["error"]] if isinstance(answer.get("error"), dict) else []
    errors += [error for node in (answer.get("node_errors") or {}).values() for error in node["errors"]]
    return [f"{error['message']}: {error.get('details', '')}" for error in errors]
