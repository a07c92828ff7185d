"""What every configuration is made of."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from mp3d.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Frozen, and deaf to unknown fields: a typo is an error wherever the config comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    SETS: ClassVar[dict[str, frozenset[str]]] = {}
    """Of a field, those that it sets: overriding it overrides them, but where they are overridden as well."""

    def override(self, changes: dict[str, Any]) -> Self:
        """Copy with dotted fields replaced, e.g. ``{"optim.lr": 0.01}``; every value is validated again.

        Raises:
            ConfigError: a path that names no field; the message lists the fields there.
        """
        tree = self.model_dump()
        for path, value in changes.items():
            *parents, leaf = path.split(".")
            node, owner = tree, self
            for name in parents:
                node = node.get(name) if isinstance(node, dict) else None
                owner = getattr(owner, name, None)
            if not isinstance(node, dict) or leaf not in node:
                known = ", ".join(sorted(node)) if isinstance(node, dict) else "none"
                raise ConfigError(f"{type(self).__name__} has no field {path!r}; fields there: {known}")
            node[leaf] = value
            sets = owner.SETS.get(leaf, frozenset()) if isinstance(owner, Config) and value is not None else ()
            for name in sets:
                if ".".join([*parents, name]) not in changes:
                    node.pop(name, None)
        return type(self).model_validate(tree)
