"""How one step goes: which tensors are stepped together, on which path, with which state."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim import fused, native
from sp_yolo.optim.batch import Batch, like_parameter, run_length
from sp_yolo.optim.damping import gamma_levels, wide_dtype
from sp_yolo.optim.gamma import damp
from sp_yolo.optim.multi_tensor import MultiTensor
from sp_yolo.optim.settings import keeps_squares, prunable_flags
from sp_yolo.optim.update import SingleTensor

# What tensors must share to be stepped together.
KIND = ("metric", "nesterov", "decoupled", "maximize")
SPARSE = "SP does not support sparse gradients"
Path = SingleTensor | MultiTensor | native.Native


class Plan:
    """How one step goes: which tensors together, on which path. Kept until a step differs from the last.

    ``levels``: ``gamma_levels`` where the scalars stay on the device; None where they are the host's numbers.
    """

    def __init__(self, signature: Any, batches: list[Batch], paths: list[Path], levels: Tensor | None) -> None:
        self.signature, self.batches, self.paths, self.levels = signature, batches, paths, levels
        self.name = ", ".join(dict.fromkeys(path.name for path in paths))
        self.params = [p for batch in batches for p in batch.params]
        self.states = [state for batch in batches for state in batch.states]

    def is_of(self, params: list[Tensor], state: Any) -> bool:
        """Whether the tensors are these, with the state that the plan was made of."""
        return len(params) == len(self.params) and all(map(operator.is_, map(state.get, self.params), self.states))

    def take(self, check: bool) -> Any:
        """Take this step's gradients. Whether all are finite: a bool on the host; on the device a 0-dim tensor, or None
        when not to ``check``."""
        flags = [path.take(check) for path in self.paths]
        return all(flags) if self.levels is None else all_of([flag for flag in flags if isinstance(flag, Tensor)])

    def products(self, finite: Any) -> list[Tensor]:
        return [path.products(finite) if isinstance(path, MultiTensor) else path.products() for path in self.paths]

    def damp(self, model: dict[str, Any], products: list[Tensor], finite: Any) -> None:
        """Bring gamma up to date."""
        damp(model, self.batches, products, self.levels, finite)

    def update(self, model: dict[str, Any], finite: Any) -> None:
        """Backwards: the gradients that ``take`` read last are still in cache."""
        gamma = model["gamma"]
        for path in reversed(self.paths):
            path.update(gamma, finite) if isinstance(path, MultiTensor) else path.update(gamma.item())
            path.batch.advance(finite if isinstance(path, MultiTensor) else None)


class FusedPlan(Plan):
    """All tensors together on the Triton path, where one launch serves them all and gamma is a kernel's work too."""

    def __init__(self, signature: Any, step: fused.Fused, levels: Tensor) -> None:
        super().__init__(signature, step.batches, [], levels)
        self.step, self.name = step, step.name

    def take(self, check: bool) -> None:
        self.step.take(check)

    def products(self, finite: Any) -> list[Tensor]:
        return []

    def damp(self, model: dict[str, Any], products: list[Tensor], finite: Any) -> None:
        self.step.damp(model)

    def update(self, model: dict[str, Any], finite: Any) -> None:
        self.step.update(model)
        self.step.advance()


def on_device(groups: list[dict[str, Any]]) -> bool:
    """Whether the multi-tensor path runs, whose scalars stay on the device."""
    first = groups[0]
    if first["capturable"] or first["foreach"] is not None:
        return bool(first["capturable"] or first["foreach"])
    return any(p.device.type != "cpu" for group in groups for p in group["params"])


def all_of(flags: list[Tensor]) -> Tensor | None:
    """0-dim bool on the device of the first flag; None without flags."""
    if len(flags) < 2:
        return flags[0] if flags else None
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def current_plan(plan: Plan | None, groups: list[dict[str, Any]], states: Mapping[Any, Any]) -> Plan:
    """``plan`` where the same tensors have a gradient and nothing was moved, else a new one; with the gradients.

    Raises:
        RuntimeError: a sparse gradient.
    """
    present = [p for group in groups for p in group["params"] if p.grad is not None and p.requires_grad]
    kinds = [
        (*(group[name] for name in (*KIND, "held", "saliency")), bool(group["sigma"]), _kind(group["lr"]))
        for group in groups
    ]
    once = [groups[0][name] for name in ("native", "foreach", "capturable", "rho", "growth")]
    signature = (kinds, [p.data_ptr() for p in present], once)
    if plan is None or plan.signature != signature or not plan.is_of(present, states):
        plan = _make_plan(signature, groups, states)
    for batch in plan.batches:
        batch.grads = [p.grad for p in batch.params]  # type: ignore[misc]
        if any(grad.is_sparse for grad in batch.grads):
            raise RuntimeError(SPARSE)
    return plan


def _make_plan(signature: Any, groups: list[dict[str, Any]], states: Mapping[Any, Any]) -> Plan:
    waits = not on_device(groups)
    if not waits and fused.supports(groups):
        batches = _make_batches(groups, states, True)
        step = fused.fused_step(batches) if batches else None
        if step is not None:
            return FusedPlan(signature, step, _levels(groups, batches))
    batches = _make_batches(groups, states, False)
    if not batches or waits:
        return Plan(signature, batches, [_path_on_host(batch, groups[0]["native"]) for batch in batches], None)
    return Plan(signature, batches, [MultiTensor(batch) for batch in batches], _levels(groups, batches))


def _kind(lr: Any) -> Any:
    """What a plan depends on of a rate."""
    return (lr.device, lr.dtype) if isinstance(lr, Tensor) else None


def _levels(groups: list[dict[str, Any]], batches: list[Batch]) -> Tensor:
    return gamma_levels(groups[0]["rho"], groups[0]["growth"], batches[0].params[0].device)


def _make_batches(groups: list[dict[str, Any]], states: Mapping[Any, Any], mixed_lr: bool) -> list[Batch]:
    """``mixed_lr``: groups whose lr is a tensor may share a batch."""
    capturable = groups[0]["capturable"]
    rows: dict[tuple[Any, ...], list[tuple[Tensor, dict[str, Any], dict[str, Any]]]] = {}
    for group in groups:
        kind: tuple[Any, ...] = tuple(group[name] for name in KIND)
        if isinstance(group["lr"], Tensor) and not mixed_lr:
            kind += (id(group),)
        for param, prunable in zip(group["params"], prunable_flags(group), strict=True):
            if param.grad is None or not param.requires_grad:
                continue
            state = _param_state(states[param], param, group, keeps_squares(group, prunable), capturable)
            rows.setdefault((param.device, param.dtype, int(state["step"]), *kind), []).append((param, group, state))
    batches = []
    for row in rows.values():
        params, owners, own = (list(column) for column in zip(*row, strict=True))
        batches.append(Batch(params, owners, own, fixed_run=capturable))
    return batches


def _path_on_host(batch: Batch, wish: bool | None) -> Path:
    kernels = native.library() if wish is not False and native.supports(batch) else None
    return native.Native(batch, kernels) if kernels else SingleTensor(batch)


def _param_state(
    state: dict[str, Any], param: Tensor, group: dict[str, Any], squares: bool, capturable: bool
) -> dict[str, Any]:
    """The tensor's state, made where there is none, in its memory format and on its device."""
    if not state:
        dtype = torch.promote_types(param.dtype, torch.float32)
        state["step"] = 0
        state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        state["displacement"] = torch.zeros(run_length(param.numel()), dtype=dtype, device=param.device)
        state["secant"] = torch.zeros(5, dtype=wide_dtype(param.device), device=param.device)
    momentum = state["momentum_buffer"]
    if squares and "square_avg" not in state:
        state["square_avg"] = torch.zeros_like(momentum)
    if capturable != isinstance(state["step"], Tensor):
        step: Any = int(state["step"])
        state["step"] = torch.tensor(step, dtype=wide_dtype(param.device), device=param.device) if capturable else step
        _void(state)  # the run of a captured step lies elsewhere
    if momentum.stride() != torch.empty_like(param).stride() or momentum.device != param.device:
        # The model was moved or its memory format changed since the last step. The run is another one then.
        for name in ("momentum_buffer", "mask", "square_avg"):
            if name in state:
                state[name] = like_parameter(state[name].to(param.device), param)
        if capturable:
            state["step"] = state["step"].to(param.device, wide_dtype(param.device))
        _void(state, param.device)
    if not group["held"] and "mask" in state:
        # What gathered behind the mask must not move the weights that are now set free.
        state["momentum_buffer"].mul_(state.pop("mask"))
    return state


def _void(state: dict[str, Any], device: torch.device | None = None) -> None:
    """No pair: the displacement counts as none until the tensor steps again."""
    for name in ("displacement", "secant"):
        dtype = wide_dtype(device or state[name].device) if name == "secant" else None
        state[name] = torch.zeros_like(state[name], dtype=dtype, device=device)
