"""The calls of a network as a sequence of blocks, each distinct one told once."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .flow import Call, Edge
from .labels import is_quantized_module

# A module with more calls than that is no block: what it is made of is looked at.
LARGEST = 40
# Sources outside of a block: the first one, and all others.
FIRST, OTHERS = -1, -2
_LISTS = (nn.Sequential, nn.ModuleList)
# A module is mostly a list of blocks if this share of its calls is in the list.
_MOST = 0.6


@dataclass(frozen=True)
class Node:
    """One call in a block.

    Attributes:
        call: The call.
        name: Its path, less that of the block.
        inputs: What it reads; sources count the nodes of the block; outside it is ``FIRST`` or ``OTHERS``.
        is_output: Whether what it makes leaves the block.
    """

    call: Call
    name: str
    inputs: tuple[Edge, ...]
    is_output: bool


@dataclass(frozen=True)
class Block:
    """Consecutive calls that belong together: those of one module, or what lies between such modules.

    Attributes:
        path: Of the module; empty for what lies between.
        name: Its class, or ``"Stem"``, ``"Head"``, ``"Between"``, or ``"Network"`` for a network without blocks.
        nodes: Its calls in their order.
    """

    path: str
    name: str
    nodes: tuple[Node, ...]

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for blocks that look alike: everything but paths and numbers of channels."""
        # A stem is no block, even if it computes the same.
        parts: list[object] = [self.name, bool(self.path)]
        for node in self.nodes:
            edges = tuple((edge.source, edge.site is not None) for edge in node.inputs)
            counts = len(node.call.weights), len(node.call.inner)
            parts.append((node.name if self.path else "", node.call.text, edges, counts, node.is_output))
        return tuple(parts)


@dataclass(frozen=True)
class Kind:
    """Blocks that look alike.

    Attributes:
        block: The first of them.
        paths: Of all of them, in their order.
    """

    block: Block
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """A network as blocks.

    Attributes:
        kinds: Each distinct block, in the order in which they first run.
        order: Index into ``kinds`` of every block that runs, each with its path.
    """

    kinds: tuple[Kind, ...]
    order: tuple[tuple[int, str], ...]


def structure(model: nn.Module, calls: Sequence[Call]) -> Structure:
    """Divide the calls of ``model`` into blocks.

    A block is a module that is no list of blocks, nor mostly one: the ``Bottleneck`` of a ResNet, the ``EncoderBlock`` of a
    transformer.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    modules = dict(inner.named_modules(remove_duplicate=False))
    runs = _merge_ends(_runs(modules, calls), modules)
    last = _last_readers(calls)
    blocks = []
    for position, (path, members) in enumerate(runs):
        name = _class_name(modules[path]) if path else _between(position, len(runs))
        blocks.append(Block(path, name, _nodes(path, members, calls, last)))
    kinds: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        kinds.setdefault(block.signature, []).append(block)
    numbers = {signature: number for number, signature in enumerate(kinds)}
    found = tuple(Kind(alike[0], tuple(block.path for block in alike)) for alike in kinds.values())
    return Structure(found, tuple((numbers[block.signature], block.path) for block in blocks))


# Path of a block, empty between blocks, and the indices of its calls.
_Run = tuple[str, list[int]]


def _runs(modules: Mapping[str, nn.Module], calls: Sequence[Call]) -> list[_Run]:
    counts: Counter[str] = Counter()
    for call in calls:
        parts = call.path.split(".") if call.path else []
        counts.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    lists = {path for path, module in modules.items() if path and _lists_blocks(module)}
    most = {outer for path in lists for outer in _prefixes(path) if counts[path] >= _MOST * counts[outer]}

    def block_of(index: int) -> tuple[str, int] | None:
        owners = calls[index].owners
        return next((owner for owner in owners if owner[0] and owner[0] not in most and counts[owner[0]] <= LARGEST), None)

    grouped = itertools.groupby(range(len(calls)), block_of)
    return [("" if key is None else key[0], list(members)) for key, members in grouped]


def _prefixes(path: str) -> list[str]:
    """A path and those of the modules around it, less the root."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _lists_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of modules of an author's own classes: of some among others, or of nothing else."""
    if not isinstance(module, _LISTS):
        return False
    own = [child for child in module.children() if _is_composed(child) and not isinstance(child, _LISTS)]
    return len(own) > 1 or len(own) == 1 == len(module)


def _is_composed(module: nn.Module) -> bool:
    return not is_quantized_module(module) and any(True for _ in module.children())


def _merge_ends(runs: list[_Run], modules: Mapping[str, nn.Module]) -> list[_Run]:
    """Join what is no block at the start, and at the end, into one."""

    def is_loose(run: _Run) -> bool:
        return not run[0] or len(run[1]) <= 2 or isinstance(modules[run[0]], _LISTS)

    head = list(itertools.takewhile(is_loose, runs))
    tail = list(itertools.takewhile(is_loose, reversed(runs[len(head) :])))[::-1]
    middle = runs[len(head) : len(runs) - len(tail)]
    ends = [[("", [index for _, members in part for index in members])] if part else [] for part in (head, tail)]
    return [*ends[0], *middle, *ends[1]]


def _class_name(module: nn.Module) -> str:
    return str(getattr(type(module), "float_class", type(module)).__name__)


def _between(position: int, count: int) -> str:
    if count == 1:
        return "Network"
    return "Stem" if position == 0 else "Head" if position == count - 1 else "Between"


def _last_readers(calls: Sequence[Call]) -> list[int]:
    """The index of the last call that reads what each call makes; the number of calls where none does."""
    last = [len(calls)] * len(calls)
    for index, call in enumerate(calls):
        for edge in call.inputs:
            if edge.source >= 0:
                last[edge.source] = index
    return last


def _nodes(path: str, members: Sequence[int], calls: Sequence[Call], last: Sequence[int]) -> tuple[Node, ...]:
    local = {index: number for number, index in enumerate(members)}
    outside: dict[int, int] = {}
    nodes = []
    for index in members:
        call = calls[index]
        edges = []
        for edge in call.inputs:
            source = local.get(edge.source)
            if source is None:
                source = outside.setdefault(edge.source, max(-1 - len(outside), OTHERS))
            edges.append(Edge(source, edge.site))
        inside = path and call.path.startswith(path + ".")
        name = call.path[len(path) + 1 :] if inside else call.path
        nodes.append(Node(call, name if call.is_module else "", tuple(dict.fromkeys(edges)), last[index] not in local))
    return tuple(nodes)


def joined(paths: Sequence[str]) -> str:
    """Paths in short: numbers that follow each other become a span.

    Example:
        >>> joined(["blocks.1", "blocks.2", "blocks.4", "head.conv"])
        'blocks.1–2, blocks.4, head.conv'
        >>> joined(["conv01", "conv02"])
        'conv01, conv02'
    """
    spans: list[tuple[str, int, int]] = []
    found: list[str | int] = []
    for path in paths:
        # Without leading zeros, which a span would drop.
        match = re.fullmatch(r"(.*?(?<![0-9]))(0|[1-9][0-9]*)", path)
        if match is None:
            found.append(path)
            continue
        stem, number = match.group(1), int(match.group(2))
        if found and isinstance(found[-1], int) and spans[-1][0] == stem and spans[-1][2] == number - 1:
            spans[-1] = (stem, spans[-1][1], number)
        else:
            spans.append((stem, number, number))
            found.append(len(spans) - 1)
    texts = []
    for item in found:
        if isinstance(item, str):
            texts.append(item)
        else:
            stem, first, last = spans[item]
            texts.append(f"{stem}{first}" if first == last else f"{stem}{first}–{last}")
    return ", ".join(texts)
