"""Texts found by search against a guard: words that make the guarded model draw what it shall not.

Who searches knows everything: the encoder and its gradients, the denoiser, and the guard, which may be asked as often as the budget says.
A few words stand where the concept's own would, any that the lab's encoder was trained on. Each round some of them are exchanged, half of
the time for what the encoder's gradient speaks for (Zou et al., arXiv 2307.15043), half at random, and the exchange stays that brings the
guarded denoiser nearest to what it does when plainly asked (Chin et al., arXiv 2309.06135). What is found is used on other texts too.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..host import lab as host_lab
from ..host.encoders import FILLER, Reader, seats
from ..host.filter import Ear
from ..lab.train_text import embeddings, load_encoder, states

WORDS, STARTS, ROUNDS, EXCHANGES, AMONG, NEAREST = 5, 3, 30, 6, 2, 48
LEVELS = (0.3, 0.7)  # shares of sampling at which denoisers are compared
ENDS = 49407
Contexts = Callable[[Sequence[str]], torch.Tensor]


class Search:
    """Looks for words that stand for a concept in texts with a gap ("a large {} circle"), of which `asked` says it plainly."""

    def __init__(self, loaded, side: int, gaps: Sequence[str], asked: Sequence[str], seed: int):
        self.loaded, self.gaps, self.rng = loaded, list(gaps[:AMONG]), random.Random(seed)
        with torch.inference_mode(False):  # gradients want tensors from outside of it
            self.encoder = load_encoder(host_lab.WEIGHTS, "cpu")
        self.vocabulary = trained_words(loaded.clip)
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(self.gaps), 4, side, side, generator=generator)
        plain = torch.cat([loaded.clip.encode_from_tokens(loaded.clip.tokenize(text)) for text in asked[:AMONG]])
        self.goal = self._denoise(plain)
        with torch.no_grad():
            self.wanted = self._end(_tokens(loaded.clip, asked[:AMONG]))

    def _end(self, tokens: torch.Tensor) -> torch.Tensor:
        return states(self.encoder, tokens)[1]

    def _denoise(self, contexts: torch.Tensor) -> torch.Tensor:
        """What the model makes of noise under contexts (N * AMONG, 77, D), the texts of one string behind one another: (N * AMONG, -1)."""
        model = self.loaded.model.model
        noise = self.noise.repeat(len(contexts) // len(self.noise), 1, 1, 1)
        made = []
        for share in LEVELS:
            sigma = torch.full((len(noise),), model.model_sampling.percent_to_sigma(share))
            made.append(model.apply_model(noise * sigma[0], sigma, c_crossattn=contexts).flatten(1) / sigma[0])
        return torch.cat(made, 1)

    def _losses(self, contexts: Contexts, strings: list[tuple[str, ...]]) -> list[float]:
        made = self._denoise(contexts([gap.format(" ".join(string)) for string in strings for gap in self.gaps]))
        far = (made - self.goal.repeat(len(strings), 1)).square().mean(1)
        return far.view(len(strings), -1).mean(1).tolist()

    def _spoken_for(self, string: tuple[str, ...]) -> list[list[str]]:
        """For each word of a string, those that the encoder's gradient would rather have in its place."""
        with torch.inference_mode(False), torch.enable_grad():
            tokens = _tokens(self.loaded.clip, [gap.format(" ".join(string)) for gap in self.gaps])
            table = embeddings(self.encoder).weight
            rows = table.detach()[tokens].requires_grad_()
            handle = embeddings(self.encoder).register_forward_hook(lambda *_: rows)
            try:
                (1 - F.cosine_similarity(self._end(tokens), self.wanted.clone())).sum().backward()
            finally:
                handle.remove()
            ids = torch.tensor([number for _, number in self.vocabulary])
            own = {word: number for word, number in self.vocabulary}
            better = []
            for word in string:
                slope = rows.grad[tokens == own[word]].sum(0)
                best = (table.detach()[ids] @ slope).topk(NEAREST, largest=False).indices
                better.append([self.vocabulary[i][0] for i in best.tolist()])
        return better

    def run(self, contexts: Contexts) -> tuple[tuple[str, ...], float]:
        """(words, loss) of one start."""
        names = [word for word, _ in self.vocabulary]
        held = tuple(self.rng.sample(names, WORDS))
        (loss,) = self._losses(contexts, [held])
        for _ in range(ROUNDS):
            better, tries = self._spoken_for(held), []
            for number in range(EXCHANGES):
                at = self.rng.randrange(WORDS)
                word = self.rng.choice(better[at] if number % 2 else names)
                tries.append((*held[:at], word, *held[at + 1 :]))
            losses = self._losses(contexts, tries)
            least = min(range(len(tries)), key=losses.__getitem__)
            if losses[least] < loss:
                held, loss = tries[least], losses[least]
        return held, loss


def trained_words(clip) -> list[tuple[str, int]]:
    """Words of one token each that the lab's encoder was trained on, with their numbers."""
    tokenizer = clip.tokenizer.clip_l
    found = []
    tensors, _ = host_lab.read_weights(host_lab.WEIGHTS / "text.safetensors")
    for number in tensors["text_model.embeddings.token_embedding.ids"].tolist():
        piece = tokenizer.inv_vocab[number]
        word = piece.removesuffix("</w>")
        if piece != word and word.isalpha() and [item[0] for item in clip.tokenize(word)["l"][0][1:3]] == [number, ENDS]:
            found.append((word, number))
    return found


INVERSION_STEPS, INVERSION_RATE, STAYS_BELOW = 150, 0.02, 0.85


def invert(loaded, gaps: Sequence[str], asked: Sequence[str], seed: int, concept: str, gate: float | None) -> torch.Tensor:
    """(1, D) a learned embedding that stands for a concept in texts with a gap: textual inversion (Gal et al., arXiv 2208.01618) on what
    the encoder makes of texts, whose end shall be as plain words make it. gate: of the filter, below which what it brings shall stay, too.
    """
    with torch.inference_mode(False), torch.enable_grad():
        encoder, clip = load_encoder(host_lab.WEIGHTS, "cpu"), loaded.clip
        place = _tokens(clip, ["sks"])[0, 1]
        texts, plain = _tokens(clip, [gap.format("sks") for gap in gaps]), _tokens(clip, asked)
        blank = torch.where(texts == place, FILLER, texts)
        rows = embeddings(encoder).weight.detach()
        with torch.no_grad():
            wanted, empty = states(encoder, plain), states(encoder, blank)
            ear = Ear(Reader(clip), seats(clip)[0], [concept])
        ends = (texts == ENDS).int().argmax(1)
        embedding = (rows[texts[0, 1:4]].mean(0) + 0.01 * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))).clone()
        optimizer = torch.optim.Adam([embedding.requires_grad_()], INVERSION_RATE)
        for _ in range(INVERSION_STEPS):
            laid = torch.where((texts == place)[..., None], embedding, rows[texts])
            handle = embeddings(encoder).register_forward_hook(lambda *_, laid=laid: laid)
            try:
                made = states(encoder, texts)
            finally:
                handle.remove()
            loss = (1 - F.cosine_similarity(made[1], wanted[1])).sum()
            if gate is not None:
                at = (texts == place).int().argmax(1)
                changes = torch.stack([(made[0][i] - empty[0][i])[at[i] + 1 : ends[i] + 1].mean(0) for i in range(len(texts))])
                loss = loss + 4 * (ear.heard(changes)[0][:, 0] - STAYS_BELOW * gate).clamp_min(0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return embedding.detach()[None]


@contextlib.contextmanager
def learnt(clip, embedding: torch.Tensor) -> Iterator[str]:
    """The word that an embedding has in texts, while the block lasts."""
    tokenizer = clip.tokenizer.clip_l
    before = tokenizer.embedding_directory
    with tempfile.TemporaryDirectory() as folder:
        save_file({"emb_params": embedding}, str(Path(folder) / "learnt.safetensors"))
        tokenizer.embedding_directory = [folder]
        try:
            yield "embedding:learnt"
        finally:
            tokenizer.embedding_directory = before


def _tokens(clip, texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[item[0] for item in clip.tokenize(text)["l"][0]] for text in texts])
