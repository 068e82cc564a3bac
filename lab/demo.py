"""The demo's second half: measures the pictures that `python run.py demo` fetched and draws them on one labelled sheet."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

PICTURE = 192  # pixels a side on the sheet; the lab's own are 64 to 128
MARGIN = 16
LINE = 26


def main(argv: list[str]) -> int:
    """Read demo.json and its pictures in the folder argv[0], write contact_sheet.png there and print the measured attribute."""
    from .attributes import MEASURES, attribute
    from .eye import Eye

    folder = Path(argv[0])
    listed = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    slider = Path(listed["slider"]).stem
    columns = {label: [Image.open(folder / name).convert("RGB") for name in names] for label, names in listed["columns"].items()}
    pictures = [picture for column in columns.values() for picture in column]
    batch = as_batch(pictures)
    values = iter([worded(attribute(slider, *pair)) for pair in zip(batch, Eye.load().read(batch), strict=True)])
    measured = {label: [next(values) for _ in column] for label, column in columns.items()}

    sheet(columns, measured, slider, MEASURES[slider]).save(folder / "contact_sheet.png")
    print(f"\nMeasured {MEASURES[slider]}, by strength:\n" + "  ".join(f"{label:>6}" for label in measured))
    for row in zip(*measured.values(), strict=True):
        print("  ".join(f"{value:>6}" for value in row))
    if all(map(same, columns["base"], columns["+0"])):
        print("Strength 0 is the picture without the slider, pixel for pixel.")
    print(f"\nPictures and contact_sheet.png are in {folder}")
    return 0


def as_batch(pictures: list[Image.Image]) -> torch.Tensor:
    """(N, H, W, 3) float32, 0..1."""
    return torch.stack([torch.from_numpy(np.asarray(picture, np.float32) / 255) for picture in pictures])


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def worded(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def sheet(columns: dict[str, list[Image.Image]], measured: dict[str, list[str]], slider: str, measure: str) -> Image.Image:
    """One column per strength under its label, one row per picture with what was measured in it below."""
    rows = len(next(iter(columns.values())))
    step = (PICTURE + MARGIN, PICTURE + LINE + MARGIN)
    page = Image.new("RGB", (len(columns) * step[0] + MARGIN, 2 * LINE + rows * step[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    title = f"Concept Slider '{slider}', by strength. Below each picture: the measured {measure}"
    draw.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    for column, (label, pictures) in enumerate(columns.items()):
        left = MARGIN + column * step[0]
        heading = "without" if label == "base" else f"strength {int(label)}"
        draw.text((left + PICTURE // 2, 2 * LINE), heading, fill="black", font=font, anchor="ms")
        for row, picture in enumerate(pictures):
            top = 2 * LINE + MARGIN // 2 + row * step[1]
            page.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
            draw.text((left + PICTURE // 2, top + PICTURE + 18), measured[label][row], fill="black", font=font, anchor="ms")
    return page
