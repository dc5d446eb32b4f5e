"""The templates of the pages for people."""

from __future__ import annotations

from functools import lru_cache

import jinja2


@lru_cache
def template(name: str) -> jinja2.Template:
    """A page's template; what is put in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batch", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template(name)
