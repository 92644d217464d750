"""The private parts of torch and Triton that the kernels rely on, and a check that they are still there.

A package may move such a name in any release. So each is listed here once, as a `Place`, and used through this file.
If one has moved, the error says which, and in which version of its package. `dami.upstream` does the same for what the
models rely on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any, NamedTuple

TESTED = {"torch": "2.13", "triton": "3.6"}


class Moved(ImportError):
    """Another package has removed or changed something that we rely on."""


@dataclass(frozen=True)
class Place:
    """A name of another package.

    Attributes:
        path: "module:name", or "module:class.member".
        names: the parameters of a function, or the fields, attributes and methods of a class, that we use.
        does: other behaviour that we rely on, as in "it does not keep _parameters".
        proof: checks that behaviour, given the object at the path.
    """

    path: str
    names: tuple[str, ...] = ()
    does: str = ""
    proof: Callable[[Any], bool] | None = None

    def fault(self) -> str | None:
        """Returns what is missing or different, as the end of a sentence, "torch 2.13 …", or None if all is well."""
        module, _, path = self.path.partition(":")
        try:
            found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except Exception as error:  # importing a module can raise anything
            return f"has no {self.path}: {error}"
        known = _names_of(found) if self.names else []
        if absent := [name for name in self.names if name not in known and not _is_member(found, name)]:
            return f"has no {', '.join(absent)} in {self.path}, but {', '.join(known)}"
        if self.proof is not None:
            try:
                holds, why = self.proof(found), ""
            except Exception as error:
                holds, why = False, f": {type(error).__name__}: {error}"
            if not holds:
                return f"has a {self.path} that does not {self.does}{why}"
        return None


def _names_of(found: Any) -> list[str]:
    """Returns the parameters of a function or the fields of a class."""
    if not isinstance(found, type):
        return list(inspect.signature(found).parameters)
    if is_dataclass(found):
        return [field.name for field in fields(found)]
    return [name for cls in found.__mro__ for name in vars(cls).get("__annotations__", {})]


def _is_member(found: Any, name: str) -> bool:
    return isinstance(found, type) and hasattr(found, name)


def check(what: str, places: Iterable[Place], tested: Mapping[str, str], by: str) -> None:
    """Checks every place, and raises `Moved` for those that are missing or different.

    Args:
        what: what needs them, for the message.
        places: of any packages.
        tested: the tested versions, by package.
        by: who tested them.
    """
    lines = []
    for place in places:
        if fault := place.fault():
            package = place.path.partition(":")[0].partition(".")[0]
            lines.append(f"{package} {version_of(package)} {fault} ({by} was tested with {tested[package]})")
    if lines:
        raise Moved("\n  ".join([f"{what} does not fit what is installed:", *lines]))


def version_of(package: str) -> str:
    """Returns the installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"


RELIED_ON = (
    Place("torch._functorch.utils:enable_single_level_autograd_function"),
    Place("torch.autograd.function:_SingleLevelFunction", ("forward", "backward", "jvp", "save_for_backward")),
    Place("torch.autograd.forward_ad:_set_fwd_grad_enabled"),
    Place("torch.autograd.forward_ad:_current_level"),
    Place("torch._C:_AutoDispatchBelowAutograd"),
    Place("torch._C:_after_autograd_keyset"),
    Place("torch._C:_are_functorch_transforms_active"),
    Place("torch._C:_dispatch_tls_local_include_set"),
    Place("torch._C:DispatchKeySet"),
    Place("torch._C:DispatchKey", ("BackendSelect", "ADInplaceOrView")),
    Place("torch._C:_len_torch_function_stack"),
    Place("torch.autograd:_profiler_enabled"),
    Place("torch._C:_is_any_autocast_enabled"),
    Place("torch:ops.aten.relu.default._schema.arguments"),
    Place("torch.utils._pytree:tree_flatten", ("tree", "is_leaf")),
    Place("torch.utils._pytree:tree_unflatten", ("leaves", "treespec")),
    Place("torch.utils._pytree:tree_leaves", ("tree", "is_leaf")),
    Place("torch.utils._pytree:tree_map_only", ("func", "tree")),
)
check("dami_kernels", RELIED_ON, TESTED, "it")

import torch._functorch.utils  # noqa: E402  (just checked above)
import torch.autograd.function  # noqa: E402
from torch import _C  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.utils import _pytree  # noqa: E402

pytree = _pytree
SingleLevelFunction = torch.autograd.function._SingleLevelFunction
single_level_functions = torch._functorch.utils.enable_single_level_autograd_function
below_autograd = _C._AutoDispatchBelowAutograd
after_autograd = _C._after_autograd_keyset
forward_gradients = forward_ad._set_fwd_grad_enabled
in_transforms = _C._are_functorch_transforms_active


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


_KEY = _C.DispatchKeySet
_NOTHING_INCLUDED = (
    _KEY(_C.DispatchKey.BackendSelect) | _KEY(_C.DispatchKey.ADInplaceOrView),
    _KEY(_C.DispatchKey.BackendSelect),  # in inference mode
)


def is_watched() -> bool:
    """Whether anything besides autograd sees or changes operator calls: a mode, tracer, transform, profiler or cast."""
    return (
        _C._dispatch_tls_local_include_set() not in _NOTHING_INCLUDED
        or _C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
        or _C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    )


def argument_names(op: Any) -> list[str]:
    """Returns an operator's argument names, from its schema."""
    return [argument.name for argument in op._schema.arguments]


def without_none(op: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Returns an operator's arguments with every list that is None replaced by an empty one."""
    optional = _optional_lists(op)
    return tuple([[] if arg is None and place in optional else arg for place, arg in enumerate(args)])


@functools.cache
def _optional_lists(op: Any) -> frozenset[int]:
    """Returns the positions of the arguments that may be a list of tensors or None."""
    types = [str(argument.type) for argument in op._schema.arguments]
    return frozenset(place for place, type in enumerate(types) if type == "Optional[List[Tensor]]")


def _text(function: Any) -> str:
    return " ".join(inspect.getsource(function).split())


def _launches_as_we_do(run: Any) -> bool:
    return (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())" in _text(run)
    )


# Without these Triton launches itself, see `dami_kernels.launching`.
LAUNCHES = (
    Place("triton.runtime.jit:JITFunction.run", ("grid", "warmup"), "launch as we do", _launches_as_we_do),
    Place(
        "triton.runtime.jit:JITFunction.add_pre_run_hook",
        does="keep its hooks in pre_run_hooks",
        proof=lambda add: "self.pre_run_hooks.append(hook)" in _text(add),
    ),
    Place("triton.compiler:CompiledKernel", ("run",)),
    Place("triton.runtime.driver:DriverConfig", ("active",)),
    Place("triton.knobs:HookChain", does="keep its hooks in calls", proof=lambda chain: chain().calls == []),
)


# Without this its Python in between is called.
LAUNCHER = (
    Place(
        "triton.backends.nvidia.driver:CudaLauncher.__call__",
        ("gridX", "gridY", "gridZ", "stream", "function", "args"),
        "launch as we do",
        lambda call: (
            "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl, "
            "global_scratch, profile_scratch, *args)" in _text(call)
        ),
    ),
)


@functools.cache
def why_triton_launches() -> str | None:
    """Returns why only Triton itself can launch its kernels, or None."""
    return _fault_of(LAUNCHES)


@functools.cache
def _fault_of(places: tuple[Place, ...]) -> str | None:
    try:
        check("a fast launch", places, TESTED, "it")
    except Moved as moved:
        return str(moved)
    return None


class _Triton(NamedTuple):
    """What a launch looks at in Triton. `looks` returns the values of knobs, those of `hooks` hooks first."""

    driver: Any
    function: Any
    kernel: type
    knobs: Any
    looks: Callable[[Any], tuple[Any, ...]]
    hooks: int


@functools.cache
def _triton() -> _Triton | None:
    if why_triton_launches() is not None:
        return None
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    # Versions differ in what a launch looks at, so its code is asked.
    names = set(re.findall(r"\bknobs\.(\w+\.\w+)", _text(JITFunction.run)))
    hooks = {name for name in names if name.endswith("_hook")}
    looks = attrgetter(*sorted(hooks), *sorted(names - hooks))
    return _Triton(driver, JITFunction, CompiledKernel, knobs, looks, len(hooks))


def look_at_triton_again() -> None:
    """Forgets what was found of Triton, whose parts others may have replaced for a while."""
    for found in (why_triton_launches, _fault_of, _triton):
        found.cache_clear()


def triton_state() -> tuple[Any, ...] | None:
    """Returns what Triton's launches depend on besides their arguments, its driver first; None if hooks watch them."""
    triton = _triton()
    if triton is None:
        return None
    driver, function, _, knobs, looks, hooks = triton
    seen = looks(knobs)
    for hook in seen[:hooks]:
        if hook is not None and (type(hook) is not knobs.HookChain or hook.calls):
            return None
    return driver.active, function.run, seen[hooks:]


def is_compiled(kernel: Any) -> bool:
    """Whether this is what Triton returns of a launch that can be made again."""
    triton = _triton()
    return triton is not None and isinstance(kernel, triton.kernel)


def launcher_of(kernel: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Returns what launches a compiled kernel, given grid, stream, the tuple that is returned too, and arguments."""
    run, without_hooks = kernel.run, (kernel.packed_metadata, None, None, None)
    if _fault_of(LAUNCHER) is None:
        from triton.backends.nvidia.driver import CudaLauncher

        if type(run) is CudaLauncher and run.global_scratch_size == run.profile_scratch_size == 0:
            flags = run.launch_cooperative_grid, run.launch_pdl
            return run.launch, (kernel.function, *flags, None, None, *without_hooks)
    return run, (kernel.function, *without_hooks)
