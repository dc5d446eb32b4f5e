"""Import Feast in a third of its time, in processes that only read what `feast apply` has checked.

Feast has typeguard check the arguments of its classes. To that end typeguard rewrites their source when they are
imported, which costs two seconds of three in every process. The checks are for definitions that people write.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def leave_feast_unchecked() -> None:
    """Let typeguard pass over Feast's modules that are imported from now on; whatever else it checks it still does.

    Call it in a process of one's own, before Feast is imported; later it does nothing. Idempotent.
    """
    with suppress(ImportError):  # a Feast that no longer uses it
        import typeguard  # noqa: PLC0415

        checked = typeguard.typechecked

        def typechecked(target: Any = None, **options: Any) -> Any:
            if getattr(target, "__module__", "").partition(".")[0] == "feast":
                return target
            return checked(target, **options)

        typeguard.typechecked = typechecked
