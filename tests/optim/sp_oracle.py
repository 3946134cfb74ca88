# ruff: noqa: B905
"""SP in float64 NumPy, written from the method's description, not from sp_yolo.optim: x_{k-1} and g_{k-1} are stored,
the pair after a proximal step is skipped by a flag, masks multiply, and the ranking is one stable argsort."""

import math

import numpy as np

DEFAULTS = dict(
    lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, decoupled=False, damping="none", damping_bounds=(0.1, 10.0),
    sigma=0.0, saliency="fisher", every=10, start=0.1, end=0.65, total_steps=None, held=True, rcap=0.0, maximize=False,
)  # fmt: skip


class Robust:
    """groups: list of (list of arrays, settings)."""

    def __init__(self, groups, rho=0.9, growth=1.5, gamma_start=0.01):
        self.groups = [([np.array(x, dtype=np.float64) for x in xs], {**DEFAULTS, **cfg}) for xs, cfg in groups]
        self.rho, self.growth, self.gamma = rho, growth, gamma_start
        self.k, self.skip, self.ess, self.esy = 0, False, 0.0, 0.0
        shape = lambda value: [[np.full(x.shape, value) for x in xs] for xs, _ in self.groups]  # noqa: E731
        self.v, self.h, self.mask, self.d_prev = shape(0.0), shape(0.0), shape(1.0), shape(1.0)
        self.x_prev, self.g_prev = shape(0.0), shape(0.0)

    @property
    def params(self):
        return [xs for xs, _ in self.groups]

    def cap(self, cfg):
        if cfg["rcap"]:
            return cfg["rcap"]
        b = cfg["momentum"]
        if cfg["nesterov"]:
            return 1.3 * (1 + b) / ((1 + b) ** 2 + b**4 / (1 - b**2))
        return 1.3 * (1 - b * b)

    def step(self, grads):
        if not all(np.isfinite(g).all() for group in grads for g in group):
            return
        raw = [[-g if cfg["maximize"] else g for g in gs] for gs, (_, cfg) in zip(grads, self.groups)]
        g = [
            [gi + (0 if cfg["decoupled"] else cfg["weight_decay"]) * x for gi, x in zip(gs, xs)]
            for gs, (xs, cfg) in zip(raw, self.groups)
        ]
        lr_ref = max(cfg["lr"] for _, cfg in self.groups)
        accepted = False
        if self.k > 0:
            ss = sy = 0.0
            for i, (xs, cfg) in enumerate(self.groups):
                if cfg["lr"] == 0:
                    continue
                for j, x in enumerate(xs):
                    s, y = x - self.x_prev[i][j], g[i][j] - self.g_prev[i][j]
                    ss += (s * s / self.d_prev[i][j]).sum() / (cfg["lr"] / lr_ref)
                    sy += (s * y).sum()
            accepted = not self.skip and ss > 1.2e-38
            if accepted and self.ess == 0:
                self.ess, self.esy = ss, sy
            elif accepted:
                self.ess = self.rho * self.ess + (1 - self.rho) * ss
                self.esy = self.rho * self.esy + (1 - self.rho) * sy
        self.skip = False
        r = lr_ref * self.esy / self.ess if self.ess > 0 else 0.0
        moving = [self.cap(cfg) for _, cfg in self.groups if cfg["lr"] > 0]
        if moving:
            target = 1.0 if r <= min(moving) else min(moving) / r
            self.gamma = min(target, self.growth * self.gamma if accepted else self.gamma)
        self.move(raw, g, r)
        self.prune(r)
        self.k += 1

    def metric(self, i, j, x, cfg, r):
        if cfg["damping"] == "fisher":
            return (1 - cfg["momentum"]) / (np.sqrt(self.h[i][j] / (1 - 0.95 ** (self.k + 1))) + 1e-8)
        return self.diagonal(x, cfg, r)

    def diagonal(self, x, cfg, r):
        if cfg["damping"] == "none" or x.ndim < 2 or x.size < 2 or not x.any():
            return np.ones(x.shape)
        u = x**2 / (x**2).mean()
        d = 1 + (1 - min(max(r * self.gamma, 0.0), 1.0)) * u / (u**2).mean()
        return np.clip(d / d.mean(), *cfg["damping_bounds"])

    def move(self, raw, g, r):
        for i, (xs, cfg) in enumerate(self.groups):
            lr, beta = cfg["lr"], cfg["momentum"]
            for j, x in enumerate(xs):
                # The Fisher average is of the loss's gradient, without the decay.
                self.h[i][j] = 0.95 * self.h[i][j] + 0.05 * raw[i][j] ** 2
                d = self.metric(i, j, x, cfg, r)
                self.x_prev[i][j], self.g_prev[i][j], self.d_prev[i][j] = x.copy(), g[i][j], d
                v = self.v[i][j] = beta * self.v[i][j] + g[i][j]
                step = lr * self.gamma * d * (g[i][j] + beta * v if cfg["nesterov"] else v)
                new = (x * (1 - lr * cfg["weight_decay"]) if cfg["decoupled"] else x) - step
                xs[j] = new * self.mask[i][j]
                self.v[i][j] = v * self.mask[i][j]

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

    def prune(self, r):
        for i, (xs, cfg) in enumerate(self.groups):
            sigma = self.sigma(cfg) if cfg["sigma"] else None
            chosen = [j for j, x in enumerate(xs) if x.ndim >= 2 and x.size > 1]
            if sigma is None or not chosen:
                continue
            scores = []
            for j in chosen:
                h = self.h[i][j] if cfg["saliency"] == "fisher" else 1 / self.metric(i, j, xs[j], cfg, r)
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
            self.skip = True


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
