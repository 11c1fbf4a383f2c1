"""An answer with its drafts as one self-contained HTML page."""

from __future__ import annotations

import html
import importlib.resources
import json
import pathlib
import statistics
import string
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kangaroo_jax import resumable
from kangaroo_jax.errors import InputError

if TYPE_CHECKING:
    from kangaroo_jax.engine.draft_spans import Span
    from kangaroo_jax.engine.requests import Answer, Round

_CLASSES = {"accepted": "a", "looked up": "a l", "rejected": "x", "target": "t"}
_VISIBLE = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥", " ": "·"})


def check_place(path: str) -> None:
    """Raises `InputError` for a file that could not be written."""
    file = pathlib.Path(path)
    if file.is_dir():
        raise InputError(f"--html={path}: is a folder; give a file")
    try:
        if file.exists():
            open(file, "ab").close()
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"--html={path}: cannot be written ({error.strerror}); give another file") from None


def write(path: str, page: str) -> None:
    """Writes the page; a file that is there has the old or the new content, whatever happens."""
    try:
        resumable.replace(pathlib.Path(path), page.encode())
    except OSError as error:
        raise InputError(f"--html={path}: {error.strerror}; give another file") from None


def render(tokenizer: Any, ids: Sequence[int], prompt: str, answer: Answer, names: dict[str, str]) -> str:
    """The page.

    Args:
      tokenizer: of the target.
      ids: the prompt's token ids.
      prompt: as it is to be shown.
      answer: to a request for drafts.
      names: what made the answer: words and values.
    """
    from kangaroo_jax.engine.draft_spans import answer_spans

    spans = answer_spans(tokenizer, ids, answer)
    template = importlib.resources.files("kangaroo_jax.cli").joinpath("drafts_page.html").read_text(encoding="utf-8")
    data = json.dumps([_round(tokenizer, each) for each in answer.rounds], ensure_ascii=False)
    return string.Template(template).substitute(
        names=html.escape(" · ".join(f"{name} {value}" for name, value in names.items())),
        tiles="".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _figures(answer)
        ),
        prompt=html.escape(prompt),
        looked_up=' <span class="a l">looked up and accepted</span>' if any(answer.lookup_lengths) else "",
        answer="".join(_span(tokenizer, span) for span in spans),
        bars="".join(_bar(i, each) for i, each in enumerate(answer.rounds)),
        data=data.replace("<", "\\u003c"),  # nothing in it ends the script element
    )


def _figures(answer: Answer) -> list[tuple[str, str]]:
    drafted = sum(len(each.drafted) for each in answer.rounds)
    accepted = sum(each.accepted for each in answer.rounds)
    mean = statistics.fmean(answer.accept_lengths) if answer.accept_lengths else 1.0
    return [
        ("new tokens", str(len(answer.tokens))),
        ("rounds", str(len(answer.rounds))),
        ("mean accept length", f"{mean:.2f}"),
        ("drafted tokens", str(drafted)),
        ("of them accepted", f"{accepted} ({accepted / drafted:.0%})" if drafted else "0"),
        *([("rounds that looked up", str(looked_up))] if (looked_up := sum(map(bool, answer.lookup_lengths))) else []),
        ("tokens per second", f"{len(answer.tokens) / answer.seconds:.1f}"),
    ]


def _span(tokenizer: Any, span: Span) -> str:
    kind, text = _CLASSES[span.kind], span.text
    if kind == "x":
        text = text.replace("\n", "↵")
    elif not text:
        if span.tokens[0] not in tokenizer.all_special_ids:
            return ""  # part of the character that is with a later token
        kind, text = f"{kind} chip", _token_text(tokenizer, span.tokens[0])
    return f'<span class="{kind}" data-r="{span.round}">{html.escape(text)}</span>'


def _bar(number: int, each: Round) -> str:
    from kangaroo_jax.engine.draft_spans import rejected_path

    added = len(each.tokens) - each.accepted
    accepted = "a l" if each.looked_up else "a"
    heights = {"x": len(rejected_path(each.drafted)) if added else 0, "t": added, accepted: each.accepted}
    parts = "".join(f'<i class="{kind}" style="--n:{n}"></i>' for kind, n in heights.items() if n)
    return f'<button data-r="{number}" aria-label="round {number + 1}">{parts}</button>'


def _round(tokenizer: Any, each: Round) -> dict[str, Any]:
    """What a round's tooltip says: its drafts, in a tree along the accepted path and the likeliest rejected one."""
    from kangaroo_jax.engine.draft_spans import rejected_path

    accepted = [token for token in each.drafted if token.accepted]
    rejected = rejected_path(each.drafted)
    rows = []
    for i, token in enumerate([*accepted, *rejected]):
        # Where the target added nothing, the answer had ended.
        not_accepted = "rejected" if len(each.tokens) > each.accepted else "past the end"
        said = "accepted" if i < each.accepted else not_accepted
        rows.append([_token_text(tokenizer, token.id), f"{token.confidence:.2f}", said])
    rows += [[_token_text(tokenizer, token), "", "the target's"] for token in each.tokens[each.accepted :]]
    how = "looked up" if each.looked_up else "drafted"
    title = f"{how} {len(each.drafted)}, accepted {each.accepted}, committed {len(each.tokens)}"
    return {"title": title, "rows": rows, "others": len(each.drafted) - len(accepted) - len(rejected)}


def _token_text(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:  # part of a character
        text = str(tokenizer.convert_ids_to_tokens(token))
    return text.translate(_VISIBLE)
