"""What a report says of a run, and of several runs together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dmcp.report.figure import short
from dmcp.report.front import DENSE, draw_front
from dmcp.report.pictures import Picture, chain_pictures, search_pictures, training_pictures
from dmcp.report.run import Run
from dmcp.report.tables import (
    Family,
    Table,
    bound_of,
    comparison_tables,
    families,
    ledger_table,
    network_name,
    results_table,
)


@dataclass(frozen=True)
class Section:
    """A part of a chapter.

    Attributes:
        id, title: of it.
        facts: by name.
        notes: lines, each a paragraph: what is missing, say.
        tables: the numbers.
        pictures: with the folder that their files go to.
        code: a command line.
    """

    id: str
    title: str
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folder: Path = Path()
    code: str = ""


@dataclass(frozen=True)
class Chapter:
    """What the page says of one run.

    Attributes:
        id, title: of it.
        facts: what was asked for, by name.
        tiles: the numbers that matter most: name, value, what it compares to.
        sections: the rest.
    """

    id: str
    title: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]


def overview_of(runs: Sequence[Run], folder: Path) -> list[Section]:
    """What finished runs found together: a section for each network and its data.

    Args:
        runs: comparisons among them are left out, they have a front of their own.
        folder: where the pictures go.
    """
    found = families(runs)
    sections = []
    for number, family in enumerate(found, start=1):
        name = "front" if len(found) == 1 else f"front-{number}"
        title = f"Accuracy and cost: {family.name}"
        sections.append(_front(Section(name, title, folder=folder), family, family.table(), name))
    return sections


def chapter_of(run: Run, id: str, folder: Path, *, every_unit: bool, alone: bool) -> Chapter:
    """What there is to say of a run.

    Args:
        run: it.
        id: begins the identifiers of everything in the chapter.
        folder: where the pictures go.
        every_unit: show all units where a picture has a panel for each.
        alone: whether there is no overview, which else has the accuracies drawn.
    """
    sections = [_result(run, id, folder, alone=alone)]
    if run.kind != "compare":
        sections.append(_training(run, id, folder))
    if run.kind == "search":
        sections.append(_chains(run, id, folder, every_unit))
    if run.kind != "train":
        sections += _searches(run, id, folder, every_unit)
    if run.kind != "compare" or run.ledger is not None:
        sections.append(_ledger(run, id))
    return Chapter(id, run.name, _facts(run), _tiles(run), sections)


def _front(section: Section, family: Family, table: Table, name: str) -> Section:
    """The networks of a family in a table and a picture of that name."""
    caption = "Top-1 on the test images against MACs."
    if family.repeated:
        caption += " Runs that differ in their seed alone are one point, with the standard "
        caption += "deviation over them."
    picture = Picture(
        name,
        caption,
        f"Accuracy against MACs of {len(family.rows)} trained networks of {family.name}.",
        partial(draw_front, family.records()),
    )
    tables = [table, *family.published()]
    return replace(section, tables=tables, pictures=[picture])


def _result(run: Run, id: str, folder: Path, *, alone: bool) -> Section:
    section = Section(f"{id}-results", "Result", folder=folder)
    if run.results is None:
        what = "comparison" if run.kind == "compare" else "run"
        note = f"The {what} is not finished: it has no results.json yet."
        return replace(section, notes=[note])
    if run.kind == "compare":
        return _comparison(run, run.results, section)
    if alone:
        (family,) = families([run])
        return _front(section, family, results_table(run), "front")
    return replace(section, tables=[results_table(run)])


def _comparison(run: Run, results: Mapping[str, Any], section: Section) -> Section:
    records = results["records"]
    picture = Picture(
        "front",
        "Top-1 on the test images against MACs, means and standard deviations over the seeds.",
        f"Accuracy against MACs of {len(records)} trained networks.",
        partial(draw_front, records),
    )
    return replace(
        section,
        title="Methods side by side",
        notes=[f"{results['left']} tasks are left to do."] if results.get("left") else [],
        tables=comparison_tables(run),
        pictures=[picture] if records else [],
    )


def _training(run: Run, id: str, folder: Path) -> Section:
    pictures = training_pictures(run)
    notes = [] if pictures else ["Nothing was recorded (yet): there is no metrics.jsonl."]
    notes += [f"Warned: {warning}" for warning in (run.ledger or {}).get("warnings") or []]
    return Section(f"{id}-training", "Training", notes=notes, pictures=pictures, folder=folder)


def _chains(run: Run, id: str, folder: Path, every_unit: bool) -> Section:
    pictures = chain_pictures(run, every_unit=every_unit)
    notes = [] if pictures else ["The chains were not recorded (yet): there is no chains.jsonl."]
    title = "The chains over time"
    return Section(f"{id}-chains", title, notes=notes, pictures=pictures, folder=folder)


def _searches(run: Run, id: str, folder: Path, every_unit: bool) -> Iterator[Section]:
    if not run.searches:
        note = "No search is finished yet: there is no search.json."
        yield Section(f"{id}-found", "What was found", notes=[note])
    for number, (search, path) in enumerate(run.searches.items(), start=1):
        yield Section(
            f"{id}-found-{number}",
            f"What was found: {search}" if search else "What was found",
            pictures=search_pictures(path, every_unit=every_unit),
            folder=folder / search,
        )


def _ledger(run: Run, id: str) -> Section:
    section = f"{id}-ledger", "What it cost, and how to repeat it"
    if run.ledger is None:
        return Section(*section, notes=["No account was kept: there is no ledger.json."])
    ledger = run.ledger
    facts = {"device": ledger.get("device"), **(ledger.get("versions") or {})}
    facts["commit"] = ledger.get("commit")
    command = ledger.get("command")
    notes = []
    if not ledger["phases"]:
        notes.append("No phase is finished yet.")
    if not command:
        notes.append("The command is not known: the run was not started from the command line.")
    return Section(
        *section,
        facts=_named(facts),
        notes=notes,
        tables=[ledger_table(ledger)] if ledger["phases"] else [],
        code=str(command or ""),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    config = run.config or {}
    network = config.get("network") or {}
    return _named(
        {
            "folder": run.path,
            "network": network_name(run) if network else None,
            "data": network.get("data"),
            "budget": bound_of(run) or ", ".join(map(str, config.get("budgets") or [])),
            "search": _epochs(config.get("search_epochs")),
            "retraining": _epochs(config.get("retrain_epochs")),
            "training": _epochs(config.get("epochs")),
            "batch size": network.get("batch_size"),
            "groups": config.get("groups"),
            "divisor": config.get("divisor"),
            "seed": network.get("seed"),
        }
    )


def _named(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _epochs(count: int | None) -> str | None:
    return None if count is None else f"{count} epoch{'s' * (count != 1)}"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The pruned network in four numbers, against the whole one if that was trained."""
    rows = {row["network"]: row for row in (run.results or {}).get("networks", [])}
    pruned = next((rows[name] for name in ("dmcp", "pruned", DENSE) if name in rows), None)
    if pruned is None:
        return []
    whole = rows.get(DENSE, pruned)
    against = whole is not pruned
    tiles = []
    for name, key in (("MACs", "macs"), ("Parameters", "params")):
        share = f"{pruned[key] / whole[key]:.0%} of {short(whole[key], key)}" if against else ""
        tiles.append((name, short(pruned[key], key), share))
    gain = f"{100 * (pruned['top1'] - whole['top1']):+.2f}".replace("-", "−")
    versus = f"{gain} points against the whole network" if against else ""
    tiles.append(("Top-1", f"{100 * pruned['top1']:.2f} %", versus))
    seconds = pruned["seconds"]
    spent = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return [*tiles, ("Time", spent, "search and training" if against else "training")]
