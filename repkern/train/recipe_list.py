"""Recipes as lines of a table, and the schema as text: for `repkern recipes` and docs/recipes.md."""

from __future__ import annotations

import json
import typing
from fnmatch import fnmatch
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from repkern.models import default_block, list_models
from repkern.train.recipe import Recipe
from repkern.train.recipe_files import list_recipes, load_recipe
from repkern.train.recipe_schema import Field, fields_of, section_in

__all__ = ["RecipeLine", "SchemaLine", "block_of", "recipe_lines", "schema_lines"]


class RecipeLine(NamedTuple):
    """What a recipe trains, and what the paper reached with it: `source` and `top1` (percent) of none are empty."""

    name: str
    about: str
    network: str
    block: str
    data: str
    epochs: int
    optimizer: str
    source: str
    top1: float | None
    note: str


def recipe_lines(pattern: str = "*") -> list[RecipeLine]:
    """The shipped recipes whose names match a shell pattern, sorted by name."""
    return [_line(load_recipe(name)) for name in list_recipes() if fnmatch(name, pattern)]


def _line(recipe: Recipe) -> RecipeLine:
    paper = recipe.paper
    return RecipeLine(
        recipe.name,
        recipe.about,
        recipe.model.name,
        block_of(recipe),
        recipe.data.name,
        recipe.train.epochs,
        recipe.optimizer.name,
        "" if paper is None else paper.source,
        None if paper is None else paper.top1,
        "" if paper is None else paper.note,
    )


def block_of(recipe: Recipe) -> str:
    """The blocks of a recipe's network in a few words: "orepa (scaling scalar)", "conv_bn, OREPAConv2d"."""
    model = recipe.model
    kind = model.block
    if kind is None:
        kind = default_block(model.name) if model.name in list_models() else "conv_bn"
    words = [_with_options(kind, model.options.get("block_options") or {})]
    if model.replace is not None:
        words.append(_with_options(model.replace.block, getattr(model.replace, "options", {})))
    return ", ".join(words)


def _with_options(name: str, options: dict[str, Any]) -> str:
    shown = [f"{key} {'+'.join(value) if isinstance(value, list) else value}" for key, value in options.items()]
    return f"{name} ({', '.join(shown)})" if shown else name


class SchemaLine(NamedTuple):
    """One field: its dotted name, what values it takes, its default ("" where it must be given), what it means."""

    name: str
    kind: str
    default: str
    description: str


def schema_lines(section: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, list[SchemaLine]]]:
    """(name, first line of its description, fields) of every section, in the order of the schema."""
    own = [field for field in fields_of(section, prefix) if "." not in field.name.removeprefix(prefix)]
    plain = [_field_line(field) for field in own if section_in(field.annotation) is None]
    found = [(prefix.rstrip("."), (section.__doc__ or "").strip().split("\n")[0], plain)]
    for field in own:
        inner = section_in(field.annotation)
        if inner is not None:
            found += schema_lines(inner, f"{field.name}.")
    return found


def _field_line(field: Field) -> SchemaLine:
    default = "" if field.default is PydanticUndefined else json.dumps(_jsonable(field.default))
    return SchemaLine(field.name, kind_of(field.annotation), default, field.description)


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def kind_of(annotation: Any) -> str:
    """An annotation in words: "number", "list of text", "sgd or adamw"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is typing.Annotated:
        return kind_of(arguments[0])
    if origin is tuple:
        inner = kind_of(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} x {inner}"
    if origin is dict:
        return f"mapping to {kind_of(arguments[1])}"
    if arguments:
        return " or ".join(dict.fromkeys(kind_of(option) for option in arguments))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (
            str(annotation.model_fields["name"].default) if "name" in annotation.model_fields else annotation.__name__
        )
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "null",
        Any: "any value",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
