"""A module's forward, rewritten so that batch norms run with what follows them, as long as nothing has changed."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from evenkeel.surgery.checks import NotAsTracedError
from evenkeel.surgery.forward_graph import Reads, required_names, trace
from evenkeel.surgery.guard import Guard
from evenkeel.surgery.kinds import will_fuse
from evenkeel.surgery.patterns import Fused, Refused, fuse
from evenkeel.surgery.unchanged import UntraceableError

_log = logging.getLogger("evenkeel")


class Plan:
    """What a module's forward does in both modes, and what of it is fused.

    Args:
        module: Whose forward.
        inlined: Modules below it whose own forwards are taken apart too.
        sync: As :func:`evenkeel.convert`'s.

    Raises:
        UntraceableError: there is no graph to trust.
    """

    def __init__(self, module: nn.Module, inlined: Collection[nn.Module] = (), sync: bool | None = None) -> None:
        if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], FusedForward):
            raise UntraceableError("it is an attribute of the instance, not of the class")
        self.module = module
        self.names = required_names(module)
        self.reads = Reads()
        modules = dict(module.named_modules(remove_duplicate=False))
        self.graphs: dict[bool, fx.Graph] = {}
        self.fused: dict[bool, list[Fused]] = {}
        self.refused: list[Refused] = []
        called: set[str] = set()
        ends = []
        for training in (True, False):
            graph, reads = trace(module, inlined, training)
            for reader in reads.run:
                self.reads.names.setdefault(reader, {}).update(reads.names.get(reader, {}))
            before = {str(node.target) for node in graph.nodes if node.op == "call_module"}
            ends.append(_end_of(graph, modules, lambda m: will_fuse(m, sync)))
            self.fused[training], refused = fuse(graph, modules, lambda m: will_fuse(m, sync), training, self.reads)
            self.refused += [r for r in refused if r not in self.refused]
            after = {str(node.target) for node in graph.nodes if node.op == "call_module"}
            # What is no longer called by itself, and what is called with more than its input.
            called |= (before - after) | {one.layer for one in self.fused[training]}
            self.graphs[training] = graph
        #: The batch norm whose output the module returns, which a caller may fuse with what it does next; or None.
        self.end = ends[0] if ends[0] == ends[1] else None
        self.inlined = [module, *(m for m in module.modules() if m in inlined and m in self.reads.names)]
        self.called = list(dict.fromkeys(modules[path] for path in sorted(called)))

    def fuses(self) -> bool:
        return bool(self.fused[True] or self.fused[False])


def _end_of(graph: fx.Graph, modules: dict[str, nn.Module], fusible: Callable[[nn.Module], bool]) -> str | None:
    (value,) = next(node for node in graph.nodes if node.op == "output").args
    if not isinstance(value, fx.Node) or value.op != "call_module" or len(value.users) != 1:
        return None
    return str(value.target) if fusible(modules[str(value.target)]) else None


class FusedForward:
    """What ``module.forward`` is on a converted model: an attribute of the instance, in front of the class's own.

    Where the module, its children, their hooks or what it reads are no longer what they were, where it is called with
    more than its required arguments, or with something else than tensors (a proxy of torch.fx, say), the class's own
    forward runs.
    """

    is_fused = True

    def __init__(self, plan: Plan) -> None:
        self.module = plan.module
        self._inlined = plan.inlined
        self._set_up(plan)

    def _set_up(self, plan: Plan) -> None:
        self._names = plan.names
        self._guard: Guard | None = Guard(plan.inlined, plan.called, plan.reads)
        self._run = {training: _function_of(graph) for training, graph in plan.graphs.items()}
        self.code = {training: graph.python_code("self").src for training, graph in plan.graphs.items()}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        module = self.module
        if self._guard is None:
            self._trace_again()
        if keywords and len(args) + len(keywords) == len(self._names):
            rest = self._names[len(args) :]
            if keywords.keys() == set(rest):
                args, keywords = (*args, *(keywords[name] for name in rest)), {}
        if keywords or len(args) != len(self._names) or self._guard is None or not self._guard.holds():
            return type(module).forward(module, *args, **keywords)
        for value in args:
            if not isinstance(value, Tensor):
                return type(module).forward(module, *args, **keywords)
        try:
            return self._run[module.training](module, *args)
        except NotAsTracedError:
            return type(module).forward(module, *args)

    # What tools look at that take a forward for a method.

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        return inspect.unwrap(type(self.module).forward).__code__  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    # Functions made from text can't be pickled: the module is traced again where it is loaded.

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_inlined": self._inlined}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _guard=None, _names=(), _run={}, code={})

    def _trace_again(self) -> None:
        if self._run is None:
            return
        try:
            self._set_up(Plan(self.module, self._inlined[1:]))
        except UntraceableError as error:
            _log.warning("a loaded %s runs unfused: its forward can't be traced: %s", type(self.module).__name__, error)
            self._run = None  # type: ignore[assignment]


def _function_of(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module and its inputs."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<evenkeel, a fused forward>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function
