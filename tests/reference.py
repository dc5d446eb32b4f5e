"""The reference pages that are made from the code: settings, commands, tasks, tags, metrics, dead letters, errors.

    python -m tests.reference

writes them into `docs/reference`; a test fails where a page there is not what the code says. Names, types and defaults
are the code's own, and so are the meanings: a docstring's `Attributes`, an option's help, a parameter's description.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import annotated_types
import click
import luigi
from luigi.parameter import _no_value  # type: ignore[attr-defined]
from prometheus_client.registry import Collector
from pydantic import SecretStr

import batch
from batch import backfill, metrics, tasks
from batch.settings import BatchSettings
from headrace import errors
from headrace.conform import Reason
from headrace.contract import ViewContract
from headrace.rules import DayRules, Objectives, Rule
from headrace.settings import PREFIX, Settings
from streaming import commands, deadletters, settings
from streaming.health import Health
from streaming.security import SecuritySettings

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- Made by `python -m tests.reference` from the code; change it there. -->\n"


def pages() -> dict[str, str]:
    """The text of each page, by file name."""
    return {
        "settings.md": _settings(),
        "commands.md": _commands(),
        "tasks.md": _tasks(),
        "tags.md": _tags(),
        "metrics.md": _metrics(),
        "dead-letters.md": _dead_letters(),
        "errors.md": _errors(),
    }


def attributes(owner: type) -> dict[str, str]:
    """The `Attributes` of a class's docstring: meaning by name; names before one colon share a meaning."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = (inspect.getdoc(owner) or "").partition("Attributes:\n")
    for line in section.splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry is not None:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith("     "):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        else:
            break
    return found


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown; a bar in a cell does not end it."""
    lines = [
        list(heads),
        ["---"] * len(list(heads)),
        *([str(cell).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# Settings


def _settings() -> str:
    parts: list[tuple[str, str, type[Settings], type[Settings] | None]] = [
        ("Both", "The stream and the batch chain.", Settings, None),
        ("The stream", "`faust -A streaming …`", settings.StreamSettings, SecuritySettings),
        ("The stream: how it logs in to Kafka", "[TLS, SASL and rights](../how-to/security.md) has examples.",
         SecuritySettings, Settings),
        ("The batch chain", "`luigi --module batch …`", BatchSettings, Settings),
    ]  # fmt: skip
    text = MADE + (
        "\n# Settings\n\nVariables of the environment, or lines of a file `.env` in the folder where the command starts; "
        "the environment wins.\nAn empty variable counts as not set. They are read once, at start; a wrong one is an error "
        "that names it, and never its value.\n"
    )
    for title, what, owner, base in parts:
        meanings = attributes(owner)
        names = [name for name in owner.model_fields if base is None or name not in base.model_fields]
        rows = []
        for name in names:
            field = owner.model_fields[name]
            bounds = [_bound(item) for item in field.metadata]
            kind = ", ".join([_type(field.annotation), *filter(None, bounds)])
            rows.append([f"`{PREFIX}{name.upper()}`", kind, _default(field.default), _sentence(meanings[name])])
        text += f"\n## {title}\n\n{what}\n\n" + table(["variable", "type", "default", "meaning"], rows)
    return text


def _bound(item: object) -> str:
    match item:
        case annotated_types.Gt(gt=value):
            return f"> {value}"
        case annotated_types.Ge(ge=value):
            return f"≥ {value}"
        case annotated_types.Le(le=value):
            return f"≤ {value}"
        case _:
            return ""


def _type(kind: Any) -> str:
    words = {str: "text", bool: "`true` or `false`", int: "integer", float: "number", Path: "path", SecretStr: "secret"}
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        return ", ".join(_type(part) for part in typing.get_args(kind) if part is not type(None))
    return str(kind.__name__)


def _default(value: object) -> str:
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _sentence(text: str) -> str:
    text = re.sub(r"; None [^.;]*|^the view's tag of that name, ", "", text.strip())
    return text[:1].upper() + text[1:] if text[:1].isalpha() else text


# Commands


def _commands() -> str:
    text = MADE + (
        "\n# Commands of the stream\n\n`faust -A streaming COMMAND …`, in a folder from which "
        "[the settings](settings.md) lead to the feature repository. Each ends with 0 if it did what was asked, with 1 and "
        "one line `error: …` if not, with 2 for an option that there is not, and with 130 after Ctrl-C.\n\n"
        "`faust -A streaming worker -l info` is the daemon: [Run the worker](../how-to/operations.md) has all of it.\n"
    )
    for command in _declared(commands._Command.__subclasses__(), commands):
        name = command.__name__.replace("_", "-")
        text += f"\n## {name}\n\n{inspect.getdoc(command)}\n\n"
        rows = []
        for decorate in command.options:
            (found,) = decorate(_nothing()).__click_params__
            rows.append([f"`{found.opts[0]}`", _click_type(found), _click_default(found), found.help])
        text += table(["option", "value", "default", "meaning"], rows)
    return text


def _nothing() -> Callable[[], None]:
    def nothing() -> None: ...

    return nothing


def _declared(found: Iterable[type], where: types.ModuleType) -> list[Any]:
    """Those of a module, in the order in which it declares them."""
    return sorted((one for one in found if one.__module__ == where.__name__), key=_line)


def _line(owner: type) -> int:
    return inspect.getsourcelines(owner)[1]


def _click_type(option: click.Option) -> str:
    if option.is_flag:
        return "–"
    kind = option.type
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    name = "integer" if isinstance(kind, click.types.IntParamType) else "text"
    name = "number" if isinstance(kind, click.types.FloatParamType) else name
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    above = ">" if getattr(kind, "min_open", False) else "≥"
    return name + (f", {above} {low:g}" if low is not None else "") + (f", ≤ {high:g}" if high is not None else "")


def _click_default(option: click.Option) -> str:
    if option.required:
        return "required"
    default = option.default
    return f"`{default:g}`" if isinstance(default, int | float) and not isinstance(default, bool) else "–"


# Tasks


def _tasks() -> str:
    text = MADE + (
        "\n# Tasks of the batch chain\n\n`luigi --module batch TASK …`, in a folder with `luigi.cfg`, with "
        "`--local-scheduler` where no luigid runs. A parameter is an option: `run_date` is `--run-date`. Days and minutes "
        "are UTC. A task whose receipt exists is complete and does nothing; what a command may end with: "
        "[exit codes](exit-codes.md).\n\n`--workers N` lets N tasks run side by side, and every other option of Luigi "
        "works too.\n"
    )
    order = ["Ingest", "Clean", "ExploreAndValidate", "OfflineStore", "Materialize", "Backfill"]
    named = [*order, *(name for name in batch.__all__ if name not in order)]
    for name in named:
        task: type[luigi.Task] = getattr(batch, name)
        text += f"\n## {name}\n\n{_docstring(task)}\n\n"
        rows = []
        for parameter, declared in task.get_params():
            meaning = (declared.description or "").partition(" Choices: ")[0]
            if not meaning:
                continue  # Luigi tells two runs apart by it; nobody gives it
            kind = "–" if isinstance(declared, luigi.BoolParameter) else _parameter_type(declared)
            is_required = declared._default is _no_value
            default = "required" if is_required else "–"
            rows.append([f"`--{parameter.replace('_', '-')}`", kind, default, _sentence(meaning)])
        text += table(["option", "value", "default", "meaning"], rows)
    return text


def _docstring(task: type) -> str:
    return (inspect.getdoc(task) or "").strip()


def _parameter_type(parameter: luigi.Parameter) -> str:
    kinds: list[tuple[type, str]] = [
        (tasks.DayParameter, "day, `2026-01-31`"),
        (luigi.DateMinuteParameter, "minute, `2026-01-31T0815`"),
        (luigi.ChoiceParameter, ", ".join(f"`{choice}`" for choice in backfill.STEPS)),
        (luigi.IntParameter, "integer"),
        (luigi.FloatParameter, "number"),
    ]
    return next((text for kind, text in kinds if isinstance(parameter, kind)), "text")


# Tags


def _tags() -> str:
    rule, contract = attributes(Rule), attributes(ViewContract)
    of_field = [name for name in rule if name != "column"]
    of_view = ["source_table", "source_files", "transform", "retain_days"]
    rows = [[f"`{name}`", _sentence(contract[name])] for name in of_view]
    rows += [[f"`{name}`", _sentence(meaning)] for name, meaning in attributes(DayRules).items()]
    within = attributes(Objectives)
    rows += [[f"`{store}_within_s`", _sentence(within[f"{store}_s"])] for store in ("online", "offline")]
    rows.append(["`severity`", "`error` or `warning`, of `min_rows` and `max_age_hours` where they have no word."])
    return MADE + (
        "\n# Tags\n\nAll that Headrace knows of a view beyond Feast's own declaration are tags: texts, in "
        "`tags={…}` of the `FeatureView` and of its `Field`s. Tags of other names are yours. A tag that cannot be "
        "understood is an error when the registry is read, with the view, the field and how to write it. How rules are "
        "judged, with examples: [the report and the gate](../how-to/gate.md).\n"
        "\n## Of a view\n\n" + table(["tag", "meaning"], rows) + "\n## Of a field\n\n"
        + table(["tag", "meaning"], [[f"`{name}`", _sentence(rule[name])] for name in of_field])
        + "\nThe owner of a view is Feast's own `owner=`; its `ttl` counts in point-in-time joins.\n"
    )  # fmt: skip


# Metrics


def _metrics() -> str:
    text = MADE + (
        "\n# Metrics\n\nCounters end in `_total`, times are seconds, sizes bytes. Labels are names of views, topics, steps, "
        "stores, reasons, kinds and tasks, and numbers of partitions; nothing of an event.\n\n"
        "What each says, and which alerts are enough: [Run the worker](../how-to/operations.md#metrics) and "
        "[What ran](../how-to/history.md#metrics).\n"
    )
    worker = _families(Health().registry._collector_to_names)
    jobs = metrics.Runs({name: {} for name in metrics._LABELS})
    heads = ["metric", "kind", "labels", "meaning"]
    text += "\n## Of a worker\n\nOn `/metrics` of its pages.\n\n" + table(heads, worker)
    text += (
        "\n`process_*` are the usual ones of the Prometheus client: resident memory, processor seconds, open files.\n"
    )
    text += "\n## Of the batch chain\n\nIn `history/headrace_batch.prom` of the work folder.\n\n"
    return text + table(heads, _families([jobs]))


def _families(collectors: Iterable[Collector]) -> list[list[str]]:
    rows = []
    for family, labels in _described(collectors):
        if not family.name.startswith("process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append([f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation])
    return sorted(rows)


def _described(collectors: Iterable[Collector]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    for collector in collectors:
        for family in collector.collect():
            own = getattr(collector, "_labelnames", None)
            yield family, own if own is not None else getattr(family, "_labelnames", ())


# Dead letters


def _dead_letters() -> str:
    rows = [[f"`{deadletters.PREFIX}{name}`", meaning] for name, meaning in deadletters.HEADERS.items()]
    reasons = [[f"`{reason.value}`", _sentence(attributes(Reason)[reason.name])] for reason in Reason]
    return MADE + (
        f"\n# Dead letters\n\nAn event that was turned away goes to `<topic>{deadletters.SUFFIX}`, its key, value and "
        "headers untouched, with these headers behind its own, each a text in UTF-8:\n\n"
        + table(["header", "what it holds"], rows)
        + "\n## Reasons\n\n"
        + table(["reason", "meaning"], reasons)
        + "\nWhat each format makes of a fault: [message formats](../how-to/formats.md#what-becomes-of-faults). To list and "
        "replay letters: [`dead-letters`](commands.md#dead-letters), [`replay`](commands.md#replay). At least once: after a "
        "crash a letter may be there twice, with the same origin.\n"
    )


# Errors


def _errors() -> str:
    found = [errors.HeadraceError, *_declared(_below(errors.HeadraceError), errors)]
    rows = [
        [
            f"`{error.__name__}`",
            "yes"
            if issubclass(error, errors.TransientError)
            else "no"
            if issubclass(error, errors.TerminalError)
            else "–",
            (inspect.getdoc(error) or "").partition("\n\n")[0].replace("\n", " "),
        ]
        for error in dict.fromkeys(found)
    ]
    return MADE + (
        "\n# Errors\n\nWhat Headrace raises on purpose is a `headrace.errors.HeadraceError`; its message says in one line what "
        "was expected, what was found, where, and what to do. The stream and Luigi try again what may pass, and end at once "
        "with what will not. Messages of the worker, one by one: "
        "[Run the worker](../how-to/operations.md#messages-and-what-to-do).\n\n" + table(["error", "a retry may help", "meaning"], rows)
    )  # fmt: skip


def _below(root: type) -> Iterator[type]:
    children: list[type] = root.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def main() -> int:
    """Write the pages that changed."""
    for name, text in pages().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"docs/reference/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
