"""Strict settings: typo-proof models, plugins that are their own settings, all errors at once."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
)
from pydantic_core import ErrorDetails
from typing_extensions import Self

from trt_kd.errors import ConfigError
from trt_kd.registry import Registry

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that becomes a folder's, or a part of it: none leads out of its folder."""


def _plain_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("write it as http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address holds no key: name its variable as key_env")
    return url.rstrip("/")


ServerAddress = Annotated[str, Field(exclude=True), AfterValidator(_plain_address)]
"""Where an OpenAI-compatible API begins: no part of a run's identity or manifest, and no key in
it."""
KeyVariable = Annotated[str | None, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", exclude=True)]
"""Environment variable that holds a server's key, which is never stored."""


class StrictModel(BaseModel):
    """Frozen, typo-proof settings; the string under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Plugin(StrictModel):
    """A member of a family, which is its own settings; ``kind`` is its registered name."""

    kind: str


class StageConfig(StrictModel):
    """Settings of one stage; with the keys of its inputs they identify its work."""

    stage: ClassVar[str]
    """Name of the stage."""
    version: ClassVar[int] = 1
    """Raised when the stage's code would give another result for the same settings."""

    def outside(self) -> dict[str, str]:
        """Fingerprints of data these settings name but do not hold, such as text files."""
        return {}

    def rehearsal(self) -> Self:
        """The same settings with as little work as still passes through every line."""
        return self


P = TypeVar("P", bound=Plugin)
M = TypeVar("M", bound=BaseModel)


def build_plugin(registry: Registry[type[Plugin]], value: object) -> object:
    """Turn ``"name"`` or ``{"kind": "name", ...}`` into the plugin registered under that name."""
    if isinstance(value, Plugin):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError(f"write a {registry.what} as its name or as a mapping with 'kind'")
    try:
        member = registry.load(str(value["kind"]))
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if not (isinstance(member, type) and issubclass(member, Plugin)):
        raise ValueError(f"{value['kind']!r} is no {registry.what}: derive its class from Plugin")
    return member.model_validate(dict(value))


def plugin_field(registry: Registry[Any], base: type[P]) -> Any:
    """Annotation of a field that holds a plugin of ``registry``, options and all."""
    builder = BeforeValidator(partial(build_plugin, registry))
    return Annotated[SerializeAsAny[base], builder]  # type: ignore[misc, valid-type]


def validate(model: type[M], value: object, *, where: str) -> M:
    """Validate ``value`` as ``model``.

    Raises:
        ConfigError: naming every problem by its dotted path below ``where``.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{where}: {len(problems)} problem(s){lines}") from error


def _problem(detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"]) or "(top level)"
    message = detail["msg"].removeprefix("Value error, ").replace("\n  hint: ", "; ")
    value = detail["input"]
    shown = "" if isinstance(value, Mapping | list | BaseModel) else f", got {value!r}"
    return f"{path}: {message}{shown}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: if the file is absent, is not YAML, repeats a key or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start:,})",
            hint="convert it, for instance with iconv -t utf-8",
        ) from error
    loaded = _loaded(text, str(path))
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else type(loaded).__name__
        raise ConfigError(
            f"{path} holds {found}, not a mapping of settings",
            hint="write settings as lines of the form key: value",
        )
    return loaded


def _loaded(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where} is not valid YAML: {reason}",
            hint="indent with spaces, close every bracket, quote values with special characters",
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the mapping, or say which key stands twice."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # may be overridden: that is its use
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain value", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def apply_overrides(settings: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return ``settings`` with every ``dotted.key=value`` applied; values are YAML.

    Raises:
        ConfigError: if an override is not of that form or reaches into a plain value.
    """
    result: dict[str, Any] = _copied(settings)
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, last = path.split(".")
        if not equals or not all([*parents, last]):
            raise ConfigError(
                f"{override!r} is not an override", hint="write it as dotted.key=value"
            )
        value = _loaded(text, f"override {override!r}")
        place: Any = result
        for parent in parents:
            place = _child(place, parent, override)
        if isinstance(place, list):
            place[_index(place, last, override)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise _plain_value(override, last)
    return result


def _child(place: Any, name: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, name, override)]
    if not isinstance(place, dict):
        raise _plain_value(override, name)
    if place.get(name) is None:
        place[name] = {}
    return place[name]


def _plain_value(override: str, name: str) -> ConfigError:
    return ConfigError(
        f"override {override!r} reaches into a plain value at {name!r}",
        hint="end the key before it, or give a mapping such as name={kind: ...}",
    )


def _index(place: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise ConfigError(
            f"override {override!r}: {name!r} is no index of a list of {len(place)}",
            hint=f"indices run from 0 to {len(place) - 1}",
        )
    return int(name)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
