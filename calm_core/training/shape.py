"""From the sizes of a section of params.yaml to the shape of a model."""

import dataclasses
from typing import Any, TypeVar

Shape = TypeVar("Shape")


def shape_from(shape: type[Shape], sizes: Any, **others: Any) -> Shape:
    """A ``shape``, a dataclass, whose fields are the attributes of ``sizes`` of the same names, and ``others``.

    No default of the dataclass is used: defaults are the published models', and a run's sizes stand in params.yaml.

    Raises:
        AttributeError: ``sizes`` lacks a field that is not among ``others``.
    """
    names = {field.name for field in dataclasses.fields(shape)}  # type: ignore[arg-type]
    return shape(**{name: getattr(sizes, name) for name in names - others.keys()}, **others)
