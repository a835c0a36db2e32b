"""What continued pre-training costs on every language: the loss on held-out text at the base and at every checkpoint.

A language that the model knew and that CPT leaves out may be forgotten. The negative log-likelihood (NLL) per byte of
held-out text shows how far, at each step, for each language; its change is against the base on the same documents.

In:   B and RUN (default: the study's), held-out text by language (--heldout LANG=FILE; default: all of data.heldout).
Out:  OUT (default: the study's language-loss/language_loss.json): {language: {"base" or step: {`nll_per_byte`, ..}}};
      next to it .pt (every document), .md (a table) and a figure with a line for each language.

A killed run resumes with the next model. On several GPUs: accelerate launch language-loss/language_loss.py ...; each
process measures whole models, and the numbers are the same.

Full: python language-loss/language_loss.py --base meta-llama/Llama-2-7b-hf --run runs/eus --heldout en=en.txt eu=eu.txt --output loss.json
Tiny: python language-loss/language_loss.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import math
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import evaluation, over_run

SCHEMA = "language-loss"
RESULTS = {"language_loss": "language-loss/language_loss.json"}
ASKED = {"language_loss": "Which languages does continued pre-training teach, and which does the model forget?"}
CAPTIONS = {
    "language_loss": """Part I: 5. Loss by language
        The loss on held-out text of each language at the base (step 0) and at every checkpoint, and its change against
        the base on the same documents, with 95 % bootstrap intervals over documents. Above 0 a language is forgotten,
        below 0 it is learned.""",
}
BASE = over_run.BASE


# ---------------------------------------------------------------- the method


def losses(model, ref: refs.ModelRef, tokenizer, texts: dict[str, list], batch_size: int | None) -> dict[str, list]:
    """NLL per byte of every document (context, text), by language: the loss that swaps are measured with."""
    arch = archs.for_config(ref.config())
    tests = {lang: evaluation.Test(heldout=documents, batch_size=batch_size) for lang, documents in texts.items()}
    return {
        lang: test.on(model, arch, tokenizer, f"{ref.spec} on {lang}")["units"]["nll_per_byte"]
        for lang, test in tests.items()
    }


def summarize(units: dict[str, dict[str, list[float]]], seed: int) -> dict[str, dict[str, dict]]:
    """The payload, from `units`: language -> model ("base" or step) -> NLL per byte of each document.

    A document's value is its NLL in nats over the mean bytes of a document, so the mean is all nats over all bytes.
    Intervals: bootstrap over documents, with the same draws for all models of a language.
    """
    by_language: dict[str, dict[str, dict]] = {}
    for lang, models in units.items():
        values = np.asarray(list(models.values()), dtype=np.float64)  # [models, documents]
        change = values - np.asarray(models[BASE], dtype=np.float64)
        low, high = stats.bootstrap_means(np.stack([values, change]), seed)  # [2, models]
        by_language[lang] = {}
        for i, (name, documents) in enumerate(models.items()):
            mean = math.fsum(documents) / len(documents)
            row = {"nll_per_byte": mean, "ci_low": float(low[0, i]), "ci_high": float(high[0, i])}
            row |= {"perplexity_per_byte": math.exp(mean), "documents": len(documents)}
            if name != BASE:
                ends = {"ci_low": float(low[1, i]), "ci_high": float(high[1, i])}
                row["change"] = {"mean": mean - by_language[lang][BASE]["nll_per_byte"], **ends}
            by_language[lang][name] = row
    return by_language


def table(payload: dict[str, dict[str, dict]]) -> str:
    """The result as a Markdown table, a line for each language and model."""
    head = ["language", "step", "documents", "nats per byte", "perplexity per byte", "change against the base"]
    lines = []
    for lang, models in payload.items():
        for name, row in models.items():
            change = row.get("change")
            changed = f"{change['mean']:+.4f} {_interval(change, '+')}" if change else ""
            loss = f"{row['nll_per_byte']:.4f} {_interval(row)}"
            lines.append([lang, name, row["documents"], loss, f"{row['perplexity_per_byte']:.4f}", changed])
    return results.markdown(head, lines)


def _interval(row: dict, sign: str = "") -> str:
    return f"[{row['ci_low']:{sign}.4f}, {row['ci_high']:{sign}.4f}]"


def draw(path: Path, found: dict[str, dict[str, dict]]) -> None:
    """A line for each language over training steps, the base at 0: its loss, and the change against the base."""
    last = {lang: abs(list(models.values())[-1].get("change", {}).get("mean", 0.0)) for lang, models in found.items()}
    named = sorted(last, key=last.get)[-(figures.MOST - 1) :] if len(last) > figures.MOST else list(last)
    with figures.style() as plt:
        fig, axes = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5 + 0.15 * (len(named) // 3)))
        axes[1].axhline(0, color=figures.colour("chance"), linewidth=0.6)
        for lang, models in found.items():
            steps = [0 if name == BASE else int(name) for name in models]
            look = {"color": "0.75", "zorder": 1}
            if lang in named:
                at = named.index(lang)
                look = {"color": figures.PALETTE[at], "marker": figures.MARKERS[at], "label": figures.language(lang)}
            unchanged = {"mean": 0.0, "ci_low": 0.0, "ci_high": 0.0}
            changes = [row.get("change", unchanged) for row in models.values()]
            for axis, key, rows in ((axes[0], "nll_per_byte", models.values()), (axes[1], "mean", changes)):
                axis.plot(steps, [row[key] for row in rows], **look)
                ends = [[row[end] for row in rows] for end in ("ci_low", "ci_high")]
                axis.fill_between(steps, *ends, color=look["color"], alpha=0.2, linewidth=0)
        for axis, words in zip(axes, ("NLL (nats per byte)", "change from the base\n(nats per byte)"), strict=True):
            axis.set_xlabel("training step (0 = base)")
            axis.set_ylabel(words)
        title = "bands: 95 % intervals over documents" + "; grey: languages that changed less" * (
            len(named) < len(last)
        )
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
        figures.save(fig, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    text = "held-out text, a document per line; default: the study's"
    p.add_argument("--heldout", nargs="+", metavar="LANG=FILE", help=text)
    over_run.add_flags(p, RESULTS["language_loss"])
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "language_loss")
    texts, facts = heldout(args, study)

    def measured(model, ref: refs.ModelRef, tokenizer) -> dict:
        return losses(model, ref, tokenizer, texts, args.batch_size)

    def write_all(by_model: dict[str, dict], request: dict) -> None:
        write(run.output, {lang: {name: units[lang] for name, units in by_model.items()} for lang in texts}, request)

    run.measure(SCHEMA, facts | {"batch_size": args.batch_size}, measured, write_all)


def heldout(args, study: Study) -> tuple[dict[str, list], dict]:
    """The documents by language, and the facts about them for a request."""
    files = cli.sibling("cpt/documents.py").language_files(args.heldout, "--heldout") or study.get("data.heldout", {})
    chosen = [lang for lang in files if files[lang]]
    if not chosen:
        raise InputError("no held-out text: give --heldout LANG=FILE .., or data.heldout in the study")
    languages.refuse_twice(chosen, "keep one of them in data.heldout")
    together = int(study.get("data.heldout_lines") or 1)
    texts, facts = evaluation.heldout_by_language(files, chosen, together, args.limit)
    return texts, {"heldout": facts, "lines": together, "limit": args.limit}


def write(output: Path, units: dict[str, dict[str, list[float]]], request: dict) -> None:
    """Write everything, from NLL per byte of each document by language and model; the JSON last."""
    payload = summarize(units, request["seed"])
    draw(output.with_suffix(""), payload)
    tensors = {lang: torch.tensor(list(rows.values()), dtype=torch.float64) for lang, rows in units.items()}
    results.write_tensors(output.with_suffix(".pt"), tensors)
    results.write_text(output.with_suffix(".md"), table(payload))
    names = {lang: languages.canonical(lang, any_tag=True) for lang in units}
    facts = over_run.header_facts(request, "heldout", "lines", "limit")
    results.write_json(output, payload, results.header(SCHEMA, languages=names, **facts))
    say(payload)
    cli.say(f"wrote {output}, the table {output.with_suffix('.md')} and the figure {output.with_suffix('.pdf')}")


def say(payload: dict[str, dict[str, dict]]) -> None:
    """Print, for each language, its loss at the base and the last checkpoint, and whether it was forgotten."""
    for lang, models in payload.items():
        name, last = list(models.items())[-1]
        change = last["change"]
        verdict = "worse" if change["ci_low"] > 0 else "better" if change["ci_high"] < 0 else "not clear of 0"
        cli.say(
            f"{lang}: {models[BASE]['nll_per_byte']:.4f} nats per byte at the base, {last['nll_per_byte']:.4f} at step "
            f"{name}: {change['mean']:+.4f} {_interval(change, '+')}, {verdict}"
        )


if __name__ == "__main__":
    cli.run(main)
