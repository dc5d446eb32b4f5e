"""Plots as SVG within a page: no script, no other file, readable without colours."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from batch.columns import Bar

_HEIGHT = 100


def histogram(bars: Sequence[Bar], what: str, own: str = "") -> Markup:
    """Bars side by side, over them the outline of what was expected. It takes the width that it is given.

    Args:
        what: what is shown, for those who cannot see it.
        own: how the labels of the bars begin that matter; others are drawn paler.
    """
    top = max((max(bar.rows, bar.expected or 0) for bar in bars), default=0) or 1
    scale = (_HEIGHT - 2) / top
    parts = [
        f'<svg class="plot" viewBox="0 0 {len(bars)} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(what)}">'
    ]
    for place, bar in enumerate(bars):
        height = max(round(bar.rows * scale, 1), 1.5) if bar.rows else 0
        kind = ' class="pale"' if not bar.label.startswith(own) else ""
        parts.append(
            f'<g><title>{escape(_told(bar))}</title><rect class="room" x="{place}" width="1" height="{_HEIGHT}"/>'
            f'<rect{kind} x="{place + 0.06:g}" y="{_HEIGHT - height:g}" width=".88" height="{height:g}"/></g>'
        )
    if any(bar.expected is not None for bar in bars):
        steps = "".join(f"V{_HEIGHT - (bar.expected or 0) * scale:.1f}h1" for bar in bars)
        parts.append(f'<path d="M0 {_HEIGHT}{steps}V{_HEIGHT}"/>')
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - the texts in it are escaped above


def _told(bar: Bar) -> str:
    text = f"{bar.label}: {bar.rows:,}"
    return text if bar.expected is None else f"{text}, expected {bar.expected:,.0f}"
