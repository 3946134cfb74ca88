"""SP, the spectral proximal optimizer, with the anatomy of a torch.optim optimizer. Mathematics: docs/the-method.md."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sp_yolo.optim.damping import wide_dtype
from sp_yolo.optim.group_prox import Removal, remove
from sp_yolo.optim.paper import paper_update
from sp_yolo.optim.plan import SPARSE, Plan, all_of, current_plan, on_device
from sp_yolo.optim.prune import forget_displacement, prune_group
from sp_yolo.optim.saliency import last_prox, prox_due, prune_count, sigma_at
from sp_yolo.optim.settings import check_settings, prunable_params, refuse_former, warn_of_lasting_choice

# Settings of the whole model: gamma and its averages are one for all groups, so these may not differ between groups.
SHARED = ("mode", "rho", "growth", "check_finite", "native")
# State in float64 where the device has that.
WIDE = ("secant", "step", "displacement_gradient")


class SP(Optimizer):
    """Spectral proximal gradient descent.

    ``mode="robust"`` (default): Nesterov momentum in the metric of the saliency matrix, E[g^2], eq. (19). Its step is
    damped by gamma, eq. (14), one number for the model: lr times the curvature along the path stays below the stability
    limit, and a step beyond a hundredth of the weights must show that it still descends. So ``lr`` is the largest step;
    above the useful ones it hardly matters. With ``sigma > 0``, an l0 proximal step in the metric of the saliency with
    held masks, eqs. (5), (17), (18). ``mode="paper"``: the published update, eqs. (1)-(6): no gamma, no schedule, no
    held zeros; every tensor is pruned at every step.

    Args:
        params: tensors, named tensors or groups. A group may carry ``name``, ``param_names`` and ``prunable`` (one bool
            per tensor; default: tensors of two or more dimensions).
        lr: the largest step size, as AdamW's. A float or a one-element tensor.
        momentum, nesterov: as torch.optim.SGD. Paper mode without nesterov has no momentum.
        weight_decay: x *= 1 - lr * gamma * weight_decay; or, not ``decoupled``, L2 added to the gradient.
        metric: of the step: "fisher", the root of a running mean of g^2 (eq. 19), or "none". Robust mode only.
        sigma: share of the group's prunable weights that end as zeros, ranked together; 0 switches pruning off.
        saliency: the matrix that weighs x^2: "fisher", a running mean of g^2, or "metric", the metric of the step
            (magnitude where there is none).
        every, start, end, total_steps: the proximal step is taken every ``every`` steps between ``start`` and ``end``,
            shares of the run of ``total_steps``, on a cubic ramp; with ``start == end`` it is a jump. Without
            ``total_steps`` there is no ramp either: sigma holds from the first step on, so that zeros, as they are
            held, are chosen once for all by the gradients of one batch. A UserWarning says so.
        held: zeros stay zero until the next proximal step ranks anew. Without it they grow back.
        rho, rcap, growth: averaging of the secant pair; cap on lr * curvature (0: derived from the group's current
            momentum, eq. 13; the smallest of the groups that move holds); growth of gamma per step.
        maximize: ascend.
        foreach: the multi-tensor path. Default: on accelerators, where the next does not apply. On a CPU the others are
            faster.
        capturable: keep every scalar on the device, as CUDA graphs need. Pruning cannot be captured.
        native: compile the update when a step first needs it: on a CPU as C, of float32; on an NVIDIA GPU with Triton,
            of float32, bfloat16 and float16. Default: where that works. ``path`` says what the last step ran:
            "native", "triton", "single-tensor", "multi-tensor".
        check_finite: look whether all gradients are finite, and leave everything untouched where they are not. False
            saves a pass over the gradients where the caller has looked (as GradScaler has).

    Raises:
        ValueError: a setting outside its bounds, complex parameters, ``differentiable=True``.
        TypeError: a setting of an earlier version or of another optimizer; names what SP has instead.
        RuntimeError (from ``step``): sparse gradients; pruning inside a CUDA graph.
    """

    path = "none"
    _removal: Removal | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.005,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        decoupled: bool = True,
        mode: str = "robust",
        metric: str = "fisher",
        sigma: float = 0.0,
        saliency: str = "fisher",
        every: int = 10,
        start: float = 0.1,
        end: float = 0.65,
        total_steps: int | None = None,
        held: bool = True,
        rho: float = 0.9,
        rcap: float = 0.0,
        growth: float = 1.1,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        native: bool | None = None,
        check_finite: bool = True,
        **former: Any,
    ) -> None:
        settings = dict(locals())
        for name in ("self", "params", "former", "__class__"):
            settings.pop(name, None)
        refuse_former(former)
        self._plan: Plan | None = None
        self._captured: list[Plan] = []
        super().__init__(params, settings)
        warn_of_lasting_choice(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; every setting of the group is checked, with the bad value and its bound in the message."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_settings(group)
        for name in SHARED:
            if group[name] != self.param_groups[0][name]:
                first = self.param_groups[0][name]
                raise ValueError(f"{name} must be the same in every group: {group[name]} != {first}")
        for param in group["params"]:
            if torch.is_complex(param):
                raise ValueError("SP does not support complex parameters")
            if not torch.is_floating_point(param):
                raise ValueError(f"SP needs floating-point parameters, not {param.dtype}")
        flags = group.get("prunable")
        if flags is not None and len(flags) != len(group["params"]):
            raise ValueError(f"prunable has {len(flags)} flags for {len(group['params'])} parameters")

    def remove_groups(self, removal: Removal) -> None:
        """Remove groups of entries from now on, on the ramp of the first parameter group (its every, start, end and
        total_steps), and hold them. To go on with a run, say it before ``load_state_dict``; what is gone is in there.

        Raises:
            ValueError: what :meth:`Removal.check` says.
        """
        removal.check(self.param_groups)
        self._removal, self._plan = removal, None
        for group in self.param_groups:
            group["removal"] = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_removal": self._removal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._captured = None, []
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts state to the parameter's dtype; SP's keeps its own: float32 for bf16 parameters.

        Raises:
            ValueError: the state of a version before 0.2, whose numbers mean something else.
        """
        if "model" in state_dict["state"] or any("gamma_start" in group for group in state_dict["param_groups"]):
            raise ValueError("this state is of SP before version 0.2 and cannot be continued: load the weights alone")
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = wide_dtype(param.device) if name in WIDE else value.dtype
                    self.state[param][name] = value.detach().to(param.device, dtype, copy=True)
        model = self.param_groups[0]
        model.update({n: model[n].clone() for n in ("gamma", "averages") if n in model})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss. A non-finite gradient anywhere leaves everything untouched."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    # A compiled training step runs this as it is: there is nothing to fuse, and traced addresses and plans go stale.
    @torch._disable_dynamo
    def _advance(self) -> None:
        if self.param_groups[0]["mode"] == "paper":
            self._paper_step()
            return
        plan = self._plan = current_plan(self._plan, self.param_groups, self.state)
        if plan.batches:
            self._step(plan)

    def _step(self, plan: Plan) -> None:
        model = self._model(torch.device("cpu") if plan.levels is None else plan.levels.device)
        if plan.levels is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._refuse_capture(model["k"])
            self._captured.append(plan)  # the graph replays on its memory
        self.path = plan.name
        finite = plan.take(model["check_finite"])
        if finite is False:
            return
        self._damp(plan, plan.products(finite), finite)
        plan.update(model, finite)
        if model["open"]:  # a step of lr 0, as torch takes one to make state before it loads some, ranks nothing
            self._prune(model["k"])
        model["k"] += 1

    def _damp(self, plan: Plan, products: list[Tensor], finite: Tensor | None) -> None:
        """Bring gamma up to date."""
        plan.damp(self.param_groups[0], products, finite)

    def _ranked(self) -> list[dict[str, Any]]:
        """Groups of tensors as they are ranked: those of the optimizer, unless a subclass has its own."""
        return self.param_groups

    def _prune(self, step: int) -> None:
        """The proximal step of every group for which it is due."""
        pruned = False
        for group in self._ranked():
            schedule = (group["start"], group["end"], group["total_steps"])
            params = [p for p in prunable_params(group) if p in self.state] if group["sigma"] else []
            if not params or not prox_due(step, group["every"], *schedule):
                continue
            count = prune_count(sigma_at(step, group["sigma"], *schedule), sum(p.numel() for p in params))
            if count:
                compiled = group["native"] is not False and not on_device(self.param_groups)
                if prune_group(group, params, self.state, count, compiled):
                    self._plan = None  # it knows no mask of these tensors
                pruned = True
        if self._remove(step):
            self._plan, pruned = None, True
        if pruned:
            forget_displacement(self.state.values())

    def _remove(self, step: int) -> bool:
        """The proximal step of the groups of entries, where it is due; whether any went."""
        first = self.param_groups[0]
        schedule = (first["start"], first["end"], first["total_steps"])
        if self._removal is None or not prox_due(step, first["every"], *schedule):
            return False
        owners = {id(param): group for group in self.param_groups for param in group["params"]}
        return remove(self._removal, sigma_at(step, self._removal.share, *schedule), owners, self.state)

    def _paper_step(self) -> None:
        waits = not on_device(self.param_groups)
        self.path = "single-tensor" if waits else "multi-tensor"
        rows = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        checks = [torch.isfinite(p.grad).all() for _, p in rows]
        finite = all_of(checks)
        if finite is None or (waits and not finite):
            return
        for group, param in rows:
            if param.grad.is_sparse:
                raise RuntimeError(SPARSE)
            paper_update(group, param, self.state[param], finite.to(param.device))
        self._model(finite.device)["k"] += 1

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks of the parameters that have held zeros (False: held at zero), in the parameter's shape.

        An average of the weights (EMA) keeps what they were before: multiply it by these.
        """
        return {param: state["mask"] for param, state in self.state.items() if "mask" in state}

    def sparsity(self) -> dict[str, float]:
        """Share of exact zeros among the prunable weights of each group, by group name; 0 where nothing is prunable."""
        shares = {}
        for index, group in enumerate(self._ranked()):
            params = prunable_params(group)
            total = sum(p.numel() for p in params)
            zeros = sum(p.numel() - int(torch.count_nonzero(p)) for p in params)
            shares[group.get("name", f"group{index}")] = zeros / total if total else 0.0
        return shares

    def _model(self, device: torch.device) -> dict[str, Any]:
        """The first group, with the state of the whole model: k, the steps so far; open, whether gamma is set; gamma;
        averages, [3] = (Ess, Esy, Esg). It lives there as torch's own wrappers expect only parameters in ``state``."""
        model = self.param_groups[0]
        options: dict[str, Any] = {"dtype": wide_dtype(device), "device": device}
        if "k" not in model:
            model.update(k=0, open=False, gamma=torch.zeros((), **options), averages=torch.zeros(3, **options))
        for name in ("gamma", "averages"):
            model[name] = model[name].to(**options)
        return model

    def _refuse_capture(self, step: int) -> None:
        for group in self.param_groups:
            length = group["total_steps"]
            prunes = group["sigma"] or self._removal is not None
            if prunes and (length is None or step <= last_prox(group["end"], length)):
                raise RuntimeError("the proximal step cannot be captured in a CUDA graph: capture it with sigma=0")


# Every setting's default: what recipes, plug-ins and studies start from.
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(SP).parameters.items()
    if parameter.default is not parameter.empty
}
