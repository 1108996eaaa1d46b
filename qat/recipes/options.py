"""What the settings of all recipes share: options with limits, to and from plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, field, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

from ..core.config import QuantConfig
from ..errors import QATError

Settings = TypeVar("Settings", bound="RecipeSettings")


def option(default: Any, text: str, *, choices: Sequence[str] | None = None, positive: bool = False) -> Any:
    """A setting with its documentation and its limits."""
    return field(default=default, metadata={"help": text, "choices": choices, "positive": positive})


class RecipeSettings:
    """Base of the settings of a recipe, which are a frozen dataclass with at least the fields below."""

    # The module in qat.recipes.
    recipe: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    seed: int
    seeds: tuple[int, ...] | None
    quant: QuantConfig

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value not in choices:
                raise QATError(f"{item.name}={value!r}: choose one of {', '.join(choices)}")
            if item.metadata.get("positive") and value is not None and not 0 < value < math.inf:
                raise QATError(f"{item.name}={value!r}: must be positive")
            if isinstance(value, float) and not value >= 0:
                raise QATError(f"{item.name}={value!r}: must be 0 or more")
        seeds = self.all_seeds()
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise QATError(f"seeds: {', '.join(map(str, seeds))}: must be different numbers from 0")

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds to run."""
        return (self.seed,) if self.seeds is None else self.seeds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file holds them."""
        plain = asdict(self)
        plain["seeds"] = None if self.seeds is None else list(self.seeds)
        plain["quant"] = self.quant.to_dict()
        return plain

    @classmethod
    def from_dict(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`; missing keys keep their defaults.

        Raises:
            QATError: For an unknown key, a value of the wrong type or outside its limits.
        """
        hints, known = get_type_hints(cls), [item.name for item in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise QATError(f"unknown setting {unknown[0]!r}; known settings: {', '.join(known)}")
        return cls(**{key: _typed(key, value, hints[key]) for key, value in values.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    if key == "quant":
        return value if isinstance(value, QuantConfig) else QuantConfig.from_dict({} if value is None else value)
    if key == "seeds" and isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return tuple(value)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise QATError(f"{key}: is too large for a float") from error
    # YAML reads 1e-3 (without a dot) as text.
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    allowed = getattr(hint, "__args__", (hint,))
    if type(value) not in allowed:
        names = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise QATError(f"{key}={value!r}: must be {names}")
    return value
