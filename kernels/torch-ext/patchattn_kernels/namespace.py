"""The namespace that our operators are registered in: a build of kernel-builder has its own, so that several load."""

try:
    from ._ops import add_op_namespace_prefix  # type: ignore[import-not-found, unused-ignore]  # in builds alone
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        """`patchattn::name`, in which `torch.ops` has an operator outside a build."""
        return f"patchattn::{name}"


__all__ = ["add_op_namespace_prefix"]
