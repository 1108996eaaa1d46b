"""Reading and rewriting the ``forward`` of one module's class.

Additions, products and functional poolings live in code, not in modules. Every such expression that a class can reach from its
``forward`` gets a :class:`Key`; :func:`derive_class` returns a subclass in whose methods some of them are calls of an
attribute: ``a + b`` becomes ``self.<name>(a, b)``, ``F.avg_pool2d(x, ...)`` becomes ``F.avg_pool2d(self.<name>(x), ...)``.
Everything else stays as it was written, line numbers, globals and closures included.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import operator
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ADD_FUNCTIONS = (torch.add, operator.add)
MUL_FUNCTIONS = (torch.mul, torch.multiply, operator.mul)
ADD_FORMS = ("+", "+=", "add", "add_", "torch.add")
MUL_FORMS = ("*", "*=", "mul", "mul_", "torch.mul")
# Of one operand: a functional pooling, and an average that may be one.
POOL_FORMS = ("pool", "mean")
POOL_FUNCTIONS = (
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Mult: "*"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILDREN = {"children", "named_children", "_modules"}
_OWN_ITEMS = {"", "items", "keys", "values"}
_FUTURE_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


@dataclass(frozen=True)
class Key:
    """One expression of a class.

    Attributes:
        owner: Position in the class's method resolution order of the class that defines the method.
        method: Name of that method.
        index: Position of the expression in the method, in source order of its end.
        form: One of ``ADD_FORMS``, ``MUL_FORMS`` or ``POOL_FORMS``.
    """

    owner: int
    method: str
    index: int
    form: str


@dataclass
class Method:
    """A method reachable from ``forward`` whose source can be read.

    Attributes:
        reads: Attributes of ``self`` that it mentions; ``""`` if it uses ``self`` itself.
    """

    owner: int
    name: str
    function: FunctionType
    tree: ast.FunctionDef
    keys: list[Key] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    supers: set[tuple[int, str]] = field(default_factory=set)


@dataclass
class ClassSource:
    """What a class can execute from its ``forward``.

    Attributes:
        methods: By ``(owner, name)``.
        unread: Names of reachable methods without readable source, with the reason.
    """

    cls: type
    methods: dict[tuple[int, str], Method]
    unread: dict[str, str]

    @property
    def keys(self) -> list[Key]:
        """All expressions, in a fixed order."""
        return [key for method in self.methods.values() for key in method.keys]

    @property
    def iterates(self) -> bool:
        """Whether the forward goes through all children, so that a further child would change what it computes."""
        reads = set().union(*(method.reads for method in self.methods.values()))
        return bool(reads & _CHILDREN) or (issubclass(self.cls, _CONTAINERS) and bool(reads & _OWN_ITEMS))


def read_class(cls: type[nn.Module]) -> ClassSource:
    """Find the expressions that ``cls`` can reach from its ``forward`` through its own methods and ``super()``."""
    source = ClassSource(cls, {}, {})
    queue = [_lookup(cls, "forward", 0)]
    while queue:
        found = queue.pop()
        if found is None or found in source.methods:
            continue
        owner, name = found
        function = cls.__mro__[owner].__dict__[name]
        tree = _parse(function)
        if isinstance(tree, str):
            source.unread[name] = tree
            continue
        method = Method(owner, name, function, tree)
        scan = _Scan(method, cls)
        scan.visit(tree)
        source.methods[found] = method
        queue += scan.reached
    return source


def _lookup(cls: type, name: str, start: int) -> tuple[int, str] | None:
    """Where ``name`` is found from position ``start`` of the resolution order on; ``None`` unless it is user code."""
    for position, base in enumerate(cls.__mro__[start:], start):
        if base in nn.Module.__mro__:
            return None
        if name in base.__dict__:
            return (position, name) if isinstance(base.__dict__[name], FunctionType) else None
    return None


def _parse(function: FunctionType) -> ast.FunctionDef | str:
    if hasattr(function, "__wrapped__"):
        return "its forward is wrapped by a decorator"
    try:
        text = textwrap.dedent(inspect.getsource(function))
        parsed = ast.parse(text).body[0]
    except (OSError, SyntaxError, IndexError):
        return "its source code is not available"
    if not isinstance(parsed, ast.FunctionDef):
        return "its forward is not a plain function"
    ast.increment_lineno(parsed, function.__code__.co_firstlineno - 1)
    return parsed


def _self_name(tree: ast.FunctionDef) -> str | None:
    arguments = tree.args.posonlyargs + tree.args.args
    return arguments[0].arg if arguments else None


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args


def _resolve(node: ast.expr, function: FunctionType) -> Any:
    """The object a dotted name stands for in ``function``'s globals, else ``None``."""
    if isinstance(node, ast.Name):
        local = node.id in function.__code__.co_varnames or node.id in function.__code__.co_cellvars
        return None if local else function.__globals__.get(node.id)
    if isinstance(node, ast.Attribute):
        value = _resolve(node.value, function)
        return None if value is None or isinstance(value, nn.Module) else getattr(value, node.attr, None)
    return None


def _is_repeatable(target: ast.expr) -> bool:
    """Whether evaluating ``target`` twice is harmless, so that ``t += x`` may become ``t = f(t, x)``."""
    allowed = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp, ast.BinOp)
    passive = (ast.expr_context, ast.operator, ast.unaryop)
    return all(isinstance(node, allowed + passive) for node in ast.walk(target))


class _Visitor(ast.NodeTransformer):
    """Enumerates the expressions of one method in a fixed order."""

    def __init__(self, method: Method, cls: type) -> None:
        self.method = method
        self.cls = cls
        self.me = _self_name(method.tree)
        self.count = 0

    def key(self, form: str) -> Key:
        self.count += 1
        return Key(self.method.owner, self.method.name, self.count - 1, form)

    def found(self, key: Key, node: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not handle expressions")

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        literal = isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant)
        form = _OPERATORS.get(type(node.op))
        return self.found(self.key(form), node) if form is not None and not literal else node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        literal = isinstance(node.value, ast.Constant)
        form = _OPERATORS.get(type(node.op))
        if form is not None and not literal and _is_repeatable(node.target):
            return self.found(self.key(f"{form}="), node)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        plain = not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args)
        target = _resolve(node.func, self.method.function)
        if plain and len(node.args) == 2 and any(target is f for f in ADD_FUNCTIONS):
            return self.found(self.key("torch.add"), node)
        if plain and len(node.args) == 2 and any(target is f for f in MUL_FUNCTIONS):
            return self.found(self.key("torch.mul"), node)
        if node.args and not isinstance(node.args[0], ast.Starred):
            if any(target is f for f in POOL_FUNCTIONS):
                return self.found(self.key("pool"), node)
            if target is torch.mean:
                return self.found(self.key("mean"), node)
        if isinstance(node.func, ast.Attribute) and target is None:
            if node.func.attr == "mean":
                return self.found(self.key("mean"), node)
            if plain and len(node.args) == 1 and node.func.attr in ("add", "add_", "mul", "mul_"):
                return self.found(self.key(node.func.attr), node)
        return node


class _Scan(_Visitor):
    """Collects keys, and the methods that this one reaches."""

    def __init__(self, method: Method, cls: type) -> None:
        super().__init__(method, cls)
        self.reached: list[tuple[int, str] | None] = []

    def found(self, key: Key, node: Any) -> Any:
        self.method.keys.append(key)
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id == self.me:
            self.method.reads.add("")
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == self.me:
            self.method.reads.add(node.attr)
            self.reached.append(_lookup(self.cls, node.attr, 0))
            return node
        self.generic_visit(node)
        if _is_super(node.value):
            at = _lookup(self.cls, node.attr, self.method.owner + 1)
            if at is not None:
                self.method.supers.add(at)
                self.reached.append(at)
        return node


class _Rewrite(_Visitor):
    """Turns chosen expressions into calls of attributes of ``self``."""

    def __init__(self, method: Method, cls: type, names: Mapping[Key, str], redirect: Mapping[tuple[int, str], str]) -> None:
        super().__init__(method, cls)
        self.names = names
        self.redirect = redirect

    def _call(self, key: Key, like: ast.AST, *args: ast.expr) -> ast.Call:
        me = ast.Name(id=self.me or "self", ctx=ast.Load())
        func = ast.Attribute(value=me, attr=self.names[key], ctx=ast.Load())
        return ast.copy_location(ast.Call(func=func, args=list(args), keywords=[]), like)

    def found(self, key: Key, node: Any) -> Any:
        if key not in self.names:
            return node
        if key.form in ("+", "*"):
            return self._call(key, node, node.left, node.right)
        if key.form in ("+=", "*="):
            read = ast.parse(ast.unparse(node.target), mode="eval").body
            return ast.copy_location(ast.Assign(targets=[node.target], value=self._call(key, node, read, node.value)), node)
        if key.form in ("torch.add", "torch.mul"):
            return self._call(key, node, *node.args)
        if key.form in POOL_FORMS:
            if key.form == "mean" and _resolve(node.func, self.method.function) is None:
                node.func.value = self._call(key, node, node.func.value)
            else:
                node.args[0] = self._call(key, node, node.args[0])
            return node
        call = self._call(key, node, node.func.value, *node.args)
        if key.form in ("add_", "mul_") and isinstance(node.func.value, ast.Name):
            # In place: the name, too, must mean the result from here on.
            target = ast.Name(id=node.func.value.id, ctx=ast.Store())
            return ast.copy_location(ast.NamedExpr(target=target, value=call), node)
        return call

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        if _is_super(node.value):
            at = _lookup(self.cls, node.attr, self.method.owner + 1)
            if at is not None and at in self.redirect:
                me = ast.copy_location(ast.Name(id=self.me or "self", ctx=ast.Load()), node)
                return ast.copy_location(ast.Attribute(value=me, attr=self.redirect[at], ctx=node.ctx), node)
        return node


def derive_class(source: ClassSource, names: Mapping[Key, str], bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A subclass of ``source.cls`` in which the expressions in ``names`` call the attribute named there.

    Args:
        source: From :func:`read_class`.
        names: Attribute of ``self`` for each expression to replace.
        bases: Classes to put before ``source.cls``.
        members: Further class attributes.
    """
    cls = source.cls
    touched = {at for at, method in source.methods.items() if any(key in names for key in method.keys)}
    grown = True
    while grown:  # a method that reaches a touched one through super() must be redirected, so it is touched too
        more = {at for at, method in source.methods.items() if at not in touched and method.supers & touched}
        touched |= more
        grown = bool(more)
    redirect = {at: at[1] if _lookup(cls, at[1], 0) == at else f"_qat_{at[0]}_{at[1]}" for at in touched}
    for at in touched:
        method = source.methods[at]
        rewritten = _Rewrite(method, cls, names, redirect).visit(copy.deepcopy(method.tree))
        members[redirect[at]] = _compile(method, rewritten, cls.__mro__[method.owner].__name__)
    return type(f"Quant{cls.__name__}", (*bases, cls), members)


def _compile(method: Method, tree: ast.FunctionDef, class_name: str) -> FunctionType:
    """A function with the code of ``tree`` and everything else of ``method.function``."""
    function = method.function
    tree.decorator_list = []
    # Inside a function and a class of the owner's name, closures, super() and private names mean what they did.
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    module = ast.parse(f"def factory({', '.join(free)}):\n class {class_name}:\n  pass")
    module.body[0].body[0].body = [tree]  # type: ignore[attr-defined]
    ast.fix_missing_locations(module)
    flags = function.__code__.co_flags & _FUTURE_FLAGS
    code = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    for name in ("factory", class_name, tree.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = dict(function.__annotations__)
    made.__dict__.update(function.__dict__)
    made.__doc__, made.__qualname__, made.__module__ = function.__doc__, function.__qualname__, function.__module__
    return made


def plain_operation(form: str) -> Callable[[Any, Any], Any]:
    """What an addition or product of this form does to operands that are not traced."""
    operations: dict[str, Callable[[Any, Any], Any]] = {
        "+": operator.add,
        "+=": operator.iadd,
        "torch.add": torch.add,
        "add": lambda a, b: a.add(b),
        "add_": lambda a, b: a.add_(b),
        "*": operator.mul,
        "*=": operator.imul,
        "torch.mul": torch.mul,
        "mul": lambda a, b: a.mul(b),
        "mul_": lambda a, b: a.mul_(b),
    }
    return operations[form]
