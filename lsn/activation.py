"""Counts, for every FFN neuron of a model, the tokens of a language on which it is active (step 7).

Active: the gate activation act(W_gate x) is above zero; without a gate act(W_up x). Token ids are cut into blocks.

In:   -m a model (default: the last checkpoint of the study's run), -i one or more files of token ids from
      lsn/load_oscar.py (default: those of the study's languages).
Out:  <folder>/<name>.<language>.pt for each: `n` tokens, `over_zero` int64 [layers, neurons], and `snapshots_n`,
      `snapshots`: the same counts after about an eighth, a quarter and a half of the tokens, from which lsn/identify.py
      sees whether fewer tokens would do. The language is the second dot-separated part of the id file's name. If layers
      differ, also `width` int64 [layers], the neurons of each; for a mixture of experts `routed` int64 [layers,
      experts] (an expert's neurons are counted on the tokens routed to it) and, if a layer has neurons besides the
      experts, `routed_width`: the number of the experts' neurons, which come first.

A killed run resumes from its last save. On several GPUs: accelerate launch lsn/activation.py ...; the counts are the same.

Full: python lsn/activation.py -m runs/eus/checkpoint-5000 -i oscar_ids/oscar.eu.train.llama -t llama -s activation_count -n llama
Tiny: python lsn/activation.py --study demo/tiny.yaml --tokens 2000
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.architectures.arch_parts import Neurons
from cpt_utils.base import cli, languages, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, identity, refs, tokenization, tokenizer_id
from cpt_utils.measures import tokenids
from cpt_utils.models import ffn, loading

unfinished = cli.sibling("lsn/activation_partial.py")

SCHEMA = "activation-counts"
RESULTS = {"lsn_counts": "lsn/activation_count"}
TOKENS = 99_999_744  # of a language, as in the published scripts: whole blocks of 4096 and of 2048
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the blocks: the ends of the segments that are counted separately
# Activations with act(x) > 0 exactly where x > 0: the pre-activation suffices, and the activation need not be computed.
KEEP_SIGN = {
    "silu", "swish", "relu", "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
    "gelu_accurate", "quick_gelu",
}  # fmt: skip


# ---------------------------------------------------------------- the plan


def batches(n_blocks: int, batch_size: int) -> list[tuple[int, range]]:
    """(segment, blocks) of every forward pass; no batch crosses the end of a segment (see SHARES).

    The plan depends on the two numbers only, so every process and every resumed run makes the same passes.
    """
    ends = sorted({max(1, round(n_blocks * share)) for share in SHARES})
    plan, start = [], 0
    for segment, end in enumerate(ends):
        plan += [(segment, range(at, min(at + batch_size, end))) for at in range(start, end, batch_size)]
        start = end
    return plan


# ---------------------------------------------------------------- counting


def active_tokens(value: torch.Tensor) -> torch.Tensor:
    """The number of rows of `value` [.., I] above zero, for each column: integers [I], on its device."""
    active = (value > 0).view(-1, value.shape[-1])
    rows, width = active.shape
    if width % 8:
        return active.view(torch.uint8).sum(0, dtype=torch.int32)
    # Eight neighbours as one 64-bit integer: their bytes are added at once, and a sum of 255 rows never carries over.
    packed, whole = active.view(torch.int64), rows - rows % 255
    sums = [packed[:whole].view(-1, 255, width // 8).sum(1), packed[whole:].sum(0, keepdim=True)]
    return torch.cat(sums).view(torch.uint8).sum(0, dtype=torch.int32)


def active_by_expert(value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The same for the rows of each expert: int64 [E, I], from `value` [rows, I] and bool `chosen` [E, rows]."""
    # A product of zeros and ones: exact even in half precision for 2048 rows at a time, and without a transfer from the
    # GPU to find where each expert's rows end.
    exact = torch.float16 if value.is_cuda else torch.float32
    parts = zip(chosen.split(2048, 1), value.split(2048), strict=True)
    return sum((routed.to(exact) @ (rows > 0).to(exact)).long() for routed, rows in parts)


class Counter:
    """Counts, for every neuron, the tokens on which its activation is above zero; for an expert, of those routed to it.

    Attributes:
        counts: int64 [layers, neurons of the widest layer], on the CPU.
        routed: int64 [layers, experts], the tokens routed to each expert; zeros in dense layers, and [layers, 0] in a
            model without experts.
    """

    def __init__(self, model: torch.nn.Module, arch: archs.Arch):
        config = ffn.decoder_config(model)
        names = (config.get(key) for key in ("hidden_activation", "hidden_act", "activation_function"))
        before = next(filter(None, names), None) in KEEP_SIGN
        self.reader = ffn.Reader(model, arch, range(arch.n_layers(config)), before)
        self.n_layers = arch.n_layers(config)
        self.counts = torch.zeros(self.n_layers, arch.ffn_width(config), dtype=torch.long)
        self.routed = torch.zeros(self.n_layers, self.reader.experts, dtype=torch.long)

    def add(self, ids: torch.Tensor) -> None:
        """Count over the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        active: dict[tuple[int, Neurons], torch.Tensor] = {}
        routed: dict[int, torch.Tensor] = {}
        last = max(self.reader.groups, default=-1)

        def read(layer: int, group: Neurons, value: torch.Tensor, experts: torch.Tensor | None) -> None:
            key = layer, group
            if experts is None:
                active[key] = active_tokens(value)
            else:
                chosen = experts == torch.arange(group.experts, device=experts.device)[:, None]
                active[key] = active.get(key, 0) + active_by_expert(value, chosen).flatten()
                routed[layer] = routed.get(layer, 0) + chosen.sum(1)
            # Non-finite values in one layer spread to all later ones, so it is enough to check the last.
            if layer == last and not bool(torch.isfinite(value).all()):
                raise InputError("activations are not finite; try --dtype float32, or check the weights")

        self.reader.run(ids, read)
        for (layer, group), row in active.items():
            self.counts[layer, group.first : group.stop] += row.cpu()
        for layer, row in routed.items():
            self.routed[layer, : len(row)] += row.cpu()

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`counts` and `routed` since the last call; both start again from zero."""
        taken = self.counts, self.routed
        self.counts, self.routed = map(torch.zeros_like, taken)
        return taken


def count(
    model, arch, blocks: torch.Tensor, plan, partial: unfinished.Partial, rank: int, world: int, save_every: float
) -> None:
    """Run this process's share of `plan` on `blocks` [blocks, size], saving every `save_every` seconds."""
    counted = partial.done | partial.others
    left = [(segment, rows) for segment, rows in plan if not bool(counted[rows.start : rows.stop].all())][rank::world]
    if bool(counted.any()):
        cli.say(f"{int(counted.sum())} of {len(blocks)} blocks were counted before; continuing with the rest")
    saved = time.monotonic()
    bar = cli.progress(desc=f"{partial.stem.name.strip('.').removesuffix('.partial')}", total=len(left), unit="batch")
    counter = Counter(model, arch)
    with bar:
        for segment, rows in left:
            wanted = [row for row in rows if not bool(counted[row])]
            counter.add(blocks[wanted])
            counts, routed = counter.take()
            partial.counts[segment] += counts
            partial.routed[segment] += routed
            partial.done[wanted] = True
            bar.update()
            if time.monotonic() - saved >= save_every:
                partial.save()
                saved = time.monotonic()
    partial.save()


def content(counts: torch.Tensor, routed: torch.Tensor, widths: dict, plan, size: int, header: dict) -> dict:
    """The content of the result file, from the sums by segment, int64 [segments, L, I] and [segments, L, E].

    `widths` has `width`, the number of neurons of each layer, and `routed_width`, that of its experts' neurons.
    """
    blocks = torch.tensor([sum(len(rows) for segment, rows in plan if segment == s) for s in range(len(counts))])
    tokens, sums = blocks.cumsum(0) * size, counts.cumsum(0)
    tensors = {
        "n": int(tokens[-1]),
        "over_zero": sums[-1].clone(),
        "snapshots_n": tokens[:-1].clone(),
        "snapshots": sums[:-1].clone(),
        "header": json.dumps(results.plain(header), ensure_ascii=False),
    }
    if routed.shape[-1]:
        sums = routed.cumsum(0)
        tensors |= {"routed": sums[-1].clone(), "snapshots_routed": sums[:-1].clone()}
        beside = any(
            routed_width not in (0, width)
            for routed_width, width in zip(widths["routed_width"], widths["width"], strict=True)
        )
        tensors |= {"routed_width": torch.tensor(widths["routed_width"])} if beside else {}
    if routed.shape[-1] or len(set(widths["width"])) > 1:
        tensors["width"] = torch.tensor(widths["width"])
    return tensors


# ---------------------------------------------------------------- one file


@dataclass(frozen=True)
class Job:
    """The token ids of a file as `blocks` [blocks, size], the request for their counts, and the file for them."""

    path: Path
    blocks: torch.Tensor
    request: dict
    out: Path


def count_file(
    job: Job, ref: refs.ModelRef, model, arch: archs.Arch, process: processes.Process, save_every: float, anew: bool
) -> None:
    """Count and write the result; all processes share the plan. `anew`: discard what a killed run left."""
    config, size = ref.config(), job.request["block_size"]
    groups = [arch.neurons(config, layer) for layer in range(arch.n_layers(config))]
    widths = {
        "width": ffn.widths(arch, config),
        "routed_width": [sum(group.stop - group.first for group in of_layer if group.experts) for of_layer in groups],
    }
    shape = (len(groups), max(widths["width"]))
    experts = max((group.experts for of_layer in groups for group in of_layer), default=0)
    plan = batches(len(job.blocks), job.request["batch_size"])
    if anew and process.is_main:
        unfinished.remove_partial(job.out)
    process.wait()
    sizes = plan[-1][0] + 1, *shape, experts
    partial = unfinished.Partial(job.out, process.rank, job.request, len(job.blocks), sizes)
    process.wait()  # all have read the earlier state
    start = time.monotonic()
    count(model, arch, job.blocks, plan, partial, process.rank, process.world, save_every)
    process.wait()  # all have saved
    if process.is_main:
        head = header_of(job, ref, shape)
        results.write_tensors(job.out, content(*partial.total(), widths, plan, size, head))
        unfinished.remove_partial(job.out)
        seconds = time.monotonic() - start
        cli.say(f"{job.out}: {job.blocks.numel():,} tokens in {len(job.blocks)} blocks of {size}, {seconds:.0f} s")
    process.wait()


def header_of(job: Job, ref: refs.ModelRef, shape: tuple[int, int]) -> dict:
    ids = job.request["ids"]
    facts = header_facts(job.request, job.path, repeated=tokenids.repeated(job.blocks.flatten()))
    facts |= {"language": ids.get("language", language_of(job.path)), "block_size": job.request["block_size"]}
    facts |= {"n_layers": shape[0], "ffn_width": shape[1], "n_used": job.blocks.numel()}
    return results.header(SCHEMA, models={"model": ref.describe()}, **facts)


def header_facts(request: dict, path: Path, **of_tokens) -> dict:
    """What a header records of a request (`request_of`) on the token ids of a file."""
    facts = {"tokens": {"file": str(path), **of_tokens, **request["ids"]}, "limit": request["ids"]["limit"]}
    return facts | {"dtype": request["dtype"].removeprefix("torch."), "device": request["device"], "request": request}


# ---------------------------------------------------------------- the command


def add_flags(p, place: str) -> None:
    """The flags of scripts that run one model on files of token ids; `place`: the study's folder for results."""
    add = p.add_argument
    add("-m", "--model", metavar="M", help="model; default: the last checkpoint of the study's run")
    cli.add_named_models(p, None, "M: its last checkpoint, or that of --steps")
    add("-i", "--id_path", nargs="+", metavar="IDS", help="files of token ids; default: the study's, all languages")
    text = f"folder for results; default: the study's {place}"
    add("-s", "--save_folder", "-o", "--output", metavar="FOLDER", help=text)
    text = "first part of the files' names; default: the study's name, with that of a model other than the study's"
    add("-n", "--name", metavar="NAME", help=text)
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = "blocks of 4096 (llama) or 2048 tokens; default: from the model"
    add("-t", "--type", choices=("llama", "qwen"), help=text)
    text = "tokens per block; default: that of -t, at most the model's positions"
    add("--block-size", type=cli.positive, metavar="N", help=text)
    text = f"use at most N tokens per language; default: the study's lsn.tokens, else {TOKENS:,}"
    add("--tokens", type=cli.positive, metavar="N", help=text)
    text = "seconds between saves of partial counts; default 180"
    add("--save-every", type=float, default=180, metavar="S", help=text)
    add_flags(p, RESULTS["lsn_counts"])
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    ref = beside.model_or_last(study, args.model, args.named_run, "-m", args.steps)
    process, dtype = processes.from_arguments(args, study)
    all_jobs = jobs(args, study, ref, dtype, process.device)
    todo = left(all_jobs, args.overwrite, process, lambda job: unfinished.remove_partial(job.out))
    if not todo:
        return

    model = loading.load_for(process, ref, dtype)
    for job in todo:
        count_file(job, ref, model, archs.for_config(ref.config()), process, args.save_every, args.overwrite)
    if args.drop_revisions:
        ref.drop()


def left(found: list, overwrite: bool, process: processes.Process, remove: Callable) -> list:
    """The jobs that are not finished; for the finished ones `remove` deletes what a killed run left."""
    todo = []
    for job in found:
        if not finished(job.out, job.request, overwrite):
            todo.append(job)
        elif process.is_main:
            remove(job)
    process.wait()  # no process may see files that another is about to write
    return todo


def asked_for(args, study: Study, step: str) -> tuple[list[tuple[Path, str]], Path, str]:
    """(file of token ids, language) for each file, the folder of results, and the first part of their names.

    Raises:
        InputError: files or names are not given, or two files are of one language.
    """
    files = [(path, language_of(path)) for path in id_files(args.id_path, study)]
    languages.refuse_twice([code for _, code in files], "take one of their id files, or use another -n")
    folder = study.output(args.save_folder, "-s", step)
    model = cli.named(args.model, args.named_run, "-m and --run")
    variant = beside.name(study, run=model, steps=args.steps, limit=args.limit, last=True)
    name = args.name or (dotted(study.name, variant) if study else None)
    if name is None:
        raise InputError("nothing says what to call the files: give -n NAME, or run inside a study")
    return files, folder, name


def jobs(args, study: Study, ref: refs.ModelRef, dtype: torch.dtype, device: torch.device) -> list[Job]:
    """What to count; every file is checked before the model is loaded."""
    files, folder, name = asked_for(args, study, "lsn_counts")
    size = ffn.block_size(ref.config(), args.type, args.block_size or study.get("lsn.block_size"))
    n_tokens = int(study.value(args.tokens, "--tokens", "lsn.tokens", TOKENS))
    run = beside.run_asked_for(study, args.named_run)
    made = []
    for path, code in files:
        blocks, facts = read(path, ref, run, size, n_tokens, args.limit)
        request = request_of(ref, facts, size, args.batch_size, dtype, device)
        made.append(Job(path, blocks, results.plain(request), folder / f"{name}.{code}.pt"))
    return made


def request_of(ref: refs.ModelRef, ids: dict, size: int, batch_size: int | None, dtype, device) -> dict:
    """Everything that determines the activations on blocks of token ids; lsn/lsn_activation_cpt.py uses it, too."""
    return {
        "model": ref.describe(), "ids": ids, "block_size": size, "batch_size": ffn.batch_size(batch_size, size),
        "dtype": str(dtype), "device": device.type,
    }  # fmt: skip


def id_files(given: list[str] | None, study: Study) -> list[Path]:
    """The files to count: `given`, else one for each of the study's languages."""
    if given:
        return [Path(path) for path in given]
    return [id_file(study, str(code)) for code in study.value(None, "-i", "languages.lsn")]


def id_file(study: Study, lang: str) -> Path:
    """The study's file of token ids of a language; its name has the study's spelling."""
    codes = [str(code) for code in study.get("languages.lsn", [])]
    name = tokenids.file_name(languages.find(codes, lang, default=lang), study.name)
    return Path(study.value(None, "-i", "tokens")) / name


def language_of(path: Path) -> str:
    """The second dot-separated part of an id file's name."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the id files in it, one or more")
    parts = path.name.split(".")
    if len(parts) < 3 or not parts[1]:
        raise InputError(f"{path}: no language in its name; id files are called oscar.<language>.train.<model id>")
    return parts[1]


def read(path: Path, ref: refs.ModelRef, run: str | None, size: int, tokens: int, limit: int | None):
    """The blocks of an id file, int32 [blocks, size], and what the counts' header records of them.

    Raises:
        InputError: no such file, ids beyond the vocabulary, a tokenizer other than the model's, not one whole block.
    """
    try:
        tokenizer = tokenization.tokenizer_folder(ref, run)
    except InputError:
        cli.warn(f"{ref.spec} has no tokenizer files: it is taken on trust that the token ids are of its tokenizer")
        tokenizer = None
    vocabulary = tokenizer_id.of_plain_text(tokenizer) if tokenizer else None
    ids, head = tokenids.read(path, vocab_size=identity.vocabulary_size(ref.config()), vocabulary_sha256=vocabulary)
    blocks = ffn.blocks(ids, size, tokens, str(path))
    limited = limit if limit is not None and limit < len(blocks) else None
    blocks = blocks[:limited]
    digest = hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()[:16]
    keys = ("language", "text", "tokenizer", "vocabulary_sha256")
    facts = {"used": blocks.numel(), "limit": limited, "sha256": digest}
    return blocks, facts | {key: head[key] for key in keys if key in head}


def finished(out: Path, request: dict, overwrite: bool) -> bool:
    """Whether `out` holds the counts of `request`.

    Raises:
        InputError: it holds those of another request.
    """
    if overwrite or not out.exists():
        return False
    tensors = results.read_tensors(out)
    try:
        before = json.loads(tensors.get("header", "{}")).get("request")
    except ValueError:
        raise InputError(f"{out} is damaged: its header is not JSON; give --overwrite to redo it") from None
    results.refuse_other(out, before, request, "another -s or -n")
    cli.say(f"{out} is finished (--overwrite redoes it)")
    return True


if __name__ == "__main__":
    cli.run(main)
