"""HTML elements that escape their text, so that nothing read from a file can become markup."""

import html
import math
from collections.abc import Iterable

VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """Text that is markup already and is not escaped again."""


Child = str | None | Iterable["Child"]


def render(child: Child) -> Html:
    """Return `child` as markup: plain text is escaped, None is nothing, an iterable is joined."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return Html(html.escape(child, quote=True))
    return Html("".join(render(part) for part in child))


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """Return `<tag attributes>children</tag>`.

    Attribute names lose a trailing underscore and have dashes for the others (`class_`,
    `data_sort`); None and False leave an attribute out, True writes it without a value.
    """
    text = f"<{tag}"
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        text += " " + key.rstrip("_").replace("_", "-")
        if value is not True:
            text += f'="{html.escape(str(value), quote=True)}"'
    if tag in VOID:
        return Html(text + ">")
    return Html(f"{text}>{render(children)}</{tag}>")


def number(value: float, digits: int = 4) -> str:
    """Return `value` for reading: whole with thousands separators, others with `digits` digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits - 1}e}"
