"""A GPU that is not there: real numbers in CPU memory under tensors whose device says cuda, and a record of what a GPU
would have been asked: operations, launches, bytes, and every time that the host would have waited.

``with PretendCuda() as gpu:`` everything inside that names the device "cuda" lands on the pretended one, whether there
is a real one or not. Values are the CPU's. Tensors of two devices in one operation are an error, as on a GPU.

Not seen: what a C++ autograd formula asks the host. Formulas take another way for tensor subclasses; a profile of plain
tensors shows it (``backward_waits``).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# CUDA copies this much of pageable memory into its command buffer; of more, the host waits until it is staged.
INLINE_COPY = 1 << 16
# Of torch's multi_tensor_apply: tensors of one launch by the number of lists, elements of a block, blocks of a launch.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCK, BLOCKS_PER_LAUNCH = 65536, 320
CAT_INPUTS = 128  # of one launch of torch.cat

# They run nothing on the device: they make a tensor, or another view of one.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_LAUNCH |= {
    "_reshape_alias",
    "_unsafe_view",
    "lift",
    "is_pinned",
    "_pin_memory",
    "set_",
    "resize_",
    "split_with_sizes",
}
NO_LAUNCH |= {"is_same_size", "sym_size", "_has_compatible_shallow_copy_type"}
# They read only the places that an index names.
READS_BY_INDEX = {"index", "gather", "index_select", "take", "embedding"}
COPIES = {"_to_copy", "copy_", "_copy_from", "_foreach_copy_"}


FACTORIES = {"empty", "empty_strided", "new_empty_strided", "new_empty", "new_zeros", "zeros", "ones", "full"}
FACTORIES |= {"scalar_tensor", "arange", "zeros_like", "ones_like", "empty_like", "full_like", "_to_copy"}


class Mismatch(RuntimeError):
    """Tensors of two devices in one operation."""


class Pretended(Tensor):
    """``value``: the CPU tensor behind it, of the same sizes and strides.

    To torch's C++ it is a CPU tensor, because without a driver autograd cannot handle another; Python is told "cuda".
    So what C++ decides by the device is decided here: ``to``, ``cpu``, and whatever reads memory.
    """

    value: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device=value.device, requires_grad=False,
        )  # fmt: skip
        made.value = value
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended tensor outside of `with PretendCuda()`")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options: dict[str, Any] = {"dtype": dtype or self.dtype}
        if memory_format is not None:
            options["memory_format"] = memory_format
        if device is not None and device.type != "cuda":
            return aten._to_copy(self, device=device, non_blocking=non_blocking, **options)
        same = memory_format in (None, torch.preserve_format) or self.is_contiguous(memory_format=memory_format)
        return self if options["dtype"] == self.dtype and same and not copy else aten._to_copy(self, **options)

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy  # type: ignore[assignment]

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        made = Pretended(self.value.detach().clone())
        if getattr(self, "_is_param", False):
            made._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        return made

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.value})"


class Event:
    """In place of torch.cuda.Event: has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Record:
    """What happened: ``calls`` operations by name, ``launches`` and ``moved`` bytes by phase, ``waits`` in words."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.moved_by: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.waits: list[str] = []


class PretendCuda(TorchDispatchMode):
    """See the module. ``record``: since the last :meth:`start`; ``phase(name)``: what is counted under that name."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self._phase = "rest"
        self._pinned: dict[int, Tensor] = {}  # by address; held, so that no other tensor gets it
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> PretendCuda:
        real = torch.autocast
        changes: list[tuple[Any, str, Any]] = [
            (torch.cuda, "Event", Event),
            (torch, "autocast", lambda device_type, **how: real("cpu", **how)),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # for GradScaler
            # Module.to makes new parameters: one that takes another's data would keep its ``value``.
            (torch.__future__, "_overwrite_module_params_on_conversion", True),
        ]
        if not torch.cuda.is_available():
            changes.append((torch.cuda, "_lazy_init", lambda: None))
            torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as FakeTensorMode does
        for place, name, value in changes:
            self._patches.setattr(place, name, value)
        # torch.tensor then moves its numbers to the device where a mode can see it.
        self._lifted, _ = torch._C._only_lift_cpu_tensors(), torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)  # type: ignore[attr-defined]
        self._patches.undo()

    def start(self) -> Record:
        """Forget what was recorded."""
        self.record = Record()
        return self.record

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its work counted under ``name``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        ours = [t for t in tree_iter((args, kwargs)) if isinstance(t, Pretended)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if torch._C._current_graph_task_id() != -1 and name in FACTORIES:
            asked = CUDA  # autograd's C++ makes a tensor like one that it takes for a CPU tensor
        if not ours and (asked is None or asked.type != "cuda"):
            return self._on_host(func, name, args, kwargs)
        on_device = bool(ours) if asked is None else asked.type == "cuda"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if ours:
            self._check_devices(func, name, args, kwargs)
        self._look_for_waits(func, name, args, kwargs, on_device)
        plain_args, plain_kwargs = tree_map(_value, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        self._count(func, name, args, kwargs, result)
        return _returned(func, args, kwargs, result, on_device)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return args[0].untyped_storage().data_ptr() in self._pinned
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _check_devices(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise Mismatch where CUDA would refuse."""
        if name in COPIES:
            return
        host = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, Pretended)]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:  # an index may lie on the host; it is then copied
                if isinstance(index, Tensor) and not isinstance(index, Pretended):
                    self._wait(f"{name} with an index on the host")
                    host = [t for t in host if t is not index]
        # One element on the host is an argument of the kernel, where the operation goes element by element.
        scalars = torch.Tag.pointwise in func.tags or name in ("fill_", "index_put_", "_index_put_impl_", "lerp")
        wrong = [t for t in host if t.ndim or not scalars]
        if wrong or (not any(t.ndim for t in tree_iter((args, kwargs)) if isinstance(t, Pretended)) and _any_dim(host)):
            shapes = [list(t.shape) for t in wrong]
            raise Mismatch(f"{func}: expected all tensors to be on the same device, found {shapes} on the CPU")

    def _look_for_waits(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], on_device: bool) -> None:
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else None
            self._look_at_copy(name, source, target, on_device, bool(kwargs.get("non_blocking") or _third(name, args)))
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self._wait(f"{name} by a mask")
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) or name == "nms":
            self._wait(name)

    def _look_at_copy(
        self, name: str, source: Tensor, target: Tensor | None, on_device: bool, non_blocking: bool
    ) -> None:
        to_device = on_device if target is None else isinstance(target, Pretended)
        from_device = isinstance(source, Pretended)
        if to_device == from_device:
            return
        size = source.numel() * source.element_size()
        if to_device:
            if not non_blocking:
                self._wait(f"{name} of {list(source.shape)} to the device")
            elif size > INLINE_COPY and not self._is_pinned(source):
                self._wait(f"{name} of {list(source.shape)} from pageable memory to the device")
        elif not non_blocking:
            self._wait(f"{name} of {list(source.shape)} to the host")
        elif target is None or not self._is_pinned(target):
            self._wait(f"{name} of {list(source.shape)} to pageable memory")

    def _wait(self, what: str) -> None:
        self.record.waits.append(f"{self._phase}: {what}")

    def _count(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if name in NO_LAUNCH or _is_view(func):
            return
        outputs = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        inputs = [_value(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if outputs and not any(t.numel() for t in outputs):
            return
        read = 0
        for position, tensor in enumerate(inputs):
            size = _touched(tensor)
            if position == 0 and name in READS_BY_INDEX:
                size = min(size, sum(map(_touched, outputs)))
            read += size
        written = sum(map(_touched, outputs)) or sum(
            _touched(t) for t in (inputs[: len(inputs)] if name.startswith("_foreach") else [])
        )
        phase, record = self._phase, self.record
        record.calls[name] += 1
        record.operations[phase] += 1
        record.launches[phase] += _launches(name, args, outputs)
        record.moved[phase] += read + written
        record.moved_by[f"{phase}: {name}"] += read + written
        record.largest[phase] = max([record.largest[phase], *(_touched(t) for t in outputs)])


def _value(item: Any) -> Any:
    return item.value if isinstance(item, Pretended) else item


def _any_dim(tensors: list[Tensor]) -> bool:
    return any(t.ndim for t in tensors)


def _third(name: str, args: Any) -> bool:
    return name == "copy_" and len(args) > 2 and bool(args[2])


def _is_view(func: Any) -> bool:
    """Whether every result is an input seen otherwise."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _touched(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor, what is expanded counted once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0]
    return math.prod(sizes) * tensor.element_size()


def _launches(name: str, args: Any, outputs: list[Tensor]) -> int:
    if name in ("cat", "stack"):
        return -(-len(args[0]) // CAT_INPUTS)
    if not name.startswith(("_foreach_", "_fused_", "_amp_foreach")):
        return 1
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    depth = len(lists) + bool(outputs)
    per_launch = TENSORS_PER_LAUNCH[min(max(depth, 1), 5)]
    blocks = sum(-(-t.numel() // BLOCK) for t in lists[0])
    return max(-(-len(lists[0]) // per_launch), -(-blocks // BLOCKS_PER_LAUNCH))


def _returned(func: Any, args: Any, kwargs: dict[str, Any], result: Any, on_device: bool) -> Any:
    """The results, on their device; where the operation wrote into an argument, that argument."""
    written: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for mark in argument.alias_info.before_set:
                written[mark] = given
    returns = func._schema.returns
    results = [result] if len(returns) == 1 else result
    if not returns:
        return result
    placed = []
    for declared, item in zip(returns, results, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            placed.append(next(written[mark] for mark in declared.alias_info.before_set))
        else:
            placed.append(tree_map(_on_device, item) if on_device else item)
    return placed[0] if len(returns) == 1 else tuple(placed)


def _on_device(item: Any) -> Any:
    return Pretended(item) if isinstance(item, Tensor) and not isinstance(item, Pretended) else item


def backward_waits(loss: Tensor) -> list[str]:
    """What the backward pass of plain CPU tensors asks the host, by a profile of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        loss.backward()
    asking = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
    asking |= {"aten::masked_select", "aten::_unique2"}
    return [event.name for event in profile.events() if event.name in asking]


def amp_without_driver(patches: pytest.MonkeyPatch) -> None:
    """Let torch.autocast("cuda") and GradScaler work where there is no GPU, on tensors that claim to be on one."""
    if torch.cuda.is_available():
        return

    @contextlib.contextmanager
    def autocast(device_type: str, dtype: torch.dtype) -> Iterator[None]:
        before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        torch.set_autocast_enabled(device_type, True)
        torch.set_autocast_dtype(device_type, dtype)
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device_type, before[0])
            torch.set_autocast_dtype(device_type, before[1])

    patches.setattr(torch, "autocast", autocast)
    patches.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
