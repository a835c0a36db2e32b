"""The files of lsn/identify.py: which counts it reads, whether they are the study's, and where its results go."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import counts as activations
from cpt_utils.measures.counts import Counts

BY_HAND = "activation_count"  # in the published README activation.py writes to it, and identify.py reads from it


def refuse_stale(counts: list[Counts], study: Study) -> None:
    """Refuse the study's counts if its models have been trained again since.

    Raises:
        InputError: the counts are of none of the study's models.
    """
    made_for, here = model_of(counts), [study.get("base"), study.get("run")]
    if made_for is None or not all(isinstance(spec, str) and Path(spec).is_dir() for spec in here):
        return
    if not relatives.belongs(made_for, [ref.describe() for ref in [refs.model(here[0]), *refs.run(here[1])]]):
        raise InputError(
            f"{counts[0].path.parent} holds counts of {made_for['spec']}, which is neither the base nor a checkpoint "
            "of the study's run, or was trained again since; run lsn/activation.py again with --overwrite"
        )


def model_of(counts: list[Counts]) -> dict | None:
    """The model that was counted, if a file says so."""
    return next((c.header["models"]["model"] for c in counts if c.header.get("models")), None)


def n_interface(study: Study, n_layers: int, model: dict | None) -> int:
    """The number of interface layers in the study's split, which must be of the model that was counted."""
    path = study.input(None, "--n-layers", "layers")
    payload, header = results.read_json(path, "layer-specialize", n_layers=n_layers)
    made_for = (header.get("models") or {}).get("model")
    if model and made_for and not relatives.belongs(made_for, [model]):
        raise InputError(
            f"{path} was made for {made_for.get('spec')}, but the counts are of {model.get('spec')}; run "
            "layer-specialize/layer_specialize.py on this run, or give --n-layers"
        )
    layers = payload.get("interface_layers") if isinstance(payload, dict) else None
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{path} has no interface layers; give --n-layers, or the study key lsn.layers")
    return len(layers)


def finished(path: Path, schema: str, facts: dict, overwrite: bool) -> bool:
    """Whether `path` is a finished result whose header says `facts`; see `results.finished`."""

    def asked(head: dict) -> dict:
        return {fact: head.get(fact) for fact in facts}

    return results.finished(path, schema, facts, "another -o", overwrite, asked)


def counts_folder(args, study: Study, tag: str) -> Path:
    """The folder of the counts: -a, else the study's, else that of the published README."""
    by_hand, in_study = Path(BY_HAND), study.result("lsn_counts")
    if study and not args.activation and has_counts(by_hand, tag) and not has_counts(in_study, tag):
        cli.say(f"{in_study} has no counts {tag}.<lang>.pt; using those in {by_hand}")
        return by_hand
    return study.input(args.activation or (None if study else by_hand), "-a", "lsn_counts")


def has_counts(folder: Path, tag: str) -> bool:
    return folder.is_dir() and bool(activations.tags(folder).get(tag))


def refuse_one(langs: list[str], counted: list[str], folder: Path, tag: str, flags: str) -> None:
    """Refuse a single language, and name the command that works; `flags`: what it needs besides -t and -l."""
    if len(langs) > 1:
        return
    known = languages.find(counted, langs[0], default=langs[0])
    all_counted = [known, *(lang for lang in counted if lang != known)]
    hint = f"{folder} has counts of {counted[0]} only: run lsn/activation.py on token ids of another language first"
    if len(all_counted) > 1:
        hint = f"give all that were counted: python lsn/identify.py -t {tag} -l {','.join(all_counted)}{flags}"
    raise InputError(f"-l {langs[0]}: neurons of one language stand out only against other languages; {hint}")


def other_than(study: Study, counts: list[Counts]) -> str:
    """How counts differ from the study's (last checkpoint, all its languages), for file names; mostly empty."""
    parts, made_for = [], model_of(counts)
    with contextlib.suppress(InputError):  # results may outlive their models
        last = refs.run(study.value(None, "-t", "run"))[-1]
        if made_for and not relatives.same_model(made_for, last.describe()):
            parts.append(made_for["model_id"])
    wanted, have = (
        {languages.canonical(str(lang), any_tag=True) for lang in langs}
        for langs in (study.get("languages.lsn", []), [c.lang for c in counts])
    )
    if wanted and wanted != have:
        parts.append("-".join(c.lang for c in counts))
    return dotted(*parts)


def read_counts(args, study: Study, langs: list[str], tag: str) -> list[Counts]:
    """The counts of every language, all of one model; the study's own must be of one of its models."""
    folder = counts_folder(args, study, tag)
    files = activations.files(folder, tag)
    refuse_one(langs, list(files), folder, tag, f" -a {folder}" if args.activation else "")
    names = [languages.find(files, lang, what=f"{folder}/{tag}.<lang>.pt") for lang in langs]
    counts = [activations.read(files[name], lang) for name, lang in zip(names, langs, strict=True)]
    activations.refuse_mixed(counts)
    if study and not args.activation:
        refuse_stale(counts, study)
    return counts


def read_scores(args, study: Study, counts: list[Counts], tag: str, what: str) -> list[dict]:
    """The `what` (means or gradients) that lsn/text_scores.py measured for each language of `counts`: tensors by name,
    the `header` as a dict, and the `file`.

    Raises:
        InputError: a language has none, or they are of another model.
    """
    folder = study.input(args.scores, "--scores", "lsn_text_scores", f" --what {what}") / what
    names = {path.name.removeprefix(f"{tag}.").removesuffix(".pt"): path for path in folder.glob(f"{tag}.*.pt")}
    names = {name: path for name, path in names.items() if "." not in name}
    if not names:
        raise InputError(f"{folder} has no {tag}.<lang>.pt; run lsn/text_scores.py --what {what}, or give --scores")
    rows = []
    for c in counts:
        path = names[languages.find(names, c.lang, what=f"{folder}/{tag}.<lang>.pt")]
        content = results.read_tensors(path)
        head = json.loads(content.get("header") or "{}")
        if head.get("schema") != "text-scores" or head.get("what") != what:
            raise InputError(f"{path} holds no {what} of texts; write it with lsn/text_scores.py")
        if head.get("limit") is not None:
            raise InputError(f"{path} was made with --limit {head['limit']}; run lsn/text_scores.py without --limit")
        counted = model_of(counts)
        if counted and not relatives.same_model(counted, head["models"]["model"]):
            raise InputError(
                f"{path} is of {head['models']['model']['spec']}, but the counts are of {counted['spec']}; run "
                "lsn/text_scores.py and lsn/activation.py on one model"
            )
        if (head["n_layers"], head["ffn_width"]) != c.over_zero.shape:
            raise InputError(f"{path} is of another model than {c.path}; run lsn/text_scores.py on that one")
        rows.append(content | {"header": head, "file": path})
    return rows


def score_facts(row: dict) -> dict:
    """What headers record of one language's scores (a row of `read_scores`)."""
    head = row["header"]
    facts = {key: head[key] for key in ("tokens", "text_tokens", "n_used", "dtype")}
    return {"file": str(row["file"]), "sha256": results.file_sha256(row["file"])[:16], **facts}


def wanted_controls(args, study: Study, langs: list[str]) -> dict[str, str]:
    """The control language of each language: --control-lang; for that language the study's target, else the first of
    the others."""
    control = study.value(args.control_lang, "--control-lang", "languages.base")
    control = languages.find(langs, str(control), what="languages of the mask (-l)")
    others = [lang for lang in langs if lang != control]
    target = languages.find(others, str(study.get("languages.target", others[0])), default=others[0])
    return {lang: target if lang == control else control for lang in langs}


def wanted_rates(args, study: Study, known: dict[str, float | None]) -> dict[str, float]:
    """The rates of a method: --rate, also from the study, and those in `known` (rate -> default)."""
    rates = {"rate": study.value(args.rate, "--rate", "lsn.rate", 0.01)}
    for name in ("filter_rate", "bar_rate"):
        given = getattr(args, name)
        if name in known:
            rates[name] = next(value for value in (given, known[name], rates.get("filter_rate")) if value is not None)
        elif given is not None:
            raise InputError(f"--{name.replace('_', '-')} means nothing to --method {args.method}; leave it out")
    for name, value in rates.items():
        if type(value) not in (int, float) or not 0 < value <= 1:
            where = "--rate (study key lsn.rate)" if name == "rate" else f"--{name.replace('_', '-')}"
            raise InputError(f"{where} is {value!r}; give a share above 0 and at most 1")
    return {name: float(value) for name, value in rates.items()}


def output_paths(study: Study, tag: str, args, layers: bool = True) -> tuple[Path, Path | None, Path | None]:
    """The paths of mask, control mask and layers. Outside a study the last two are None unless asked for; the last one
    in a study, too, if not `layers`."""
    out = Path(args.output or "result") if args.output or not study else study.result("lsn_mask").parent

    def path(given: str | None, name: str) -> Path | None:
        return Path(given) if given else out / f"{tag}.{name}.json" if study else None

    layers_path = path(args.layers_out, "layers") if layers or args.layers_out else None
    return out / f"{tag}.json", path(args.control_mask_out, "control"), layers_path


def wanted_layers(study: Study, args, langs, path: Path | None, n_layers: int, model) -> tuple[str | None, int | None]:
    """The language and the number of layers for the layers file; (None, None) if none is written.

    Raises:
        InputError: they are not given, the language has no counts, or the model has fewer layers.
    """
    if path is None:
        return None, None
    target = study.value(args.layers_lang, "--layers-lang", "languages.target")
    lang = languages.find(langs, target, what="languages of the mask (-l)")
    n = study.value(args.n_layers, "--n-layers", "lsn.layers", None)
    n = n_interface(study, n_layers, model) if n is None else n
    if type(n) is not int or not 1 <= n <= n_layers:
        raise InputError(f"{n} layers asked for, but the model has {n_layers}; give --n-layers from 1 to {n_layers}")
    return lang, n


def token_facts(one: Counts) -> dict:
    """What headers record of one language's tokens."""
    kept = {key: one.header[key] for key in ("tokens", "dtype", "block_size") if key in one.header}
    return {"n_tokens": one.n, "counts": one.path.name, "counts_sha256": one.hash(), **kept}
