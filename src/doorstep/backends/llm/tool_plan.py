"""How a chat's tools are put to an engine: in its own way, in words, or by a schema. Decides; knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from doorstep.backends.llm import tools

Split = tools.CallStream | tools.CallsInText


@dataclass(slots=True)
class ToolPlan:
    """`functions` are for the engine, or its chat template, to say; `split` finds the calls in the answer's text."""

    messages: list[dict[str, Any]]
    functions: list[Mapping[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] | None = None  # that the answer must obey
    split: Split | None = None


def plan_tools(asked: Mapping[str, Any], *, knows_tools: bool) -> ToolPlan:
    """`asked` is a chat's body; `knows_tools`: the engine, or the model's template, has a way of its own."""
    messages = list(asked["messages"])
    functions = [tool["function"] for tool in asked.get("tools") or ()] if asked.get("tool_choice") != "none" else []
    if forced := tools.forced_tools(asked):
        schema = tools.call_schema(forced, parallel=bool(asked.get("parallel_tool_calls")))
        told = tools.with_tools_in_words(messages, forced, forced=True)
        return ToolPlan(told, schema=schema, split=tools.CallStream())
    if functions and not knows_tools:
        told = tools.with_tools_in_words(messages, functions, forced=False)
        return ToolPlan(told, split=tools.CallsInText())
    return ToolPlan(messages if knows_tools else tools.calls_in_words(messages), functions)
