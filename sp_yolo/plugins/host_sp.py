"""The optimizer that a host gets in place of its own: SP over the very groups that the host makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.errors import UserError
from sp_yolo.optim import SP
from sp_yolo.optim.saliency import prox_due
from sp_yolo.plugins.network import Role, backbone_rows, copies_of, mask_copies, network_of, roles_of
from sp_yolo.plugins.settings import OF_ROLES, OF_SP

# Run where the host's classes can be imported.
STRIP = (
    "python -c \"import torch; c = torch.load('FILE', weights_only=False); "
    "torch.save({**c, 'optimizer': None, 'epoch': -1}, 'FILE')\""
)


@dataclass
class Terms:
    """What holds for every optimizer that a host builds.

    ``settings``: SP's, ``sigma_backbone``, ``sigma_head``, ``backbone``; what they leave out comes from ``fallback``,
    then from the host's call. ``report`` takes lines of words. ``strict``: every trainable tensor of one network must
    be handed over. ``epochs``: of the run, where the host said it; ``network``: the host's, where it is known.
    ``stepped``: whether an optimizer has; ``progress``: words on the last checkpoint.
    """

    settings: dict[str, Any]
    report: Callable[[str], None] = lambda line: None
    strict: bool = False
    fallback: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    network: nn.Module | None = None
    stepped: bool = False
    progress: str = ""


class HostSP(SP):
    """SP over a host's groups: as many, in its order, with its rates and decay.

    What SP has to know besides is carried per tensor: ``param_names``, ``roles`` (backbone, head, bias, norm, frozen)
    and ``prunable``. Weights of one role are ranked together, whichever groups they are in.
    ``call``: what the host's own call says of SP's arguments. ``former``: the class whose place this takes.
    """

    def __init__(self, params: Iterable[Any], call: dict[str, Any], terms: Terms, former: str = "SGD") -> None:
        handed = _as_groups(params)
        settings = {**terms.fallback, **terms.settings}
        self._lr = settings.get("lr")
        self._backbone = settings.pop("backbone", None)
        sigma = settings.pop("sigma", 0.0)
        self._sigmas = {name: settings.pop(name, sigma) for name in OF_ROLES}
        self._terms, self._former, self._begun = terms, former, False
        self._network = terms.network or network_of(p for group in handed for p in group["params"])
        self._roles = roles_of(self._network, self._backbone) if self._network else {}
        self._copies: list[weakref.ref[nn.Module]] | None = None
        # Without the length of the run there is no ramp yet: nothing is pruned before it is known.
        self._waits = self._must_wait(settings)
        super().__init__(handed, **{**call, **settings, "sigma": 0.0 if self._roles else sigma})
        if self._waits:
            self.param_groups[0]["run"] = {"epochs": terms.epochs, "done": 0, "steps": 0}

    def _must_wait(self, settings: dict[str, Any]) -> bool:
        """Whether the length of the run is needed and still to be found out.

        Raises:
            UserError: it cannot be; the network is needed and was not found, or all of it is frozen.
        """
        sigmas, terms = set(self._sigmas.values()), self._terms
        if not self._roles and (terms.strict or len(sigmas) > 1):
            raise UserError("the host's optimizer gets parameters of no network alive: SP cannot name them")
        if terms.strict and all(role.role == "frozen" for role in self._roles.values()):
            raise UserError(
                "every parameter of the host's network is frozen: nothing is left to train (see its --freeze)"
            )
        if settings.get("mode") == "paper" and len(sigmas) > 1:
            raise UserError("--sp mode=paper has one sigma: give sigma_backbone and sigma_head alike")
        ramp = self._roles and any(sigmas) and settings.get("mode") != "paper" and settings.get("total_steps") is None
        if ramp and terms.strict and not terms.fallback and (terms.epochs or 0) < 2:
            raise UserError("--sp sigma_*: without two --epochs to count in, give total_steps=N, the optimizer's steps")
        return bool(ramp and (terms.epochs or terms.fallback))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As SP's, with what the network says of each tensor.

        Raises:
            UserError: a tensor that is not the network's (of a ``strict`` host), or one handed over twice.
        """
        (group,) = _as_groups([param_group])
        if self._lr is not None:
            group["lr"] = group["given_lr"] = self._lr  # for every group, whatever the host says of it
        if self._roles:
            known = {id(p) for other in self.param_groups for p in other["params"]}
            roles = [self._role(param, known) for param in group["params"]]
            group.update(
                param_names=[role.name for role in roles],
                roles=[role.role for role in roles],
                prunable=[role.prunable for role in roles],
                sigmas=dict(self._sigmas),
                backbone=self._backbone,
                sigma=self._group_sigma(roles),
            )
        super().add_param_group(group)

    def _role(self, param: Tensor, known: set[int]) -> Role:
        role = self._roles.get(id(param))
        if role is None and not self._terms.strict:
            return Role("", "other", False)
        if role is None:
            raise UserError(f"the host's optimizer gets a tensor of shape {tuple(param.shape)} that is not the model's")
        if id(param) in known:
            raise UserError(f"the host's optimizer gets {role.name}, of shape {tuple(param.shape)}, twice")
        known.add(id(param))
        return role

    def _group_sigma(self, roles: Iterable[Role]) -> float:
        """What of the group's state depends on: whether anything in it is pruned."""
        return 0.0 if self._waits else max((self._sigmas[f"sigma_{r.role}"] for r in roles if r.prunable), default=0.0)

    def _ranked(self) -> list[dict[str, Any]]:
        """One group for each role that the host's groups hold."""
        if not self._roles:
            return super()._ranked()
        parts: dict[str, dict[str, Any]] = {}
        for group in self.param_groups:
            for param, role, prunable in zip(group["params"], group["roles"], group["prunable"], strict=True):
                if role not in parts:
                    sigma = 0.0 if self._waits else group["sigmas"].get(f"sigma_{role}", 0.0)
                    parts[role] = {**group, "name": role, "params": [], "prunable": [], "sigma": sigma}
                parts[role]["params"].append(param)
                parts[role]["prunable"].append(prunable)
        return list(parts.values())

    @torch._disable_dynamo
    def _advance(self) -> None:
        if not self._begun:
            self._begin()
        super()._advance()
        self._terms.stepped = True

    def _begin(self) -> None:
        """Before the first step: is what the host handed over all, and are the biases where it warms them?"""
        self._begun = True
        if self._terms.strict:
            _check_complete(self._network, self.param_groups)
            _check_warm_up(self.param_groups)
        self._summarise()

    def _prune(self, step: int) -> None:
        """As SP's. An average of the weights gets the zeros at once, and keeps them: what it averages has them too."""
        super()._prune(step)
        group = self.param_groups[0]
        due = prox_due(step, group["every"], group["start"], group["end"], group["total_steps"])
        if self._roles and any(self._sigmas.values()) and not self._waits and due:
            names = {id(p): n for g in self.param_groups for p, n in zip(g["params"], g["param_names"], strict=True)}
            mask_copies(self._averages(), {names[id(p)]: mask for p, mask in self.masks().items()})

    def _averages(self) -> list[nn.Module]:
        """Copies of the network. Looked for when the first zeros come, and when one of them is gone."""
        alive = [copy for copy in (ref() for ref in self._copies or ()) if copy is not None]
        if self._copies is None or len(alive) < len(self._copies):
            alive = copies_of(self._network) if self._network else []
            self._copies = [weakref.ref(copy) for copy in alive]
        return alive

    def end_epoch(self) -> None:
        """Called when the host steps its schedule: the steps of the epochs so far tell the length of the run.

        While its accumulation warms up, epochs have more steps than later: the length is worked out anew each time.

        Raises:
            UserError: more epochs than the host said.
        """
        run, steps = self.param_groups[0].get("run"), self.param_groups[0].get("k", 0)
        if run is None or steps == run["steps"]:
            return
        taken = steps - run["steps"]
        run.update(done=run["done"] + 1, steps=steps)
        left = run["epochs"] - run["done"]
        if left < 0:
            raise UserError("the host steps its schedule more often than once an epoch: give --sp total_steps=N")
        self._waits = False
        for group in self.param_groups:
            group["total_steps"] = steps + left * taken
            rows = zip(group["param_names"], group["roles"], group["prunable"], strict=True)
            group["sigma"] = self._group_sigma(Role(*row) for row in rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As SP's. The settings are the file's.

        Raises:
            UserError: the state of another optimizer or network, or of a run with other settings than were given now.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        self._sigmas = dict(self.param_groups[0].get("sigmas", self._sigmas))
        run = self.param_groups[0].get("run")
        self._waits = run is not None and not run["done"]
        self._terms.report("SP: state restored from the checkpoint; its settings hold:")
        self._terms.report(self._settings_line())

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        theirs = state_dict["param_groups"]
        params = [p for group in self.param_groups for p in group["params"]]
        sizes = [[len(group["params"]) for group in groups] for groups in (theirs, self.param_groups)]
        fits = sizes[0] == sizes[1] and "growth" in theirs[0] and ("roles" in theirs[0]) == bool(self._roles)
        indices = [index for group in theirs for index in group["params"]]
        for param, entry in zip(params, (state_dict["state"].get(index, {}) for index in indices), strict=False):
            buffer = entry.get("momentum_buffer")
            fits = fits and (buffer is None or buffer.shape == param.shape)
        if not fits:
            raise UserError(f"the checkpoint's optimizer state is not SP's for this model; strip it first: {STRIP}")
        saved = settings_of(theirs[0])
        for name, value in self._terms.settings.items():
            if name in saved and value != saved[name]:
                raise UserError(f"the checkpoint's run had {name} {saved[name]}: go on without {name}={value}")
        ours = self.param_groups[0].get("initial_lr")
        if ours is not None and (lr := saved["lr"]) != ours:
            raise UserError(f"the checkpoint's run had lr {lr:g}, not {ours:g}: go on with lr={lr:g}")

    def _summarise(self) -> None:
        report = self._terms.report
        report(f"SP in place of torch.optim.{self._former}. The host's parameter groups:")
        for index, group in enumerate(self.param_groups):
            count = sum(param.numel() for param in group["params"])
            roles = group.get("roles", [])
            words = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
            decay = f"weight_decay {group['weight_decay']:g}"
            report(f"  {index} {len(group['params']):4} tensors {count:>11,} parameters  {decay}  {words}")
        if self._network is not None and (rows := self._backbone or backbone_rows(self._network)):
            report(f"  backbone: layers 0 to {rows - 1} of the cfg")
        report(self._settings_line())

    def _settings_line(self) -> str:
        values = {"momentum": self.param_groups[0]["momentum"], **settings_of(self.param_groups[0])}
        words = (f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in values.items())
        return "  " + " ".join(words)


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """SP's settings in a parameter group: lr before any schedule, total_steps unless it was worked out."""
    values = {name: group[name] for name in OF_SP} | dict(group.get("sigmas", {}))
    values.update(lr=float(group.get("initial_lr", group["lr"])), backbone=group.get("backbone"))
    return {**values, "total_steps": None} if "run" in group else values


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups with lists of tensors; what comes with a name keeps the tensor alone."""
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    return [{**group, "params": [_tensor(entry) for entry in _listed(group["params"])]} for group in groups]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensor(entry: Any) -> Tensor:
    return entry[1] if isinstance(entry, tuple) else entry


def _check_complete(network: nn.Module | None, groups: list[dict[str, Any]]) -> None:
    """UserError where trainable parameters of the network were never handed over."""
    handed = {id(param) for group in groups for param in group["params"]}
    named = network.named_parameters() if network else ()
    missing = [name for name, param in named if param.requires_grad and id(param) not in handed]
    if missing:
        raise UserError(f"the host left {len(missing)} trainable parameters out of its optimizer, first {missing[0]}")


def _check_warm_up(groups: list[dict[str, Any]]) -> None:
    """UserError where the host warms a group from above that is not its biases': with that rate weights diverge."""
    for index, group in enumerate(groups):
        roles, target = set(group["roles"]), group.get("initial_lr")
        if target is None or group["lr"] <= target * (1 + 1e-9) or not roles:
            continue
        if "bias" not in roles or roles & {"backbone", "head"}:
            rates = ", ".join(f"{other['lr']:g}" for other in groups)
            raise UserError(
                f"the host begins group {index} ({', '.join(sorted(roles))}) above its lr, as is meant for biases: "
                f"rates {rates}"
            )
