"""The world for others' trainers. Gymnasium knows `apprentice/Crafter-v0` once both are imported, in any order."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder


class _AfterGymnasium(MetaPathFinder):
    """Registers the environment once gymnasium has been imported; finds nothing that others would not find."""

    def find_spec(self, name, path=None, target=None):
        if name != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    import gymnasium

    gymnasium.register("apprentice/Crafter-v0", "apprentice.environment.gymnasium_env:Crafter")


def install() -> None:
    """From now on, gymnasium.make("apprentice/Crafter-v0") works."""
    if "gymnasium" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterGymnasium())
