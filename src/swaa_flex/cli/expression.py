"""Masks written as text, such as "causal & (window(64) | sinks(8))". Nothing in the text is ever executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import NoReturn

from .. import masks, recipes
from ..algebra import LARGEST
from ..errors import MaskError, did_you_mean
from ..masks import Mask

_PLAIN: dict[str, Callable[[], Mask]] = {"causal": masks.causal, "everything": masks.everything}
_NUMBERED: dict[str, Callable[[int], Mask]] = {
    "window": masks.window,
    "sinks": masks.sinks,
    "rows_from": masks.rows_from,
}
_NAMES = (*_PLAIN, *_NUMBERED, "offset")
_ALLOWED = (
    "Allowed: causal, everything, window(W), sinks(K), rows_from(N),\n"
    "offset(mask, q=N, kv=N), & | ~ and parentheses; or a recipe by itself:\n"
    f"{', '.join(recipes.names())}."
)


def parse(text: str) -> Mask:
    """Reads an expression with `ast`; names other than the masks mean nothing, and nothing is evaluated.

    Args:
        text: `causal`, `everything`, `window(W)`, `sinks(K)`, `rows_from(N)`, `offset(mask, q=N, kv=N)`, composed
            with `&`, `|`, `~` and parentheses, on any number of lines. A `#` begins a comment that ends with its line.

    Raises:
        MaskError: if `text` is something else; the message shows the place and says what is allowed.

    Example:
        >>> parse("causal & (window(64) | sinks(8))")
        causal & (window(64) | sinks(8))
    """
    text = " ".join(re.sub(r"#[^\r\n]*", "", text).split())
    reader = _Reader(text)
    try:
        return reader.mask(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        if not error.offset or error.lineno != 1:  # an unfinished text, which Python blames on what comes next
            reader.fail(len(text), len(text) + 1, "the expression is incomplete")
        reader.fail(error.offset - 1, error.offset, f"cannot read the expression: {error.msg}")
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"cannot read the expression: {error}\n{_ALLOWED}") from error


class _Reader:
    """Turns syntax into a mask, and knows the text in order to point at what is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text

    def mask(self, node: ast.expr) -> Mask:
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return self.mask(left) & self.mask(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return self.mask(left) | self.mask(right)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.mask(operand)
            case ast.Name(name) if name in _PLAIN:
                return _PLAIN[name]()
            case ast.Name("offset"):
                self.wrong(node, "offset takes a mask and how far to move it: offset(causal, q=64)")
            case ast.Name(name) if name in _NUMBERED:
                self.wrong(node, f"{name} takes a number: {name}(64)")
            case ast.Call(ast.Name(name) as function, arguments, keywords) if name in _NAMES:
                return self.call(node, function, arguments, keywords)
            case ast.Name(name) | ast.Call(ast.Name(name)):
                self.unknown(node.func if isinstance(node, ast.Call) else node, name)
            case ast.BoolOp(ast.And()):
                self.wrong(node, "masks combine with & instead of and")
            case ast.BoolOp(ast.Or()):
                self.wrong(node, "masks combine with | instead of or")
            case ast.UnaryOp(ast.Not()):
                self.wrong(node, "a mask is inverted with ~ instead of not")
            case ast.BinOp() | ast.UnaryOp() | ast.Compare():
                self.wrong(node, "expected one of the operators & | ~ here")
        self.wrong(node, "expected a mask here")

    def call(self, node: ast.Call, function: ast.Name, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Mask:
        name = function.id
        if name == "offset":
            if len(arguments) != 1 or not keywords or any(word.arg not in ("q", "kv") for word in keywords):
                self.wrong(node, "offset takes a mask and how far to move it: offset(causal, q=64, kv=0)")
            moved = {str(word.arg): self.number(word.value) for word in keywords}
            return masks.offset(self.mask(arguments[0]), **moved)
        if name in _PLAIN:
            if arguments or keywords:
                self.wrong(node, f"{name} takes nothing: {name}")
            return _PLAIN[name]()
        if len(arguments) != 1 or keywords:
            self.wrong(node, f"{name} takes one number: {name}(64)")
        number = self.number(arguments[0])
        try:
            return _NUMBERED[name](number)
        except MaskError as error:
            self.wrong(arguments[0], str(error))

    def number(self, node: ast.expr) -> int:
        sign = 1
        value: object = node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, value = -1, node.operand
        if isinstance(value, ast.Constant):
            value = value.value
        if not isinstance(value, int) or isinstance(value, bool):
            self.wrong(node, "expected a whole number such as 64 here")
        if value > LARGEST:
            self.wrong(node, f"expected a number of at most {LARGEST:,}".replace(",", "_"))
        return sign * value

    def unknown(self, node: ast.expr, name: str) -> NoReturn:
        if name in masks.__all__:
            self.wrong(node, f"{name} takes tensors or functions; draw such a mask from Python, with swaa_flex.viz")
        if name in recipes.names():
            self.wrong(node, f"the recipe {name} stands alone, outside of an expression")
        self.wrong(node, f"unknown name {name!r}{did_you_mean(name, (*_NAMES, *recipes.names()))}")

    def wrong(self, node: ast.expr, problem: str) -> NoReturn:
        # Columns of ast count bytes of UTF-8.
        encoded = self.text.encode()
        start, stop = (len(encoded[:column].decode()) for column in (node.col_offset, node.end_col_offset))
        self.fail(start, stop, problem)

    def fail(self, start: int, stop: int, problem: str) -> NoReturn:
        raise MaskError(f"{problem}\n  {self.text}\n  {' ' * start}{'^' * max(1, stop - start)}\n{_ALLOWED}") from None
