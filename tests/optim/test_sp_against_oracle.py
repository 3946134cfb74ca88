# ruff: noqa: B905
"""Every path of SP against the float64 NumPy oracle, over 200 steps of noisy quadratic gradients."""

import numpy as np
import pytest
import torch
from sp_oracle import Paper, Robust

from sp_yolo.optim import SP

STEPS = 200
SHAPES = [[(4, 3, 2, 2), (6, 5), (5,)], [(3, 4), (1, 1), (2,)]]

CASES = {
    "dense": {},
    "heavy ball": {"nesterov": False, "momentum": 0.7},
    "decoupled": {"decoupled": True, "weight_decay": 0.05},
    "maximize": {"maximize": True},
    "given cap": {"rcap": 0.05},
    "no momentum": {"momentum": 0.0, "lr": 0.03},
    "diagonal": {"damping": "diagonal"},
    "diagonal, tight bounds": {"damping": "diagonal", "damping_bounds": (0.9, 1.2)},
    "fisher damping": {"damping": "fisher", "lr": 0.02},
    "fisher damping, decoupled heavy ball": {"damping": "fisher", "lr": 0.1, "nesterov": False, "decoupled": True},
    "fisher damping, pruned": {"damping": "fisher", "lr": 0.05, "sigma": 0.7, "total_steps": STEPS},
    "metric of fisher damping": {"damping": "fisher", "sigma": 0.6, "total_steps": STEPS, "saliency": "damping"},
    "fisher": {"sigma": 0.7, "total_steps": STEPS},
    "magnitude": {"sigma": 0.7, "total_steps": STEPS, "saliency": "damping"},
    "metric of the diagonal": {"sigma": 0.6, "total_steps": STEPS, "saliency": "damping", "damping": "diagonal"},
    "constant sigma": {"sigma": 0.5, "every": 7},
    "not held": {"sigma": 0.5, "total_steps": STEPS, "held": False},
    "decoupled, pruned": {"sigma": 0.7, "total_steps": STEPS, "decoupled": True, "every": 3},
}
PATHS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
}
IN_FLOAT32 = {**PATHS, "native": {"compile": True}}


class Problem:
    """Gradients h * x + noise of a quadratic, for the parameters of SHAPES; the same for every optimizer."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.start = [[self.rng.normal(size=shape) for shape in group] for group in SHAPES]
        self.curvature = [[np.exp(self.rng.normal(size=shape)) for shape in group] for group in SHAPES]

    def gradients(self, params):
        return [
            [h * x + 0.3 * self.rng.normal(size=x.shape) for h, x in zip(hs, xs)]
            for hs, xs in zip(self.curvature, params)
        ]


def run_both(case, path, dtype, steps=STEPS, each_step=None):
    """Feed SP and the oracle the gradients at the oracle's point; returns (parameters of SP, oracle)."""
    problem = Problem()
    halved = {"lr": 0.5 * case.get("lr", 0.1), "sigma": 0.5 * case.get("sigma", 0.0)}
    settings = [dict(case), {**case, **halved, "momentum": 0.8 * case.get("momentum", 0.9)}]
    oracle = Robust(list(zip(problem.start, settings)))
    params = [[torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in xs] for xs in problem.start]
    optimizer = SP([{"params": ps, **cfg} for ps, cfg in zip(params, settings)], **path)
    for k in range(steps):
        if each_step:
            each_step(k, optimizer.param_groups, [cfg for _, cfg in oracle.groups])
        grads = problem.gradients(oracle.params)
        if case.get("maximize"):
            grads = [[-g for g in gs] for gs in grads]
        for ps, gs in zip(params, grads):
            for p, g in zip(ps, gs):
                p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        oracle.step(grads)
    return params, optimizer, oracle


def distance(params, oracle):
    """Largest difference, relative to the largest parameter of the oracle."""
    pairs = [(p.detach().numpy(), x) for ps, xs in zip(params, oracle.params) for p, x in zip(ps, xs)]
    return max(np.abs(p - x).max() for p, x in pairs) / max(np.abs(x).max() for _, x in pairs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_to_rounding(case, path):
    params, optimizer, oracle = run_both(CASES[case], PATHS[path], torch.float64)
    assert distance(params, oracle) < 1e-12
    model = optimizer.state_dict()["state"]["model"]
    assert abs(float(model["gamma"]) - oracle.gamma) < 1e-12
    assert abs(float(model["ess"]) / oracle.ess - 1) < 1e-10


@pytest.mark.parametrize("path", IN_FLOAT32)
@pytest.mark.parametrize("case", CASES)
def test_float32_agrees(case, path):
    params, _, oracle = run_both(CASES[case], IN_FLOAT32[path], torch.float32)
    assert distance(params, oracle) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_masks_are_the_oracles(path):
    params, optimizer, oracle = run_both(CASES["fisher"], PATHS[path], torch.float64)
    state = optimizer.state
    assert np.array_equal(state[params[0][0]]["mask"].numpy(), oracle.mask[0][0] == 1)
    prunable = [p for p in params[0] if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in prunable)
    assert zeros == int(0.7 * sum(p.numel() for p in prunable))


@pytest.mark.parametrize("path", PATHS)
def test_settings_are_read_at_each_step(path):
    """lr and momentum follow a warm-up: one group starts at 0, the other high, as a detector's bias group does."""

    def warm_up(k, *both):
        for groups in both:
            for index, group in enumerate(groups):
                group["lr"] = min(k / 50, 1.0) * 0.1 if index == 0 else 0.1 - 0.05 * min(k / 50, 1.0)
                group["momentum"] = 0.8 + 0.137 * min(k / 50, 1.0)

    params, optimizer, oracle = run_both({}, PATHS[path], torch.float64, each_step=warm_up)
    assert distance(params, oracle) < 1e-12
    assert abs(float(optimizer.state_dict()["state"]["model"]["gamma"]) - oracle.gamma) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_all_groups_standing_still_keep_everything_but_momentum(path):
    params, optimizer, _ = run_both({"lr": 0.0}, PATHS[path], torch.float64, steps=5)
    start = Problem().start
    assert all(np.array_equal(p.detach().numpy(), x) for ps, xs in zip(params, start) for p, x in zip(ps, xs))
    assert float(optimizer.state_dict()["state"]["model"]["gamma"]) == 0.01


PAPER_CASES = {
    "dense": {"lr": 0.01},
    "pruned": {"lr": 0.01, "sigma": 0.3},
    "decayed": {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.5},
    "no nesterov": {"lr": 0.01, "nesterov": False, "sigma": 0.1},
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", PAPER_CASES)
@pytest.mark.parametrize("curvature", [0.5, 1.5])
def test_paper_mode(case, curvature, foreach):
    """Curvature below 1 takes the Newton branch (s's > s'y), above 1 the scalar branch B = r I."""
    settings = {"weight_decay": 0.0, **PAPER_CASES[case]}
    rng = np.random.default_rng(3)
    starts = [rng.normal(size=(6, 5)), rng.normal(size=(7,))]
    hessians = [curvature * np.exp(0.1 * rng.normal(size=x.shape)) for x in starts]
    oracles = [Paper(x, **settings) for x in starts]
    params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    optimizer = SP(params, mode="paper", foreach=foreach, **settings)
    for _ in range(STEPS):
        for p, h, oracle in zip(params, hessians, oracles):
            grad = h * oracle.x
            p.grad = torch.tensor(grad)
            oracle.step(grad)
        optimizer.step()
        for p, oracle in zip(params, oracles):
            assert np.abs(p.detach().numpy() - oracle.x).max() < 1e-12 * max(np.abs(oracle.x).max(), 1)
    if "sigma" in settings:
        assert int((params[0] == 0).sum()) == int(settings["sigma"] * 30)
