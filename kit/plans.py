"""RUNS/plan.json: the models and seeds that were planned before there were results.

A list of {date, dataset, recipe, overrides, models, seeds}; overrides are the differences from the
recipe. run_all.sh adds an entry before a study's first run, and another if more is requested once
there are results. Needs no torch.
"""

import itertools
import time
from argparse import Namespace
from pathlib import Path

from kit.command_line import UserError, in_one_line, is_name
from kit.files import check, locked, read_json, write_json
from kit.runs import COUNT

STUDY = ("dataset", "recipe", "overrides")  # equal in all entries of one study
PLAN = dict(date=str, dataset=str, recipe=str, overrides=dict, models=[is_name], seeds=[COUNT])


def runs_of(plan: dict) -> set[tuple[str, int]]:
    return {*itertools.product(plan["models"], plan["seeds"])}


def read_plans(runs: Path) -> list[dict]:
    """RUNS/plan.json's entries. Raises UserError if it is damaged."""
    path = runs / "plan.json"
    try:
        return [check(plan, PLAN) for plan in read_json(path)] if path.exists() else []
    except Exception as error:  # a damaged file can raise anything
        advice = "mend it, or delete it to plan anew"
        raise UserError(f"{path} is damaged ({in_one_line(error)}): {advice}") from error


def add_plan(planned: list[Namespace]) -> None:
    """Adds an entry for these runs' settings, unless all of them are planned already. It replaces
    the study's earlier entries if there are no results yet."""
    first, runs = planned[0], planned[0].runs
    wanted = dict(dataset=first.dataset_name, recipe=first.recipe, overrides=first.overrides)
    for key in ("model", "seed"):
        wanted[f"{key}s"] = list(dict.fromkeys(getattr(run, key) for run in planned))
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs, "plan.json"):
        plans = read_plans(runs)
        mine = [plan for plan in plans if all(plan[key] == wanted[key] for key in STUDY)]
        if runs_of(wanted) <= set().union(*map(runs_of, mine)):
            return
        results = (runs / wanted["dataset"] / wanted["recipe"]).glob("*/seed*/result.json")
        kept = plans if any(results) else [plan for plan in plans if plan not in mine]
        line = {"date": time.strftime("%Y-%m-%d", time.gmtime())} | wanted
        write_json(runs / "plan.json", [*kept, line])
