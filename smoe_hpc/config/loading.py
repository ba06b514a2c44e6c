"""From a recipe's name or file, and overrides, to a frozen Recipe; and back to YAML.

The file and the overrides become one ordered list of single assignments (``model.damping.factor`` <- 0.1), each
checked against the dataclasses, then merged by OmegaConf into structured configs, which fill in defaults and
interpolations such as ``${oc.env:SCRATCH}``. The result is a plain dataclass that no longer knows of OmegaConf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smoe_hpc.config import checks, values, working_range
from smoe_hpc.config.schema import Recipe
from smoe_hpc.errors import ConfigError

RECIPES = Path(str(resources.files("smoe_hpc"))) / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """What a packaged recipe is: the first line of the comment on its top."""
    with open(RECIPES / f"{name}.yaml", encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change it.

    Args:
        name_or_path: one of :func:`recipe_names`, or a YAML file (such as the config.yaml of a run).
        overrides: ``key=value`` with dotted keys and YAML values: ``data.inputs=[-12,-6,0]``, ``model.damping=null``.

    Raises:
        ConfigError: unknown recipe or key (with the nearest), wrong type (with an example), an impossible value.

    Warns:
        UserWarning: the routing loss leaves its working range (`working_range.py`).
    """
    path = _find(str(name_or_path))
    assignments = list(_flatten(_read(path)))
    assignments += [pair for override in overrides for pair in _flatten_override(override)]
    content: dict[str, Any] = {}
    for key, value in assignments:
        if key not in values.known():
            raise values.unknown(key)
        _assign(content, key, _fitted(key, value))
    recipe = _finish(content, path)
    working_range.warn_outside(recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _find(name: str) -> Path:
    """The file of a packaged recipe or of a path."""
    path = Path(name)
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    if path.is_dir() and (path / "config.yaml").is_file():
        raise ConfigError(f"{name}: is the folder of a run; its recipe is {path / 'config.yaml'}")
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if looks_like_path and path.is_file():
        return path
    if looks_like_path and path.stem not in recipe_names():
        raise ConfigError(f"{name}: no such file; give a YAML file or one of the recipes: {', '.join(recipe_names())}")
    checks.known("recipe", name, recipe_names())
    raise AssertionError("a name that is known has a file")


def _read(path: Path) -> dict[str, Any]:
    """The YAML file as a mapping, interpolations left for later."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{where}: not valid YAML ({problem})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values such as `task: heat`; see smoe_hpc/recipes for examples")
    return {str(key): value for key, value in content.items()}


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Single assignments in order; an empty mapping stays one (a section with its defaults)."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flatten_override(override: str) -> Iterator[tuple[str, Any]]:
    """``key=value`` as assignments: one, or several where the value is a mapping."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not key.replace(".", "").replace("_", "").isalnum():
        raise ConfigError(f"{override!r}: an override is key=value with a dotted key, e.g. training.batch=64")
    hint = values.known()[key].hint if key in values.known() else None
    value = values.parse(key, text)
    if hint is str and (isinstance(value, (int, float)) or not text.strip()):
        value = text.strip()  # 10:20 is a range of runs here, not the 620 that YAML makes of it
    if isinstance(value, dict) and value:
        yield from _flatten(value, f"{key}.")
    else:
        yield key, value


def _fitted(key: str, value: Any) -> Any:
    """The value as the key's declared type; ConfigError if it is of another."""
    known = values.known()[key]
    if isinstance(value, str) and "${" in value:
        return value  # an interpolation: its type shows when it is resolved
    if known.section is not None and value == {}:
        return {}
    try:
        return values.fit(known.hint, value)
    except ValueError:
        pass
    quoted = repr(value) if isinstance(value, str) else values.shown(value)
    choices = [str(choice) for member in values.members(known.hint) for choice in getattr(member, "__args__", ())]
    guess = checks.nearest(value, choices) if isinstance(value, str) else None
    hinted = f"did you mean {guess}?" if guess else f"e.g. {values.example(known)}"
    raise ConfigError(f"{key}={quoted}: expected {values.expected(known)}; {hinted}")


def _assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a section that was null begins anew, an empty mapping leaves one that is there as it is."""
    *sections, last = key.split(".")
    for part in sections:
        if not isinstance(content.get(part), dict):
            content[part] = {}
        content = content[part]
    if not (value == {} and isinstance(content.get(last), dict)):
        content[last] = value


def _finish(content: dict[str, Any], path: Path) -> Recipe:
    """Plain dataclasses, defaults filled in, with what is missing or cannot be resolved named."""
    try:
        config = OmegaConf.merge(OmegaConf.structured(Recipe), content)
        absent = OmegaConf.missing_keys(config)
        missing = [key for key in values.known() if key in absent]
        recipe = None if missing else OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: {reason}; write the value out if it cannot be looked up") from None
    if missing:
        example = values.example(values.known()[missing[0]])
        raise ConfigError(f"{path}: {missing[0]} is missing; add it, e.g. {example}")
    assert isinstance(recipe, Recipe)
    return recipe
