"""Which run a command line asks for. Without the name of a recipe, the largest one whose plan fits a GPU is taken."""

import gc
import shlex
import sys
from pathlib import Path

from scott_sparse.distributed import main_then_broadcast, on_all_processes, process_state
from scott_sparse.files import read_json
from scott_sparse.training.plan import DoesNotFit, Plan, Train, rehearse, show_time
from scott_sparse.training.recipe import Recipe, alternatives
from scott_sparse.training.resume import RECIPE
from scott_sparse.training.run import Run, prepare_run


def choose_run(arguments: list[str], train: Train) -> Run:
    """The run that a command line asks for, its folder not yet opened. With --plan, prints its plan and exits.

    `train` is the training loop. Raises ValueError or OSError, on all processes, for mistakes.
    """
    recipes = alternatives(arguments)
    names, reasons = list(recipes), []
    run: Run | None
    plan: Plan | None = None
    if len(recipes) > 1:
        device = process_state().device  # the processes find each other here
        held = main_then_broadcast(lambda: _recipe_in_folder(recipes))
        if held or device.type == "cpu":
            names = [held or names[-1]]
            reasons = ["as the run in its folder" if held else f"on a CPU the smallest of {', '.join(recipes)}"]
    for name in names:
        run = prepare_run(name, recipes[name])
        if name == names[-1]:  # whatever it takes
            break
        try:
            plan = rehearse(run, train)
        except DoesNotFit as misfit:
            reasons.append(f"{name}: {misfit}")
        else:
            budget = run.recipe.time_budget
            reasons.append(f"{name} takes {show_time(plan.seconds)}, with --time-budget {budget:g} (minutes)")
            if plan.seconds <= 60 * budget:
                break
        run = plan = None
        gc.collect()
    assert run is not None
    if reasons:
        command = shlex.join(["train/pretrain.py", name, *arguments])
        words = f"recipe {name}: {'; '.join(reasons)}. To choose it by name: {command}"
        run.console.print(words, highlight=False, markup=False, soft_wrap=True)
    if not run.recipe.plan:
        return run
    run.describe()
    plan = plan or rehearse(run, train)
    run.console.print(plan.table(), highlight=False, markup=False, soft_wrap=True)
    on_all_processes(plan.check_disk)
    run.accelerator.end_training()
    sys.exit()


def _recipe_in_folder(recipes: dict[str, Recipe]) -> str | None:
    """Which of some recipes the run in --out has, or the newest run on the same images in a default folder."""
    held = {}
    for name, recipe in recipes.items():
        path = (recipe.out or Path("runs") / name) / RECIPE
        if path.exists() and not recipe.overwrite:
            content = read_json(path)
            same_images = recipe.out or content.get("source", {}).get("data") == recipe.source.data
            if content.get("recipe") == name and same_images:
                held[path.stat().st_mtime] = name
    return held[max(held)] if held else None
