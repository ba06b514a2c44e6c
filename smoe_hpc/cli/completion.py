"""What a shell completes: names of recipes, and their keys in changes."""

from __future__ import annotations

from collections.abc import Iterator


def recipe_argument(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of recipes that begin so, each with what it is."""
    from smoe_hpc.config import recipe_names, recipe_summary

    yield from ((name, recipe_summary(name)) for name in recipe_names() if name.startswith(incomplete))


def override_argument(incomplete: str) -> Iterator[tuple[str, str]]:
    """Changes that begin so: ``key=`` with its meaning, then ``key=value`` where the values are a few."""
    from smoe_hpc.config.keys import all_keys, as_override

    name, equals, _ = incomplete.partition("=")
    if equals:
        choices = all_keys()[name].choices if name in all_keys() else []
        written = (f"{name}={as_override(choice)}" for choice in choices)
        yield from ((text, "") for text in written if text.startswith(incomplete))
        return
    for key in all_keys().values():
        if key.section is None and key.name.startswith(incomplete):
            yield f"{key.name}=", key.meaning
