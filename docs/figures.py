"""Write docs/figures.md and docs/figures/: every figure of the scripts, redrawn from results of finished studies.

In:   study files, with paths relative to the current folder. A figure is drawn from the first study with its result.
Out:  docs/figures/<caption's name>.png, docs/figures.md, which also names figures for which no study has a result.

    python docs/figures.py demo/demo.yaml
    python docs/figures.py studies/demo.yaml demo/demo.yaml --seed 0
"""

from __future__ import annotations

import argparse
import functools
import io
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

from cpt_utils.base import cli, experiments, figures, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import benchmark

sibling = cli.sibling
evidence, paper = sibling("report/evidence.py"), sibling("report/figures.py")
PAGE = Path(__file__).with_suffix(".md")
LARGEST = 90_000  # bytes of a picture
HEAD = """# Figures

Written by `{command}`: every figure that the scripts draw, from existing results, with
its caption, the script that draws it and the study that it shows. Colours, widths, names of languages and the numbering
of layers are the same everywhere (`cpt_utils/base/figures.py`).

- Layers are numbered from 0. Hidden state 0 is the embeddings, and layer l outputs hidden state l + 1; if both matter,
  one is numbered below the panel and the other above it.
- Black is the base, orange the checkpoint or the new language, blue the semantic hub, vermilion the interface, pink
  attention, green the FFN; grey are controls, the untrained model and chance. Training steps run from light green to
  dark violet.
- Whiskers and bands are 95 % intervals, except for task accuracy over training steps, whose whiskers are standard
  errors.
- The demo's languages other than English are invented, and so are their codes.
"""


# ---------------------------------------------------------------- one figure each, from the result files of a study


def plain(step: str, script: str, source: evidence.Results, path: Path, *header: str, module: str = "") -> None:
    """The figure drawn by a script's `draw(path, payload, ..)`; further arguments are the named facts of the header."""
    payload, facts = source.json(source.path(step), sibling(script).SCHEMA)
    sibling(module or script).draw(path, payload, *(facts[key] for key in header))


def retrieval(source: evidence.Results, path: Path, models: str = "") -> None:
    """Base and run; or, with a pattern `models`, its matches, after the last checkpoint if it is for checkpoints."""
    folder = source.retrieval_folder()
    ids = [source.last["model_id"]] * ("checkpoint" in models) + sorted(
        file.stem for file in folder.glob(f"{models}.json")
    )
    files = [source.retrieval_path(ref) for ref in (source.base, *source.run)]
    files = [source.there(folder / f"{name}.json", "retrieval") for name in ids] if models else files
    if models and len(files) < 2:
        raise evidence.Missing(f"{folder} has no {models}.json")
    read = [results.read_json(file, "sentence-retrieval", **source.sides()) for file in files]
    lines = [(SimpleNamespace(**facts["models"]["model"]), payload) for payload, facts in read]
    twin = None if models else source.untrained()[0]
    title = " to ".join(map(figures.language, source.sides().values()))
    sibling("sentence-retrieval/sr_figure.py").draw(path, lines, twin, read[0][1]["n_used"], title)


def alignment(source: evidence.Results, path: Path) -> None:
    folder = source.study.result("alignment") / source.retrieval_folder().name
    files = [
        (SimpleNamespace(**ref), source.there(folder / f"{ref['model_id']}.json", "alignment"))
        for ref in (source.base, *source.run)
    ]
    named = tuple(map(figures.language, source.sides().values()))
    sibling("sentence-retrieval/sr_alignment.py").draw_files(path, files, folder / "untrained.json", named)


def layers(source: evidence.Results, path: Path) -> None:
    split, facts = results.read_json(source.path("layers"), "layer-specialize")
    title = Path(facts["retrieval"]).stem.replace("__", "/")
    sibling("layer-specialize/layer_specialize.py").draw(path, split, facts, title)


def weight_change(source: evidence.Results, path: Path) -> None:
    script = sibling("weight-diff/int_and_sem.py")
    payload, facts = source.json(source.path("int_and_sem"), script.SCHEMA)
    rows = payload["checkpoints"]
    means = {group: [row[f"{group}_avg"] for row in rows.values()] for group in script.GROUPS}
    counts = {group: len(facts["layers"][group]["layers"]) for group in script.GROUPS}
    script.draw(path, [int(step) for step in rows], means, counts)


def downstream(source: evidence.Results, path: Path) -> None:
    script = sibling("downstream-correlation/downstream_correlation.py")
    payload, _ = source.json(source.path("downstream"), script.SCHEMA)
    metric, rows = payload["metric"], {int(step): row for step, row in payload["values"].items()}
    points = {step: benchmark.Point(row[metric], row["n"], "") for step, row in rows.items()}
    changes = {
        step: {kind: row[key] for kind, key in script.LAYER_TYPES.items()}
        for step, row in rows.items() if "interface_avg" in row
    }  # fmt: skip
    script.draw(path, figures.accuracy(metric, payload["task"]), list(changes), points, changes, payload)


def lsn(what: str, source: evidence.Results, path: Path) -> None:
    script = sibling("lsn/identify.py")
    file = source.there(source.study.result("lsn_mask").with_suffix(".report.json"), "lsn_mask")
    payload, _ = source.json(file, script.REPORT)
    getattr(script.reporting, f"draw_{what}")(path, payload[what])


def cogsym(source: evidence.Results, path: Path) -> None:
    script = sibling("layer-ablation/cogsym.py")
    payload, facts = source.json(source.path("cogsym"), script.SCHEMA, source.base)
    script.draw(path, payload["layers"], payload["overlaps"], facts["n_layers"])


def spectrum(source: evidence.Results, path: Path) -> None:
    file = source.path("spectrum")
    payload, _ = source.json(file, "spectrum")
    sibling("spectral/spectrum_figure.py").draw(path, payload, results.read_tensors(file.with_suffix(".pt")))


def rewind_energy(source: evidence.Results, path: Path) -> None:
    plain("rewind", "spectral/rewind.py", source, path.with_name("rewind"))
    for suffix in (".pdf", ".png"):
        source.there(path.with_name(f"rewind.energy{suffix}"), "rewind").replace(path.with_suffix(suffix))


def claims(source: evidence.Results, path: Path) -> None:
    script = sibling("report/claims.py")
    payload, _ = source.json(source.path("claims"), script.SCHEMA)
    made = {name: claim.PANEL for name, claim in script.claims().items()}
    sibling("report/shown.py").draw(path, payload["claims"], made)


of = functools.partial
# Caption -> the function that draws it; `paper` is report/figures.py.
DRAWN = {
    "retrieval": retrieval,
    "alignment": alignment,
    "layers": layers,
    "weight_change": weight_change,
    "downstream": downstream,
    "controls": paper.layer_swap,
    "retrieval_swapped": of(retrieval, models="layer-swap__*"),
    "language_loss": of(plain, "language_loss", "language-loss/language_loss.py"),
    "bigram": of(plain, "bigram", "alignment/bigram.py"),
    "arms": of(plain, "arms", "cpt/compare_arms.py"),
    "compare": of(plain, "compare", "report/compare.py", module="report/compare_shown.py"),
    "attn_vs_ffn": paper.attention_ffn,
    "gradients": of(plain, "gradients", "alignment/gradients.py"),
    "lsn_counts": paper.lsn_counts,
    "lsn_overlap": of(lsn, "overlap"),
    "lsn_convergence": of(lsn, "convergence"),
    "deactivation": paper.deactivation,
    "lsn_methods": of(plain, "lsn_methods", "lsn/compare_methods.py", module="lsn/methods_shown.py"),
    "lsn_activation": paper.lsn_activation,
    "gate_lsn": of(plain, "gate_lsn", "weight-diff/gate_lsn.py"),
    "activation_correlation": paper.strengths,
    "component_swap": paper.component_swap,
    "retrieval_components": of(retrieval, models="*_swap__checkpoint-*"),
    "layer_ablation": lambda source, path: plain(
        "layer_ablation", "layer-ablation/ablation_sweep.py", source, path, "n_layers",
        module="layer-ablation/ablation_figure.py",
    ),
    "cogsym": cogsym,
    "runs": of(plain, "runs", "layer-ablation/compare_runs.py", module="layer-ablation/runs_shown.py"),
    "spectrum": spectrum,
    "heads": lambda source, path: plain(
        "heads", "spectral/heads.py", source, path, "n_layers", module="spectral/heads_figure.py"
    ),
    "rewind": of(plain, "rewind", "spectral/rewind.py"),
    "rewind_energy": rewind_energy,
    "truncate": of(plain, "truncate", "spectral/truncate.py"),
    "connect": of(plain, "connect", "spectral/connect.py"),
    "routing": of(plain, "routing", "moe-routing/routing.py"),
    "router_steering": of(plain, "router_steering", "moe-routing/steering.py"),
    "steering": of(plain, "steering", "steering/steer.py", module="steering/steer_report.py"),
    "claims": claims,
    "fig1_retrieval": paper.retrieval,
    "fig2_change": paper.change,
}  # fmt: skip
# Figures that no section of the report shows: section, subsection, text, script.
BESIDE = {
    "lsn_overlap": (
        "Part II", "2. Language-specific neurons",
        "How many of their neurons every two languages share (Jaccard); on the diagonal, how many each has. Of three "
        "languages or more.",
        "lsn/identify.py",
    ),
}  # fmt: skip


# ---------------------------------------------------------------- all of them


def captions() -> dict[str, tuple[str, str | None, str, str]]:
    """Section, subsection, text and script of every caption with a figure here, in the order of the parts."""
    rows = {
        name: (*row, script)
        for script in dict.fromkeys(by for _, by in experiments.said("CAPTIONS").values())
        for name, row in experiments.captions(script).items()
    }
    rows |= BESIDE
    positions = {name: (section, subsection or "", list(DRAWN).index(name))
                 for name, (section, subsection, *_) in rows.items() if name in DRAWN}  # fmt: skip
    parts = ["Part I", "Part II", "Part III", "Part IV", "Part V"]
    order = sorted(positions, key=lambda name: (
        parts.index(positions[name][0]) if positions[name][0] in parts else len(parts), *positions[name]))  # fmt: skip
    return {name: rows[name] for name in order}


def draw(studies: list[Study], folder: Path) -> dict[str, tuple[str, str]]:
    """Every figure for which one of the studies has results, as PDF and PNG in `folder`.

    Returns:
        name -> (the study's name, "") or, without results, ("", the reason).
    """
    sources = [evidence.Results(study, draws=0) for study in studies]
    drawn: dict[str, tuple[str, str]] = {}
    for name, function in DRAWN.items():
        for source in sources:
            try:
                with source.reading(name):
                    function(source, folder / name)
            except evidence.Missing as reason:
                drawn.setdefault(name, ("", str(reason)))
            else:
                drawn[name] = source.study.name, ""
                break
    return drawn


def small(png: bytes) -> bytes:
    """The picture, with fewer colours and, if needed, scaled down, to at most LARGEST bytes."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for scale in (1.0, 0.8, 0.6, 0.5):
        size = [round(scale * side) for side in picture.size]
        scaled = picture.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture
        for n_colours in (128, 64):
            written = io.BytesIO()
            few = scaled.quantize(n_colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            few.save(written, "png", optimize=True)
            if written.tell() <= LARGEST:
                return written.getvalue()
    raise InputError(f"a picture of {picture.size} pixels has more than {LARGEST:,} bytes, even with few colours")


def page(said: dict[str, tuple[str, str]], command: str) -> str:
    lines, last = [HEAD.format(command=command)], ("", "")
    for name, (section, subsection, text, script) in captions().items():
        if section != last[0]:
            lines.append(f"## {section}\n")
        if subsection and (section, subsection) != last:
            lines.append(f"### {subsection}\n")
        last = section, subsection
        study, why = said[name]
        alt = re.split(r"(?<=[^.])[.:;] ", " ".join(text.split()), maxsplit=1)[0].strip(".")
        lines.append(f"![{alt}](figures/{name}.png)\n" if study else f"*{name} is not drawn: {why}.*\n")
        same = [other for other, (caption, _) in experiments.said("CAPTIONS").items() if caption.endswith(f"\n{name}")]
        lines.append(f"{text.strip()}\n")
        also = f", also as {' and '.join(f'`{other}`' for other in same)}" if same else ""
        lines.append(f"`{name}`{also}; drawn by [{script}](../{script}), of {study}.\n" if study else "")
    return "\n".join(line for line in lines if line)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("studies", nargs="+", metavar="STUDY", help="study files with results")
    p.add_argument(
        "--seed", type=int, metavar="S", help="seed for studies whose paths contain {seed}; default: each study's own"
    )
    args = p.parse_args(argv)
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    studies = [
        Study.find(file, args.seed if "{seed}" in Path(file).read_text("utf-8") else None) for file in args.studies
    ]
    with tempfile.TemporaryDirectory() as drawn:
        by_name = draw(studies, Path(drawn))
        for name, (study, why) in by_name.items():
            if study:
                with results.replacing(folder / f"{name}.png") as temporary:
                    temporary.write_bytes(small((Path(drawn) / f"{name}.png").read_bytes()))
            else:
                cli.say(f"{name} is not drawn: {why}")
    command = (
        "python docs/figures.py " + " ".join(args.studies) + (f" --seed {args.seed}" if args.seed is not None else "")
    )
    results.write_text(PAGE, page(by_name, command))
    cli.say(f"wrote {PAGE} and {sum(bool(study) for study, _ in by_name.values())} figures in {folder}")


if __name__ == "__main__":
    cli.run(main)
