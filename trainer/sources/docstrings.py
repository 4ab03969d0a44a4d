"""Classes and functions of Python sources, and the labels that their code earns them."""

import ast
from collections.abc import Iterator

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_definitions(
    node: ast.AST, parents: tuple[Definition, ...]
) -> Iterator[tuple[Definition, tuple[Definition, ...]]]:
    """Every class and function below a node, in source order, with those it lies in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, parents
            yield from find_definitions(child, (*parents, child))
        elif not isinstance(child, ast.expr):
            yield from find_definitions(child, parents)


def describe(node: Definition, parents: tuple[Definition, ...]) -> list[str]:
    """The labels of a class or function, from its code alone."""
    decorators = {_last_name(decorator) for decorator in node.decorator_list}
    own = list(_own_nodes(node))
    calls = [item for item in own if isinstance(item, ast.Call)]
    facts = {
        "private": node.name.startswith("_") and not node.name.endswith("__"),
        "deprecated": any("deprecat" in name.lower() for name in decorators)
        or any("DeprecationWarning" in _names(call) for call in calls),
        "warns": any(_last_name(call) in ("warn", "warning", "warn_explicit") for call in calls),
    }
    if isinstance(node, ast.ClassDef):
        facts |= _class_facts(node)
    else:
        facts |= _function_facts(node, parents, decorators, own)
    return [label for label, holds in facts.items() if holds]


def _class_facts(node: ast.ClassDef) -> dict[str, bool]:
    bases = {_last_name(base) for base in node.bases}
    bases |= {_last_name(keyword.value) for keyword in node.keywords}
    methods = [item for item in node.body if isinstance(item, Definition)]
    names = {method.name for method in methods}
    return {
        "class": True,
        "abstract": bool(bases & {"ABC", "ABCMeta"}) or any(map(_is_abstract, methods)),
        "context_manager": "__enter__" in names or "__aenter__" in names,
        "exception": any(base.endswith(("Error", "Exception", "Warning")) for base in bases),
        "dataclass": any(_last_name(item) == "dataclass" for item in node.decorator_list),
    }


def _function_facts(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    parents: tuple[Definition, ...],
    decorators: set[str],
    own: list[ast.AST],
) -> dict[str, bool]:
    in_class = bool(parents) and isinstance(parents[-1], ast.ClassDef)
    return {
        "method": in_class,
        "function": not in_class,
        "async": isinstance(node, ast.AsyncFunctionDef),
        "raises": any(isinstance(item, ast.Raise) for item in own),
        "returns": any(isinstance(item, ast.Return) and item.value is not None for item in own),
        "generator": any(isinstance(item, ast.Yield | ast.YieldFrom) for item in own),
        "variadic": bool(node.args.vararg or node.args.kwarg),
        "property": any("property" in name for name in decorators) or "setter" in decorators,
        "classmethod": "classmethod" in decorators,
        "staticmethod": "staticmethod" in decorators,
        "abstract": _is_abstract(node),
        "context_manager": any("contextmanager" in name for name in decorators)
        or node.name in ("__enter__", "__exit__", "__aenter__", "__aexit__"),
    }


def _is_abstract(node: Definition) -> bool:
    return any("abstract" in _last_name(item).lower() for item in node.decorator_list)


def _own_nodes(node: Definition) -> Iterator[ast.AST]:
    """The nodes of a body, those of classes and functions inside it left out."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Definition | ast.Lambda):
            continue
        yield item
        waiting.extend(ast.iter_child_nodes(item))


def _last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, `c(...)` and `a.c(...)`; empty for other expressions."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _names(call: ast.Call) -> set[str]:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return {_last_name(value) for value in values}
