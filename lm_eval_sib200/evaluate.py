"""Evaluate many models on lm_eval tasks, and write the same files as the lm_eval command line.

In:   models and runs (in a study: its base and run); tasks in this folder (data from the hub), in --include-path, or
      made for the local TSV files in --tsv-dir
Out:  <output>/<model, each / as __>/results_<time>.json, with an additional key `_header`. A model that already has a
      result for the same weights, prompts and settings is skipped, so an interrupted evaluation can be resumed.
--swap evaluates the models with parts of the base that step 4 or 11 would write, without writing them.
`lm_eval --model hf --include_path lm_eval_sib200 ...` gives the same numbers but takes about 17 s more per model.

    python lm_eval_sib200/evaluate.py MODEL RUN --tasks sib200_gle_Latn -o results/lm_eval
    python lm_eval_sib200/evaluate.py MODEL --swap semantic_hub --base BASE --layers layers.json --tasks sib200_gle_Latn -o results/swapped
    python lm_eval_sib200/evaluate.py RUN --steps 15 --tasks sib200_qaa_Latn --tsv-dir DIR --limit 20 -o build/try
"""  # noqa: E501

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from cpt_utils.base import cli, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import opening, refs, tokenization, tokenizer_id
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.models import loading

swaps = cli.sibling("lm_eval_sib200/swaps.py")

HERE = Path(__file__).resolve().parent
SCHEMA = "lm_eval"
RESULTS = {"lm_eval": "lm_eval"}


def task_folder(args, study: Study, scratch: Path) -> Path:
    """The folder with the tasks: --include-path; or made in `scratch` for local TSV files; or this one (hub data)."""
    if args.include_path and args.tsv_dir:
        raise InputError("--include-path and --tsv-dir are mutually exclusive: give one of them")
    if args.include_path:
        if not Path(args.include_path).is_dir():
            raise InputError(f"{args.include_path} is not a folder; --include-path needs a folder of task files")
        return Path(args.include_path)
    data = args.tsv_dir or study.get("data.task.dir")
    if data is None:
        return HERE
    if args.tsv_dir is None and any(Path(data).glob("*.yaml")):
        return Path(data)
    generate = cli.sibling("lm_eval_sib200/generate.py")
    folder = scratch / "tasks"
    generate.write_folder(generate.tsv_files(data), folder)
    return folder


def is_local(folder: Path) -> bool:
    """Whether the tasks in `folder` read local files only."""
    texts = [path.read_text(encoding="utf-8") for path in (*folder.glob("_default_yaml"), *folder.glob("*.yaml"))]
    paths = set(re.findall(r'^dataset_path: *"?([^"\n]+)"?', "\n".join(texts), re.M))
    return bool(paths) and paths <= {"csv", "json"}


def load_tasks(folder: Path, names: list[str]):
    """(task manager, {task: Task}) for `names`, from `folder` or, if any is not there, also from lm_eval itself.

    Raises:
        InputError: an unknown task, or data that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading lm_eval's 14,000 task files takes about ten seconds
        known = manager.all_tasks
        manager = TaskManager(include_path=str(folder))
        if unknown := sorted(set(names) - set(manager.all_tasks)):
            have = ", ".join(known[:8]) + (" ..." if len(known) > 8 else "")
            raise InputError(f"no task {unknown[0]!r} in {folder} ({have or 'none'}) or in lm_eval itself")
    try:
        return manager, manager.load(names)["tasks"]
    except Exception as error:  # datasets raises errors of its own, of the hub and of pandas
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the data of {', '.join(names)} cannot be loaded: {reason} (without the hub, give --tsv-dir local files)"
        ) from error


def fingerprint(task, num_fewshot: int | None) -> str:
    """A hash of what the model is asked: prompt, choices and target of every row, and of any few-shot pool."""
    digest = hashlib.sha256()
    shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
    pools = [task.eval_docs] + ([task.fewshot_docs()] if shots else [])
    for docs in pools:
        for doc in docs:
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
            digest.update(json.dumps([task.doc_to_text(doc), choices, task.doc_to_target(doc)]).encode())
    return digest.hexdigest()[:16]


def identity(
    ref: refs.ModelRef, base: refs.ModelRef | None, data: dict[str, dict], args, dtype, swap: dict | None = None
) -> dict:
    """The header facts that must agree for two evaluations to be the same.

    `data`: `prompts`, a hash for each task, and `versions` of the tasks.
    """
    return {
        "models": {"model": ref.describe()},
        "tokenizer": tokenizer_id.tokenizer_used(ref, base=base),
        "data": data,
        "num_fewshot": args.num_fewshot,
        "dtype": str(dtype).removeprefix("torch."),
        "limit": args.limit,
        **({"swap": results.plain(swap)} if swap else {}),
    }


def finished(output: Path, wanted: dict) -> Path | None:
    """The newest result file in `output` whose header agrees with `wanted`, or None.

    The model folder must be the same, however it is spelled: checkpoints with the same weights have separate results. A
    limited run never replaces a full one. Batch size and device may differ: they affect only the last digits.
    """
    wanted_path = _model_path(wanted)
    for path in sorted(output.glob("*/results_*.json"), key=lambda path: path.name, reverse=True):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            head = content.get(results.HEADER) or {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            cli.once(f"{path} is not valid JSON and is ignored", cli.warn)
            continue
        if _model_path(head) != wanted_path:
            continue
        done = {"prompts": head.get("data", {}).get("prompts", {}), "versions": content.get("versions", {})}
        same = all(done[kind].get(task) == value for kind in done for task, value in wanted["data"][kind].items())
        # Older headers do not name the tokenizer.
        facts = {*wanted, "swap"} - {"data"} - ({"tokenizer"} - {*head})
        if same and all(results.same(head.get(fact), wanted.get(fact)) for fact in facts):
            return path
    return None


def _model_path(head: dict) -> str | None:
    """The location of a header's model: its folder, or its name on the hub."""
    spec = ((head.get("models") or {}).get("model") or {}).get("spec")
    return spec and (os.path.abspath(spec) if os.path.isdir(spec) else spec)


def evaluate(ref: refs.ModelRef, base: refs.ModelRef | None, manager, args, dtype, device, swap=None) -> tuple:
    """(results, tracker) of `lm_eval.simple_evaluate` for one model, loaded strictly, in the CLI's format.

    `swap`: (pair, recipe); the recipe's edits are applied to the model in memory.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    model = loading.load_model(ref, dtype, device, args.device_map)
    tokenizer = tokenization.load_tokenizer(ref, base=base)
    with _quiet("lm_eval"):  # it warns that a loaded model ignores loader arguments
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    model_args = {"pretrained": ref.spec if ref.is_local else ref.repository}
    model_args |= {key: value for key in ("revision", "subfolder") if (value := getattr(ref, key))}
    model_args["dtype"] = str(dtype).removeprefix("torch.")
    model_args["pretrained"] += f"+{args.swap}" if swap else ""
    tracker = EvaluationTracker()
    # lm_eval assumes that only the first process of a launch has results; here each has those of its own model.
    os.environ.pop("LOCAL_RANK", None)
    with in_memory.apply(model, swap[1], swap[0]) if swap else contextlib.nullcontext():
        result = simple_evaluate(
            model=lm,
            model_args=model_args,
            tasks=args.tasks,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            device=str(device),
            limit=args.limit,
            log_samples=args.log_samples,
            evaluation_tracker=tracker,
            task_manager=manager,
        )
    # Record the model as lm_eval does when it loads it itself.
    result["config"] |= {"model": "hf", "model_sha": ref.resolved_revision() or ""}
    result["config"]["model_revision"] = ref.revision or "main"
    tracker.general_config_tracker.model_source = "hf"
    return result, tracker


def save(found: dict, tracker, output: Path, header: dict) -> Path:
    """Write the result where and as lm_eval writes it, but atomically; lm_eval's writer only logs a failure.

    Sample files are written first, so if there is a result file, they are complete.
    """
    found[results.HEADER] = header
    samples = found.pop("samples", None) or {}
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        tracker.output_path = scratch
        tracker.save_results_aggregated(results=found)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
        written = list(Path(scratch).glob("*/results_*.json"))
        logs = list(Path(scratch).glob("*/samples_*.jsonl"))
        if not written or len(logs) < len(samples):
            raise InputError(f"lm_eval could not write its result to {scratch}; is the disk full?")
        json.loads(written[0].read_text(encoding="utf-8"))
        path = output / written[0].parent.name / written[0].name
        for file in (*logs, written[0]):
            with results.replacing(path.parent / file.name) as temporary:
                shutil.copyfile(file, temporary)
    return path


def scores(found: dict) -> list[str]:
    """One line per task or group: accuracy with its binomial standard error, and the number of rows."""
    lines = []
    for name, row in (found["results"] | found.get("groups", {})).items():
        parts = []
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in row:
                error = row.get(f"{metric}_stderr,none")
                error = f" ±{error:.3f}" if isinstance(error, int | float) else ""
                parts.append(f"{metric} {row[f'{metric},none']:.3f}{error}")
        n = found["n-samples"].get(name, {}).get("effective")
        lines.append(f"  {name}: {', '.join(parts)}" + (f" ({n} rows)" if n else " (macro mean)"))
    return lines


@contextlib.contextmanager
def _quiet(logger: str):
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("models", nargs="*", metavar="MODEL", help="models and runs; default: the study's base and run")
    cli.add_named_models(p, None, "MODEL or in addition to it")
    text = "task or group names, e.g. sib200_gle_Latn; default: the study's data.task.name"
    p.add_argument("--tasks", metavar="T,T,..", type=lambda text: text.split(","), help=text)
    p.add_argument("--include-path", metavar="FOLDER", help="folder of task files; default: this one (hub data)")
    text = "local data, <language>/{train,dev,test}.tsv; default: the study's data.task.dir"
    p.add_argument("--tsv-dir", metavar="DIR", help=text)
    p.add_argument("-o", "--output", metavar="FOLDER", help="default: the study's lm_eval folder")
    swaps.add_flags(p)
    text = "also write samples_<task>_<time>.jsonl, as lm_eval does; not added to finished results"
    p.add_argument("--log-samples", action="store_true", help=text)
    p.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each prompt; default here: none")
    cli.add_run_flags(p)
    cli.add_forward_flags(p, device_map=True)
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    specs = [*args.models, *(args.named_run or [])]
    if specs:
        chosen = refs.models(specs, args.steps)
    else:
        chosen = [refs.model(study.value(None, "MODEL", "base"))]
        chosen += refs.run(study.get("run"), args.steps) if study.get("run") else []
    chosen = [refs.model(ref.spec) for ref in chosen]  # a model is the same whether named alone or as part of a run
    opening.look_over(chosen)
    tasks = study.value(args.tasks, "--tasks", "data.task.name")
    args.tasks = tasks if isinstance(tasks, list) else str(tasks).split(",")
    swap = swaps.Swap.from_arguments(args, study)
    output = study.output(args.output, "--output", "lm_eval")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # for lm_eval's bars in log files; read on import
    process, dtype = processes.from_arguments(args, study)

    with tempfile.TemporaryDirectory() as scratch:
        folder = task_folder(args, study, Path(scratch))
        if is_local(folder) and all(ref.is_local for ref in chosen):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # `datasets` reports even the use of local CSV files
        with _quiet("lm_eval"):
            manager, loaded = load_tasks(folder, args.tasks)
        data = {
            "prompts": {name: fingerprint(task, args.num_fewshot) for name, task in loaded.items()},
            "versions": {name: task.VERSION for name, task in loaded.items()},
        }

        def work(item: tuple[int, refs.ModelRef]) -> str:
            number, ref = item
            cli.say(f"[{number}/{len(chosen)}] {ref.spec}")
            if swap is None:
                return evaluate_once(ref, study, manager, data, output, args, dtype, process)
            with surgery.Pair(swap.base, ref) as pair:
                recipe = swap.recipe(pair)
                cli.say(f"  with {recipe.words}, swapped in memory")
                edits = pair, recipe, swap.facts(pair, recipe), swap.gate
                return evaluate_once(ref, study, manager, data, output, args, dtype, process, edits)

        # Each process evaluates whole models and writes separate files, so results do not depend on their number.
        for done in process.rounds(list(enumerate(chosen, start=1)), work):
            for i, ((number, ref), text) in enumerate(done):
                cli.say(text if i == 0 else f"[{number}/{len(chosen)}] {ref.spec}\n{text}")


def evaluate_once(
    ref, study: Study, manager, data: dict[str, dict], output: Path, args, dtype, process, swap: tuple | None = None
) -> str:
    """Evaluate one model and save its result, unless the same evaluation is finished; returns the text to print.

    `swap`: (pair, recipe, facts and gate for the header) of a swap in memory.
    """
    base = refs.model(study.get("base")) if study.get("base") else None
    if swap:
        base = swap[0].base_ref
    wanted = identity(ref, base, data, args, dtype, swap and swap[2])
    done = None if args.overwrite else finished(output, wanted)
    if done:
        return f"  finished before: {done}"
    result, tracker = evaluate(ref, base, manager, args, dtype, process.device, swap and swap[:2])
    more = {"gate": swap[3]} if swap else {}
    path = save(result, tracker, output, results.header(SCHEMA, **wanted, **more, device=str(process.device)))
    return "\n".join([*scores(result), f"  {path}"])


if __name__ == "__main__":
    cli.run(main)
