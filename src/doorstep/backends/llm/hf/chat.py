"""A chat's messages become a prompt, by the tokenizer's template. Knows tokenizers of transformers, and no model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import orjson

from doorstep.backends.llm import tools
from doorstep.backends.llm.tool_plan import Split, plan_tools
from doorstep.errors import InvalidArgument


class ChatTemplate:
    """`template` is a Jinja text in place of the tokenizer's own."""

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        self._tokenizer = tokenizer
        self._template = template or None
        own = tokenizer.chat_template
        if isinstance(own, Mapping):
            own = own.get("default")
        text = template or own or ""
        self.exists = bool(text)
        # Whose calls cannot be told from its words is not asked in its own way.
        self.knows_tools = tools.OPEN in text and "tools" in _variables(text)
        # `chat_template_kwargs` are variables of the template, and nothing that turns the renderer's own screws.
        self._taken = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def prompt(self, asked: Mapping[str, Any]) -> tuple[str, Split | None, dict[str, Any] | None]:
        """The prompt, what finds calls in the answer, and the JSON schema that a forced call must obey."""
        told = {**asked, "messages": [_plain(message) for message in asked["messages"]]}
        plan = plan_tools(told, knows_tools=self.knows_tools)
        # A forced call has its history in words, by the plan; otherwise a template that knows tools writes it.
        in_words = plan.schema is not None or not self.knows_tools
        messages = plan.messages if in_words else [_with_objects(message) for message in plan.messages]
        given = [{"type": "function", "function": function} for function in plan.functions] or None
        # The template's own way ends in text as well, so the calls are found there.
        split = plan.split or (tools.CallsInText() if given else None)
        return self._render(messages, asked, given), split, plan.schema

    def _render(
        self, messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any], given: Sequence[Any] | None = None
    ) -> str:
        if not self.exists:
            raise InvalidArgument(
                "this model has no chat template: send a prompt to complete, or have its config name a Jinja file, "
                'parameters { key: "chat_template" value { string_value: "chat.jinja" } }'
            )
        variables = dict(asked.get("chat_template_kwargs") or {})
        if taken := sorted(self._taken & variables.keys()):
            raise InvalidArgument(f"chat_template_kwargs cannot say '{taken[0]}'")
        if (effort := asked.get("reasoning_effort")) is not None:
            variables |= {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=given,
                    chat_template=self._template,
                    add_generation_prompt=True,
                    tokenize=False,
                    **variables,
                )
            )
        except jinja2.TemplateError as error:
            raise InvalidArgument(f"the model's chat template refuses these messages: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise InvalidArgument(
                f"the model's chat template cannot make a prompt of these messages: {type(error).__name__}: {error}"
            ) from None


def _variables(template: str) -> set[str]:
    """What a template asks for; of one with tags that only transformers knows, whether it speaks of tools."""
    try:
        environment = jinja2.Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
        return set(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError:
        return {"tools"} if "tools" in template else set()


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of text as one text: what templates of models of text expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InvalidArgument(f"a message has a part of type {kind!r}; backend 'transformers' reads text")
        texts.append(str(part.get("text", "")))
    return {**message, "content": "\n".join(texts)}


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of earlier calls as objects: OpenAI has them as JSON in a text, templates do not."""
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": message.get("content") or ""}
    made = []
    for call in calls:
        function = dict(call["function"])
        try:
            function["arguments"] = orjson.loads(function.get("arguments") or "{}")
        except orjson.JSONDecodeError:
            pass  # the model wrote it, and not well: the template gets it as it is
        made.append({**call, "function": function})
    return {**message, "content": message.get("content") or "", "tool_calls": made}
