"""Which small changes are made to a source file: operators of cosmic-ray, a few of our own, and where none is made.

A mutant is the file with one operator applied at one place. Left alone are annotations, docstrings, f-strings, `raise`
and `assert` statements (and zip's `strict`, which is one), decorators and what is only printed: such a change has no
effect, or only on a sentence. The constraints of recipe fields stay in.
"""

import ast
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import parso.python.tree  # before cosmic_ray, which cannot be imported first: its imports go in a circle
from cosmic_ray.ast import get_ast, is_number
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators import (
    binary_operator_replacement,
    boolean_replacer,
    break_continue,
    comparison_operator_replacement,
    exception_replacer,
    number_replacer,
    unary_operator_replacement,
    zero_iteration_for_loop,
)
from cosmic_ray.operators.operator import Operator

PRINTED = {"say", "log", "log_now", "print", "warn", "warning", "info", "debug", "secho", "echo"}
BINARY = """Add_Sub Sub_Add Mul_Div Div_Mul Mul_Add FloorDiv_Div FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr
    BitOr_BitAnd BitXor_BitOr RShift_LShift LShift_RShift""".split()
COMPARISONS = """Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE GtE_Lt LtE_Gt Gt_LtE Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is In_NotIn
    NotIn_In""".split()
UNARY = ["USub_UAdd", "Delete_Not", "Invert_Delete", "Delete_Invert", "Delete_USub"]


class Nudge(Operator):
    """A number with a fraction or an exponent, a twentieth more or less: what a wrong digit does."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if is_number(node) and re.search(r"[.e]", node.value) and not node.value.lower().startswith("0x"):
            if 0 < float(node.value) < 1e-4:  # only keeps away from a division by zero, or from rounding
                return
            yield from [(node.start_pos, node.end_pos)] * 2

    def mutate(self, node: Any, index: int) -> Any:
        value = float(node.value)
        changed = repr(round(value * (1.05, 0.95)[index], 12) or 0.05)
        return parso.python.tree.Number(changed, node.start_pos, node.prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class Sibling(Operator):
    """A function or method in place of its sibling: min and max, sine and cosine, rows and columns."""

    PAIRS = """min max|amin amax|argmin argmax|clamp_min clamp_max|sin cos|any all|sum mean|zeros ones|
        zeros_like ones_like|new_zeros new_ones|floor ceil|keys values|softmax log_softmax|rand randn|tril triu|
        repeat repeat_interleave|append extend|startswith endswith|relu silu|l1_loss mse_loss""".split("|")
    OTHER = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(node, parso.python.tree.Name) and node.value in self.OTHER:
            following = node.get_next_leaf()
            if following is not None and following.value == "(":
                yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.python.tree.Name(self.OTHER[node.value], node.start_pos, node.prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by their names."""
    names = {f"ReplaceBinaryOperator_{name}" for name in BINARY}
    names |= {f"ReplaceComparisonOperator_{name}" for name in COMPARISONS}
    names |= {f"ReplaceUnaryOperator_{name}" for name in UNARY}
    kinds = [
        *binary_operator_replacement.operators(),
        *comparison_operator_replacement.operators(),
        *unary_operator_replacement.operators(),
    ]
    chosen = [kind for kind in kinds if kind.__name__ in names] + [
        boolean_replacer.AddNot,
        boolean_replacer.ReplaceTrueWithFalse,
        boolean_replacer.ReplaceFalseWithTrue,
        boolean_replacer.ReplaceAndWithOr,
        boolean_replacer.ReplaceOrWithAnd,
        break_continue.ReplaceBreakWithContinue,
        break_continue.ReplaceContinueWithBreak,
        exception_replacer.ExceptionReplacer,
        number_replacer.NumberReplacer,
        zero_iteration_for_loop.ZeroIterationForLoop,
        Nudge,
        Sibling,
    ]
    return {kind.__name__: kind() for kind in chosen}


class Place(NamedTuple):
    """One change that an operator can make to a file."""

    file: str  # relative to the repository
    operator: str
    occurrence: int  # which of the operator's places in the file
    line: int  # from 1


class Mutant(NamedTuple):
    place: Place
    before: str  # the line as it stands, without white space at its ends
    after: str  # and as changed
    source: str  # the whole file, changed


def places(file: str, source: str) -> list[Place]:
    """Every place of a file where an operator applies, in no order."""
    left_alone, ends = list(_left_alone(ast.parse(source))), set(_axes_from_the_end(ast.parse(source)))
    nodes, found = list(_nodes(get_ast(source))), []
    for name, operator in operators().items():
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            inside = any(first <= start and end <= last for first, last in left_alone)
            if not inside and not (name.startswith("ReplaceUnary") and start in ends):
                found.append(Place(file, name, occurrence, start[0]))
    return found


def mutate(place: Place, source: str) -> Mutant | None:
    """The mutant of a place; None when the change leaves no valid Python or the same program."""
    changed = MutationVisitor.mutate_code(source, operators()[place.operator], place.occurrence)
    if changed is None or not _differs(ast.dump(ast.parse(source)), changed):
        return None
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    before, after = next(pair for pair in pairs if pair[0] != pair[1])
    return Mutant(place, before.strip(), after.strip(), changed)


def _differs(original: str, changed: str) -> bool:
    """Whether the changed source is Python and not the same program."""
    try:
        return ast.dump(ast.parse(changed)) != original
    except SyntaxError:
        return False


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in getattr(node, "children", []):
        yield from _nodes(child)


def _left_alone(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans ((line, column), (line, column)) in which nothing is changed."""
    for node in ast.walk(tree):
        spans: list[Any] = []
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                spans = [getattr(node, "returns", None), *node.decorator_list]
            case ast.arg() | ast.AnnAssign():
                spans = [node.annotation]
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.MatchClass():
                spans = [node]
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in PRINTED:
                spans = [node]
            case ast.Call(func=ast.Name(id="isinstance")):
                spans = node.args[1:]
            case ast.keyword(arg="strict"):  # of zip: an assert by another name
                spans = [node.value]
            case ast.Assign(value=ast.Subscript(value=ast.Name(id=("Callable" | "Literal" | "Annotated")))):
                spans = [node]
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                spans = [node]
        for span in spans:
            if span is not None:
                yield (span.lineno, span.col_offset), (span.end_lineno, span.end_col_offset)


def _axes_from_the_end(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Where an argument or an index is a negative number: without its sign an axis of two dimensions is the same."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        match node:
            case ast.Call():
                values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("dim", "axis"))]
            case ast.Subscript(value=ast.Attribute(attr="shape")):
                values = [node.slice]
        for value in values:
            if isinstance(value, ast.UnaryOp) and isinstance(value.operand, ast.Constant):
                yield value.lineno, value.col_offset
