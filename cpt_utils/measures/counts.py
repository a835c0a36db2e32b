"""Counts of active tokens per FFN neuron and language, `<tag>.<lang>.pt`: read, checked, refused if they do not match.

`lsn/activation.py` writes them with snapshots and a header; the files of the published scripts, and those of the
original LAPE code, `activation.<lang>.train.<tag>`, hold only `n` and `over_zero`. Files of a mixture of experts (MoE)
also hold how many tokens were routed to each expert, and the width of each layer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import cli, forms, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.checkpoints import relatives

SCHEMA = "activation-counts"
_NAMES = (
    re.compile(r"(?P<tag>[^.].*)\.(?P<lang>[^.]+)\.pt"),
    re.compile(r"activation\.(?P<lang>[^.]+)\.train\.(?P<tag>.+)"),
)


@dataclass
class Counts:
    """The counts of one language: `over_zero` [L, I], cumulative `snapshots` [K, L, I], and their origin.

    If layers differ in width, `width` [L] is the number of neurons of each (maybe 0), the rest is padding; else None.
    For a MoE, `routed` [L, E] are the tokens that each expert got (0 in a dense layer), `snapshots_routed` [K, L, E]
    those of the snapshots, and `routed_width` [L] the number of the experts' neurons, which come first; else None.
    """

    path: Path
    lang: str
    n: int
    over_zero: np.ndarray
    snapshots_n: list[int] = field(default_factory=list)
    snapshots: list[np.ndarray] = field(default_factory=list)
    header: dict = field(default_factory=dict)
    routed: np.ndarray | None = None
    snapshots_routed: list[np.ndarray] = field(default_factory=list)
    width: np.ndarray | None = None
    routed_width: np.ndarray | None = None

    @property
    def exists(self) -> np.ndarray | None:
        """Which entries are neurons rather than padding, bool [L, I]; None if all are."""
        return None if self.width is None else np.arange(self.over_zero.shape[1]) < self.width[:, None]

    @property
    def n_neurons(self) -> int:
        return self.over_zero.size if self.width is None else int(self.width.sum())

    def tokens(self, snapshot: int | None = None) -> int | np.ndarray:
        """The tokens on which each neuron could be active, in all or up to a snapshot: one number, or int64 [L, I].

        For a neuron of an expert, those routed to it; of a dense layer or beside the experts, all; for padding, none.
        """
        n = self.n if snapshot is None else self.snapshots_n[snapshot]
        if self.width is None:
            return n
        tokens = np.where(self.exists, n, 0)
        if self.routed is None:
            return tokens
        routed = self.routed if snapshot is None else self.snapshots_routed[snapshot]
        for layer in np.flatnonzero(self.routed.any(-1)):
            width = self.routed_width[layer]
            tokens[layer, :width] = np.repeat(routed[layer], width // routed.shape[1])
        return tokens

    def hash(self) -> str:
        """A short hash of the counts alone, equal for equal counts, whenever they were made."""
        digest = hashlib.sha256(f"{self.n} {self.snapshots_n}".encode())
        moe = () if self.routed is None else (self.routed, *self.snapshots_routed)
        widths = () if self.width is None else (self.width,)
        if moe and (self.routed_width != self.width).any():
            widths += (self.routed_width,)
        for array in (self.over_zero, *self.snapshots, *moe, *widths):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def tags(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """`{tag: [(language, file)]}` for the counts in a folder."""
    by_tag: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(folder.iterdir()):
        for name in _NAMES:
            if match := name.fullmatch(path.name):
                by_tag.setdefault(match["tag"], []).append((match["lang"], path))
    return by_tag


def files(folder: Path, tag: str) -> dict[str, Path]:
    """The counts with `tag` in a folder, by language.

    Raises:
        InputError: no such folder, no counts with that tag, or two files for one language.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of counts; give -a the folder that lsn/activation.py wrote")
    by_tag, by_lang = tags(folder), {}
    for lang, path in by_tag.get(tag, []):
        if by_lang.setdefault(lang, path) != path:
            raise InputError(f"{by_lang[lang]} and {path.name} are both counts of {lang}; move one of them elsewhere")
    if not by_lang:
        tip = f"its tags are {', '.join(sorted(by_tag)[:8])}: give one with -t"
        raise InputError(f"{folder} has no counts {tag}.<lang>.pt; {tip if by_tag else 'run lsn/activation.py first'}")
    return by_lang


def read(path: Path, lang: str) -> Counts:
    """One language's counts.

    Raises:
        InputError: another kind of file, a limited or foreign one, or impossible counts.
    """
    tensors = results.read_tensors(path)
    try:
        n, over_zero = int(tensors["n"]), tensors["over_zero"].numpy().astype(np.int64)
        header = json.loads(tensors.get("header") or "{}")
        snapshots_n = [int(tokens) for tokens in tensors.get("snapshots_n", ())]
        snapshots = [snapshot.numpy().astype(np.int64) for snapshot in tensors.get("snapshots", ())]
        moe = "routed" in tensors
        routed = tensors["routed"].numpy() if moe else None
        width = tensors["width"].numpy() if moe or "width" in tensors else None
        routed_width = tensors.get("routed_width", tensors["width"]).numpy() if moe else None
        snapshots_routed = [snapshot.numpy() for snapshot in tensors["snapshots_routed"]] if moe else []
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{path} has no counts (n, over_zero [layers, neurons]); write it with lsn/activation.py"
        ) from None
    forms.conform(path, header, forms.HEADER, "header")
    if header and header.get("schema") != SCHEMA:
        raise InputError(f"{path} holds {header.get('schema')!r}, not {SCHEMA!r}; give a file of lsn/activation.py")
    if header.get("limit") is not None:
        raise InputError(f"{path} was made with --limit {header['limit']}; run lsn/activation.py again without --limit")
    if header.get("language") and not languages.same(header["language"], lang):
        raise InputError(f"{path} counts {header['language']}, not {lang}; give each language its own file")
    if over_zero.ndim != 2 or not over_zero.size:
        raise InputError(f"{path}: over_zero is {list(over_zero.shape)}, not [layers, neurons]; write it again")
    if n < 1:
        raise InputError(f"{path} counts {n} tokens; run lsn/activation.py on more text")
    counts = Counts(
        path, lang, n, over_zero, snapshots_n, snapshots, header, routed, snapshots_routed, width, routed_width
    )
    if width is not None:
        _check_widths(counts)
    if over_zero.min() < 0 or over_zero.max() > n:
        raise InputError(f"{path}: a neuron is active on {over_zero.max()} of {n} tokens; write the counts again")
    series = [np.zeros_like(over_zero), *snapshots, over_zero]
    increasing = all(a.shape == b.shape and (a <= b).all() for a, b in itertools.pairwise(series))
    marks = [0, *snapshots_n, n]
    if len(snapshots) != len(snapshots_n) or not increasing or any(a >= b for a, b in itertools.pairwise(marks)):
        raise InputError(f"{path}: its snapshots are not parts of its counts; run lsn/activation.py again")
    return counts


def _check_widths(one: Counts) -> None:
    """Refuse inconsistent counts of layers with different widths, or of experts.

    Raises:
        InputError: shapes that do not match, more active tokens than were routed, or counts in the padding.
    """
    layers, neurons = one.over_zero.shape
    fits = one.width.shape == (layers,) and one.width.min() >= 0 and 1 <= one.width.max() <= neurons
    what = "neurons by layer do"
    if fits and one.routed is not None:
        what, routed_width = "experts' tokens do", one.routed_width
        fits = one.routed.ndim == 2 and len(one.routed) == layers and routed_width.shape == (layers,)
        fits = fits and (routed_width <= one.width).all() and routed_width[one.routed.any(-1)].min(initial=1) >= 1
        fits = fits and not any(routed_width[one.routed.any(-1)] % one.routed.shape[1])
        fits = fits and [part.shape for part in one.snapshots_routed] == [one.routed.shape] * len(one.snapshots)
    if not fits or (one.over_zero > one.tokens()).any():
        raise InputError(f"{one.path}: its {what} not fit its counts; run lsn/activation.py again")


def refuse_mixed(counts: list[Counts]) -> None:
    """Refuse counts of different models or tokenizers; files without a header are taken on trust.

    Raises:
        InputError: shapes, models or tokenizers differ.
    """
    first = counts[0]
    for one in counts[1:]:
        if one.over_zero.shape != first.over_zero.shape:
            (a, b), (c, d) = first.over_zero.shape, one.over_zero.shape
            raise InputError(
                f"counts of different models: {first.path.name} has {a} layers of {b} neurons, {one.path.name} has {c} "
                f"of {d}; count every language with the same model"
            )
        widths = [None if x.width is None else (x.width.tolist(), *_experts(x)) for x in (first, one)]
        if widths[0] != widths[1]:
            raise InputError(
                f"counts of different models: {first.path.name} and {one.path.name} differ in experts, or in how many "
                "neurons a layer has; count every language with the same model"
            )
    without_header = [one.path.name for one in counts if not one.header]
    if without_header:
        more = f" and {len(without_header) - 1} more" if len(without_header) > 1 else ""
        cli.warn(f"no header in {without_header[0]}{more}: model, tokenizer and text are taken on trust")
    stated = [one for one in counts if one.header]
    for one in stated[1:]:
        ours, theirs = (x.header.get("models", {}).get("model", {}) for x in (stated[0], one))
        if not relatives.same_model(ours, theirs):
            raise InputError(
                f"counts of different models: {stated[0].path.name} is of {ours.get('spec')}, {one.path.name} of "
                f"{theirs.get('spec')}{' (trained again)' if ours.get('spec') == theirs.get('spec') else ''}; "
                "count every language with the same model"
            )
        hashes = [tokenizer_of(x.header) for x in (stated[0], one)]
        if all(hashes) and hashes[0] != hashes[1]:
            raise InputError(
                f"{stated[0].path.name} and {one.path.name} come from tokens of different tokenizers; "
                "run lsn/load_oscar.py with one tokenizer for all languages, then lsn/activation.py"
            )
        if stated[0].header.get("dtype") != one.header.get("dtype"):
            cli.warn(f"{stated[0].path.name} and {one.path.name} were counted in different dtypes")


def _experts(counts: Counts) -> tuple:
    """The sizes that must be equal in counts of one mixture of experts; () for other models."""
    return () if counts.routed is None else (counts.routed.shape[1], counts.routed_width.tolist())


def tokenizer_of(header: dict) -> str | None:
    """The hash of the tokenizer that made the tokens, if a counts header states it."""
    return (header.get("tokens") or {}).get("vocabulary_sha256") or header.get("vocabulary_sha256")
