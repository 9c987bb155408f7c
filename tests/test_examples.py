"""The example scripts run, and give what the exact cache gives where nothing is rounded."""

import sys

import torch
from transformers import DynamicCache

from tensornet_compress.inputs import load_causal_lm, load_tokenizer
from tests.documents import ROOT
from tests.models import random_text


def test_a_document_is_read_once_and_answers_come_from_its_cache(llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import serve_document

    file = tmp_path / "text.txt"
    file.write_text(random_text(30))
    command = [str(llama_folder), str(file), "the old tree", "a green", "--tokens", "4", "--bits", "8"]
    serve_document.main(command)
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("read 30 tokens")
    (cache_file,) = tmp_path.glob("text.txt.*.cache")
    written = cache_file.read_bytes()
    monkeypatch.setattr(serve_document, "read", None)  # a second run reads nothing
    serve_document.main(command)
    second = capsys.readouterr().out.splitlines()
    assert [line.partition("  [")[0] for line in first[1:]] == [line.partition("  [")[0] for line in second]
    assert cache_file.read_bytes() == written

    model, tokenizer = load_causal_lm(str(llama_folder)), load_tokenizer(str(llama_folder))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokenizer(file.read_text(), return_tensors="pt")["input_ids"], past_key_values=cache)
    ids = tokenizer("\nthe old tree", return_tensors="pt", add_special_tokens=False)["input_ids"]
    exact, _ = sys.modules["serve_document"].answer(model, cache, ids, 4)
    assert second[0].startswith(f"the old tree{tokenizer.decode(exact)}")

    monkeypatch.undo()
    for change in ("another text", "another rate"):
        file.write_text(random_text(31)) if change == "another text" else command.__setitem__(-1, "6")
        serve_document.main(command)
        assert capsys.readouterr().out.startswith("read 31 tokens")
