"""Settings: strict, all problems at once, plugins that keep their options, overrides, YAML."""

from abc import ABC
from typing import Literal

import pytest
from pydantic import PositiveInt

from trt_kd.config import (
    Plugin,
    StageConfig,
    StrictModel,
    apply_overrides,
    plugin_field,
    read_yaml,
    validate,
)
from trt_kd.errors import ConfigError
from trt_kd.registry import Registry


class Shape(Plugin, ABC):
    """A family of this test."""


class Circle(Shape):
    """A round one."""

    kind: Literal["circle"] = "circle"
    radius: PositiveInt = 1


class Box(Shape):
    """One with two sides."""

    kind: Literal["box"] = "box"
    width: PositiveInt
    inner: "list[int]" = []


SHAPES = Registry("shape", {"circle": f"{__name__}:Circle", "box": f"{__name__}:Box"})


class Drawing(StrictModel):
    """Settings with one plugin and a list of them."""

    main: plugin_field(SHAPES, Shape) = Circle()
    others: list[plugin_field(SHAPES, Shape)] = []
    count: PositiveInt = 1
    ratio: float = 0.5


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let the registry find this module by its name, however pytest imported it."""
    import sys

    module = type(sys)(__name__)
    vars(module).update(Shape=Shape, Circle=Circle, Box=Box)
    monkeypatch.setitem(sys.modules, __name__, module)


def problems(value: object) -> list[str]:
    with pytest.raises(ConfigError) as it:
        validate(Drawing, value, where="mine.yaml")
    first, *rest = str(it.value).splitlines()
    assert first == f"mine.yaml: {len(rest)} problem(s)"
    return [line.strip() for line in rest]


def test_all_problems_are_told_at_once_each_by_its_dotted_path():
    found = problems(
        {
            "main": {"kind": "box", "width": -3},
            "others": ["circle", {"kind": "box", "width": "wide"}],
            "count": "many",
            "coutn": 2,
        }
    )
    assert [line.partition(":")[0] for line in found] == [
        "main.width",
        "others.1.width",
        "count",
        "coutn",
    ]
    assert found[0].endswith("got -3")
    assert "got 'many'" in found[2]


def test_an_unknown_key_is_an_error_not_ignored():
    assert problems({"ratoi": 1}) == ["ratoi: Extra inputs are not permitted, got 1"]


def test_an_unknown_member_names_the_choices_and_the_nearest():
    (line,) = problems({"main": "cirle"})
    assert line.startswith("main: unknown shape 'cirle'; available: circle, box; did you mean 'cir")


def test_an_option_of_another_member_is_an_error():
    (line,) = problems({"main": {"kind": "circle", "width": 3}})
    assert line.startswith("main.width: Extra inputs")


@pytest.mark.parametrize("value", [3, None, ["circle"], {"radius": 3}])
def test_what_names_no_member_says_how_to_write_one(value):
    (line,) = problems({"main": value})
    assert "as its name or as a mapping with 'kind'" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value):
    (line,) = problems({"ratio": value})
    assert line.startswith("ratio: ")


def test_something_else_than_a_mapping_is_a_problem_of_the_top_level():
    (line,) = problems([1, 2])
    assert line.startswith("(top level): ")


@pytest.mark.parametrize("value", ["circle", {"kind": "circle"}, Circle()])
def test_a_member_is_written_as_a_name_a_mapping_or_itself(value):
    assert Drawing(main=value).main == Circle()


def test_a_users_own_class_is_a_member_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_shapes.py").write_text(
        "from typing import Literal\n"
        f"from {__name__} import Shape\n"
        "class Star(Shape):\n"
        "    kind: Literal['my_shapes:Star'] = 'my_shapes:Star'\n"
        "    points: int = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    drawing = validate(Drawing, {"main": {"kind": "my_shapes:Star", "points": 7}}, where="mine")
    dumped = drawing.model_dump(mode="json")
    assert dumped["main"] == {"kind": "my_shapes:Star", "points": 7}
    assert Drawing.model_validate(dumped).model_dump(mode="json") == dumped


def test_what_is_no_member_of_the_family_is_an_error():
    (line,) = problems({"main": "json:loads"})
    assert line.startswith("main: 'json:loads' is no shape")
    (line,) = problems({"main": "trt_kd.config:Plugin"})
    assert "instance of Shape" in line


def test_the_options_of_a_plugin_survive_a_round_trip():
    drawing = Drawing(main={"kind": "box", "width": 3}, others=[{"kind": "circle", "radius": 9}])
    dumped = drawing.model_dump(mode="json")
    assert dumped["main"] == {"kind": "box", "width": 3, "inner": []}
    assert dumped["others"] == [{"kind": "circle", "radius": 9}]
    assert Drawing.model_validate(dumped) == drawing
    assert Drawing.model_validate_json(drawing.model_dump_json()) == drawing


def test_settings_are_frozen_down_to_their_plugins():
    drawing = Drawing()
    with pytest.raises(ValueError, match="frozen"):
        drawing.count = 2
    with pytest.raises(ValueError, match="frozen"):
        drawing.main.radius = 2


def test_the_string_below_a_field_is_its_documentation():
    class Documented(StrictModel):
        """Settings."""

        size: int = 1
        """How large."""

    assert Documented.model_fields["size"].description == "How large."


def test_a_default_is_validated_too():
    class Wrong(StrictModel):
        """Settings with a default that breaks its own rule."""

        size: PositiveInt = -1

    with pytest.raises(ConfigError, match="size: Input should be greater than 0"):
        validate(Wrong, {}, where="wrong")


def test_a_stage_without_outside_data_has_no_fingerprints_and_rehearses_as_it_is():
    class Nothing(StageConfig):
        """A stage."""

        stage = "nothing"

    assert Nothing().outside() == {}
    assert Nothing().rehearsal() == Nothing()


# --- overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("count=3", {"count": 3}),
        ("main.radius=2", {"main": {"kind": "circle", "radius": 2}}),
        ("others.0.width=7", {"others": [{"kind": "box", "width": 7}]}),
        ("others.0=circle", {"others": ["circle"]}),
        ("new.deep.key=[1, 2]", {"new": {"deep": {"key": [1, 2]}}}),
        ("empty.key=true", {"empty": {"key": True}}),
        ("text=a=b", {"text": "a=b"}),
        ("text=", {"text": None}),
        ("ratio=1e-4", {"ratio": "1e-4"}),
        ("ratio=1.0e-4", {"ratio": 1e-4}),
    ],
)
def test_an_override_replaces_one_value_and_nothing_else(override, expected):
    settings = {
        "count": 1,
        "empty": None,
        "main": {"kind": "circle", "radius": 1},
        "others": [{"kind": "box", "width": 1}],
    }
    assert apply_overrides(settings, [override]) == settings | expected


def test_overrides_do_not_touch_what_they_are_applied_to():
    settings = {"main": {"radius": 1}, "others": [{"width": 1}]}
    apply_overrides(settings, ["main.radius=2", "others.0.width=2"])
    assert settings == {"main": {"radius": 1}, "others": [{"width": 1}]}


def test_the_last_override_of_a_value_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_a_number_in_yaml_1_1_dress_still_reaches_a_float_field():
    settings = apply_overrides({}, ["ratio=1e-4"])
    assert validate(Drawing, settings, where="mine.yaml").ratio == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count", "is not an override"),
        ("=3", "is not an override"),
        ("count.deep=1", "plain value"),
        ("count.deep.deeper=1", "plain value"),
        ("others.1=circle", "no index of a list of 1"),
        ("others.first.width=2", "no index of a list of 1"),
        ("others.-1=circle", "no index of a list of 1"),
        ("count=[1", "is not valid YAML"),
        ("a..b=1", "is not an override"),
        ("a.=1", "is not an override"),
    ],
)
def test_an_override_that_fits_nowhere_is_an_error(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"count": 1, "others": [{"width": 1}]}, [override])


# --- YAML ---------------------------------------------------------------------------------------


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_yaml_is_read_as_a_mapping(yaml_file):
    assert read_yaml(yaml_file("a: 1\nb: {c: [x, 2]}\n")) == {"a": 1, "b": {"c": ["x", 2]}}


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3\n", "a: {b: 1, b: 2}\n", "b:\n- {a: 1, a: 1}\n"]
)
def test_a_key_that_stands_twice_is_an_error(yaml_file, text):
    with pytest.raises(ConfigError, match=r"key '[ab]' stands twice.*line \d+"):
        read_yaml(yaml_file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "is not valid YAML"),
        ("- 1\n- 2\n", "holds list, not a mapping"),
        ("", "holds nothing, not a mapping"),
        ("just words", "holds str, not a mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("? [1, 2]\n: 3\n", "is not valid YAML"),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_an_error_with_the_files_name(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message) as it:
        read_yaml(yaml_file(text))
    assert "recipe.yaml" in str(it.value)


def test_an_absent_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_anchors_are_expanded(yaml_file):
    assert read_yaml(yaml_file("a: &x {k: 1}\nb: *x\n")) == {"a": {"k": 1}, "b": {"k": 1}}


def test_merge_keys_are_expanded(yaml_file):
    text = "a: &x {k: 1, m: 2}\nb: {<<: *x, k: 3}\n"
    assert read_yaml(yaml_file(text))["b"] == {"k": 3, "m": 2}
