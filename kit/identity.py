"""When two runs may be compared: one definition, which every script asks. Needs no torch.

Settings and data: where they differ, it is another run. It is neither resumed nor paired, and what
differs is named. Code, device, torch, precision and mode should be the same: where they differ, the
verdict says in what. Where a run or its images lie does not count.
"""

from pathlib import Path

from kit.command_line import UserError

# What config.json holds beside settings: where things lie, and what follows from other settings.
# Everything else in it counts, so that a new setting cannot be forgotten.
NO_SETTING = {
    "command", "data_dir", "dataset", "runs", "device", "target_acc", "overwrite", "keep_last",
    "dry_run", "self_check", "overrides", "quick", "base_model", "auto_precision",
}  # fmt: skip
NOT_USED = (None, 0, False, "half", "epoch", "best")  # how config.json says so
FASHION_MNIST = "023af56f2df4044c"  # the digest: its files were always verified
CIRCUMSTANCES = ("device", "torch", "precision", "mode")  # and the code


def settings_of(config: dict) -> dict:
    """What makes another run of it, a setting that is not used as None. config: config.json's."""
    older = {
        "dataset_name": Path(str(config.get("dataset", ""))).name,
        "position": config.get("place"),
        "optimizer": "AdamW" if config.get("weight_decay") else "Adam",
    }
    if older["dataset_name"] == "fashion_mnist":
        older["data"] = FASHION_MNIST
    stated = {key: value for key, value in config.items() if value is not None}
    counts = (older | stated).items()
    return {
        key: None if value in NOT_USED else value
        for key, value in counts
        if key not in NO_SETTING and key != "place"
    }


def different_settings(there: dict, here: dict) -> list[str]:
    """In words, what is not the same `there` as it is `here`. Both as in settings_of."""
    special = {"data": "other images or labels"}
    return [
        special.get(key) or f"{key} {there.get(key) or 'none'} instead of {here.get(key) or 'none'}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def refuse_another_run(folder: Path, there: dict, config: dict, ignore=frozenset()) -> None:
    """Raises UserError unless `there`, the config.json in `folder`, is that of this run, as far as
    `config` is known."""
    before, now = (
        {key: value for key, value in settings_of(c).items() if key in config.keys() - ignore}
        for c in (there, config)
    )
    if different := different_settings(before, now):
        raise UserError(
            f"{folder} holds a run with {'; '.join(different)}: use --overwrite to discard that "
            "run, or another --runs folder"
        )


def edited(then: dict, now: dict) -> list[str]:
    """Of {script: sha256} and another, those edited, or else those that only one of them has."""
    changed = [name for name in then.keys() & now.keys() if then[name] != now[name]]
    return sorted(changed or then.keys() ^ now.keys())


def who(runs: list, name=lambda run: run.result["model"]) -> str:
    """'se seeds 0 1, baseline seed 0' of runs."""
    seeds = {}
    for run in runs:
        seeds.setdefault(name(run), set()).add(run.seed)
    return ", ".join(
        f"{model} seed{'s' * (len(of) > 1)} {' '.join(map(str, sorted(of)))}".strip()
        for model, of in seeds.items()
    )


def unlike(runs: list, here: list, there: list = ()) -> list[str]:
    """In what of code, device, torch, precision and mode these runs (finished.Run) differ.

    They are of the runs `here`, and of those `there`, which are compared with them.
    """
    found, elsewhere = [], {run.folder for run in there}

    def name(run) -> str:
        return run.result["model"] + " there" * (run.folder in elsewhere)

    for key in CIRCUMSTANCES:
        groups = {}
        for run in runs:
            groups.setdefault(run.circumstances[key], []).append(run)
        if len(groups) > 1:
            # Where all runs with one seed are alike, so are pairs, and seeds are named alone.
            of_seeds = {(run.seed, run.circumstances[key]) for run in [*here, *there]}
            in_pairs = len(of_seeds) == len({seed for seed, _ in of_seeds})
            names = (lambda run: "") if in_pairs else name
            described = (f"{who(own, names)}: {value}" for value, own in groups.items())
            found.append(f"{key} {'; '.join(described)}")
    baseline_first = sorted(runs, key=lambda run: run.result["model"] != "baseline")
    codes = [run.circumstances["code"] for run in baseline_first]
    usual = max(codes, key=codes.count, default={})  # of those that as many have, the first
    others = [run for run in runs if run.circumstances["code"] != usual]
    if others:
        codes = [run.circumstances["code"] for run in others]
        scripts = sorted({script for code in codes for script in edited(code, usual)})
        found.append(f"{who(others, name)}: trained by other code ({', '.join(scripts)})")
    for run in runs:
        if run.env.get("changes"):
            found.append(f"{who([run], name)}: {'; '.join(map(str, run.env['changes']))}")
    return found
