"""The verbs, run on a tiny random base."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

import inlay


def test_inspect_a_model(base_folder, inlay_):
    code, out, _ = inlay_("inspect", base_folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["family"] == "llama" and found["roles"]["down"]["in"] == 48
    code, out, _ = inlay_("inspect", "bloom-560m")
    assert code == 0 and "qkv" in out and "placements" in out


def test_inspect_an_adapter(adapters, inlay_):
    code, out, _ = inlay_("inspect", adapters["lora"], "--json")
    found = json.loads(out)
    assert code == 0 and found["method"] == "lora" and found["settings"]["rank"] == 4
    assert found["parameters"] == sum(torch.Size(s).numel() for s in found["tensors"].values())
    assert "3.q" not in inlay_("inspect", adapters["lora"])[1]


def test_inspect_sees_damage(adapters, tmp_path, inlay_):
    import shutil

    folder = shutil.copytree(adapters["lora"], tmp_path / "hurt")
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, err = inlay_("inspect", folder)
    assert code == 2 and "damaged" in err


def logits(model_folder, adapter=None) -> torch.Tensor:
    model, _ = inlay.load_base(model_folder, device="cpu")
    ids = torch.arange(3, 15)[None]
    host = inlay.attach(model)
    if adapter is not None:
        from inlay.interop import formats

        host.use(formats.read(host, adapter))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_convert_there_and_back(base_folder, adapters, tmp_path, inlay_):
    want = logits(base_folder, adapters["lora"])
    assert inlay_("convert", adapters["lora"], tmp_path / "peft", "--model", base_folder, "--to", "peft")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    assert inlay_("convert", tmp_path / "peft", tmp_path / "back", "--model", base_folder)[0] == 0
    for folder in ("peft", "back"):
        assert torch.allclose(logits(base_folder, tmp_path / folder), want, atol=1e-5)
    code, out, _ = inlay_("inspect", tmp_path / "peft", "--json")
    assert code == 0 and json.loads(out)["format"] == "peft"
    code, _, err = inlay_("convert", adapters["lora"], tmp_path / "peft", "--model", base_folder)
    assert code == 2 and "exists" in err


def test_convert_for_vllm_reports_rank(base_folder, adapters, tmp_path, inlay_):
    code, out, _ = inlay_("convert", adapters["lora"], tmp_path / "v", "--model", base_folder, "--to", "vllm")
    assert code == 0 and "rank 4" in out
    code, _, err = inlay_("convert", adapters["lora"], tmp_path / "w", "--model", base_folder, "--rank", 2)
    assert code == 2 and "--to vllm" in err


def test_compose_makes_one_adapter_of_several(base_folder, adapters, tmp_path, inlay_):
    name = adapters["lora"].name
    code, out, _ = inlay_(
        "compose", f"average({name}, {name})", "--adapters", adapters["lora"], "--out", tmp_path / "c"
    )
    assert code == 0 and "numbers at" in out
    assert torch.allclose(logits(base_folder, tmp_path / "c"), logits(base_folder, adapters["lora"]), atol=1e-5)
    code, _, err = inlay_("compose", "sum(nobody)", "--adapters", adapters["lora"], "--out", tmp_path / "d")
    assert code == 2 and "unknown adapter 'nobody'" in err and not (tmp_path / "d").exists()


def test_merge_makes_an_ordinary_model(base_folder, adapters, tmp_path, inlay_):
    code, out, _ = inlay_("merge", adapters["lora"], "--out", tmp_path / "merged")
    assert code == 0 and "logits within" in out
    assert torch.allclose(logits(tmp_path / "merged"), logits(base_folder, adapters["lora"]), atol=1e-4)
    assert not torch.allclose(logits(tmp_path / "merged"), logits(base_folder), atol=1e-2)


@pytest.mark.parametrize("name,said", [("series", "not linear"), ("prefix", "virtual tokens")])
def test_merge_refuses(name, said, adapters, tmp_path, inlay_):
    code, _, err = inlay_("merge", adapters[name], "--out", tmp_path / "merged")
    assert code == 2 and said in err and not (tmp_path / "merged").exists()


def test_chat_answers_a_prompt(base_folder, adapters, inlay_):
    few = ("--max-new-tokens", 8, "--template", "plain", "--prompt", "The bird said")
    _, bare, _ = inlay_("chat", base_folder, *few)
    _, lora, _ = inlay_("chat", base_folder, "--adapters", adapters["lora"], *few)
    assert bare.strip() and lora.strip() and bare != lora
    _, again, _ = inlay_("chat", base_folder, "--adapters", adapters["lora"], "--use", "bare", *few)
    assert again == bare


def test_chat_side_by_side(base_folder, adapters, inlay_):
    code, out, _ = inlay_(
        "chat",
        base_folder,
        "--adapters",
        *adapters.values(),
        "--prompt",
        "Hello",
        "--side-by-side",
        "--max-new-tokens",
        6,
    )
    assert code == 0 and all(name in out for name in ("bare", *adapters))


def test_a_conversation(base_folder, adapters, inlay_, monkeypatch, capsys):
    lines = iter(
        [
            "/adapters",
            "/use series",
            "hi",
            "/use lora+series",
            "/all hi",
            "/use nobody",
            "/fly",
            f"/load {adapters['prefix']}",
            "/quit",
        ]
    )
    monkeypatch.setattr("rich.console.Console.input", lambda *a, **k: next(lines))
    code, out, _ = inlay_(
        "chat", base_folder, "--adapters", adapters["lora"], adapters["series"], "--max-new-tokens", 4
    )
    assert code == 0
    for said in (
        "lora: lora",
        "bare: the base alone",
        "unknown adapter 'nobody'",
        "/fly is no command",
        "hung as prefix",
    ):
        assert said in out, out


def test_chat_mistakes(base_folder, tmp_path, inlay_):
    assert "no adapter folder" in inlay_("chat", base_folder, "--adapters", tmp_path / "no", "--prompt", "x")[2]
    assert "unknown adapter 'x'" in inlay_("chat", base_folder, "--use", "x", "--prompt", "x")[2]
    assert "--prompt" in inlay_("chat", base_folder, "--side-by-side")[2]


def said_file(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    return path


ROWS = [{"text": "so it is 7", "label": "7"}, {"text": "it is 8", "label": "9"}, {"text": "no idea", "label": "1"}]


@pytest.mark.parametrize("name", ["said.jsonl", "said.jsonl.gz"])
def test_score(name, tmp_path, inlay_):
    file = said_file(tmp_path / name, ROWS)
    code, out, _ = inlay_("score", "--task", "gsm8k", "--protocol", "published", "--generations", file)
    found = json.loads(out)
    assert code == 0 and (found["n"], found["correct"], found["no_answer"]) == (3, 1, 1)
    assert found["accuracy"] == pytest.approx(100 / 3)
    assert "33.3" in inlay_("score", "--task", "GSM8K", "--protocol", "published", "--generations", file, "--table")[1]


def test_score_of_several_runs_gives_all_and_each(tmp_path, inlay_):
    rows = [r | {"adapter": a} for a in ("x", "y") for r in ROWS]
    found = json.loads(inlay_("score", "--task", "svamp", "--generations", said_file(tmp_path / "a.jsonl", rows))[1])
    assert found["n"] == 6 and [r["group"]["adapter"] for r in found["runs"]] == ["x", "y"]
    assert sum(r["correct"] for r in found["runs"]) == found["correct"]


@pytest.mark.parametrize("text", ["not json\n", '{"said": "x"}\n', ""])
def test_score_refuses_what_is_no_generation(text, tmp_path, inlay_):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    code, out, err = inlay_("score", "--task", "svamp", "--generations", file)
    assert code == 2 and out == "" and "bad.jsonl" in " ".join(err.split()) and "Traceback" not in err


def test_train_then_evaluate(base_folder, records, tmp_path, inlay_):
    run = tmp_path / "run"
    argv = ("--model", base_folder, "--method", "lora", "--rank", 2, "--train-file", records, "--protocol", "clean")
    argv += ("--steps", 3, "--batch-size", 4, "--lr", "1e-2", "--loggers", "none", "--no-progress", "--device", "cpu")
    code, out, err = inlay_("train", *argv, "--out", run)
    assert code == 0 and str(run / "adapter") in out, err
    assert json.loads(inlay_("inspect", run / "adapter", "--json")[1])["settings"]["rank"] == 2
    code, _, err = inlay_("train", *argv, "--out", run)
    assert code == 2, "a run that is there is not replaced silently"
    argv = ("--model", base_folder, "--adapters", run / "adapter", "--bare", "--tasks", "world-arith", "--limit", 2)
    code, out, err = inlay_("eval", *argv, "--max-new-tokens", 4, "--out", tmp_path / "eval", "--device", "cpu")
    assert code == 0 and (tmp_path / "eval" / "report.json").is_file(), err


def test_a_recipe_trains(base_folder, records, tmp_path, inlay_):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {base_folder}\nmethod: series\nsettings: {{size: 4}}\n"
        f"data: {{train_file: {records}, protocol: clean}}\n"
        f"optim: {{steps: 2, batch_size: 2, micro_batch: 2}}\nrun: {{loggers: [none], progress: false, device: cpu}}\n"
    )
    assert inlay_("train", "--recipe", recipe, "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()


def test_demo_on_a_random_base(base_folder, tmp_path, inlay_, capsys):
    argv = ("--model", base_folder, "--steps", 2, "--questions", 3, "--out", tmp_path / "demo", "--no-progress")
    code, out, err = inlay_("demo", *argv)
    assert code == 0, err
    for name in ("lora", "series", "parallel", "prefix"):
        assert name in out and (tmp_path / "demo" / name / "adapter" / "adapter.json").is_file()
    assert "bare base" in out and "of 3" in out and "One question, one batch" in out
