# ruff: noqa: B905
"""Every path of SP against the float64 NumPy oracle, over 200 steps of noisy quadratic gradients."""

import math

import numpy as np
import pytest
import torch
from sp_oracle import LEAST, SHARE, Paper, Robust, run_of

from sp_yolo.optim import SP
from sp_yolo.optim.reference import ReferenceSP

STEPS = 200
# (40, 50) and (30, 50) have two runs that overlap, (61, 20, 5, 3) has 16, of which the last two overlap.
SHAPES = [[(4, 3, 2, 2), (40, 50), (5,), (61, 20, 5, 3)], [(3, 4), (1, 1), (2,), (30, 50)]]

CASES = {
    "default": {},
    "fast": {"lr": 0.1},
    "far too fast": {"lr": 2.0},
    "heavy ball": {"lr": 0.1, "nesterov": False, "momentum": 0.7},
    "coupled": {"lr": 0.05, "decoupled": False, "weight_decay": 0.05},
    "maximize": {"lr": 0.05, "maximize": True},
    "given cap": {"lr": 0.1, "rcap": 0.05},
    "no momentum": {"lr": 0.1, "momentum": 0.0},
    "from nearly nothing": {"lr": 0.02, "scale": 1e-5},
    "other rho and growth": {"lr": 0.1, "rho": 0.7, "growth": 1.3},
    "no metric": {"lr": 0.02, "metric": "none"},
    "no metric, coupled heavy ball": {"lr": 0.04, "metric": "none", "nesterov": False, "decoupled": False},
    "fisher saliency": {"lr": 0.05, "sigma": 0.7, "total_steps": STEPS},
    "metric saliency": {"lr": 0.05, "sigma": 0.6, "total_steps": STEPS, "saliency": "metric"},
    "no metric, fisher saliency": {"lr": 0.03, "metric": "none", "sigma": 0.7, "total_steps": STEPS},
    "no metric, magnitude": {"lr": 0.03, "metric": "none", "sigma": 0.7, "total_steps": STEPS, "saliency": "metric"},
    "constant sigma": {"lr": 0.05, "sigma": 0.5, "every": 7},
    "pruned once": {"lr": 0.05, "sigma": 0.5, "every": 1000},
    "not held": {"lr": 0.05, "sigma": 0.5, "total_steps": STEPS, "held": False},
    "coupled, pruned": {"lr": 0.05, "sigma": 0.7, "total_steps": STEPS, "decoupled": False, "every": 3},
}  # fmt: skip
PATHS = {
    "single": {"foreach": False, "native": False},
    "foreach": {"foreach": True, "native": False},
    "native": {"native": True},
}
DTYPES = {"single": torch.float64, "foreach": torch.float64, "native": torch.float32}
on_every_path = pytest.mark.parametrize("path", PATHS)
in_float64 = pytest.mark.parametrize("path", ["single", "foreach"])


class Problem:
    """Gradients h * x + noise of a quadratic, for the parameters of SHAPES; the same for every optimizer.

    Of thousands of elements that are ranked again and again, float32 ranks two near-equal ones the other way round one
    day. So there the large tensors have one dimension: they are not ranked."""

    def __init__(self, case, dtype=torch.float64, seed=0):
        flat = dtype is torch.float32 and case.get("sigma") and case.get("every", 10) < STEPS
        shapes = [[(math.prod(s),) if flat and math.prod(s) > LEAST else s for s in group] for group in SHAPES]
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.start = [[case.get("scale", 1) * self.rng.normal(size=shape) for shape in group] for group in shapes]
        self.curvature = [[np.exp(self.rng.uniform(-1.5, 1.5, size=shape)) for shape in group] for group in shapes]
        self.sign = -1.0 if case.get("maximize") else 1.0
        self.shared = {name: case[name] for name in ("rho", "growth") if name in case}
        first = {"lr": 0.005, **{name: value for name, value in case.items() if name not in {*self.shared, "scale"}}}
        second = {"lr": 0.5 * first["lr"], "momentum": 0.8 * first.get("momentum", 0.9)}
        second |= {"sigma": 0.5 * first.get("sigma", 0.0), "every": 1 + first.get("every", 10)}
        self.settings = [first, {**first, **second}]

    def gradients(self, params):
        one = lambda h, x: self.sign * (h * x + 0.3 * self.rng.normal(size=x.shape))  # noqa: E731
        return [[one(h, x) for h, x in zip(hs, xs)] for hs, xs in zip(self.curvature, params)]

    def oracle(self):
        return Robust(list(zip(self.start, self.settings)), **self.shared)

    def torch_groups(self):
        return [
            {"params": [torch.nn.Parameter(torch.tensor(x, dtype=self.dtype)) for x in xs], **cfg}
            for xs, cfg in zip(self.start, self.settings)
        ]


def run(problem, oracle, optimizer=None, steps=STEPS, schedule=None, spoil=None):
    """Feed both the gradients at the oracle's point. schedule(k, i): settings of group i at step k; spoil(k, grads)
    replaces gradients in place."""
    for k in range(steps):
        for i, (_, cfg) in enumerate(oracle.groups if schedule else []):
            for settings in [cfg, optimizer.param_groups[i]] if optimizer else [cfg]:
                settings.update(schedule(k, i))
        grads = problem.gradients(oracle.params)
        if spoil:
            spoil(k, grads)
        oracle.step(grads)
        if optimizer:
            for group, gs in zip(optimizer.param_groups, grads):
                for p, g in zip(group["params"], gs):
                    p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)
            optimizer.step()


def run_sp(case, path, dtype, **how):
    """Returns (SP, oracle) after the steps."""
    problem = Problem(case, dtype)
    oracle = problem.oracle()
    optimizer = SP(problem.torch_groups(), **problem.shared, **PATHS[path])
    run(problem, oracle, optimizer, **how)
    return optimizer, oracle


def distance(optimizer, oracle):
    """Largest difference, relative to the largest parameter at the start, about 4."""
    ours = [p.detach().numpy() for group in optimizer.param_groups for p in group["params"]]
    theirs = [x for xs in oracle.params for x in xs]
    return max(np.abs(p - x).max() for p, x in zip(ours, theirs)) / 4


def assert_agree(optimizer, oracle, dtype):
    """Parameters, steps and the model's scalars. In float32 the rounded factor of the decay alone makes 6e-6 in 200
    steps, and esg is a sum that nearly cancels; a wrong branch of gamma is some percent of gamma."""
    fine = dtype is torch.float64
    assert distance(optimizer, oracle) < (1e-12 if fine else 1e-5)
    model = optimizer.param_groups[0]
    assert model["k"] == oracle.k
    for group, steps in zip(optimizer.param_groups, oracle.t):
        assert [int(optimizer.state[p]["step"]) for p in group["params"]] == steps
    ours = np.array([float(model["gamma"]), *model["averages"].tolist()])
    theirs = np.array([oracle.gamma, oracle.ess, oracle.esy, oracle.esg])
    tolerance = [1e-11, 1e-10, 1e-9, 1e-9] if fine else [1e-4, 1e-4, 1e-4, 1e-2]
    assert (np.abs(ours - theirs) <= tolerance * np.abs(theirs)).all(), f"{ours} is not {theirs}"


@in_float64
@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_to_rounding(case, path):
    assert_agree(*run_sp(CASES[case], path, torch.float64), torch.float64)


@on_every_path
@pytest.mark.parametrize("case", CASES)
def test_float32_agrees(case, path):
    assert_agree(*run_sp(CASES[case], path, torch.float32), torch.float32)


def test_the_shapes_have_runs_that_move_overlap_and_wrap():
    sizes = [math.prod(shape) for group in SHAPES for shape in group]
    assert any(LEAST < n <= SHARE * LEAST for n in sizes) and any(n > SHARE * LEAST for n in sizes)
    for n in sizes:
        seen = np.bincount(np.concatenate([np.arange(n)[run_of(n, t)] for t in range(SHARE)]), minlength=n)
        assert seen.min() > 0 and (n <= LEAST or seen.max() > seen.min())
        assert any(run_of(n, t) == run_of(n, 0) for t in range(1, STEPS))


@in_float64
def test_masks_are_the_oracles(path):
    optimizer, oracle = run_sp(CASES["fisher saliency"], path, torch.float64)
    prunable = [p for p in optimizer.param_groups[0]["params"] if p.ndim > 1]
    for p, mask in zip(prunable, (mask for mask in oracle.mask[0] if mask.ndim > 1)):
        assert np.array_equal(optimizer.state[p]["mask"].numpy(), mask == 1)
    assert sum(int((p == 0).sum()) for p in prunable) == int(0.7 * sum(p.numel() for p in prunable))


def missing(k, grads):
    """Some tensors have no gradient, at the first step too, and for a while a whole group has none."""
    for i, j, absent in (0, 1, k % 3 == 0), (0, 3, k % 7 == 1), (1, 0, k < 12):
        if absent:
            grads[i][j] = None
    for i in [0] if 100 <= k < 110 else [1] if 40 <= k < 60 else []:
        grads[i] = [None] * len(grads[i])


def not_finite(k, grads):
    """Four bad steps: the first, two in succession, and one in a tensor of the second group."""
    if k in (0, 20, 21):
        grads[0][3][7, 3, 2, 1] = np.nan
    if k == 50:
        grads[1][2][1] = -np.inf


def steeper(k, grads):
    """The quadratic is 30 times as steep for 50 steps, at first with gradients of the second group alone: the derived
    cap holds gamma, then small steps let it grow."""
    for i, gs in enumerate(grads if 100 <= k < 150 else []):
        gs[:] = [None if i == 0 and k < 105 else 30 * g for g in gs]


SPOILT = {
    missing: ["fast", "coupled", "no metric", "constant sigma", "not held"],
    not_finite: ["fast", "no metric"],
    steeper: ["fast", "no metric", "no metric, coupled heavy ball"],
}

# The multi-tensor path does not ask the device: after a bad gradient its counters go on and the next pair is void.
MET = [(f, case, p) for f in SPOILT for case in SPOILT[f] for p in PATHS if (f, p) != (not_finite, "foreach")]


@pytest.mark.parametrize(("spoil", "case", "path"), MET)
def test_gradients_that_are_missing_not_finite_or_suddenly_steep(spoil, case, path):
    optimizer, oracle = run_sp(CASES[case], path, DTYPES[path], spoil=spoil)
    assert oracle.k == (STEPS - 4 if spoil is not_finite else STEPS)
    assert_agree(optimizer, oracle, DTYPES[path])


BRANCHES = {
    ("far too fast", None): {"growth by slope", "fade"},
    ("given cap", None): {"cap"},
    ("constant sigma", None): {"open", "one", "stay"},
    ("no metric", steeper): {"cap", "growth by size"},
}


@pytest.mark.parametrize(("case", "spoil"), BRANCHES)
def test_the_cases_take_every_branch_of_gamma(case, spoil):
    problem = Problem(CASES[case])
    oracle = problem.oracle()
    run(problem, oracle, spoil=spoil)
    assert BRANCHES[case, spoil] <= set(oracle.taken)


def warm_up(k, i):
    """One group starts at 0, the other high, as a detector's bias group does."""
    p = min(k / 50, 1.0)
    return {"lr": 0.1 * p if i == 0 else 0.1 - 0.05 * p, "momentum": 0.8 + 0.137 * p, "weight_decay": 0.02 * p}


def late_opening(k, i):
    """Nothing moves for 7 steps, the second group for 30; all stand still for a while later."""
    return {"lr": 0.0 if k < (7, 30)[i] or 60 <= k < 70 else 0.1}


@on_every_path
@pytest.mark.parametrize("schedule", [warm_up, late_opening])
@pytest.mark.parametrize("case", ["default", "coupled", "no metric"])
def test_settings_are_read_at_each_step(case, schedule, path):
    assert_agree(*run_sp(CASES[case], path, DTYPES[path], schedule=schedule), DTYPES[path])


@on_every_path
def test_without_a_positive_lr_all_stand_still_and_the_momentum_goes_on(path):
    optimizer, oracle = run_sp({"lr": 0.0}, path, DTYPES[path], steps=5)
    assert oracle.gamma is None
    for group, xs, vs in zip(optimizer.param_groups, Problem({}).start, oracle.v):
        for p, x, v in zip(group["params"], xs, vs):
            assert np.array_equal(p.detach().numpy(), x.astype(p.detach().numpy().dtype))
            assert np.abs(optimizer.state[p]["momentum_buffer"].numpy() - v).max() < 1e-5
    assert optimizer.param_groups[0]["k"] == 5 and not optimizer.param_groups[0]["averages"].any()


@in_float64
def test_the_state_of_a_tensor_is_the_oracles(path):
    """After 199 steps: the runs do not begin at 0."""
    optimizer, oracle = run_sp(CASES["fast"], path, torch.float64, steps=STEPS - 1)
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            s = (oracle.params[i][j] - oracle.x_prev[i][j]).ravel()[run_of(p.numel(), oracle.t[i][j] - 1)]
            theirs = {"displacement": s, "momentum_buffer": oracle.v[i][j], "square_avg": oracle.h[i][j]}
            for name, value in theirs.items():
                assert optimizer.state[p][name].shape == value.shape
                assert np.abs(optimizer.state[p][name].numpy() - value).max() < 1e-12, name


@pytest.mark.parametrize("how", [{}, {"spoil": missing}, {"spoil": not_finite}, {"schedule": late_opening}])
@pytest.mark.parametrize("lr", [0.005, 0.1, 2.0])
def test_reference(lr, how):
    problem = Problem({"lr": lr, "momentum": 0.9, "weight_decay": 0.02})
    oracle = problem.oracle()
    optimizer = ReferenceSP(problem.torch_groups(), lr=lr, momentum=0.9, weight_decay=0.02)
    run(problem, oracle, optimizer, **how)
    assert distance(optimizer, oracle) < 1e-12


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
    optimizer = SP(params, mode="paper", decoupled=False, foreach=foreach, **settings)
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
