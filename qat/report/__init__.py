"""One HTML file that tells where sites are, what they cost, and what they clip."""

from .rows import ResultTable
from .write import write_report

__all__ = ["ResultTable", "write_report"]
