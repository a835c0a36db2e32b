"""Write docs/figures.md and docs/figures/: every figure of the scripts, drawn anew from results of finished studies.

In:   study files, in the folder from which their paths are meant. A figure is of the first one that has its result.
Out:  docs/figures/<caption's name>.png, docs/figures.md. A figure that no study has a result for is named there.

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

Written by `{command}`: every figure that the scripts draw, from results as they are, in
the words of its caption. Below each stand the script that draws it and the study that this one is of. What all of them
share, colours, widths, names of languages, the numbering of layers, stands in `cpt_utils/base/figures.py`.

- Layers are numbered from 0. Hidden state 0 is the embeddings, and layer l puts out hidden state l + 1; where both
  matter, one stands below the panel and the other above it.
- Black is the base, orange the checkpoint or the new language, blue the semantic hub, vermilion the interface, pink
  attention, green the FFN; grey are controls, the untrained model and chance. Training steps run from light green to
  dark violet.
- Whiskers and bands are 95 % intervals, but for the accuracy of a task over training steps, whose whiskers are
  standard errors.
- The demo's languages beside English are invented, and so are their codes.
"""


# ---------------------------------------------------------------- one figure each, from the result files of a study


def plain(step: str, script: str, found: evidence.Results, path: Path, *header: str, module: str = "") -> None:
    """The figure that `draw(path, payload, ..)` of a script makes, with the named facts of the header behind it."""
    payload, facts = found.json(found.path(step), sibling(script).SCHEMA)
    sibling(module or script).draw(path, payload, *(facts[key] for key in header))


def retrieval(found: evidence.Results, path: Path, models: str = "") -> None:
    """Base and run, or where `models` is a pattern, the last checkpoint and the results that match it."""
    folder = found.retrieval_folder()
    ids = [found.last["model_id"]] * ("checkpoint" in models) + sorted(
        file.stem for file in folder.glob(f"{models}.json")
    )
    files = [found.retrieval_path(ref) for ref in (found.base, *found.run)]
    files = [found.there(folder / f"{name}.json", "retrieval") for name in ids] if models else files
    if models and len(files) < 2:
        raise evidence.Missing(f"{folder} has no {models}.json")
    read = [results.read_json(file, "sentence-retrieval", **found.sides()) for file in files]
    lines = [(SimpleNamespace(**facts["models"]["model"]), payload) for payload, facts in read]
    twin = None if models else found.untrained()[0]
    title = " to ".join(map(figures.language, found.sides().values()))
    sibling("sentence-retrieval/sr_figure.py").draw(path, lines, twin, read[0][1]["n_used"], title)


def alignment(found: evidence.Results, path: Path) -> None:
    folder = found.study.result("alignment") / found.retrieval_folder().name
    files = [
        (SimpleNamespace(**ref), found.there(folder / f"{ref['model_id']}.json", "alignment"))
        for ref in (found.base, *found.run)
    ]
    named = tuple(map(figures.language, found.sides().values()))
    sibling("sentence-retrieval/sr_alignment.py").draw_files(path, files, folder / "untrained.json", named)


def layers(found: evidence.Results, path: Path) -> None:
    split, facts = results.read_json(found.path("layers"), "layer-specialize")
    title = Path(facts["retrieval"]).stem.replace("__", "/")
    sibling("layer-specialize/layer_specialize.py").draw(path, split, facts, title)


def weight_change(found: evidence.Results, path: Path) -> None:
    script = sibling("weight-diff/int_and_sem.py")
    payload, facts = found.json(found.path("int_and_sem"), script.SCHEMA)
    rows = payload["checkpoints"]
    means = {group: [row[f"{group}_avg"] for row in rows.values()] for group in script.GROUPS}
    counts = {group: len(facts["layers"][group]["layers"]) for group in script.GROUPS}
    script.draw(path, [int(step) for step in rows], means, counts)


def downstream(found: evidence.Results, path: Path) -> None:
    script = sibling("downstream-correlation/downstream_correlation.py")
    payload, _ = found.json(found.path("downstream"), script.SCHEMA)
    metric, rows = payload["metric"], {int(step): row for step, row in payload["values"].items()}
    points = {step: benchmark.Point(row[metric], row["n"], "") for step, row in rows.items()}
    changes = {
        step: {kind: row[key] for kind, key in script.LAYER_TYPES.items()}
        for step, row in rows.items() if "interface_avg" in row
    }  # fmt: skip
    script.draw(path, figures.accuracy(metric, payload["task"]), list(changes), points, changes, payload)


def lsn(what: str, found: evidence.Results, path: Path) -> None:
    script = sibling("lsn/identify.py")
    file = found.there(found.study.result("lsn_mask").with_suffix(".report.json"), "lsn_mask")
    payload, _ = found.json(file, script.REPORT)
    getattr(script.reporting, f"draw_{what}")(path, payload[what])


def cogsym(found: evidence.Results, path: Path) -> None:
    script = sibling("layer-ablation/cogsym.py")
    payload, facts = found.json(found.path("cogsym"), script.SCHEMA, found.base)
    script.draw(path, payload["layers"], payload["overlaps"], facts["n_layers"])


def spectrum(found: evidence.Results, path: Path) -> None:
    file = found.path("spectrum")
    payload, _ = found.json(file, "spectrum")
    sibling("spectral/spectrum_figure.py").draw(path, payload, results.read_tensors(file.with_suffix(".pt")))


def rewind_energy(found: evidence.Results, path: Path) -> None:
    plain("rewind", "spectral/rewind.py", found, path.with_name("rewind"))
    for suffix in (".pdf", ".png"):
        found.there(path.with_name(f"rewind.energy{suffix}"), "rewind").replace(path.with_suffix(suffix))


def claims(found: evidence.Results, path: Path) -> None:
    script = sibling("report/claims.py")
    payload, _ = found.json(found.path("claims"), script.SCHEMA)
    made = {name: claim.PANEL for name, claim in script.claims().items()}
    sibling("report/shown.py").draw(path, payload["claims"], made)


of = functools.partial
# Caption -> what draws it; those of the paper are in report/figures.py.
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
    "layer_ablation": lambda found, path: plain(
        "layer_ablation", "layer-ablation/ablation_sweep.py", found, path, "n_layers",
        module="layer-ablation/ablation_figure.py",
    ),
    "cogsym": cogsym,
    "runs": of(plain, "runs", "layer-ablation/compare_runs.py", module="layer-ablation/runs_shown.py"),
    "spectrum": spectrum,
    "heads": lambda found, path: plain(
        "heads", "spectral/heads.py", found, path, "n_layers", module="spectral/heads_figure.py"
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
# A figure that no section of the report shows: section, subsection, text, script.
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
    """Section, subsection, text and script of every caption that has a figure here, in the order of the parts."""
    found = {
        name: (*row, script)
        for script in dict.fromkeys(by for _, by in experiments.said("CAPTIONS").values())
        for name, row in experiments.captions(script).items()
    }
    found |= BESIDE
    places = {name: (section, subsection or "", list(DRAWN).index(name))
              for name, (section, subsection, *_) in found.items() if name in DRAWN}  # fmt: skip
    parts = ["Part I", "Part II", "Part III", "Part IV", "Part V"]
    order = sorted(places, key=lambda name: (
        parts.index(places[name][0]) if places[name][0] in parts else len(parts), *places[name]))  # fmt: skip
    return {name: found[name] for name in order}


def draw(studies: list[Study], folder: Path) -> dict[str, tuple[str, str]]:
    """Every figure that one of the studies has the results of, as PDF and PNG in `folder`.

    Returns:
        name -> (the study's name, why there is none; "" where there is one).
    """
    results_of = [evidence.Results(study, draws=0) for study in studies]
    said: dict[str, tuple[str, str]] = {}
    for name, function in DRAWN.items():
        for found in results_of:
            try:
                with found.reading(name):
                    function(found, folder / name)
            except evidence.Missing as reason:
                said.setdefault(name, ("", str(reason)))
            else:
                said[name] = found.study.name, ""
                break
    return said


def small(png: bytes) -> bytes:
    """The picture in so few colours, or so much smaller, that it has at most LARGEST bytes."""
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
    raise InputError(f"a picture of {picture.size} points has more than {LARGEST:,} bytes, however few its colours are")


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
    p.add_argument("studies", nargs="+", metavar="STUDY", help="study files whose results are there")
    p.add_argument(
        "--seed", type=int, metavar="S", help="of studies whose paths hold {seed}; default: each study's own"
    )
    args = p.parse_args(argv)
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    studies = [
        Study.find(file, args.seed if "{seed}" in Path(file).read_text("utf-8") else None) for file in args.studies
    ]
    with tempfile.TemporaryDirectory() as drawn:
        said = draw(studies, Path(drawn))
        for name, (study, why) in said.items():
            if study:
                with results.replacing(folder / f"{name}.png") as temporary:
                    temporary.write_bytes(small((Path(drawn) / f"{name}.png").read_bytes()))
            else:
                cli.say(f"{name} is not drawn: {why}")
    command = (
        "python docs/figures.py " + " ".join(args.studies) + (f" --seed {args.seed}" if args.seed is not None else "")
    )
    results.write_text(PAGE, page(said, command))
    cli.say(f"wrote {PAGE} and {sum(bool(study) for study, _ in said.values())} figures in {folder}")


if __name__ == "__main__":
    cli.run(main)
