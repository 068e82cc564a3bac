"""A page for each latent of a sparse autoencoder: where it fires, drawn to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..ops.overlay import colours, overlay
from .sae_browsing import BEHIND, Browsed, Firing, Latent

WIDTH, MARGIN, GAP = 1024, 28, 16
TITLE, TEXT, SMALL = 34, 19, 15
INK, GREY, RULE, BAR = (24, 24, 28), (112, 112, 120), (222, 222, 228), (214, 106, 74)
HOT = (255, 150, 60)  # a word where a latent fires most; dark letters can be read on all of the way from white
ACROSS = 4  # pictures side by side
PLOT = 230, 74


def sheets(browsed: Browsed, latents: Sequence[Latent]) -> torch.Tensor:
    """(N, H, W, 3) in 0..1, a page for each latent, as high as the highest."""
    drawn = [_Page(browsed, latent).draw() for latent in latents]
    height = max(page.height for page in drawn)
    whole = []
    for page in drawn:
        one = Image.new("RGB", (WIDTH, height), "white")
        one.paste(page)
        whole.append(np.asarray(one))
    return torch.from_numpy(np.stack(whole).astype(np.float32) / 255)


def font(size: int):
    return ImageFont.load_default(size=size)


class _Page:
    """One page, from the top down; it is made longer than can be needed and cut."""

    def __init__(self, browsed: Browsed, latent: Latent):
        self.browsed, self.latent = browsed, latent
        longest = sum(40 + 34 * (len(one.heat.reshape(-1)) // 6) for one in latent.firing) if not browsed.levels else 0
        rows = -(-len(latent.firing) // ACROSS)
        self.image = Image.new("RGB", (WIDTH, 420 + longest + rows * (2 * WIDTH // ACROSS + 120)), "white")
        self.pen, self.y = ImageDraw.Draw(self.image), MARGIN

    def draw(self) -> Image.Image:
        self._head()
        for title, chips in (
            ("words it fires on", self._word_chips(self.latent.words)),
            ("words of the prompts it fires in", self._word_chips(self.latent.said)),
            ("nearest directions", [(_near(*one), None) for one in self.latent.near]),
        ):
            if chips:
                self._label(title)
                self._flow(chips, MARGIN)
                self.y += 10
        self.pen.line((MARGIN, self.y, WIDTH - MARGIN, self.y), fill=RULE, width=2)
        self.y += GAP
        if not self.latent.firing:
            self._write("It fires nowhere in these prompts.", TEXT, GREY)
        elif self.browsed.levels:
            self._pictures()
        else:
            for one in self.latent.firing:
                self._sentence(one)
        return self.image.crop((0, 0, WIDTH, self.y + MARGIN))

    def _head(self) -> None:
        latent, config, top = self.latent, self.browsed.config, self.y
        of = "pictures" if self.browsed.levels else "prompts"
        rows = "positions" if self.browsed.levels else "rows" if config.get("whole") else "words"
        self._write(f"Latent {latent.number}", TITLE, INK)
        self.y += 4
        where = f"of {self.browsed.sae.n} at {config['site']} of {config['family']}"
        self._write(_narrowed(where, font(SMALL), WIDTH - 2 * (MARGIN + PLOT[0])), SMALL, GREY)
        self.y += 8
        self._write(f"fires on {_percent(latent.density)} of the {rows}, in {latent.items} of {len(self.browsed.items)} {of}", TEXT, INK)
        self._write(f"{latent.mean:.3g} on average where it fires, {latent.most:.3g} at most", TEXT, INK)
        below, right = self.y, WIDTH - MARGIN
        if float(latent.counts.sum()):
            # As logarithms: a few strong rows are what one looks for among thousands of weak ones.
            heights = (1 + latent.counts).log()
            self._plot(heights, right - PLOT[0], top + 22, f"{rows} by activation (log)", ("0", f"{latent.most:.3g}"))
            right -= PLOT[0] + 2 * GAP
        if any(value for _, value in latent.by_level):
            values = torch.tensor([value for _, value in latent.by_level])
            ends = [f"{latent.by_level[at][0]:.3g}" for at in (0, -1)]
            self._plot(values, right - PLOT[0] + 60, top + 22, "mean by noise level", ends, PLOT[0] - 60)
        self.y = max(below, top + 22 + PLOT[1] + 2 * SMALL) + GAP

    def _plot(self, heights: torch.Tensor, left: int, top: int, title: str, ends: Sequence[str], width: int = PLOT[0]) -> None:
        """Bars over a line, with what the first and the last stand for."""
        self.pen.text((left, top - 22), title, fill=GREY, font=font(SMALL))
        tall, bottom, each = (heights / heights.max().clamp_min(1e-12)).tolist(), top + PLOT[1], width / len(heights)
        for at, share in enumerate(tall):
            if share > 0:
                across = left + at * each, left + max((at + 1) * each - 2, at * each + 1)
                self.pen.rectangle((across[0], bottom - max(1, share * PLOT[1]), across[1], bottom), fill=BAR)
        self.pen.line((left, bottom + 1, left + width, bottom + 1), fill=GREY)
        self.pen.text((left, bottom + 4), ends[0], fill=GREY, font=font(SMALL))
        self.pen.text((left + width, bottom + 4), ends[1], fill=GREY, font=font(SMALL), anchor="ra")

    def _word_chips(self, words: Sequence[tuple[str, float]]) -> list[tuple[str, float | None]]:
        most = max((value for _, value in words), default=1.0)
        return [(f"{word}  {value:.2g}", value / most) for word, value in words]

    def _sentence(self, one: Firing) -> None:
        """A prompt, its words as warm as the latent fires on them."""
        self.pen.text((MARGIN + 62, self.y + 3), f"{one.most:.3g}", fill=GREY, font=font(TEXT), anchor="ra")
        heat, words = (one.heat / max(self.latent.most, 1e-12)).tolist(), one.item.words
        chips: list[tuple[str, float | None]] = []
        for word, value in zip(words, heat, strict=True):
            if word == BEHIND and chips and chips[-1][0] == BEHIND:
                chips[-1] = (BEHIND, max(chips[-1][1] or 0.0, value))
            else:
                chips.append((word, value))
        self._flow(chips, MARGIN + 80, tight=True)
        self.y += 6

    def _pictures(self) -> None:
        """Each over its heat, under the prompt; heat is as bright as the latent fires, alike on all of them."""
        side = (WIDTH - 2 * MARGIN - (ACROSS - 1) * GAP) // ACROSS
        most = max(float(one.heat.max()) for one in self.latent.firing)
        band: list[int] = []
        for at, one in enumerate(self.latent.firing):
            if at % ACROSS == 0 and band:
                self.y = max(band) + GAP
                band = []
            left = MARGIN + at % ACROSS * (side + GAP)
            y = self.y
            for picture in self._shown(one, most, side):
                self.image.paste(picture, (left + (side - picture.width) // 2, y))
                y += picture.height + 4
            self.pen.text((left, y + 2), f"{one.most:.3g}", fill=INK, font=font(TEXT))
            for number, line in enumerate(_lines(one.item.text, font(SMALL), side - 72, 3)):
                self.pen.text((left + 72, y + 4 + number * (SMALL + 4)), line, fill=GREY, font=font(SMALL))
            band.append(y + 3 * (SMALL + 4) + 8)
        self.y = max(band)

    def _shown(self, one: Firing, most: float, side: int) -> list[Image.Image]:
        heat = (one.heat / max(most, 1e-12)).float()
        if one.item.picture is None:
            scale = side / max(heat.shape)
            size = tuple(max(1, round(length * scale)) for length in heat.shape)
            return [_image(colours(torch.nn.functional.interpolate(heat[None, None], size)[0, 0]))]
        picture = one.item.picture
        scale = side / max(picture.shape[:2])
        size = tuple(max(1, round(length * scale)) for length in picture.shape[:2])
        nearest = "nearest" if scale > 1 else "area"
        large = torch.nn.functional.interpolate(picture.movedim(-1, 0)[None].float(), size, mode=nearest)[0].movedim(0, -1)
        soft = torch.nn.functional.interpolate(heat[None, None], size, mode="bilinear", align_corners=False)[0]
        return [_image(large), _image(overlay(soft, large[None])[0])]

    def _label(self, text: str) -> None:
        self._write(text, SMALL, GREY)
        self.y += 2

    def _write(self, text: str, size: int, fill) -> None:
        self.pen.text((MARGIN, self.y), text, fill=fill, font=font(size))
        self.y += size + 7

    def _flow(self, chips: Sequence[tuple[str, float | None]], left: int, tight: bool = False) -> None:
        """Words in a row, and further rows where they do not fit; a number of 0..1 warms what lies behind one."""
        letters, x, height, pad = font(TEXT), left, TEXT + 10, 3 if tight else 8
        for word, warmth in chips:
            word = _narrowed(word, letters, WIDTH - MARGIN - left - 2 * pad)
            width = round(letters.getlength(word)) + 2 * pad
            if x + width > WIDTH - MARGIN and x > left:
                x, self.y = left, self.y + height + 3
            if warmth:
                share = max(0.0, min(1.0, warmth)) ** 0.6
                fill = tuple(round(255 + (hot - 255) * share) for hot in HOT)
                self.pen.rounded_rectangle((x, self.y, x + width, self.y + height), 5, fill=fill)
            elif warmth is None:
                self.pen.rounded_rectangle((x, self.y, x + width, self.y + height), 5, outline=RULE)
            self.pen.text((x + pad, self.y + 4), word, fill=GREY if word == BEHIND and not warmth else INK, font=letters)
            x += width + (2 if tight else 8)
        self.y += height + 4


def _near(number: int, cosine: float, word: str) -> str:
    return f"{number}  {cosine:.2f}" + (f"  {word}" if word and word != BEHIND else "")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "less than 0.1%"


def _image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _lines(text: str, letters, width: int, most: int) -> list[str]:
    """A text in at most so many lines, cut where it is longer."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = lines[:most]
    if len(lines) > most:
        cut[-1] += "…"
    return [_narrowed(line, letters, width) for line in cut]


def _narrowed(line: str, letters, width: int) -> str:
    if letters.getlength(line) <= width:
        return line
    while line and letters.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
