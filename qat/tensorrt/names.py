"""Names of ONNX nodes in the names of layers."""

from __future__ import annotations

import re

# What TensorRT's parser calls layers that no node stands for: constants and the like, and the reshapes around a Gemm.
_OWN = ("(Unnamed Layer*", "reshape_before_", "reshape_after_")
_COPY = re.compile(r"\AReformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
_JOINT = re.compile(r" \+ | \|\| |, ")
_NUMBER = re.compile(r"(?:_\d+)?")


def name_parts(name: str) -> list[str]:
    """Names that TensorRT joined in the name of a layer, in its order.

    A region of which only the first and the last node are named gives those two; a copy, whose name says for whom it is,
    none.

    Example:
        >>> name_parts("w + conv1.q/QuantizeLinear + conv1 + PWN(PWN(Sigmoid_1), Mul_2)")
        ['w', 'conv1.q/QuantizeLinear', 'conv1', 'Sigmoid_1', 'Mul_2']
        >>> name_parts("{ForeignNode[ln_1/Add...mlp/Gemm + (Unnamed Layer* 7) [Shuffle]]}")
        ['ln_1/Add', 'mlp/Gemm']
    """
    if _COPY.match(name):
        return []
    # A region's brackets go first: its two ends may be joined parts themselves.
    text = re.sub(r"\{ForeignNode\[(.*?)\.\.\.(.*)\]\}", r"\1 + \2", name)
    parts, part, brackets = [], "", ""
    i = 0
    while i < len(text):
        joint = _JOINT.match(text, i)
        if text.startswith("PWN(", i) and not part:
            brackets += "P"
            i += 4
        elif joint is not None and "(" not in brackets:
            parts.append(part)
            part = ""
            i = joint.end()
        elif text[i] == ")" and brackets.endswith("P"):
            # Equal names get a number behind.
            brackets = brackets[:-1]
            i = _NUMBER.match(text, i + 1).end()  # type: ignore[union-attr]
        else:
            if text[i] == "(":
                brackets += "("
            elif text[i] == ")":
                brackets = brackets[:-1]
            part += text[i]
            i += 1
    parts.append(part)
    return [part for part in dict.fromkeys(parts) if part and not part.startswith(_OWN)]
