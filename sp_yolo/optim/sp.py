"""SP, the spectral proximal optimizer, with the anatomy of a torch.optim optimizer. Mathematics: docs/the-method.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sp_yolo.optim import native
from sp_yolo.optim.damping import average_pair, damped_gamma, derived_cap, rayleigh_quotient
from sp_yolo.optim.multi_tensor import MultiTensor
from sp_yolo.optim.paper import paper_update
from sp_yolo.optim.prune import forget_displacement, prune_group
from sp_yolo.optim.saliency import last_prox, prox_due, prune_count, sigma_at
from sp_yolo.optim.settings import check_settings, keeps_squares, prunable_flags, prunable_params, reference_lr
from sp_yolo.optim.update import CARRIED, Batch, SingleTensor, like_parameter

# Settings of the whole model: gamma and its averages are one for all groups, so these may not differ between groups.
SHARED = ("mode", "rho", "growth", "gamma_start")
# The key of the optimizer's own entry in ``state``, beside the parameters.
MODEL = "model"


class SP(Optimizer):
    """Spectral proximal gradient descent.

    ``mode="robust"`` (default): Nesterov momentum whose step is damped by gamma, eq. (14), so that lr times the
    curvature along the trajectory stays at the level that gradient noise alone produces; and, with ``sigma > 0``, an
    l0 proximal step in the metric of the saliency with held masks, eqs. (5), (17), (18). ``mode="paper"``: the
    published update, eqs. (1)-(6): no gamma, no schedule, no held zeros; every tensor is pruned at every step.

    Args:
        params: tensors, named tensors or groups. A group may carry ``name``, ``param_names`` and ``prunable`` (one bool
            per tensor; default: tensors of two or more dimensions).
        lr: step size; in robust mode the largest one, .1 to .3 being best. A float or a one-element tensor.
        momentum, nesterov: as torch.optim.SGD. Paper mode without nesterov has no momentum.
        weight_decay: L2 added to the gradient, or, ``decoupled``, x *= 1 - lr * weight_decay.
        damping: "none", or a metric of the step: "diagonal" (eq. 15), bounded by ``damping_bounds``, or "fisher" (eq.
            19), the root of a running average of g^2, whose ``lr`` is like AdamW's. Robust mode only.
        sigma: share of the group's prunable weights that end as zeros, ranked together; 0 switches pruning off.
        saliency: the matrix that weighs x^2: "fisher", a running average of g^2, or "damping", the diagonal (magnitude
            where there is none).
        every, start, end, total_steps: the proximal step is taken every ``every`` steps between ``start`` and ``end``,
            shares of the run of ``total_steps``, on a cubic ramp; with ``start == end`` or no ``total_steps``, sigma is
            constant.
        held: zeros stay zero until the next proximal step ranks anew. Without it they grow back.
        rho, rcap, growth, gamma_start: averaging of the secant pair; cap on lr * curvature (0: derived from the group's
            current momentum, eq. 13; the smallest of the groups that move holds); growth per step; first gamma.
        maximize: ascend.
        foreach: the multi-tensor path. Default: on accelerators. On a CPU the single-tensor path is faster.
        capturable: keep every scalar on the device, as CUDA graphs need. Pruning cannot be captured.
        compile: on a CPU, run the float32 update (not the diagonal's) as C, compiled when the first step needs it, if
            there is a compiler. ``path`` says what the last step ran: "native", "single-tensor", "multi-tensor".

    Raises:
        ValueError: a setting outside its bounds, complex parameters, ``differentiable=True``.
        RuntimeError (from ``step``): sparse gradients; pruning inside a CUDA graph.
    """

    path = "none"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        decoupled: bool = False,
        mode: str = "robust",
        damping: str = "none",
        damping_bounds: tuple[float, float] = (0.1, 10.0),
        sigma: float = 0.0,
        saliency: str = "fisher",
        every: int = 10,
        start: float = 0.1,
        end: float = 0.65,
        total_steps: int | None = None,
        held: bool = True,
        rho: float = 0.9,
        rcap: float = 0.0,
        growth: float = 1.5,
        gamma_start: float = 0.01,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        compile: bool = False,
    ) -> None:
        settings = dict(locals())
        for name in ("self", "params", "__class__"):
            settings.pop(name, None)
        super().__init__(params, settings)

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

    @property
    def _model(self) -> dict[str, Any]:
        """State of the whole model: step, gamma, ess, esy. ``state_dict`` carries it beside the parameters' states."""
        return self.state[MODEL]  # type: ignore[index]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts state to the parameter's dtype; SP's keeps its own: float32 for bf16 parameters."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)
        if MODEL in state_dict["state"]:
            copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in self._model.items()}
            self.state[MODEL] = copied  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss. A non-finite gradient anywhere leaves everything untouched."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        on_device = self._on_device()
        groups = [(group, batch) for group in self.param_groups for batch in self._batches(group, on_device)]
        if groups:
            self._step(groups, on_device)
        return loss

    def _step(self, groups: list[tuple[dict[str, Any], Batch]], on_device: bool) -> None:
        model = self._model_state(groups[0][1].params[0].device if on_device else torch.device("cpu"))
        if on_device:
            self._refuse_capture(model["step"])
        paths = [self._path_of(batch, on_device) for _, batch in groups]
        self.path = ", ".join(dict.fromkeys(path.name for path in paths))
        products = [path.products() for path in paths]
        finite = self._all_finite(products, on_device)
        if not on_device and not finite:
            return
        if self.param_groups[0]["mode"] == "paper":
            for group, batch in groups:
                paper_update(batch, group["sigma"], prunable_params(group), finite.to(batch.params[0].device))
        else:
            r_gamma = self._damp(groups, products, finite)
            for path in reversed(paths):
                path.update(r_gamma, model["gamma"], finite)
            self._prune(model["step"])
        model["step"] += 1

    def _path_of(self, batch: Batch, on_device: bool) -> MultiTensor | SingleTensor | native.Native:
        if on_device:
            return MultiTensor(batch)
        wanted = self.param_groups[0]["compile"] and self.param_groups[0]["mode"] == "robust"
        kernels = native.library() if wanted and native.supports(batch) else None
        return native.Native(batch, kernels) if kernels else SingleTensor(batch)

    @staticmethod
    def _all_finite(products: list[list[Any]], on_device: bool) -> Tensor:
        """0-dim bool on the device of the first product. <s, g> is finite only if all of g is, even where s is 0."""
        if not on_device:
            return torch.tensor(math.isfinite(sum(map(sum, products))))
        sums = [torch.stack(row).sum() for row in products]
        return torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all()

    def _damp(self, groups: list[tuple[dict[str, Any], Batch]], products: list[Any], finite: Tensor) -> Tensor:
        """Update the whole model's Ess, Esy and gamma, eqs. (9)-(14); returns r * gamma."""
        model = self._model
        lr_ref = reference_lr([batch.lr for _, batch in groups])
        ss = sy = torch.zeros_like(model["gamma"])
        caps = []
        for (group, batch), product in zip(groups, products, strict=True):
            if not isinstance(batch.lr, Tensor) and batch.lr == 0:
                continue  # it does not move, so it says nothing about curvature
            caps.append(group["rcap"] or derived_cap(group["momentum"], group["nesterov"]))
            weighted, change = (
                torch.as_tensor(t, dtype=ss.dtype, device=ss.device) for t in batch.secant_sums(product)
            )
            if isinstance(batch.lr, Tensor):
                moves = batch.lr > 0
                ss = ss + torch.where(moves, lr_ref / batch.lr, 0.0) * weighted
                sy = sy + torch.where(moves, change, 0.0)
            else:
                ss, sy = ss + lr_ref / batch.lr * weighted, sy + change
        ess, esy, accepted = average_pair(model["ess"], model["esy"], ss, sy, self.param_groups[0]["rho"])
        r = rayleigh_quotient(ess, esy, lr_ref)
        gamma = model["gamma"]
        if caps:
            gamma = damped_gamma(gamma, r, min(caps), self.param_groups[0]["growth"], accepted)
        for name, value in (("ess", ess), ("esy", esy), ("gamma", gamma)):
            model[name].copy_(torch.where(finite, value, model[name]))
        return r * model["gamma"]

    def _prune(self, step: int) -> None:
        """The proximal step of every group for which it is due."""
        pruned = False
        for group in self.param_groups:
            schedule = (group["start"], group["end"], group["total_steps"])
            params = [p for p in prunable_params(group) if p in self.state] if group["sigma"] else []
            if not params or not prox_due(step, group["every"], *schedule):
                continue
            count = prune_count(sigma_at(step, group["sigma"], *schedule), sum(p.numel() for p in params))
            if count:
                lr_ref = reference_lr([g["lr"] for g in self.param_groups])
                r_gamma = rayleigh_quotient(self._model["ess"], self._model["esy"], lr_ref) * self._model["gamma"]
                prune_group(group, params, self.state, count, r_gamma, group["compile"] and not self._on_device())
                pruned = True
        if pruned:
            forget_displacement(state for param, state in self.state.items() if isinstance(param, Tensor))

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks of the parameters that have held zeros (False: held at zero), in the parameter's shape.

        An average of the weights (EMA) keeps what they were before: multiply it by these.
        """
        return {param: state["mask"] for param, state in self.state.items() if "mask" in state}

    def sparsity(self) -> dict[str, float]:
        """Share of exact zeros among the prunable weights of each group, by group name; 0 where nothing is prunable."""
        shares = {}
        for index, group in enumerate(self.param_groups):
            params = prunable_params(group)
            total = sum(p.numel() for p in params)
            zeros = sum(p.numel() - int(torch.count_nonzero(p)) for p in params)
            shares[group.get("name", f"group{index}")] = zeros / total if total else 0.0
        return shares

    def _model_state(self, device: torch.device) -> dict[str, Any]:
        model = self._model
        if not model:
            model["step"] = 0
            start = self.param_groups[0]["gamma_start"]
            for name, value in (("gamma", start), ("ess", 0.0), ("esy", 0.0)):
                model[name] = torch.full((), value, dtype=torch.float64, device=device)
        for name in ("gamma", "ess", "esy"):
            model[name] = model[name].to(device)
        return model

    def _on_device(self) -> bool:
        """Whether the multi-tensor path runs, whose scalars stay on the device."""
        group = self.param_groups[0]
        if group["capturable"] or group["foreach"] is not None:
            return bool(group["capturable"] or group["foreach"])
        return any(p.device.type != "cpu" for group in self.param_groups for p in group["params"])

    def _refuse_capture(self, step: int) -> None:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        for group in self.param_groups:
            length = group["total_steps"]
            if group["sigma"] and (length is None or step <= last_prox(group["end"], length)):
                raise RuntimeError("the proximal step cannot be captured in a CUDA graph: capture it with sigma=0")

    def _batches(self, group: dict[str, Any], on_device: bool) -> list[Batch]:
        """The group's tensors that have a gradient, by device and dtype, with their state."""
        rows: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        tensor_scalars = on_device or group["mode"] == "paper"
        for param, prunable in zip(group["params"], prunable_flags(group), strict=True):
            grad = param.grad
            if grad is None or not param.requires_grad:
                continue
            if grad.is_sparse:
                raise RuntimeError("SP does not support sparse gradients")
            state = self._param_state(param, group, keeps_squares(group, prunable), tensor_scalars)
            rows.setdefault((param.device, param.dtype), []).append((param, grad, state))
        return [self._batch(group, row, on_device) for row in rows.values()]

    def _batch(self, group: dict[str, Any], row: list[tuple[Tensor, Tensor, dict[str, Any]]], on_device: bool) -> Batch:
        lr = group["lr"]
        params, grads, states = map(list, zip(*row, strict=True))
        return Batch(
            params=params,
            grads=grads,
            states=states,
            lr=lr if isinstance(lr, Tensor) and on_device else float(lr),
            momentum=float(group["momentum"]),
            nesterov=group["nesterov"],
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled"],
            maximize=group["maximize"],
            damping=group["damping"],
            damping_bounds=group["damping_bounds"],
        )

    def _param_state(self, param: Tensor, group: dict[str, Any], squares: bool, tensor_scalars: bool) -> dict[str, Any]:
        """The tensor's state, in its memory format, on its device, with scalars of the path's kind."""
        state = self.state[param]
        if not state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
            state["displacement"] = torch.zeros_like(param, dtype=dtype)
            state.update(dict.fromkeys(CARRIED, 0.0))
        momentum = state["momentum_buffer"]
        if squares and "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(momentum)
        if group["damping"] == "fisher":
            state.setdefault("square_weight", 0.0)
        for name in (*CARRIED, "square_weight"):
            if name in state and isinstance(state[name], Tensor) != tensor_scalars:
                value = state[name]
                state[name] = (
                    torch.full((), value, dtype=torch.float64, device=param.device) if tensor_scalars else value.item()
                )
        if momentum.stride() != param.stride() or momentum.device != param.device:
            # The model was moved or its memory format changed since the last step.
            for name in ("momentum_buffer", "displacement", "mask", "square_avg"):
                if name in state:
                    state[name] = like_parameter(state[name].to(param.device), param)
        if not group["held"] and "mask" in state:
            # What gathered behind the mask must not move the weights that are now set free.
            state["momentum_buffer"].mul_(state.pop("mask"))
        return state
