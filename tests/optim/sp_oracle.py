# ruff: noqa: B905
"""SP in float64 NumPy, written from the method's description, not from sp_yolo.optim: x_{k-1}, g_{k-1} and D_{k-1} are
stored in full and the run of elements is a slice of them, a flag makes the pair after a proximal step void, masks
multiply, and the ranking is one stable argsort."""

import math
from collections import Counter

import numpy as np

CAP_MARGIN, CAP_SHARE = 3.0, 0.8
FADE = 0.95  # gamma's factor while the model neither descends nor moves little
REACH = 0.01  # a relative change of the parameters that counts as little
FLOOR_RMS = 1e-3  # parameters smaller than this count as this large
SHARE = 16  # a run is this part of a tensor,
LEAST = 1024  # but no fewer elements
H_DECAY = 0.95  # of the mean of g^2
EPS = 1e-8  # added to its root

DEFAULTS = dict(
    lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.01, decoupled=True, metric="fisher", sigma=0.0,
    saliency="fisher", every=10, start=0.1, end=0.65, total_steps=None, held=True, rcap=0.0, maximize=False,
)  # fmt: skip


def run_of(n, t):
    """The elements, in C order, that a tensor of n elements keeps at its step t = 0, 1, ..."""
    m = min(n, max(LEAST, math.ceil(n / SHARE)))
    first = min(t % math.ceil(n / m) * m, n - m)
    return slice(first, first + m)


class Robust:
    """groups: list of (list of arrays, settings). The settings may change between steps. `taken` counts the branches
    that gamma took: open, cap, growth (also: by slope or by size), fade, stay, one."""

    def __init__(self, groups, rho=0.9, growth=1.1):
        self.groups = [([np.array(x, np.float64, order="C") for x in xs], {**DEFAULTS, **cfg}) for xs, cfg in groups]
        self.rho, self.growth, self.gamma = rho, growth, None
        self.k, self.ess, self.esy, self.esg, self.taken = 0, 0.0, 0.0, 0.0, Counter()
        full = lambda value: [[np.full(x.shape, value) for x in xs] for xs, _ in self.groups]  # noqa: E731
        each = lambda value: [[value for _ in xs] for xs, _ in self.groups]  # noqa: E731
        self.v, self.h, self.mask = full(0.0), full(0.0), full(1.0)
        self.x_prev, self.g_prev, self.d_prev = full(0.0), full(0.0), full(1.0)
        self.t, self.void = each(0), each(False)

    @property
    def params(self):
        return [xs for xs, _ in self.groups]

    def step(self, grads):
        """grads: one list for each group, of arrays or None."""
        g = [[None if gi is None else np.array(gi, np.float64, order="C") for gi in gs] for gs in grads]
        if not all(np.isfinite(gi).all() for gs in g for gi in gs if gi is not None):
            return
        g = [[-gi if cfg["maximize"] and gi is not None else gi for gi in gs] for gs, (_, cfg) in zip(g, self.groups)]
        present = [(i, j) for i, gs in enumerate(g) for j, gi in enumerate(gs) if gi is not None]
        moving = [(i, j) for i, j in present if self.groups[i][1]["lr"] > 0]
        lr_ref = max((self.groups[i][1]["lr"] for i, _ in present), default=0.0)
        self.adapt(g, moving, lr_ref, self.pair(g, moving, lr_ref))
        for i, j in present:
            self.move(i, j, g[i][j])
        self.prune()
        self.k += 1

    def pair(self, g, moving, lr_ref):
        """Takes this step's secant pair into the averages; returns (accepted, s2, x2, count)."""
        ss = sy = sg = s2 = x2 = 0.0
        count = 0
        for i, j in moving:
            if self.t[i][j] == 0:
                continue
            (xs, cfg), n = self.groups[i], g[i][j].size
            run = run_of(n, self.t[i][j] - 1)
            x, x_prev, g_new, g_prev, d_prev = (
                a.ravel()[run] for a in (xs[j], self.x_prev[i][j], g[i][j], self.g_prev[i][j], self.d_prev[i][j])
            )
            s = (x - x_prev) * (0.0 if self.void[i][j] else 1.0)
            c = n / s.size
            ss += c * lr_ref / cfg["lr"] * (s * s / d_prev).sum()
            sy += c * (s * (g_new - g_prev)).sum()
            if not cfg["decoupled"]:
                sy += cfg["weight_decay"] * c * (s * s).sum()
            sg += c * (s * g_new).sum()
            s2 += c * (s * s).sum()
            x2 += c * (x_prev * x_prev).sum()
            count += n
        accepted = ss > 1.2e-38
        if accepted:
            keep = 0.0 if self.ess == 0 else self.rho
            self.ess = keep * self.ess + (1 - keep) * ss
            self.esy = keep * self.esy + (1 - keep) * sy
            self.esg = keep * self.esg + (1 - keep) * sg
        return accepted, s2, x2, count

    def cap(self, cfg):
        if cfg["rcap"]:
            return cfg["rcap"]
        b = cfg["momentum"]
        if cfg["nesterov"]:
            noise, limit = (1 + b) / ((1 + b) ** 2 + b**4 / (1 - b**2)), 2 * (1 + b) / (1 + 2 * b)
        else:
            noise, limit = 1 - b * b, 2 * (1 + b)
        return min(CAP_MARGIN * noise, CAP_SHARE * limit)

    def adapt(self, g, moving, lr_ref, pair):
        if not moving:
            return
        if self.gamma is None:
            self.gamma = self.opening(g, moving)
            self.taken["open"] += 1
            return
        accepted, s2, x2, count = pair
        r = lr_ref * self.esy / self.ess if self.ess > 0 else 0.0
        cap = min(self.cap(self.groups[i][1]) for i, _ in moving)
        target = 1.0 if r <= cap else cap / r
        branch, factor = "stay", 1.0
        if accepted:
            by_slope, by_size = self.esg <= 0, s2 <= REACH**2 * max(x2, FLOOR_RMS**2 * count)
            branch, factor = ("growth", self.growth) if by_slope or by_size else ("fade", FADE)
        if target <= self.gamma * factor:
            branch = "cap" if target < 1 else "one"
        if branch == "growth":
            self.taken["growth by slope" if by_slope else "growth by size"] += 1
        self.taken[branch] += 1
        self.gamma = min(target, self.gamma * factor)

    def opening(self, g, moving):
        x2 = u2 = 0.0
        count = 0
        for i, j in moving:
            (xs, cfg), n, b = self.groups[i], g[i][j].size, self.groups[i][1]["momentum"]
            x2 += (xs[j] ** 2).sum()
            count += n
            if cfg["metric"] == "fisher":
                f = 1 - b * b if cfg["nesterov"] else 1 - b
                u2 += cfg["lr"] ** 2 * f**2 * n
            else:
                f = 1 + b if cfg["nesterov"] else 1.0
                u2 += cfg["lr"] ** 2 * f**2 * (g[i][j] ** 2).sum()
        return min(1.0, REACH * math.sqrt(max(x2, FLOOR_RMS**2 * count) / u2)) if u2 > 0 else 1.0

    def metric(self, i, j):
        """D of the present h and momentum."""
        cfg = self.groups[i][1]
        if cfg["metric"] == "none":
            return np.ones(self.h[i][j].shape)
        return (1 - cfg["momentum"]) / (np.sqrt(self.h[i][j]) + EPS)

    def move(self, i, j, g):
        xs, cfg = self.groups[i]
        x, beta = xs[j], cfg["momentum"]
        # No group has had a positive lr while gamma is None.
        rate = cfg["lr"] * (0.0 if self.gamma is None else self.gamma)
        self.h[i][j] = self.h[i][j] + (1 - H_DECAY) / (1 - H_DECAY ** (self.t[i][j] + 1)) * (g * g - self.h[i][j])
        d = self.metric(i, j)
        decayed = g if cfg["decoupled"] else g + cfg["weight_decay"] * x
        v = beta * self.v[i][j] + decayed
        shrink = 1 - rate * cfg["weight_decay"] if cfg["decoupled"] else 1.0
        xs[j] = (shrink * x - rate * d * (decayed + beta * v if cfg["nesterov"] else v)) * self.mask[i][j]
        self.v[i][j] = v * self.mask[i][j]
        self.x_prev[i][j], self.g_prev[i][j], self.d_prev[i][j] = x, g, d
        self.t[i][j] += 1
        self.void[i][j] = False

    def sigma(self, cfg):
        """sigma_k where the proximal step is due, else None."""
        steps, every = cfg["total_steps"], cfg["every"]
        if steps is None:
            return cfg["sigma"] if self.k % every == 0 else None
        last = min(math.ceil(cfg["end"] * steps), steps - 1)
        if self.k == last:
            return cfg["sigma"]
        if self.k % every or not cfg["start"] * steps <= self.k < last:
            return None
        p = (self.k / steps - cfg["start"]) / (cfg["end"] - cfg["start"])
        return cfg["sigma"] * (1 - (1 - p) ** 3)

    def prune(self):
        for i, (xs, cfg) in enumerate(self.groups):
            sigma = self.sigma(cfg) if cfg["sigma"] else None
            chosen = [j for j, x in enumerate(xs) if x.ndim >= 2 and x.size > 1 and self.t[i][j]]
            if sigma is None or not chosen:
                continue
            scores = []
            for j in chosen:
                h = self.h[i][j] if cfg["saliency"] == "fisher" else 1 / self.metric(i, j)
                scores.append(np.where(self.mask[i][j] == 1, 0.5 * h * xs[j] ** 2, -1.0).ravel())
            joined = np.concatenate(scores)
            count = math.floor(sigma * joined.size)
            if not count:
                continue
            keep = np.ones(joined.size)
            keep[np.argsort(joined, kind="stable")[:count]] = 0
            parts = np.split(keep, np.cumsum([s.size for s in scores])[:-1])
            for j, part in zip(chosen, parts):
                part = part.reshape(xs[j].shape)
                xs[j] = xs[j] * part
                self.v[i][j] = self.v[i][j] * part
                if cfg["held"]:
                    self.mask[i][j] = part
            self.void = [[True for _ in row] for row in self.void]


class Paper:
    """The published update of one tensor, eqs. (1)-(6), without the scale-free form."""

    def __init__(self, x, lr, momentum=0.9, nesterov=True, weight_decay=0.0, sigma=0.0):
        self.x, self.lr, self.beta, self.nesterov, self.wd, self.sigma = (
            np.array(x),
            lr,
            momentum,
            nesterov,
            weight_decay,
            sigma,
        )
        self.v = np.zeros_like(self.x)
        self.x_prev = self.g_prev = None

    def step(self, grad):
        g = grad + self.wd * self.x
        inverse = np.ones_like(self.x)
        if self.x_prev is not None:
            s, y = self.x - self.x_prev, g - self.g_prev
            ss, sy = (s * s).sum(), (s * y).sum()
            if ss > sy:
                w = (ss - sy) / (s**4).sum()
                inverse = 1 + w * s**2
            elif ss > 0:
                inverse = np.full_like(self.x, ss / sy)
        self.v = self.beta * self.v + g
        d = g + self.beta * self.v if self.nesterov else g
        self.x_prev, self.g_prev = self.x, g
        x = self.x - self.lr * inverse * d
        count = math.floor(self.sigma * x.size) if x.ndim >= 2 else 0
        if count:
            saliency = (0.5 * x**2 / inverse).ravel()
            keep = np.ones(x.size)
            keep[np.argsort(saliency, kind="stable")[:count]] = 0
            x = x * keep.reshape(x.shape)
        self.x = x
