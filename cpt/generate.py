"""What a model writes: the base and every checkpoint continue the same prompts, in tables to be read before any curve.

Each prompt is continued greedily and by sampling. Every model samples with the same random numbers, and tokens are
sorted by probability, so two models with the same predictions write the same text.

In:   B and RUN (default: the study's); prompts: --prompt TEXT .., --prompts FILE (one per line), or the first halves of
      lines of held-out text (--heldout LANG=FILE; default: all of data.heldout), with the second halves for comparison.
Out:  OUT (default: the study's samples.json): {"prompts": [..], "models": {"base" or step: [[greedy, draw, ..], ..]}};
      next to it .txt and .html, a table for each prompt with a row for each model.

A killed run resumes at the next model. On several GPUs: accelerate launch cpt/generate.py ...

Full: python cpt/generate.py --base meta-llama/Llama-2-7b-hf --run runs/eus --prompt "Euskal Herria" --output samples.json
Tiny: python cpt/generate.py --study demo/tiny.yaml --tokens 8
"""  # noqa: E501

from __future__ import annotations

import html
from pathlib import Path

from cpt_utils.base import cli, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch, transformers
from cpt_utils.base.study import Study
from cpt_utils.measures import over_run
from cpt_utils.models import batching, loading, scoring

SCHEMA = "samples"
RESULTS = {"samples": "samples.json"}
BASE, OWN = "base", "the text's own"
PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .4rem }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed }}
th, td {{ border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .35rem .6rem .35rem 0;
  text-align: start; vertical-align: top; overflow-wrap: anywhere; white-space: pre-wrap }}
th:first-child {{ width: 6.5rem }}
@media (max-width: 40rem) {{ body {{ font-size: 12.5px; margin-top: .5rem }} h1 {{ font-size: 1.3rem }}
  th:first-child {{ width: 3.2rem }} }}
@media print {{ section {{ break-inside: avoid }} }}
</style></head><body><h1>{title}</h1><p>{note}</p>
{tables}
</body></html>
"""


# ---------------------------------------------------------------- the method


def drawn(scores: torch.Tensor, u: float, temperature: float, top_p: float) -> int:
    """The token that `u` in [0, 1) draws by inverting the cumulative distribution over the most likely tokens that
    together have `top_p`, in decreasing order of probability.

    Args:
        scores: logits [vocabulary].
    """
    probabilities, order = (scores.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    cumulated = probabilities.cumsum(-1)
    kept = int(torch.searchsorted(cumulated, top_p)) + 1
    cumulated = cumulated[:kept] / cumulated[min(kept, len(cumulated)) - 1]
    return int(order[min(int(torch.searchsorted(cumulated, u, right=True)), len(cumulated) - 1)])


def continued(
    model: transformers.PreTrainedModel, tokenizer, prompts: list[str], tokens: int, samples: int, seed: int,
    temperature: float, top_p: float,
) -> list[list[dict]]:  # fmt: skip
    """For each prompt the greedy continuation and `samples` sampled ones: `text`, and whether the model `ended` it.

    A batch holds one prompt only, so nothing is padded and no text depends on the other prompts.

    Raises:
        InputError: a prompt has no tokens, or leaves no room in the model's positions.
    """
    limit, texts = batching.positions(model), []
    end = tokenizer.eos_token_id
    for number, prompt in enumerate(cli.progress(prompts, "prompts", unit="prompt")):
        (ids,) = scoring.beginnings(tokenizer, [prompt])
        if not ids or (limit and len(ids) >= limit):
            what = f"is longer than the model's {limit} positions" if ids else "has no tokens"
            raise InputError(f"prompt {number + 1} ({results.shown(prompt)}) {what}; give another")
        new = min(tokens, limit - len(ids)) if limit else tokens
        uniform = [np.random.default_rng([seed, number, k]).random(new) for k in range(samples)]

        def choose(given, scores, ids=ids, uniform=uniform):
            for row, numbers in enumerate(uniform, 1):
                token = drawn(scores[row], float(numbers[given.shape[1] - len(ids)]), temperature, top_p)
                scores[row] = -torch.inf
                scores[row, token] = 0
            return scores

        rows = torch.tensor([ids] * (1 + samples), device=loading.input_device(model))
        how = scoring.greedily(model, tokenizer, new)
        with torch.inference_mode():
            made = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=how, logits_processor=[choose]
            )
        texts.append([_text(tokenizer, ids, row, end) for row in made[:, len(ids) :].tolist()])
    return texts


def _text(tokenizer, prompt: list[int], made: list[int], end: int | None) -> dict:
    """The text after the prompt; decoded together with it, since a token decoded alone may lose its leading space."""
    ended = end in made
    made = made[: made.index(end)] if ended else made
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(ids, **how) for ids in (prompt, [*prompt, *made]))
    return {"text": whole[len(before) :], "ended": ended}


def halves(line: str) -> tuple[str, str]:
    """A line cut in the middle, between words if possible."""
    cut = line.find(" ", len(line) // 2)
    cut = len(line) // 2 if cut < 0 else cut
    return line[:cut], line[cut:]


# ---------------------------------------------------------------- the output


def tables(payload: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each prompt: the true continuation of its line, if known, then a row for each model."""
    by_prompt = []
    for number, prompt in enumerate(payload["prompts"]):
        by_model = {name: texts[number] for name, texts in payload["models"].items()}
        n_draws = len(next(iter(by_model.values()))) - 1
        rows = [[OWN, prompt["own"].strip(), *[""] * n_draws]] if prompt.get("own") else []
        for name, texts in by_model.items():
            shown = [_printable(made["text"]).strip() + (" ∎" if made["ended"] else "") for made in texts]
            rows.append([name if name == BASE else f"step {name}", *shown])
        code = prompt["language"]
        title = f"{number + 1}. {languages.named(code) + ': ' if code else ''}{prompt['text']} …"
        by_prompt.append((title, ["", "greedy", *(f"draw {k + 1}" for k in range(n_draws))], rows))
    return by_prompt


def _printable(text: str) -> str:
    """The text with unprintable characters, except newlines, replaced by U+FFFD."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def write(output: Path, payload: dict, request: dict) -> None:
    """Write the text, the page, and last the JSON."""
    what = f"temperature {request['temperature']:g}, top-p {request['top_p']:g}, seed {request['seed']}"
    note = f"Continuations of {request['tokens']} tokens at most; draws by {what}. ∎: the model ended the text."
    title = f"Samples of {request['models'][BASE]['spec']} and its checkpoints"
    lines, sections = [title, note], []
    for head, columns, rows in tables(payload):
        lines += ["", head]
        for i, name in enumerate(columns[1:], 1):
            lines += [f"  {name}", *(f"  {row[0]:>14} | {' '.join(row[i].split())}" for row in rows if row[i])]
        cells = "".join(
            "<tr>" + "".join(f"<{tag}{' dir=auto' if tag == 'td' else ''}>{html.escape(cell)}</{tag}>" for tag, cell in
                             zip(("th", *["td"] * (len(row) - 1)), row, strict=True)) + "</tr>"
            for row in rows
        )  # fmt: skip
        top = "".join(f"<th>{name}</th>" for name in columns)
        sections.append(f"<section><h2 dir=auto>{html.escape(head)}</h2><table><tr>{top}</tr>{cells}</table></section>")
    results.write_text(output.with_suffix(".txt"), "\n".join(lines) + "\n")
    page = PAGE.format(title=html.escape(title), note=html.escape(note), tables="\n".join(sections))
    results.write_text(output.with_suffix(".html"), page)
    facts = {key: request[key] for key in ("models", "heldout", "tokens", "samples", "temperature", "top_p", "seed",
                                           "dtype", "device")}  # fmt: skip
    results.write_json(output, payload, results.header(SCHEMA, **facts, request=request))
    cli.say(f"wrote {output}, and for reading {output.with_suffix('.txt')} and {output.with_suffix('.html')}")


# ---------------------------------------------------------------- the command


def prompts_of(args, study: Study) -> tuple[list[dict], dict]:
    """Every prompt as `text`, `language` and `own` (the rest of its line), and the files' facts for the header."""
    texts = [*(args.prompt or []), *(textfiles.texts(Path(args.prompts)) if args.prompts else [])]
    if texts or args.prompts:
        prompts = [{"text": text.strip(), "language": "", "own": ""} for text in texts if text.strip()]
        if not prompts:
            raise InputError(f"{args.prompts or '--prompt'} holds no prompt; write one per line")
        return prompts, {}
    files = cli.sibling("cpt/documents.py").language_files(args.heldout, "--heldout") or study.get("data.heldout", {})
    chosen = [lang for lang in files if files[lang]]
    if not chosen:
        raise InputError("no prompts: give --prompt TEXT .., --prompts FILE, --heldout LANG=FILE, or data.heldout")
    lines = {lang: [line.strip() for line in textfiles.texts(Path(files[lang])) if line.strip()] for lang in chosen}
    facts = {lang: {"file": files[lang], "sha256": results.file_sha256(files[lang])} for lang in chosen}
    cut = [(lang, *halves(line)) for lang in chosen for line in lines[lang][: args.number]]
    return [{"text": text, "language": lang, "own": own} for lang, text, own in cut], facts


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="prompts; default: halves of held-out lines")
    add("--prompts", metavar="FILE", help="prompts, one per line")
    add("--heldout", nargs="+", metavar="LANG=FILE", help="text whose lines are cut in half; default: the study's")
    add("--number", type=cli.positive, default=4, metavar="N", help="lines per language; default 4")
    add("--tokens", type=cli.positive, default=40, metavar="N", help="maximum number of tokens to write; default 40")
    add("--samples", type=int, default=2, metavar="N", help="sampled continuations besides the greedy one; default 2")
    add("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature; default 1, the model's own")
    add("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling: probability mass P; default 0.95")
    over_run.add_flags(p, RESULTS["samples"], batch_size=0)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    for flag, wrong, must in (
        ("--samples", args.samples < 0, "0 or more"),
        ("--temperature", not 0 < args.temperature < float("inf"), "above 0"),
        ("--top-p", not 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if wrong:
            raise InputError(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: it must be {must}")
    run = over_run.OverRun.of(args, study, "samples")
    prompts, facts = prompts_of(args, study)
    settings = {"tokens": args.tokens, "samples": args.samples, "seed": study.seed, "temperature": args.temperature,
                "top_p": args.top_p}  # fmt: skip

    def measured(model, _ref, tokenizer) -> list:
        return continued(model, tokenizer, [prompt["text"] for prompt in prompts], **settings)

    def write_all(found: dict[str, list], request: dict) -> None:
        write(run.output, {"prompts": prompts, "models": found}, request)

    run.measure(SCHEMA, {"prompts": prompts, "heldout": facts, **settings}, measured, write_all)


if __name__ == "__main__":
    cli.run(main)
