"""Scores of every FFN neuron on short texts, for `lsn/identify.py --method ap` and `gradient`.

A text is --text-tokens consecutive token ids from the files of step 6. Measured on each: the mean activation of every
neuron; and gradient times activation, max over positions of n dP(y)/dn, where n is the neuron's input to the down
projection and P(y) the probability of the text's last token y after those before it.

In:   -m a model (default: the last checkpoint of the study's run), -i one or more files of token ids from
      lsn/load_oscar.py (default: those of the study's languages), --what means, gradients, or both.
Out:  FOLDER/means/<name>.<language>.pt: `means` float32 [texts, layers, neurons]; FOLDER/gradients/<name>.<language>.pt:
      `sums` float64 [2, layers, neurons] over the texts of each half, and `texts` [2]. Both with a `header`.

A killed run resumes with the next texts. On several GPUs: accelerate launch lsn/text_scores.py ...; the numbers are the same.

Full: python lsn/text_scores.py -m runs/eus/checkpoint-5000 -i oscar_ids/oscar.en.train.llama oscar_ids/oscar.eu.train.llama -s text_scores -n llama
Tiny: python lsn/text_scores.py --study demo/tiny.yaml --texts 40
"""  # noqa: E501

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, code, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, refs
from cpt_utils.models import ffn, loading
from cpt_utils.models.trace import trace

counting = cli.sibling("lsn/activation.py")

SCHEMA = "text-scores"
RESULTS = {"lsn_text_scores": "lsn/text_scores"}
TEXTS, TOKENS = 500, 32  # per language; per text
SHARE = 64  # texts measured, and saved, at a time
GRADIENT_BATCH = 16  # texts; every layer's input to the down projection is kept for the backward pass


# ---------------------------------------------------------------- the method


def mean_activations(model: torch.nn.Module, arch: archs.Arch, texts: torch.Tensor, batch: int) -> torch.Tensor:
    """The mean of act(W_gate x) over the tokens of each text: float32 [texts, layers, neurons], on the CPU.

    For an expert's neuron it is over the tokens routed to the expert, and 0 if there are none.

    Raises:
        InputError: activations that are NaN or infinite.
    """
    config = ffn.decoder_config(model)
    n_layers = arch.n_layers(config)
    reader = ffn.Reader(model, arch, range(n_layers))
    # Experts' rows do not say which text they belong to, so with experts a pass reads one text.
    parts = texts.split(1 if reader.experts else batch)
    return torch.cat([_means(reader, part, (n_layers, arch.ffn_width(config))) for part in parts])


def _means(reader: ffn.Reader, texts: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The same for one pass."""
    sums = torch.zeros(len(texts), *shape, dtype=torch.float64)
    tokens = torch.full(shape, texts.shape[1], dtype=torch.float64)
    for layer, groups in reader.groups.items():
        for group in groups:
            tokens[layer, group.first : group.stop] *= not group.experts

    def read(layer: int, group, value: torch.Tensor, experts: torch.Tensor | None) -> None:
        columns = slice(group.first, group.stop)
        if experts is None:
            sums[:, layer, columns] += value.reshape(len(texts), -1, value.shape[-1]).sum(1, dtype=torch.float64).cpu()
            return
        routed = (experts == torch.arange(group.experts, device=experts.device)[:, None]).double()
        sums[0, layer, columns] += (routed @ value.double()).flatten().cpu()
        tokens[layer, columns] += routed.sum(1).repeat_interleave(group.width).cpu()

    reader.run(texts, read)
    return _finite(sums / tokens.clamp(min=1)).float()


def attributions(model: torch.nn.Module, arch: archs.Arch, texts: torch.Tensor, batch: int) -> torch.Tensor:
    """max over positions of n dP(y)/dn, y the last token, summed over `texts`: float64 [layers, neurons], on the CPU.

    With a gate n dP(y)/dn is the same for act(W_gate x) as n and for its product with W_up x.

    Raises:
        InputError: as `dense_layers`, or numbers that are NaN or infinite.
    """
    config = ffn.decoder_config(model)
    layers = dense_layers(arch, config)
    sums = torch.zeros(arch.n_layers(config), arch.ffn_width(config), dtype=torch.float64)
    for part in texts.split(batch):
        kept: dict[int, torch.Tensor] = {}
        points = [(arch.down_module(model, layer), "input", functools.partial(_keep, kept, layer)) for layer in layers]
        ids = part.to(loading.input_device(model), torch.long)
        head = model.get_output_embeddings(), "input", lambda hidden: hidden[:, -1:]
        with torch.enable_grad(), trace(*points, head):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            probability = logits.softmax(-1).gather(-1, ids[:, -1:].to(logits.device))
        gradients = torch.autograd.grad(probability.sum(), list(kept.values()))
        for (layer, value), gradient in zip(kept.items(), gradients, strict=True):
            product = value.detach().to(logits.dtype) * gradient.to(logits.dtype)
            best = product.view(len(part), -1, product.shape[-1]).amax(1)
            sums[layer, : product.shape[-1]] += best.sum(0, dtype=torch.float64).cpu()
    return _finite(sums)


def dense_layers(arch: archs.Arch, config: dict) -> list[int]:
    """The layers that have an FFN.

    Raises:
        InputError: a mixture of experts, whose neurons go through no module.
    """
    groups = {layer: arch.neurons(config, layer) for layer in range(arch.n_layers(config))}
    if any(group.experts for of_layer in groups.values() for group in of_layer):
        raise InputError(
            "gradients of the neurons of experts cannot be read, as they go through no module: give --what means, and "
            "take another --method than gradient"
        )
    return [layer for layer, of_layer in groups.items() if of_layer]


def _keep(kept: dict[int, torch.Tensor], layer: int, value: torch.Tensor) -> torch.Tensor:
    """Keep the input of a down projection. Weights require no gradient, so the graph begins at the first of them."""
    kept[layer] = value if value.requires_grad else value.detach().requires_grad_()
    return kept[layer]


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise InputError("activations are not finite; try --dtype float32, or check the weights")
    return values


# ---------------------------------------------------------------- one file


@dataclass(frozen=True)
class Job:
    """`texts` [n, tokens] of a file of token ids, what is measured on them, and the file for the result."""

    what: str
    path: Path
    texts: torch.Tensor
    request: dict
    out: Path

    def shares(self) -> list[tuple[int, range]]:
        """(half, texts) of every share that is measured at a time; they depend on the number of texts only."""
        n, middle = len(self.texts), len(self.texts) // 2
        halves = (0, range(0, middle)), (1, range(middle, n))
        return [(half, rows[start : start + SHARE]) for half, rows in halves for start in range(0, len(rows), SHARE)]

    def part(self, number: int) -> Path:
        return self.out.with_name(f".{self.out.stem}.partial.{number}.pt")

    def kept(self, number: int) -> torch.Tensor | None:
        """An earlier run's result for a share; None if there is none, or it is of another request or other code."""
        path = self.part(number)
        content = results.read_tensors(path) if path.is_file() else {}
        is_same = content.get("request") == json.dumps(self.request) and not code.is_other(content.get("code"))
        return content["found"] if is_same else None

    def keep(self, number: int, found: torch.Tensor) -> None:
        facts = {"request": json.dumps(self.request), "code": code.running() or ""}
        results.write_tensors(self.part(number), {**facts, "found": found})

    def remove_parts(self) -> None:
        for path in self.out.parent.glob(f".{self.out.stem}.partial.*.pt"):
            path.unlink(missing_ok=True)


def measure(job: Job, measured: Callable, process: processes.Process, header: dict, anew: bool) -> None:
    """Measure the shares of a file, each process some of them, and write the result; `anew`: discard earlier ones."""
    if process.is_main and anew:
        job.remove_parts()
    process.wait()
    shares = list(enumerate(job.shares()))
    for number, (_, rows) in cli.progress(process.share(shares), f"{job.what} {job.out.stem}", unit="share"):
        if job.kept(number) is None:
            job.keep(number, measured(job.texts[rows.start : rows.stop]))
    process.wait()  # all have saved theirs
    if process.is_main:
        parts = [(half, job.kept(number)) for number, (half, _) in shares]
        if any(part is None for _, part in parts):
            raise InputError(f"parts of {job.out} are gone: was the same command running twice? Run it again")
        content = {"means": torch.cat([part for _, part in parts])}
        if job.what == "gradients":
            halves = [sum(part for half, part in parts if half == wanted) for wanted in (0, 1)]
            n = len(job.texts)
            content = {"sums": torch.stack(halves), "texts": torch.tensor([n // 2, n - n // 2])}
        results.write_tensors(job.out, content | {"header": json.dumps(results.plain(header), ensure_ascii=False)})
        job.remove_parts()
        cli.say(f"{job.out}: {len(job.texts)} texts of {job.texts.shape[1]} tokens")
    process.wait()


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--what", nargs="+", choices=("means", "gradients"), metavar="W", help="means, gradients; default both")
    text = f"texts per language; default: the study's lsn.texts, else {TEXTS}"
    add("--texts", type=cli.positive, metavar="N", help=text)
    add("--text-tokens", type=cli.positive, default=TOKENS, metavar="N", help=f"tokens per text; default {TOKENS}")
    counting.add_flags(p, RESULTS["lsn_text_scores"])
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    ref = beside.model_or_last(study, args.model, args.named_run, "-m", args.steps)
    process, dtype = processes.from_arguments(args, study)
    all_jobs = jobs(args, study, ref, dtype, process.device)
    todo = counting.left(all_jobs, args.overwrite, process, Job.remove_parts)
    if not todo:
        return
    model, arch = loading.load_for(process, ref, dtype), archs.for_config(ref.config())
    methods = {
        "means": lambda texts: mean_activations(model, arch, texts, args.batch_size or SHARE),
        "gradients": lambda texts: attributions(model, arch, texts, args.batch_size or GRADIENT_BATCH),
    }
    for job in todo:
        measure(job, methods[job.what], process, header(job, ref, arch), args.overwrite)
    if args.drop_revisions:
        ref.drop()


def jobs(args, study: Study, ref: refs.ModelRef, dtype: torch.dtype, device: torch.device) -> list[Job]:
    """What to measure; every file is checked before the model is loaded.

    Raises:
        InputError: as `asked_for` of lsn/activation.py, or too few texts or tokens.
    """
    files, folder, name = counting.asked_for(args, study, "lsn_text_scores")
    size, run = args.text_tokens, beside.run_asked_for(study, args.named_run)
    most = ffn.block_size(ref.config())
    if not 2 <= size <= most:
        raise InputError(f"--text-tokens {size}: a text has a token to predict and one or more before it, up to {most}")
    n_tokens = size * int(study.value(args.texts, "--texts", "lsn.texts", TEXTS))
    kinds, made = args.what or ("means", "gradients"), []
    if "gradients" in kinds:
        dense_layers(archs.for_config(ref.config()), ref.config())
    for path, lang in files:
        texts, facts = counting.read(path, ref, run, size, n_tokens, args.limit)
        if len(texts) < 4:
            raise InputError(
                f"{path} gives {len(texts)} texts of {size} tokens, and four are needed; give more text, or fewer "
                "--text-tokens"
            )
        asked = counting.request_of(ref, facts, size, args.batch_size, dtype, device)
        for what in kinds:
            request = results.plain(asked | {"what": what})
            made.append(Job(what, path, texts, request, folder / what / f"{name}.{lang}.pt"))
    return made


def header(job: Job, ref: refs.ModelRef, arch: archs.Arch) -> dict:
    facts = counting.header_facts(job.request, job.path)
    facts |= {"language": job.request["ids"].get("language", counting.language_of(job.path))}
    facts |= {"n_layers": arch.n_layers(ref.config()), "ffn_width": arch.ffn_width(ref.config())}
    facts |= {"what": job.what, "text_tokens": job.texts.shape[1], "n_used": len(job.texts)}
    return results.header(SCHEMA, models={"model": ref.describe()}, **facts)


if __name__ == "__main__":
    cli.run(main)
