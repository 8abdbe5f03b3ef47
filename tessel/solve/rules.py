"""Rules over the tiles of several kernels: a comparison such as ``"qk.shared + pv.shared <= 232448"``."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import CodeType, SimpleNamespace
from typing import Any

from ..errors import TesselError, did_you_mean

__all__ = ["CheckedRule", "Rule", "check_rules"]

_ALLOWED = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.boolop, ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.Load,
    ast.cmpop, ast.operator, ast.unaryop,
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What several tiles must satisfy together.

    Attributes:
        name: unique among the rules of a problem.
        formula: arithmetic and comparisons over ``part.column``, as Python writes them.
        words: the same for people; the formula where empty.
    """

    name: str
    formula: str
    words: str = ""


@dataclass(frozen=True)
class CheckedRule:
    """A rule whose names all exist.

    Attributes:
        rule: as it was written.
        code: compiled.
        used: part -> the columns that the rule reads.
        sides: left and right of a comparison of sums of columns times whole numbers; None for any other rule.
        sign: between them.
    """

    rule: Rule
    code: CodeType
    used: Mapping[str, tuple[str, ...]]
    sides: tuple[CodeType, CodeType] | None = None
    sign: str = ""

    def holds(self, values: Mapping[str, Mapping[str, Any]]) -> Any:
        """Whether the rule holds, for numbers or arrays."""
        return _value(self.code, {n: values[n] for n in self.used})

    def excess(self, values: Mapping[str, Mapping[str, Any]]) -> Any:
        """Left minus right of a linear rule."""
        assert self.sides is not None
        left, right = (_value(side, {n: values[n] for n in self.used}) for side in self.sides)
        return left - right


def _value(code: CodeType, values: Mapping[str, Mapping[str, Any]]) -> Any:
    return eval(code, {"__builtins__": {}}, {n: SimpleNamespace(**columns) for n, columns in values.items()})


def check_rules(rules: Sequence[Rule], columns: Mapping[str, Iterable[str]]) -> list[CheckedRule]:
    """The rules, checked against the columns of every part.

    Raises:
        TesselError: two rules have the same name, or a rule is no comparison or names what does not exist.
    """
    if len({r.name for r in rules}) < len(rules):
        raise TesselError("joint problem: two rules have the same name")
    return [_checked(rule, columns) for rule in rules]


def _checked(rule: Rule, columns: Mapping[str, Iterable[str]]) -> CheckedRule:
    def wrong(words: str) -> TesselError:
        return TesselError(f"rule {rule.name!r}: {words} in {rule.formula!r}")

    try:
        tree = ast.parse(rule.formula, mode="eval")
    except SyntaxError as e:
        raise wrong(f"{e.msg}") from None
    used: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            part, column = node.value.id, node.attr
            if part not in columns:
                raise wrong(f"no part {part!r} ({did_you_mean(part, columns)})")
            if column not in columns[part]:
                raise wrong(f"{part} has no column {column!r} ({did_you_mean(column, columns[part])})")
            used.setdefault(part, []).append(column)
        elif not isinstance(node, _ALLOWED):
            raise wrong(f"{type(node).__name__} is not allowed")
    if not used or not _is_truth(tree.body):
        raise wrong("no comparison of a part's columns")
    ordered = {p: tuple(dict.fromkeys(used[p])) for p in columns if p in used}
    body = tree.body
    code = compile(ast.fix_missing_locations(_Arrays().visit(ast.parse(rule.formula, mode="eval"))), "<rule>", "eval")
    if isinstance(body, ast.Compare) and len(body.ops) == 1 and type(body.ops[0]) in _SIGNS:
        sides = body.left, body.comparators[0]
        if max(map(_degree, sides)) <= 1:
            left, right = (compile(ast.Expression(side), "<rule>", "eval") for side in sides)
            return CheckedRule(rule, code, ordered, (left, right), _SIGNS[type(body.ops[0])])
    return CheckedRule(rule, code, ordered)


def _is_truth(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(map(_is_truth, node.values))
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and _is_truth(node.operand)
    )


class _Arrays(ast.NodeTransformer):
    """``and``, ``or``, ``not`` and chains of comparisons as what arrays understand."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        sign = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        return reduce(lambda a, b: ast.BinOp(a, sign, b), (self.visit(v) for v in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.Compare(operand, [ast.Eq()], [ast.Constant(0)])
        return ast.UnaryOp(node.op, operand)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        values = [self.visit(v) for v in (node.left, *node.comparators)]
        pairs: list[ast.expr] = [ast.Compare(a, [op], [b]) for a, op, b in zip(values, node.ops, values[1:])]
        return reduce(lambda a, b: ast.BinOp(a, ast.BitAnd(), b), pairs)


_SIGNS = {ast.LtE: "<=", ast.Lt: "<", ast.GtE: ">=", ast.Gt: ">", ast.Eq: "=="}


def _degree(node: ast.expr) -> int:
    """0 for a whole number, 1 for a sum of columns times whole numbers, 2 for anything else."""
    if isinstance(node, ast.Constant):
        return 0 if isinstance(node.value, int) else 2
    if isinstance(node, ast.Attribute):
        return 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _degree(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        return max(_degree(node.left), _degree(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return min(2, _degree(node.left) + _degree(node.right))
    return 2
