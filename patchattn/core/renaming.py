"""Names of modules as they are seen from a model, from a part of it, or from an object around it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """How names change from one object to another that holds it, or that it holds; at most one of both is not empty.

    Attributes:
        added: what stands before a name when seen from the object around.
        removed: what no longer stands before it when seen from the object inside.
    """

    added: str = ""
    removed: str = ""

    @classmethod
    def of(cls, old: str, new: str) -> "Renaming":
        """The renaming that makes `new` of `old`, two names of one module; ValueError if there is none."""
        if old == new:
            return cls()
        if new.endswith(f".{old}"):
            return cls(added=new[: -len(old)])
        if old.endswith(f".{new}"):
            return cls(removed=old[: -len(new)])
        raise ValueError(f"{old!r} and {new!r} are not names of one module, seen from two objects.")

    def get(self, name: str) -> str | None:
        """The new name; `None` for what is not in the object."""
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None

    def __call__(self, name: str) -> str:
        """The new name; ValueError for what is not in the object."""
        found = self.get(name)
        if found is None:
            raise ValueError(
                f"{name!r} was changed too, and is outside of the object given, {self.removed.rstrip('.')!r}: give the "
                "whole model."
            )
        return found
