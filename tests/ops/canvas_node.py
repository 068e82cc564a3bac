"""The canvas's own JavaScript under Node.js, asked from Python: documents in, verdicts or masks out."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pack import node_js

CANVAS = Path(__file__).resolve().parents[2] / "web" / "canvas"
# One JSON request a line: {text, width, height}; answers a JSON line, and behind it the masks as float32 where a size is given.
PROGRAM = """
import { createInterface } from "node:readline";
import { DocumentError, parse, serialise } from "%(canvas)s/document.mjs";
import { Layer, masks } from "%(canvas)s/raster.mjs";
for await (const line of createInterface({ input: process.stdin })) {
  const { text, width, height, raw } = JSON.parse(line);
  let answer, drawn = [];
  try {
    const document = parse(text);
    if (width) drawn = raw ? document.regions.map((region) => new Layer(width, height).draw(region.shapes, region.feather).mask)
                           : masks(document, width, height);
    answer = { error: null, text: serialise(document), count: drawn.length };
  } catch (error) {
    if (!(error instanceof DocumentError)) throw error;
    answer = { error: error.message, text, count: 0 };
  }
  process.stdout.write(JSON.stringify(answer) + "\\n");
  for (const mask of drawn) process.stdout.write(Buffer.from(mask.buffer));
}
"""


class Node:
    """A Node.js process that answers one document after another."""

    def __init__(self):
        node = node_js()
        program = PROGRAM % {"canvas": CANVAS.as_uri()}
        self.process = subprocess.Popen([node, "--input-type=module", "-e", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, text: str, width: int = 0, height: int = 0, raw: bool = False) -> tuple[dict, np.ndarray]:
        request = {"text": text, "width": width, "height": height, "raw": raw}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        data = self.process.stdout.read(answer["count"] * width * height * 4)
        return answer, np.frombuffer(data, np.float32).reshape(answer["count"], height, width)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def node():
    started = Node()
    yield started
    started.close()
