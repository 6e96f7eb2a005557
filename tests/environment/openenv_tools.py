"""An agent of OpenEnv's that calls tools by MCP. Runs in the environment of requirements-openenv.lock, prints JSON:

python tests/environment/openenv_tools.py URL
"""

import json
import sys

from openenv.core.mcp_client import MCPToolClient

with MCPToolClient(sys.argv[1]).sync() as world:
    world.reset(seed=7)
    tools = [tool.name for tool in world.list_tools()]
    result = world.call_tool("act", actions=["move_left", "do"])
    print(json.dumps([tools, result, world.state().step_count]))
