"""From a recipe's name or file, and overrides, to a frozen Recipe; and back to YAML.

The file and the overrides become one ordered list of single assignments (``model.damping.factor`` <- 0.1), each
checked against the dataclasses (`keys.py`, `values.py`), then merged by OmegaConf into structured configs, which fill in
defaults and interpolations such as ``${oc.env:SCRATCH}`` (`interpolations.py` says which). The result is a dataclass that no
longer knows of OmegaConf, with ``~`` in its paths replaced by the home folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smoe_hpc.config import bounded_yaml, interpolations, keys, quantile_warning, renamed, rules, values
from smoe_hpc.config.recipe import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.files.paths import expanded

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
        overrides: ``key=value`` with dotted keys and YAML values: ``data.inputs=[-12,-6,0]``, ``model.damping=null``. Text
            is taken as it stands, where YAML would cut it (``data.store=data/heat #1``), unless it is quoted.

    Raises:
        ConfigError: unknown recipe or key (with the nearest), wrong type (with an example), an impossible value.

    Warns:
        UserWarning: the routing loss leaves its working range (`working_range.py`), or a key has another name now
            (`renamed.py`).
    """
    path = _find(str(name_or_path))
    try:
        text = bounded_yaml.read_text(path)
    except bounded_yaml.NotPlainError as error:
        raise ConfigError(f"{path}: {error}; give a recipe such as those in smoe_hpc/recipes") from None
    except (OSError, ValueError) as error:  # bytes that are no text
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    recipe = parse_recipe(text, str(path), overrides)
    quantile_warning.warn_outside(recipe)
    return recipe


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its YAML text (see `to_yaml`), changed by overrides.

    Args:
        text: YAML.
        where: what errors call it.
        overrides: as `load_recipe` takes them.

    Raises:
        ConfigError: as `load_recipe`.

    Warns:
        UserWarning: a key has another name now.
    """
    assignments = list(_flatten(_parsed(text, where)))
    assignments += [pair for override in overrides for pair in _flatten_override(override)]
    content: dict[str, Any] = {}
    for key, value in renamed.present(assignments):
        if key not in keys.all_keys():
            raise keys.unknown(key)
        interpolations.refuse_others(key, value)
        _assign(content, key, values.fitted(keys.all_keys()[key], value))
    return _finish(content, where)


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _find(name: str) -> Path:
    """The file of a packaged recipe or of a path."""
    path = Path(expanded(name))
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    if path.is_dir() and (path / "config.yaml").is_file():
        raise ConfigError(f"{name}: is the folder of a run; its recipe is {path / 'config.yaml'}")
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if looks_like_path and path.is_file():
        return path
    if looks_like_path and path.exists():
        raise ConfigError(f"{name}: is no regular file; remove it, or give a YAML file")
    if looks_like_path and path.stem not in recipe_names():
        raise ConfigError(f"{name}: no such file; give a YAML file or one of the recipes: {', '.join(recipe_names())}")
    rules.one_of("recipe", name, recipe_names())
    raise AssertionError("a known name has a file")


def _parsed(text: str, where: str) -> dict[str, Any]:
    """YAML as a mapping, interpolations left for later."""
    try:
        bounded_yaml.require_small(text)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except bounded_yaml.NotPlainError as error:
        raise ConfigError(f"{where}: {error}; give a recipe such as those in smoe_hpc/recipes") from None
    except (YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML ({problem})") from None
    except ValueError as error:  # a number of thousands of digits, a day that no month has
        raise ConfigError(f"{where}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: must hold keys and values such as `task: heat`; see smoe_hpc/recipes for examples")
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
    is_text = key in keys.all_keys() and keys.all_keys()[key].hint is str
    value = values.parse_text(key, text) if is_text else values.parse(key, text)
    if isinstance(value, dict) and value:
        yield from _flatten(value, f"{key}.")
    else:
        yield key, value


def _assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a section that was null begins anew, an empty mapping leaves one that is there as it is."""
    *sections, last = key.split(".")
    for part in sections:
        if not isinstance(content.get(part), dict):
            content[part] = {}
        content = content[part]
    if not (value == {} and isinstance(content.get(last), dict)):
        content[last] = value


def _finish(content: dict[str, Any], where: str) -> Recipe:
    """Dataclasses with defaults filled in; ConfigError where a key is missing or an interpolation leads nowhere."""
    try:
        config = OmegaConf.merge(OmegaConf.structured(Recipe), content)
        absent = OmegaConf.missing_keys(config)
        missing = [key for key in keys.all_keys() if key in absent]
        recipe = None if missing else OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {reason}; write the value out if it cannot be looked up") from None
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; add it, e.g. {keys.all_keys()[missing[0]].example}")
    assert isinstance(recipe, Recipe)
    return replace(
        recipe,
        data=replace(recipe.data, store=expanded(recipe.data.store)),
        run=replace(recipe.run, root=expanded(recipe.run.root)),
    )
