"""Chat templates: prompts begin training rows, the end of a turn is learned, no start token comes twice."""

from __future__ import annotations

from datetime import datetime

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import CLEAN, PUBLISHED, Record, choose, encode, encode_prompt, recorded, template_json
from inlay.tasks.chat_template import ChatTemplate, own_template
from inlay.tasks.template_choice import check, read_template
from inlay.tasks.templates import ALPACA, NONE, PUBLISHED_EVAL
from tests.tasks.chats import BRACKETS, CHATML, DATED, DEAF, KINDS, REASONS, STRIPS, THINKS, chatty

RECORDS = [
    Record("What is 2 + 3?", "", "2 + 3 = 5", "5"),
    Record("Add.", "2 and 3", " The answer is 5 \n", "5"),
    Record("Say <b>{{ nothing }}</b>\n\nnow", "", "{% raw %} nothing {instruction}", ""),
]
TEXTS = {"alpaca": ALPACA, "none": NONE, "published": PUBLISHED_EVAL}


@pytest.mark.parametrize("start", [False, True], ids=["bare", "start token"])
@pytest.mark.parametrize("kind", [*KINDS, *TEXTS])
def test_evaluation_prompts_begin_training_rows(kind, start):
    tok = chatty(KINDS.get(kind), start)
    template = TEXTS.get(kind) or choose(None, tok)
    for record in RECORDS:
        row = encode(record, tok, CLEAN, 500, template)
        prompt = encode_prompt(record, tok, CLEAN, None, template).input_ids
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels == [-100] * len(prompt) + row.input_ids[len(prompt) :]
        end = template.end_of_turn(tok)
        assert row.input_ids[-1] == (tok.eos_token_id if end is None else end[1])
        assert record.output.strip() in tok.decode(row.input_ids[len(prompt) :])
        assert row.input_ids.count(tok.bos_token_id) <= 1
        assert template.option_ids("x", tok)[:-1] == template.option_ids("y", tok)[:-1]


@pytest.mark.parametrize("start", [False, True], ids=["bare", "start token"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("open", "dated")])
def test_rows_are_the_tokens_of_the_whole_conversation(kind, start):
    tok = chatty(KINDS[kind], start)
    for record in RECORDS:
        user = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": record.output}]
        whole = tok.apply_chat_template(turns, tokenize=True, return_dict=False)
        row = encode(record, tok, CLEAN, 500, choose(None, tok)).input_ids
        assert row == whole[: len(row)]
        assert tok.decode(whole[len(row) :]).strip() == ""


def test_what_is_learned_is_the_answer_and_the_end_of_its_turn():
    def learned(template, **record):
        tok = chatty(template)
        row = encode(Record("Q", **record), tok, CLEAN, 500, choose(None, tok))
        return tok.decode([i for i in row.labels if i != -100])

    assert learned(CHATML, output=" A ") == " A <|im_end|>"
    assert learned(STRIPS, output=" A ") == "A<|im_end|>"
    assert learned(BRACKETS, output="A") == " A </s>"
    assert learned(THINKS, output="A") == "<think>\n\n</think>\n\nA<|im_end|>"


def test_options_stand_where_answers_are_learned():
    for template, before in ((CHATML, ""), (BRACKETS, " "), (THINKS, "<think>\n\n</think>\n\n")):
        tok = chatty(template)
        assert tok.decode(choose(None, tok).option_ids("answer1", tok)) == before + "answer1"


def test_records_have_one_date_and_conversations_the_real_one():
    tok = chatty(DATED)
    template = choose(None, tok)
    assert tok.decode(template.prompt_ids(RECORDS[0], tok)).startswith("26 Jul 2024<|im_start|>")
    spoken = tok.decode(template.conversation_ids([{"role": "user", "content": "Hi"}], tok))
    assert spoken.startswith(datetime.now().strftime("%d %b %Y"))


def test_a_template_that_asks_otherwise_than_it_teaches_is_refused_for_training_only():
    tok = chatty(REASONS)
    template = choose(None, tok)
    assert tok.decode(encode_prompt(RECORDS[0], tok, CLEAN, None, template).input_ids).endswith("<think>\n")
    with pytest.raises(InlayError, match="cannot be trained on.*prompts of evaluation would differ"):
        encode(RECORDS[0], tok, CLEAN, 500, template)
    with pytest.raises(InlayError, match="cannot be trained on"):
        template.option_ids("answer1", tok)
    assert template.end_of_turn(tok) is None


def test_a_template_that_leaves_out_the_question_is_refused():
    tok = chatty(DEAF)
    with pytest.raises(InlayError, match="leaves out what the user says"):
        encode(RECORDS[0], tok, CLEAN, 500, choose(None, tok))


def test_what_a_template_refuses_is_one_sentence():
    tok = chatty(BRACKETS)
    template = choose(None, tok)
    for roles in (("system", "user"), ("user", "user")):
        with pytest.raises(InlayError, match=f"refuses a conversation of {', '.join(roles)}: roles must alternate"):
            template.conversation_ids([{"role": r, "content": "x"} for r in roles], tok)


def test_the_default_is_the_tokenizers_own_and_alpaca_without_one():
    assert choose(None, chatty(CHATML)) == ChatTemplate("chat", CHATML) == choose("chat", chatty(CHATML))
    assert choose(None, chatty(None)) is ALPACA and own_template(chatty(None)) is None
    assert choose("alpaca", chatty(CHATML)) is ALPACA and choose("none", chatty(CHATML)) is NONE
    with pytest.raises(InlayError, match="has no chat template"):
        choose("chat", chatty(None))


def test_several_chat_templates_need_a_default_one():
    tok = chatty(None)
    tok.chat_template = {"default": CHATML, "tool_use": STRIPS}
    assert choose("chat", tok).source == CHATML
    tok.chat_template = {"rag": CHATML, "tool_use": STRIPS}
    with pytest.raises(InlayError, match="no default one"):
        choose(None, tok)


def test_published_prompts_stay_published():
    tok = chatty(CHATML)
    for record in RECORDS[:2]:
        assert tok.decode(encode_prompt(record, tok, PUBLISHED).input_ids) == PUBLISHED_EVAL.prompt(record)
    for asked in ("chat", ALPACA, choose(None, tok)):
        with pytest.raises(InlayError, match="protocol 'published' fixes its templates"):
            PUBLISHED.template(asked, tok)
        with pytest.raises(InlayError, match="fixes its templates"):
            encode(RECORDS[0], tok, PUBLISHED, 500, asked)
    assert PUBLISHED.template(None, tok) is None


def test_text_files(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Ask: {instruction}\n\nWith: {input}\n\nSay:")
    mine = read_template(file)
    assert mine.prompt(Record("Q", "I")) == "Ask: Q\n\nWith: I\n\nSay:" and mine.prompt(Record("Q")) == "Ask: Q\n\nSay:"
    file.write_text("{instruction} =>\n")
    assert read_template(file).prompt(Record("Q", "I")) == "Q\n\nI =>\n"
    file.write_text("Q: {instruction} ({input}) A:")
    assert read_template(file).prompt(Record("Q")) == "Q: Q () A:"
    file.write_text('{"ask": "{instruction}", "say": "')
    assert read_template(file).prompt(Record("Q")) == '{"ask": "Q", "say": "'


def test_jinja_files(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(STRIPS)
    tok = chatty(None)
    own, given = chatty(STRIPS), choose(str(file), tok)
    for record in RECORDS:
        assert encode(record, tok, CLEAN, 500, given) == encode(record, own, CLEAN, 500, choose(None, own))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no template"),
        ("no field", "is no template"),
        ("{{ instruction }}", "is no template"),
        ("{instruction} {instruction}", "is no template"),
        ("{input} {instruction}", "must stand behind"),
        ("{% for m in messages %}", "is no Jinja template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{instruction}", "is no template"),
        (b"\xff\xfe{instruction}", "cannot be read"),
    ],
)
def test_files_that_are_no_template(text, says, tmp_path):
    file = tmp_path / "t"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InlayError, match=says):
        check(str(file))


def test_names_that_are_no_template(tmp_path):
    with pytest.raises(InlayError, match="there is no template 'llama3': choose chat, alpaca, none, published, or"):
        check("llama3")
    with pytest.raises(InlayError, match="there is no template"):
        check(str(tmp_path))
    for fine in (None, "chat", "alpaca", "none", "published", "clean", "plain", "auto"):
        check(fine)


def test_records_of_templates_are_read_back(tmp_path):
    (tmp_path / "x.txt").write_text("Q: {instruction}\nA:")
    mine = read_template(tmp_path / "x.txt")
    for template in (ALPACA, NONE, PUBLISHED_EVAL, mine, ChatTemplate("chat", CHATML)):
        assert recorded(template_json(template)) == template
    assert recorded(None) is None and template_json(ALPACA) == {"name": "alpaca"}
    assert recorded("none") is NONE and recorded("clean") is ALPACA  # by hand
    for strange in ({"name": "next year's"}, {}, {"name": 3}, {"name": "x", "bare": "{instruction}"}, 3, ["alpaca"]):
        with pytest.raises(InlayError, match="which this Inlay does not know"):
            recorded(strange)


def test_a_start_token_in_a_text_is_not_doubled(tmp_path):
    (tmp_path / "x.txt").write_text("<s>Q: {instruction}\nA:")
    tok = chatty(None, start=True)
    ids = read_template(tmp_path / "x.txt").prompt_ids(Record("hi"), tok)
    assert ids.count(tok.bos_token_id) == 1 and tok.decode(ids) == "<s>Q: hi\nA:"


def test_a_long_prompt_loses_its_middle_and_keeps_the_place_of_the_answer():
    tok = chatty(CHATML)
    template = choose(None, tok)
    row = encode(Record("x" * 400, "", "yes"), tok, CLEAN, 100, template)
    assert row.truncated and len(row.input_ids) == 100
    assert tok.decode(row.input_ids).endswith("x<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
