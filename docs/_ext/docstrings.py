"""How docstrings of this library become reStructuredText: they are prose, so nothing in them is markup but backticks.

What the prose has by convention, and what becomes of it:

    name: what it is             of an argument or attribute: an entry of a list. Indented lines go on with it, several
    name, name: what they are    names share one, and more entries may follow on the line after two spaces
        "value": what it does        in an entry, two or more of them: a list of its values
    Heading:                     with such entries indented below it: a list with a heading
    indented lines               code, as they stand, and so are lines in which columns are lined up
    `code`                       code; a public name becomes a link
    Returns ... Raises ...       a paragraph, also behind the last entry

Everything else is text, with whatever characters.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from typing import Any

_NAME = r"\*{0,2}[A-Za-z_]\w*"
_ENTRY = re.compile(rf"({_NAME}(?:, {_NAME})*): +(?=\S)")
_NEXT_ENTRY = re.compile(rf"(?:  +|(?<=\.) )(?={_NAME}(?:, {_NAME})*: )")
# What prose need not put in backticks: quoted words, arguments with values, shapes, files, names with underscores.
_CODE = re.compile(
    r"""("[\w.+-]+"|\b[a-z_]+=(?:"[^"]*"|[\w.-]*\w)"""
    r"""|\((?:\.\.\.|[A-Za-z]|num_\w+),(?:[^()]|\([^()]*\))*\)"""
    r"""|(?<![\w./~$])[\w./~$]*(?:\w_\w*[\w/]|\w\.py)\b(?:\(\))?)"""
)
_FORMULA = re.compile(r"\w+(\[[^\]]*\])? = ")
_VALUE = re.compile(r'(?:"[^"]+"|None|True|False): ')  # at the beginning of a line
_OUTCOME = re.compile(r"(?<=[.;]) +(?=(?:Returns|Raises|Errors) )")


def to_rst(lines: Iterable[str], names: Collection[str], links: dict[str, str] | None = None) -> list[str]:
    """The docstring, dedented, as lines of reStructuredText.

    names: of arguments and attributes, which may head an entry.  links: name in backticks -> full name.
    """
    links = links or {}
    result: list[str] = []
    for block in _blocks(lines):
        if block[0].startswith(" ") or _FORMULA.match(block[0]) or all(re.search(r"\S {3,}\S", line) for line in block):
            result += ["::", "", *(f"    {line}".rstrip() for line in block), ""]
            continue
        others = _listed(block)
        while block:
            block = _take(block, {*names, *others}, links, result)
    return result


def names_of(obj: Any) -> set[str]:
    """What an entry of the docstring of `obj` may be called: its arguments, or fields and their likes of a class."""
    names = set()
    if inspect.isclass(obj):
        for cls in obj.__mro__:
            names |= {*vars(cls), *inspect.get_annotations(cls)}
    with suppress(TypeError, ValueError):  # a module, or a class of another language
        names |= {*inspect.signature(obj).parameters}
    return names - {"self", "cls"}


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Lines between blank ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def _listed(block: list[str]) -> set[str]:
    """The names of a block that is nothing but entries, whatever they are of; else none."""
    heads = [re.match(rf"{_NAME}(?:, {_NAME})*(?=: )", line) for line in block if not line.startswith(" ")]
    if len(heads) < 2 or not all(match and match[0][0].islower() for match in heads):
        return set()
    return {name for match in heads if match for name in match[0].split(", ")}


def _entry(text: str, names: Collection[str]) -> re.Match[str] | None:
    match = _ENTRY.match(text)
    return match if match and all(name.lstrip("*") in names for name in match[1].split(", ")) else None


def _parts(line: str, names: Collection[str]) -> list[str]:
    """The entries of one line."""
    parts = _NEXT_ENTRY.split(line)
    joined = parts[:1]
    for part in parts[1:]:
        if _entry(part, names):
            joined.append(part)
        else:
            joined[-1] += f" {part}"
    return joined


def _take(block: list[str], names: Collection[str], links: dict[str, str], result: list[str]) -> list[str]:
    """Write what the block begins with, a list or a paragraph; return the rest of it."""
    if _entry(block[0], names):
        items, rest = _items(block, names)
        _write_list(items, links, result)
        return rest
    for end, line in enumerate(block):
        if end and (_entry(line, names) or (block[end - 1].endswith(".") and line.startswith(("Returns", "Raises")))):
            break
        if end and line.startswith(" ") and block[end - 1].endswith(":"):
            indented = [following[4:] for following in takewhile(lambda line: line.startswith(" "), block[end:])]
            count = len(indented)
            if _entry(indented[0], names):
                result += [f"**{_text(block[end - 1][:-1], links)}**", ""]
                result[-2:-2] = _paragraph(block[: end - 1], links)
                items, _ = _items(indented, names)
                _write_list(items, links, result)
            else:
                result += [*_paragraph(block[:end], links)[:-1], "", "::", ""]
                result += [*(f"    {line}" for line in indented), ""]
            return block[end + count :]
    else:
        end = len(block)
    result += _paragraph(block[:end], links)
    return block[end:]


def _items(block: list[str], names: Collection[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The list that the block begins with, as names and text, and the lines behind it."""
    items: list[tuple[str, str]] = []
    for index, line in enumerate(block):
        indented = line.startswith(" ")
        parts = _parts(line.strip(), names)
        is_entry = _entry(parts[0], names) is not None and not indented
        if items and not is_entry and not indented and items[-1][1].endswith((".", ".)")) and not _continues(line):
            return items, block[index:]
        for part in parts:
            if (match := _entry(part, names)) and not (indented and part is parts[0]):
                items.append((match[1], part[match.end() :]))
            else:
                joint = "\n" if _VALUE.match(part) else " "
                items[-1] = (items[-1][0], f"{items[-1][1]}{joint}{part}")
        text, *outcome = _OUTCOME.split(items[-1][1], maxsplit=1)
        if outcome and not indented:
            items[-1] = (items[-1][0], text)
            return items, [outcome[0], *block[index + 1 :]]
    return items, []


def _continues(line: str) -> bool:
    return line[0].islower() or line.startswith("None")


def _write_list(items: list[tuple[str, str]], links: dict[str, str], result: list[str]) -> None:
    for name, text in items:
        result.append(", ".join(f"``{n}``" for n in name.split(", ")))
        text, *values = text.split("\n") if text.count("\n") > 1 else [text.replace("\n", " ")]
        result.append(f"    {_text(text, links)}")
        if values:
            result += ["", *(f"    * {_text(value, links)}" for value in values), ""]
    if result[-1]:
        result.append("")


def _paragraph(lines: list[str], links: dict[str, str]) -> list[str]:
    return [_text(" ".join(line.strip() for line in lines), links), ""] if lines else []


def _text(text: str, links: dict[str, str]) -> str:
    """Prose with everything escaped, and what stands in backticks, or looks like a name in code, as code."""
    result: list[str] = []
    last, was_code = " ", False
    for index, quoted in enumerate(re.split(r"`([^`]+)`", text)):
        for inner, piece in enumerate([quoted] if index % 2 else _CODE.split(quoted)):
            if not piece:
                continue
            is_code = bool(index % 2 or inner % 2)
            if (is_code and last not in " ([{</:-\"'") or (was_code and piece[0] not in " )]}>/:-\"'.,;!?"):
                result.append("\\ ")  # which is nothing, but keeps markup apart from the words that it touches
            result.append(_code(piece, links) if is_code else re.sub(r"([\\*_|`])", r"\\\1", piece))
            last, was_code = piece[-1], is_code
    return "".join(result)


def _code(text: str, links: dict[str, str]) -> str:
    if (name := text.split("(")[0]) in links and text in (name, f"{name}()"):
        return f":py:obj:`{text} <{links[name]}>`"
    return f"``{text}``"
