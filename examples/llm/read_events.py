"""Chats with Python alone, reading the server-sent events itself: python read_events.py [127.0.0.1:8000] [MODEL]."""

import json
import sys
from http.client import HTTPConnection

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
question = {
    "model": sys.argv[2] if len(sys.argv) > 2 else "chat",
    "messages": [{"role": "user", "content": "What is 2+2?"}],
    "max_tokens": 16,
    "temperature": 0,
    "stream": True,
}

connection = HTTPConnection(address, timeout=60)
connection.request("POST", "/v1/chat/completions", json.dumps(question), {"Content-Type": "application/json"})
response = connection.getresponse()
if response.status != 200:
    sys.exit(json.load(response)["error"]["message"])
for line in response:
    field, _, value = line.decode().rstrip("\n").partition(": ")
    if field != "data" or value == "[DONE]":  # an empty line ends an event; a comment (": ping") says all is well
        continue
    event = json.loads(value)
    if "error" in event:
        sys.exit(event["error"]["message"])
    print(event["choices"][0]["delta"].get("content", ""), end="", flush=True)
print()
connection.close()
