"""Triton's interpreter in a quarter of the time: most of it goes into Python objects that it makes
anew for each operation. A process that this was called in only interprets."""

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter


def quicken() -> None:
    _patch_language_once()
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    core.block_type.__hash__ = core.pointer_type.__hash__ = core.dtype.__hash__
    # Whether integers overflow, of which it then says nothing.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    _keep_shapes()
    _type_tuples_when_asked()


def _patch_language_once() -> None:
    """Not at each call of a device function."""
    patch_language, patched, seen = interpreter._patch_lang, set[Any](), set[Any]()
    scope = Mock()  # whose restore() undoes nothing

    def patch_once(kernel: Callable[..., Any]) -> Mock:
        if kernel not in seen:
            seen.add(kernel)
            known = kernel.__globals__.values()
            modules = {one for one in (language, language.core) if any(one is it for it in known)}
            if not modules <= patched:
                patched.update(modules)
                patch_language(kernel)
        return scope

    interpreter._patch_lang = patch_once


def _keep_shapes() -> None:
    """What blocks and tensors hold besides their values is worked out once for each shape, and
    equal shapes are not broadcast to each other."""
    block, tensor = core.block_type.__init__, core.tensor.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    blocks, tensors = dict[Any, dict[str, Any]](), dict[Any, tuple[Any, Any]]()

    def block_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *core._unwrap_shape(shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = vars(self) | {"element_ty": None}
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            tensor(self, handle, type)
            tensors[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[key]

    def broadcast_to(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        both = one.is_block() and other.is_block()
        if both and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = block_of, tensor_of
    semantic.TritonSemantic.broadcast_impl_value = broadcast_to


def _type_tuples_when_asked() -> None:
    def made(self: Any, args: Any, type: Any = None) -> None:
        known = type is None or isinstance(type, core.tuple_type)
        self.values, self.given = [*args], type if known else core.tuple_type(type)

    def type_of(self: Any) -> Any:
        return core._type_for_tuple_values(self.values) if self.given is None else self.given

    def made_of(self: Any, type: Any) -> None:
        self.given = type

    core.tuple.__init__, core.tuple.type = made, property(type_of, made_of)
