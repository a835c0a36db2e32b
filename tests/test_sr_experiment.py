"""Sentence retrieval against a float64 loop written from the definition, and its invariants."""

import json
import math

import pytest
import torch
from helpers import load_script, save_tiny, tiny_model, tiny_tokenizer
from launch import launch

from cpt_utils.architectures.archs import for_config
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import gate
from cpt_utils.models import states
from cpt_utils.models.batching import encode

WORDS_A = "the cat dog sees a red house runs fast seven birds sing loud today rivers".split()  # noqa: SIM905
WORDS_B = "an cait madra feic dearg teach rith mear seacht ean can ard inniu aibhneacha".split()  # noqa: SIM905


def sentences(words, n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return [
        f"{i} " + " ".join(words[j] for j in torch.randint(len(words), (length,), generator=generator).tolist())
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def sr():
    return load_script("sentence-retrieval/sr_experiment.py")


def retrieve(sr, base, target, *how, **more):
    """Retrieval over the vectors alone, however they were pooled."""
    share = base[..., 0].abs()
    return sr.scoring.Retrieval(*(states.Pooled(x, x, x, x, share) for x in (base, target)), *how, **more)


def slow_accuracy(model, tokenizer, base, target, variant, k=4):
    """The definition, sentence by sentence, pair by pair: no padding, no matrices. [L+1] accuracies, base -> target."""

    def vectors(texts):
        found = []
        for text in texts:
            with torch.inference_mode():
                states = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            found.append([state[0].mean(0).tolist() for state in states])
        return found

    def cosine(u, v):
        dot = sum(a * b for a, b in zip(u, v, strict=True))
        return dot / (math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v)))

    xs, ys = vectors(base), vectors(target)
    n, accuracies = len(base), []
    for layer in range(len(xs[0])):
        a = [[cosine(xs[i][layer], ys[j][layer]) for j in range(n)] for i in range(n)]
        right = 0
        for i in range(n):
            m_i = sum(sorted(a[i], reverse=True)[:k]) / k
            scores = []
            for j in range(n):
                m_j = sum(sorted((a[r][j] for r in range(n)), reverse=True)[:k]) / k
                b = (m_i + m_j) / 2 + 1e-6
                scores.append({"ratio": a[i][j] / b, "distance": a[i][j] - b, "absolute": a[i][j]}[variant])
            right += target[scores.index(max(scores))] == target[i]
        accuracies.append(right / n)
    return accuracies


@pytest.mark.parametrize("variant", ["ratio", "distance", "absolute"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_accuracy_equals_the_definition(sr, model_type, variant):
    model, tokenizer = tiny_model(model_type, dtype="float64"), tiny_tokenizer()
    base, target = sentences(WORDS_A, 14, 1), sentences(WORDS_B, 14, 2)
    slow = slow_accuracy(model, tokenizer, base, target, variant)
    arch = for_config(model.config)
    sides = [encode(tokenizer, texts) for texts in (base, target)]
    for batch_size in (1, 64, None):
        found = sr.measure(model, arch, tokenizer, *sides, variant, batch_size=batch_size)
        assert found.accuracy == slow


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_batch_size_and_padding_side_move_nothing_but_ties(sr, dtype):
    model, tokenizer = tiny_model("qwen2", dtype=dtype), tiny_tokenizer()
    arch = for_config(model.config)
    sides = [encode(tokenizer, sentences(w, 30, s)) for w, s in ((WORDS_A, 3), (WORDS_B, 4))]

    def vectors(batch_size, padding):
        return [
            sr.sentence_vectors(model, arch, side, tokenizer.pad_token_id, batch_size, padding_side=padding).mean
            for side in sides
        ]

    reference = vectors(1, "right")
    for batch_size, padding in ((64, "right"), (64, "left"), (7, "left"), (None, "right")):
        other = vectors(batch_size, padding)
        for layer in range(len(reference[0])):
            scores = sr.scoring.margin_scores(sr.scoring.cosine(reference[0][layer], reference[1][layer]))
            again = sr.scoring.margin_scores(sr.scoring.cosine(other[0][layer], other[1][layer]))
            changed = (scores.argmax(1) != again.argmax(1)).nonzero().flatten().tolist()
            top = scores.topk(2, dim=1).values
            margins = {i: float(top[i, 0] - top[i, 1]) for i in changed}
            # Where an argmax moves, the two best scores are a tie to 1e-6; in float64 none moves at all.
            assert all(margin <= 1e-6 for margin in margins.values()), margins
            assert dtype == "float32" or not changed


def test_a_language_against_itself_is_found_at_every_layer(sr):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    side = encode(tokenizer, sentences(WORDS_A, 40, 5))
    for variant in sr.scoring.MARGINS:
        found = sr.measure(model, for_config(model.config), tokenizer, side, side, variant)
        assert found.accuracy == found.mean_accuracy == [1.0] * 4


def test_shuffled_pairs_give_chance(sr):
    torch.manual_seed(0)
    vectors = torch.randn(3, 200, 16)
    found = retrieve(sr, vectors, vectors)
    assert found.accuracy == [1.0] * 3
    # 100 shuffles of 200 sentences: the mean share of fixed points is 1/200, standard error 1/200/10.
    assert all(abs(c - 1 / 200) < 4 / 200 / 10 for c in found.chance.tolist())
    permuted = vectors[:, torch.randperm(200)]
    assert max(retrieve(sr, vectors, permuted).accuracy) < 0.05


def test_centring_undoes_an_offset_between_languages(sr):
    torch.manual_seed(0)
    x = torch.randn(1, 100, 8)
    x[..., 0] += 30  # each language keeps to a place of its own, far from the origin
    y = x + 0.1 * torch.randn(1, 100, 8) + 30 * torch.eye(8)[1]
    found = retrieve(sr, x, y, "absolute")
    assert found.hits_centred.double().mean() > found.accuracy[0] + 0.2


def test_the_reverse_direction_is_the_transpose(sr):
    torch.manual_seed(0)
    x, y = torch.randn(2, 50, 4), torch.randn(2, 50, 4)
    there, back = retrieve(sr, x, y, "distance"), retrieve(sr, y, x, "distance")
    assert torch.equal(there.hits_reverse, back.hits) and torch.equal(there.hits, back.hits_reverse)


def with_copies(words, seed):
    """21 sentences of which five stand twice, and one of these a third time."""
    once = sentences(words, 15, seed)
    return [*once, *once[3:8], once[4]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_any_copy_of_the_translation_counts_whatever_the_batch(sr, dtype):
    """Which copy scores highest is rounding, and moves with batch size and padding side; the accuracy must not."""
    model, tokenizer = tiny_model("llama", dtype=dtype), tiny_tokenizer()
    arch, base, target = for_config(model.config), with_copies(WORDS_A, 6), with_copies(WORDS_B, 8)
    base[-1] = "another sentence"  # its translation is one that others have, too
    sides = [encode(tokenizer, texts) for texts in (base, target)]
    assert sides[0].first[15:] == [3, 4, 5, 6, 7, 20] and sides[1].first[15:] == [3, 4, 5, 6, 7, 4]

    def found(batch_size, padding, first):
        vectors = [
            sr.sentence_vectors(model, arch, side, tokenizer.pad_token_id, batch_size, padding_side=padding).mean
            for side in sides
        ]
        if dtype == "bfloat16":  # its rounding moves other argmaxes as well: here copies against copies alone
            vectors[1] = vectors[0] = torch.stack([vectors[0]] * 2).mean(0)
            return retrieve(sr, *vectors, first=first and (first[0], first[0]))
        return retrieve(sr, *vectors, first=first)

    first = tuple(side.first for side in sides)
    reference = found(None, "right", first)
    if dtype == "float64":
        assert reference.accuracy == slow_accuracy(model, tokenizer, base, target, "ratio")
        assert [h / 21 for h in reference.hits_reverse.sum(1).tolist()] == slow_accuracy(
            model, tokenizer, target, base, "ratio"
        )
    if dtype == "bfloat16":
        assert reference.accuracy == reference.mean_accuracy == [1.0] * 4
    for batch_size, padding in ((1, "right"), (3, "left"), (5, "right"), (64, "left")):
        other = found(batch_size, padding, first)
        for part in ("hits", "hits_reverse", "hits_centred"):
            assert torch.equal(getattr(other, part), getattr(reference, part)), (batch_size, padding, part)
        assert torch.equal(other.chance, reference.chance)
    assert found(None, "right", None).hits.sum() < reference.hits.sum()


def test_copies_raise_chance(sr):
    torch.manual_seed(0)
    vectors = torch.randn(1, 60, 16).repeat_interleave(2, dim=1)
    first = [i - i % 2 for i in range(120)]
    # A shuffled pair is right for two of 120 sentences, by 100 shuffles: standard error 1/600.
    assert abs(float(retrieve(sr, vectors, vectors, first=(first, first)).chance) - 2 / 120) < 4 / 600


def test_sentences_that_cannot_be_told_apart_are_no_copies(sr):
    """One huge activation makes all cosines 1 to a millionth: were such scores ties, every sentence would be found."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 200, 16)
    x[..., 0] += 1e5
    y[..., 0] += 1e5
    scores = sr.scoring.margin_scores(sr.scoring.cosine(x[0], y[0]))
    assert float(scores.max() - scores.min()) < 1e-6
    assert retrieve(sr, x, y).accuracy[0] < 0.05


def test_special_tokens_can_be_left_out_of_the_mean(sr):
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    side = encode(tokenizer, ["one two"])
    arch = for_config(model.config)
    without = sr.sentence_vectors(model, arch, side, 0, special_tokens=False).mean
    with torch.inference_mode():
        states = model(torch.tensor(side.ids), output_hidden_states=True).hidden_states
    torch.testing.assert_close(without[:, 0], torch.stack([state[0, 1:].mean(0) for state in states]))


def test_margins_with_fewer_sentences_than_neighbours(sr):
    a = torch.tensor([[1.0, 0.2], [0.1, 0.9]])
    assert sr.scoring.margin_scores(a, "ratio", k=4).argmax(1).tolist() == [0, 1]


# ---------------------------------------------------------------- the command


@pytest.fixture
def project(tmp_path):
    """A base, a run of two checkpoints, and parallel text."""
    save_tiny("llama", tmp_path / "base", seed=0)
    for step in (5, 10):
        save_tiny("llama", tmp_path / "run" / f"checkpoint-{step}", seed=step)
    for name, words, seed in (("a", WORDS_A, 1), ("b", WORDS_B, 2)):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(words, 12, seed)) + "\n")
    return tmp_path


def command(project, *extra):
    return [
        "--model_path", str(project / "base"), str(project / "run"), "--base", "eng_Latn", "--target", "gle_Latn",
        "--source", "text", "--base-file", str(project / "a.txt"), "--target-file", str(project / "b.txt"),
        "--artifact-out", str(project / "out"), *extra,
    ]  # fmt: skip


def test_files_of_a_run(sr, project):
    sr.main(command(project))
    folder = project / "out" / "eng_Latn-gle_Latn"
    names = {path.name for path in folder.iterdir()}
    ids = [f"{project.name}__base", "run__checkpoint-5", "run__checkpoint-10", "untrained"]
    assert names == {f"{i}.{end}" for i in ids for end in ("json", "pt")} | {"accuracy.pdf", "accuracy.png"}
    payload, header = results.read_json(folder / "run__checkpoint-10.json", sr.SCHEMA, n_layers=3, base_lang="en")
    assert list(payload)[:5] == ["model_path", "base_lang", "target_lang", "timestamp", "layer_accuracy"]
    assert [layer for layer, _ in payload["layer_accuracy"]] == [0, 1, 2, 3]
    hits = results.read_tensors(folder / "run__checkpoint-10.pt")["hits"]
    assert hits.shape == (4, 12) and hits.dtype == torch.uint8
    assert hits.double().mean(1).tolist() == [accuracy for _, accuracy in payload["layer_accuracy"]]
    low_high = payload["layer_accuracy_ci"][3][1]
    assert low_high[0] <= payload["layer_accuracy"][3][1] <= low_high[1]
    assert (header["n_used"], header["n_available"], header["dtype"], header["margin_variant"]) == (
        12,
        12,
        "float32",
        "ratio",
    )


def strip(path):
    content = json.loads(path.read_text())
    content.pop("timestamp")
    for key in ("time", "command", "code"):
        content["_header"].pop(key)
    return content


def test_a_rerun_keeps_finished_files_and_overwrite_gives_the_same(sr, project, capsys):
    sr.main(command(project))
    folder = project / "out" / "eng_Latn-gle_Latn"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stripped = {path.name: strip(path) for path in folder.glob("*.json")}
    capsys.readouterr()
    sr.main(command(project))
    assert capsys.readouterr().out.count("is finished") == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sr.main(command(project, "--overwrite"))
    assert {path.name: strip(path) for path in folder.glob("*.json")} == stripped
    for name in before:
        if not name.endswith(".json"):
            assert (folder / name).read_bytes() == before[name], name


@pytest.mark.slow
def test_two_processes_write_what_one_does(sr, project):
    """Four models over two processes, one of which was finished before; alignment, too."""

    def written():
        files = [path for path in (project / "out").rglob("*") if path.is_file()]
        return {path: strip(path) if path.suffix == ".json" else path.read_bytes() for path in files}

    sr.main(command(project))
    one = written()
    for path in one:
        if not path.name.startswith("run__checkpoint-5"):
            path.unlink()
    said = launch("sentence-retrieval/sr_experiment.py", *command(project), forks=False).stdout
    assert written() == one and len(one) == 20
    assert said.count("is finished") == said.count("wrote 3 results") == 1 and said.count(": best ") == 3
    # An error ends all processes, those too that wait for the one it happened to.
    failed = launch("sentence-retrieval/sr_experiment.py", *command(project, "--k", "3"), code=2)
    assert "error:" in failed.stderr and "is of another request (k: 3 asked for, 4 in the file)" in failed.stderr


def test_what_several_processes_may_not_do(sr, project, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device-map auto gives one model all GPUs"):
        sr.main(command(project, "--device-map", "auto"))
    assert "12 sentence" in capsys.readouterr().out
    with pytest.raises(InputError, match="contradict each other"):
        sr.main(command(project, "--device-map", "auto", "--device", "cpu"))
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    with pytest.raises(InputError, match="--device-map"):
        sr.main(command(project, "--device-map", "auto"))
    assert not capsys.readouterr().out


def test_a_device_map_gives_the_same_result(sr, project):
    sr.main(command(project))
    folder = project / "out" / "eng_Latn-gle_Latn"
    before = {path.name: strip(path) for path in folder.glob("*.json")}
    sr.main(command(project, "--device-map", "auto", "--overwrite", "--batch-size", "5"))
    assert {path.name: strip(path) for path in folder.glob("*.json")} == before


def test_a_result_of_other_settings_is_not_taken_for_finished(sr, project):
    sr.main(command(project))
    told = r"is of another request \(margin_variant: distance asked for, ratio in the file\); give --overwrite"
    with pytest.raises(InputError, match=told):
        sr.main(command(project, "--margin-variant", "distance"))
    tokenizer = project / "run/checkpoint-5/tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole.replace('"<s>"', '"<t>"'))
    with pytest.raises(InputError, match=r"request \(tokenizer: ids:\w+ asked for, ids:\w+ in the file\)"):
        sr.main(command(project))
    tokenizer.write_text(whole + " ")  # the same tokenizer, saved in another way
    sr.main(command(project))
    save_tiny("llama", project / "base", seed=77)
    with pytest.raises(InputError, match=r"models\.model\.weights_sample: \w+ asked for, \w+ in the file"):
        sr.main(command(project))


def test_measuring_swapped_models_leaves_the_studys_figure(sr, project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(
        "name: s\nbase: base\nrun: run\nlanguages: {base: eng_Latn, target: qaa_Latn}\n"
        "data: {source: text, base_file: a.txt, target_file: b.txt}\nresults: r\n"
    )
    sr.main([])
    folder = project / "r/sentence-retrieval/eng_Latn-qaa_Latn"
    before = (folder / "accuracy.png").stat()
    config = project / "run/checkpoint-10/config.json"
    save_tiny("llama", project / "swapped/one", seed=9)
    (project / "swapped/one/config.json").write_text(
        config.read_text().replace('"transformers_version": "', '"transformers_version": "0.')
    )
    sr.main(["--model_path", "swapped/one", "--source", "text"])
    assert (folder / "accuracy.png").stat() == before
    assert (folder / "swapped__one.png").is_file()
    save_tiny("llama", project / "swapped/deep", seed=9, layers=4)
    sr.main(["--model_path", "swapped/deep"])
    assert (folder / "untrained.swapped__deep.json").is_file()


def test_two_models_of_one_name_are_refused(sr, project):
    save_tiny("llama", project / "other/run/checkpoint-5", seed=1)
    args = command(project)
    args[1:3] = [str(project / "run"), str(project / "other/run")]
    with pytest.raises(InputError, match=r"would write the same file run__checkpoint-5\.json"):
        sr.main(args)


def test_a_limited_run_is_marked(sr, project):
    sr.main(command(project, "--limit", "6", "--no-untrained"))
    path = project / "out" / "eng_Latn-gle_Latn" / "run__checkpoint-5.json"
    with pytest.raises(InputError, match="--limit 6"):
        results.read_json(path, sr.SCHEMA)
    assert not path.with_name("untrained.json").exists()


def test_inside_a_study_no_argument_is_needed(sr, project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(
        "name: s\nbase: base\nrun: run\nlanguages: {base: eng_Latn, target: qaa_Latn}\n"
        "data: {source: text, base_file: a.txt, target_file: b.txt}\nresults: results/s\n"
    )
    sr.main(["--no-untrained"])
    folder = project / "results/s/sentence-retrieval/eng_Latn-qaa_Latn"
    assert (folder / "run__checkpoint-5.json").is_file() and (folder / "accuracy.pdf").is_file()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sr.main(["--limit", "5"])  # a try leaves the study's place alone
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    beside = project / "results/s/sentence-retrieval.limit-5/eng_Latn-qaa_Latn/run__checkpoint-5.json"
    assert json.loads(beside.read_text())["_header"]["limit"] == 5


STUDY = (
    "name: s\nbase: base\nrun: run\nlanguages: {base: eng_Latn, target: gle_Latn}\n"
    "data: {source: text, base_file: a.txt, target_file: b.txt}\nresults: RESULTS\n"
)


def contents(folder):
    """What is measured, and what a request is compared by, of every result; how paths are spelled is left out."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            content = strip(path)
            del content["model_path"]
            found[path.name] = results.essential(content)
        else:
            found[path.name] = path.read_bytes()
    return found


def test_by_hand_and_by_the_workflow_are_one(sr, project, monkeypatch, capsys):
    """A checkpoint after the other as the workflow calls it, then all; by hand as the paper's README prints it, with
    other spellings of paths and languages. Same files; each keeps what the other has made."""
    monkeypatch.chdir(project)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # this one takes the base's
        (project / "run/checkpoint-10" / name).unlink()

    def workflow():
        for model in ("base", "run/checkpoint-5", "run/checkpoint-10"):
            sr.main(["--model_path", model, "--no-untrained"])
            (here / f"{project.name}__base.pdf").unlink(missing_ok=True)
        sr.main([])

    def by_hand():
        more = [
            "--data-dir",
            str(project),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--batch-size",
            "4",
            "--limit",
            "99",
        ]
        sr.main(["--model_path", f"{project}/run/", "--base", "en", "--target", "ga", *more])

    both = {}
    for name, first, second in (("one", workflow, by_hand), ("two", by_hand, workflow)):
        (project / "study.yaml").write_text(STUDY.replace("RESULTS", name))
        here = project / name / "sentence-retrieval/eng_Latn-gle_Latn"
        first()
        made = contents(here)
        capsys.readouterr()
        second()
        assert "parameters, float32" not in capsys.readouterr().out  # no model was run again
        parts = ("run__", f"{project.name}__base.p")  # figures of parts
        both[name] = {
            k: v for k, v in contents(here).items() if not (k.startswith(parts) and k.endswith(("pdf", "png")))
        }
        assert {k: v for k, v in both[name].items() if k in made} == {k: v for k, v in made.items() if k in both[name]}
        assert [path.name for path in (project / name / "sentence-retrieval").iterdir()] == [here.name]
    assert both["one"] == both["two"] and "untrained.pt" in both["one"] and "accuracy.png" in both["one"]


def test_a_checkpoint_by_hand_brings_base_and_twin(sr, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(STUDY.replace("RESULTS", "r"))
    here = project / "r/sentence-retrieval/eng_Latn-gle_Latn"
    sr.main(["--model_path", "run/checkpoint-10"])
    names = {path.stem for path in here.glob("*.json")}
    assert names == {f"{project.name}__base", "run__checkpoint-10", "untrained"}
    assert (here / "run__checkpoint-10.png").is_file() and not (here / "accuracy.png").exists()
    captured = capsys.readouterr()
    twin = [line for line in (captured.out + captured.err).splitlines() if "its untrained twin" in line]
    assert len(twin) == 1 and "run/checkpoint-10" in twin[0] and "12 sentences" in twin[0]
    header = results.read_json(here / f"{project.name}__base.json")[1]
    assert header["models"]["model"]["step"] is None
    # What was asked for alone; the base by its own name is not measured twice.
    sr.main(["--model_path", "run/checkpoint-5", "--no-untrained", "--artifact-out", "alone"])
    assert [path.name for path in (project / "alone/eng_Latn-gle_Latn").glob("*.json")] == ["run__checkpoint-5.json"]
    sr.main(["--model_path", "run", f"{project}/base"])
    assert (here / "accuracy.png").is_file() and len(list(here.glob("*.json"))) == 4


def test_each_configuration_has_a_twin(sr, project, monkeypatch, capsys):
    """CPT that extended the vocabulary: base and checkpoints differ in shape."""
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(STUDY.replace("RESULTS", "r"))
    for step in (5, 10):
        save_tiny("llama", project / f"run/checkpoint-{step}", seed=step, vocab_size=280)
    here = project / "r/sentence-retrieval/eng_Latn-gle_Latn"
    sr.main(["--model_path", "run/checkpoint-10"])
    twins = {path.name for path in here.glob("untrained*.json")}
    assert twins == {"untrained.json", "untrained.run__checkpoint-10.json"}
    before = {name: (here / name).read_bytes() for name in twins}
    capsys.readouterr()
    sr.main([])
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "untrained twin" in line]
    assert all(f"run/checkpoint-{step}" in warning for step in (5, 10))  # 12 sentences never suffice
    assert {path.name: path.read_bytes() for path in here.glob("untrained*.json")} == before
    (here / "untrained.json").write_text("{")
    with pytest.raises(InputError, match=r"untrained\.json is not valid JSON"):
        sr.main([])
    sr.main(["--overwrite"])
    assert {path.name for path in here.glob("untrained*.json")} == twins


def test_the_gate_is_of_the_curve_that_the_study_splits_layers_by(sr, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(STUDY.replace("RESULTS", "r") + "measure: unit_centred\n")
    sr.main([])
    said = capsys.readouterr()
    assert "12 sentences, by unit_centred)" in said.out + said.err
    # A twin of before has no such curve: of it nothing is said, and nothing breaks.
    twin = project / "r/sentence-retrieval/eng_Latn-gle_Latn/untrained.json"
    content = json.loads(twin.read_text())
    twin.write_text(json.dumps({key: value for key, value in content.items() if "unit" not in key}))
    sr.main([])
    said = capsys.readouterr()
    assert "untrained twin" not in said.out + said.err


def test_ids_of_special_tokens_make_no_other_twin(sr, project, monkeypatch):
    """A Trainer sets them in the checkpoints' configurations to those of its tokenizer."""
    monkeypatch.chdir(project)
    (project / "study.yaml").write_text(STUDY.replace("RESULTS", "r"))
    for step in (5, 10):
        path = project / f"run/checkpoint-{step}/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 2, "eos_token_id": 1}))
    here = project / "r/sentence-retrieval/eng_Latn-gle_Latn"
    sr.main([])
    assert {path.name for path in here.glob("untrained*")} == {"untrained.json", "untrained.pt"}
    twin, header = results.read_json(here / "untrained.json")
    for name in (f"{project.name}__base", "run__checkpoint-10"):
        path = here / f"{name}.json"
        assert gate.twin_beside(path, results.read_json(path)[1]) == here / "untrained.json"
    # A file of before, whose configuration holds the base's ids, is the same twin.
    header["models"]["untrained_like"] |= {"pad_token_id": 0, "bos_token_id": 1}
    (here / "untrained.json").write_text(json.dumps(twin | {"_header": header}))
    before = (here / "untrained.json").read_bytes()
    sr.main([])
    assert (here / "untrained.json").read_bytes() == before


def test_repeated_sentences_are_said(sr, project, capsys):
    lines = (project / "b.txt").read_text().splitlines()
    lines[3] = lines[7] = lines[1]
    (project / "b.txt").write_text("\n".join(lines) + "\n")
    args = command(project, "--no-untrained")
    args[1:3] = [str(project / "base")]
    sr.main(args)
    assert "3 sentences of gle_Latn occur more than once, and finding any copy counts" in capsys.readouterr().out
    path = project / "out/eng_Latn-gle_Latn" / f"{project.name}__base.json"
    assert results.read_json(path)[1]["data"]["repeated"] == {"target": 3}
    # A result of before, when the first of equal scores was taken, is another result.
    content = json.loads(path.read_text())
    del content["_header"]["data"]["repeated"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r'data.repeated: {"target": 3} asked for, none in the file'):
        sr.main(args)


def nan_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan_weights, "not finite"),
        (truncated, "model.safetensors"),
        (without("config.json"), "no config.json"),
        (without("model.safetensors"), "run__checkpoint-10|no weights|safetensors"),
    ],
)
def test_a_damaged_model_is_one_line_and_leaves_no_result(sr, project, damage, message):
    damage(project / "run" / "checkpoint-10")
    with pytest.raises(InputError, match=message):
        sr.main(command(project, "--no-untrained"))
    folder = project / "out" / "eng_Latn-gle_Latn"
    assert not list(folder.glob("run__checkpoint-10*")) and not list(folder.glob(".*"))


def test_a_tensor_missing_on_disk_is_not_filled_with_random_numbers(sr, project):
    from safetensors.torch import load_file, save_file

    path = project / "run" / "checkpoint-10" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the checkpoint lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        sr.main(command(project, "--no-untrained"))


def test_another_models_tokenizer_is_refused(sr, project):
    save_tiny("llama", project / "small", vocab_size=100)
    args = command(project, "--no-untrained")
    args[1:3] = [str(project / "small")]
    with pytest.raises(InputError, match="beyond its 100 embeddings"):
        sr.main(args)
