"""SP in plain lines: what to read, copy and cite. One tensor at a time, no option but the mathematics.

``SP`` computes the same, faster, and has the options; the tests hold it to this file. Equations: docs/the-method.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RHO, GROWTH, FADE, REACH = 0.9, 1.1, 0.95, 0.01  # averaging of pairs; factors of gamma; free step relative to x
MARGIN, SHARE_OF_LIMIT = 3.0, 0.8  # the cap, over noise and of the stability limit
DECAY, EPS, SMALLEST = 0.95, 1e-8, 1e-3  # of E[g^2]; added to its root; least rms(x)
SHARE, LEAST = 16, 1024  # the displacement is kept for one run of n / SHARE elements, LEAST at least


class ReferenceSP(Optimizer):
    """Spectral proximal gradient descent in the Fisher metric, without the proximal step.

    Args: as AdamW's; ``lr`` is the largest step, which gamma damps. A non-finite gradient leaves everything untouched.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.005, momentum: float = 0.9, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.gamma: float | None = None
        self.ess = self.esy = self.esg = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        rows = [(group, p, self.state[p]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(torch.isfinite(p.grad).all()) for _, p, _ in rows):
            return loss
        self._set_gamma([row for row in rows if row[0]["lr"] > 0])
        for group, p, state in rows:
            self._update(group, p, p.grad, state)
        return loss

    def _set_gamma(self, rows: list[tuple[dict[str, Any], Tensor, dict[str, Any]]]) -> None:
        """One number for the whole model, eqs. (9) to (14), (20), (21). ``rows``: the tensors that move."""
        if not rows:
            return
        lr_ref = max(group["lr"] for group, _, _ in rows)
        if self.gamma is None:  # (20): the first step moves x by REACH of its norm
            size = sum(p.numel() for _, p, _ in rows)
            weights = max(sum(float(p.double().square().sum()) for _, p, _ in rows), SMALLEST**2 * size)
            step = sum((group["lr"] * (1 - group["momentum"] ** 2)) ** 2 * p.numel() for group, p, _ in rows)
            self.gamma = min(1.0, REACH * (weights / step) ** 0.5)
            return
        ss = sy = sg = moved = weights = count = 0.0
        for group, p, state in rows:
            if "s" in state:
                s, scale = state["s"].double(), p.numel() / state["s"].numel()
                assert p.grad is not None
                product = scale * float(s @ p.grad.flatten()[state["run"]].double())
                ss += scale * lr_ref / group["lr"] * float((s * s / state["D"]).sum())
                sy += product - scale * state["sg"]
                sg += product
                moved += scale * float(s @ s)
                weights += scale * state["xx"]
                count += p.numel()
        accepted = ss > torch.finfo(torch.float32).tiny
        if accepted:  # (9)
            keep = RHO if self.ess > 0 else 0.0
            self.ess, self.esy, self.esg = (
                keep * old + (1 - keep) * new for old, new in ((self.ess, ss), (self.esy, sy), (self.esg, sg))
            )
        r = lr_ref * self.esy / self.ess if self.ess > 0 else 0.0  # (10): curvature along the path, times lr
        cap = min(_cap(group["momentum"]) for group, _, _ in rows)  # (13)
        free = self.esg <= 0 or moved <= REACH**2 * max(weights, SMALLEST**2 * count)  # (21)
        factor = (GROWTH if free else FADE) if accepted else 1.0
        self.gamma = min(1.0 if r <= cap else cap / r, factor * self.gamma)  # (14)

    def _update(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        lr, beta, gamma = group["lr"], group["momentum"], self.gamma or 0.0
        if not state:
            state.update(v=torch.zeros_like(p), h=torch.zeros_like(p), step=0)
        state["h"].lerp_(g * g, (1 - DECAY) / (1 - DECAY ** (state["step"] + 1)))
        state["v"].mul_(beta).add_(g)
        D = (1 - beta) / (state["h"].sqrt() + EPS)  # (19): the metric
        n = p.numel()
        length = min(n, max(LEAST, -(-n // SHARE)))  # (22): another run at each step
        start = min(state["step"] % -(-n // length) * length, n - length)
        run = slice(start, start + length)
        before = p.flatten()[run].clone()
        p.mul_(1 - lr * gamma * group["weight_decay"]).sub_(lr * gamma * D * (g + beta * state["v"]))  # (16)
        s = p.flatten()[run] - before
        state.update(s=s, run=run, D=D.flatten()[run].double(), step=state["step"] + 1)
        state.update(sg=float(s.double() @ g.flatten()[run].double()), xx=float(before.double().square().sum()))


def _cap(beta: float) -> float:
    """(13): above lr times the curvature that noise alone seems to have (11), below the stability limit (12)."""
    noise = (1 + beta) / ((1 + beta) ** 2 + beta**4 / (1 - beta**2))
    return min(MARGIN * noise, SHARE_OF_LIMIT * 2 * (1 + beta) / (1 + 2 * beta))
