"""Where the nodes and connections of a block are drawn.

Data flows from top to bottom. The longest way through the block is the first column; side branches and connections that skip
nodes get columns to its right, so that no line crosses a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .blocks import FIRST, OTHERS, Block
from .flow import Edge

# In pixels.
BOX_WIDTH, BOX_HEIGHT = 158, 38
LANE_WIDTH, GAP, MARGIN = 16, 62, 12
# Between rows: with and without a site on the way.
TALL, SHORT, TURN = 34, 20, 8
PILL_WIDTH, PILL_HEIGHT, PORT_HEIGHT = 36, 16, 22


@dataclass(frozen=True)
class Box:
    """A node, or an input or output of the block (``is_port``); ``x`` and ``y`` are of its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    text: str
    name: str
    is_port: bool = False
    is_quantized: bool = False
    is_layer: bool = False
    weights: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pill:
    """A Q/DQ site on a connection; ``x`` and ``y`` are of its upper left corner, ``is_again`` if it was drawn before."""

    x: float
    y: float
    site: str
    is_again: bool


@dataclass(frozen=True)
class Drawing:
    """A block, laid out.

    Attributes:
        width: In pixels.
        height: In pixels.
        boxes: Nodes and ports.
        wires: Connections, as SVG path data; each ends in an arrow.
        pills: Sites on them.
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    wires: tuple[str, ...]
    pills: tuple[Pill, ...]


def lay_out(block: Block) -> Drawing:
    """Place the nodes of ``block``."""
    return _Layout(block).drawing()


class _Layout:
    """Rows and columns first, then pixels. Nodes are numbered as in the block, then the output; inputs are negative."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.out = len(block.nodes)
        self.edges = [(i, edge) for i, node in enumerate(block.nodes) for edge in node.inputs]
        self.edges += [(self.out, Edge(i, None)) for i, node in enumerate(block.nodes) if node.is_output]
        used = {edge.source for _, edge in self.edges}
        self.ports = [port for port in (FIRST, OTHERS) if port in used]
        self.rows = self._rows()
        self.taken: set[tuple[int, int]] = set()
        self.columns: dict[int, int] = {}
        self._choose_columns()
        self.lanes = [self._lane(target, edge.source) for target, edge in self.edges]
        self.lefts, self.width = self._positions()
        self.tops = self._tops()

    def _rows(self) -> dict[int, int]:
        rows = dict.fromkeys((FIRST, OTHERS), 0)
        for target in range(self.out + 1):
            before = [rows[edge.source] for other, edge in self.edges if other == target]
            rows[target] = max(before, default=0) + 1
        rows[self.out] = max(rows.values(), default=0) if self.out == 0 else max(rows[i] for i in range(self.out)) + 1
        return rows

    def _choose_columns(self) -> None:
        """The longest way gets the first column, other nodes the first one that is free from their source on."""
        at = self.out
        while at >= 0:
            self._put(at, 0)
            sources = [edge.source for other, edge in self.edges if other == at]
            if not sources:
                break
            # Of equally long ways, the one through the node that runs first.
            at = max(sources, key=lambda source: (self.rows[source], -source))
        if FIRST in self.ports:
            self._put(FIRST, 0)
        for node in (*(port for port in self.ports if port != FIRST), *range(self.out)):
            if node in self.columns:
                continue
            sources = [edge.source for other, edge in self.edges if other == node]
            start = min((self.rows[source] + 1 for source in sources), default=self.rows[node])
            chained = [self.columns[source] for source in sources if self.columns.get(source, 0) > 0]
            spans = range(min(start, self.rows[node]), self.rows[node] + 1)
            column = next(c for c in (*chained, *range(1, self.out + 3)) if self._is_free(c, spans))
            self._put(node, column)
            self.taken.update((column, row) for row in spans)

    def _put(self, node: int, column: int) -> None:
        self.columns[node] = column
        self.taken.add((column, self.rows[node]))

    def _is_free(self, column: int, rows: range) -> bool:
        return not any((column, row) in self.taken for row in rows)

    def _lane(self, target: int, source: int) -> int:
        """The column in which a connection runs down."""
        top, bottom = self.rows[source], self.rows[target]
        own, other = self.columns[target], self.columns[source]
        if own == other and (bottom == top + 1 or self._is_free(own, range(top + 1, bottom))):
            return own
        if own > 0 and own != other:
            return own
        if other > 0 and self._is_free(other, range(top + 1, bottom)):
            self.taken.update((other, row) for row in range(top + 1, bottom + 1))
            return other
        inside = range(top + 1, bottom + 1)
        lane = next(c for c in range(1, 2 * len(self.edges) + len(self.block.nodes) + 3) if self._is_free(c, inside))
        self.taken.update((lane, row) for row in inside)
        return lane

    def _positions(self) -> tuple[list[float], float]:
        """The left end of every column, and the width of all."""
        count = max([*self.columns.values(), *self.lanes]) + 1
        wide = set(self.columns.values())
        lefts, x = [], float(MARGIN)
        for column in range(count):
            lefts.append(x)
            x += (BOX_WIDTH if column in wide else LANE_WIDTH) + (GAP if column == 0 or column in wide else 10)
        last = count - 1
        return lefts, lefts[last] + (BOX_WIDTH if last in wide else LANE_WIDTH) + MARGIN

    def _center(self, column: int) -> float:
        return self.lefts[column] + (BOX_WIDTH if column in set(self.columns.values()) else LANE_WIDTH) / 2

    def _tops(self) -> list[float]:
        """The upper end of every row."""
        tall = {
            self.rows[target]
            for (target, edge), lane in zip(self.edges, self.lanes, strict=True)
            if edge.site is not None and not self._enters_side(target, lane)
        }
        tops, bottom = [float(MARGIN)], float(MARGIN + PORT_HEIGHT)
        for row in range(1, self.rows[self.out] + 1):
            tops.append(bottom + (TALL if row in tall else SHORT))
            bottom = tops[-1] + BOX_HEIGHT
        return tops

    def _top(self, node: int) -> float:
        return self.tops[self.rows[node]]

    def _height(self, node: int) -> float:
        return PORT_HEIGHT if node < 0 or node == self.out else BOX_HEIGHT

    def drawing(self) -> Drawing:
        boxes = tuple(self._boxes())
        wires, pills = [], []
        entries: dict[int, int] = {}
        drawn: set[str] = set()
        sides = [target for (target, edge), lane in zip(self.edges, self.lanes, strict=True) if self._enters_side(target, lane)]
        for (target, edge), lane in zip(self.edges, self.lanes, strict=True):
            start_x, start_y = self._center(self.columns[edge.source]), self._top(edge.source) + self._height(edge.source)
            x, top = self._center(self.columns[target]), self._top(target)
            path = f"M{start_x:g} {start_y:g}"
            down = self._center(lane)
            if down != start_x:
                path += _turned(start_x, start_y + TURN, down)
            if not self._enters_side(target, lane):
                path += f"V{top:g}"
                spot = x - PILL_WIDTH / 2, top - 5 - PILL_HEIGHT
            else:
                number = entries[target] = entries.get(target, -1) + 1
                share = (number + 1) / (sides.count(target) + 1)
                y = top + self._height(target) * share
                right = x + BOX_WIDTH / 2
                path += f"V{y - 5:g}Q{down:g} {y:g} {down - 5:g} {y:g}H{right:g}"
                spot = right + 12, y - PILL_HEIGHT / 2
            wires.append(path)
            if edge.site is not None:
                pills.append(Pill(*spot, edge.site, edge.site in drawn))
                drawn.add(edge.site)
        height = self._top(self.out) + PORT_HEIGHT + MARGIN
        return Drawing(self.width, height, boxes, tuple(wires), tuple(pills))

    def _enters_side(self, target: int, lane: int) -> bool:
        return lane != self.columns[target]

    def _boxes(self) -> Iterator[Box]:
        for port in self.ports:
            text = "in" if port == FIRST else "other inputs"
            yield Box(self.lefts[self.columns[port]], self._top(port), BOX_WIDTH, PORT_HEIGHT, text, "", is_port=True)
        for i, node in enumerate(self.block.nodes):
            call = node.call
            left = self.lefts[self.columns[i]]
            place = left, self._top(i), BOX_WIDTH, BOX_HEIGHT
            yield Box(*place, call.text, node.name, False, bool(call.sites), call.is_layer, call.weights, call.inner)
        yield Box(self.lefts[0], self._top(self.out), BOX_WIDTH, PORT_HEIGHT, "out", "", is_port=True)


def _turned(x: float, y: float, to: float) -> str:
    """From ``x`` on, a way that leaves downwards, runs at ``y`` to the side, and is ready to go down at ``to``."""
    step = 5 if to > x else -5
    return f"V{y - 5:g}Q{x:g} {y:g} {x + step:g} {y:g}H{to - step:g}Q{to:g} {y:g} {to:g} {y + 5:g}"
