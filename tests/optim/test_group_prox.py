"""Groups of entries: the proximal operator against brute force, SP's step against its formula in NumPy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sp_training import PATHS, batch, model_state, on_every_path
from torch import nn

from sp_yolo.optim import SP, Removal, build_param_groups
from sp_yolo.optim.group_prox import Number, choose


def allowed(n, least, block):
    """Sizes that a family of ``n`` groups may be cut to: all, or a multiple of ``block``, ``least`` at least."""
    return {n} | {k for k in range(least, n) if k % block == 0}


@pytest.mark.parametrize(("least", "block"), [(1, 1), (2, 1), (1, 2), (2, 4), ((3, 1, 2), 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_proximal_operator(seed, least, block):
    """What is kept minimises lambda cost(z) + 0.5 (z - x)'H(z - x) over all supports, z = x on the support."""
    rng = np.random.default_rng(seed)
    sizes, entries = (5, 4, 3), 2  # groups of each family, entries of a group
    x = [rng.normal(size=(n, entries)) for n in sizes]
    h = [np.exp(rng.normal(size=(n, entries))) for n in sizes]
    prices = np.exp(rng.normal(size=len(sizes)))
    scores = [(0.5 * own * value**2).sum(1) for own, value in zip(h, x, strict=True)]
    whole = float(prices @ sizes)
    prices_tensor = torch.tensor(prices)
    for share in (0.1, 0.3, 0.6):
        gone, lam = choose(
            list(map(torch.tensor, scores)),
            prices_tensor,
            lambda kept: float(kept @ prices_tensor),
            (1 - share) * whole,
            least,
            block,
        )
        if lam == -np.inf:
            continue
        kept = [sorted(set(range(n)) - set(index.tolist())) for n, index in zip(sizes, gone, strict=True)]
        leasts = (least,) * len(sizes) if isinstance(least, int) else least
        for n, fewest, own, value, price, support in zip(sizes, leasts, h, x, prices, kept, strict=True):
            best = min(
                (support for size in allowed(n, fewest, block) for support in itertools.combinations(range(n), size)),
                key=lambda support: (
                    lam * price * len(support)
                    + 0.5 * sum((own[i] * value[i] ** 2).sum() for i in range(n) if i not in support)
                    + 1e-12 * len(support)
                ),
            )
            assert tuple(support) == best


def test_the_budget_is_met_with_the_fewest_groups():
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 4.0])]
    prices = torch.tensor([1.0, 10.0])

    def total(kept):
        return float(kept @ prices.double())

    gone, lam = choose(scores, prices, total, 23 - 9.5)  # S / c: 3 1 2 and .05 .4
    assert [index.tolist() for index in gone] == [[], [0]] and lam == pytest.approx(0.05)
    gone, lam = choose(scores, prices, total, 23 - 10.5)  # one of the second family must stay
    assert [index.tolist() for index in gone] == [[1], [0]] and lam == 1.0
    gone, _ = choose(scores, prices, total, 0.0)
    assert [index.tolist() for index in gone] == [[1, 2], [0]]


def test_ties_go_by_index_and_what_is_gone_does_not_count():
    scores = [torch.tensor([1.0, torch.inf, 1.0, 1.0])]
    gone, _ = choose(scores, torch.ones(1), lambda kept: float(kept.sum()), 2.0)
    assert gone[0].tolist() == [0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.last = nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.last(self.two(self.norm(self.one(x)).relu()).relu().flatten(1))

    def families(self):
        return [
            [(self.one.weight, slice(0, 8)), (self.norm.weight, slice(0, 8)), (self.norm.bias, slice(0, 8))],
            [(self.two.weight, slice(1, 5)), (self.two.bias, slice(1, 5))],  # rows 0 and 5 may not go
        ]


def train(net, optimizer, steps, first=0):
    dtype = net.last.weight.dtype
    for k in range(first, first + steps):
        images, labels = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images.to(dtype)), labels).backward()
        optimizer.step()


def started(share=0.5, path=PATHS["single"], dtype=torch.float32, removal=None, **settings):
    net = Net().to(dtype)
    groups = build_param_groups(net, weight_decay=0.01)
    optimizer = SP(groups, lr=0.01, total_steps=20, every=2, **settings, **path)
    optimizer.remove_groups(Removal(net.families(), share, **(removal or {})))
    return net, optimizer


@on_every_path
@pytest.mark.parametrize("metric", ["fisher", "none"])
def test_groups_go_on_the_ramp_and_stay_zero(path, metric):
    net, optimizer = started(path=path, metric=metric)
    train(net, optimizer, 3)
    assert not optimizer.masks()
    train(net, optimizer, 17, first=3)
    gone = [(net.one.weight.flatten(1) == 0).all(1), (net.two.weight.flatten(1) == 0).all(1)]
    assert sum(int(own.sum()) for own in gone) == 6  # half of 8 + 4
    assert torch.equal(gone[0], (net.norm.weight == 0) & (net.norm.bias == 0))
    assert torch.equal(gone[1], net.two.bias == 0) and not gone[1][[0, 5]].any()
    assert 1 <= int(gone[0].sum()) <= 7 and int(gone[1].sum()) <= 3
    masks = optimizer.masks()
    assert torch.equal(masks[net.norm.weight], ~gone[0])
    assert masks[net.one.weight].shape == net.one.weight.shape
    for p in masks:
        assert p[~masks[p]].abs().max() == 0


def test_the_step_is_the_formula():
    """One proximal step, from the state before it, in NumPy: S / c ranked, with c of the groups that are there."""

    class Product:
        """8 x 4 products at first, two families that feed each other, beside a constant."""

        def total(self, kept):
            return float(kept[0] * kept[1] + 2 * kept[0])

        def each(self, kept):
            return torch.stack((kept[1] + 2, kept[0]))

    net, optimizer = started(0.4, dtype=torch.float64, removal={"cost": Product()})
    train(net, optimizer, 8)
    reference = copy.deepcopy(net)
    twin = SP(build_param_groups(reference, weight_decay=0.01), lr=0.01, total_steps=20, every=2, **PATHS["single"])
    twin.load_state_dict(optimizer.state_dict())  # without groups to remove
    train(net, optimizer, 1, first=8)
    train(reference, twin, 1, first=8)
    p = (8 / 20 - 0.1) / (0.65 - 0.1)
    share, kept = 0.4 * (1 - (1 - p) ** 3), [[], []]
    scores = []
    for index, family in enumerate(reference.families()):
        total = 0.0
        for tensor, rows in family:
            h = twin.state[tensor]["square_avg"][rows].numpy()
            x = tensor.detach()[rows].numpy()
            total = total + 0.5 * (h * x**2).reshape(len(x), -1).sum(1)
        mask = twin.state[family[0][0]].get("mask")
        there = np.ones(len(total), bool) if mask is None else mask[family[0][1]].flatten(1).any(1).numpy()
        kept[index] = there
        scores.append(total)
    counts = [int(own.sum()) for own in kept]
    prices = [counts[1] + 2, counts[0]]
    order = sorted(
        (score / prices[index], index, place)
        for index, own in enumerate(scores)
        for place, score in enumerate(own)
        if kept[index][place]
    )
    for _, index, place in order:
        if counts[0] * counts[1] + 2 * counts[0] <= (1 - share) * (8 * 4 + 2 * 8):
            break
        if counts[index] > 1:
            kept[index][place] = False
            counts[index] -= 1
    assert sum(counts) < 12
    for own, family in zip(kept, net.families(), strict=True):
        for tensor, rows in family:
            now = tensor.detach()[rows].flatten(1).any(1) if tensor.ndim > 1 else tensor.detach()[rows] != 0
            assert now.tolist() == own.tolist()
            assert optimizer.state[tensor]["momentum_buffer"][rows][~torch.tensor(own)].abs().sum() == 0


def test_paths_remove_the_same_groups():
    outcomes = []
    for path in PATHS.values():
        net, optimizer = started(path=path)
        train(net, optimizer, 20)
        outcomes.append([(family[0][0].flatten(1) != 0).any(1).tolist() for family in net.families()])
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("split", [2, 7, 16])
def test_resume_goes_on_as_if_nothing_had_been(split):
    net, optimizer = started()
    train(net, optimizer, split)
    other, second = started()
    other.load_state_dict(net.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((net, optimizer), (other, second)):
        train(model, own, 20 - split, first=split)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert model_state(optimizer) == model_state(second)


def test_a_copy_of_the_optimizer_removes_its_own_groups():
    net, optimizer = started()
    twin, second = copy.deepcopy((net, optimizer))
    train(net, optimizer, 20)
    train(twin, second, 20)
    assert torch.equal(net.norm.weight, twin.norm.weight) and (twin.norm.weight == 0).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "paper"}, "mode 'robust'"),
        ({"sigma": 0.5}, "cannot both go"),
        ({"total_steps": None}, "give total_steps"),
        ({"held": False}, "held=True"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(change, words):
    net = Net()
    settings = {"total_steps": 20, **change}
    optimizer = SP(net.parameters(), **settings)
    with pytest.raises(ValueError, match=words):
        optimizer.remove_groups(Removal(net.families(), 0.5))


def test_wrong_groups_are_refused():
    net = Net()
    optimizer = SP(net.parameters(), total_steps=20)
    for removal, words in (
        (Removal(net.families(), 1.0), "must be in"),
        (Removal(net.families(), 0.9, least=2), "0.667 at most"),
        (Removal([[(net.one.weight, slice(0, 8)), (net.norm.weight, slice(0, 4))]], 0.5), "equally many rows"),
        (Removal([[(torch.zeros(4, 2), slice(0, 4))]], 0.5), "no parameter"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.remove_groups(removal)
    assert Number().total(torch.tensor([3.0, 2.0])) == 5
