"""The harness sees the same model through `inlay` as through its own `hf`: merged, attached, or read from folders."""

import copy
import json

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from tests.evaluate.tiny import base, tokenizer

harness = pytest.importorskip("lm_eval")
hf = pytest.importorskip("lm_eval.models.huggingface")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

ROWS = [
    {"question": "Two plus two is", "choices": ["3", "four", "22", "five"], "label": 1, "text": "The lake is cold."},
    {"question": "Snow is", "choices": ["white", "black and blue", "no"], "label": 0, "text": "a b c " * 30},
    {"question": "A much longer question than the others, it is?", "choices": ["yes", "no"], "label": 1, "text": "x"},
]


@pytest.fixture(autouse=True)
def _no_listing_of_packages(monkeypatch):
    """The harness writes down its surroundings (`pip list` and the like), which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def worn():
    host = inlay.attach(base("llama", positions=128))
    host.add("a", inlay.method("lora").make(rank=4), at="q,v,down", seed=0)
    host.add("p", inlay.method("prefix").make(tokens=3), seed=0)
    torch.manual_seed(1)
    for p in host.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return host


@pytest.fixture(scope="module")
def bare(worn):
    return base("llama", positions=128)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write = {
        "task": "tiny_write",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["~~"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "task": "tiny_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    return [{**common, **t} for t in (choice, write, rolling)]


def manager(include_path=None, **_):
    """Without the thousands of tasks that come with the harness: listing them takes longer than all of these tests."""
    return TaskManager(include_path=include_path, include_defaults=False)


def told(model, tasks):
    """(loglikelihoods, texts): every response of the model to every request, in order."""
    loaded = manager().load([copy.deepcopy(t) for t in tasks])
    found = harness.evaluate(model, loaded, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    numbers, texts = [], []
    for name in ("tiny_choice", "tiny_write", "tiny_rolling"):
        for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"]):
            for (answer,) in sample["resps"]:
                if isinstance(answer, str):
                    texts.append(answer)
                else:
                    numbers.append(answer[0] if isinstance(answer, tuple) else answer)
    assert len(numbers) == 9 + 3 and len(texts) == 3
    return numbers, texts


def same(one, two):
    return one[0] == pytest.approx(two[0], abs=1e-4) and one[1] == two[1]


def test_equals_the_harness_own_model(worn, bare, tok, tasks):
    from inlay.evaluate.lm_eval import InlayLM

    merged_host = inlay.attach(base("llama", positions=128))
    merged_host.add("a", worn.edits["a"], at="q,v,down").fill("a", worn.tensors("a"))
    inlay.merge(merged_host, "a")
    plain = told(hf.HFLM(pretrained=bare, tokenizer=tok, batch_size=2), tasks)
    merged = told(hf.HFLM(pretrained=merged_host.detach(), tokenizer=tok, batch_size=2), tasks)
    assert not same(plain, merged) and plain[1] != merged[1]
    worn.use("p")
    assert same(told(InlayLM(worn, tok, batch_size=2), tasks), plain)
    assert same(told(InlayLM(worn, tok, adapter="a", batch_size=3), tasks), merged)
    assert worn.plan == (("p",),)
    worn.use(None)
    assert same(told(hf.HFLM(pretrained=worn.model, tokenizer=tok, batch_size=2), tasks), plain)
    worn.use("a")
    assert same(told(hf.HFLM(pretrained=worn.model, tokenizer=tok, batch_size=1), tasks), merged)
    worn.use(None)


@pytest.mark.parametrize("size", [1, 16])
def test_the_engines_do_all_the_work(worn, bare, tok, tasks, size, monkeypatch):
    from inlay.evaluate.lm_eval import InlayLM

    want = told(hf.HFLM(pretrained=bare, tokenizer=tok, batch_size=size), tasks)
    model = InlayLM(worn, tok, batch_size=size)
    for name in ("_model_call", "_model_generate"):
        monkeypatch.setattr(model, name, None)
    assert same(told(model, tasks), want)


def test_auto_searches_for_no_batch_size_that_is_not_used(worn, bare, tok, tasks, monkeypatch):
    from inlay.evaluate.lm_eval import InlayLM

    want = told(hf.HFLM(pretrained=bare, tokenizer=tok, batch_size=2), tasks)
    model = InlayLM(worn, tok, batch_size="auto")
    with monkeypatch.context() as m:
        m.setattr(model, "_detect_batch_size", None)
        assert same(told(model, tasks), want)
    assert model.batch_size == "auto"
    monkeypatch.setattr("inlay.evaluate.tree.serves", lambda *_: False)
    searched = []
    monkeypatch.setattr(model, "_detect_batch_size", lambda *_: searched.append(1) or 2)
    assert same(told(model, tasks), want) and searched


def requests(kind, *args):
    return [harness.api.instance.Instance(kind, {}, a, i) for i, a in enumerate(args)]


def test_long_and_odd_requests_as_the_harness(worn, bare, tok):
    from inlay.evaluate.lm_eval import InlayLM

    ours, theirs = InlayLM(worn, tok, batch_size=4), hf.HFLM(pretrained=bare, tokenizer=tok, batch_size=4)
    pairs = [("x" * 140, "yes"), ("x" * 140, "no"), ("", "abc"), ("q ", "a" * 120), ("q ", "a" * 121), ("same", " a")]
    got, want = (m.loglikelihood(requests("loglikelihood", *pairs)) for m in (ours, theirs))
    assert [g for _, g in got] == [g for _, g in want]
    assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=2e-4)
    free = theirs.generate_until(requests("generate_until", ("ab", {"until": ["~~"], "max_gen_toks": 9})))[0]
    asked = [
        ("x" * 140, {"until": ["~~"], "max_gen_toks": 12}),
        ("ab", {"until": free[3:5], "max_gen_toks": 9}),
        ("ab", {"until": ["~~"], "max_gen_toks": 9, "num_beams": 2}),
        ("cd", {"until": ["~~"], "max_gen_toks": 9, "do_sample": False, "repetition_penalty": 5.0}),
    ]
    got, want = (m.generate_until(requests("generate_until", *asked)) for m in (ours, theirs))
    assert got == want and got[1] == free.split(free[3:5])[0]


def test_penalties_of_a_base_are_the_harness_business(worn, tok):
    from inlay.evaluate.lm_eval import InlayLM

    model, own = InlayLM(worn, tok), worn.model.generation_config
    asked = {"until": ["x"], "max_gen_toks": 9}
    assert model._settings(asked).stop == ("x", "</s>")
    for more in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 4}):
        assert model._settings({**asked, **more}) is None
    own.repetition_penalty = 1.3
    assert model._settings(asked) is None
    own.repetition_penalty = None


def test_stop_texts_with_special_tokens(worn, tok):
    """A special token ends a slot; one besides other text is the harness's business, as our texts come without it."""
    from inlay.evaluate.lm_eval import InlayLM

    more = copy.deepcopy(tok)
    more.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model = InlayLM(worn, more)
    assert model._settings({"until": ["x", "</s>"], "max_gen_toks": 9}) is not None
    assert model._settings({"until": ["x", "<|turn|>"], "max_gen_toks": 9}).stop == ("x", "<|turn|>", "</s>")
    assert model._settings({"until": ["x", "a<|turn|>"], "max_gen_toks": 9}) is None


def test_a_special_token_ends_as_the_harness_ends_it(tok):
    from inlay.evaluate.lm_eval import InlayLM

    more, model = copy.deepcopy(tok), base("llama", positions=128, vocabulary=260)
    more.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    asked = requests("generate_until", *((p, {"until": ["<|turn|>"], "max_gen_toks": 20}) for p in ("ab", "Snow is")))
    theirs = hf.HFLM(pretrained=model, tokenizer=more, batch_size=1)
    free = theirs.generate_until(asked)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[259] = head[tok(free[0][4])["input_ids"][0]] * 1.01
    want = theirs.generate_until(asked)
    assert want[0] == free[0].split(free[0][4])[0]
    ours = InlayLM(inlay.attach(model), more, batch_size=8)
    ours._model_generate = None
    assert ours.generate_until(asked) == want


def test_virtual_tokens_in_the_harness(worn, tok, tasks):
    from inlay.evaluate import GenerateSettings, generate, option_scores
    from inlay.evaluate.lm_eval import InlayLM

    model = InlayLM(worn, tok, adapter="p+a", batch_size=4)
    assert model.max_length == 128 - 3
    numbers, texts = told(model, tasks)
    questions = [r["question"] for r in ROWS]
    ours = generate(worn, tok, questions, "p+a", GenerateSettings(max_new_tokens=10, stop=("~~",)))
    assert texts == [g.text for g in ours]
    scores = option_scores(worn, tok, questions, [[" " + c for c in r["choices"]] for r in ROWS], "p+a")
    assert numbers[:9] == pytest.approx(sum(scores, []), abs=1e-4)
    info = model.get_model_info()
    assert info["inlay_adapter"] == "p+a" and info["inlay_edits"]["p"]["method"] == "prefix"


def test_by_name_and_from_folders(worn, tok, tasks, tmp_path):
    from inlay.evaluate.lm_eval import InlayLM

    base("llama", positions=128).save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    inlay.save(worn, "a", tmp_path / "a")
    found = harness.simple_evaluate(
        model="inlay",
        model_args=f"pretrained={tmp_path / 'base'},adapter={tmp_path / 'a'},dtype=float32",
        tasks=[copy.deepcopy(tasks[0])],
        bootstrap_iters=0,
        batch_size=2,
        device="cpu",
        task_manager=manager(),
    )
    expected = told(InlayLM(worn, tok, adapter="a"), tasks)[0][:9]
    rows = sorted(found["samples"]["tiny_choice"], key=lambda s: s["doc_id"])
    assert [r[0][0] for s in rows for r in s["resps"]] == pytest.approx(expected, abs=1e-4)


def test_the_command_line_knows_inlay(worn, tok, tasks, tmp_path, monkeypatch, capsys):
    import yaml

    from inlay.evaluate.lm_eval import main

    base("llama", positions=128).save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    inlay.save(worn, "a", tmp_path / "a")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(tasks[0]))
    args = [
        "lm_eval",
        "--model",
        "inlay",
        "--model_args",
        f"pretrained={tmp_path / 'base'},adapter={tmp_path / 'a'}",
        "--tasks",
        "tiny_choice",
        "--include_path",
        str(tmp_path / "tasks"),
        "--batch_size",
        "2",
    ]
    monkeypatch.setattr("sys.argv", list(args))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    main()
    assert "tiny_choice" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [a.replace(f"adapter={tmp_path / 'a'}", "adapter=nowhere") for a in args])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("/nowhere is not a folder; an adapter is a folder with its config and its tensors")
    )


def test_what_is_wrong_is_told(worn, tok):
    from inlay.evaluate.lm_eval import InlayLM

    with pytest.raises(InlayError, match="either a host"):
        InlayLM()
    with pytest.raises(InlayError, match="needs its tokenizer"):
        InlayLM(worn)
    with pytest.raises(InlayError, match="unknown adapter 'nobody'"):
        InlayLM(worn, tok, adapter="nobody")
    with pytest.raises(InlayError, match="has its type already"):
        InlayLM(worn, tok, dtype="bfloat16")


# ---- options of the harness's own model ------------------------------------------------------------------------------
@pytest.mark.parametrize("add", [True, False])
def test_add_bos_token_encodes_as_the_harness_own_model_does(add):
    from inlay.evaluate.lm_eval import InlayLM
    from inlay.models import embedded

    base = str(embedded.path("llama"))
    options = {"pretrained": base, "dtype": "float32", "device": "cpu", "add_bos_token": add}
    assert InlayLM(**options).tok_encode("Tom has 3") == hf.HFLM(**options).tok_encode("Tom has 3")


@pytest.mark.parametrize("name", ["revision", "peft", "delta", "parallelize", "gguf_file", "trust_remote_code"])
def test_options_of_loading_are_refused_and_not_dropped(name):
    from inlay.evaluate.lm_eval import InlayLM

    value = True if name in ("parallelize", "trust_remote_code") else "x"
    with pytest.raises(InlayError, match=f"{name}=.* says how the harness loads a base, but Inlay loads it"):
        InlayLM(pretrained="tiny-llama", device="cpu", **{name: value})
