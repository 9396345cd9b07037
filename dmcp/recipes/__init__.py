"""Named recipes: the paper's, and small ones; and the paper's results."""

from __future__ import annotations

from dmcp.errors import ConfigError
from dmcp.recipes.paper import PAPER_RECIPES
from dmcp.recipes.published import PUBLISHED, PublishedResult
from dmcp.recipes.recipe import Recipe
from dmcp.recipes.small import SMALL_RECIPES

__all__ = ["PUBLISHED", "PublishedResult", "Recipe", "get", "names"]

_RECIPES = {**SMALL_RECIPES, **PAPER_RECIPES}


def names() -> tuple[str, ...]:
    """All recipes: ``"digits"``, ``"cifar"``, and ``"<network>-<budget>"`` for the paper's."""
    return tuple(_RECIPES)


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; there are {', '.join(_RECIPES)}")
    return _RECIPES[name]
