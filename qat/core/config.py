"""What is quantized, and how: :class:`QuantConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import QATError
from ..support.files import write_text
from .formats import FORMATS, Format

_CHOICES = {
    "weight_format": tuple(FORMATS),
    "activation_format": ("int8",),
    "weight_granularity": ("channel", "tensor"),
    "weight_range": ("follow", "frozen"),
    "add_inputs": ("both", "residual", "none"),
    "placement": ("all", "fast"),
}
_FLAGS = ("quantize", "gate_inputs", "pool_inputs", "conv_transpose", "learn_scales")


def _check(name: str, value: Any) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise QATError(f"{name}={value!r}: choose one of {', '.join(_CHOICES[name])}")
    if name in _FLAGS and not isinstance(value, bool):
        raise QATError(f"{name}={value!r}: must be true or false")


@dataclass(frozen=True)
class Rule:
    """Settings for the sites whose path matches a glob.

    Attributes:
        match: Shell-style pattern on module paths, e.g. ``"features.0.*"``. A pattern also covers everything below a
            module it matches. It must match something.
        quantize: ``False`` leaves the matching modules in float; ``True`` quantizes them, a head found by tracing
            included.
        weight_format: As in :class:`QuantConfig`; ``None`` keeps the general setting.
        weight_granularity: Likewise.
        weight_range: Likewise.
        learn_scales: Likewise.
    """

    match: str
    quantize: bool | None = None
    weight_format: str | None = None
    weight_granularity: str | None = None
    weight_range: str | None = None
    learn_scales: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise QATError(f"rules: match={self.match!r} must be a non-empty glob")
        for item in fields(self):
            if item.name != "match" and getattr(self, item.name) is not None:
                _check(item.name, getattr(self, item.name))


@dataclass(frozen=True)
class SiteConfig:
    """The settings of one module after all rules."""

    quantize: bool | None
    weight_format: Format
    activation_format: Format
    weight_granularity: str
    weight_range: str
    learn_scales: bool


@dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and how.

    Attributes:
        weight_format: ``"int8"`` or, for training and analysis only, ``"int4"``.
        activation_format: ``"int8"``.
        weight_granularity: ``"channel"``: one scale an output channel (axis 0); ``"tensor"``: one scale a weight.
        weight_range: ``"follow"``: the range is the maximum of the current weight; ``"frozen"``: as calibrated.
        learn_scales: Train the ranges by the LSQ gradient, weights and activations. With SGD a learning rate moves the scale
            as it does where the scale is the parameter. Adam, which moves whatever it trains by its rate, moves ``amax`` by
            it: ``qmax`` times less than the scale itself.
        placement: ``"all"``: every layer but the head, and every residual Add. ``"fast"`` leaves in float what made
            TensorRT's engines slower when it was measured: Adds of which no quantized layer reads an operand or the sum, as
            in transformers that normalize before each layer, and the convolution that cuts an image into patches. A rule
            with ``quantize=True`` overrides it.
        add_inputs: Residual Adds: ``"both"`` inputs, only the ``"residual"`` one (the other fuses into its
            convolution), or ``"none"``.
        gate_inputs: Quantize both inputs of the product of a tensor and a gate computed from its average, as in
            squeeze-and-excitation. With the product in float, TensorRT runs the convolution before it in float, too.
        pool_inputs: Quantize what average pooling reads.
        module_inputs: Globs of further modules whose input is quantized: max pooling, instance normalization, or an
            ``nn.Identity`` that marks a tensor in a ``forward``. Unlike a rule's, such a glob covers what it matches, not what
            lies below.
        conv_transpose: Quantize transposed convolutions, with one scale a weight. TensorRT runs them in half precision
            either way.
        head: Globs of the classifier layers to leave in float. ``None`` finds them, ``()`` means that there is none.
        rules: Settings by module path. Later rules win.

    Raises:
        QATError: For a value that is not one of these.

    Example:
        >>> config = QuantConfig(add_inputs="residual", rules=[{"match": "layer4", "quantize": False}])
        >>> QuantConfig.from_dict(config.to_dict()) == config
        True
    """

    weight_format: str = "int8"
    activation_format: str = "int8"
    weight_granularity: str = "channel"
    weight_range: str = "follow"
    learn_scales: bool = False
    placement: str = "all"
    add_inputs: str = "both"
    gate_inputs: bool = True
    pool_inputs: bool = True
    module_inputs: tuple[str, ...] = ()
    conv_transpose: bool = False
    head: tuple[str, ...] | None = None
    rules: tuple[Rule, ...] = field(default=())

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name))
        if not _is_globs(self.module_inputs):
            raise QATError(f"module_inputs={self.module_inputs!r}: must be a list of globs")
        object.__setattr__(self, "module_inputs", tuple(self.module_inputs))
        if self.head is not None:
            if not _is_globs(self.head):
                raise QATError(f"head={self.head!r}: must be a list of globs, empty for a model without a classifier")
            object.__setattr__(self, "head", tuple(self.head))
        if not _is_list(self.rules):
            raise QATError("rules: must be a list of {match: glob, setting: value}")
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in self.rules))

    def site(self, path: str) -> SiteConfig:
        """The settings of the module at ``path`` after all rules that match it."""
        merged: dict[str, Any] = {
            "quantize": None,
            "weight_format": self.weight_format,
            "weight_granularity": self.weight_granularity,
            "weight_range": self.weight_range,
            "learn_scales": self.learn_scales,
        }
        for rule in self.rules:
            if matches(rule.match, path):
                merged.update({k: v for k in merged if (v := getattr(rule, k)) is not None})
        merged["weight_format"] = FORMATS[merged["weight_format"]]
        return SiteConfig(activation_format=FORMATS[self.activation_format], **merged)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what a checkpoint or a YAML file holds."""
        plain = asdict(self)
        plain["module_inputs"] = list(self.module_inputs)
        plain["head"] = None if self.head is None else list(self.head)
        plain["rules"] = [{k: v for k, v in rule.items() if v is not None} for rule in plain["rules"]]
        return plain

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> QuantConfig:
        """Inverse of :meth:`to_dict`; missing keys keep their defaults.

        Raises:
            QATError: For an unknown key or an invalid value.
        """
        if not isinstance(settings, Mapping):
            raise QATError(f"config must be a mapping of settings, not {type(settings).__name__}")
        return cls(**_known(settings, cls, "config"))

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings to ``path``.

        Raises:
            QATError: If it cannot be written; the file of before stays whole.
        """
        import yaml

        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> QuantConfig:
        """Read settings from ``path`` (``yaml.safe_load``).

        Raises:
            QATError: For a file that is no YAML mapping, an unknown key or an invalid value.
        """
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise QATError(f"{path}: cannot be read: {error}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise QATError(f"{path}: not valid YAML: {error}") from error
        return cls.from_dict({} if settings is None else settings)

    def replace(self, **changes: Any) -> QuantConfig:
        """A copy with some settings changed."""
        return replace(self, **_known(changes, type(self), "config"))


def matches(glob: str, path: str) -> bool:
    """Whether ``glob`` names the module at ``path`` or one above it."""
    return fnmatchcase(path, glob) or fnmatchcase(path, glob + ".*")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_globs(value: Any) -> bool:
    return _is_list(value) and all(isinstance(glob, str) and glob for glob in value)


def _known(settings: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    names = [item.name for item in fields(cls)]
    unknown = [key for key in settings if key not in names]
    if unknown:
        raise QATError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(names)}")
    return dict(settings)


def _rule(rule: Rule | Mapping[str, Any]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping) or "match" not in rule:
        raise QATError(f"rules: {rule!r} must be a mapping with the key 'match'")
    return Rule(**_known(rule, Rule, "rules"))
