"""Turns a mask of the original LAPE code (<model>.neuron.pth) into one that the scripts here read (beside step 8).

LAPE saves a list of languages, each a list of layers, each the neurons; it names no language, and leaves out those
without a neuron. So the languages are named here, in its order: of the masks that were published with it
en,zh,fr,es,vi,id,ja.

In:   MASK.pth, -l its languages in order.
Out:  OUT, the mask {lang: {layer: [neurons]}}; with --ffn-width also a random control beside it, <OUT>.control.json.

Full: python lsn/lape_mask.py LLaMA-2-7B.neuron.pth -l en,zh,fr,es,vi,id,ja -o result/llama-2-7b.json --ffn-width 11008
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import masks


def read(path: Path, langs: list[str]) -> dict[str, masks.Layers]:
    """The neurons of each language and layer.

    Raises:
        InputError: no such mask, another number of languages than `langs`, or languages that differ in layers.
    """
    found = results.load(path)
    try:
        lists = [[[int(neuron) for neuron in layer] for layer in language] for language in found]
    except (TypeError, ValueError, RuntimeError):
        lists = []
    if not lists or not lists[0] or len({len(layers) for layers in lists}) > 1:
        raise InputError(f"{path} is not a LAPE mask (a list of languages, each a list of as many layers of neurons)")
    if len(lists) != len(langs):
        raise InputError(
            f"{path} holds {len(lists)} languages, but -l names {len(langs)}; LAPE leaves out languages without "
            "neurons: name those that have any, in the order of its code (of the published masks en,zh,fr,es,vi,id,ja)"
        )
    return {lang: dict(enumerate(map(sorted, layers))) for lang, layers in zip(langs, lists, strict=True)}


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("mask", metavar="MASK.pth", help="mask of the original LAPE code")
    p.add_argument("-l", "--langs", required=True, metavar="L,L,..", help="its languages, in its order; no default")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="JSON to write; no default")
    p.add_argument("--ffn-width", type=cli.positive, metavar="N", help="neurons of a layer, which a control mask needs")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    seed = Study.find(args.study, args.seed, args.arm).seed
    source, path = Path(args.mask), Path(args.output)
    langs = languages.several(args.langs, "-l")
    mask = read(source, langs)
    request = {
        "lape_sha256": results.file_sha256(source),
        "languages": langs,
        "ffn_width": args.ffn_width,
        "seed": seed,
    }
    if results.finished(path, masks.SCHEMA, request, "another -o", args.overwrite):
        cli.say(f"{path} is finished (--overwrite redoes it)")
        return
    facts = {
        "n_layers": len(mask[langs[0]]),
        "languages": {lang: languages.canonical(lang, any_tag=True) for lang in langs},
        "lape_mask": source,
        "seed": seed,
        "request": request,
    }
    written = path
    if args.ffn_width:
        facts["ffn_width"] = args.ffn_width
        control = masks.random_control(mask, facts["n_layers"], args.ffn_width, seed)
        written = f"{path} and its control {path.with_suffix('.control.json')}"
        masks.write(path.with_suffix(".control.json"), control, control=True, **facts)
    masks.write(path, mask, **facts)
    sizes = ", ".join(f"{lang} {sum(map(len, layers.values())):,}" for lang, layers in mask.items())
    cli.say(f"wrote {written}: {facts['n_layers']} layers, neurons of {sizes}")


if __name__ == "__main__":
    cli.run(main)
