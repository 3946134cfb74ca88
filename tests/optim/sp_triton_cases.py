# ruff: noqa: B905, B023
"""The Triton path of SP: what test_sp_triton.py runs, compiled on a GPU, elsewhere in Triton's interpreter.

Triton must be imported with TRITON_INTERPRET set for the latter, so that it is another process there.
"""

import numpy as np
import pytest
import test_sp_against_oracle as against
import torch
from sp_oracle import Robust
from sp_training import model_state
from torch import nn

from sp_yolo.optim import SP, fused, plan, triton_kernels, triton_layout, triton_settle

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter takes a tenth of a second for what a GPU does in microseconds: fewer steps, and some when asked for.
STEPS = 200 if ON_GPU else 6
rare = (lambda test: test) if ON_GPU else pytest.mark.slow
# One element, odd sizes, more than a tile, more than a chunk; runs that move, overlap and wrap.
SHAPES = [[(4, 3, 2, 2), (1,), (5,)], [(30, 37), (4500,) if ON_GPU else (2200,)]]
LARGE = [[(4, 3, 2, 2), (40, 50), (5,), (61, 20, 5, 3)], [(3, 4), (1, 1), (2,), (30, 50)]]
QUICK = ["fast", "no metric, coupled heavy ball"]
CASES = [*QUICK, "heavy ball", "coupled", "maximize", "from nearly nothing", "default"]


def rarely(*values):
    """The last cases, which a GPU takes at once."""
    return [pytest.param(value, marks=() if ON_GPU else rare) for value in values]


def rounded_as_a_gpu_does(data, source, target, mode):
    """float32 to bfloat16 to nearest, ties to even; Triton 3.8's interpreter cuts the bits off."""
    from triton.language import bfloat16, float32

    if (source, target) == (float32, bfloat16):
        values = torch.from_numpy(np.ascontiguousarray(data))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return CONVERT(data, source, target, mode).reshape(data.shape)


if not ON_GPU:
    from triton.runtime import interpreter

    CONVERT = interpreter._convert_float


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The path takes CPU tensors too, where there is no GPU."""
    if not ON_GPU:
        monkeypatch.setattr(fused, "DEVICES", ("cpu",))
        monkeypatch.setattr(plan, "on_device", lambda groups: True)
        for module in (triton_layout, triton_kernels):  # smaller tensors have several
            monkeypatch.setattr(module, "CHUNK", type(module.CHUNK)(2048))
        monkeypatch.setattr(interpreter, "_convert_float", rounded_as_a_gpu_does)


def on_device(x, dtype=torch.float32):
    return torch.tensor(np.asarray(x), dtype=dtype, device=DEVICE)


def follow(case, monkeypatch, dtype=torch.float32, steps=STEPS, make_oracle=None, shapes=SHAPES, spoil=None, **how):
    """(SP on the Triton path, oracle) after the steps, both fed the gradients at the oracle's point."""
    monkeypatch.setattr(against, "SHAPES", shapes)
    problem = against.Problem(case, torch.float32)
    oracle = make_oracle(problem) if make_oracle else problem.oracle()
    groups = [
        {"params": [nn.Parameter(on_device(x, dtype)) for x in xs], **cfg}
        for xs, cfg in zip(problem.start, problem.settings)
    ]
    optimizer = SP(groups, **problem.shared, **how)
    for k in range(steps):
        grads = problem.gradients(oracle.params)
        if spoil:
            spoil(k, grads)
        rounded = [[None if g is None else on_device(g, dtype) for g in gs] for gs in grads]
        oracle.step([[None if g is None else g.double().cpu().numpy() for g in gs] for gs in rounded])
        for group, gs in zip(optimizer.param_groups, rounded):
            for p, g in zip(group["params"], gs):
                p.grad = g
        optimizer.step()
        assert optimizer.path == "triton"
    return optimizer, oracle


def differences(optimizer, oracle):
    ours = [p.detach().double().cpu().numpy() for group in optimizer.param_groups for p in group["params"]]
    return np.concatenate([np.abs(p - x).ravel() for p, x in zip(ours, [x for xs in oracle.params for x in xs])])


def assert_agree(optimizer, oracle):
    assert differences(optimizer, oracle).max() < 4e-5
    model = optimizer.param_groups[0]
    assert model["k"] == oracle.k
    ours = np.array([float(model["gamma"]), *model["averages"].tolist()])
    theirs = np.array([oracle.gamma, oracle.ess, oracle.esy, oracle.esg])
    assert (np.abs(ours - theirs) <= np.array([1e-4, 1e-4, 1e-4, 1e-2]) * np.abs(theirs)).all(), f"{ours}, {theirs}"


@pytest.mark.parametrize("case", [*QUICK, *rarely(*CASES[2:])])
def test_float32_agrees_with_the_oracle(case, monkeypatch):
    assert_agree(*follow(against.CASES[case], monkeypatch))


@pytest.mark.parametrize("capturable", rarely(False, True))
def test_larger_tensors_agree_with_the_oracle(capturable, monkeypatch):
    """A captured step keeps the first run; the oracle's moves: the tensors have one run then."""
    shapes = [[(4, 3, 2, 2)], [(31, 33), (1,)]] if capturable else LARGE
    how = {"capturable": True} if capturable else {}
    assert_agree(*follow(against.CASES["fast"], monkeypatch, shapes=shapes, steps=STEPS if ON_GPU else 4, **how))


@pytest.mark.parametrize("case", rarely("fisher saliency", "no metric, fisher saliency", "not held"))
def test_pruning_agrees_with_the_oracle(case, monkeypatch):
    """The proximal step is torch's on every path; the masks that it leaves are the kernel's."""
    settings = {**against.CASES[case], "total_steps": STEPS, "every": 10 if ON_GPU else 2}
    optimizer, oracle = follow(settings, monkeypatch)
    assert_agree(optimizer, oracle)
    zeros = sum(int((p == 0).sum()) for p in optimizer.param_groups[0]["params"])
    assert zeros == sum(int((x == 0).sum()) for x in oracle.params[0])
    assert zeros > 0 or not settings.get("held", True)


@pytest.mark.parametrize("spoil", rarely(against.missing, against.steeper))
def test_gradients_that_are_missing_or_steep_agree_with_the_oracle(spoil, monkeypatch):
    assert_agree(*follow(against.CASES["fast"], monkeypatch, spoil=spoil_of(spoil)))


def spoil_of(spoil):
    """The tensors of SHAPES are not those that ``missing`` names."""

    def missing(k, grads):
        for i, j, absent in (0, 1, k % 3 == 0), (0, 2, k % 7 == 1), (1, 0, k < 3):
            if absent:
                grads[i][j] = None

    return missing if spoil is against.missing else spoil


class Rounded(Robust):
    """The oracle with parameters that are rounded after each step."""

    dtype = torch.bfloat16

    def move(self, i, j, g):
        xs = self.groups[i][0]
        super().move(i, j, g)
        xs[j] = torch.from_numpy(xs[j]).to(self.dtype).double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *rarely(torch.float16)])
@pytest.mark.parametrize("case", ["fast", *rarely("no metric")])
def test_low_precision_agrees_with_a_rounded_oracle(case, dtype, monkeypatch):
    """Float32 state; of values beside a tie few are rounded the other way, by one place."""

    def make(problem):
        rounded = [[torch.from_numpy(x).to(dtype).double().numpy() for x in xs] for xs in problem.start]
        oracle = Rounded(list(zip(rounded, problem.settings)), **problem.shared)
        oracle.dtype = dtype
        return oracle

    optimizer, oracle = follow(against.CASES[case], monkeypatch, dtype, steps=12 if ON_GPU else 4, make_oracle=make)
    unlike, place = differences(optimizer, oracle), torch.finfo(dtype).eps * 4
    assert (unlike > 0).mean() < 0.01 and unlike.max() <= 2 * place
    assert float(optimizer.param_groups[0]["gamma"]) == pytest.approx(oracle.gamma, rel=1e-2)
    state = optimizer.state[optimizer.param_groups[1]["params"][1]]
    names = ("momentum_buffer", "square_avg", "displacement")
    assert {state[n].dtype for n in names if n in state} == {torch.float32}
    assert np.abs(state["momentum_buffer"].cpu().numpy() - oracle.v[1][1]).max() < 1e-5 * np.abs(oracle.v[1][1]).max()


def twins(dtype=torch.float32, shapes=SHAPES[1], **settings):
    """The same parameters for two optimizers: the Triton path's and the multi-tensor path's."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    made = []
    for own in ({}, {"foreach": True}):
        params = [nn.Parameter(x.clone()) for x in starts]
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "momentum": 0.8}]
        made.append((params, SP(groups, lr=0.05, **{**settings, **own})))
    return made


def feed(pair, steps=6, bad=(), first=0):
    for k in range(first, first + steps):
        generator = torch.Generator().manual_seed(k)
        grads = [torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype) for p in pair[0][0]]
        if k in bad:
            grads[1].view(-1)[-1] = float("inf")
        for params, optimizer in pair:
            for p, g in zip(params, grads):
                p.grad = g.clone()
            optimizer.step()


def assert_same(pair, tolerance=1e-6):
    (one, first), (two, second) = pair
    assert (first.path, second.path) == ("triton", "multi-tensor")
    for p, q in zip(one, two):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)
        a, b = first.state[p], second.state[q]
        assert a.keys() == b.keys()
        for name in a:
            rough = 1e-4 if name == "secant" else 10 * tolerance
            assert torch.allclose(torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=rough, atol=tolerance), name
    a, b = model_state(first), model_state(second)
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("metric", ["fisher", *rarely("none")])
def test_a_bad_gradient_leaves_all_as_it_is(metric):
    """At the first step too, and twice. After it the step is the one that would have been taken without it."""
    pair, clean = twins(metric=metric), twins(metric=metric)
    before = [p.clone() for p in pair[0][0]]
    feed(pair, 2, bad=(0, 1))
    assert all(torch.equal(p, x) for p, x in zip(pair[0][0], before))
    state = pair[0][1].state[pair[0][0][1]]
    assert not any(state[n].any() for n in ("momentum_buffer", "displacement", "secant"))
    feed(pair, 1, first=2)
    feed(clean, 1, first=2)
    assert torch.allclose(*(s[0][1].state[s[0][0][1]]["momentum_buffer"] for s in (pair, clean)))
    if metric == "fisher":  # the first finite gradient counts in full, whatever came before
        for own, other in zip(pair, clean):
            assert torch.allclose(*(s[1].state[s[0][1]]["square_avg"] for s in (own, other)), rtol=1e-5)
    feed(pair, 3, bad=(4,), first=3)
    assert_same(pair)


@pytest.mark.parametrize("dtype", [torch.float32, *rarely(torch.bfloat16, torch.float16)])
def test_the_paths_agree(dtype):
    """Masks, decay, two groups; low precision: the same rounding but for ties."""
    pair = twins(dtype, sigma=0.4, every=2, total_steps=6, start=0.0)
    feed(pair, 5)
    assert_same(pair) if dtype is torch.float32 else [
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        for p, q in zip(pair[0][0], pair[1][0])
    ]
    assert any("mask" in state for state in pair[0][1].state.values())


@rare
def test_gradients_that_the_caller_has_looked_at():
    pair = twins(check_finite=False)
    feed(pair)
    assert_same(pair)


def test_gradients_at_any_address_and_in_another_order():
    """Views of one buffer, as DistributedDataParallel's; channels_last; a 1 x 1 convolution, two names of one order."""
    shapes = [(6, 5, 3, 3), (7, 5, 1, 1), (3,)]
    (params, optimizer), (others, reference) = twins(shapes=shapes)
    with torch.no_grad():
        for own in (params, others):
            own[0].data = own[0].data.to(memory_format=torch.channels_last)
            own[1].data = own[1].data.to(memory_format=torch.channels_last)
    for k in range(4):
        torch.manual_seed(k)
        buffer = torch.randn(1 + sum(p.numel() for p in params), device=DEVICE)
        parts = buffer[1:].split([p.numel() for p in params])
        for own in (params, others):
            for p, part in zip(own, parts):
                p.grad = part.view(p.shape)
        optimizer.step()
        reference.step()
    assert_same([(params, optimizer), (others, reference)])


def test_rates_that_are_tensors():
    """One launch serves groups with a tensor each; a rate may start at 0."""
    rates = [torch.tensor(0.0, device=DEVICE), torch.tensor(0.02, device=DEVICE)]
    pair = twins()
    for _, optimizer in pair:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
    feed(pair, 2)
    rates[0].fill_(0.1)
    feed(pair, 4, first=2)
    assert_same(pair)
    assert len(pair[0][1]._plan.batches) == 1 and len(pair[1][1]._plan.batches) == 2


@rare
def test_state_is_continued_by_the_other_path():
    pair = twins()
    feed(pair, 3)
    pair[0][1].load_state_dict(pair[1][1].state_dict())
    for group in pair[0][1].param_groups:
        group["foreach"] = None
    for p, q in zip(pair[0][0], pair[1][0]):
        p.data.copy_(q.data)
    feed(pair, 3, first=3)
    assert_same(pair)


def test_a_tensor_without_elements_and_several_kinds_together():
    """Two precisions are two batches under one gamma."""
    made = []
    for own in ({}, {"foreach": True}):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(n).to(DEVICE, d))
            for n, d in ((7, torch.float32), (0, torch.float32), (9, torch.bfloat16))
        ]
        made.append((params, SP(params, lr=0.01, **own)))
    for k in range(5):
        torch.manual_seed(k)
        grads = [torch.randn(7), torch.zeros(0), torch.randn(9)]
        for params, optimizer in made:
            for p, g in zip(params, grads):
                p.grad = g.to(DEVICE, p.dtype)
            optimizer.step()
    assert made[0][1].path == "triton"
    assert model_state(made[0][1]) == pytest.approx(model_state(made[1][1]), rel=1e-4)
    assert torch.allclose(made[0][0][0], made[1][0][0], rtol=1e-6)


def test_what_does_not_change_is_not_sent_again():
    (params, optimizer), _ = twins(capturable=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    live, sent = optimizer._plan.step.live, []
    live.words.copy_, real = (lambda *a, **k: sent.append(1) or real(*a, **k)), live.words.copy_
    optimizer.step()
    optimizer.step()
    assert len(sent) == 1  # gamma moves from the second step on
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert len(sent) == 2


def test_what_the_path_does_not_take_is_the_multi_tensor_path_s():
    def path_of(param, **settings):
        param.grad = torch.ones_like(param)
        optimizer = SP([param], **settings)
        optimizer.step()
        return optimizer.path

    def plain(**how):
        return nn.Parameter(torch.ones(4, 6, device=DEVICE, **how))

    class Own(nn.Parameter):
        pass

    assert path_of(plain()) == path_of(plain(), native=True) == path_of(plain(), capturable=True) == "triton"
    others = [
        path_of(plain(), native=False),
        path_of(plain(), foreach=True),
        path_of(plain(dtype=torch.float64)),
        path_of(nn.Parameter(torch.ones(4, 6, device=DEVICE)[:, ::2])),
        path_of(Own(torch.ones(4, 6, device=DEVICE))),
        path_of(plain(), lr=torch.tensor(0.1, dtype=torch.float64, device=DEVICE)) if ON_GPU else "multi-tensor",
    ]
    assert set(others) == {"multi-tensor"}


def test_a_kernel_that_fails_is_gone_without(monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("no such card")

    monkeypatch.setattr(fused, "_failed", set())
    monkeypatch.setattr(triton_settle, "secants", {(1,): broken})
    pair = twins()
    feed(pair, 2)
    assert [optimizer.path for _, optimizer in pair] == ["multi-tensor"] * 2
    assert all(torch.equal(p, q) for p, q in zip(pair[0][0], pair[1][0]))
    assert fused._failed


if ON_GPU:
    from test_sp_memory import like

    @pytest.fixture
    def yolov7():
        params = [nn.Parameter(p.detach().to(DEVICE)) for p in like("yolov7")]
        for p in params:
            p.grad = torch.empty_like(p).uniform_(-1e-3, 1e-3)
        return params

    def test_launches_per_step(yolov7):
        """Kernels and copies, as the profiler counts them."""
        optimizer = SP(yolov7, lr=1e-4)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        names = [e.name for e in profile.events() if e.device_type == cuda and "Optimizer" not in e.name]
        assert optimizer.path == "triton" and 0 < len(names) <= 12, names

    @pytest.mark.parametrize("capturable", [False, True])
    @pytest.mark.parametrize("sigma", [0.0, 0.5])
    def test_no_host_wait(capturable, sigma, yolov7):
        optimizer = SP(yolov7, lr=1e-4, sigma=sigma, every=2, capturable=capturable)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for k in range(4):
                optimizer.param_groups[0]["lr"] = 1e-4 / (k + 1)
                for p in yolov7:
                    p.grad = torch.empty_like(p).uniform_(-1e-3, 1e-3)
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.path == "triton"

    @pytest.mark.parametrize(
        "settings", [{}, {"metric": "none"}, {"foreach": True}, {"mode": "paper"}, {"check_finite": False}], ids=str
    )
    def test_a_captured_step_replays_as_it_runs(settings):
        """With a rate that changes, static gradients, and eager steps before and after."""
        results = []
        for captured in (False, True):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in [(30, 37), (4500,), (1,)]]
            grads = [torch.empty_like(p) for p in params]
            for p, g in zip(params, grads):
                p.grad = g
            rate = torch.tensor(0.01, device=DEVICE)
            optimizer = SP(params, lr=rate, capturable=True, **settings)
            graph = torch.cuda.CUDAGraph()

            def fill(k):
                torch.manual_seed(k)
                rate.fill_(0.02 / (k + 1))
                for g in grads:
                    g.normal_()

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for k in range(3):
                    fill(k)
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            if captured:
                with torch.cuda.graph(graph):
                    optimizer.step()
            for k in range(3, 12):
                fill(k)
                graph.replay() if captured else optimizer.step()
            results.append(
                [p.detach().clone() for p in params] + [v.clone() for v in optimizer.state[params[1]].values()]
            )
        assert all(torch.equal(a, b) for a, b in zip(*results))

    def test_a_replay_and_a_step_do_not_disturb_each_other():
        """In turn, on gradients of their own."""
        results = []
        for captured in (False, True):
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(3000, device=DEVICE))
            own, other = torch.randn_like(p), torch.randn_like(p)
            optimizer = SP([p], lr=0.01, capturable=True)
            for _ in range(2):
                p.grad = own
                optimizer.step()
            graph = torch.cuda.CUDAGraph()
            if captured:
                with torch.cuda.graph(graph):
                    optimizer.step()
            for k in range(8):
                p.grad = own if k % 2 else other
                graph.replay() if captured and k % 2 else optimizer.step()
            results.append(p.detach().clone())
        assert torch.equal(*results)

    def test_gradients_made_inside_the_graph():
        """Their addresses are those of the graph's memory: the copy of the table is captured with them."""
        results = []
        for captured in (False, True):
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(3000, device=DEVICE))
            x = torch.randn(3000, device=DEVICE)
            optimizer = SP([p], lr=0.01, capturable=True)
            graph = torch.cuda.CUDAGraph()

            def once():
                optimizer.zero_grad(set_to_none=True)
                ((p - x) ** 2).sum().backward()
                optimizer.step()

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    once()
            torch.cuda.current_stream().wait_stream(stream)
            if captured:
                with torch.cuda.graph(graph):
                    once()
            for _ in range(8):
                graph.replay() if captured else once()
            results.append(p.detach().clone())
        assert torch.equal(*results)
