"""Ways to keep a concept out that act while the model samples: Safe Latent Diffusion, and the host's NAG with the concept as its negative.

SLD (Schramowski et al., arXiv 2211.05105): where a step would go towards the concept, as an evaluation for the concept tells, the guidance
is turned away from it. In noise predictions e of nothing (u), the prompt (p) and the concept (s), with the paper's settings in 50 steps:

    phi = S (e_p - e_s)    mu = min(1, |phi|) where e_p - e_s < threshold, else 0    gamma = mu (e_s - e_u) + momentum_scale m
    m <- momentum m + (1 - momentum) mu (e_s - e_u)        e = e_u + cfg (e_p - e_u - gamma), gamma from the warm-up's end on

The paper prints max(1, |phi|); its code limits to at most 1, which is taken here, because from S = 1000 on the other would be far off.
"""

from __future__ import annotations

from typing import NamedTuple

import comfy.sample
import comfy.samplers
import torch


class Safety(NamedTuple):
    """SLD's settings; `warm_up` is the share of sampling before it acts."""

    warm_up: float
    scale: float
    threshold: float
    momentum_scale: float
    momentum: float


MEDIUM, MOST = Safety(10 / 50, 1000, 0.01, 0.3, 0.4), Safety(0, 5000, 1.0, 0.5, 0.7)


class SafetyGuider(comfy.samplers.CFGGuider):
    """A guider with a third condition, the concept: three evaluations a step."""

    def __init__(self, model, positive, negative, concept, cfg: float, safety: Safety, sigmas: torch.Tensor):
        super().__init__(model)
        self.inner_set_conds({"positive": positive, "negative": negative, "concept": concept})
        self.set_cfg(cfg)
        self.safety, self.sigmas, self.held = safety, sigmas, None

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        conds = [self.conds[name] for name in ("negative", "positive", "concept")]
        denoised = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))
        nothing, prompt, concept = ((x - one) / sigma for one in denoised)
        safety = self.safety
        apart = prompt - concept
        pull = torch.where(apart < safety.threshold, (safety.scale * apart).abs().clamp(max=1.0), 0.0) * (concept - nothing)
        held = torch.zeros_like(pull) if self.held is None else self.held
        turn = pull + safety.momentum_scale * held
        self.held = safety.momentum * held + (1 - safety.momentum) * pull
        step = int((self.sigmas >= timestep.max() * 0.9999).sum()) - 1
        guidance = prompt - nothing - (turn if step >= safety.warm_up * (len(self.sigmas) - 1) else 0.0)
        return x - sigma * (nothing + self.cfg * guidance)


def sample_safely(model, noise, steps: int, cfg: float, positive, negative, concept, safety: Safety) -> torch.Tensor:
    """Latents under SLD, by Euler's method on the host's normal schedule."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    guider = SafetyGuider(model, positive, negative, concept, cfg, safety, sigmas)
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True)


def with_nag(model):
    """A clone of a model with the host's NAG at its defaults: the negative prompt acts at CFG 1."""
    from comfy_extras.nodes_nag import NAGuidance

    return NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]
