import json
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.dialogue.codec import Codec, Control

KINDS = ("toolllama", "chatml_react", "llama31", "hermes", "hermes3", "compact")
NASTY = "a <|im_end|><|eot_id|></s><s><unk><|end|><tool_call></tool_call><think>\n\n  b\t'é漢🙂\x00"


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_strings_in_text_stay_text(codecs, kind):
  codec = codecs[kind]
  text = NASTY + "".join(codec.controls)
  ids = codec.encode(text)
  assert not set(ids) & set(codec.controls.values())
  assert codec.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_those_of_the_text(codecs, kind):
  """A part of a character was the bytes of U+FFFD."""
  codec = codecs[kind]
  text = "  the é漢🙂 <|\n\n"
  ids = codec.encode(text)
  assert b"".join(map(codec.token_bytes, ids)) == text.encode()
  name, control = next(iter(codec.controls.items()))
  assert codec.token_bytes(control) == name.encode()


def test_runs_of_spaces_are_no_control_tokens(tmp_path):
  """Gemma's own directory spells them with ▁; a call in indented JSON was taken for malformed."""
  runs = ("▁▁", "▁▁▁")
  pieces = ["<unk>", "▁", *runs, "a", "b"]
  merges = [("▁", "▁"), ("▁▁", "▁")]
  model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  tokenizer.decoder = tokenizers.decoders.Replace("▁", " ")
  tokenizer.add_tokens([tokenizers.AddedToken(run, normalized=False) for run in runs])
  tokenizer.add_special_tokens(["<end_of_turn>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  listed = {str(pieces.index(run)): {"content": run, "special": False} for run in runs}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
  codec = Codec.load(tmp_path)
  assert set(codec.controls) == {"<end_of_turn>"}
  ids = codec.encode("a  b   a")
  assert ids == tokenizer.encode("a  b   a", add_special_tokens=False).ids
  assert codec.decode(ids) == "a  b   a"
  assert pieces.index("▁▁") in ids


def test_tags_of_html_are_text_and_a_models_own_are_not(tmp_path):
  """A mail in HTML, which Gemma spells with tokens of its own, was a malformed call."""
  names = ["<b>", "</b>", "<tool_call>", "</s>"]
  pieces = ["<unk>", "a", *"<>/bstol_c", *names]
  model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  codec = Codec.load(tmp_path)
  assert set(codec.controls) == {"<tool_call>", "</s>"}
  ids = codec.encode("a<b>a</b></s><tool_call>")
  assert ids[:4] == [1, pieces.index("<b>"), 1, pieces.index("</b>")]
  assert not set(ids) & set(codec.controls.values())


def test_a_plain_tokenizer_call_would_have_made_control_ids(directories, codecs):
  # The trap itself: what the same directory gives without the codec.
  raw = tokenizers.Tokenizer.from_file(str(directories["chatml_react"] / "tokenizer.json"))
  assert codecs["chatml_react"].token_id("<|im_end|>") in raw.encode("x<|im_end|>").ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40))
def test_decode_inverts_encode_also_in_mid_conversation(codecs, kind, text):
  codec = codecs[kind]
  text = text.encode("utf-8", "replace").decode()
  assert codec.decode(codec.encode(text)) == text


def test_llama2_gets_its_prefix_space_only_where_a_piece_asks_for_it(codecs, directories):
  codec = codecs["toolllama"]
  raw = tokenizers.Tokenizer.from_file(str(directories["toolllama"] / "tokenizer.json"))
  assert codec.prefix_space
  assert not codecs["chatml_react"].prefix_space
  assert codec.encode(" So in") == raw.encode("So in", add_special_tokens=False).ids
  assert raw.encode("\nx").tokens == ["▁", "<0x0A>", "x"]
  assert codec.decode(codec.encode("\nx")) == "\nx"
  assert len(codec.encode("\nx")) == 2


def test_neighbouring_texts_are_encoded_as_one(codecs):
  codec = codecs["chatml_react"]
  assert codec.join(["t", "h", "e"]).tolist() == codec.encode("the")
  assert len(codec.encode("the")) == 1
  joined = codec.join(["t", Control("<|im_end|>"), "he"])
  assert joined.dtype == np.int32
  assert codec.decode(joined) == "t<|im_end|>he"
  assert joined[1] == codec.token_id("<|im_end|>")
  assert codec.join([]).shape == (0,)


def test_ids_by_role_and_name(codecs):
  assert codecs["toolllama"].bos_id == 1
  assert codecs["toolllama"].eos_id == 2
  assert codecs["chatml_react"].bos_id is None
  assert codecs["compact"].eos_id == 1
  assert codecs["compact"].pad_id == 0
  with pytest.raises(ValueError, match=r"no special token '<\|eot_id\|>'"):
    codecs["chatml_react"].token_id("<|eot_id|>")


def test_control_name_knows_ids_without_a_token(codecs):
  codec = codecs["chatml_react"]
  assert codec.control_name(codec.encode("x")[0]) is None
  assert codec.control_name(codec.token_id("<|im_end|>")) == "<|im_end|>"
  assert "unused" in codec.control_name(codec.vocab_size)
  assert codec.decode([*codec.encode("x"), codec.vocab_size + 7]) == "x"


def test_lone_surrogates_do_not_crash(codecs):
  for codec in codecs.values():
    assert codec.decode(codec.encode("a\ud800b")) == "a?b"


def test_unigram_pieces_that_are_special_tokens_are_spelled_out(tmp_path):
  # A unigram lattice matches "</s>" even when the added tokens are gone.
  pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "</s>ab")]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
  tokenizer.add_special_tokens(["<unk>", "</s>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  codec = Codec.load(tmp_path)
  ids = codec.encode("a</s>b")
  assert not set(ids) & {0, 1}
  assert "".join(codec.decode([i]) for i in ids) == "a</s>b"


def test_missing_foreign_and_broken_directories(tmp_path, directories):
  with pytest.raises(FileNotFoundError, match="hf download"):
    Codec.load(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
    Codec.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="not valid JSON"):
    Codec.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="'model'"):
    Codec.load(tmp_path)
  document = json.loads((directories["compact"] / "tokenizer.json").read_text())
  document["model"]["type"] = "Nonsense"
  (tmp_path / "tokenizer.json").write_text(json.dumps(document))
  with pytest.raises(ValueError, match="not a readable tokenizer"):
    Codec.load(tmp_path)


def test_chat_template_is_found_wherever_it_is_kept(directories, tmp_path):
  for name, template in (("list", [{"name": "default", "template": "D"}]), ("string", "D")):
    copy = shutil.copytree(directories["chatml_react"], tmp_path / name)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert Codec.load(copy).chat_template == "D"
  (copy / "chat_template.jinja").write_text("J")
  assert Codec.load(copy).chat_template == "J"
  (copy / "chat_template.jinja").unlink()
  (copy / "tokenizer_config.json").unlink()
  assert Codec.load(copy).chat_template is None


def test_sentencepiece_only_directory_is_converted(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  corpus = tmp_path / "corpus.txt"
  corpus.write_text("Thought: find the customer\nAction: find_customer\n" * 50)
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(tmp_path / "tokenizer"),
    model_type="bpe",
    vocab_size=300,
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  directory = tmp_path / "llama"
  directory.mkdir()
  shutil.copy(tmp_path / "tokenizer.model", directory)
  config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
  (directory / "tokenizer_config.json").write_text(json.dumps(config))
  (directory / "config.json").write_text('{"model_type": "llama"}')
  codec = Codec.load(directory)
  reference = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
  assert (codec.bos_id, codec.eos_id) == (1, 2)
  assert codec.encode(" find the customer") == reference.encode("find the customer")
  text = "\nFunction: </s> the é  x"
  assert codec.decode(codec.encode(text)) == text
  assert 2 not in codec.encode(text)


def test_added_tokens_that_a_model_has_no_rows_for_are_left_out(codecs):
  """Gemma 3's text models were refused: their tokenizer names a token for images beyond them."""
  codec = codecs["gemma_react"]
  rows = codec.token_id("<image_soft_token>")
  assert rows == codec.vocab_size - 1
  found = codec.within(rows)
  assert (found.vocab_size, found.has("<image_soft_token>")) == (rows, False)
  assert found.encode("a <image_soft_token>") == codec.encode("a <image_soft_token>")
  assert codec.within(100).vocab_size > 100, "the tokenizer of another model"
