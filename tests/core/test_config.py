"""QuantConfig: what it accepts, how rules combine, YAML."""

import dataclasses
import pickle

import pytest
import yaml

from qat.core.config import QuantConfig, Rule, SiteConfig, matches
from qat.core.numerics import INT4, INT8
from qat.errors import QATError

EVERYTHING = QuantConfig(
    weight_format="int4",
    weight_granularity="tensor",
    weight_range="frozen",
    learn_scales=True,
    add_inputs="residual",
    pool_inputs=False,
    module_inputs=("maxpool", "mark*"),
    conv_transpose=True,
    head=("fc", "aux.*"),
    rules=(
        Rule("layer1", quantize=False),
        Rule("layer2.*", weight_format="int8", weight_granularity="channel", weight_range="follow", learn_scales=False),
    ),
)


def test_defaults_are_the_documented_scheme():
    assert QuantConfig() == QuantConfig(
        weight_format="int8",
        activation_format="int8",
        weight_granularity="channel",
        weight_range="follow",
        learn_scales=False,
        add_inputs="both",
        pool_inputs=True,
        module_inputs=(),
        conv_transpose=False,
        head=None,
        rules=(),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_format": "int7"}, "weight_format='int7': choose one of int8, int4"),
        ({"weight_format": None}, "weight_format=None: choose one of"),
        ({"weight_format": ["int8"]}, r"weight_format=\['int8'\]: choose one of"),
        ({"activation_format": "int4"}, "activation_format='int4': choose one of int8"),
        ({"weight_granularity": "row"}, "weight_granularity='row': choose one of channel, tensor"),
        ({"weight_range": "moving"}, "weight_range='moving': choose one of follow, frozen"),
        ({"add_inputs": "one"}, "add_inputs='one': choose one of both, residual, none"),
        ({"add_inputs": True}, "add_inputs=True: choose one of"),
        ({"learn_scales": "yes"}, "learn_scales='yes': must be true or false"),
        ({"learn_scales": 1}, "learn_scales=1: must be true or false"),
        ({"pool_inputs": None}, "pool_inputs=None: must be true or false"),
        ({"conv_transpose": "no"}, "conv_transpose='no': must be true or false"),
        ({"module_inputs": "maxpool"}, "module_inputs='maxpool': must be a list of globs"),
        ({"module_inputs": [1]}, r"module_inputs=\[1\]: must be a list of globs"),
        ({"head": "fc"}, "head='fc': must be a list of globs, empty for a model without a classifier"),
        ({"head": 5}, "head=5: must be a list of globs"),
        ({"head": False}, "head=False: must be a list of globs"),
        ({"head": {"fc": True}}, "head=.*: must be a list of globs"),
        ({"head": ["fc", ""]}, "head=.*: must be a list of globs"),
        ({"head": [3]}, "head=.*: must be a list of globs"),
        ({"rules": None}, "rules: must be a list of {match: glob, setting: value}"),
        ({"rules": 5}, "rules: must be a list of"),
        ({"rules": "layer1"}, "rules: must be a list of"),
        ({"rules": {"match": "layer1"}}, "rules: must be a list of"),
        ({"rules": ["layer1"]}, "rules: 'layer1' must be a mapping with the key 'match'"),
        ({"rules": [{"quantize": False}]}, "must be a mapping with the key 'match'"),
        ({"rules": [{"match": ""}]}, "rules: match='' must be a non-empty glob"),
        ({"rules": [{"match": 3}]}, "rules: match=3 must be a non-empty glob"),
        ({"rules": [{"match": "a", "quantize": "no"}]}, "quantize='no': must be true or false"),
        ({"rules": [{"match": "a", "weight_format": "fp8"}]}, "weight_format='fp8': choose one of"),
        ({"rules": [{"match": "a", "weight_range": "x"}]}, "weight_range='x': choose one of"),
        ({"rules": [{"match": "a", "learn_scales": 0}]}, "learn_scales=0: must be true or false"),
        ({"rules": [{"match": "a", "add_inputs": "none"}]}, "rules: unknown key 'add_inputs'; known keys: match, quantize"),
        ({"wieght_format": "int8"}, "config: unknown key 'wieght_format'; known keys: weight_format, activation_format"),
        ({3: 4}, "config: unknown key 3"),
    ],
)
def test_bad_setting_is_refused_by_name(settings, message):
    with pytest.raises(QATError, match=message):
        QuantConfig.from_dict(settings)


@pytest.mark.parametrize("settings", [None, ["weight_format"], "int8", 3])
def test_settings_must_be_a_mapping(settings):
    with pytest.raises(QATError, match="config must be a mapping of settings, not"):
        QuantConfig.from_dict(settings)


def test_replace_checks_names_and_values():
    assert QuantConfig().replace(add_inputs="none").add_inputs == "none"
    with pytest.raises(QATError, match="config: unknown key 'adds'"):
        QuantConfig().replace(adds="none")
    with pytest.raises(QATError, match="add_inputs='all'"):
        QuantConfig().replace(add_inputs="all")


def test_config_and_rules_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVERYTHING.add_inputs = "none"
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVERYTHING.rules[0].match = "x"
    assert hash(EVERYTHING) == hash(pickle.loads(pickle.dumps(EVERYTHING)))


def test_later_change_of_a_list_does_not_reach_the_config():
    head = ["fc"]
    config = QuantConfig(head=head)
    head.append("other")
    assert config.head == ("fc",)


# Rules.


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("layer1", "layer1", True),
        ("layer1", "layer1.0.conv1", True),
        ("layer1", "layer10", False),
        ("layer1", "body.layer1", False),
        ("*.conv1", "layer1.0.conv1", True),
        ("*.conv1", "conv1", False),
        ("layer?.0", "layer4.0.bn", True),
        ("layer[12]", "layer3", False),
        ("LAYER1", "layer1", False),
        ("*", "anything.at.all", True),
    ],
)
def test_glob_covers_a_module_and_everything_below(glob, path, expected):
    assert matches(glob, path) is expected


def test_site_without_rules_has_the_general_settings():
    config = QuantConfig(weight_format="int4", weight_granularity="tensor", weight_range="frozen", learn_scales=True)
    assert config.site("a.b") == SiteConfig(None, INT4, INT8, "tensor", "frozen", True)


def test_later_rule_wins_setting_by_setting():
    config = QuantConfig(
        rules=[
            {"match": "a", "quantize": False, "weight_format": "int4"},
            {"match": "a.b", "quantize": True},
            {"match": "*.b", "weight_granularity": "tensor"},
        ]
    )
    assert config.site("a.b") == SiteConfig(True, INT4, INT8, "tensor", "follow", False)
    assert config.site("a.c") == SiteConfig(False, INT4, INT8, "channel", "follow", False)
    assert config.site("c") == QuantConfig().site("c")


def test_rule_can_set_a_flag_back_to_false():
    config = QuantConfig(learn_scales=True, rules=[{"match": "a", "learn_scales": False}])
    assert config.site("a").learn_scales is False
    assert config.site("b").learn_scales is True


# YAML and plain values.


@pytest.mark.parametrize("config", [QuantConfig(), EVERYTHING, QuantConfig(head=())], ids=["default", "all", "no head"])
def test_round_trips(config, tmp_path):
    config.to_yaml(tmp_path / "config.yaml")
    assert QuantConfig.from_yaml(tmp_path / "config.yaml") == config
    assert QuantConfig.from_yaml(str(tmp_path / "config.yaml")) == config
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_dict_holds_plain_values_only():
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (str, bool, int, float)

    assert plain(EVERYTHING.to_dict())
    assert EVERYTHING.to_dict()["rules"][0] == {"match": "layer1", "quantize": False}


def test_no_head_and_head_to_be_found_differ_in_yaml(tmp_path):
    for head in (None, ()):
        QuantConfig(head=head).to_yaml(tmp_path / "config.yaml")
        assert QuantConfig.from_yaml(tmp_path / "config.yaml").head == head


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_empty_file_means_defaults(tmp_path, text):
    assert QuantConfig.from_yaml(write(tmp_path, text)) == QuantConfig()


def test_hand_written_file(tmp_path):
    text = "add_inputs: residual\nhead: [fc]\nrules:\n  - match: layer4.*\n    quantize: false\n"
    config = QuantConfig.from_yaml(write(tmp_path, text))
    assert config == QuantConfig(add_inputs="residual", head=("fc",), rules=(Rule("layer4.*", quantize=False),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add_inputs: [both", "config.yaml: not valid YAML"),
        ("- add_inputs\n", "config must be a mapping of settings, not list"),
        ("both\n", "config must be a mapping of settings, not str"),
        ("addinputs: both\n", "config: unknown key 'addinputs'"),
        ("rules:\n  - match: a\n    quantise: false\n", "rules: unknown key 'quantise'"),
        ("rules:\n", "rules: must be a list"),
        ("add_inputs: no\n", "add_inputs=False: choose one of"),  # YAML reads a bare no as false
    ],
)
def test_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(QATError, match=message):
        QuantConfig.from_yaml(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['echo unsafe > {path}']",
        "head: !!python/tuple [fc]",
        "rules: !!python/name:os.system",
    ],
)
def test_python_tags_are_refused_and_run_nothing(tmp_path, text):
    marker = tmp_path / "marker"
    with pytest.raises(QATError, match="not valid YAML: could not determine a constructor"):
        QuantConfig.from_yaml(write(tmp_path, text.format(path=marker)))
    assert not marker.exists()


def test_written_file_is_ordinary_yaml(tmp_path):
    EVERYTHING.to_yaml(tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert loaded["head"] == ["fc", "aux.*"]
    assert next(iter(loaded)) == "weight_format"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(QATError, match=r"missing\.yaml: cannot be read"):
        QuantConfig.from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QATError, match=r"binary\.yaml: cannot be read"):
        QuantConfig.from_yaml(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 20000)
    with pytest.raises(QATError, match=r"deep\.yaml: not valid YAML"):
        QuantConfig.from_yaml(tmp_path / "deep.yaml")
