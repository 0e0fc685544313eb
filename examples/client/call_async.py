"""Many calls at once with the asyncio client. Serve ../python-model/models first.

python call_async.py [http://127.0.0.1:8000]
"""

import asyncio
import sys

from doorstep.client import AsyncClient

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


async def main() -> None:
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(*(client.infer("shout", text=[f"call {n}"]) for n in range(20)))
    print([answer[0].decode() for answer in answers])


asyncio.run(main())
